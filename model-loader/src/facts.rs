//! What the broker and its clients are told of a model besides its image: read from the image, bounded. Nothing is loaded here.

use shm_layout::image::CheckedImage;
use shm_layout::wire::TaskFacts;
use shm_os::image_backing::PublishedImage;

/// What the model in an image is for.
///
/// # Errors
/// What is wrong with the image, in words.
pub(crate) fn facts_of(image: &PublishedImage) -> Result<TaskFacts, String> {
    let mapping = image.map().map_err(|error| error.to_string())?;
    let checked = CheckedImage::new(mapping.as_bytes()).map_err(|error| error.to_string())?;
    Ok(TaskFacts::of(checked.header().values().task))
}

//! What the broker and its clients are told of a model besides its image: read from the image, bounded. Nothing is loaded here.

use shm_layout::image::CheckedImage;
use shm_layout::limits::MAX_LABEL_BYTES;
use shm_layout::wire::{NamedPrompt, TaskFacts};
use shm_os::image_backing::PublishedImage;

/// What the model in an image is for.
///
/// # Errors
/// What is wrong with the image, in words.
pub(crate) fn facts_of(image: &PublishedImage) -> Result<TaskFacts, String> {
    let mapping = image.map().map_err(|error| error.to_string())?;
    facts_of_bytes(mapping.as_bytes())
}

fn cut(mut label: String) -> String {
    label.truncate(label.floor_char_boundary(MAX_LABEL_BYTES));
    label
}

/// What the model in the bytes of an image is for.
///
/// # Errors
/// What is wrong with the image, in words.
pub fn facts_of_bytes(bytes: &[u8]) -> Result<TaskFacts, String> {
    let checked = CheckedImage::new(bytes).map_err(|error| error.to_string())?;
    let facts = engine::describe(&checked).map_err(|error| error.to_string())?;
    let prompts = facts.prompts.into_iter().map(|(name, text)| NamedPrompt { name, text });
    let told = TaskFacts {
        task: facts.task,
        labels: facts.labels.into_iter().map(cut).collect(),
        prompts: prompts.collect(),
        default_prompt: facts.default_prompt,
        has_chat_template: facts.has_chat_template,
    };
    told.check().map_err(|what| format!("the model has {what}"))?;
    Ok(told)
}

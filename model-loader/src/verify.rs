//! Checking every compiled image of a cache folder on demand, whatever stamps say.

use crate::error::LoadError;
use crate::load::{IMAGES_FOLDER, Images, check_file_fully};
use shm_os::OsError;
use shm_os::image_backing::{ImageBacking, ImageKey};
use std::path::Path;

/// Most files of the folder that are looked at.
const MAX_FILES: usize = 4096;

/// A cached image that was checked.
#[derive(Debug)]
pub struct CachedImage {
    /// Its file's name.
    pub name: String,
    /// Its length, bytes.
    pub len_bytes: u64,
    /// What is wrong with it; `None` when it is what the compiler wrote.
    pub damage: Option<String>,
}

/// Reads all compiled images in the cache folder and checks their content hashes: about half a second for a gigabyte. A
/// damaged one is removed, so that the next load compiles the model again; whoever has it mapped keeps it.
///
/// # Errors
/// [`LoadError`] when the folder cannot be read. A folder that is not there has no images.
pub fn verify_cached_images(cache_dir: &Path) -> Result<Vec<CachedImage>, LoadError> {
    let folder = cache_dir.join(IMAGES_FOLDER);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let images = Images::open(&folder)?;
    let failed = |e| OsError::new("reading the folder of images", e);
    let mut checked = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(failed)?.take(MAX_FILES) {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        // Locks, stamps and unfinished files have a dot in their names, images none.
        let Some(key) = ImageKey::new(&name).ok().filter(|_| !name.contains('.')) else { continue };
        let (len_bytes, damage) = match images.files.open_existing(&key) {
            Ok(None) => continue,
            Ok(Some(file)) => {
                let found = check_file_fully(&images, &key, &file, &mut |_| {});
                (file.len_bytes, found.err().map(|error| error.to_string()))
            }
            Err(error) => (0, Some(error.to_string())),
        };
        if damage.is_some() {
            images.files.remove(&key)?;
        }
        checked.push(CachedImage { name, len_bytes, damage });
    }
    checked.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(checked)
}

//! The name of a compiled image in the cache: which model, which state of its folder, which layout. A changed folder or
//! another layout is another name, so a stale image is never found.

use shm_layout::image::LAYOUT_VERSION;
use shm_os::OsError;
use shm_os::image_backing::{BackingError, ImageKey};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Compiler output that is laid out the same but computed differently needs another number here.
const COMPILER_VERSION: u32 = 3;
/// Most entries of a model folder that are looked at; a folder with more is no model folder.
const MAX_ENTRIES: usize = 4096;
/// Deepest folder inside a model folder that is looked at (`1_Pooling/config.json` lies at 2).
const MAX_DEPTH: usize = 3;
/// Characters of the model's id that stand in the name, for people who look into the cache.
const READABLE_CHARS: usize = 60;

/// The cache name of the image of `model_id` as its folder is now.
///
/// # Errors
/// When the folder cannot be read.
pub(crate) fn image_key(model_id: &str, folder: &Path) -> Result<ImageKey, BackingError> {
    let mut states = Vec::new();
    collect(folder, Path::new(""), 0, &mut states)?;
    states.sort();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&LAYOUT_VERSION.to_le_bytes());
    hasher.update(&COMPILER_VERSION.to_le_bytes());
    hasher.update(model_id.as_bytes());
    for state in &states {
        hasher.update(&[0]);
        hasher.update(state.as_bytes());
    }
    ImageKey::new(&format!("{}{}", readable(model_id), &hasher.finalize().to_hex()[..24]))
}

/// The part of a key that all images of a model share.
pub(crate) fn readable(model_id: &str) -> String {
    let tail: String =
        model_id.chars().rev().take(READABLE_CHARS).collect::<Vec<_>>().into_iter().rev().collect();
    let name: String = tail.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    // Two ids that read alike still differ here, so that one never clears away the other's images.
    let id_hash = blake3::hash(model_id.as_bytes()).to_hex();
    format!("m{name}-{}-", &id_hash[..8])
}

fn collect(folder: &Path, below: &Path, depth: usize, states: &mut Vec<String>) -> Result<(), OsError> {
    let failed = |e| OsError::new("reading the model folder", e);
    for entry in fs::read_dir(folder.join(below)).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = below.join(entry.file_name());
        if states.len() >= MAX_ENTRIES {
            break;
        }
        // Links are followed: snapshots of a hub cache are links to blobs. One that leads nowhere counts as absent.
        let Ok(state) = fs::metadata(folder.join(&name)) else { continue };
        if state.is_dir() {
            if depth + 1 < MAX_DEPTH {
                collect(folder, &name, depth + 1, states)?;
            }
        } else if matters(&name) {
            states.push(format!(
                "{}:{}:{}.{:09}:{}:{}",
                name.display(),
                state.len(),
                state.mtime(),
                state.mtime_nsec(),
                state.ino(),
                state.dev()
            ));
        }
    }
    Ok(())
}

fn matters(name: &Path) -> bool {
    matches!(name.extension().and_then(|e| e.to_str()), Some("json" | "safetensors" | "txt" | "model"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_folder_has_another_key_and_an_unchanged_one_the_same() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("1_Pooling")).unwrap();
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        fs::write(folder.path().join("1_Pooling/config.json"), "{}").unwrap();
        fs::write(folder.path().join("README.md"), "x").unwrap();
        let key = |id: &str| image_key(id, folder.path()).unwrap();
        let first = key("org/name");
        assert_eq!(first, key("org/name"));
        assert_ne!(first, key("org_name"), "ids that read alike are still apart");
        fs::write(folder.path().join("README.md"), "longer").unwrap();
        assert_eq!(first, key("org/name"), "what the compiler does not read does not matter");
        fs::write(folder.path().join("1_Pooling/config.json"), "{ }").unwrap();
        assert_ne!(first, key("org/name"));
    }

    #[test]
    fn long_and_strange_ids_are_usable_names() {
        let folder = tempfile::tempdir().unwrap();
        let id = format!("/{}/ümlaut model@main", "x".repeat(500));
        image_key(&id, folder.path()).unwrap();
    }
}

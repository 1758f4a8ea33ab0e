//! A model folder on disk: which of its files are usable, and whether it is complete. Reads small files and
//! safetensors headers only; never follows a link out of the root that the caller names, never opens a device.

use crate::error::SourceError;
use crate::layout::{FolderProblem, Layout, Tree, layout_of};
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest safetensors header that is looked into, in bytes. The compiler's own limit may be lower.
const MAX_HEADER_BYTES: u64 = 16 << 20;

/// The real path of a local folder.
///
/// # Errors
/// [`SourceError::Folder`] if it doesn't exist or is none.
pub(crate) fn real_path(path: &Path) -> Result<PathBuf, SourceError> {
    let problem = |problem| SourceError::Folder { path: path.to_path_buf(), problem };
    let real = path.canonicalize().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => problem(FolderProblem::NoFolder),
        _ => problem(unreadable(".", &error)),
    })?;
    if real.is_dir() { Ok(real) } else { Err(problem(FolderProblem::NoFolder)) }
}

/// Checks that `folder` holds a complete model: config, tokenizer, safetensors weights (all shards, each as long as its
/// header says), and what its modules.json names. Links may lead to regular files only.
///
/// # Errors
/// The first [`FolderProblem`] found.
pub fn check_folder(folder: &Path) -> Result<(), FolderProblem> {
    check(folder, None, false).map(|_| ())
}

/// As [`check_folder`]; every file must resolve beneath `root` if one is given.
pub(crate) fn check(
    folder: &Path,
    root: Option<&Path>,
    needs_modules: bool,
) -> Result<Layout, FolderProblem> {
    if !folder.is_dir() {
        return Err(FolderProblem::NoFolder);
    }
    let mut tree = DiskTree { folder, root };
    let layout = layout_of(&mut tree, needs_modules)?;
    for name in &layout.weights {
        tree.check_safetensors_length(name)?;
    }
    Ok(layout)
}

pub(crate) struct DiskTree<'a> {
    pub(crate) folder: &'a Path,
    /// Where links have to stay, a real path. `None`: anywhere.
    pub(crate) root: Option<&'a Path>,
}

impl DiskTree<'_> {
    /// The real path and metadata of a file, `None` if it isn't there (a link to nothing counts as not there).
    fn locate(&self, name: &str) -> Result<Option<(PathBuf, Metadata)>, FolderProblem> {
        let file = || name.to_owned();
        let real = match self.folder.join(name).canonicalize() {
            Ok(real) => real,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(error) => return Err(unreadable(name, &error)),
        };
        if self.root.is_some_and(|root| !real.starts_with(root)) {
            return Err(FolderProblem::LinkOutside { file: file() });
        }
        let metadata = std::fs::symlink_metadata(&real).map_err(|error| unreadable(name, &error))?;
        if !metadata.is_file() {
            return Err(FolderProblem::NotRegular { file: file() });
        }
        if metadata.len() == 0 {
            return Err(FolderProblem::BadFile {
                file: file(),
                reason: "it is empty; fetch it again".to_owned(),
            });
        }
        Ok(Some((real, metadata)))
    }

    /// Opens a file that was just seen to be a regular one, and looks again at what was opened. A FIFO put in between
    /// the two would block here: one reason why this runs in a child that can be killed.
    pub(crate) fn open(&self, name: &str) -> Result<(File, u64), FolderProblem> {
        let Some((real, _)) = self.locate(name)? else {
            let needed_by = "it was there a moment ago; don't change the folder meanwhile".to_owned();
            return Err(FolderProblem::Missing { file: name.to_owned(), needed_by });
        };
        let file = File::open(&real).map_err(|error| unreadable(name, &error))?;
        let metadata = file.metadata().map_err(|error| unreadable(name, &error))?;
        if !metadata.is_file() {
            return Err(FolderProblem::NotRegular { file: name.to_owned() });
        }
        Ok((file, metadata.len()))
    }

    fn check_safetensors_length(&self, name: &str) -> Result<(), FolderProblem> {
        let (mut file, actual_bytes) = self.open(name)?;
        let expected_bytes = safetensors_bytes(&mut file, actual_bytes)
            .map_err(|reason| FolderProblem::BadFile { file: name.to_owned(), reason })?;
        if expected_bytes != actual_bytes {
            return Err(FolderProblem::Truncated { file: name.to_owned(), expected_bytes, actual_bytes });
        }
        Ok(())
    }
}

impl Tree for DiskTree<'_> {
    type Error = FolderProblem;

    fn has(&mut self, name: &str) -> Result<bool, FolderProblem> {
        Ok(self.locate(name)?.is_some())
    }

    fn read(&mut self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, FolderProblem> {
        let (file, _) = self.open(name)?;
        let mut bytes = Vec::new();
        file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(|error| unreadable(name, &error))?;
        if bytes.len() as u64 > limit_bytes {
            let reason = format!("it is longer than {limit_bytes} bytes");
            return Err(FolderProblem::BadFile { file: name.to_owned(), reason });
        }
        Ok(bytes)
    }
}

#[derive(Deserialize)]
struct HeaderEntry {
    // Absent in `__metadata__`.
    data_offsets: Option<[u64; 2]>,
}

/// How long a safetensors file is by its own header. Only meant to tell a cut file from a whole one: the compiler
/// validates the header in full.
fn safetensors_bytes(file: &mut impl Read, actual_bytes: u64) -> Result<u64, String> {
    let mut prefix = [0_u8; 8];
    file.read_exact(&mut prefix)
        .map_err(|_| "it is too short for a safetensors file; fetch it again".to_owned())?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > actual_bytes {
        return Err(format!(
            "its header would have {header_bytes} bytes: it is cut, or not a safetensors file; fetch it again"
        ));
    }
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header).map_err(|error| error.to_string())?;
    let entries: HashMap<String, HeaderEntry> = serde_json::from_slice(&header)
        .map_err(|error| format!("its safetensors header is broken: {error}"))?;
    let end = entries.values().filter_map(|entry| entry.data_offsets).map(|[_, end]| end).max().unwrap_or(0);
    header_bytes
        .checked_add(8)
        .and_then(|n| n.checked_add(end))
        .ok_or_else(|| "its offsets overflow".to_owned())
}

fn unreadable(name: &str, error: &io::Error) -> FolderProblem {
    FolderProblem::Unreadable { file: name.to_owned(), reason: error.to_string() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    /// The smallest safetensors file: one tensor of `data.len()` bytes.
    pub(crate) fn safetensors(data: &[u8]) -> Vec<u8> {
        let header = format!(r#"{{"w":{{"dtype":"U8","shape":[{0}],"data_offsets":[0,{0}]}}}}"#, data.len());
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn model(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("config.json"), "{}").unwrap();
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        fs::write(dir.join("model.safetensors"), safetensors(b"abcd")).unwrap();
    }

    #[test]
    fn a_whole_folder_passes_and_a_cut_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path());
        check_folder(dir.path()).unwrap();
        let weights = dir.path().join("model.safetensors");
        let whole = fs::read(&weights).unwrap();
        for cut in 0..whole.len() {
            fs::write(&weights, &whole[..cut]).unwrap();
            assert!(check_folder(dir.path()).is_err(), "{cut} bytes");
        }
        let mut long = whole.clone();
        long.push(0);
        fs::write(&weights, long).unwrap();
        assert!(matches!(check_folder(dir.path()), Err(FolderProblem::Truncated { .. })));
        assert_eq!(check_folder(Path::new("/no/such")), Err(FolderProblem::NoFolder));
    }

    #[test]
    fn lying_headers_are_refused_without_reading_them() {
        for header in [u64::MAX, MAX_HEADER_BYTES + 1, 1 << 40] {
            let error = safetensors_bytes(&mut &header.to_le_bytes()[..], u64::MAX).unwrap_err();
            assert!(error.contains("header"), "{error}");
        }
        let huge = r#"{"w":{"data_offsets":[0,18446744073709551615]}}"#;
        let mut bytes = (huge.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(huge.as_bytes());
        assert_eq!(safetensors_bytes(&mut &bytes[..], 100).unwrap_err(), "its offsets overflow");
    }

    #[test]
    fn links_may_only_lead_to_regular_files_within_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (folder, inside, outside) = (base.join("root/m"), base.join("root/blob"), base.join("outside"));
        model(&folder);
        for place in [&inside, &outside] {
            fs::write(place, "{}").unwrap();
            fs::remove_file(folder.join("config.json")).unwrap();
            symlink(place, folder.join("config.json")).unwrap();
            check_folder(&folder).unwrap();
            let held = check(&folder, Some(&base.join("root")), false);
            assert_eq!(held.is_ok(), place == &inside);
        }
        for target in ["/dev/zero", "/dev", "fifo"] {
            if target == "fifo" {
                assert!(Command::new("mkfifo").arg(folder.join("fifo")).status().unwrap().success());
            }
            fs::remove_file(folder.join("config.json")).unwrap();
            symlink(target, folder.join("config.json")).unwrap();
            assert!(matches!(check_folder(&folder), Err(FolderProblem::NotRegular { .. })), "{target}");
        }
        fs::remove_file(folder.join("config.json")).unwrap();
        symlink("nowhere", folder.join("config.json")).unwrap();
        assert!(matches!(check_folder(&folder), Err(FolderProblem::Missing { .. })));
    }
}

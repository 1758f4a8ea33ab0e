//! PATH arguments to documents: folders are walked, files taken as they are. Nothing is read here.

use std::path::{Path, PathBuf};

use crate::document::Format;
use crate::limits::{WALK_DEPTH_MAX, WALK_FILES_MAX};

/// Why the arguments don't name documents.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// A path that is not there or can't be looked at.
    #[error("can't look at {}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file named by itself whose format is not known.
    #[error(
        "{}: unknown document format; known extensions are {}",
        path.display(),
        Format::EXTENSIONS.join(", ")
    )]
    UnknownFormat {
        /// The path.
        path: PathBuf,
    },
    /// Over [`WALK_FILES_MAX`].
    #[error("more than {WALK_FILES_MAX} documents (limit WALK_FILES_MAX): index in several runs")]
    TooManyFiles,
}

/// What the arguments name.
#[derive(Debug, Default)]
pub struct Walked {
    /// Canonical paths of the documents, sorted, each once.
    pub documents: Vec<PathBuf>,
    /// Folders that couldn't be read, or lie too deep; the others were walked.
    pub problems: Vec<WalkProblem>,
}

/// A folder that was left out.
#[derive(Debug)]
pub struct WalkProblem {
    /// The folder.
    pub path: PathBuf,
    /// Why.
    pub message: String,
}

/// Expands files and folders to documents. In folders, names that begin with a dot, symbolic links (they may
/// loop, or lead out of the folder) and files of unknown formats are passed over; an argument may be a link. An
/// argument that is not there or of an unknown format is an error: it was asked for by name.
pub fn expand(paths: &[PathBuf]) -> Result<Walked, WalkError> {
    let mut walked = Walked::default();
    for path in paths {
        let io = |source| WalkError::Io { path: path.clone(), source };
        let full = std::fs::canonicalize(path).map_err(io)?;
        if std::fs::metadata(&full).map_err(io)?.is_dir() {
            walk(&full, &mut walked)?;
        } else if Format::of_path(&full).is_some() {
            walked.documents.push(full);
        } else {
            return Err(WalkError::UnknownFormat { path: path.clone() });
        }
    }
    walked.documents.sort_unstable();
    walked.documents.dedup();
    Ok(walked)
}

fn walk(root: &Path, walked: &mut Walked) -> Result<(), WalkError> {
    let mut folders = vec![(root.to_owned(), 0_usize)];
    while let Some((folder, depth)) = folders.pop() {
        let problem = |message: String| WalkProblem { path: folder.clone(), message };
        if depth > WALK_DEPTH_MAX {
            walked
                .problems
                .push(problem(format!("more than {WALK_DEPTH_MAX} folders deep (limit WALK_DEPTH_MAX)")));
            continue;
        }
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                walked.problems.push(problem(error.to_string()));
                continue;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    walked.problems.push(problem(error.to_string()));
                    break;
                }
            };
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            // The entry's own type: links are not followed.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push((entry.path(), depth + 1)),
                Ok(kind) if kind.is_file() && Format::of_path(&entry.path()).is_some() => {
                    if walked.documents.len() >= WALK_FILES_MAX {
                        return Err(WalkError::TooManyFiles);
                    }
                    walked.documents.push(entry.path());
                }
                Ok(_) => {}
                Err(error) => walked.problems.push(problem(error.to_string())),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_sorted_and_hidden_names_passed_over() {
        let root = tempfile::tempdir().expect("temp dir");
        let root = root.path().canonicalize().expect("exists");
        for name in ["b.md", "a/x.HTML", "a/y.pdf", ".git/z.md", "a/.hidden.txt", "c.csv"] {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().expect("has one")).expect("folder");
            std::fs::write(path, "x").expect("write");
        }
        std::os::unix::fs::symlink(&root, root.join("a/up")).expect("link");
        let walked = expand(&[root.clone(), root.join("b.md")]).expect("walks");
        let names: Vec<_> =
            walked.documents.iter().map(|path| path.strip_prefix(&root).expect("inside")).collect();
        assert_eq!(names, [Path::new("a/x.HTML"), Path::new("b.md"), Path::new("c.csv")]);
        assert!(walked.problems.is_empty());
    }

    #[test]
    fn what_was_named_must_be_a_document() {
        let root = tempfile::tempdir().expect("temp dir");
        let file = root.path().join("a.pdf");
        std::fs::write(&file, "x").expect("write");
        assert!(matches!(expand(&[file]), Err(WalkError::UnknownFormat { .. })));
        assert!(matches!(expand(&[root.path().join("none")]), Err(WalkError::Io { .. })));
    }
}

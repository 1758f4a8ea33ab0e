//! A file of the user to bytes: regular files only, bounded, with a stamp that tells whether it changed since.

use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

use crate::limits::FILE_BYTES_MAX;

/// Why a file can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The path leads nowhere, through a loop of links, or to what may not be read.
    #[error("can't read {}: {source}", path.display())]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not a regular file.
    #[error("{} is {what}, not a regular file", path.display())]
    NotRegular {
        /// The path asked for.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Over [`FILE_BYTES_MAX`].
    #[error("{} has over {FILE_BYTES_MAX} bytes (limit FILE_BYTES_MAX): split it into smaller files", path.display())]
    TooLarge {
        /// The path asked for.
        path: PathBuf,
    },
    /// The path is not UTF-8, and so can't be a key of the store.
    #[error("the path {} is not UTF-8: rename the file", path.display())]
    PathNotUtf8 {
        /// The path asked for.
        path: PathBuf,
    },
}

/// What identifies a state of a file without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size_bytes: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        }
    }

    /// Whether the file at `path` is still in this state.
    pub fn is_current(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|metadata| Self::of(&metadata) == *self)
    }
}

/// A file's content.
#[derive(Debug)]
pub struct Content {
    /// All its bytes.
    pub bytes: Vec<u8>,
    /// Its state when it was opened.
    pub stamp: Stamp,
}

/// The canonical form of a path, links resolved: the key of a document in the store.
pub fn canonical(path: &Path) -> Result<(PathBuf, String), ReadError> {
    let full =
        std::fs::canonicalize(path).map_err(|source| ReadError::Io { path: path.to_owned(), source })?;
    let name = full.to_str().ok_or_else(|| ReadError::PathNotUtf8 { path: path.to_owned() })?.to_owned();
    Ok((full, name))
}

/// Reads a regular file of at most [`FILE_BYTES_MAX`]. Never waits for a writer of a FIFO, never opens a device.
pub fn read(path: &Path) -> Result<Content, ReadError> {
    let io = |source| ReadError::Io { path: path.to_owned(), source };
    refuse_special(path, &std::fs::metadata(path).map_err(io)?)?;
    // What was regular a moment ago may be a FIFO now: opened without waiting, then looked at again.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file: File = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    refuse_special(path, &metadata)?;
    if metadata.size() > FILE_BYTES_MAX {
        return Err(ReadError::TooLarge { path: path.to_owned() });
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.size()).unwrap_or(0));
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(ReadError::TooLarge { path: path.to_owned() });
    }
    Ok(Content { bytes, stamp: Stamp::of(&metadata) })
}

fn refuse_special(path: &Path, metadata: &Metadata) -> Result<(), ReadError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else {
        "a special file"
    };
    Err(ReadError::NotRegular { path: path.to_owned(), what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_files_are_refused_without_waiting() {
        let folder = tempfile::tempdir().expect("temp dir");
        let fifo = folder.path().join("pipe.md");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR).expect("fifo");
        assert!(matches!(read(&fifo), Err(ReadError::NotRegular { what: "a FIFO", .. })));
        assert!(matches!(read(Path::new("/dev/zero")), Err(ReadError::NotRegular { what: "a device", .. })));
        assert!(matches!(read(folder.path()), Err(ReadError::NotRegular { what: "a folder", .. })));
        let ring = folder.path().join("loop.md");
        std::os::unix::fs::symlink(&ring, &ring).expect("link");
        assert!(matches!(canonical(&ring), Err(ReadError::Io { .. })));
        assert!(matches!(read(&folder.path().join("none.md")), Err(ReadError::Io { .. })));
    }

    #[test]
    fn a_sparse_file_over_the_limit_is_refused_unread() {
        let folder = tempfile::tempdir().expect("temp dir");
        let path = folder.path().join("big.txt");
        File::create(&path).and_then(|file| file.set_len(FILE_BYTES_MAX + 1)).expect("sparse file");
        assert!(matches!(read(&path), Err(ReadError::TooLarge { .. })));
    }

    #[test]
    fn a_stamp_notices_a_change() {
        let folder = tempfile::tempdir().expect("temp dir");
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "one").expect("write");
        let content = read(&path).expect("regular file");
        assert_eq!(content.bytes, b"one");
        assert!(content.stamp.is_current(&path));
        std::fs::write(&path, "longer").expect("write");
        assert!(!content.stamp.is_current(&path));
    }
}

//! Where an image's bytes live: three backings behind one trait, with what each promises. What the bytes mean must
//! not be known here.
//!
//! An image is *reserved* (a window of its final size), filled, *published* (immutable from then on, as far as the
//! backing can promise) and *mapped* by whoever receives its read-only descriptor.

mod choice;
mod copy;
mod image_file;
mod posix_shm;
mod sealed_memfd;
mod writer;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use shm_layout::wire::BackingKind;

pub use choice::{AUTO_FILE_BYTES, BackingChoice};
pub use copy::{COPY_STEP_BYTES, copy_file_into_memfd, copy_image_into_sealed_memfd};
pub use image_file::ImageFile;
pub use posix_shm::PosixShm;
pub use sealed_memfd::SealedMemfd;
pub use writer::ImageWriter;

use crate::mapping::{MappingError, ReadOnlyMapping};
use crate::memfd::{self, MAX_IMAGE_BYTES, MemfdError};
use crate::run_dir::RunDirError;
use crate::{OsError, run_dir};

/// Longest image key, bytes.
pub const MAX_KEY_BYTES: usize = 128;

/// What a backing promises about a published image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarantees {
    /// Nobody can change the bytes after publishing: neither its maker nor the user who owns it nor root.
    pub immutable_for_everyone: bool,
    /// The descriptor handed out refuses writing, truncating, punching and writable shared mappings.
    pub read_only_descriptor: bool,
    /// The size can't change, so reading a mapping never raises SIGBUS. Otherwise it is survived (module `sigbus`).
    pub size_is_fixed: bool,
    /// The image is there after the broker (and the machine) restarts.
    pub survives_restart: bool,
    /// The system may drop the pages under memory pressure and read them again.
    pub evictable: bool,
    /// No name leads to it: it is gone with its last descriptor and mapping, however its users die.
    pub nameless: bool,
    /// Works beyond Linux.
    pub portable: bool,
}

impl Guarantees {
    /// What backings of a kind promise.
    pub fn of(kind: BackingKind) -> Guarantees {
        let none = Guarantees {
            immutable_for_everyone: false,
            read_only_descriptor: true,
            size_is_fixed: false,
            survives_restart: false,
            evictable: false,
            nameless: false,
            portable: false,
        };
        match kind {
            BackingKind::SealedMemfd => {
                Guarantees { immutable_for_everyone: true, size_is_fixed: true, nameless: true, ..none }
            }
            BackingKind::ImageFile => {
                Guarantees { survives_restart: true, evictable: true, portable: true, ..none }
            }
            BackingKind::PosixShm => Guarantees { nameless: true, portable: true, ..none },
        }
    }
}

/// Why an image could not be made, published, found or accepted.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The key is not usable as a file name.
    #[error(
        "{key:?} is no image key: use 1 to {MAX_KEY_BYTES} of the characters a-z A-Z 0-9 . _ - and no leading dot"
    )]
    BadKey {
        /// The key's first characters.
        key: String,
    },
    /// The image is empty or too large.
    #[error("an image of {len_bytes} bytes is not allowed: it must have 1 to {MAX_IMAGE_BYTES} bytes")]
    BadLength {
        /// Length asked for, bytes.
        len_bytes: u64,
    },
    /// What was written does not fit the window reserved.
    #[error("the write would end at byte {end_bytes} of an image of {len_bytes} bytes: reserve more")]
    PastEnd {
        /// Where the write would end.
        end_bytes: u64,
        /// The reserved length, bytes.
        len_bytes: u64,
    },
    /// There is no space for the image. Nothing is left behind.
    #[error(
        "no space for an image of {len_bytes} bytes in {place}: {source}; free space there or choose another place"
    )]
    NoSpace {
        /// Where the space is missing.
        place: String,
        /// Bytes wanted.
        len_bytes: u64,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file under the writer's window vanished or could not be written.
    #[error(
        "the image's file was truncated or could not be written while it was filled: {place} needs checking"
    )]
    WriterPoisoned {
        /// Where the file lies.
        place: String,
    },
    /// A received or cached object is not of the right type, owner, mode or size.
    #[error("the image was refused: {why}")]
    Refused {
        /// What is wrong and what helps.
        why: String,
    },
    /// The file to copy ended early or grew.
    #[error(
        "the image file has {actual_bytes} bytes, {expected_bytes} were expected: it changed or is truncated"
    )]
    SourceChanged {
        /// Bytes expected.
        expected_bytes: u64,
        /// Bytes found.
        actual_bytes: u64,
    },
    /// The progress callback asked to stop.
    #[error("copying the image was cancelled")]
    Cancelled,
    /// The memory object is not as it must be.
    #[error(transparent)]
    Object(#[from] MemfdError),
    /// Mapping failed.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The cache folder can't be used.
    #[error(transparent)]
    Folder(#[from] RunDirError),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A name for an image, safe as a file name: 1 to [`MAX_KEY_BYTES`] of `[A-Za-z0-9._-]`, no leading dot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey(String);

impl ImageKey {
    /// Checks a name.
    pub fn new(key: &str) -> Result<Self, BackingError> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let good =
            (1..=MAX_KEY_BYTES).contains(&key.len()) && !key.starts_with('.') && key.bytes().all(allowed);
        if good {
            Ok(Self(key.into()))
        } else {
            Err(BackingError::BadKey { key: key.chars().take(32).collect() })
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A finished image: what its owner holds and what clients receive a copy of.
#[derive(Debug)]
pub struct PublishedImage {
    /// Read-only, close-on-exec descriptor to hand out.
    pub fd_read_only: OwnedFd,
    /// Length, bytes.
    pub len_bytes: u64,
    /// Which backing holds it; the receiver needs it for [`map_published`].
    pub kind: BackingKind,
    /// Where it lies, for backings with files.
    pub path: Option<PathBuf>,
}

impl PublishedImage {
    /// Takes over a memory object that another process filled and sealed (a loader child), after checking its seals
    /// and length. The read-only descriptor is made anew: the one received may be writable.
    pub fn from_sealed(fd: BorrowedFd<'_>) -> Result<PublishedImage, BackingError> {
        memfd::verify_image_seals(fd)?;
        let len_bytes = memfd::len_bytes(fd)?;
        check_length(len_bytes)?;
        let fd_read_only = memfd::reopen_read_only(fd)?;
        Ok(PublishedImage { fd_read_only, len_bytes, kind: BackingKind::SealedMemfd, path: None })
    }

    /// Maps the image in this process, with the same checks as a receiver makes.
    pub fn map(&self) -> Result<ReadOnlyMapping, BackingError> {
        map_published(self.fd_read_only.as_fd(), self.kind, self.len_bytes)
    }
}

/// One way to hold images.
pub trait ImageBacking: fmt::Debug + Send + Sync {
    /// Which one it is.
    fn kind(&self) -> BackingKind;

    /// What it promises about published images.
    fn guarantees(&self) -> Guarantees {
        Guarantees::of(self.kind())
    }

    /// Reserves `len_bytes` (1 to [`MAX_IMAGE_BYTES`]) for an image, zero-filled. Dropping the writer leaves nothing
    /// behind.
    fn reserve(&self, key: &ImageKey, len_bytes: u64) -> Result<ImageWriter, BackingError>;

    /// The image published earlier under `key`, for backings that survive restarts; `None` otherwise, and where
    /// there is none. Owner, mode and type are checked; the content is the caller's to check.
    fn open_existing(&self, key: &ImageKey) -> Result<Option<PublishedImage>, BackingError>;

    /// Removes a kept image; `false` where there was none. Those who mapped it keep it.
    fn remove(&self, key: &ImageKey) -> Result<bool, BackingError>;
}

/// Maps an image received as a descriptor, after the checks that its kind allows: seals for memory objects; type,
/// owner, mode (0400), size and a read-only descriptor for the others. The first file-backed mapping installs the
/// SIGBUS handler.
pub fn map_published(
    fd: BorrowedFd<'_>,
    kind: BackingKind,
    expected_len_bytes: u64,
) -> Result<ReadOnlyMapping, BackingError> {
    check_length(expected_len_bytes)?;
    let mapping = match kind {
        BackingKind::SealedMemfd => ReadOnlyMapping::map_sealed(fd, expected_len_bytes)?,
        BackingKind::ImageFile | BackingKind::PosixShm => {
            check_read_only_object(fd)?;
            memfd::verify_size(fd, expected_len_bytes)?;
            // SAFETY: size, owner (this user) and mode (0400) were just checked: only this user's programs could
            // change the object, by giving themselves the right first; the documentation of the kind says so.
            unsafe { ReadOnlyMapping::map_guarded(fd, expected_len_bytes)? }
        }
    };
    mapping.prefer_huge_pages();
    Ok(mapping)
}

/// The state of transparent huge pages for shared memory, as the kernel shows it ("always", "never", "advise", ...).
/// With "never" an image's first touch costs one fault for every 4 KiB or for each page-cache folio.
pub fn shared_memory_huge_pages() -> String {
    let text =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
    chosen.unwrap_or("unknown").to_owned()
}

fn check_length(len_bytes: u64) -> Result<(), BackingError> {
    if (1..=MAX_IMAGE_BYTES).contains(&len_bytes) {
        Ok(())
    } else {
        Err(BackingError::BadLength { len_bytes })
    }
}

/// Type, owner, mode and access of a file-backed image.
fn check_read_only_object(fd: BorrowedFd<'_>) -> Result<(), BackingError> {
    let refused = |why: String| Err(BackingError::Refused { why });
    let stat = nix::sys::stat::fstat(fd).map_err(|e| OsError::new("inspecting an image", e))?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFREG {
        return refused("it is no regular file; remove it, it will be made anew".into());
    }
    let us = run_dir::effective_uid();
    if stat.st_uid != us {
        return refused(format!("it belongs to user {}, not to this user ({us})", stat.st_uid));
    }
    let mode = stat.st_mode & 0o7777;
    if mode != 0o400 {
        return refused(format!("it has mode {mode:04o} instead of 0400; remove it, it will be made anew"));
    }
    let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL)
        .map_err(|e| OsError::new("inspecting an image's descriptor", e))?;
    if flags & libc::O_ACCMODE != libc::O_RDONLY {
        return refused("its descriptor is writable: the sender is faulty".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_file_names_without_surprises() {
        for good in ["a", "all-MiniLM-L6-v2.f32", "x_1", &"k".repeat(MAX_KEY_BYTES)] {
            assert_eq!(ImageKey::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".x", "a/b", "a\0", "ä", " ", &"k".repeat(MAX_KEY_BYTES + 1)] {
            assert!(ImageKey::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn kinds_have_stable_numbers_and_names() {
        assert_eq!(BackingKind::ALL.map(BackingKind::as_u8), [1, 2, 3]);
        for kind in BackingKind::ALL {
            assert_eq!(BackingKind::from_u8(kind.as_u8()), Some(kind));
            assert_eq!(kind.name().parse::<BackingKind>().unwrap(), kind);
        }
        assert_eq!(BackingKind::from_u8(0), None);
        assert!("tape".parse::<BackingKind>().unwrap_err().to_string().contains("posix-shm"));
    }

    #[test]
    fn huge_page_state_is_one_word() {
        let state = shared_memory_huge_pages();
        assert!(!state.is_empty() && !state.contains(char::is_whitespace), "{state}");
    }
}

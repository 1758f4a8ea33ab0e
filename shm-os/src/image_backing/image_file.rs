//! Images as files in a private cache folder: evictable, there again after a restart.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, posix_fallocate, renameat};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::posix_shm::random_words;
use super::writer::{ImageWriter, WritableObject};
use super::{
    BackingError, BackingKind, ImageBacking, ImageKey, PublishedImage, check_length, check_read_only_object,
};
use crate::run_dir::{self, flock_exclusive};
use crate::{OsError, memfd};

/// What temporary files' names begin with. Image keys have no leading dot.
const TEMPORARY_PREFIX: &str = ".tmp-";
/// How often naming a file is tried again when its temporary name vanished (swept by another process).
const NAMING_TRIES: u32 = 5;

/// A cache folder (mode 0700) of read-only image files (mode 0400).
///
/// Nothing but this user's own programs can change a published file, and they would have to change its mode first;
/// the kernel doesn't forbid that, unlike for sealed memory. So an image whose content must stay as checked is
/// copied into sealed memory ([`copy_image_into_sealed_memfd`](super::copy_image_into_sealed_memfd)).
#[derive(Debug)]
pub struct ImageFile {
    folder: File,
    path: PathBuf,
}

impl ImageFile {
    /// Opens the cache folder, making it if needed, and removes what killed processes left unfinished in it.
    pub fn open(path: &Path) -> Result<Self, BackingError> {
        run_dir::ensure_private_dir(path)?;
        let cache = Self { folder: run_dir::open_private_dir(path)?, path: path.into() };
        cache.sweep();
        Ok(cache)
    }

    /// Where an image lies.
    pub fn path_of(&self, key: &ImageKey) -> PathBuf {
        self.path.join(key.as_str())
    }

    /// Removes temporary files whose writer is gone: a living writer holds a lock on its file. Best effort.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        for name in entries.flatten().map(|entry| entry.file_name()) {
            if !name.to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                continue;
            }
            let opened = openat(&self.folder, name.as_os_str(), OFlag::O_RDONLY | BASE_FLAGS, Mode::empty());
            if opened.is_ok_and(|file| flock_exclusive(&file).unwrap_or(false)) {
                let _ = unlinkat(&self.folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }
}

/// O_NONBLOCK: opening a FIFO that somebody put there must not hang.
const BASE_FLAGS: OFlag =
    OFlag::O_CLOEXEC.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_NOCTTY);

impl ImageBacking for ImageFile {
    fn kind(&self) -> BackingKind {
        BackingKind::ImageFile
    }

    fn reserve(&self, key: &ImageKey, len_bytes: u64) -> Result<ImageWriter, BackingError> {
        check_length(len_bytes)?;
        let file = UnpublishedFile::create(self, key)?;
        allocate(file.as_fd(), len_bytes, &self.path.display().to_string())?;
        ImageWriter::new(WritableObject::File(file), len_bytes)
    }

    fn open_existing(&self, key: &ImageKey) -> Result<Option<PublishedImage>, BackingError> {
        let path = self.path_of(key);
        let opened = openat(&self.folder, key.as_str(), OFlag::O_RDONLY | BASE_FLAGS, Mode::empty());
        let fd_read_only = match opened {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => {
                return Err(BackingError::Refused {
                    why: format!("{} is a symbolic link: remove it", path.display()),
                });
            }
            Err(e) => return Err(OsError::new(format!("opening {}", path.display()), e).into()),
        };
        check_read_only_object(fd_read_only.as_fd())?;
        let len_bytes = memfd::len_bytes(fd_read_only.as_fd())?;
        check_length(len_bytes)?;
        Ok(Some(PublishedImage { fd_read_only, len_bytes, kind: BackingKind::ImageFile, path: Some(path) }))
    }

    fn remove(&self, key: &ImageKey) -> Result<bool, BackingError> {
        match unlinkat(&self.folder, key.as_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(OsError::new(format!("removing {}", self.path_of(key).display()), e).into()),
        }
    }
}

/// A file being filled: without any name where the file system allows that, else under a temporary one.
#[derive(Debug)]
pub(super) struct UnpublishedFile {
    file: File,
    folder: File,
    final_path: PathBuf,
    final_name: String,
    /// Removed when dropped; empty once renamed.
    temporary_name: Option<String>,
}

impl UnpublishedFile {
    fn create(cache: &ImageFile, key: &ImageKey) -> Result<Self, BackingError> {
        let folder =
            cache.folder.try_clone().map_err(|e| OsError::new("copying a folder's descriptor", e))?;
        let nameless =
            openat(&folder, ".", OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::S_IRUSR);
        let (file, temporary_name) = match nameless {
            Ok(file) => (file, None),
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOENT) => {
                let name = temporary_name()?;
                let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | BASE_FLAGS;
                let file = openat(&folder, name.as_str(), flags, Mode::S_IRUSR).map_err(|e| {
                    OsError::new(format!("creating an image file in {}", cache.path.display()), e)
                })?;
                (file, Some(name))
            }
            Err(e) => {
                return Err(
                    OsError::new(format!("creating an image file in {}", cache.path.display()), e).into()
                );
            }
        };
        let unpublished = Self {
            file: file.into(),
            folder,
            final_path: cache.path_of(key),
            final_name: key.as_str().to_owned(),
            temporary_name,
        };
        // Held until the file is renamed: tells sweepers that its writer lives.
        flock_exclusive(&unpublished.file)?;
        Ok(unpublished)
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Content to the disk, then the name, then the folder: a power cut leaves the old image, the new one, or none.
    /// A failed fsync drops the file: what reached the disk is unknown, and trying again would not tell.
    pub(super) fn publish(mut self, len_bytes: u64) -> Result<PublishedImage, BackingError> {
        let step = |what: &str| format!("{what} {}", self.final_path.display());
        let (writing, naming) = (step("writing the image file"), step("naming the image file"));
        fchmod(&self.file, Mode::S_IRUSR).map_err(|e| OsError::new(writing.clone(), e))?;
        self.file.sync_all().map_err(|e| OsError::new(writing.clone(), e))?;
        self.give_final_name().map_err(|e| OsError::new(naming, e))?;
        self.folder.sync_all().map_err(|e| OsError::new(writing, e))?;
        // The descriptor is taken from the file itself: the name may lead to another process's image of the same key
        // by now.
        let fd_read_only = memfd::reopen_read_only(self.file.as_fd())?;
        check_read_only_object(fd_read_only.as_fd())?;
        memfd::verify_size(fd_read_only.as_fd(), len_bytes)?;
        let path = Some(std::mem::take(&mut self.final_path));
        Ok(PublishedImage { fd_read_only, len_bytes, kind: BackingKind::ImageFile, path })
    }

    fn give_final_name(&mut self) -> Result<(), io::Error> {
        let own_path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let mut result = Ok(());
        for _ in 0..NAMING_TRIES {
            let name = match self.temporary_name.take() {
                Some(name) => name,
                None => {
                    let name = temporary_name()?;
                    linkat(
                        &self.folder,
                        own_path.as_str(),
                        &self.folder,
                        name.as_str(),
                        AtFlags::AT_SYMLINK_FOLLOW,
                    )?;
                    name
                }
            };
            result = renameat(&self.folder, name.as_str(), &self.folder, self.final_name.as_str());
            match result {
                Ok(()) => return Ok(()),
                Err(Errno::ENOENT) => {}
                Err(_) => {
                    self.temporary_name = Some(name);
                    break;
                }
            }
        }
        result.map_err(io::Error::from)
    }
}

impl Drop for UnpublishedFile {
    fn drop(&mut self) {
        if let Some(name) = self.temporary_name.take() {
            let _ = unlinkat(&self.folder, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

fn temporary_name() -> Result<String, OsError> {
    Ok(format!("{TEMPORARY_PREFIX}{:016x}", random_words()?[0]))
}

/// Reserves the space, so that a full disk is an error now and not SIGBUS at a later touch.
pub(super) fn allocate(fd: BorrowedFd<'_>, len_bytes: u64, place: &str) -> Result<(), BackingError> {
    let len = i64::try_from(len_bytes).map_err(|_| BackingError::BadLength { len_bytes })?;
    loop {
        match posix_fallocate(fd, 0, len) {
            Ok(()) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(e @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::ENOMEM)) => {
                return Err(BackingError::NoSpace { place: place.into(), len_bytes, source: e.into() });
            }
            Err(e) => return Err(OsError::new(format!("reserving {len_bytes} bytes in {place}"), e).into()),
        }
    }
}

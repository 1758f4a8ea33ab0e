//! Images in POSIX shared memory: the portable backing, for systems without sealed memfds.
//!
//! The object has an unguessable name for the few microseconds in which its two descriptors are opened; then it is
//! unlinked, so a killed process leaves nothing in /dev/shm.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fchmod};
use shared_memory::{ShmemConf, ShmemError};

use super::writer::{ImageWriter, WritableObject};
use super::{BackingError, BackingKind, ImageBacking, ImageKey, PublishedImage, check_length};
use crate::mapping::MappingError;
use crate::{OsError, memfd};

/// Where the objects lie on Linux, for messages.
const PLACE: &str = "/dev/shm";

/// The portable backing. Its promise to receivers is the read-only descriptor; the same user could still change the
/// object through other means (`/proc/*/fd` after changing its mode).
#[derive(Clone, Copy, Debug, Default)]
pub struct PosixShm;

impl ImageBacking for PosixShm {
    fn kind(&self) -> BackingKind {
        BackingKind::PosixShm
    }

    fn reserve(&self, _key: &ImageKey, len_bytes: u64) -> Result<ImageWriter, BackingError> {
        check_length(len_bytes)?;
        let len = usize::try_from(len_bytes).map_err(|_| MappingError::TooLong { len_bytes })?;
        let name = unguessable_name()?;
        // Unlinks its name when dropped, also on the way out of an error.
        let named = ShmemConf::new().os_id(&name).size(len).create().map_err(|e| os_error(&e))?;
        let open = |flags: OFlag, what: &'static str| {
            nix::sys::mman::shm_open(name.as_str(), flags, Mode::empty()).map_err(|e| OsError::new(what, e))
        };
        let writable = open(OFlag::O_RDWR, "opening a shared-memory object")?;
        let fd_read_only = open(OFlag::O_RDONLY, "opening a shared-memory object read-only")?;
        drop(named);
        if !memfd::same_object(writable.as_fd(), fd_read_only.as_fd())? {
            return Err(BackingError::Refused {
                why: "another program replaced the shared-memory object".into(),
            });
        }
        // Reserved now, a full /dev/shm is an error here; touched page by page it would be SIGBUS.
        super::image_file::allocate(writable.as_fd(), len_bytes, PLACE)?;
        ImageWriter::new(WritableObject::Shm(UnpublishedShm { writable, fd_read_only }), len_bytes)
    }

    fn open_existing(&self, _key: &ImageKey) -> Result<Option<PublishedImage>, BackingError> {
        Ok(None)
    }

    fn remove(&self, _key: &ImageKey) -> Result<bool, BackingError> {
        Ok(false)
    }
}

/// An unlinked object with both its descriptors.
#[derive(Debug)]
pub(super) struct UnpublishedShm {
    writable: OwnedFd,
    fd_read_only: OwnedFd,
}

impl UnpublishedShm {
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.writable.as_fd()
    }

    pub(super) fn publish(self, len_bytes: u64) -> Result<PublishedImage, BackingError> {
        fchmod(&self.writable, Mode::S_IRUSR)
            .map_err(|e| OsError::new("making a shared-memory object read-only", e))?;
        let Self { writable, fd_read_only } = self;
        drop(writable);
        Ok(PublishedImage { fd_read_only, len_bytes, kind: BackingKind::PosixShm, path: None })
    }
}

fn unguessable_name() -> Result<String, OsError> {
    let [a, b] = random_words()?;
    Ok(format!("/modelbroker-{a:016x}{b:016x}"))
}

/// 128 random bits from the kernel.
pub(super) fn random_words() -> Result<[u64; 2], OsError> {
    let mut words = [0u64; 2];
    // SAFETY: the buffer is 16 writable bytes.
    let filled = unsafe { libc::getrandom(words.as_mut_ptr().cast(), size_of_val(&words), 0) };
    if filled == size_of_val(&words) as isize {
        Ok(words)
    } else {
        Err(OsError::last("asking for random numbers"))
    }
}

/// The crate gives errno as a number in some variants.
fn os_error(error: &ShmemError) -> OsError {
    let source = match error {
        ShmemError::MapCreateFailed(errno)
        | ShmemError::MapOpenFailed(errno)
        | ShmemError::UnknownOsError(errno) => {
            std::io::Error::from_raw_os_error(i32::try_from(*errno).unwrap_or(0))
        }
        other => std::io::Error::other(other.to_string()),
    };
    OsError::new("creating a shared-memory object", source)
}

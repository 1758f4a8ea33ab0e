//! Anonymous memory objects and their seals: lane regions, broker pages, images. Mapping them is `mapping`'s.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::MFdFlags;

use crate::OsError;

/// Largest lane region, bytes. Checked before the object is sized, so that no peer's number can fill the machine.
pub const MAX_LANE_REGION_BYTES: u64 = 256 << 20;
/// Largest broker page, bytes.
pub const MAX_BROKER_PAGE_BYTES: u64 = 1 << 20;
/// Largest image, bytes (1 TiB).
pub const MAX_IMAGE_BYTES: u64 = 1 << 40;
/// Name that /proc shows for images ("/memfd:modelbroker-image"); smaps look-ups search for it.
pub const IMAGE_MEMFD_NAME: &str = "modelbroker-image";
/// Name that /proc shows for lane regions.
pub const LANE_MEMFD_NAME: &str = "modelbroker-lane";
/// Name that /proc shows for broker pages.
pub const BROKER_PAGE_MEMFD_NAME: &str = "modelbroker-page";
/// How often sealing is tried again while the kernel says busy, and the pause between tries.
const SEAL_TRIES: u32 = 50;
const SEAL_RETRY_PAUSE: Duration = Duration::from_millis(2);

/// A set of memfd seals.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Seals(i32);

impl Seals {
    /// What a lane region carries: its size is fixed and no seal can be added.
    pub const LANE: Seals = Seals(libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL);
    /// What a broker page carries: only mappings made before the seal can write.
    pub const BROKER_PAGE: Seals = Seals(Self::LANE.0 | libc::F_SEAL_FUTURE_WRITE);
    /// What an image carries: nobody can write, truncate or punch it, its maker included.
    pub const IMAGE: Seals = Seals(Self::LANE.0 | libc::F_SEAL_WRITE);

    /// Whether each seal of `needed` is here.
    pub fn contains(self, needed: Seals) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// The seals as the kernel's bits.
    pub fn bits(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (libc::F_SEAL_SEAL, "SEAL"),
            (libc::F_SEAL_SHRINK, "SHRINK"),
            (libc::F_SEAL_GROW, "GROW"),
            (libc::F_SEAL_WRITE, "WRITE"),
            (libc::F_SEAL_FUTURE_WRITE, "FUTURE_WRITE"),
            (libc::F_SEAL_EXEC, "EXEC"),
        ];
        let set: Vec<_> = names.iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, name)| *name).collect();
        f.write_str(if set.is_empty() { "none" } else { "" })?;
        f.write_str(&set.join("|"))
    }
}

/// Why a memory object could not be made, sealed or accepted.
#[derive(Debug, thiserror::Error)]
pub enum MemfdError {
    /// The wanted length is zero or above the named bound.
    #[error("a memory object of {len_bytes} bytes is not allowed: it must have 1 to {max_bytes} bytes")]
    BadLength {
        /// Length asked for, bytes.
        len_bytes: u64,
        /// The bound, bytes.
        max_bytes: u64,
    },
    /// The descriptor is no sealable memory object.
    #[error("the descriptor is not a sealable memory object (memfd): the sender passed something else")]
    NotSealable,
    /// A received object lacks seals.
    #[error(
        "the memory object carries the seals {have:?} but needs {need:?}: its sender is faulty or hostile"
    )]
    MissingSeals {
        /// Seals found.
        have: Seals,
        /// Seals required.
        need: Seals,
    },
    /// A received object has another size than announced.
    #[error(
        "the memory object has {actual_bytes} bytes, announced were {expected_bytes}: its sender is faulty"
    )]
    WrongSize {
        /// Size announced, bytes.
        expected_bytes: u64,
        /// Size found, bytes.
        actual_bytes: u64,
    },
    /// Sealing against writes while a writable mapping exists.
    #[error(
        "the image cannot be sealed while a writable mapping of it exists: drop every writer's window (also in \
         other processes) first"
    )]
    StillMapped,
    /// /proc gave another object than the one asked for.
    #[error("/proc/self/fd led to another object: mount the real proc file system at /proc")]
    ReopenedOther,
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Makes a lane region of `len_bytes` zero bytes (1 to [`MAX_LANE_REGION_BYTES`]): close-on-exec, readable and
/// writable, sealed [`Seals::LANE`].
pub fn create_lane_region(len_bytes: u64) -> Result<OwnedFd, MemfdError> {
    let fd = create(LANE_MEMFD_NAME, len_bytes, MAX_LANE_REGION_BYTES)?;
    add_seals(fd.as_fd(), Seals::LANE)?;
    Ok(fd)
}

/// Makes an unsealed memory object for an image of `len_bytes` (1 to [`MAX_IMAGE_BYTES`]). Fill it, drop every
/// writable mapping, then [`seal_image`] it.
pub fn create_writable_image(len_bytes: u64) -> Result<OwnedFd, MemfdError> {
    create(IMAGE_MEMFD_NAME, len_bytes, MAX_IMAGE_BYTES)
}

/// Seals an image with [`Seals::IMAGE`]. The kernel refuses while a writable mapping exists; passing references
/// (pages still under I/O) are waited for up to 100 ms, then it is [`MemfdError::StillMapped`].
pub fn seal_image(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    for _ in 0..SEAL_TRIES {
        match add_seals(fd, Seals::IMAGE) {
            Err(MemfdError::StillMapped) => std::thread::sleep(SEAL_RETRY_PAUSE),
            done => return done,
        }
    }
    Err(MemfdError::StillMapped)
}

/// Adds seals to a memory object; `EBUSY` is [`MemfdError::StillMapped`].
pub(crate) fn add_seals(fd: BorrowedFd<'_>, seals: Seals) -> Result<(), MemfdError> {
    match fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seals.0))) {
        Ok(_) => Ok(()),
        Err(nix::Error::EBUSY) => Err(MemfdError::StillMapped),
        Err(nix::Error::EINVAL) => Err(MemfdError::NotSealable),
        Err(errno) => Err(OsError::new("sealing a memory object", errno).into()),
    }
}

/// The seals of a memory object; [`MemfdError::NotSealable`] for any other descriptor.
pub fn read_seals(fd: BorrowedFd<'_>) -> Result<Seals, MemfdError> {
    match fcntl(fd, FcntlArg::F_GET_SEALS) {
        Ok(bits) => Ok(Seals(bits)),
        Err(nix::Error::EINVAL) => Err(MemfdError::NotSealable),
        Err(errno) => Err(OsError::new("reading the seals of a memory object", errno).into()),
    }
}

/// Checks that a received image is sealed against every change. The size is checked when it is mapped.
pub fn verify_image_seals(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    verify_seals(fd, Seals::IMAGE)
}

/// Checks that a received lane region cannot be resized and has exactly `expected_len_bytes`.
pub fn verify_lane_seals(fd: BorrowedFd<'_>, expected_len_bytes: u64) -> Result<(), MemfdError> {
    verify_seals(fd, Seals::LANE)?;
    verify_size(fd, expected_len_bytes)
}

/// Checks that a received broker page can't be written by whoever maps it now, nor resized.
pub fn verify_broker_page_seals(fd: BorrowedFd<'_>, expected_len_bytes: u64) -> Result<(), MemfdError> {
    verify_seals(fd, Seals::BROKER_PAGE)?;
    verify_size(fd, expected_len_bytes)
}

fn verify_seals(fd: BorrowedFd<'_>, need: Seals) -> Result<(), MemfdError> {
    let have = read_seals(fd)?;
    if have.contains(need) { Ok(()) } else { Err(MemfdError::MissingSeals { have, need }) }
}

/// Checks an object's size. Only sealed objects keep it afterwards.
pub(crate) fn verify_size(fd: BorrowedFd<'_>, expected_bytes: u64) -> Result<(), MemfdError> {
    let actual_bytes = len_bytes(fd)?;
    if actual_bytes == expected_bytes {
        Ok(())
    } else {
        Err(MemfdError::WrongSize { expected_bytes, actual_bytes })
    }
}

/// The size of an object, bytes.
pub fn len_bytes(fd: BorrowedFd<'_>) -> Result<u64, OsError> {
    let stat =
        nix::sys::stat::fstat(fd).map_err(|e| OsError::new("reading the size of a memory object", e))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

/// A second descriptor of the same object that can only read (`O_RDONLY`, close-on-exec), for handing to clients.
/// A reader of an unsealed object could reopen it writable in the same way: seal before handing out.
pub fn reopen_read_only(fd: BorrowedFd<'_>) -> Result<OwnedFd, MemfdError> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let reopened =
        nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
            .map_err(|e| OsError::new("reopening a memory object read-only through /proc/self/fd", e))?;
    if same_object(fd, reopened.as_fd())? { Ok(reopened) } else { Err(MemfdError::ReopenedOther) }
}

/// Whether two descriptors name the same file or memory object.
pub fn same_object(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Result<bool, OsError> {
    let stat = |fd| nix::sys::stat::fstat(fd).map_err(|e| OsError::new("identifying a descriptor", e));
    let (a, b) = (stat(a)?, stat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

pub(crate) fn create(name: &str, len_bytes: u64, max_bytes: u64) -> Result<OwnedFd, MemfdError> {
    if len_bytes == 0 || len_bytes > max_bytes {
        return Err(MemfdError::BadLength { len_bytes, max_bytes });
    }
    let fd = memfd(name)?;
    nix::unistd::ftruncate(&fd, i64::try_from(len_bytes).unwrap_or(i64::MAX))
        .map_err(|e| OsError::new("sizing a memory object", e))?;
    Ok(fd)
}

/// MFD_NOEXEC_SEAL (Linux 6.3) is wanted: hardened systems refuse memfds without it. Older kernels call it EINVAL.
fn memfd(name: &str) -> Result<OwnedFd, OsError> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let hardened = flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    nix::sys::memfd::memfd_create(name, hardened)
        .or_else(|errno| match errno {
            nix::Error::EINVAL => nix::sys::memfd::memfd_create(name, flags),
            other => Err(other),
        })
        .map_err(|e| OsError::new("creating a memory object (memfd_create)", e))
}

/// Takes ownership of a raw descriptor that a system call just returned, or its error.
pub(crate) fn own(raw: libc::c_long, action: &'static str) -> Result<OwnedFd, OsError> {
    match libc::c_int::try_from(raw) {
        // SAFETY: callers pass the direct result of a call that returns a new descriptor owned by nobody else.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(OsError::last(action)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn lane_region_has_size_and_seals_and_refuses_resizing() {
        let fd = create_lane_region(8192).unwrap();
        verify_lane_seals(fd.as_fd(), 8192).unwrap();
        assert!(matches!(
            verify_lane_seals(fd.as_fd(), 4096),
            Err(MemfdError::WrongSize { expected_bytes: 4096, actual_bytes: 8192 })
        ));
        let file = File::from(fd);
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(16384).is_err());
        assert!(add_seals(file.as_fd(), Seals::IMAGE).is_err(), "SEAL forbids further seals");
        (&file).write_all(b"writable").unwrap();
        assert!(verify_image_seals(file.as_fd()).is_err());
    }

    #[test]
    fn lengths_are_bounded_before_the_object_is_sized() {
        for bad in [0, MAX_LANE_REGION_BYTES + 1, u64::MAX] {
            assert!(matches!(create_lane_region(bad), Err(MemfdError::BadLength { .. })), "{bad}");
        }
        assert!(matches!(create_writable_image(MAX_IMAGE_BYTES + 1), Err(MemfdError::BadLength { .. })));
        assert!(matches!(create_writable_image(0), Err(MemfdError::BadLength { .. })));
    }

    #[test]
    fn sealed_image_is_immutable_and_reopens_read_only() {
        let mut file = File::from(create_writable_image(4096).unwrap());
        file.write_all(b"weights").unwrap();
        assert!(matches!(verify_image_seals(file.as_fd()), Err(MemfdError::MissingSeals { .. })));
        seal_image(file.as_fd()).unwrap();
        verify_image_seals(file.as_fd()).unwrap();
        assert!(file.write_all(b"x").is_err());
        let reader = reopen_read_only(file.as_fd()).unwrap();
        let flags = fcntl(&reader, FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & libc::O_ACCMODE, libc::O_RDONLY);
        assert!(same_object(reader.as_fd(), file.as_fd()).unwrap());
        assert_eq!(len_bytes(reader.as_fd()).unwrap(), 4096);
    }

    #[test]
    fn sealing_while_mapped_writable_says_so() {
        let fd = create_writable_image(4096).unwrap();
        // SAFETY: the object is private to this test.
        let window = unsafe { memmap2::MmapMut::map_mut(&fd) }.unwrap();
        assert!(matches!(seal_image(fd.as_fd()), Err(MemfdError::StillMapped)));
        drop(window);
        seal_image(fd.as_fd()).unwrap();
    }

    #[test]
    fn other_descriptors_are_not_sealable() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(matches!(read_seals(reader.as_fd()), Err(MemfdError::NotSealable)));
        let file = tempfile::tempfile().unwrap();
        assert!(verify_image_seals(file.as_fd()).is_err());
    }

    #[test]
    fn seals_print_their_names() {
        assert_eq!(format!("{:?}", Seals::LANE), "SEAL|SHRINK|GROW");
        assert_eq!(format!("{:?}", Seals(0)), "none");
    }
}

//! Mapped memory with the rules of its kind: immutable images as bytes, lanes as a bare address. What the bytes
//! mean must not be known here.

use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Advice, Mmap, MmapOptions, MmapRaw, UncheckedAdvice};

use crate::memfd::{self, MemfdError};
use crate::{OsError, fork_generation, sigbus};

static LIVE_MAPPINGS: AtomicUsize = AtomicUsize::new(0);

/// How many [`ReadOnlyMapping`]s and [`SharedMapping`]s this process holds; tests of leaks compare it.
pub fn live_mappings() -> usize {
    LIVE_MAPPINGS.load(Ordering::Relaxed)
}

/// Counts one mapping while it lives.
#[derive(Debug)]
struct Counted;

impl Counted {
    fn new() -> Self {
        LIVE_MAPPINGS.fetch_add(1, Ordering::Relaxed);
        Self
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        LIVE_MAPPINGS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// The object's size or seals are not what was announced.
    #[error(transparent)]
    Object(#[from] MemfdError),
    /// The length does not fit this machine's addresses.
    #[error("{len_bytes} bytes cannot be mapped on this machine: use a 64-bit system or a smaller model")]
    TooLong {
        /// Length asked for, bytes.
        len_bytes: u64,
    },
    /// A range lies outside the mapping.
    #[error("bytes {offset_bytes}..+{len_bytes} lie outside a mapping of {mapping_bytes} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset_bytes: usize,
        /// Bytes asked for.
        len_bytes: usize,
        /// The mapping's size, bytes.
        mapping_bytes: usize,
    },
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// An image mapped read-only: memory that does not change while it is mapped.
///
/// For a sealed memory object the kernel promises that. For file-backed images it stands on the file's mode and
/// owner (checked by `image_backing::map_published`); a truncation by the owner all the same turns the mapping to
/// zeros and sets [`is_poisoned`](Self::is_poisoned), which users poll before they trust a result.
#[derive(Debug)]
pub struct ReadOnlyMapping {
    // Declared first: a poison range must be forgotten before its addresses are free for others.
    poison: Option<sigbus::Registration>,
    map: Mmap,
    is_private: bool,
    _counted: Counted,
}

impl ReadOnlyMapping {
    /// Maps a sealed memory object of exactly `expected_len_bytes`, after checking its seals and size.
    pub fn map_sealed(fd: BorrowedFd<'_>, expected_len_bytes: u64) -> Result<Self, MappingError> {
        memfd::verify_image_seals(fd)?;
        memfd::verify_size(fd, expected_len_bytes)?;
        // SAFETY: the seals just checked (WRITE, SHRINK, GROW, SEAL) can't be lifted, so the content and the size
        // are constant for as long as the object exists.
        unsafe { Self::map_constant(fd, expected_len_bytes) }
    }

    /// Maps a file-backed object and registers it with the SIGBUS handler.
    ///
    /// # Safety
    /// The caller has checked that `fd` has `len_bytes` and that only this user could change the object (owner,
    /// mode), and relies on that user's programs not doing so.
    pub(crate) unsafe fn map_guarded(fd: BorrowedFd<'_>, len_bytes: u64) -> Result<Self, MappingError> {
        // SAFETY: forwarded to the caller.
        let mut mapping = unsafe { Self::map_constant(fd, len_bytes)? };
        let bytes = mapping.as_bytes();
        mapping.poison =
            Some(sigbus::register(bytes.as_ptr() as usize, bytes.len(), sigbus::Replacement::ReadOnly)?);
        Ok(mapping)
    }

    /// # Safety
    /// The object has at least `len_bytes` and neither shrinks nor changes while mapped.
    unsafe fn map_constant(fd: BorrowedFd<'_>, len_bytes: u64) -> Result<Self, MappingError> {
        let len = usize::try_from(len_bytes).map_err(|_| MappingError::TooLong { len_bytes })?;
        let mut options = MmapOptions::new();
        options.len(len);
        let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
        // SAFETY: constancy is the caller's promise.
        let (map, is_private) = match unsafe { options.map(raw) } {
            Ok(map) => (map, false),
            // Kernels before 6.7 take MAP_SHARED of a write-sealed object for a wish to write.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                // SAFETY: as above; a private mapping of constant pages shares them as well.
                let map = unsafe { options.map_copy_read_only(raw) }
                    .map_err(|e| OsError::new("mapping an image", e))?;
                (map, true)
            }
            Err(e) => return Err(OsError::new("mapping an image", e).into()),
        };
        Ok(Self { poison: None, map, is_private, _counted: Counted::new() })
    }

    /// The image's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.map
    }

    /// The image's length, bytes.
    pub fn len_bytes(&self) -> usize {
        self.map.len()
    }

    /// Whether the file under the mapping was truncated or could not be read: the bytes are zeros now, and what was
    /// computed since the last check that said `false` must be thrown away. Never true for sealed memory objects.
    pub fn is_poisoned(&self) -> bool {
        self.poison.as_ref().is_some_and(sigbus::Registration::is_poisoned)
    }

    /// Whether an old kernel forced a private mapping (the pages are shared all the same).
    pub fn is_private_fallback(&self) -> bool {
        self.is_private
    }

    /// Leaves the image out of core dumps. Best effort.
    pub fn exclude_from_dumps(&self) {
        let _ = self.map.advise(Advice::DontDump);
    }

    /// Asks for huge pages where the system allows them for shared memory. Best effort.
    pub fn prefer_huge_pages(&self) {
        let _ = self.map.advise(Advice::HugePage);
    }

    /// Maps `len_bytes` at `offset_bytes` before they are touched, in one call instead of one fault a page. Best
    /// effort on kernels before 5.14.
    pub fn prefault(&self, offset_bytes: usize, len_bytes: usize) -> Result<(), MappingError> {
        check_range(offset_bytes, len_bytes, self.map.len())?;
        let _ = self.map.advise_range(Advice::PopulateRead, offset_bytes, len_bytes);
        Ok(())
    }
}

impl AsRef<[u8]> for ReadOnlyMapping {
    fn as_ref(&self) -> &[u8] {
        self.as_bytes()
    }
}

/// Memory that another process may write at any instant: a lane region or a broker page.
///
/// It gives an address, never a slice: access goes through atomics and race-safe copies (crate `shm-layout`).
/// The range is not there in forked children (`MADV_DONTFORK`): using the address there faults, and
/// [`belongs_to_this_process`](Self::belongs_to_this_process) says so beforehand.
#[derive(Debug)]
pub struct SharedMapping {
    // Not dropped by itself: in a forked child there is nothing of ours to unmap.
    map: ManuallyDrop<MmapRaw>,
    is_writable: bool,
    fork_generation: u64,
    _counted: Counted,
}

// `MmapRaw` is Send and Sync: it is an address range, and giving out its address shares nothing by itself. Whoever
// dereferences it needs `unsafe` of its own and must bear concurrent writers anyway: the other process is one.
const _: () = {
    const fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<SharedMapping>();
    send_and_sync::<ReadOnlyMapping>();
};

impl SharedMapping {
    /// Maps a lane region for reading and writing, after checking its seals and that it has `expected_len_bytes`.
    pub fn map_lane(fd: BorrowedFd<'_>, expected_len_bytes: u64) -> Result<Self, MappingError> {
        memfd::verify_lane_seals(fd, expected_len_bytes)?;
        Self::map(fd, expected_len_bytes, true)
    }

    /// Maps a broker page for reading, after checking its seals and that it has `expected_len_bytes`. The broker
    /// goes on writing: read it with atomics.
    pub fn map_broker_page(fd: BorrowedFd<'_>, expected_len_bytes: u64) -> Result<Self, MappingError> {
        memfd::verify_broker_page_seals(fd, expected_len_bytes)?;
        Self::map(fd, expected_len_bytes, false)
    }

    fn map(fd: BorrowedFd<'_>, len_bytes: u64, is_writable: bool) -> Result<Self, MappingError> {
        let len = usize::try_from(len_bytes).map_err(|_| MappingError::TooLong { len_bytes })?;
        let mut options = MmapOptions::new();
        options.len(len);
        let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
        let map = if is_writable { options.map_raw(raw) } else { options.map_raw_read_only(raw) }
            .map_err(|e| OsError::new("mapping a shared region", e))?;
        // Not best effort: a child that inherited the range would write into its parent's ring.
        map.advise(Advice::DontFork)
            .map_err(|e| OsError::new("keeping a shared region out of forked children", e))?;
        let _ = map.advise(Advice::DontDump);
        Ok(Self {
            map: ManuallyDrop::new(map),
            is_writable,
            fork_generation: fork_generation(),
            _counted: Counted::new(),
        })
    }

    /// Address of the first byte; aligned to the page size; valid for [`len_bytes`](Self::len_bytes) while `self`
    /// lives, in the process that mapped it. Every access must allow for another process writing meanwhile.
    pub fn base(&self) -> NonNull<u8> {
        // A mapping at an address of the kernel's choice is never at zero.
        NonNull::new(self.map.as_mut_ptr()).unwrap_or(NonNull::dangling())
    }

    /// The mapping's length, bytes.
    pub fn len_bytes(&self) -> usize {
        self.map.len()
    }

    /// Whether this side may write.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// `false` in a forked child, where the range does not exist: don't touch it, connect anew.
    pub fn belongs_to_this_process(&self) -> bool {
        self.fork_generation == fork_generation()
    }

    /// Gives the first touch of `len_bytes` at `offset_bytes` to one call instead of one fault a page. Best effort
    /// on kernels before 5.14.
    pub fn prefault(&self, offset_bytes: usize, len_bytes: usize) -> Result<(), MappingError> {
        check_range(offset_bytes, len_bytes, self.len_bytes())?;
        let advice = if self.is_writable { Advice::PopulateWrite } else { Advice::PopulateRead };
        let _ = self.map.advise_range(advice, offset_bytes, len_bytes);
        Ok(())
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // In a forked child the range is not mapped, and may be another mapping by now: unmapping it would pull that
        // one away.
        if self.belongs_to_this_process() {
            // SAFETY: dropped here only, once; the field is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.map) };
        }
    }
}

/// Makes a broker page of `len_bytes` zeros (1 to [`memfd::MAX_BROKER_PAGE_BYTES`]): the maker's writable mapping,
/// and a read-only descriptor for clients. Sealed so that the mapping returned is the only one that will ever write.
pub fn create_broker_page(len_bytes: u64) -> Result<(SharedMapping, OwnedFd), MappingError> {
    let (name, most) = (memfd::BROKER_PAGE_MEMFD_NAME, memfd::MAX_BROKER_PAGE_BYTES);
    create_write_once(name, len_bytes, most, memfd::Seals::BROKER_PAGE)
}

/// Makes an object of zeros of 1 to `most_bytes`, maps it writable, and seals it behind that: the mapping is the only one
/// that will ever write. The descriptor can only read.
pub(crate) fn create_write_once(
    name: &str,
    len_bytes: u64,
    most_bytes: u64,
    seals: memfd::Seals,
) -> Result<(SharedMapping, OwnedFd), MappingError> {
    let fd = memfd::create(name, len_bytes, most_bytes)?;
    let mapping = SharedMapping::map(fd.as_fd(), len_bytes, true)?;
    memfd::add_seals(fd.as_fd(), seals)?;
    Ok((mapping, memfd::reopen_read_only(fd.as_fd())?))
}

/// Gives back the physical pages of `len_bytes` at `offset_bytes` of a writable region; they read as zeros
/// afterwards. For idle lanes: it frees memory without unmapping. Does nothing to a read-only mapping.
pub fn release_pages(
    mapping: &SharedMapping,
    offset_bytes: usize,
    len_bytes: usize,
) -> Result<(), MappingError> {
    check_range(offset_bytes, len_bytes, mapping.len_bytes())?;
    if !mapping.belongs_to_this_process() || !mapping.is_writable {
        return Ok(());
    }
    // SAFETY: MADV_REMOVE zeroes the range; a SharedMapping has no references into it, its readers bear any content.
    unsafe { mapping.map.unchecked_advise_range(UncheckedAdvice::Remove, offset_bytes, len_bytes) }
        .map_err(|e| OsError::new("releasing pages of a shared region", e).into())
}

fn check_range(offset_bytes: usize, len_bytes: usize, mapping_bytes: usize) -> Result<(), MappingError> {
    match offset_bytes.checked_add(len_bytes) {
        Some(end) if end <= mapping_bytes => Ok(()),
        _ => Err(MappingError::OutOfRange { offset_bytes, len_bytes, mapping_bytes }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn word(mapping: &SharedMapping, offset: usize) -> &AtomicU32 {
        assert!(offset + 4 <= mapping.len_bytes() && offset.is_multiple_of(4));
        // SAFETY: in range and aligned, checked above; accessed only as an atomic.
        unsafe { &*mapping.base().as_ptr().add(offset).cast() }
    }

    #[test]
    fn two_mappings_of_a_lane_share_memory() {
        let fd = memfd::create_lane_region(8192).unwrap();
        let a = SharedMapping::map_lane(fd.as_fd(), 8192).unwrap();
        let b = SharedMapping::map_lane(fd.as_fd(), 8192).unwrap();
        assert_ne!(a.base(), b.base());
        word(&a, 4096).store(7, Ordering::Release);
        assert_eq!(word(&b, 4096).load(Ordering::Acquire), 7);
        a.prefault(0, 8192).unwrap();
        assert!(a.prefault(4096, 8192).is_err());
        assert!(a.prefault(usize::MAX, 2).is_err());
        release_pages(&a, 4096, 4096).unwrap();
        assert_eq!(word(&b, 4096).load(Ordering::Acquire), 0);
    }

    #[test]
    fn a_lane_with_a_wrong_size_or_without_seals_is_refused() {
        let fd = memfd::create_lane_region(8192).unwrap();
        assert!(matches!(
            SharedMapping::map_lane(fd.as_fd(), 4096),
            Err(MappingError::Object(MemfdError::WrongSize { .. }))
        ));
        let unsealed = memfd::create_writable_image(8192).unwrap();
        assert!(matches!(
            SharedMapping::map_lane(unsealed.as_fd(), 8192),
            Err(MappingError::Object(MemfdError::MissingSeals { .. }))
        ));
    }

    #[test]
    fn broker_page_is_written_by_its_maker_only() {
        let (page, fd) = create_broker_page(4096).unwrap();
        let reader = SharedMapping::map_broker_page(fd.as_fd(), 4096).unwrap();
        assert!(!reader.is_writable());
        word(&page, 0).store(9, Ordering::Release);
        assert_eq!(word(&reader, 0).load(Ordering::Acquire), 9);
        assert!(MmapOptions::new().len(4096).map_raw(&fd).is_err(), "no new writable mapping");
        let writable = std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        if let Ok(file) = writable {
            assert!(
                MmapOptions::new().len(4096).map_raw(&file).is_err(),
                "the seal holds for reopened descriptors"
            );
            assert!(std::io::Write::write(&mut &file, b"x").is_err());
        }
    }

    #[test]
    fn sealed_image_maps_shared_and_cannot_be_made_writable() {
        let file = std::fs::File::from(memfd::create_writable_image(5000).unwrap());
        std::os::unix::fs::FileExt::write_all_at(&file, b"tail", 4996).unwrap();
        assert!(ReadOnlyMapping::map_sealed(file.as_fd(), 5000).is_err(), "not sealed yet");
        memfd::seal_image(file.as_fd()).unwrap();
        let reader = memfd::reopen_read_only(file.as_fd()).unwrap();
        assert!(ReadOnlyMapping::map_sealed(reader.as_fd(), 4096).is_err());
        let mapping = ReadOnlyMapping::map_sealed(reader.as_fd(), 5000).unwrap();
        assert_eq!(&mapping.as_bytes()[4996..], b"tail");
        assert!(!mapping.is_poisoned());
        mapping.prefault(0, 5000).unwrap();
        mapping.exclude_from_dumps();
        // SAFETY: asks for more rights on a range that is mapped; refused or, where private, without effect on others.
        let refused = unsafe {
            libc::mprotect(
                mapping.as_bytes().as_ptr().cast_mut().cast(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert!(refused == -1 || mapping.is_private_fallback());
    }

    #[test]
    fn a_forked_child_neither_sees_nor_unmaps_a_shared_mapping() {
        let fd = memfd::create_lane_region(4096).unwrap();
        let mapping = SharedMapping::map_lane(fd.as_fd(), 4096).unwrap();
        let base = mapping.base().as_ptr();
        let mut residency = 0u8;
        // SAFETY: the child calls only atomics and system calls, and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: mincore only asks; the fixed mapping goes where the parent's range is absent in this child; the
            // byte read afterwards is in that new mapping.
            unsafe {
                if mapping.belongs_to_this_process() {
                    libc::_exit(1);
                }
                if libc::mincore(base.cast(), 4096, &raw mut residency) == 0 {
                    libc::_exit(2);
                }
                let other = libc::mmap(
                    base.cast(),
                    4096,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                );
                if other != base.cast() {
                    libc::_exit(3);
                }
                drop(mapping);
                libc::_exit(if libc::mincore(base.cast(), 4096, &raw mut residency) == 0 { 0 } else { 4 });
            }
        }
        assert!(pid > 0);
        let mut status = 0;
        // SAFETY: waits for the child made above.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert!(libc::WIFEXITED(status));
        assert_eq!(libc::WEXITSTATUS(status), 0);
        word(&mapping, 0).store(1, Ordering::Release);
    }
}

//! A cache region as a process holds it: the broker's one writable mapping, and read-only mappings of everybody else. What
//! lies in the region is `shm_layout::cache`'s.

use crate::mapping::{MappingError, SharedMapping, create_write_once};
use crate::memfd::{self, MemfdError, Seals};
use shm_layout::cache::{CacheRead, CacheWrite, MAX_CACHE_BYTES, RawCacheReader, RawCacheWriter};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

/// Name that /proc shows for cache regions.
pub const CACHE_MEMFD_NAME: &str = "modelbroker-cache";

/// The mapping that writes: the only one that ever can.
#[derive(Debug)]
pub struct CacheWriteMapping {
    raw: RawCacheWriter,
    mapping: SharedMapping,
}

/// A mapping that reads. Not there in forked children.
#[derive(Debug)]
pub struct CacheMapping {
    raw: RawCacheReader,
    mapping: SharedMapping,
}

impl CacheWriteMapping {
    /// Makes a region of zeros; gives its one writable mapping and a read-only descriptor for the readers. Memory is
    /// taken page by page, when it is written.
    ///
    /// # Errors
    /// [`MappingError`] when there is no memory, or the kernel does not know `F_SEAL_FUTURE_WRITE` (before Linux 5.1).
    pub fn create(len_bytes: usize) -> Result<(CacheWriteMapping, OwnedFd), MappingError> {
        let (mapping, fd) = create_write_once(
            CACHE_MEMFD_NAME,
            len_bytes as u64,
            MAX_CACHE_BYTES as u64,
            Seals::BROKER_PAGE,
        )?;
        // SAFETY: the mapping is read-write, page-aligned, of that length (its object cannot shrink: sealed), owned by the
        // same value as `raw`, and gives no references into itself. In a forked child the range is gone; `check_owner`
        // keeps every access out there.
        let raw = unsafe { RawCacheWriter::new(mapping.base(), mapping.len_bytes()) };
        Ok((CacheWriteMapping { raw, mapping }, fd))
    }

    #[inline]
    fn check_owner(&self) {
        assert!(self.mapping.belongs_to_this_process(), "a cache was used in a forked child");
    }
}

impl CacheMapping {
    /// Maps a region that was received, after checking that nobody can resize it or map it writable any more.
    ///
    /// # Errors
    /// [`MappingError`] when it is not sealed so, or has another size.
    pub fn map(fd: BorrowedFd<'_>, len_bytes: u64) -> Result<CacheMapping, MappingError> {
        if len_bytes > MAX_CACHE_BYTES as u64 {
            return Err(MemfdError::BadLength { len_bytes, max_bytes: MAX_CACHE_BYTES as u64 }.into());
        }
        memfd::verify_size(fd, len_bytes)?;
        let mapping = SharedMapping::map_broker_page(fd, len_bytes)?;
        // SAFETY: the mapping is readable, page-aligned, of that length (seals and size were checked, so it cannot
        // shrink), owned by the same value as `raw`, and gives no references into itself. In a forked child the range is
        // gone; `check_owner` keeps every access out there.
        let raw = unsafe { RawCacheReader::new(mapping.base(), mapping.len_bytes()) };
        Ok(CacheMapping { raw, mapping })
    }

    /// Whether this process is the one that mapped the region; a forked child is not and must not touch it.
    #[must_use]
    pub fn belongs_to_this_process(&self) -> bool {
        self.mapping.belongs_to_this_process()
    }

    #[inline]
    fn check_owner(&self) {
        assert!(
            self.mapping.belongs_to_this_process(),
            "a cache was used in a forked child: connect anew there"
        );
    }
}

impl CacheRead for CacheMapping {
    fn len_bytes(&self) -> usize {
        self.raw.len_bytes()
    }
    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.check_owner();
        self.raw.load(offset, order)
    }
    #[inline]
    fn fence(&self, order: Ordering) {
        self.raw.fence(order);
    }
    #[inline]
    fn load_words(&self, offset: usize, into: &mut [u64]) {
        self.check_owner();
        self.raw.load_words(offset, into);
    }
}

impl CacheRead for CacheWriteMapping {
    fn len_bytes(&self) -> usize {
        self.raw.len_bytes()
    }
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.check_owner();
        self.raw.load(offset, order)
    }
    fn fence(&self, order: Ordering) {
        self.raw.fence(order);
    }
}

impl CacheWrite for CacheWriteMapping {
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.check_owner();
        self.raw.store(offset, value, order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::cache::{CacheGeometry, CacheKey, CacheReader, CacheWriter, Insert};
    use std::os::fd::{AsFd, AsRawFd};

    #[test]
    fn what_one_writes_others_read_and_cannot_change() {
        let geometry = CacheGeometry::for_entries(10, 5).unwrap();
        let (mapping, fd) = CacheWriteMapping::create(geometry.region_bytes()).unwrap();
        let mut writer = CacheWriter::create(mapping, geometry, 10, 7).unwrap();
        let key = CacheKey::of_text("a");
        let vector = [1.0, 2.0, 3.0, 4.0, 5.0];
        assert_eq!(writer.insert(key, &vector, 0, 1, false), Insert::Kept);
        let len_bytes = geometry.region_bytes() as u64;
        let reader = CacheReader::new(CacheMapping::map(fd.as_fd(), len_bytes).unwrap(), 5, 7).unwrap();
        let mut found = Vec::new();
        assert!(reader.lookup(key, || 1, &mut found));
        assert_eq!(found, vector);
        assert!(CacheMapping::map(fd.as_fd(), len_bytes + 8).is_err());

        // Neither through the descriptor that clients get, nor through another one of the same object.
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        for file in [
            std::fs::File::from(fd.try_clone().unwrap()),
            std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap(),
        ] {
            assert!(memmap2::MmapOptions::new().len(4096).map_raw(&file).is_err(), "mapped writable");
            assert!(file.set_len(0).is_err() && file.set_len(1 << 30).is_err(), "resized");
            assert!(std::io::Write::write(&mut &file, b"x").is_err(), "written");
        }
        // SAFETY: asks for more rights on a range that is mapped; it must be refused.
        let refused = unsafe {
            libc::mprotect(
                reader.memory().mapping.base().as_ptr().cast(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert_eq!(refused, -1, "made writable");
        assert!(memfd::add_seals(fd.as_fd(), Seals::IMAGE).is_err());
    }

    #[test]
    fn objects_of_another_kind_are_refused() {
        let fd = memfd::create_lane_region(4096).unwrap();
        assert!(matches!(
            CacheMapping::map(fd.as_fd(), 4096),
            Err(MappingError::Object(MemfdError::MissingSeals { .. }))
        ));
        assert!(CacheMapping::map(fd.as_fd(), u64::MAX).is_err());
    }
}

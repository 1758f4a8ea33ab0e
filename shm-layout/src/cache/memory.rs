//! The memory a cache lies in: words that are loaded, and by the one writer stored. A reader's memory has no way to store,
//! since its mapping would not bear it.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory that one other process may write at any time.
///
/// Offsets are bytes from the start of the region. Implementations panic when one is out of range or not aligned to 8:
/// offsets come from checked geometry, so that is a bug here.
pub trait CacheRead {
    /// Size of the region in bytes.
    fn len_bytes(&self) -> usize;
    /// Loads the word at `offset`.
    fn load(&self, offset: usize, order: Ordering) -> u64;
    /// A fence between this thread's operations.
    fn fence(&self, order: Ordering);
    /// Loads consecutive words, each relaxed, in any order.
    fn load_words(&self, offset: usize, into: &mut [u64]) {
        for (index, word) in into.iter_mut().enumerate() {
            *word = self.load(offset + 8 * index, Ordering::Relaxed);
        }
    }
}

/// As [`CacheRead`], for the one writer.
pub trait CacheWrite: CacheRead {
    /// Stores the word at `offset`.
    fn store(&self, offset: usize, value: u64, order: Ordering);
}

impl<M: CacheRead + ?Sized> CacheRead for std::sync::Arc<M> {
    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        (**self).load(offset, order)
    }
    fn fence(&self, order: Ordering) {
        (**self).fence(order);
    }
    fn load_words(&self, offset: usize, into: &mut [u64]) {
        (**self).load_words(offset, into);
    }
}

impl<M: CacheWrite + ?Sized> CacheWrite for std::sync::Arc<M> {
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        (**self).store(offset, value, order);
    }
}

/// Cache memory over a range that may only be read.
#[derive(Debug, Clone, Copy)]
pub struct RawCacheReader {
    base: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: every access is an atomic load, so any thread may use it.
unsafe impl Send for RawCacheReader {}
// SAFETY: as above; there is no thread-bound state.
unsafe impl Sync for RawCacheReader {}

impl RawCacheReader {
    /// Wraps a mapped range.
    ///
    /// # Safety
    /// `base .. base + len_bytes` must be readable memory, aligned to 8 bytes, for as long as this value or a copy of it
    /// is used, and this process must never hold a Rust reference into it.
    ///
    /// # Panics
    /// When `base` is not aligned to 8 bytes.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, len_bytes: usize) -> RawCacheReader {
        assert_eq!(base.as_ptr().align_offset(8), 0, "cache memory must be aligned to 8 bytes");
        RawCacheReader { base, len_bytes }
    }

    fn words(&self, offset: usize, count: usize) -> *mut u64 {
        let fits = offset <= self.len_bytes && count <= (self.len_bytes - offset) / 8;
        assert!(offset.is_multiple_of(8) && fits, "cache words out of range");
        // SAFETY: `offset + 8 * count <= len_bytes` was just asserted, so the result lies inside the range of `new`.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: in range and 8-aligned (`words` asserts it, `new` demands an aligned base), alive as long as `self` is
        // used (`new`). Loads alone are made of it in memory that is read-only.
        unsafe { AtomicU64::from_ptr(self.words(offset, 1)) }
    }
}

impl CacheRead for RawCacheReader {
    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
    #[inline]
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.word(offset).load(order)
    }
    #[inline]
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
    #[inline]
    fn load_words(&self, offset: usize, into: &mut [u64]) {
        let first = self.words(offset, into.len());
        for (index, word) in into.iter_mut().enumerate() {
            // SAFETY: `words` asserted the whole range; as in `word` otherwise.
            *word = unsafe { AtomicU64::from_ptr(first.add(index)) }.load(Ordering::Relaxed);
        }
    }
}

/// Cache memory over a range that this process may write.
#[derive(Debug, Clone, Copy)]
pub struct RawCacheWriter(RawCacheReader);

impl RawCacheWriter {
    /// Wraps a mapped range.
    ///
    /// # Safety
    /// As [`RawCacheReader::new`], and the range must be writable too.
    ///
    /// # Panics
    /// When `base` is not aligned to 8 bytes.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, len_bytes: usize) -> RawCacheWriter {
        // SAFETY: handed through from the caller.
        RawCacheWriter(unsafe { RawCacheReader::new(base, len_bytes) })
    }
}

impl CacheRead for RawCacheWriter {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes
    }
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.0.load(offset, order)
    }
    fn fence(&self, order: Ordering) {
        self.0.fence(order);
    }
}

impl CacheWrite for RawCacheWriter {
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.0.word(offset).store(value, order);
    }
}

/// Cache memory on this process's heap: for tests and Miri, where there is no second process.
#[derive(Debug)]
pub struct HeapCacheMemory(Box<[AtomicU64]>);

impl HeapCacheMemory {
    /// Zeroed memory of `len_bytes`, rounded up to 8.
    #[must_use]
    pub fn new(len_bytes: usize) -> HeapCacheMemory {
        HeapCacheMemory((0..len_bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "cache word not aligned");
        &self.0[offset / 8]
    }
}

impl CacheRead for HeapCacheMemory {
    fn len_bytes(&self) -> usize {
        8 * self.0.len()
    }
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.word(offset).load(order)
    }
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
}

impl CacheWrite for HeapCacheMemory {
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.word(offset).store(value, order);
    }
}

//! The memory a lane lies in: the few operations that both ends are written against, and the implementation over a raw
//! mapping. Ordering is the caller's affair; this file only promises that no operation leaves the region and that none
//! is undefined however the other process writes at the same time.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Most bytes of a payload that are prefetched: a text or a vector. More would only queue up before what is waited for.
pub(super) const MAX_PREFETCH_BYTES: usize = 4 << 10;

/// Memory shared with a peer that may write any of it at any time.
///
/// Offsets are bytes from the start of the region. Implementations panic when an offset is out of range or misaligned:
/// offsets come from this crate's own tables and checked numbers, never unchecked from a peer, so that is a bug here.
pub trait LaneMemory {
    /// Size of the region in bytes.
    fn len_bytes(&self) -> usize;
    /// Loads the control word at `offset` (4-aligned).
    fn load_u32(&self, offset: usize, order: Ordering) -> u32;
    /// Stores the control word at `offset` (4-aligned).
    fn store_u32(&self, offset: usize, value: u32, order: Ordering);
    /// Swaps the control word at `offset` (4-aligned) and gives the old value.
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32;
    /// Loads the control word at `offset` (8-aligned).
    fn load_u64(&self, offset: usize, order: Ordering) -> u64;
    /// Stores the control word at `offset` (8-aligned).
    fn store_u64(&self, offset: usize, value: u64, order: Ordering);
    /// A fence between this thread's operations on any lane memory.
    fn fence(&self, order: Ordering);
    /// Copies bytes out of the region. When the peer writes them at the same time the copy holds any mixture.
    fn read(&self, offset: usize, into: &mut [u8]);
    /// Copies bytes into the region.
    fn write(&self, offset: usize, from: &[u8]);
    /// A hint that these bytes are read next: they may be fetched meanwhile. Changes nothing that can be observed.
    fn prefetch(&self, _offset: usize, _len_bytes: usize) {}
}

impl<M: LaneMemory + ?Sized> LaneMemory for std::sync::Arc<M> {
    fn len_bytes(&self) -> usize {
        (**self).len_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        (**self).load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        (**self).store_u32(offset, value, order);
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        (**self).swap_u32(offset, value, order)
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        (**self).load_u64(offset, order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        (**self).store_u64(offset, value, order);
    }
    fn fence(&self, order: Ordering) {
        (**self).fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        (**self).read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        (**self).write(offset, from);
    }
    fn prefetch(&self, offset: usize, len_bytes: usize) {
        (**self).prefetch(offset, len_bytes);
    }
}

/// Lane memory over a raw address range; whoever owns the range keeps it mapped.
#[derive(Debug, Clone, Copy)]
pub struct RawLaneMemory {
    base: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: every access goes through atomics or race-tolerant copies (see each method), so any thread may use it.
unsafe impl Send for RawLaneMemory {}
// SAFETY: as above; there is no thread-bound state.
unsafe impl Sync for RawLaneMemory {}

impl RawLaneMemory {
    /// Wraps a mapped range.
    ///
    /// # Safety
    /// `base .. base + len_bytes` must be readable and writable memory, aligned to 8 bytes, for as long as this value or
    /// a copy of it is used, and this process must never hold a Rust reference into it.
    ///
    /// # Panics
    /// When `base` is not aligned to 8 bytes.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, len_bytes: usize) -> RawLaneMemory {
        assert_eq!(base.as_ptr().align_offset(8), 0, "lane memory must be aligned to 8 bytes");
        RawLaneMemory { base, len_bytes }
    }

    /// Address of the word at `offset`, in range and aligned.
    fn word(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(size) && self.contains(offset, size), "lane word out of range");
        // SAFETY: `offset + size <= len_bytes` was just asserted, so the result lies inside the range of `new`.
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn contains(&self, offset: usize, size: usize) -> bool {
        offset <= self.len_bytes && size <= self.len_bytes - offset
    }

    fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: in range and 4-aligned (`word` asserts it, `new` demands an aligned base), alive as long as `self` is
        // used (`new`). The peer's concurrent writes are defined behaviour for an atomic.
        unsafe { AtomicU32::from_ptr(self.word(offset, 4).cast()) }
    }

    fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `atomic_u32`, with 8 for the alignment.
        unsafe { AtomicU64::from_ptr(self.word(offset, 8).cast()) }
    }
}

impl LaneMemory for RawLaneMemory {
    fn len_bytes(&self) -> usize {
        self.len_bytes
    }
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.atomic_u32(offset).load(order)
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.atomic_u32(offset).store(value, order);
    }
    #[inline]
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.atomic_u32(offset).swap(value, order)
    }
    #[inline]
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.atomic_u64(offset).load(order)
    }
    #[inline]
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.atomic_u64(offset).store(value, order);
    }
    #[inline]
    fn fence(&self, order: Ordering) {
        std::sync::atomic::fence(order);
    }
    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        assert!(self.contains(offset, into.len()), "lane read out of range");
        // SAFETY: the source range was just checked; the destination is a unique slice of this process, so the two
        // cannot overlap (`new`: no Rust reference into the region). `copy` tolerates concurrent writers.
        unsafe { copy(self.base.as_ptr().add(offset), into.as_mut_ptr(), into.len()) };
    }
    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        assert!(self.contains(offset, from.len()), "lane write out of range");
        // SAFETY: as in `read`, with source and destination exchanged.
        unsafe { copy(from.as_ptr(), self.base.as_ptr().add(offset), from.len()) };
    }
    #[inline]
    fn prefetch(&self, offset: usize, len_bytes: usize) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        for line in (offset..offset.saturating_add(len_bytes)).step_by(CACHE_LINE_BYTES) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch reads nothing and faults on no address; `wrapping_add` makes no claim on the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.base.as_ptr().wrapping_add(line).cast()) };
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        let _ = (offset, len_bytes);
    }
}

/// What a prefetch fetches.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const CACHE_LINE_BYTES: usize = 64;
/// Below this, a loop of vector moves beats the start-up of `rep movsb`.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const STRING_MOVE_FROM_BYTES: usize = 512;

/// What the loop of vector moves takes at once.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const BLOCK_BYTES: usize = 64;

/// Copies bytes where the other process may write the source or the destination at the same time.
///
/// A plain `memcpy` on racing memory is undefined in Rust. String moves in assembly and volatile word accesses are not:
/// the compiler can neither assume the bytes stable nor read them twice.
///
/// # Safety
/// Both ranges of `len_bytes` must be valid for the access and must not overlap.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len_bytes: usize) {
    if len_bytes >= STRING_MOVE_FROM_BYTES {
        // SAFETY: the caller promises both ranges; the direction flag is clear by the ABI.
        unsafe {
            std::arch::asm!(
                "rep movsb",
                inout("rcx") len_bytes => _,
                inout("rsi") from => _,
                inout("rdi") to => _,
                options(nostack, preserves_flags),
            );
        }
        return;
    }
    let blocks = len_bytes / BLOCK_BYTES;
    for block in 0..blocks {
        // SAFETY: `BLOCK_BYTES * block + BLOCK_BYTES <= len_bytes`, and the moves take any alignment. SSE2 is part of
        // x86-64.
        unsafe {
            std::arch::asm!(
                "movdqu {a}, [{from}]",
                "movdqu {b}, [{from} + 16]",
                "movdqu {c}, [{from} + 32]",
                "movdqu {d}, [{from} + 48]",
                "movdqu [{to}], {a}",
                "movdqu [{to} + 16], {b}",
                "movdqu [{to} + 32], {c}",
                "movdqu [{to} + 48], {d}",
                from = in(reg) from.add(BLOCK_BYTES * block),
                to = in(reg) to.add(BLOCK_BYTES * block),
                a = out(xmm_reg) _,
                b = out(xmm_reg) _,
                c = out(xmm_reg) _,
                d = out(xmm_reg) _,
                options(nostack, preserves_flags),
            );
        }
    }
    let done = BLOCK_BYTES * blocks;
    // SAFETY: handed through from the caller, less what was copied.
    unsafe { copy_words(from.add(done), to.add(done), len_bytes - done) };
}

/// As above, without assembly.
///
/// # Safety
/// Both ranges of `len_bytes` must be valid for the access and must not overlap.
#[cfg(all(not(target_arch = "x86_64"), not(miri)))]
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len_bytes: usize) {
    // SAFETY: handed through from the caller.
    unsafe { copy_words(from, to, len_bytes) };
}

/// Under Miri an ordinary copy, so that a missing ordering between honest peers is reported as the data race it is.
///
/// # Safety
/// Both ranges of `len_bytes` must be valid for the access and must not overlap.
#[cfg(miri)]
unsafe fn copy(from: *const u8, to: *mut u8, len_bytes: usize) {
    // SAFETY: handed through from the caller.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len_bytes) };
}

/// Volatile copy by words of 8 bytes, then single bytes.
///
/// # Safety
/// Both ranges of `len_bytes` must be valid for the access and must not overlap.
#[cfg(not(miri))]
#[inline]
unsafe fn copy_words(from: *const u8, to: *mut u8, len_bytes: usize) {
    let words = len_bytes / 8;
    for i in 0..words {
        // SAFETY: `8 * i + 8 <= len_bytes`. The array type has alignment 1, so any address is aligned for it.
        unsafe {
            let word = from.cast::<[u8; 8]>().add(i).read_volatile();
            to.cast::<[u8; 8]>().add(i).write_volatile(word);
        }
    }
    for i in words * 8..len_bytes {
        // SAFETY: `i < len_bytes`.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
}

/// Lane memory on this process's heap: for tests, Miri and fuzzing, where there is no second process.
#[derive(Debug)]
pub struct HeapLaneMemory {
    raw: RawLaneMemory,
    words: *mut [u64],
}

// SAFETY: the words are reached only through `raw`, which is Send and Sync, and freed once in `drop`.
unsafe impl Send for HeapLaneMemory {}
// SAFETY: as above.
unsafe impl Sync for HeapLaneMemory {}

impl HeapLaneMemory {
    /// Zeroed memory of `len_bytes`, rounded up to 8.
    #[must_use]
    pub fn new(len_bytes: usize) -> HeapLaneMemory {
        let words = Box::into_raw(vec![0u64; len_bytes.div_ceil(8)].into_boxed_slice());
        let base = NonNull::new(words.cast::<u8>()).unwrap_or(NonNull::dangling());
        // SAFETY: the box is owned by this value, 8-aligned, of that length, and no reference into it is ever made.
        let raw = unsafe { RawLaneMemory::new(base, len_bytes) };
        HeapLaneMemory { raw, words }
    }
}

impl Drop for HeapLaneMemory {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw` in `new` and freed only here.
        drop(unsafe { Box::from_raw(self.words) });
    }
}

impl LaneMemory for HeapLaneMemory {
    fn len_bytes(&self) -> usize {
        self.raw.len_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.raw.load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.raw.store_u32(offset, value, order);
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.raw.swap_u32(offset, value, order)
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.raw.load_u64(offset, order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.raw.store_u64(offset, value, order);
    }
    fn fence(&self, order: Ordering) {
        self.raw.fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.raw.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.raw.write(offset, from);
    }
}

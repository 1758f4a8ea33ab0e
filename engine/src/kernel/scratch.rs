//! Memory for activations: aligned, zeroed, kept between calls. No arithmetic.

/// A cache line, the alignment of everything here.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u8; 64]);

/// Memory of a bounded length that several threads write at disjoint places.
pub(super) struct Block {
    lines: Vec<Line>,
}

impl Block {
    /// Zeroed memory of at least `len_bytes`.
    pub(super) fn zeroed(len_bytes: usize) -> Block {
        Block { lines: vec![Line([0; 64]); len_bytes.div_ceil(64)] }
    }

    /// First byte; `len_bytes` of [`Block::zeroed`] follow it.
    pub(super) fn start(&mut self) -> Place {
        Place { start: self.lines.as_mut_ptr().cast(), len_bytes: 64 * self.lines.len() }
    }
}

/// Where a block lies, for threads that write disjoint parts of it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    start: *mut u8,
    len_bytes: usize,
}

// SAFETY: an address and a length; all access is through unsafe functions that demand disjoint parts.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    /// The place of a slice that is borrowed mutably for as long as the place is used.
    pub(super) fn of(slice: &mut [f32]) -> Place {
        Place { start: slice.as_mut_ptr().cast(), len_bytes: size_of_val(slice) }
    }

    /// Address of element `index` of type `T`.
    ///
    /// # Panics
    /// When it lies outside.
    pub(super) fn at<T>(self, index: usize) -> *mut T {
        assert!(index * size_of::<T>() <= self.len_bytes, "outside the scratch memory");
        // SAFETY: inside the block or one past its end, as was just asserted.
        unsafe { self.start.add(index * size_of::<T>()).cast() }
    }

    /// Elements `start .. start + len` of type `T`, to read and write.
    ///
    /// # Safety
    /// `T` must be a number, the block aligned to it, and nobody else may touch these elements while the slice lives. The
    /// block must outlive it.
    ///
    /// # Panics
    /// When they lie outside.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn slice<'a, T>(self, start: usize, len: usize) -> &'a mut [T] {
        assert!((start + len) * size_of::<T>() <= self.len_bytes, "outside the scratch memory");
        // SAFETY: in range as asserted, aligned and exclusive as the caller promises; zeroed memory is a valid number.
        unsafe { std::slice::from_raw_parts_mut(self.at(start), len) }
    }
}

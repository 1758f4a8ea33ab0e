//! Splitting rows over threads, and a slice that several threads write at disjoint places. No arithmetic.

use rayon::prelude::*;
use std::marker::PhantomData;

/// Least number of floats that is worth a second thread.
const MIN_FLOATS_PER_THREAD: usize = 32 * 1024;

/// Calls `work(first_row, rows)` for pieces of `data`, whose rows have `width` floats, on up to `threads` threads.
pub(crate) fn par_rows(
    threads: usize,
    data: &mut [f32],
    width: usize,
    work: impl Fn(usize, &mut [f32]) + Send + Sync,
) {
    if threads <= 1 || data.len() < 2 * MIN_FLOATS_PER_THREAD {
        return work(0, data);
    }
    let rows = data.len() / width;
    // More pieces than threads evens out a thread that is held up.
    let piece_rows = rows.div_ceil(4 * threads).max(1);
    data.par_chunks_mut(piece_rows * width)
        .enumerate()
        .for_each(|(piece, rows)| work(piece * piece_rows, rows));
}

/// Calls `work(task)` for every task, on up to `threads` threads when `floats` (the amount of work) is worth it.
pub(super) fn par_tasks(threads: usize, tasks: usize, floats: usize, work: impl Fn(usize) + Send + Sync) {
    if threads <= 1 || floats < 2 * MIN_FLOATS_PER_THREAD {
        (0..tasks).for_each(work);
    } else {
        (0..tasks).into_par_iter().for_each(work);
    }
}

/// A mutable slice that threads share, each writing elements that no other touches.
pub(super) struct SharedFloats<'a> {
    start: *mut f32,
    len: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer comes from a `&mut [f32]` that this value borrows for its whole life; the functions that write through
// it are unsafe and demand disjoint elements.
unsafe impl Send for SharedFloats<'_> {}
// SAFETY: as above; sharing the value gives only the pointer and the length.
unsafe impl Sync for SharedFloats<'_> {}

impl<'a> SharedFloats<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Self {
        SharedFloats { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_ptr(&self) -> *mut f32 {
        self.start
    }
}

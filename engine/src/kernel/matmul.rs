//! Matrix multiplication on borrowed memory, by the `gemm` crate. Checks lengths; knows nothing of layers.

use super::rows::SharedFloats;
use gemm::{Parallelism, gemm};

/// Where one matrix of a product lies in a slice: element (row, column) at `offset + row * row_stride + column * column_stride`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) offset: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl Place {
    /// Whether all elements of a `rows` x `columns` matrix lie inside `len` floats.
    fn fits(self, rows: usize, columns: usize, len: usize) -> bool {
        rows > 0
            && columns > 0
            && (rows - 1) * self.row_stride + (columns - 1) * self.column_stride + self.offset < len
    }
}

/// `out = x · w`, all row-major: `out` is `[rows, outputs]`, `x` is `[rows, inputs]`, `w` is `[inputs, outputs]`.
///
/// # Panics
/// When a length does not fit; callers derive all of them from one checked model.
pub(crate) fn matmul(threads: usize, out: &mut [f32], x: &[f32], w: &[f32], inputs: usize, outputs: usize) {
    let rows = x.len() / inputs;
    assert!(x.len() == rows * inputs && out.len() == rows * outputs && w.len() == inputs * outputs);
    if rows == 0 {
        return;
    }
    let parallelism = if threads > 1 { Parallelism::Rayon(threads) } else { Parallelism::None };
    // The product is computed as outᵀ = wᵀ · xᵀ: then `w` is contiguous along the register dimension and is not packed for
    // few rows, and rows of `x` fall on the dimension along which each element's sum is independent of all others.
    // A lone row would take another code path with another order of summation; two columns with stride zero do not.
    if rows == 1 {
        let mut both = vec![0.0; 2 * outputs];
        // SAFETY: lengths were asserted above; `both` has room for two columns of `outputs`; the right side's two columns
        // are the same `inputs` floats (column stride 0), which is only read.
        unsafe {
            gemm(
                outputs,
                2,
                inputs,
                both.as_mut_ptr(),
                outputs as isize,
                1,
                false,
                w.as_ptr(),
                outputs as isize,
                1,
                x.as_ptr(),
                0,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
        out.copy_from_slice(&both[..outputs]);
        return;
    }
    // SAFETY: with the lengths asserted above, every index that the strides span lies inside its slice; `out` is borrowed
    // mutably and so overlaps neither input.
    unsafe {
        gemm(
            outputs,
            rows,
            inputs,
            out.as_mut_ptr(),
            outputs as isize,
            1,
            false,
            w.as_ptr(),
            outputs as isize,
            1,
            x.as_ptr(),
            inputs as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// `out = a · b` for `[m, k] · [k, n]` matrices at strided places, on this thread. `out` is shared with other threads that
/// write other elements.
///
/// # Safety
/// No other thread may read or write the elements that `out_place` spans while this runs.
pub(super) unsafe fn matmul_strided(
    (m, n, k): (usize, usize, usize),
    out: &SharedFloats<'_>,
    out_place: Place,
    a: &[f32],
    a_place: Place,
    b: &[f32],
    b_place: Place,
) {
    assert!(
        out_place.fits(m, n, out.len()) && a_place.fits(m, k, a.len()) && b_place.fits(k, n, b.len()),
        "a matrix of a product does not fit its slice"
    );
    // SAFETY: `fits` was asserted for all three, so every index lies inside its slice; `a` and `b` are borrowed; the
    // caller promises that nobody else touches the elements of `out`.
    unsafe {
        gemm(
            m,
            n,
            k,
            out.as_ptr().add(out_place.offset),
            out_place.column_stride as isize,
            out_place.row_stride as isize,
            false,
            a.as_ptr().add(a_place.offset),
            a_place.column_stride as isize,
            a_place.row_stride as isize,
            b.as_ptr().add(b_place.offset),
            b_place.column_stride as isize,
            b_place.row_stride as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

//! Products with quantised blocks: a piece of a weight row becomes floats in the first-level cache and meets all rows there.

use super::super::cpu::{CpuPath, path};
use super::super::product::Target;
use super::super::vector::{fma, per_cpu_unsafe};
use crate::blocks::{BlockKind, MAX_BLOCK_ELEMENTS, dequantize};
use std::ops::Range;

/// Numbers that one step of a loop handles; sums keep this many partial sums whatever the CPU's width.
const LANES: usize = 16;
/// Rows that meet a piece of weights at once: their sums stay in the first-level cache.
const ROWS_AT_ONCE: usize = 32;

/// A product `out[row][output] = floats[row] · weights[output]`.
pub(super) struct BlockRows<'a> {
    pub(super) kind: BlockKind,
    pub(super) bytes: &'a [u8],
    pub(super) inputs: usize,
    /// Rows of floats, `inputs` apart.
    pub(super) floats: *const f32,
    pub(super) rows: usize,
    pub(super) out: Target<f32>,
    pub(super) add: bool,
}

/// # Safety
/// As [`multiply_blocks`].
#[inline(always)]
unsafe fn multiply_body<const FMA: bool>(job: &BlockRows<'_>, outputs: Range<usize>) {
    let BlockRows { kind, bytes, inputs, floats, rows, out, add } = *job;
    let Some(row_bytes) = kind.row_bytes(inputs) else { return };
    // Whole blocks, and at most as many numbers as the largest block has.
    let piece = MAX_BLOCK_ELEMENTS;
    let piece_bytes = piece / kind.elements() * kind.bytes();
    let mut weights = [0.0f32; MAX_BLOCK_ELEMENTS];
    for first in (0..rows).step_by(ROWS_AT_ONCE) {
        let count = (rows - first).min(ROWS_AT_ONCE);
        for output in outputs.clone() {
            let row = &bytes[output * row_bytes..(output + 1) * row_bytes];
            let mut sums = [[0.0f32; LANES]; ROWS_AT_ONCE];
            for (index, blocks) in row.chunks(piece_bytes).enumerate() {
                let start = index * piece;
                let weights = &mut weights[..(inputs - start).min(piece)];
                dequantize(kind, blocks, weights);
                for (row, sums) in sums[..count].iter_mut().enumerate() {
                    // SAFETY: `start` and the piece's length lie inside a row (the caller's promise for all rows).
                    let x = unsafe {
                        std::slice::from_raw_parts(floats.add((first + row) * inputs + start), weights.len())
                    };
                    let mut lanes = *sums;
                    for (x, w) in x.as_chunks::<LANES>().0.iter().zip(weights.as_chunks::<LANES>().0) {
                        for ((lane, x), w) in lanes.iter_mut().zip(x).zip(w) {
                            *lane = fma::<FMA>(*x, *w, *lane);
                        }
                    }
                    *sums = lanes;
                }
            }
            for (row, sums) in sums[..count].iter().enumerate() {
                let mut lanes = *sums;
                for half in [8, 4, 2, 1] {
                    for lane in 0..half {
                        lanes[lane] += lanes[lane + half];
                    }
                }
                // SAFETY: the caller's promise.
                let at = unsafe { &mut *out.at(first + row).add(output) };
                *at = if add { *at + lanes[0] } else { lanes[0] };
            }
        }
    }
}

per_cpu_unsafe! {
    /// Computes these outputs of all rows.
    ///
    /// # Safety
    /// `bytes` must hold all outputs' rows; `rows` rows of `inputs` floats must be readable; the outputs' columns of all rows of the
    /// target must be writable, initialised and nobody else's.
    pub(super) unsafe fn multiply_blocks(job: &BlockRows<'_>, outputs: Range<usize>) = multiply_body
}

//! Products of a step: rows made the left side of a product, products dealt out by columns, and the memory for both.

use super::super::finish::{Dequantize, Finish, Out as FinishOut, finish_exactly};
use super::super::product::{Left as Rows, PANEL_COLUMNS, Right, TILE_ROWS, Target, Tile, multiply};
use super::super::scratch::{Block, Place};
use super::super::team::Member;
use super::super::vector::{quantize_row, to_bf16};
use super::blocks::{BlockRows, multiply_blocks};
use super::weights::{Dense, Matrix};
use crate::packing::{Packing, Precision};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Largest memory of a step that is kept for the next one, bytes.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// Memory for some rows: left sides as floats and narrowed, and what products give.
pub(super) struct Work {
    precision: Precision,
    rows: usize,
    widest: usize,
    wide: usize,
    floats: Block,
    left: Block,
    row_scales: Block,
    results: Block,
}

/// Where it lies.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) precision: Precision,
    /// Left sides, `[rows, widest]`.
    pub(super) floats: Place,
    left: Place,
    row_scales: Place,
    /// What products give that are not added to anything.
    pub(super) results: Place,
}

/// The left side of a product: rows of floats, as many apart as the product has inputs, and what [`Places::narrow`] made of them.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) floats: Place,
    pub(super) rows: usize,
}

/// Where a product goes: rows `stride` apart, from a column on; stored, or added to what is there.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) place: Place,
    pub(super) stride: usize,
    pub(super) column: usize,
    pub(super) add: bool,
}

/// The last step's memory.
static KEPT: Mutex<Option<Work>> = Mutex::new(None);

impl Work {
    /// Memory for `rows` rows of up to `widest` inputs and `wide` outputs that are not added to anything.
    pub(super) fn take(precision: Precision, rows: usize, widest: usize, wide: usize) -> Work {
        let kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(kept) = kept
            && kept.precision == precision
            && kept.rows >= rows
            && kept.widest >= widest
            && kept.wide >= wide
        {
            return kept;
        }
        let rows = rows.next_multiple_of(8);
        let narrow_bytes = match precision {
            Precision::F32 => 0,
            _ => (rows + TILE_ROWS) * precision.padded(widest) * precision.element_bytes(),
        };
        Work {
            precision,
            rows,
            widest,
            wide,
            floats: Block::zeroed(4 * rows * widest),
            left: Block::zeroed(narrow_bytes),
            row_scales: Block::zeroed(8 * (rows + TILE_ROWS)),
            results: Block::zeroed(4 * rows * wide),
        }
    }

    /// Keeps it for the next step, unless it is large.
    pub(super) fn keep(self) {
        if 4 * self.rows * (2 * self.widest + self.wide) <= MAX_KEPT_BYTES {
            *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = Some(self);
        }
    }

    pub(super) fn places(&mut self) -> Places {
        Places {
            precision: self.precision,
            floats: self.floats.start(),
            left: self.left.start(),
            row_scales: self.row_scales.start(),
            results: self.results.start(),
        }
    }
}

impl Places {
    /// Makes rows of `width` floats the left side of products in this precision; nothing for f32.
    ///
    /// # Safety
    /// The rows must be readable and written by nobody; those of the left side must be this member's.
    pub(super) unsafe fn narrow(&self, floats: Place, width: usize, rows: Range<usize>) {
        let stride = self.precision.padded(width);
        for row in rows {
            // SAFETY: the caller's promise; the left side has room for rows of the widest input. Padding is set to zero, since the
            // memory held rows of other widths before.
            unsafe {
                let values = floats.slice::<f32>(row * width, width);
                match self.precision {
                    Precision::F32 => {}
                    Precision::Bf16 => {
                        let out = self.left.slice::<u16>(row * stride, stride);
                        to_bf16(values, &mut out[..width]);
                        out[width..].fill(0);
                    }
                    Precision::Int8 => {
                        let scales = &mut self.row_scales.slice::<[f32; 2]>(row, 1)[0];
                        let out = self.left.slice::<u8>(row * stride, stride);
                        quantize_row(values, &mut out[..width], scales);
                        out[width..].fill(0);
                    }
                }
            }
        }
    }

    /// This member's columns of a product.
    ///
    /// # Safety
    /// The left side must be complete and `dense` have been checked; what the product writes must be touched by nobody but members
    /// that do the same step, and have room for all of its rows and columns.
    pub(super) unsafe fn product(&self, member: &Member<'_>, dense: &Dense<'_>, left: Left, out: Out) {
        let Dense { inputs, outputs, .. } = *dense;
        let Matrix::Packed { precision, panels, scales, sums } = dense.matrix else {
            let Matrix::Blocks { kind, bytes } = dense.matrix else { return };
            let target = Target { start: out.place.at::<f32>(out.column), stride: out.stride };
            let job = BlockRows {
                kind,
                bytes,
                inputs,
                floats: left.floats.at(0),
                rows: left.rows,
                out: target,
                add: out.add,
            };
            // SAFETY: the caller's promise; outputs are dealt out to one member each.
            unsafe { multiply_blocks(&job, member.part(outputs, 1)) };
            return;
        };
        let rows = match precision {
            Precision::F32 => Rows { start: left.floats.at(0), stride_bytes: 4 * inputs, rows: left.rows },
            _ => Rows {
                start: self.left.at(0),
                stride_bytes: precision.padded(inputs) * precision.element_bytes(),
                rows: left.rows,
            },
        };
        let right = Right::whole(panels.as_ptr(), precision, precision.padded(inputs));
        let done = |tile: &mut Tile, rows: Range<usize>, panel: usize| {
            let columns = panel * PANEL_COLUMNS..((panel + 1) * PANEL_COLUMNS).min(outputs);
            let dequantize = (precision == Precision::Int8).then(|| Dequantize {
                // SAFETY: the left side is complete, so its scales are, and nobody writes them now.
                rows: unsafe { self.row_scales.slice::<[f32; 2]>(rows.start, rows.len()) },
                scales: &scales[columns.clone()],
                sums: &sums[columns.clone()],
            });
            let target = Target {
                start: out.place.at::<f32>(rows.start * out.stride + out.column + columns.start),
                stride: out.stride,
            };
            let out = if out.add { FinishOut::Add(target) } else { FinishOut::Store(target) };
            let finish =
                Finish { dequantize, bias: &[0.0; PANEL_COLUMNS][..columns.len()], activation: None, out };
            // SAFETY: these columns are this member's, and the place has room for all rows of all columns.
            unsafe { finish_exactly(tile.rows_mut(rows.len()), finish) };
        };
        // SAFETY: panels were checked against the dimensions, the narrowed left side has rows behind the last; f32 rows are read
        // exactly.
        unsafe { multiply(rows, right, member.part(outputs.div_ceil(PANEL_COLUMNS), 1), done) };
    }
}

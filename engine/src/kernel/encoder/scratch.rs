//! Memory for the activations of some tokens, kept between calls. No arithmetic.

use super::super::attention::release_scratch;
use super::super::cpu::path;
use super::super::product::TILE_ROWS;
use super::super::scratch::{Block, Place};
use super::weights::EncoderWeights;
use crate::packing::{Packing, Precision};
use std::sync::{Mutex, PoisonError};

/// How many more than threads are kept: a thread may compute something else in a break.
const SPARE: usize = 1;

/// Activations of some tokens.
pub(super) struct Scratch {
    tokens: usize,
    /// Bytes of a row in each block, which say for what encoder it was made.
    row_bytes: [usize; 7],
    qkv: Block,
    context: Block,
    wide: Block,
    /// The left side of products in bf16 or int8: hidden state or context, then what the activation gave.
    narrow_left: Block,
    wide_left: Block,
    /// The same for contexts, where they are not as wide as the hidden state.
    context_left: Block,
    /// What the norm before a block gives, in pre-norm models.
    normed: Block,
    /// int8: scale and zero of each row of the left side.
    row_scales: Block,
}

impl Scratch {
    fn row_bytes(encoder: &EncoderWeights<'_>) -> [usize; 7] {
        let (width, wide) = (encoder.width(), encoder.wide);
        let (inner, qkv) = (encoder.shape.context_dim(), encoder.shape.qkv_dim());
        let left = |inputs: usize| encoder.precision.padded(inputs) * encoder.precision.element_bytes();
        // As `Group::run` uses them.
        let is_narrow = path().has_bf16();
        let [qkv, context, wide, narrow_left, wide_left] = match encoder.precision {
            Precision::F32 => [4 * qkv, 4 * inner, 4 * wide, 0, 0],
            Precision::Bf16 if is_narrow => [2 * qkv, 0, 0, left(width), left(wide)],
            Precision::Bf16 => [4 * qkv, 4 * inner, 0, left(width), left(wide)],
            Precision::Int8 if is_narrow => [2 * qkv, 4 * inner, 4 * wide, left(width), left(wide)],
            Precision::Int8 => [4 * qkv, 4 * inner, 4 * wide, left(width), left(wide)],
        };
        let context_left = match encoder.precision {
            Precision::Bf16 | Precision::Int8 if inner != width => left(inner),
            _ => 0,
        };
        let normed = if encoder.is_pre_norm { 4 * width } else { 0 };
        [qkv, context, wide, narrow_left, wide_left, context_left, normed]
    }

    /// Memory for at least `tokens` tokens: a kept one that fits, or a new one.
    pub(super) fn take(encoder: &EncoderWeights<'_>, tokens: usize, threads: usize) -> Scratch {
        let row_bytes = Scratch::row_bytes(encoder);
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        // Padding behind the rows of the left sides must be zero, so memory of another shape is not used.
        let fits = |scratch: &Scratch| scratch.tokens >= tokens && scratch.row_bytes == row_bytes;
        if let Some(index) = kept.iter().position(fits) {
            return kept.swap_remove(index);
        }
        // One that does not fit makes way when there are enough, so that what is kept stays bounded.
        if kept.len() >= threads + SPARE {
            kept.swap_remove(0);
        }
        drop(kept);
        let tokens = tokens.next_multiple_of(TILE_ROWS);
        let rows = |bytes: usize| Block::zeroed((tokens + TILE_ROWS) * bytes);
        let [qkv, context, wide, narrow_left, wide_left, context_left, normed] = row_bytes.map(rows);
        let row_scales = rows(8);
        Scratch {
            tokens,
            row_bytes,
            qkv,
            context,
            wide,
            narrow_left,
            wide_left,
            context_left,
            normed,
            row_scales,
        }
    }

    /// Keeps it for the next call, one for each of `threads` and [`SPARE`] for breaks.
    pub(super) fn keep(self, threads: usize) {
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < threads + SPARE {
            kept.push(self);
        }
    }

    pub(super) fn places(&mut self) -> Places {
        Places {
            qkv: self.qkv.start(),
            context: self.context.start(),
            wide: self.wide.start(),
            narrow_left: self.narrow_left.start(),
            wide_left: self.wide_left.start(),
            context_left: self.context_left.start(),
            normed: self.normed.start(),
            row_scales: self.row_scales.start(),
        }
    }
}

/// Scratch memory between calls, of all models.
static KEPT: Mutex<Vec<Scratch>> = Mutex::new(Vec::new());

/// Gives back all memory that is kept for activations: this thread's, and that of the pool it is on when that has several.
pub(crate) fn release_all_scratch(threads: usize) {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner).clear();
    if threads > 1 {
        rayon::broadcast(|_| release_scratch());
    }
    release_scratch();
}

#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) qkv: Place,
    pub(super) context: Place,
    pub(super) wide: Place,
    pub(super) narrow_left: Place,
    pub(super) wide_left: Place,
    pub(super) context_left: Place,
    pub(super) normed: Place,
    pub(super) row_scales: Place,
}

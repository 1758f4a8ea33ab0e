//! What a stack consists of, what a step of it computes, and the checks on which its kernels rely. Nothing computes here.

use crate::blocks::BlockKind;
use crate::packing::{Packing, Precision};
use std::ops::Range;

/// Why a stack can't run: weights, rows and memory do not belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Mismatch(pub(crate) &'static str);

/// A matrix `[outputs, inputs]` as it lies in an image.
#[derive(Clone, Copy)]
pub(crate) enum Matrix<'a> {
    /// Panels, see [`crate::packing`]; int8 with scale and sum of each output.
    Packed {
        /// What the panels hold.
        precision: Precision,
        /// The panels.
        panels: &'a [u8],
        /// int8 only.
        scales: &'a [f32],
        /// int8 only.
        sums: &'a [f32],
    },
    /// Rows of quantised blocks.
    Blocks {
        /// Their kind.
        kind: BlockKind,
        /// The rows one behind the other.
        bytes: &'a [u8],
    },
}

/// A linear layer without bias.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a> {
    pub(crate) matrix: Matrix<'a>,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl Dense<'_> {
    /// Whether the bytes are as many as the dimensions say.
    pub(crate) fn fits(&self) -> bool {
        if self.inputs == 0 || self.outputs == 0 {
            return false;
        }
        match self.matrix {
            Matrix::Packed { precision, panels, scales, sums } => {
                let per_output = if precision == Precision::Int8 { self.outputs } else { 0 };
                panels.len() == precision.matrix_bytes(self.inputs, self.outputs)
                    && scales.len() == per_output
                    && sums.len() == per_output
            }
            Matrix::Blocks { kind, bytes } => {
                kind.row_bytes(self.inputs).and_then(|row| row.checked_mul(self.outputs)) == Some(bytes.len())
            }
        }
    }

    /// What the left side of a product must be.
    pub(crate) fn precision(&self) -> Precision {
        match self.matrix {
            Matrix::Packed { precision, .. } => precision,
            Matrix::Blocks { .. } => Precision::F32,
        }
    }
}

/// What a feed-forward block does between its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Feed {
    /// `max(x, 0)`.
    Relu,
    /// `gelu(gate) · x`, tanh approximation; gate first.
    GatedGelu,
    /// `silu(gate) · x`; gate first.
    GatedSilu,
}

/// Attention to what an encoder gave.
#[derive(Clone, Copy)]
pub(crate) struct CrossWeights<'a> {
    pub(crate) norm: &'a [f32],
    pub(crate) query: Dense<'a>,
    pub(crate) output: Dense<'a>,
}

/// Weights of one layer. Matrices of a list read the same input; their outputs lie side by side.
pub(crate) struct StackLayer<'a> {
    pub(crate) norm: &'a [f32],
    /// Queries, keys, values.
    pub(crate) qkv: Vec<Dense<'a>>,
    /// Norms of each head's query and key.
    pub(crate) head_norms: Option<(&'a [f32], &'a [f32])>,
    pub(crate) output: Dense<'a>,
    pub(crate) cross: Option<CrossWeights<'a>>,
    pub(crate) wide_norm: &'a [f32],
    /// Gate, if any, and input of the feed-forward block.
    pub(crate) up: Vec<Dense<'a>>,
    pub(crate) down: Dense<'a>,
}

/// Dimensions and settings that all layers share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StackShape {
    pub(crate) width: usize,
    pub(crate) heads: usize,
    /// Heads of keys and values; divides `heads`.
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) wide: usize,
    pub(crate) eps: f32,
    /// What scores are multiplied with.
    pub(crate) scale: f32,
    pub(crate) feed: Feed,
    /// Precision of packed matrices.
    pub(crate) precision: Precision,
    /// Whether rotary positions turn neighbours (2i, 2i + 1), not halves (i, i + d/2).
    pub(crate) rotates_neighbours: bool,
    /// Whether keys and values of each layer are kept; else all layers use the same memory.
    pub(crate) keeps_layers: bool,
}

impl StackShape {
    /// Width of the queries of a row.
    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys of a row.
    pub(crate) fn key_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of queries, keys and values of a row.
    pub(crate) fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.key_width()
    }

    /// Floats that a slot keeps in one layer: a key and a value.
    pub(crate) fn slot_floats(&self) -> usize {
        2 * self.key_width()
    }
}

/// A stack.
pub(crate) struct StackWeights<'a> {
    pub(crate) shape: StackShape,
    pub(crate) layers: Vec<StackLayer<'a>>,
}

/// Which of its sequence's slots a row attends to.
#[derive(Clone, Copy)]
pub(crate) enum Sees<'a> {
    /// So many first ones.
    First(usize),
    /// These, in the order of positions.
    Slots(&'a [u32]),
}

impl Sees<'_> {
    /// How many.
    pub(crate) fn count(self) -> usize {
        match self {
            Sees::First(count) => count,
            Sees::Slots(slots) => slots.len(),
        }
    }
}

/// One row of a step.
#[derive(Clone, Copy)]
pub(crate) struct StepRow<'a> {
    /// Index of its sequence.
    pub(crate) sequence: usize,
    /// Where its key and value go.
    pub(crate) slot: usize,
    /// Its position, for the distance bias.
    pub(crate) position: usize,
    pub(crate) sees: Sees<'a>,
}

/// What a sequence keeps: for each layer and slot a key and a value side by side, `[layers, slots, 2, kv_heads, head_dim]`.
pub(crate) struct Kept<'a> {
    pub(crate) cache: &'a mut [f32],
    pub(crate) slots: usize,
    /// The same of an encoder's tokens, `[layers, tokens, 2, kv_heads, head_dim]`.
    pub(crate) cross: Option<&'a [f32]>,
}

/// Added to scores by head and by the distance of key and query: `values[head][center + key − query]`.
#[derive(Clone, Copy)]
pub(crate) struct DistanceBias<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) center: usize,
}

/// What one call computes.
pub(crate) struct Step<'a> {
    pub(crate) rows: &'a [StepRow<'a>],
    /// Cosines, then sines of each row's rotary angles, `[rows, head_dim]`; empty where nothing is rotated.
    pub(crate) angles: &'a [f32],
    pub(crate) bias: Option<DistanceBias<'a>>,
    pub(crate) layers: Range<usize>,
}

impl StackWeights<'_> {
    /// Most numbers in a row of any product's left side.
    pub(super) fn widest(&self) -> usize {
        self.shape.width.max(self.shape.query_width()).max(self.shape.wide)
    }

    /// Width of what the feed-forward block's first product gives.
    pub(super) fn up_width(&self) -> usize {
        match self.shape.feed {
            Feed::Relu => self.shape.wide,
            Feed::GatedGelu | Feed::GatedSilu => 2 * self.shape.wide,
        }
    }

    /// Checks all lengths that the kernels rely on.
    pub(super) fn check(&self, step: &Step<'_>, kept: &[Kept<'_>], hidden: &[f32]) -> Result<(), Mismatch> {
        let holds = |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(Mismatch(what)) };
        let shape = &self.shape;
        holds(
            shape.width > 0
                && shape.wide > 0
                && shape.head_dim > 0
                && shape.kv_heads > 0
                && shape.heads.is_multiple_of(shape.kv_heads)
                && (step.angles.is_empty() || shape.head_dim.is_multiple_of(2)),
            "the stack has impossible dimensions",
        )?;
        holds(
            step.layers.start <= step.layers.end && step.layers.end <= self.layers.len(),
            "no such layers",
        )?;
        for layer in &self.layers[step.layers.clone()] {
            self.check_layer(layer)?;
        }
        let rows = step.rows.len();
        holds(hidden.len() == rows * shape.width, "the hidden state has the wrong length")?;
        holds(
            step.angles.is_empty() || step.angles.len() == rows * shape.head_dim,
            "rotary angles have the wrong length",
        )?;
        let has_cross = self.layers.iter().any(|layer| layer.cross.is_some());
        let layers = if shape.keeps_layers { self.layers.len() } else { 1 };
        for kept in kept {
            let per_slot = layers * shape.slot_floats();
            holds(kept.cache.len() == kept.slots * per_slot, "kept keys have the wrong length")?;
            let cross = kept.cross.is_some_and(|cross| {
                !cross.is_empty() && cross.len().is_multiple_of(self.layers.len() * shape.slot_floats())
            });
            holds(!has_cross || cross, "an encoder's keys have the wrong length")?;
        }
        let mut written: Vec<(usize, usize)> = Vec::with_capacity(rows);
        for row in step.rows {
            let slots = kept.get(row.sequence).map_or(0, |kept| kept.slots);
            let seen = match row.sees {
                Sees::First(count) => count <= slots,
                Sees::Slots(seen) => seen.iter().all(|slot| (*slot as usize) < slots),
            };
            holds(row.slot < slots && seen && row.sees.count() > 0, "a row's slot does not exist")?;
            if let Some(bias) = step.bias {
                let span = bias.values.len() / shape.heads;
                let low = bias.center.checked_sub(row.position);
                let inside = low.is_some_and(|low| low + row.sees.count() <= span)
                    && bias.values.len() == span * shape.heads
                    && shape.heads == shape.kv_heads;
                holds(inside, "the distance bias has the wrong length")?;
            }
            written.push((row.sequence, row.slot));
        }
        written.sort_unstable();
        holds(written.windows(2).all(|pair| pair[0] != pair[1]), "two rows have one slot")
    }

    fn check_layer(&self, layer: &StackLayer<'_>) -> Result<(), Mismatch> {
        let shape = &self.shape;
        let one = |dense: &Dense<'_>, inputs: usize| {
            let packed = match dense.matrix {
                Matrix::Packed { precision, .. } => precision == shape.precision,
                Matrix::Blocks { .. } => true,
            };
            packed && dense.inputs == inputs && dense.fits()
        };
        let all = |list: &[Dense<'_>], inputs: usize, outputs: usize| {
            list.iter().all(|dense| one(dense, inputs))
                && list.iter().map(|dense| dense.outputs).sum::<usize>() == outputs
        };
        let norm = |norm: &[f32]| norm.len() == shape.width;
        let cross = layer.cross.as_ref().is_none_or(|cross| {
            norm(cross.norm)
                && all(&[cross.query], shape.width, shape.query_width())
                && all(&[cross.output], shape.query_width(), shape.width)
        });
        let heads = layer
            .head_norms
            .is_none_or(|(query, key)| query.len() == shape.head_dim && key.len() == shape.head_dim);
        let fits = norm(layer.norm)
            && norm(layer.wide_norm)
            && all(&layer.qkv, shape.width, shape.qkv_width())
            && all(&[layer.output], shape.query_width(), shape.width)
            && all(&layer.up, shape.width, self.up_width())
            && all(&[layer.down], shape.wide, shape.width);
        if cross && heads && fits { Ok(()) } else { Err(Mismatch("a layer's weights have the wrong length")) }
    }
}

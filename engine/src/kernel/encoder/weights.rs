//! What an encoder consists of, and the checks on which all of its kernels rely. Nothing computes here.

use super::super::attention::{AttentionShape, Reach};
use crate::config::{Activation, GATED_BLOCK, NormKind};
use crate::packing::PANEL_COLUMNS;
use crate::packing::{Packing, Precision};
use std::ops::Range;

/// Kind, weight, bias and epsilon of a norm; one of [`NormKind::Rms`] has no bias.
#[derive(Clone, Copy)]
pub(crate) struct NormWeights<'a> {
    pub(crate) kind: NormKind,
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
}

impl NormWeights<'_> {
    fn fits(&self, width: usize) -> bool {
        let bias = if self.kind == NormKind::Layer { width } else { 0 };
        self.weight.len() == width && self.bias.len() == bias
    }
}

/// A linear layer: packed panels and what goes with them.
#[derive(Clone, Copy)]
pub(crate) struct LinearWeights<'a> {
    pub(crate) panels: &'a [u8],
    pub(crate) bias: &'a [f32],
    /// int8 only: of each output the scale of its weights, and their sum times that.
    pub(crate) scales: &'a [f32],
    pub(crate) sums: &'a [f32],
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

impl LinearWeights<'_> {
    pub(crate) fn fits(&self, precision: Precision) -> bool {
        let per_output = if precision == Precision::Int8 { self.outputs } else { 0 };
        self.panels.len() == precision.matrix_bytes(self.inputs, self.outputs)
            && self.bias.len() == self.outputs
            && self.scales.len() == per_output
            && self.sums.len() == per_output
    }
}

/// Cosines and sines of rotary positions, `[positions, head_dim / 2]` each.
#[derive(Clone, Copy)]
pub(crate) struct RotaryTables<'a> {
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

/// Weights of one layer.
#[derive(Clone, Copy)]
pub(crate) struct LayerWeights<'a> {
    pub(crate) qkv: LinearWeights<'a>,
    /// Norms of queries and of keys, head by head.
    pub(crate) head_norms: Option<[NormWeights<'a>; 2]>,
    pub(crate) rotary: Option<RotaryTables<'a>>,
    /// Which tokens a token sees.
    pub(crate) reach: Reach,
    pub(crate) attention_output: LinearWeights<'a>,
    /// None before the first layer of some pre-norm models.
    pub(crate) attention_norm: Option<NormWeights<'a>>,
    /// In gated blocks the activated half and the other one in turns of [`GATED_BLOCK`] outputs.
    pub(crate) intermediate: LinearWeights<'a>,
    pub(crate) output: LinearWeights<'a>,
    pub(crate) output_norm: NormWeights<'a>,
}

/// Tables of the embedding layer, `[rows, width]` each; empty ones are not used.
#[derive(Clone, Copy)]
pub(crate) struct EmbeddingWeights<'a> {
    pub(crate) words: &'a [f32],
    pub(crate) kinds: &'a [f32],
    pub(crate) positions: &'a [f32],
    pub(crate) norm: Option<NormWeights<'a>>,
}

/// An encoder.
pub(crate) struct EncoderWeights<'a> {
    pub(crate) precision: Precision,
    pub(crate) width: usize,
    pub(crate) shape: AttentionShape,
    pub(crate) wide: usize,
    pub(crate) activation: Activation,
    pub(crate) is_gated: bool,
    /// Whether norms are before attention and feed-forward block instead of after them.
    pub(crate) is_pre_norm: bool,
    pub(crate) embeddings: EmbeddingWeights<'a>,
    /// `[heads, 2 * positions - 1]`, added to scores by `key - query + positions - 1`; empty when nothing is.
    pub(crate) distance_bias: &'a [f32],
    pub(crate) layers: Vec<LayerWeights<'a>>,
    /// Norm behind the last layer.
    pub(crate) final_norm: Option<NormWeights<'a>>,
}

/// One row of the embedding layer to look up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lookup {
    pub(crate) word: u32,
    pub(crate) kind: u32,
    pub(crate) position: u32,
}

/// Why an encoder can't run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EncodeError {
    /// Weights, tokens and sequences do not belong together.
    #[error("{0}")]
    Mismatch(&'static str),
}

impl EncoderWeights<'_> {
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Checks all lengths that the kernels rely on.
    pub(super) fn check(
        &self,
        tokens: &[Lookup],
        sequences: &[Range<usize>],
        hidden: &[f32],
    ) -> Result<(), EncodeError> {
        let holds =
            |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(EncodeError::Mismatch(what)) };
        holds(
            self.width > 0
                && self.wide > 0
                && self.shape.is_possible()
                && (!self.is_gated || self.wide.is_multiple_of(GATED_BLOCK)),
            "the encoder has impossible dimensions",
        )?;
        self.check_weights()?;
        let width = self.width;
        holds(hidden.len() == tokens.len() * width, "the hidden state has the wrong length")?;
        let mut end = 0;
        let mut longest = 0;
        for sequence in sequences {
            holds(sequence.start == end && sequence.end > sequence.start, "sequences are not packed")?;
            end = sequence.end;
            longest = longest.max(sequence.len());
        }
        holds(end == tokens.len(), "sequences do not cover all tokens")?;
        let positions = self.distance_bias.len() / self.shape.head_count;
        holds(
            self.distance_bias.is_empty()
                || (self.distance_bias.len().is_multiple_of(self.shape.head_count)
                    && positions % 2 == 1
                    && longest <= positions.div_ceil(2)),
            "a sequence is longer than the table of relative positions",
        )?;
        let half = self.shape.head_dim / 2;
        let mut rotary_rows = usize::MAX;
        for RotaryTables { cos, sin } in self.layers.iter().filter_map(|layer| layer.rotary) {
            holds(
                cos.len() == sin.len() && self.shape.head_dim.is_multiple_of(2),
                "the tables of rotary positions do not fit the heads",
            )?;
            rotary_rows = rotary_rows.min(cos.len() / half);
        }
        let tables = [self.embeddings.kinds, self.embeddings.positions];
        for token in tokens {
            let word = (token.word as usize + 1) * width <= self.embeddings.words.len();
            let mut others = [token.kind, token.position].into_iter().zip(tables);
            let inside =
                others.all(|(row, table)| table.is_empty() || (row as usize + 1) * width <= table.len());
            let turns = (token.position as usize) < rotary_rows;
            holds(word && inside && turns, "a token, token type or position is not in the model")?;
        }
        Ok(())
    }

    fn check_weights(&self) -> Result<(), EncodeError> {
        let (width, wide, inner) = (self.width, self.wide, self.shape.context_dim());
        let holds =
            |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(EncodeError::Mismatch(what)) };
        let norm = |norm: &NormWeights<'_>| norm.fits(width);
        let linear = |linear: &LinearWeights<'_>, inputs: usize, outputs: usize| {
            linear.inputs == inputs && linear.outputs == outputs && linear.fits(self.precision)
        };
        let norms = [&self.embeddings.norm, &self.final_norm];
        holds(norms.into_iter().flatten().all(norm), "a norm's weights have the wrong length")?;
        // Panels of a gated layer hold both halves.
        let first = if self.is_gated { wide / GATED_BLOCK * PANEL_COLUMNS } else { wide };
        for layer in &self.layers {
            let head_norms = layer.head_norms.iter().flatten();
            holds(
                layer.attention_norm.iter().all(norm)
                    && norm(&layer.output_norm)
                    && (self.is_pre_norm || layer.attention_norm.is_some())
                    && head_norms.into_iter().all(|norm| norm.fits(self.shape.head_dim)),
                "a norm's weights have the wrong length",
            )?;
            holds(
                linear(&layer.qkv, width, self.shape.qkv_dim())
                    && linear(&layer.attention_output, inner, width)
                    && linear(&layer.intermediate, width, first)
                    && linear(&layer.output, wide, width),
                "a linear layer's weights have the wrong length",
            )?;
        }
        Ok(())
    }
}

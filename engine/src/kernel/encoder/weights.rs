//! What an encoder consists of, and the checks on which all of its kernels rely. Nothing computes here.

use super::super::attention::AttentionShape;
use crate::config::Activation;
use crate::packing::{Packing, Precision};
use std::ops::Range;

/// Weight, bias and epsilon of a layer norm.
#[derive(Clone, Copy)]
pub(crate) struct NormWeights<'a> {
    pub(crate) weight: &'a [f32],
    pub(crate) bias: &'a [f32],
    pub(crate) eps: f32,
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
    fn fits(&self, precision: Precision) -> bool {
        let per_output = if precision == Precision::Int8 { self.outputs } else { 0 };
        self.panels.len() == precision.matrix_bytes(self.inputs, self.outputs)
            && self.bias.len() == self.outputs
            && self.scales.len() == per_output
            && self.sums.len() == per_output
    }
}

/// Weights of one layer.
#[derive(Clone, Copy)]
pub(crate) struct LayerWeights<'a> {
    pub(crate) qkv: LinearWeights<'a>,
    pub(crate) attention_output: LinearWeights<'a>,
    pub(crate) attention_norm: NormWeights<'a>,
    pub(crate) intermediate: LinearWeights<'a>,
    pub(crate) output: LinearWeights<'a>,
    pub(crate) output_norm: NormWeights<'a>,
}

/// Tables of the embedding layer, `[rows, width]` each.
#[derive(Clone, Copy)]
pub(crate) struct EmbeddingWeights<'a> {
    pub(crate) words: &'a [f32],
    pub(crate) kinds: &'a [f32],
    pub(crate) positions: &'a [f32],
    pub(crate) norm: NormWeights<'a>,
}

/// An encoder.
pub(crate) struct EncoderWeights<'a> {
    pub(crate) precision: Precision,
    pub(crate) shape: AttentionShape,
    pub(crate) wide: usize,
    pub(crate) activation: Activation,
    pub(crate) embeddings: EmbeddingWeights<'a>,
    pub(crate) layers: Vec<LayerWeights<'a>>,
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
        self.shape.hidden_dim
    }

    /// Checks all lengths that the kernels rely on.
    pub(super) fn check(
        &self,
        tokens: &[Lookup],
        sequences: &[Range<usize>],
        hidden: &[f32],
    ) -> Result<(), EncodeError> {
        let (width, wide) = (self.width(), self.wide);
        let holds =
            |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(EncodeError::Mismatch(what)) };
        holds(
            width > 0 && wide > 0 && self.shape.head_count > 0 && width.is_multiple_of(self.shape.head_count),
            "the encoder has impossible dimensions",
        )?;
        let norm = |norm: &NormWeights<'_>| norm.weight.len() == width && norm.bias.len() == width;
        let linear = |linear: &LinearWeights<'_>, inputs: usize, outputs: usize| {
            linear.inputs == inputs && linear.outputs == outputs && linear.fits(self.precision)
        };
        holds(norm(&self.embeddings.norm), "a layer norm's weights have the wrong length")?;
        for layer in &self.layers {
            holds(
                norm(&layer.attention_norm) && norm(&layer.output_norm),
                "a layer norm's weights have the wrong length",
            )?;
            holds(
                linear(&layer.qkv, width, 3 * width)
                    && linear(&layer.attention_output, width, width)
                    && linear(&layer.intermediate, width, wide)
                    && linear(&layer.output, wide, width),
                "a linear layer's weights have the wrong length",
            )?;
        }
        holds(hidden.len() == tokens.len() * width, "the hidden state has the wrong length")?;
        let mut end = 0;
        for sequence in sequences {
            holds(sequence.start == end && sequence.end > sequence.start, "sequences are not packed")?;
            end = sequence.end;
        }
        holds(end == tokens.len(), "sequences do not cover all tokens")?;
        let tables = [self.embeddings.words, self.embeddings.kinds, self.embeddings.positions];
        for token in tokens {
            let rows = [token.word, token.kind, token.position];
            let inside =
                rows.iter().zip(tables).all(|(row, table)| (*row as usize + 1) * width <= table.len());
            holds(inside, "a token, token type or position is not in the model")?;
        }
        Ok(())
    }
}

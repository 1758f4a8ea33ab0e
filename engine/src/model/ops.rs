//! The encoder's steps as candle operations that read their weights from the image and write in place.
//!
//! Each takes activations as candle tensors `[tokens, width]` (packed texts, no padding) and hands slices to the kernels.

use crate::config::Activation;
use crate::kernel::{
    AttentionShape, WeightSlice, activate_rows, add_bias_rows, add_norm_row, attention, embed_row, matmul,
    max_row, par_rows, scale_row, sum_row, unit_row,
};
use candle_core::{CpuStorage, Error, InplaceOp1, InplaceOp2, Layout, Result};
use shm_layout::image::Pooling;
use std::ops::Range;

/// The floats of a contiguous tensor.
fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) =
        layout.contiguous_offsets().ok_or_else(|| Error::Msg("tensor is not contiguous".into()))?;
    storage
        .as_slice::<f32>()?
        .get(start..end)
        .ok_or_else(|| Error::Msg("tensor lies outside its storage".into()))
}

/// The floats of a contiguous tensor, to write.
fn floats_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (start, end) =
        layout.contiguous_offsets().ok_or_else(|| Error::Msg("tensor is not contiguous".into()))?;
    match storage {
        CpuStorage::F32(values) => {
            values.get_mut(start..end).ok_or_else(|| Error::Msg("tensor lies outside its storage".into()))
        }
        _ => Err(Error::Msg("tensor is not f32".into())),
    }
}

fn check(holds: bool, what: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Msg(what.into())) }
}

/// Weight, bias and epsilon of a layer norm.
pub(crate) struct Norm {
    pub(crate) weight: WeightSlice,
    pub(crate) bias: WeightSlice,
    pub(crate) eps: f32,
}

impl Norm {
    /// The three for the kernels, both slices `width` long.
    fn parts(&self, width: usize) -> Result<(&[f32], &[f32], f32)> {
        let (weight, bias) = (self.weight.floats(), self.bias.floats());
        check(weight.len() == width && bias.len() == width, "a layer norm's weights have the wrong length")?;
        Ok((weight, bias, self.eps))
    }
}

/// Weights of the embedding layer.
pub(crate) struct Embeddings {
    pub(crate) words: WeightSlice,
    pub(crate) positions: WeightSlice,
    pub(crate) types: WeightSlice,
    pub(crate) norm: Norm,
}

/// One row of the embedding layer to look up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lookup {
    pub(crate) word: u32,
    pub(crate) kind: u32,
    pub(crate) position: u32,
}

/// `x[t] = norm(word + type + position)`.
pub(crate) struct Embed<'a> {
    pub(crate) weights: &'a Embeddings,
    pub(crate) tokens: &'a [Lookup],
    pub(crate) width: usize,
    pub(crate) threads: usize,
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let out = floats_mut(storage, layout)?;
        check(out.len() == self.tokens.len() * self.width, "embedding output has the wrong length")?;
        let norm = self.weights.norm.parts(self.width)?;
        let tables =
            [&self.weights.words, &self.weights.types, &self.weights.positions].map(WeightSlice::floats);
        let row = |table: &'static str, rows: &[f32], index: u32| match (index as usize + 1) * self.width
            <= rows.len()
        {
            true => Ok(()),
            false => Err(Error::Msg(format!("{table} {index} is not in the model"))),
        };
        for token in self.tokens {
            row("token id", tables[0], token.word)?;
            row("token type", tables[1], token.kind)?;
            row("position", tables[2], token.position)?;
        }
        par_rows(self.threads, out, self.width, |first, rows| {
            for (row, token) in rows.chunks_exact_mut(self.width).zip(&self.tokens[first..]) {
                let of = |table: &'_ [f32], index: u32| {
                    let start = index as usize * self.width;
                    start..(start + self.width).min(table.len())
                };
                embed_row(
                    row,
                    &tables[0][of(tables[0], token.word)],
                    &tables[1][of(tables[1], token.kind)],
                    &tables[2][of(tables[2], token.position)],
                    norm,
                );
            }
        });
        Ok(())
    }
}

/// What follows a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Epilogue {
    /// The bias is added.
    Bias,
    /// The bias is added and the activation applied.
    Activate(Activation),
    /// Nothing: [`AddNorm`] adds the bias.
    None,
}

/// A linear layer: `[inputs, outputs]` weights and a bias.
pub(crate) struct Linear {
    pub(crate) weight: WeightSlice,
    pub(crate) bias: WeightSlice,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
}

/// `out = epilogue(x · weight)`.
pub(crate) struct Apply<'a> {
    pub(crate) linear: &'a Linear,
    pub(crate) epilogue: Epilogue,
    pub(crate) threads: usize,
}

impl InplaceOp2 for Apply<'_> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let Linear { inputs, outputs, .. } = *self.linear;
        let out = floats_mut(out, out_layout)?;
        let x = floats(x, x_layout)?;
        let (weight, bias) = (self.linear.weight.floats(), self.linear.bias.floats());
        let rows = x.len() / inputs;
        check(
            x.len() == rows * inputs && out.len() == rows * outputs,
            "a linear layer's activations have the wrong length",
        )?;
        check(
            weight.len() == inputs * outputs && bias.len() == outputs,
            "a linear layer's weights have the wrong length",
        )?;
        matmul(self.threads, out, x, weight, inputs, outputs);
        match self.epilogue {
            Epilogue::None => {}
            Epilogue::Bias => par_rows(self.threads, out, outputs, |_, rows| add_bias_rows(rows, bias)),
            Epilogue::Activate(kind) => {
                par_rows(self.threads, out, outputs, |_, rows| activate_rows(rows, bias, kind))
            }
        }
        Ok(())
    }
}

/// `context = attention(qkv)` inside each sequence.
pub(crate) struct Attend<'a> {
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) shape: AttentionShape,
    pub(crate) threads: usize,
}

impl InplaceOp2 for Attend<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
    ) -> Result<()> {
        let out = floats_mut(out, out_layout)?;
        let qkv = floats(qkv, qkv_layout)?;
        let tokens = self.sequences.last().map_or(0, |last| last.end);
        check(
            out.len() == tokens * self.shape.hidden_dim && qkv.len() == 3 * out.len(),
            "attention has the wrong lengths",
        )?;
        attention(self.threads, out, qkv, self.sequences, self.shape);
        Ok(())
    }
}

/// `x = norm(x + (y + bias))`, the residual connection with the bias of the layer that made `y`.
pub(crate) struct AddNorm<'a> {
    pub(crate) bias: &'a WeightSlice,
    pub(crate) norm: &'a Norm,
    pub(crate) width: usize,
    pub(crate) threads: usize,
}

impl InplaceOp2 for AddNorm<'_> {
    fn name(&self) -> &'static str {
        "add-norm"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Result<()> {
        let width = self.width;
        let x = floats_mut(x, x_layout)?;
        let y = floats(y, y_layout)?;
        let norm = self.norm.parts(width)?;
        let bias = self.bias.floats();
        check(
            x.len() == y.len() && x.len().is_multiple_of(width) && bias.len() == width,
            "add-norm has the wrong lengths",
        )?;
        par_rows(self.threads, x, width, |first, rows| {
            for (row, added) in rows.chunks_exact_mut(width).zip(y[first * width..].chunks_exact(width)) {
                add_norm_row(row, added, bias, norm);
            }
        });
        Ok(())
    }
}

/// `out[s] = pooled tokens of sequence s`, modes side by side, normalised if wanted.
pub(crate) struct Pool<'a> {
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) modes: Pooling,
    pub(crate) normalize: bool,
    pub(crate) width: usize,
}

impl InplaceOp2 for Pool<'_> {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<()> {
        let width = self.width;
        let out_width = width * self.modes.count() as usize;
        let out = floats_mut(out, out_layout)?;
        let x = floats(x, x_layout)?;
        check(out.len() == self.sequences.len() * out_width, "pooling output has the wrong length")?;
        for (sequence, out) in self.sequences.iter().zip(out.chunks_exact_mut(out_width)) {
            let rows = x
                .get(sequence.start * width..sequence.end * width)
                .filter(|rows| !rows.is_empty())
                .ok_or_else(|| Error::Msg("a sequence lies outside its activations".into()))?;
            let modes = Pooling::ALL.into_iter().filter(|mode| self.modes.contains(*mode));
            for (mode, out) in modes.zip(out.chunks_exact_mut(width)) {
                out.copy_from_slice(&rows[..width]);
                let others = rows[width..].chunks_exact(width);
                let count = sequence.len() as f32;
                match mode {
                    Pooling::CLS => {}
                    Pooling::MAX => others.for_each(|row| max_row(out, row)),
                    Pooling::MEAN => {
                        others.for_each(|row| sum_row(out, row));
                        scale_row(out, 1.0 / count);
                    }
                    _ => {
                        others.for_each(|row| sum_row(out, row));
                        scale_row(out, 1.0 / count.sqrt());
                    }
                }
            }
            if self.normalize {
                unit_row(out);
            }
        }
        Ok(())
    }
}

//! The encoder and pooling as candle operations: the one reads its weights from the image, both write in place. Other modules
//! of a model compose with them as with any operation of candle.
//!
//! Activations are candle tensors `[tokens, width]` (packed texts, no padding), whose floats the kernels get as slices.

use crate::kernel::{Breaks, EncoderWeights, Lookup, encode, max_row, scale_row, sum_row};
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

/// `hidden = encoder(tokens)`, each sequence for itself.
pub(crate) struct Encode<'a> {
    pub(crate) weights: &'a EncoderWeights<'a>,
    pub(crate) tokens: &'a [Lookup],
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) threads: usize,
    pub(crate) breaks: Breaks<'a>,
}

impl InplaceOp1 for Encode<'_> {
    fn name(&self) -> &'static str {
        "encode"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let hidden = floats_mut(storage, layout)?;
        encode(self.threads, self.weights, self.tokens, self.sequences, hidden, self.breaks)
            .map_err(|error| Error::Msg(error.to_string()))
    }
}

/// `out[s] = pooled tokens of sequence s`, modes side by side.
pub(crate) struct Pool<'a> {
    pub(crate) sequences: &'a [Range<usize>],
    pub(crate) modes: Pooling,
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
                    Pooling::LAST => out.copy_from_slice(&rows[rows.len() - width..]),
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
        }
        Ok(())
    }
}

//! A generator's weights found in a checked image, and views of them for the kernels. No computing, no tokens.

use super::config::{GeneratorConfig, Rope};
use crate::blocks::BlockKind;
use crate::compile::table_precision;
use crate::kernel::{
    CrossWeights, Dense, Feed, Matrix, Mismatch, StackLayer, StackShape, StackWeights, WeightSlice, row_of,
};
use crate::model::ModelError;
use crate::packing::{Packing, Precision};
use shm_layout::image::{CheckedImage, DType, ImageBytes};
use std::sync::Arc;

/// A matrix in the image.
struct Weights {
    bytes: WeightSlice,
    scales: Option<WeightSlice>,
    sums: Option<WeightSlice>,
    /// `None` for panels.
    blocks: Option<BlockKind>,
    precision: Precision,
    inputs: usize,
    outputs: usize,
}

impl Weights {
    fn view(&self) -> Dense<'_> {
        let matrix = match self.blocks {
            Some(kind) => Matrix::Blocks { kind, bytes: self.bytes.bytes() },
            None => Matrix::Packed {
                precision: self.precision,
                panels: self.bytes.bytes(),
                scales: self.scales.as_ref().map_or(&[], WeightSlice::floats),
                sums: self.sums.as_ref().map_or(&[], WeightSlice::floats),
            },
        };
        Dense { matrix, inputs: self.inputs, outputs: self.outputs }
    }
}

struct Cross {
    norm: WeightSlice,
    query: Weights,
    keys: Vec<Weights>,
    output: Weights,
}

struct Layer {
    norm: WeightSlice,
    qkv: Vec<Weights>,
    head_norms: Option<(WeightSlice, WeightSlice)>,
    output: Weights,
    cross: Option<Cross>,
    wide_norm: WeightSlice,
    up: Vec<Weights>,
    down: Weights,
}

/// A stack of layers with what is before and behind it.
pub(super) struct Stack {
    pub(super) shape: StackShape,
    layers: Vec<Layer>,
    final_norm: WeightSlice,
    /// T5: added to scores by bucket of distance, `[buckets, heads]`.
    distance_bias: Option<WeightSlice>,
    is_bidirectional: bool,
}

impl Stack {
    pub(super) fn layer_count(&self) -> usize {
        self.layers.len()
    }

    pub(super) fn final_norm(&self) -> &[f32] {
        self.final_norm.floats()
    }

    pub(super) fn weights(&self) -> StackWeights<'_> {
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            layers.push(StackLayer {
                norm: layer.norm.floats(),
                qkv: layer.qkv.iter().map(Weights::view).collect(),
                head_norms: layer.head_norms.as_ref().map(|(query, key)| (query.floats(), key.floats())),
                output: layer.output.view(),
                cross: layer.cross.as_ref().map(|cross| CrossWeights {
                    norm: cross.norm.floats(),
                    query: cross.query.view(),
                    output: cross.output.view(),
                }),
                wide_norm: layer.wide_norm.floats(),
                up: layer.up.iter().map(Weights::view).collect(),
                down: layer.down.view(),
            });
        }
        StackWeights { shape: self.shape, layers }
    }

    /// Matrices that make keys and values of a layer from what an encoder gave.
    pub(super) fn cross_keys(&self, layer: usize) -> Option<Vec<Dense<'_>>> {
        let cross = self.layers.get(layer)?.cross.as_ref()?;
        Some(cross.keys.iter().map(Weights::view).collect())
    }

    /// What is added to scores for distances `key − query` of `−before ..= after`, `[heads, before + 1 + after]`; the bucket
    /// of a distance is that of T5 (`_relative_position_bucket` of transformers).
    pub(super) fn bias_of_distances(
        &self,
        t5: super::config::T5Parts,
        before: usize,
        after: usize,
    ) -> Option<Vec<f32>> {
        let table = self.distance_bias.as_ref()?.floats();
        let (heads, span) = (self.shape.heads, before + 1 + after);
        let mut values = vec![0.0; heads * span];
        for index in 0..span {
            let distance = index as i64 - before as i64;
            let bucket = bucket(distance, self.is_bidirectional, t5.buckets, t5.max_distance);
            for head in 0..heads {
                values[head * span + index] = table.get(bucket * heads + head).copied().unwrap_or(0.0);
            }
        }
        Some(values)
    }
}

/// T5's bucket of a distance (key less query).
fn bucket(distance: i64, is_bidirectional: bool, buckets: usize, max_distance: usize) -> usize {
    let (first, buckets, distance) = if is_bidirectional {
        let half = buckets / 2;
        (if distance > 0 { half } else { 0 }, half, distance.unsigned_abs() as usize)
    } else {
        (0, buckets, (-distance).max(0) as usize)
    };
    let exact = buckets / 2;
    if distance < exact {
        return first + distance;
    }
    // In single precision, as torch computes it.
    let share = (distance as f32 / exact as f32).ln() / (max_distance as f64 / exact as f64).ln() as f32;
    let large = exact + (share * (buckets - exact) as f32) as usize;
    first + large.min(buckets - 1)
}

/// A generator whose weights lie in an image.
pub(super) struct Network {
    pub(super) config: GeneratorConfig,
    embeddings: Weights,
    /// `None`: the embeddings.
    output: Option<Weights>,
    pub(super) encoder: Option<Stack>,
    pub(super) decoder: Stack,
    /// Of each pair of a head: radians per position.
    frequencies: Vec<f32>,
}

impl Network {
    /// Finds all weights in `image`, which views `bytes`.
    pub(super) fn new(
        bytes: &Arc<dyn ImageBytes>,
        image: &CheckedImage<'_>,
        config: GeneratorConfig,
        precision: Precision,
    ) -> Result<Network, ModelError> {
        let finder = Finder { bytes, image, precision };
        let table = table_precision(precision);
        let (width, vocab) = (config.width, config.vocab_size);
        let embeddings = finder.matrix("embeddings", width, vocab, table)?;
        let output = match finder.has("output") {
            true => Some(finder.matrix("output", width, vocab, table)?),
            false => None,
        };
        let shape = StackShape {
            width,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            wide: config.wide,
            eps: config.eps,
            scale: if config.t5.is_some() { 1.0 } else { 1.0 / (config.head_dim as f32).sqrt() },
            feed: config.feed,
            precision,
            rotates_neighbours: config.rope.as_ref().is_some_and(|rope| rope.neighbours),
            keeps_layers: true,
        };
        let encoder = match config.t5 {
            None => None,
            Some(t5) => {
                let shape = StackShape { keeps_layers: false, ..shape };
                Some(finder.stack("encoder.", t5.encoder_layers, shape, &config, true)?)
            }
        };
        let prefix = if config.t5.is_some() { "decoder." } else { "" };
        let decoder = finder.stack(prefix, config.layers, shape, &config, false)?;
        let frequencies =
            config.rope.as_ref().map_or_else(Vec::new, |rope| frequencies(rope, config.head_dim));
        Ok(Network { config, embeddings, output, encoder, decoder, frequencies })
    }

    /// The matrix that makes logits.
    pub(super) fn output(&self) -> Dense<'_> {
        self.output.as_ref().unwrap_or(&self.embeddings).view()
    }

    /// Adds the embedding of a token to `out`.
    pub(super) fn embed(&self, id: u32, out: &mut Vec<f32>) -> Result<(), Mismatch> {
        let start = out.len();
        out.resize(start + self.config.width, 0.0);
        row_of(&self.embeddings.view(), id as usize, &mut out[start..])
    }

    /// Cosines, then sines of a position's angles, added to `out`; nothing where nothing is rotated.
    pub(super) fn angles(&self, position: usize, out: &mut Vec<f32>) {
        out.extend(self.frequencies.iter().map(|frequency| (position as f32 * frequency).cos()));
        out.extend(self.frequencies.iter().map(|frequency| (position as f32 * frequency).sin()));
    }
}

/// Radians per position of each pair, with Llama 3's stretching (transformers' `_compute_llama3_parameters`).
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let plain = (0..head_dim / 2).map(|pair| {
        let exponent = (2 * pair) as f32 / head_dim as f32;
        1.0 / (rope.theta as f32).powf(exponent) / rope.factors.get(pair).copied().unwrap_or(1.0)
    });
    let Some(scaled) = rope.llama3 else { return plain.collect() };
    plain
        .map(|frequency| {
            let frequency = f64::from(frequency);
            let length = std::f64::consts::TAU / frequency;
            let stretched = if length < scaled.original_tokens / scaled.high {
                frequency
            } else if length > scaled.original_tokens / scaled.low {
                frequency / scaled.factor
            } else {
                let smooth = (scaled.original_tokens / length - scaled.low) / (scaled.high - scaled.low);
                (1.0 - smooth) * frequency / scaled.factor + smooth * frequency
            };
            stretched as f32
        })
        .collect()
}

/// Finds tensors and checks their shapes.
struct Finder<'a> {
    bytes: &'a Arc<dyn ImageBytes>,
    image: &'a CheckedImage<'a>,
    precision: Precision,
}

impl Finder<'_> {
    /// Whether there is a matrix of this name.
    fn has(&self, name: &str) -> bool {
        self.image.tensor(&format!("{name}.weight")).is_some()
            || BlockKind::ALL
                .iter()
                .any(|kind| self.image.tensor(&format!("{name}.{}", kind.name())).is_some())
    }

    fn tensor(&self, name: &str, dtype: DType, shape: &[u64]) -> Result<WeightSlice, ModelError> {
        let inconsistent = |what: String| ModelError::Inconsistent { what };
        let view =
            self.image.tensor(name).ok_or_else(|| inconsistent(format!("tensor {name:?} is missing")))?;
        if view.shape() != shape || view.dtype != dtype {
            let found = view.shape();
            return Err(inconsistent(format!(
                "tensor {name:?} has shape {found:?} of {:?} instead of {shape:?} of {dtype:?}",
                view.dtype
            )));
        }
        Ok(WeightSlice::new(self.bytes, &view))
    }

    fn floats(&self, name: &str, shape: &[usize]) -> Result<WeightSlice, ModelError> {
        let shape: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
        self.tensor(name, DType::F32, &shape)
    }

    fn matrix(
        &self,
        name: &str,
        inputs: usize,
        outputs: usize,
        precision: Precision,
    ) -> Result<Weights, ModelError> {
        let found = BlockKind::ALL.into_iter().find_map(|kind| {
            let name = format!("{name}.{}", kind.name());
            self.image.tensor(&name).map(|_| (kind, name))
        });
        if let Some((kind, name)) = found {
            let row_bytes = kind.row_bytes(inputs).unwrap_or(0) as u64;
            let bytes = self.tensor(&name, DType::Blocks, &[outputs as u64, row_bytes])?;
            return Ok(Weights {
                bytes,
                scales: None,
                sums: None,
                blocks: Some(kind),
                precision,
                inputs,
                outputs,
            });
        }
        let per_output = |part: &str| match precision {
            Precision::Int8 => self.floats(&format!("{name}.{part}"), &[outputs]).map(Some),
            _ => Ok(None),
        };
        let shape = precision.matrix_shape(inputs as u64, outputs as u64);
        Ok(Weights {
            bytes: self.tensor(&format!("{name}.weight"), precision.dtype(), &shape)?,
            scales: per_output("scales")?,
            sums: per_output("sums")?,
            blocks: None,
            precision,
            inputs,
            outputs,
        })
    }

    /// Matrices that read the same input: one of all outputs, or one each.
    fn matrices(
        &self,
        name: &str,
        inputs: usize,
        parts: &[(&str, usize)],
    ) -> Result<Vec<Weights>, ModelError> {
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        if parts.len() == 1 || self.has(name) {
            return Ok(vec![self.matrix(name, inputs, outputs, self.precision)?]);
        }
        let each = parts
            .iter()
            .map(|(part, outputs)| self.matrix(&format!("{name}.{part}"), inputs, *outputs, self.precision));
        each.collect()
    }

    fn stack(
        &self,
        prefix: &str,
        layers: usize,
        shape: StackShape,
        config: &GeneratorConfig,
        is_encoder: bool,
    ) -> Result<Stack, ModelError> {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let layer = |index: usize| -> Result<Layer, ModelError> {
            let name = |part: &str| format!("{prefix}layer.{index}.{part}");
            let qkv = [("q", queries), ("k", keys), ("v", keys)];
            let up: &[(&str, usize)] = match shape.feed {
                Feed::Relu => &[("up", shape.wide)],
                Feed::GatedGelu | Feed::GatedSilu => &[("gate", shape.wide), ("up", shape.wide)],
            };
            let cross = if config.t5.is_some() && !is_encoder {
                Some(Cross {
                    norm: self.floats(&name("cross.norm"), &[shape.width])?,
                    query: self.matrix(&name("cross.q"), shape.width, queries, self.precision)?,
                    keys: self.matrices(&name("cross.kv"), shape.width, &[("k", keys), ("v", keys)])?,
                    output: self.matrix(&name("cross.output"), queries, shape.width, self.precision)?,
                })
            } else {
                None
            };
            let head_norms = if config.has_head_norms {
                let norm = |part: &str| self.floats(&name(part), &[shape.head_dim]);
                Some((norm("q_norm")?, norm("k_norm")?))
            } else {
                None
            };
            Ok(Layer {
                norm: self.floats(&name("norm"), &[shape.width])?,
                qkv: self.matrices(&name("qkv"), shape.width, &qkv)?,
                head_norms,
                output: self.matrix(&name("output"), queries, shape.width, self.precision)?,
                cross,
                wide_norm: self.floats(&name("wide_norm"), &[shape.width])?,
                up: self.matrices(&name("up"), shape.width, up)?,
                down: self.matrix(&name("down"), shape.wide, shape.width, self.precision)?,
            })
        };
        let distance_bias = match config.t5 {
            Some(t5) => Some(self.floats(&format!("{prefix}bias"), &[t5.buckets, shape.heads])?),
            None => None,
        };
        Ok(Stack {
            shape,
            layers: (0..layers).map(layer).collect::<Result<_, _>>()?,
            final_norm: self.floats(&format!("{prefix}norm"), &[shape.width])?,
            distance_bias,
            is_bidirectional: is_encoder,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_t5() {
        // From transformers' T5Attention._relative_position_bucket(distance, bidirectional, 32, 128).
        for (distance, both, one) in [
            (-200, 15, 31),
            (-127, 15, 31),
            (-64, 14, 26),
            (-20, 10, 17),
            (-16, 10, 16),
            (-8, 8, 8),
            (-7, 7, 7),
            (0, 0, 0),
            (1, 17, 0),
            (9, 24, 0),
            (40, 28, 0),
            (500, 31, 0),
        ] {
            assert_eq!(bucket(distance, true, 32, 128), both, "{distance}");
            assert_eq!(bucket(distance, false, 32, 128), one, "{distance}");
        }
    }
}

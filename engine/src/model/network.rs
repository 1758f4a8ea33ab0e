//! The encoder: weights found in a checked image, and the forward pass over packed texts. No tokenization, no batching policy.

use super::ModelError;
use super::ops::{Encode, Pool};
use crate::compile::head_name;
use crate::config::{EncoderConfig, HeadActivation, MAX_HEAD_LAYERS, NormKind};
use crate::kernel::{
    AttentionShape, Breaks, EmbeddingWeights, EncoderWeights, HeadLayer, LayerWeights, LinearWeights, Lookup,
    NormWeights, Reach, RotaryTables, WeightSlice, apply_head, unit_row,
};
use crate::packing::{Packing, Precision};
use candle_core::{Device, Tensor};
use shm_layout::image::{CheckedImage, DType, Family, ImageBytes, Pooling};
use std::ops::Range;
use std::sync::Arc;

/// Weight of a norm, and bias of one that has it.
struct Norm {
    weight: WeightSlice,
    bias: Option<WeightSlice>,
}

/// A linear layer: packed panels, bias, and in int8 scales and sums of its outputs.
struct Linear {
    panels: WeightSlice,
    bias: WeightSlice,
    scales: Option<WeightSlice>,
    sums: Option<WeightSlice>,
    inputs: usize,
    outputs: usize,
}

struct Layer {
    qkv: Linear,
    head_norms: Option<[WeightSlice; 2]>,
    attention_output: Linear,
    attention_norm: Option<Norm>,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
}

struct Embeddings {
    words: WeightSlice,
    kinds: Option<WeightSlice>,
    positions: Option<WeightSlice>,
    norm: Option<Norm>,
}

/// Cosines and sines.
struct Rotary {
    cos: WeightSlice,
    sin: WeightSlice,
}

/// A layer behind the pooling.
struct Head {
    linear: Linear,
    activation: HeadActivation,
    norm: Option<Norm>,
}

/// An encoder whose weights lie in an image.
pub(crate) struct Network {
    config: EncoderConfig,
    precision: Precision,
    embeddings: Embeddings,
    /// For layers that see the whole text, and for those with a window.
    rotary: [Option<Rotary>; 2],
    distance_bias: Option<WeightSlice>,
    layers: Vec<Layer>,
    final_norm: Option<Norm>,
    heads: Vec<Head>,
}

/// Finds tensors and checks their shapes.
struct Finder<'a> {
    bytes: &'a Arc<dyn ImageBytes>,
    image: &'a CheckedImage<'a>,
    precision: Precision,
}

impl Finder<'_> {
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

    fn linear(
        &self,
        name: &str,
        precision: Precision,
        inputs: usize,
        outputs: usize,
    ) -> Result<Linear, ModelError> {
        let per_output = |part: &str| match precision {
            Precision::Int8 => self.floats(&format!("{name}.{part}"), &[outputs]).map(Some),
            _ => Ok(None),
        };
        let shape = precision.matrix_shape(inputs as u64, outputs as u64);
        Ok(Linear {
            panels: self.tensor(&format!("{name}.weight"), precision.dtype(), &shape)?,
            bias: self.floats(&format!("{name}.bias"), &[outputs])?,
            scales: per_output("scales")?,
            sums: per_output("sums")?,
            inputs,
            outputs,
        })
    }

    fn norm(&self, name: &str, config: &EncoderConfig) -> Result<Norm, ModelError> {
        let width = config.hidden_dim;
        let bias = match config.norm {
            NormKind::Layer => Some(self.floats(&format!("{name}.bias"), &[width])?),
            NormKind::Rms => None,
        };
        Ok(Norm { weight: self.floats(&format!("{name}.weight"), &[width])?, bias })
    }

    fn layer(&self, index: usize, config: &EncoderConfig) -> Result<Layer, ModelError> {
        let (width, wide) = (config.hidden_dim, config.intermediate_dim);
        let name = |part: &str| format!("layer.{index}.{part}");
        let linear = |part: &str, inputs: usize, outputs: usize| {
            self.linear(&name(part), self.precision, inputs, outputs)
        };
        let head_norm = |part: &str| self.floats(&name(part), &[config.head_dim]);
        let has_norm = index > 0 || config.has_first_norm;
        Ok(Layer {
            qkv: linear("attention.qkv", width, config.qkv_dim())?,
            head_norms: match config.has_head_norms {
                true => Some([head_norm("attention.q_norm")?, head_norm("attention.k_norm")?]),
                false => None,
            },
            attention_output: linear("attention.output", config.context_dim(), width)?,
            attention_norm: has_norm.then(|| self.norm(&name("attention.norm"), config)).transpose()?,
            intermediate: linear("intermediate", width, if config.is_gated { 2 * wide } else { wide })?,
            output: linear("output", wide, width)?,
            output_norm: self.norm(&name("output.norm"), config)?,
        })
    }

    fn rotary(&self, kind: &str, config: &EncoderConfig) -> Result<Rotary, ModelError> {
        let rows = self.image.header().values().max_seq_tokens as usize;
        let table =
            |function: &str| self.floats(&format!("rotary.{kind}.{function}"), &[rows, config.head_dim / 2]);
        Ok(Rotary { cos: table("cos")?, sin: table("sin")? })
    }

    /// The layers behind the pooling that the image has, each reading what the one before it gives.
    fn heads(&self, config: &EncoderConfig) -> Result<Vec<Head>, ModelError> {
        let header = self.image.header().values();
        let mut inputs = config.hidden_dim * header.pooling.count() as usize;
        let mut heads = Vec::new();
        for index in 0..MAX_HEAD_LAYERS {
            let present = HeadActivation::ALL.into_iter().find_map(|activation| {
                let name = head_name(index, activation);
                let bias = self.image.tensor(&format!("{name}.bias"))?;
                Some((name, activation, bias.shape().first().copied().unwrap_or(0) as usize))
            });
            let Some((name, activation, outputs)) = present else { break };
            let has_norm = self.image.tensor(&format!("{name}.norm.weight")).is_some();
            heads.push(Head {
                linear: self.linear(&name, Precision::F32, inputs, outputs)?,
                activation,
                norm: has_norm.then(|| self.norm(&format!("{name}.norm"), config)).transpose()?,
            });
            inputs = outputs;
        }
        if inputs != header.output_dim as usize {
            return Err(ModelError::Inconsistent {
                what: format!("its layers give {inputs} numbers, the header says {}", header.output_dim),
            });
        }
        Ok(heads)
    }
}

/// A packed batch: tokens of all texts one behind the other.
pub(crate) struct Packed {
    pub(crate) tokens: Vec<Lookup>,
    pub(crate) sequences: Vec<Range<usize>>,
}

/// The floats of a table, if there is one.
fn floats_of(table: &Option<WeightSlice>) -> &[f32] {
    table.as_ref().map_or(&[], WeightSlice::floats)
}

fn compute(error: candle_core::Error) -> ModelError {
    ModelError::Compute { reason: error.to_string() }
}

impl Network {
    /// Finds all weights of the encoder in `image`, which views `bytes`.
    pub(crate) fn new(
        bytes: &Arc<dyn ImageBytes>,
        image: &CheckedImage<'_>,
        config: EncoderConfig,
    ) -> Result<Self, ModelError> {
        let precision = image.header().values().precision;
        let finder = Finder { bytes, image, precision };
        let width = config.hidden_dim;
        let table = |name: &str, rows: usize| {
            (rows > 0).then(|| finder.floats(&format!("embeddings.{name}"), &[rows, width])).transpose()
        };
        let has_norm = config.has_embedding_norm;
        let embeddings = Embeddings {
            words: finder.floats("embeddings.word_embeddings", &[config.vocab_size, width])?,
            positions: table("position_embeddings", config.position_count)?,
            kinds: table("token_type_embeddings", config.type_count)?,
            norm: has_norm.then(|| finder.norm("embeddings.norm", &config)).transpose()?,
        };
        let has_windows = config.windows.contains(&true);
        let rotary = [("whole", config.rotary.is_some()), ("window", config.rotary.is_some() && has_windows)];
        let [whole, window] =
            rotary.map(|(kind, present)| present.then(|| finder.rotary(kind, &config)).transpose());
        let positions = image.header().values().max_seq_tokens as usize;
        let has_bias = config.relative_buckets > 0;
        let bias_shape = [config.head_count, (2 * positions).saturating_sub(1)];
        let layers =
            (0..config.layer_count).map(|index| finder.layer(index, &config)).collect::<Result<_, _>>()?;
        Ok(Network {
            precision,
            embeddings,
            rotary: [whole?, window?],
            distance_bias: has_bias.then(|| finder.floats("distance_bias", &bias_shape)).transpose()?,
            layers,
            final_norm: config.is_pre_norm.then(|| finder.norm("final_norm", &config)).transpose()?,
            heads: finder.heads(&config)?,
            config,
        })
    }

    /// The encoder's numbers.
    pub(crate) fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The weights where they lie.
    fn weights(&self) -> EncoderWeights<'_> {
        let config = &self.config;
        EncoderWeights {
            precision: self.precision,
            width: config.hidden_dim,
            shape: AttentionShape {
                head_count: config.head_count,
                kv_head_count: config.kv_head_count,
                head_dim: config.head_dim,
            },
            wide: config.intermediate_dim,
            activation: config.activation,
            is_gated: config.is_gated,
            is_pre_norm: config.is_pre_norm,
            embeddings: EmbeddingWeights {
                words: self.embeddings.words.floats(),
                kinds: floats_of(&self.embeddings.kinds),
                positions: floats_of(&self.embeddings.positions),
                norm: self.embeddings.norm.as_ref().map(|norm| self.norm(norm)),
            },
            distance_bias: floats_of(&self.distance_bias),
            layers: self
                .layers
                .iter()
                .zip(&config.windows)
                .map(|(layer, window)| self.layer(layer, *window))
                .collect(),
            final_norm: self.final_norm.as_ref().map(|norm| self.norm(norm)),
        }
    }

    fn layer<'a>(&'a self, layer: &'a Layer, has_window: bool) -> LayerWeights<'a> {
        let rotary = self.rotary[usize::from(has_window)].as_ref();
        let mut reach = Reach::ALL;
        if has_window {
            reach = Reach { before: self.config.window_reach, after: self.config.window_reach };
        }
        if self.config.is_causal {
            reach.after = 0;
        }
        LayerWeights {
            qkv: layer.qkv.weights(),
            head_norms: layer
                .head_norms
                .as_ref()
                .map(|norms| norms.each_ref().map(|weight| self.rms(weight))),
            rotary: rotary.map(|Rotary { cos, sin }| RotaryTables { cos: cos.floats(), sin: sin.floats() }),
            reach,
            attention_output: layer.attention_output.weights(),
            attention_norm: layer.attention_norm.as_ref().map(|norm| self.norm(norm)),
            intermediate: layer.intermediate.weights(),
            output: layer.output.weights(),
            output_norm: self.norm(&layer.output_norm),
        }
    }

    fn norm<'a>(&self, norm: &'a Norm) -> NormWeights<'a> {
        NormWeights {
            kind: self.config.norm,
            weight: norm.weight.floats(),
            bias: norm.bias.as_ref().map_or(&[], WeightSlice::floats),
            eps: self.config.layer_norm_eps,
        }
    }

    fn rms<'a>(&self, weight: &'a WeightSlice) -> NormWeights<'a> {
        let eps = self.config.layer_norm_eps;
        NormWeights { kind: NormKind::Rms, weight: weight.floats(), bias: &[], eps }
    }

    /// Positions of a text's tokens: counted from the first, except that RoBERTa and MPNet give padding ids no position of their own.
    pub(crate) fn positions(&self, ids: &[u32]) -> Vec<u32> {
        let pad = self.config.pad_token_id;
        let mut next = self.config.first_position() as u32;
        let mut take = |id: u32| match self.config.family {
            Family::Roberta | Family::Mpnet if id == pad => pad,
            _ => {
                next += 1;
                next - 1
            }
        };
        ids.iter().map(|id| take(*id)).collect()
    }

    /// Vectors, or scores, of the packed texts, one behind the other.
    pub(crate) fn forward(
        &self,
        batch: &Packed,
        threads: usize,
        (modes, normalize): (Pooling, bool),
        breaks: Breaks<'_>,
    ) -> Result<Vec<f32>, ModelError> {
        let width = self.config.hidden_dim;
        let sequences = batch.sequences.as_slice();
        let weights = self.weights();
        let run = || {
            let zeros = |rows: usize, columns: usize| {
                Tensor::zeros((rows, columns), candle_core::DType::F32, &Device::Cpu)
            };
            let hidden = zeros(batch.tokens.len(), width)?;
            hidden.inplace_op1(&Encode {
                weights: &weights,
                tokens: &batch.tokens,
                sequences,
                threads,
                breaks,
            })?;
            let out = zeros(sequences.len(), width * modes.count() as usize)?;
            out.inplace_op2(&hidden, &Pool { sequences, modes, width })?;
            out.flatten_all()?.to_vec1()
        };
        let mut rows: Vec<f32> = run().map_err(compute)?;
        for head in &self.heads {
            let norm = head.norm.as_ref().map(|norm| self.norm(norm));
            let layer = HeadLayer { linear: head.linear.weights(), activation: head.activation, norm };
            rows = apply_head(&layer, &rows).ok_or_else(|| ModelError::Compute {
                reason: "a layer behind the pooling does not fit what is before it".into(),
            })?;
        }
        if normalize {
            let dim = rows.len() / sequences.len().max(1);
            rows.chunks_exact_mut(dim.max(1)).for_each(unit_row);
        }
        Ok(rows)
    }
}

impl Linear {
    fn weights(&self) -> LinearWeights<'_> {
        LinearWeights {
            panels: self.panels.bytes(),
            bias: self.bias.floats(),
            scales: self.scales.as_ref().map_or(&[], WeightSlice::floats),
            sums: self.sums.as_ref().map_or(&[], WeightSlice::floats),
            inputs: self.inputs,
            outputs: self.outputs,
        }
    }
}

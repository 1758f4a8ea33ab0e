//! The encoder: weights found in a checked image, and the forward pass over packed texts. No tokenization, no batching policy.

use super::ModelError;
use super::ops::{Encode, Pool};
use crate::config::EncoderConfig;
use crate::kernel::{
    AttentionShape, Breaks, EmbeddingWeights, EncoderWeights, LayerWeights, LinearWeights, Lookup,
    NormWeights, WeightSlice,
};
use crate::packing::{Packing, Precision};
use candle_core::{Device, Tensor};
use shm_layout::image::{CheckedImage, DType, Family, ImageBytes, Pooling};
use std::ops::Range;
use std::sync::Arc;

/// Weight and bias of a layer norm.
struct Norm {
    weight: WeightSlice,
    bias: WeightSlice,
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
    attention_output: Linear,
    attention_norm: Norm,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
}

struct Embeddings {
    words: WeightSlice,
    kinds: WeightSlice,
    positions: WeightSlice,
    norm: Norm,
}

/// An encoder whose weights lie in an image.
pub(crate) struct Network {
    config: EncoderConfig,
    precision: Precision,
    embeddings: Embeddings,
    layers: Vec<Layer>,
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

    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, ModelError> {
        let per_output = |part: &str| match self.precision {
            Precision::Int8 => self.floats(&format!("{name}.{part}"), &[outputs]).map(Some),
            _ => Ok(None),
        };
        let shape = self.precision.matrix_shape(inputs as u64, outputs as u64);
        Ok(Linear {
            panels: self.tensor(&format!("{name}.weight"), self.precision.dtype(), &shape)?,
            bias: self.floats(&format!("{name}.bias"), &[outputs])?,
            scales: per_output("scales")?,
            sums: per_output("sums")?,
            inputs,
            outputs,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, ModelError> {
        Ok(Norm {
            weight: self.floats(&format!("{name}.weight"), &[width])?,
            bias: self.floats(&format!("{name}.bias"), &[width])?,
        })
    }

    fn layer(&self, index: usize, config: &EncoderConfig) -> Result<Layer, ModelError> {
        let (width, wide) = (config.hidden_dim, config.intermediate_dim);
        let name = |part: &str| format!("layer.{index}.{part}");
        Ok(Layer {
            qkv: self.linear(&name("attention.qkv"), width, 3 * width)?,
            attention_output: self.linear(&name("attention.output"), width, width)?,
            attention_norm: self.norm(&name("attention.norm"), width)?,
            intermediate: self.linear(&name("intermediate"), width, wide)?,
            output: self.linear(&name("output"), wide, width)?,
            output_norm: self.norm(&name("output.norm"), width)?,
        })
    }
}

/// A packed batch: tokens of all texts one behind the other.
pub(crate) struct Packed {
    pub(crate) tokens: Vec<Lookup>,
    pub(crate) sequences: Vec<Range<usize>>,
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
        let embeddings = Embeddings {
            words: finder.floats("embeddings.word_embeddings", &[config.vocab_size, width])?,
            positions: finder.floats("embeddings.position_embeddings", &[config.position_count, width])?,
            kinds: finder.floats("embeddings.token_type_embeddings", &[config.type_count, width])?,
            norm: finder.norm("embeddings.norm", width)?,
        };
        let layers =
            (0..config.layer_count).map(|index| finder.layer(index, &config)).collect::<Result<_, _>>()?;
        Ok(Network { config, precision, embeddings, layers })
    }

    /// The encoder's numbers.
    pub(crate) fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// The weights where they lie.
    fn weights(&self) -> EncoderWeights<'_> {
        EncoderWeights {
            precision: self.precision,
            shape: AttentionShape { hidden_dim: self.config.hidden_dim, head_count: self.config.head_count },
            wide: self.config.intermediate_dim,
            activation: self.config.activation,
            embeddings: EmbeddingWeights {
                words: self.embeddings.words.floats(),
                kinds: self.embeddings.kinds.floats(),
                positions: self.embeddings.positions.floats(),
                norm: self.norm(&self.embeddings.norm),
            },
            layers: self.layers.iter().map(|layer| self.layer(layer)).collect(),
        }
    }

    fn layer<'a>(&'a self, layer: &'a Layer) -> LayerWeights<'a> {
        LayerWeights {
            qkv: layer.qkv.weights(),
            attention_output: layer.attention_output.weights(),
            attention_norm: self.norm(&layer.attention_norm),
            intermediate: layer.intermediate.weights(),
            output: layer.output.weights(),
            output_norm: self.norm(&layer.output_norm),
        }
    }

    fn norm<'a>(&self, norm: &'a Norm) -> NormWeights<'a> {
        NormWeights {
            weight: norm.weight.floats(),
            bias: norm.bias.floats(),
            eps: self.config.layer_norm_eps,
        }
    }

    /// Positions of a text's tokens: counted from the first, except that RoBERTa gives padding ids no position of their own.
    pub(crate) fn positions(&self, ids: &[u32]) -> Vec<u32> {
        let pad = self.config.pad_token_id;
        let mut next = self.config.first_position() as u32;
        let mut take = |id: u32| match self.config.family {
            Family::Roberta if id == pad => pad,
            _ => {
                next += 1;
                next - 1
            }
        };
        ids.iter().map(|id| take(*id)).collect()
    }

    /// Vectors of the packed texts, one behind the other.
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
            out.inplace_op2(&hidden, &Pool { sequences, modes, normalize, width })?;
            out.flatten_all()?.to_vec1()
        };
        run().map_err(compute)
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

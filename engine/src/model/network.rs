//! The encoder: weights found in a checked image, and the forward pass over packed texts. No tokenization, no batching policy.

use super::ModelError;
use super::ops::{AddNorm, Apply, Attend, Embed, Embeddings, Epilogue, Linear, Lookup, Norm, Pool};
use crate::config::EncoderConfig;
use crate::kernel::{AttentionShape, WeightSlice};
use candle_core::{DType, Device, Tensor};
use shm_layout::image::{CheckedImage, Family, ImageBytes, Pooling};
use std::ops::Range;
use std::sync::Arc;

struct Layer {
    qkv: Linear,
    attention_output: Linear,
    attention_norm: Norm,
    intermediate: Linear,
    output: Linear,
    output_norm: Norm,
}

/// An encoder whose weights lie in an image.
pub(crate) struct Network {
    config: EncoderConfig,
    embeddings: Embeddings,
    layers: Vec<Layer>,
}

/// Finds tensors and checks their shapes.
struct Finder<'a> {
    bytes: &'a Arc<dyn ImageBytes>,
    image: &'a CheckedImage<'a>,
    eps: f32,
}

impl Finder<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<WeightSlice, ModelError> {
        let inconsistent = |what: String| ModelError::Inconsistent { what };
        let view =
            self.image.tensor(name).ok_or_else(|| inconsistent(format!("tensor {name:?} is missing")))?;
        if !view.shape().iter().copied().eq(shape.iter().map(|size| *size as u64)) {
            let found = view.shape();
            return Err(inconsistent(format!("tensor {name:?} has shape {found:?} instead of {shape:?}")));
        }
        Ok(WeightSlice::new(self.bytes, &view))
    }

    fn linear(&self, name: &str, inputs: usize, outputs: usize) -> Result<Linear, ModelError> {
        Ok(Linear {
            weight: self.tensor(&format!("{name}.weight"), &[inputs, outputs])?,
            bias: self.tensor(&format!("{name}.bias"), &[outputs])?,
            inputs,
            outputs,
        })
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, ModelError> {
        Ok(Norm {
            weight: self.tensor(&format!("{name}.weight"), &[width])?,
            bias: self.tensor(&format!("{name}.bias"), &[width])?,
            eps: self.eps,
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

/// Memory for activations, kept between calls: fresh memory for every step costs more than some of the steps.
pub(crate) struct Workspace {
    tokens: usize,
    x: Tensor,
    y: Tensor,
    context: Tensor,
    qkv: Tensor,
    intermediate: Tensor,
}

impl Workspace {
    /// Longest packed batch, tokens.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
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
        let finder = Finder { bytes, image, eps: config.layer_norm_eps };
        let width = config.hidden_dim;
        let embeddings = Embeddings {
            words: finder.tensor("embeddings.word_embeddings", &[config.vocab_size, width])?,
            positions: finder.tensor("embeddings.position_embeddings", &[config.position_count, width])?,
            types: finder.tensor("embeddings.token_type_embeddings", &[config.type_count, width])?,
            norm: finder.norm("embeddings.norm", width)?,
        };
        let layers =
            (0..config.layer_count).map(|index| finder.layer(index, &config)).collect::<Result<_, _>>()?;
        Ok(Network { config, embeddings, layers })
    }

    /// The encoder's numbers.
    pub(crate) fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Memory for batches of up to `tokens` tokens.
    pub(crate) fn workspace(&self, tokens: usize) -> Result<Workspace, ModelError> {
        let (width, wide) = (self.config.hidden_dim, self.config.intermediate_dim);
        let zeros =
            |columns: usize| Tensor::zeros((tokens, columns), DType::F32, &Device::Cpu).map_err(compute);
        Ok(Workspace {
            tokens,
            x: zeros(width)?,
            y: zeros(width)?,
            context: zeros(width)?,
            qkv: zeros(3 * width)?,
            intermediate: zeros(wide)?,
        })
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
        space: &Workspace,
        threads: usize,
        pooling: (Pooling, bool),
    ) -> Result<Vec<f32>, ModelError> {
        let tokens = batch.tokens.len();
        let width = self.config.hidden_dim;
        let sequences = batch.sequences.as_slice();
        let shape = AttentionShape { hidden_dim: width, head_count: self.config.head_count };
        let run = || {
            let part = |tensor: &Tensor| tensor.narrow(0, 0, tokens);
            let (x, y, context) = (part(&space.x)?, part(&space.y)?, part(&space.context)?);
            let (qkv, intermediate) = (part(&space.qkv)?, part(&space.intermediate)?);
            let apply = |linear, epilogue| Apply { linear, epilogue, threads };
            x.inplace_op1(&Embed { weights: &self.embeddings, tokens: &batch.tokens, width, threads })?;
            for layer in &self.layers {
                qkv.inplace_op2(&x, &apply(&layer.qkv, Epilogue::Bias))?;
                context.inplace_op2(&qkv, &Attend { sequences, shape, threads })?;
                y.inplace_op2(&context, &apply(&layer.attention_output, Epilogue::None))?;
                let bias = &layer.attention_output.bias;
                x.inplace_op2(&y, &AddNorm { bias, norm: &layer.attention_norm, width, threads })?;
                let activate = Epilogue::Activate(self.config.activation);
                intermediate.inplace_op2(&x, &apply(&layer.intermediate, activate))?;
                y.inplace_op2(&intermediate, &apply(&layer.output, Epilogue::None))?;
                let bias = &layer.output.bias;
                x.inplace_op2(&y, &AddNorm { bias, norm: &layer.output_norm, width, threads })?;
            }
            let (modes, normalize) = pooling;
            let out_width = width * modes.count() as usize;
            let out = Tensor::zeros((sequences.len(), out_width), DType::F32, &Device::Cpu)?;
            out.inplace_op2(&x, &Pool { sequences, modes, normalize, width })?;
            out.flatten_all()?.to_vec1()
        };
        run().map_err(compute)
    }
}

//! Which tensors an encoder's image has and under which names checkpoints keep them. Places and bytes are `plan`'s and `write`'s.

use super::checkpoint::{Checkpoint, SourceTensor};
use super::error::CompileError;
use super::plan::{Make, PlannedTensor};
use super::sentence::DenseModule;
use crate::config::{
    Activation, ClassifierHead, EncoderConfig, GATED_BLOCK, HeadActivation, ModelType, NormKind,
};
use crate::json::shorten;
use crate::packing::{MAX_INT8_INPUTS, Packing};
use shm_layout::image::{DType, Precision};

/// Prefixes under which checkpoints keep an encoder's tensors.
const PREFIXES: [&str; 8] =
    ["", "bert.", "roberta.", "model.", "encoder_model.", "distilbert.", "mpnet.", "nomic_bert."];
/// Tensors that checkpoints may carry and that are not used where they are not part of the model: heads for other tasks and
/// buffers.
const UNUSED: [&str; 14] = [
    "pooler.",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "cls.",
    "lm_head.",
    "classifier.",
    "head.",
    "decoder.",
    "score.",
    "pre_classifier.",
    "qa_outputs.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
];
/// Buffers that older checkpoints keep with each layer.
const UNUSED_BUFFERS: [&str; 2] = ["rotary_emb.inv_freq", "attention.self.distance_embedding.weight"];

/// Names in a checkpoint. Those of a layer go behind `layer`, the layer's number and a dot.
struct Names {
    words: &'static str,
    embedding_norm: &'static str,
    layer: &'static str,
    /// One matrix of all three, or three.
    qkv: &'static [&'static str],
    attention_output: &'static str,
    attention_norm: &'static str,
    /// Gated: the half that is activated and the other one, in one matrix or in two.
    intermediate: &'static [&'static str],
    output: &'static str,
    output_norm: &'static str,
}

const BERT: Names = Names {
    words: "embeddings.word_embeddings.weight",
    embedding_norm: "embeddings.LayerNorm",
    layer: "encoder.layer.",
    qkv: &["attention.self.query", "attention.self.key", "attention.self.value"],
    attention_output: "attention.output.dense",
    attention_norm: "attention.output.LayerNorm",
    intermediate: &["intermediate.dense"],
    output: "output.dense",
    output_norm: "output.LayerNorm",
};
const DISTILBERT: Names = Names {
    layer: "transformer.layer.",
    qkv: &["attention.q_lin", "attention.k_lin", "attention.v_lin"],
    attention_output: "attention.out_lin",
    attention_norm: "sa_layer_norm",
    intermediate: &["ffn.lin1"],
    output: "ffn.lin2",
    output_norm: "output_layer_norm",
    ..BERT
};
const MPNET: Names = Names {
    qkv: &["attention.attn.q", "attention.attn.k", "attention.attn.v"],
    attention_output: "attention.attn.o",
    attention_norm: "attention.LayerNorm",
    ..BERT
};
const MODERNBERT: Names = Names {
    words: "embeddings.tok_embeddings.weight",
    embedding_norm: "embeddings.norm",
    layer: "layers.",
    qkv: &["attn.Wqkv"],
    attention_output: "attn.Wo",
    attention_norm: "attn_norm",
    intermediate: &["mlp.Wi"],
    output: "mlp.Wo",
    output_norm: "mlp_norm",
};
/// As the authors published it.
const NOMIC: Names = Names {
    words: "embeddings.word_embeddings.weight",
    embedding_norm: "emb_ln",
    layer: "encoder.layers.",
    qkv: &["attn.Wqkv"],
    attention_output: "attn.out_proj",
    attention_norm: "norm1",
    intermediate: &["mlp.fc12", "mlp.fc11"],
    output: "mlp.fc2",
    output_norm: "norm2",
};
/// As transformers names it.
const NOMIC_OF_TRANSFORMERS: Names = Names {
    words: "embeddings.word_embeddings.weight",
    embedding_norm: "embeddings.LayerNorm",
    layer: "layers.",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attention_output: "self_attn.o_proj",
    attention_norm: "post_attention_layernorm",
    intermediate: &["mlp.gate_proj", "mlp.up_proj"],
    output: "mlp.down_proj",
    output_norm: "post_mlp_layernorm",
};
const QWEN3: Names = Names {
    words: "embed_tokens.weight",
    embedding_norm: "",
    attention_norm: "input_layernorm",
    output_norm: "post_attention_layernorm",
    ..NOMIC_OF_TRANSFORMERS
};

/// A source and the shape it must have.
type Wanted = (String, Vec<u64>);

/// Finds the tensors of an encoder in a checkpoint.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'static str,
    precision: Precision,
    used: Vec<String>,
    planned: Vec<PlannedTensor>,
}

impl Finder<'_> {
    /// Takes sources out of the checkpoint, each of its shape.
    fn take(&mut self, wanted: &[Wanted]) -> Result<Vec<(String, SourceTensor)>, CompileError> {
        let mut found = Vec::with_capacity(wanted.len());
        for (source, shape) in wanted {
            let (full, tensor) = self.find(source)?;
            if tensor.shape != *shape {
                return Err(CompileError::TensorShape {
                    name: full,
                    found: tensor.shape,
                    wanted: shape.clone(),
                });
            }
            if !matches!(tensor.dtype.as_str(), "F32" | "F16" | "BF16") {
                return Err(CompileError::TensorDtype { name: full, found: tensor.dtype });
            }
            self.used.push(full.clone());
            found.push((full, tensor));
        }
        Ok(found)
    }

    /// The checkpoint's tensor of this name, also under the names that old TensorFlow exports give to layer norms; heads lie
    /// beside the encoder, without its prefix.
    fn find(&self, name: &str) -> Result<(String, SourceTensor), CompileError> {
        let old =
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        for prefix in [self.prefix, ""] {
            for name in [name, &old] {
                let full = format!("{prefix}{name}");
                if let Some(tensor) = self.checkpoint.tensors.get(&full) {
                    return Ok((full, tensor.clone()));
                }
            }
        }
        Err(CompileError::MissingTensor { name: name.to_owned() })
    }

    /// Whether a Nomic BERT has its authors' names.
    fn is_of_the_authors(&self) -> bool {
        self.checkpoint.tensors.keys().any(|name| name.ends_with("attn.Wqkv.weight"))
    }

    fn put(
        &mut self,
        name: String,
        dtype: DType,
        shape: Vec<u64>,
        make: Make,
        sources: Vec<(String, SourceTensor)>,
    ) {
        self.planned.push(PlannedTensor { name, dtype, shape, make, sources, offset: 0 });
    }

    /// A tensor as it is in the checkpoint, as f32.
    fn plain(&mut self, name: String, source: String, shape: &[u64]) -> Result<(), CompileError> {
        let sources = self.take(&[(source, shape.to_vec())])?;
        self.put(name, DType::F32, shape.to_vec(), Make::Concat, sources);
        Ok(())
    }

    /// A packed matrix of `sources`, `[outputs, inputs]` stacked, and the biases beside them; zeros where there are none.
    fn linear(
        &mut self,
        name: &str,
        precision: Precision,
        sources: Vec<(String, SourceTensor)>,
        biases: Vec<(String, SourceTensor)>,
    ) -> Result<(), CompileError> {
        let outputs: u64 = sources.iter().map(|(_, source)| source.shape[0]).sum();
        let inputs = sources.first().map_or(0, |(_, source)| source.shape[1]);
        if precision == Precision::Int8 && inputs > MAX_INT8_INPUTS {
            return Err(CompileError::TooLarge { reason: "number of inputs of an int8 layer" });
        }
        let shape = precision.matrix_shape(inputs, outputs).to_vec();
        let pack = Make::Pack(precision);
        self.put(format!("{name}.weight"), precision.dtype(), shape, pack, sources.clone());
        if precision == Precision::Int8 {
            for (part, make) in [("scales", Make::Scales), ("sums", Make::Sums)] {
                self.put(format!("{name}.{part}"), DType::F32, vec![outputs], make, sources.clone());
            }
        }
        let make = if biases.is_empty() { Make::Zeros } else { Make::Concat };
        self.put(format!("{name}.bias"), DType::F32, vec![outputs], make, biases);
        Ok(())
    }

    /// A linear layer of the encoder, made of one or more of the checkpoint's that read the same input.
    fn layer_of(
        &mut self,
        name: &str,
        parts: &[(String, usize)],
        inputs: usize,
        has_bias: bool,
    ) -> Result<(), CompileError> {
        let (weights, biases) = self.take_linear(parts, inputs, has_bias)?;
        self.linear(name, self.precision, weights, biases)
    }

    #[allow(clippy::type_complexity, reason = "weights and biases, each with its name")]
    fn take_linear(
        &mut self,
        parts: &[(String, usize)],
        inputs: usize,
        has_bias: bool,
    ) -> Result<(Vec<(String, SourceTensor)>, Vec<(String, SourceTensor)>), CompileError> {
        let weights: Vec<Wanted> = parts
            .iter()
            .map(|(part, outputs)| (format!("{part}.weight"), vec![*outputs as u64, inputs as u64]))
            .collect();
        let biases: Vec<Wanted> =
            parts.iter().map(|(part, outputs)| (format!("{part}.bias"), vec![*outputs as u64])).collect();
        Ok((self.take(&weights)?, if has_bias { self.take(&biases)? } else { Vec::new() }))
    }

    /// A gated layer: blocks of [`GATED_BLOCK`] outputs of the half that is activated, each before the same block of the other.
    fn gated(&mut self, name: &str, parts: &[String], config: &EncoderConfig) -> Result<(), CompileError> {
        let (wide, inputs) = (config.intermediate_dim, config.hidden_dim);
        let outputs = 2 * wide / parts.len();
        let parts: Vec<(String, usize)> = parts.iter().map(|part| (part.clone(), outputs)).collect();
        let (weights, biases) = self.take_linear(&parts, inputs, config.biases.feed_forward)?;
        let interleave = |sources: Vec<(String, SourceTensor)>| {
            let (Some(first), Some(last)) = (sources.first(), sources.last()) else { return Vec::new() };
            // In one matrix the second half lies behind the first.
            let second_row = if sources.len() == 1 { wide } else { 0 };
            let blocks = (0..wide).step_by(GATED_BLOCK);
            blocks.flat_map(|row| [rows_of(first, row), rows_of(last, second_row + row)]).collect::<Vec<_>>()
        };
        self.linear(name, self.precision, interleave(weights), interleave(biases))
    }

    fn norm(&mut self, name: &str, source: &str, config: &EncoderConfig) -> Result<(), CompileError> {
        let width = config.hidden_dim as u64;
        self.plain(format!("{name}.weight"), format!("{source}.weight"), &[width])?;
        if config.norm == NormKind::Rms {
            return Ok(());
        }
        if config.biases.norm {
            return self.plain(format!("{name}.bias"), format!("{source}.bias"), &[width]);
        }
        self.put(format!("{name}.bias"), DType::F32, vec![width], Make::Zeros, Vec::new());
        Ok(())
    }

    fn embeddings(
        &mut self,
        names: &Names,
        config: &EncoderConfig,
        max_tokens: usize,
    ) -> Result<(), CompileError> {
        let width = config.hidden_dim as u64;
        let words = [config.vocab_size as u64, width];
        self.plain("embeddings.word_embeddings".into(), names.words.into(), &words)?;
        for (name, rows) in
            [("position_embeddings", config.position_count), ("token_type_embeddings", config.type_count)]
        {
            if rows > 0 {
                let source = format!("embeddings.{name}.weight");
                self.plain(format!("embeddings.{name}"), source, &[rows as u64, width])?;
            }
        }
        if config.has_embedding_norm {
            self.norm("embeddings.norm", names.embedding_norm, config)?;
        }
        if let Some(rotary) = config.rotary {
            let shape = vec![max_tokens as u64, config.head_dim as u64 / 2];
            for (kind, base) in [("whole", rotary.whole_base), ("window", rotary.window_base)] {
                if kind == "window" && !config.windows.contains(&true) {
                    continue;
                }
                for (function, make) in [
                    ("cos", Make::RotaryCos { base_bits: base.to_bits() }),
                    ("sin", Make::RotarySin { base_bits: base.to_bits() }),
                ] {
                    let name = format!("rotary.{kind}.{function}");
                    self.put(name, DType::F32, shape.clone(), make, Vec::new());
                }
            }
        }
        if config.relative_buckets > 0 {
            let (buckets, heads) = (config.relative_buckets as u64, config.head_count as u64);
            let source = ("encoder.relative_attention_bias.weight".to_owned(), vec![buckets, heads]);
            let sources = self.take(&[source])?;
            let shape = vec![heads, 2 * max_tokens as u64 - 1];
            self.put("distance_bias".into(), DType::F32, shape, Make::DistanceBias, sources);
        }
        Ok(())
    }

    fn encoder(&mut self, config: &EncoderConfig, max_tokens: usize) -> Result<(), CompileError> {
        let names = match config.model_type {
            ModelType::Bert | ModelType::Roberta => BERT,
            ModelType::DistilBert => DISTILBERT,
            ModelType::Mpnet => MPNET,
            ModelType::ModernBert => MODERNBERT,
            ModelType::NomicBert if self.is_of_the_authors() => NOMIC,
            ModelType::NomicBert => NOMIC_OF_TRANSFORMERS,
            ModelType::Qwen3 => QWEN3,
        };
        self.embeddings(&names, config, max_tokens)?;
        let width = config.hidden_dim;
        let (queries, keys) = (config.context_dim(), config.kv_head_count * config.head_dim);
        for layer in 0..config.layer_count {
            let from = |part: &str| format!("{}{layer}.{part}", names.layer);
            let to = format!("layer.{layer}");
            let sizes: &[usize] =
                if names.qkv.len() == 1 { &[queries + 2 * keys] } else { &[queries, keys, keys] };
            let parts: Vec<(String, usize)> =
                names.qkv.iter().zip(sizes).map(|(part, size)| (from(part), *size)).collect();
            self.layer_of(&format!("{to}.attention.qkv"), &parts, width, config.biases.attention)?;
            if config.has_head_norms {
                for part in ["q_norm", "k_norm"] {
                    let source = from(&format!("self_attn.{part}.weight"));
                    self.plain(format!("{to}.attention.{part}"), source, &[config.head_dim as u64])?;
                }
            }
            let part = (from(names.attention_output), width);
            let name = format!("{to}.attention.output");
            self.layer_of(&name, &[part], config.context_dim(), config.biases.attention)?;
            if layer > 0 || config.has_first_norm {
                self.norm(&format!("{to}.attention.norm"), &from(names.attention_norm), config)?;
            }
            let parts: Vec<String> = names.intermediate.iter().map(|part| from(part)).collect();
            let name = format!("{to}.intermediate");
            if config.is_gated {
                self.gated(&name, &parts, config)?;
            } else {
                let parts: Vec<(String, usize)> =
                    parts.into_iter().map(|part| (part, config.intermediate_dim)).collect();
                self.layer_of(&name, &parts, width, config.biases.feed_forward)?;
            }
            let part = (from(names.output), width);
            let name = format!("{to}.output");
            self.layer_of(&name, &[part], config.intermediate_dim, config.biases.feed_forward)?;
            self.norm(&format!("{to}.output.norm"), &from(names.output_norm), config)?;
        }
        if config.is_pre_norm {
            let source = if config.model_type == ModelType::ModernBert { "final_norm" } else { "norm" };
            self.norm("final_norm", source, config)?;
        }
        Ok(())
    }

    /// One layer behind the pooling, in f32 whatever the encoder's precision: it is a thousandth of the work.
    fn head_layer(
        &mut self,
        (index, activation): (usize, HeadActivation),
        source: &str,
        (inputs, outputs): (usize, usize),
        has_bias: bool,
    ) -> Result<(), CompileError> {
        let (weights, biases) = self.take_linear(&[(source.to_owned(), outputs)], inputs, has_bias)?;
        self.linear(&head_name(index, activation), Precision::F32, weights, biases)
    }

    fn classifier(&mut self, config: &EncoderConfig) -> Result<(), CompileError> {
        let Some(classifier) = config.classifier else { return Ok(()) };
        let (width, labels) = (config.hidden_dim, classifier.label_count);
        let square = (width, width);
        let (dense, has_bias, last) = match classifier.head {
            ClassifierHead::Pooler => (Some(("pooler.dense", HeadActivation::Tanh)), true, "classifier"),
            ClassifierHead::Dense => {
                (Some(("classifier.dense", HeadActivation::Tanh)), true, "classifier.out_proj")
            }
            ClassifierHead::PreClassifier => {
                (Some(("pre_classifier", HeadActivation::Relu)), true, "classifier")
            }
            ClassifierHead::Prediction { activation, bias } => {
                let activation = match activation {
                    Activation::Relu => HeadActivation::Relu,
                    _ => HeadActivation::Gelu,
                };
                (Some(("head.dense", activation)), bias, "classifier")
            }
            ClassifierHead::Score => (None, false, "score"),
        };
        let mut index = 0;
        if let Some((source, activation)) = dense {
            self.head_layer((0, activation), source, square, has_bias)?;
            if let ClassifierHead::Prediction { .. } = classifier.head {
                self.norm(&format!("{}.norm", head_name(0, activation)), "head.norm", config)?;
            }
            index = 1;
        }
        let has_bias = classifier.head != ClassifierHead::Score;
        self.head_layer((index, HeadActivation::Identity), last, (width, labels), has_bias)
    }

    fn check_extra(&self, config: &EncoderConfig) -> Result<(), CompileError> {
        let mut used: Vec<&str> = self.used.iter().map(String::as_str).collect();
        used.sort_unstable();
        let extra: Vec<String> = self
            .checkpoint
            .tensors
            .keys()
            .filter(|name| used.binary_search(&name.as_str()).is_err())
            .filter(|name| {
                let bare = name.strip_prefix(self.prefix).unwrap_or(name);
                let unused = UNUSED.iter().any(|unused| bare.starts_with(unused) || name.starts_with(unused));
                !unused && !UNUSED_BUFFERS.iter().any(|buffer| name.ends_with(buffer))
            })
            .map(|name| shorten(name))
            .collect();
        if extra.is_empty() {
            return Ok(());
        }
        Err(CompileError::ExtraTensors {
            model_type: config.family.name(),
            count: extra.len(),
            names: extra[..extra.len().min(5)].join(", "),
        })
    }
}

/// Name in an image of a layer behind the pooling; it says what is done to the layer's result.
pub(crate) fn head_name(index: usize, activation: HeadActivation) -> String {
    format!("head.{index}.{}", activation.name())
}

/// [`GATED_BLOCK`] rows of a tensor, or numbers of a vector, from `first` on.
fn rows_of((name, tensor): &(String, SourceTensor), first: usize) -> (String, SourceTensor) {
    let row_elements: u64 = tensor.shape[1..].iter().product();
    let element_bytes = if tensor.dtype == "F32" { 4 } else { 2 };
    let mut part = tensor.clone();
    part.shape[0] = GATED_BLOCK as u64;
    part.offset += first as u64 * row_elements * element_bytes;
    (name.clone(), part)
}

/// The tensors of an encoder's image and of what follows it, in the order in which computing reads them; offsets are not set yet.
pub(crate) fn tensors(
    config: &EncoderConfig,
    dense: &[DenseModule],
    max_tokens: usize,
    checkpoint: &Checkpoint,
    precision: Precision,
) -> Result<Vec<PlannedTensor>, CompileError> {
    let words = match config.model_type {
        ModelType::ModernBert => MODERNBERT.words,
        ModelType::Qwen3 => QWEN3.words,
        _ => BERT.words,
    };
    let has = |prefix: &&str| checkpoint.tensors.contains_key(&format!("{prefix}{words}"));
    let prefix = PREFIXES.into_iter().find(has).unwrap_or("");
    let mut finder = Finder { checkpoint, prefix, precision, used: Vec::new(), planned: Vec::new() };
    finder.encoder(config, max_tokens)?;
    finder.classifier(config)?;
    for (index, module) in dense.iter().enumerate() {
        let source = format!("{}linear", module.prefix);
        let sizes = (module.inputs, module.outputs);
        finder.head_layer((index, module.activation), &source, sizes, module.has_bias)?;
    }
    finder.check_extra(config)?;
    Ok(finder.planned)
}

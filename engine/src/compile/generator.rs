//! Generators: which tensors an image of a T5, Llama or Qwen3 has and from what of a checkpoint they are made, and the order of steps
//! from folder to plan. Nothing is read here but small files.

use super::checkpoint::{Checkpoint, SourceTensor};
use super::error::CompileError;
use super::folder::ModelFolder;
use super::plan::{self, Make, Plan, PlannedTensor};
use super::{CompileOptions, required, tokenizer_check};
use crate::blocks::BlockKind;
use crate::config::{ConfigError, MAX_CONFIG_BYTES};
use crate::generate::{GeneratorConfig, MAX_TEMPLATE_BYTES, Words, check_template, template_of};
use crate::json::shorten;
use crate::kernel::Feed;
use crate::packing::{MAX_INT8_INPUTS, Packing, Precision};
use shm_layout::image::{DType, Pooling, SectionKind};

/// Largest tokenizer_config.json, bytes: Llama 3's lists 256 special tokens.
const MAX_TOKENIZER_CONFIG_BYTES: u64 = 4 << 20;
/// Tensors that checkpoints may carry and generating never uses: buffers.
const UNUSED: [&str; 4] = [
    "rope_freqs.weight",
    "rotary_emb.inv_freq",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
];

/// The small files of a generator, from a folder or from the metadata of a GGUF file.
pub(super) struct GeneratorFiles {
    pub(super) config_json: Vec<u8>,
    pub(super) generation_config: Option<Vec<u8>>,
    pub(super) tokenizer: Vec<u8>,
    pub(super) tokenizer_config: Option<Vec<u8>>,
    pub(super) template: Option<String>,
}

impl GeneratorFiles {
    /// Reads them from a folder.
    pub(super) fn read(folder: &mut ModelFolder, config_json: Vec<u8>) -> Result<Self, CompileError> {
        let generation_config = folder.read("generation_config.json", MAX_CONFIG_BYTES)?;
        let tokenizer = required(
            folder,
            "tokenizer.json".into(),
            tokenizer_check::MAX_TOKENIZER_BYTES,
            "only fast tokenizers are read: save the tokenizer with transformers' AutoTokenizer(…, use_fast=True)",
        )?;
        let tokenizer_config = folder.read("tokenizer_config.json", MAX_TOKENIZER_CONFIG_BYTES)?;
        let template = read_template(folder, tokenizer_config.as_deref())?;
        Ok(GeneratorFiles { config_json, generation_config, tokenizer, tokenizer_config, template })
    }
}

/// The chat template: chat_template.jinja, else what tokenizer_config.json has.
pub(super) fn read_template(
    folder: &mut ModelFolder,
    tokenizer_config: Option<&[u8]>,
) -> Result<Option<String>, CompileError> {
    let name = "chat_template.jinja";
    let bad = |name: &str, reason: String| CompileError::Json { name: name.to_owned(), reason };
    if let Some(bytes) = folder.read(name, MAX_TEMPLATE_BYTES as u64)? {
        return String::from_utf8(bytes).map(Some).map_err(|_| bad(name, "is not UTF-8".into()));
    }
    let Some(bytes) = tokenizer_config else { return Ok(None) };
    template_of(bytes).map_err(|reason| bad("tokenizer_config.json", reason))
}

/// Checks the small files of a generator and plans its image.
pub(super) fn plan_image(
    files: GeneratorFiles,
    checkpoint: &Checkpoint,
    options: &CompileOptions,
) -> Result<Plan, CompileError> {
    let config = GeneratorConfig::from_json(&files.config_json, files.generation_config.as_deref())?;
    let tokenizer = tokenizer_check::clean_with_decoder(&files.tokenizer, config.vocab_size)
        .map_err(|reason| CompileError::Tokenizer { reason })?;
    // Loads it once, in this process that may die, so that no image holds a tokenizer that does not load.
    Words::new(&tokenizer, config.vocab_size)
        .map_err(|error| CompileError::Tokenizer { reason: error.to_string() })?;
    if let Some(template) = &files.template {
        check_template(template)
            .map_err(|reason| CompileError::Json { name: "chat template".into(), reason })?;
    }
    let tensors = tensors(&config, checkpoint, options.precision)?;
    let mut sections = vec![
        (SectionKind::ModelId, options.model_id.clone().into_bytes()),
        (SectionKind::Config, files.config_json),
        (SectionKind::Tokenizer, tokenizer),
    ];
    sections.extend(files.generation_config.map(|data| (SectionKind::GenerationConfig, data)));
    sections.extend(files.tokenizer_config.map(|data| (SectionKind::TokenizerConfig, data)));
    sections.extend(files.template.map(|template| (SectionKind::ChatTemplate, template.into_bytes())));
    let header = plan::Settings {
        family: config.family,
        task: config.task,
        hidden_dim: config.width,
        output_dim: config.width,
        vocab_size: config.vocab_size,
        layer_count: config.t5.map_or(config.layers, |t5| t5.encoder_layers),
        // Means nothing here; the header wants one.
        pooling: Pooling::MEAN,
        normalize: false,
        lower_case: false,
        max_seq_tokens: config.max_input_tokens as u32,
        precision: options.precision,
    };
    plan::layout(header, &sections, tensors)
}

/// Precision of the token table and the output matrix: int8 would cost more accuracy than it saves.
pub(crate) fn table_precision(precision: Precision) -> Precision {
    match precision {
        Precision::Int8 => Precision::Bf16,
        other => other,
    }
}

/// Finds the tensors of a generator in a checkpoint.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    precision: Precision,
    used: Vec<String>,
    planned: Vec<PlannedTensor>,
}

impl Finder<'_> {
    fn has(&self, name: &str) -> bool {
        self.checkpoint.tensors.contains_key(name)
    }

    fn source(&mut self, name: &str, shape: &[usize]) -> Result<(String, SourceTensor), CompileError> {
        let tensor = self
            .checkpoint
            .tensors
            .get(name)
            .ok_or_else(|| CompileError::MissingTensor { name: name.to_owned() })?
            .clone();
        let wanted: Vec<u64> = shape.iter().map(|size| *size as u64).collect();
        if tensor.shape != wanted {
            return Err(CompileError::TensorShape { name: name.to_owned(), found: tensor.shape, wanted });
        }
        self.used.push(name.to_owned());
        Ok((name.to_owned(), tensor))
    }

    fn vector(&mut self, name: &str, source: &str, shape: &[usize]) -> Result<(), CompileError> {
        let found = self.source(source, shape)?;
        if !matches!(found.1.dtype.as_str(), "F32" | "F16" | "BF16") {
            return Err(CompileError::TensorDtype { name: found.0, found: found.1.dtype });
        }
        let shape = found.1.shape.clone();
        self.planned.push(PlannedTensor {
            name: name.to_owned(),
            dtype: DType::F32,
            shape,
            make: Make::Concat,
            sources: vec![found],
            offset: 0,
        });
        Ok(())
    }

    /// Matrices that read the same input: one tensor of panels, or, where any of them is quantised, one each. `parts` are name
    /// in the image, name in the checkpoint, and outputs.
    fn matrices(
        &mut self,
        name: &str,
        parts: &[(&str, String, usize)],
        inputs: usize,
        precision: Precision,
    ) -> Result<(), CompileError> {
        let mut found = Vec::with_capacity(parts.len());
        for (_, source, outputs) in parts {
            found.push(self.source(source, &[*outputs, inputs])?);
        }
        if found.iter().any(|(_, tensor)| BlockKind::from_name(&tensor.dtype).is_some()) {
            for ((part, _, _), source) in parts.iter().zip(found) {
                let name = if parts.len() == 1 { name.to_owned() } else { format!("{name}.{part}") };
                match BlockKind::from_name(&source.1.dtype) {
                    Some(kind) => self.blocks(&name, kind, source)?,
                    None => self.packed(&name, vec![source], precision)?,
                }
            }
            return Ok(());
        }
        self.packed(name, found, precision)
    }

    fn blocks(
        &mut self,
        name: &str,
        kind: BlockKind,
        source: (String, SourceTensor),
    ) -> Result<(), CompileError> {
        let (outputs, inputs) = (source.1.shape[0], source.1.shape[1]);
        let row_bytes = kind.row_bytes(inputs as usize).ok_or_else(|| CompileError::TensorDtype {
            name: source.0.clone(),
            found: format!("{} with rows of {inputs}, not whole blocks", kind.name()),
        })?;
        self.planned.push(PlannedTensor {
            name: format!("{name}.{}", kind.name()),
            dtype: DType::Blocks,
            shape: vec![outputs, row_bytes as u64],
            make: Make::Copy,
            sources: vec![source],
            offset: 0,
        });
        Ok(())
    }

    fn packed(
        &mut self,
        name: &str,
        sources: Vec<(String, SourceTensor)>,
        precision: Precision,
    ) -> Result<(), CompileError> {
        if let Some((name, tensor)) =
            sources.iter().find(|(_, tensor)| !matches!(tensor.dtype.as_str(), "F32" | "F16" | "BF16"))
        {
            return Err(CompileError::TensorDtype { name: name.clone(), found: tensor.dtype.clone() });
        }
        let inputs = sources[0].1.shape[1];
        let rows = sources.iter().map(|(_, tensor)| tensor.shape[0]).sum::<u64>();
        if precision == Precision::Int8 && inputs > MAX_INT8_INPUTS {
            return Err(CompileError::TooLarge { reason: "number of inputs of an int8 layer" });
        }
        let mut add = |suffix: &str, dtype: DType, shape: Vec<u64>, make: Make| {
            let name = format!("{name}.{suffix}");
            self.planned.push(PlannedTensor {
                name,
                dtype,
                shape,
                make,
                sources: sources.clone(),
                offset: 0,
            });
        };
        add(
            "weight",
            precision.dtype(),
            precision.matrix_shape(inputs, rows).to_vec(),
            Make::Pack(precision),
        );
        if precision == Precision::Int8 {
            add("scales", DType::F32, vec![rows], Make::Scales);
            add("sums", DType::F32, vec![rows], Make::Sums);
        }
        Ok(())
    }

    fn matrix(&mut self, name: &str, source: &str, shape: (usize, usize)) -> Result<(), CompileError> {
        self.matrices(name, &[("", source.to_owned(), shape.0)], shape.1, self.precision)
    }

    fn table(&mut self, name: &str, source: &str, config: &GeneratorConfig) -> Result<(), CompileError> {
        let precision = table_precision(self.precision);
        self.matrices(name, &[("", source.to_owned(), config.vocab_size)], config.width, precision)
    }

    /// The token table, and the output matrix where it is another one.
    fn tables(&mut self, source: &str, config: &GeneratorConfig) -> Result<(), CompileError> {
        self.table("embeddings", source, config)?;
        let head = "lm_head.weight";
        if !self.has(head) && config.ties_output {
            return Ok(());
        }
        // Checkpoints of tied models may have it too; T5's then is another matrix.
        if config.ties_output && config.t5.is_none() {
            self.used.push(head.to_owned());
            return Ok(());
        }
        self.table("output", head, config)
    }

    fn causal(&mut self, config: &GeneratorConfig) -> Result<(), CompileError> {
        let GeneratorConfig { width, wide, head_dim, .. } = *config;
        let (queries, keys) = (config.heads * head_dim, config.kv_heads * head_dim);
        self.tables("model.embed_tokens.weight", config)?;
        for layer in 0..config.layers {
            let from = |part: &str| format!("model.layers.{layer}.{part}.weight");
            let to = |part: &str| format!("layer.{layer}.{part}");
            self.vector(&to("norm"), &from("input_layernorm"), &[width])?;
            let qkv = [
                ("q", from("self_attn.q_proj"), queries),
                ("k", from("self_attn.k_proj"), keys),
                ("v", from("self_attn.v_proj"), keys),
            ];
            self.matrices(&to("qkv"), &qkv, width, self.precision)?;
            if config.has_head_norms {
                self.vector(&to("q_norm"), &from("self_attn.q_norm"), &[head_dim])?;
                self.vector(&to("k_norm"), &from("self_attn.k_norm"), &[head_dim])?;
            }
            self.matrix(&to("output"), &from("self_attn.o_proj"), (width, queries))?;
            self.vector(&to("wide_norm"), &from("post_attention_layernorm"), &[width])?;
            let up = [("gate", from("mlp.gate_proj"), wide), ("up", from("mlp.up_proj"), wide)];
            self.matrices(&to("up"), &up, width, self.precision)?;
            self.matrix(&to("down"), &from("mlp.down_proj"), (width, wide))?;
        }
        self.vector("norm", "model.norm.weight", &[width])
    }

    fn t5(
        &mut self,
        config: &GeneratorConfig,
        encoder_layers: usize,
        buckets: usize,
    ) -> Result<(), CompileError> {
        let GeneratorConfig { width, wide, .. } = *config;
        let inner = config.heads * config.head_dim;
        self.tables("shared.weight", config)?;
        for (side, layers) in [("encoder", encoder_layers), ("decoder", config.layers)] {
            let is_decoder = side == "decoder";
            let bias = format!("{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
            self.vector(&format!("{side}.bias"), &bias, &[buckets, config.heads])?;
            for layer in 0..layers {
                let from =
                    |index: usize, part: &str| format!("{side}.block.{layer}.layer.{index}.{part}.weight");
                let to = |part: &str| format!("{side}.layer.{layer}.{part}");
                self.vector(&to("norm"), &from(0, "layer_norm"), &[width])?;
                let qkv =
                    ["q", "k", "v"].map(|part| (part, from(0, &format!("SelfAttention.{part}")), inner));
                self.matrices(&to("qkv"), &qkv, width, self.precision)?;
                self.matrix(&to("output"), &from(0, "SelfAttention.o"), (width, inner))?;
                if is_decoder {
                    self.vector(&to("cross.norm"), &from(1, "layer_norm"), &[width])?;
                    self.matrix(&to("cross.q"), &from(1, "EncDecAttention.q"), (inner, width))?;
                    let kv =
                        ["k", "v"].map(|part| (part, from(1, &format!("EncDecAttention.{part}")), inner));
                    self.matrices(&to("cross.kv"), &kv, width, self.precision)?;
                    self.matrix(&to("cross.output"), &from(1, "EncDecAttention.o"), (width, inner))?;
                }
                let last = if is_decoder { 2 } else { 1 };
                self.vector(&to("wide_norm"), &from(last, "layer_norm"), &[width])?;
                let plain = [("up", from(last, "DenseReluDense.wi"), wide)];
                let gated =
                    ["wi_0", "wi_1"].map(|part| (part, from(last, &format!("DenseReluDense.{part}")), wide));
                let up = if config.feed == Feed::Relu { &plain[..] } else { &gated[..] };
                self.matrices(&to("up"), up, width, self.precision)?;
                self.matrix(&to("down"), &from(last, "DenseReluDense.wo"), (width, wide))?;
            }
            self.vector(&format!("{side}.norm"), &format!("{side}.final_layer_norm.weight"), &[width])?;
        }
        Ok(())
    }

    fn check_extra(&self, model_type: &'static str) -> Result<(), CompileError> {
        let mut used: Vec<&str> = self.used.iter().map(String::as_str).collect();
        used.sort_unstable();
        let extra: Vec<String> = self
            .checkpoint
            .tensors
            .keys()
            .filter(|name| used.binary_search(&name.as_str()).is_err())
            .filter(|name| !UNUSED.iter().any(|unused| name.ends_with(unused)))
            .map(|name| shorten(name))
            .collect();
        if extra.is_empty() {
            return Ok(());
        }
        let names = extra[..extra.len().min(5)].join(", ");
        Err(CompileError::ExtraTensors { model_type, count: extra.len(), names })
    }
}

/// The tensors of the image, in the order in which computing reads them; offsets are not set yet.
fn tensors(
    config: &GeneratorConfig,
    checkpoint: &Checkpoint,
    precision: Precision,
) -> Result<Vec<PlannedTensor>, CompileError> {
    let mut finder = Finder { checkpoint, precision, used: Vec::new(), planned: Vec::new() };
    match config.t5 {
        Some(t5) => finder.t5(config, t5.encoder_layers, t5.buckets)?,
        None => finder.causal(config)?,
    }
    finder.check_extra(config.family.name())?;
    Ok(finder.planned)
}

/// The `model_type` of a config.json, if it is one of a generator.
pub(super) fn generator_type(config_json: &[u8]) -> Result<bool, ConfigError> {
    #[derive(serde::Deserialize)]
    struct Kind {
        #[serde(default)]
        model_type: String,
        #[serde(default)]
        architectures: Option<Vec<String>>,
    }
    let kind: Kind = serde_json::from_slice(config_json)
        .map_err(|error| ConfigError::Json { reason: shorten(&error.to_string()) })?;
    // A decoder with a classifier's head reads texts as encoders do.
    let classifies =
        kind.architectures.iter().flatten().any(|name| name.ends_with("ForSequenceClassification"));
    Ok(!classifies && crate::generate::is_generator(&kind.model_type))
}

//! Planning an image: which tensors it has, from what they are made, and where everything lies. Pure; no file is read.

use super::checkpoint::{Checkpoint, SourceTensor};
use super::error::CompileError;
use crate::config::EncoderConfig;
use crate::json::shorten;
use crate::packing::{MAX_INT8_INPUTS, Packing};
use shm_layout::image::{
    DType, Family, HEADER_BYTES, HeaderValues, Isa, MAX_IMAGE_BYTES, MAX_SECTION_BYTES, MAX_TENSORS,
    PAGE_ALIGN_BYTES, Pooling, Precision, SECTION_ENTRY_BYTES, SectionEntry, SectionKind, TENSOR_ENTRY_BYTES,
    Task, TensorEntry, tensor_align_bytes,
};

/// Prefixes under which checkpoints keep an encoder's tensors.
const PREFIXES: [&str; 5] = ["", "bert.", "roberta.", "model.", "encoder_model."];
/// Tensors that checkpoints may carry and an embedding never uses: heads for other tasks and buffers.
const UNUSED: [&str; 6] =
    ["pooler.", "embeddings.position_ids", "embeddings.token_type_ids", "cls.", "lm_head.", "classifier."];

/// How an image tensor is made from checkpoint tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Make {
    /// The sources one behind the other, unchanged.
    Concat,
    /// The sources stacked by rows, `[out, in]` in all, packed into panels: see [`crate::packing`].
    Pack(Precision),
    /// Of each row of the stacked sources the scale of its int8 weights.
    Scales,
    /// Of each row of the stacked sources the sum of its int8 weights, times their scale.
    Sums,
    /// The one source's bytes as they are: quantised blocks.
    Copy,
}

/// One tensor of the image to be.
#[derive(Debug, Clone)]
pub(crate) struct PlannedTensor {
    /// Name in the image.
    pub(crate) name: String,
    /// Type of its elements in the image.
    pub(crate) dtype: DType,
    /// Shape in the image.
    pub(crate) shape: Vec<u64>,
    /// How it is made.
    pub(crate) make: Make,
    /// From what: names in the checkpoint and places.
    pub(crate) sources: Vec<(String, SourceTensor)>,
    /// Where it lies in the image, bytes.
    pub(crate) offset: u64,
}

impl PlannedTensor {
    /// Length in the image, bytes.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.shape.iter().product::<u64>() * self.dtype.size_bytes()
    }
}

/// Everything that is known about the image before the first weight is read.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Header with a content hash of zeros.
    pub(crate) header: HeaderValues,
    /// The bytes from the header to the end of the section contents.
    pub(crate) head: Vec<u8>,
    /// The tensors in the order in which they lie.
    pub(crate) tensors: Vec<PlannedTensor>,
}

/// What the header says of the model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// Model family.
    pub(crate) family: Family,
    /// What the model is for.
    pub(crate) task: Task,
    /// Width of the hidden state.
    pub(crate) hidden_dim: usize,
    /// Length of an output vector, or number of labels.
    pub(crate) output_dim: usize,
    /// Number of token ids.
    pub(crate) vocab_size: usize,
    /// Number of layers.
    pub(crate) layer_count: usize,
    /// Pooling modes.
    pub(crate) pooling: Pooling,
    /// Whether vectors are normalised.
    pub(crate) normalize: bool,
    /// Whether texts are lower-cased first.
    pub(crate) lower_case: bool,
    /// Longest sequence in tokens.
    pub(crate) max_seq_tokens: u32,
    /// Precision of the matrices.
    pub(crate) precision: Precision,
}

/// Finds the tensors of an encoder in a checkpoint.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    prefix: &'static str,
    precision: Precision,
    used: Vec<String>,
    planned: Vec<PlannedTensor>,
}

impl Finder<'_> {
    /// Adds the image tensor `name`, made from `sources` of shape `each`.
    fn add(
        &mut self,
        name: String,
        make: Make,
        sources: &[String],
        each: &[u64],
    ) -> Result<(), CompileError> {
        let mut found = Vec::with_capacity(sources.len());
        for source in sources {
            let (full, tensor) = self.find(source)?;
            if tensor.shape != each {
                return Err(CompileError::TensorShape {
                    name: full,
                    found: tensor.shape,
                    wanted: each.to_vec(),
                });
            }
            if !matches!(tensor.dtype.as_str(), "F32" | "F16" | "BF16") {
                return Err(CompileError::TensorDtype { name: full, found: tensor.dtype });
            }
            self.used.push(full.clone());
            found.push((full, tensor));
        }
        let rows = each[0] * sources.len() as u64;
        let (dtype, shape) = match make {
            Make::Concat => (DType::F32, std::iter::once(rows).chain(each[1..].iter().copied()).collect()),
            Make::Pack(precision) => (precision.dtype(), precision.matrix_shape(each[1], rows).to_vec()),
            Make::Scales | Make::Sums => (DType::F32, vec![rows]),
            Make::Copy => (DType::Blocks, each.to_vec()),
        };
        self.planned.push(PlannedTensor { name, dtype, shape, make, sources: found, offset: 0 });
        Ok(())
    }

    /// The checkpoint's tensor of this name, also under the names that old TensorFlow exports give to layer norms.
    fn find(&self, name: &str) -> Result<(String, SourceTensor), CompileError> {
        let old =
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        for name in [name, &old] {
            let full = format!("{}{name}", self.prefix);
            if let Some(tensor) = self.checkpoint.tensors.get(&full) {
                return Ok((full, tensor.clone()));
            }
        }
        Err(CompileError::MissingTensor { name: name.to_owned() })
    }

    /// A linear layer, or several that read the same input, as one matrix and one bias.
    fn linear(
        &mut self,
        name: &str,
        sources: &[String],
        output: usize,
        input: usize,
    ) -> Result<(), CompileError> {
        let named =
            |suffix: &str| sources.iter().map(|source| format!("{source}.{suffix}")).collect::<Vec<_>>();
        let (output, input) = (output as u64, input as u64);
        if self.precision == Precision::Int8 && input > MAX_INT8_INPUTS {
            return Err(CompileError::TooLarge { reason: "number of inputs of an int8 layer" });
        }
        let each = [output, input];
        self.add(format!("{name}.weight"), Make::Pack(self.precision), &named("weight"), &each)?;
        if self.precision == Precision::Int8 {
            self.add(format!("{name}.scales"), Make::Scales, &named("weight"), &each)?;
            self.add(format!("{name}.sums"), Make::Sums, &named("weight"), &each)?;
        }
        self.add(format!("{name}.bias"), Make::Concat, &named("bias"), &[output])
    }

    fn norm(&mut self, name: &str, source: &str, width: usize) -> Result<(), CompileError> {
        for suffix in ["weight", "bias"] {
            self.add(
                format!("{name}.{suffix}"),
                Make::Concat,
                &[format!("{source}.{suffix}")],
                &[width as u64],
            )?;
        }
        Ok(())
    }

    fn encoder(&mut self, config: &EncoderConfig) -> Result<(), CompileError> {
        let width = config.hidden_dim;
        for (name, rows) in [
            ("word_embeddings", config.vocab_size),
            ("position_embeddings", config.position_count),
            ("token_type_embeddings", config.type_count),
        ] {
            let source = format!("embeddings.{name}.weight");
            self.add(format!("embeddings.{name}"), Make::Concat, &[source], &[rows as u64, width as u64])?;
        }
        self.norm("embeddings.norm", "embeddings.LayerNorm", width)?;
        for layer in 0..config.layer_count {
            let from = format!("encoder.layer.{layer}");
            let to = format!("layer.{layer}");
            let qkv = ["query", "key", "value"].map(|part| format!("{from}.attention.self.{part}"));
            self.linear(&format!("{to}.attention.qkv"), &qkv, width, width)?;
            let dense = format!("{from}.attention.output.dense");
            self.linear(&format!("{to}.attention.output"), &[dense], width, width)?;
            self.norm(&format!("{to}.attention.norm"), &format!("{from}.attention.output.LayerNorm"), width)?;
            let dense = format!("{from}.intermediate.dense");
            self.linear(&format!("{to}.intermediate"), &[dense], config.intermediate_dim, width)?;
            let dense = format!("{from}.output.dense");
            self.linear(&format!("{to}.output"), &[dense], width, config.intermediate_dim)?;
            self.norm(&format!("{to}.output.norm"), &format!("{from}.output.LayerNorm"), width)?;
        }
        Ok(())
    }

    fn check_extra(&self, family: Family) -> Result<(), CompileError> {
        let mut used: Vec<&str> = self.used.iter().map(String::as_str).collect();
        used.sort_unstable();
        let extra: Vec<String> = self
            .checkpoint
            .tensors
            .keys()
            .filter(|name| used.binary_search(&name.as_str()).is_err())
            .filter(|name| {
                let bare = name.strip_prefix(self.prefix).unwrap_or(name);
                !UNUSED.iter().any(|unused| bare.starts_with(unused) || name.starts_with(unused))
            })
            .map(|name| shorten(name))
            .collect();
        if extra.is_empty() {
            return Ok(());
        }
        let model_type = family.name();
        Err(CompileError::ExtraTensors {
            model_type,
            count: extra.len(),
            names: extra[..extra.len().min(5)].join(", "),
        })
    }
}

/// The tensors of the image, in the order in which computing reads them; offsets are not set yet.
pub(crate) fn tensors(
    config: &EncoderConfig,
    checkpoint: &Checkpoint,
    precision: Precision,
) -> Result<Vec<PlannedTensor>, CompileError> {
    let has = |prefix: &&str| {
        checkpoint.tensors.contains_key(&format!("{prefix}embeddings.word_embeddings.weight"))
    };
    let prefix = PREFIXES.into_iter().find(has).unwrap_or("");
    let mut finder = Finder { checkpoint, prefix, precision, used: Vec::new(), planned: Vec::new() };
    finder.encoder(config)?;
    finder.check_extra(config.family)?;
    Ok(finder.planned)
}

/// Lays the image out: places every table, section and tensor, and encodes all that comes before the tensors.
pub(crate) fn layout(
    settings: Settings,
    sections: &[(SectionKind, Vec<u8>)],
    mut tensors: Vec<PlannedTensor>,
) -> Result<Plan, CompileError> {
    let too_large = |reason| CompileError::TooLarge { reason };
    if tensors.len() > MAX_TENSORS as usize {
        return Err(too_large("number of tensors"));
    }
    if sections.iter().any(|(_, data)| data.len() as u64 > MAX_SECTION_BYTES) {
        return Err(too_large("length of a section"));
    }
    let sections_offset = HEADER_BYTES as u64;
    let directory_offset = sections_offset + (sections.len() * SECTION_ENTRY_BYTES) as u64;
    let names_offset = directory_offset + (tensors.len() * TENSOR_ENTRY_BYTES) as u64;
    let names: String = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut contents_end = names_offset + names.len() as u64;
    let mut section_entries = Vec::new();
    for (kind, data) in sections {
        let entry = SectionEntry {
            kind: *kind as u32,
            reserved: 0,
            offset: contents_end,
            len_bytes: data.len() as u64,
        };
        section_entries.extend(entry.encode());
        contents_end += data.len() as u64;
    }
    let data_offset = contents_end.next_multiple_of(PAGE_ALIGN_BYTES);
    let mut end = data_offset;
    let mut directory = Vec::new();
    let mut name_offset = 0;
    for tensor in &mut tensors {
        let len_bytes = tensor.len_bytes();
        tensor.offset = end.next_multiple_of(tensor_align_bytes(len_bytes));
        end = tensor.offset + len_bytes;
        if end > MAX_IMAGE_BYTES {
            return Err(too_large("length"));
        }
        let mut shape = [0; 4];
        shape[..tensor.shape.len()].copy_from_slice(&tensor.shape);
        let entry = TensorEntry {
            name_offset,
            name_bytes: tensor.name.len() as u32,
            dtype: tensor.dtype as u32,
            rank: tensor.shape.len() as u32,
            shape,
            data_offset: tensor.offset,
            len_bytes,
        };
        directory.extend(entry.encode());
        name_offset += tensor.name.len() as u32;
    }
    let header = HeaderValues {
        total_bytes: end,
        content_hash: [0; 32],
        family: settings.family,
        task: settings.task,
        precision: settings.precision,
        isa: Isa::Any,
        pooling: settings.pooling,
        normalize: settings.normalize,
        lower_case: settings.lower_case,
        hidden_dim: settings.hidden_dim as u32,
        output_dim: settings.output_dim as u32,
        max_seq_tokens: settings.max_seq_tokens,
        vocab_size: settings.vocab_size as u32,
        layer_count: settings.layer_count as u32,
        section_count: sections.len() as u32,
        sections_offset,
        tensor_count: tensors.len() as u32,
        directory_offset,
        names_offset,
        names_bytes: names.len() as u64,
        data_offset,
    };
    let mut head = header.encode().to_vec();
    head.extend(section_entries);
    head.extend(directory);
    head.extend(names.as_bytes());
    for (_, data) in sections {
        head.extend(data);
    }
    Ok(Plan { header, head, tensors })
}

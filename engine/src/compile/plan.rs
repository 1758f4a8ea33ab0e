//! Planning an image: from what its tensors are made, and where everything lies. Pure; no file is read. Which tensors an
//! encoder has is in `encoder`.

use super::checkpoint::SourceTensor;
use super::error::CompileError;
use shm_layout::image::{
    DType, Family, HEADER_BYTES, HeaderValues, Isa, MAX_IMAGE_BYTES, MAX_SECTION_BYTES, MAX_TENSORS,
    PAGE_ALIGN_BYTES, Pooling, Precision, SECTION_ENTRY_BYTES, SectionEntry, SectionKind, TENSOR_ENTRY_BYTES,
    Task, TensorEntry, tensor_align_bytes,
};

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
    /// Zeros, from no source: the bias of a layer that has none.
    Zeros,
    /// Cosines of the angles of rotary positions `[positions, head_dim / 2]`, from no source.
    RotaryCos {
        /// Bits of the base, an f64.
        base_bits: u64,
    },
    /// Sines of the same angles.
    RotarySin {
        /// Bits of the base, an f64.
        base_bits: u64,
    },
    /// What is added to scores by distance, `[heads, 2 * positions - 1]`, of a source `[buckets, heads]`.
    DistanceBias,
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

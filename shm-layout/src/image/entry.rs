//! Fixed-width entries of the section table and the tensor directory: encoding and decoding, without range checks.

use super::layout::{
    MAX_RANK, SECTION_ENTRY_BYTES, SECTION_ENTRY_FIELDS, TENSOR_ENTRY_BYTES, TENSOR_ENTRY_FIELDS, read_u32,
    read_u64, write_u32, write_u64,
};
use crate::table::offset_of;

const fn section(name: &str) -> usize {
    offset_of(SECTION_ENTRY_FIELDS, name)
}

const fn tensor(name: &str) -> usize {
    offset_of(TENSOR_ENTRY_FIELDS, name)
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SectionKind {
    /// The model id, UTF-8.
    ModelId = 1,
    /// The model's config.json.
    Config = 2,
    /// The tokenizer.json, checked, without padding, truncation and decoder.
    Tokenizer = 3,
    /// sentence_bert_config.json as found.
    SentenceBertConfig = 4,
    /// config_sentence_transformers.json as found.
    SentenceTransformersConfig = 5,
    /// modules.json as found.
    Modules = 6,
    /// generation_config.json as found.
    GenerationConfig = 7,
    /// tokenizer_config.json as found.
    TokenizerConfig = 8,
    /// The chat template, Jinja.
    ChatTemplate = 9,
    /// A Unigram tokenizer's tables, as `engine::unigram` lays them out; only with a tokenizer.json that they cover.
    TokenizerTables = 10,
}

impl SectionKind {
    /// All kinds in the order of their numbers.
    pub const ALL: [SectionKind; 10] = [
        SectionKind::ModelId,
        SectionKind::Config,
        SectionKind::Tokenizer,
        SectionKind::SentenceBertConfig,
        SectionKind::SentenceTransformersConfig,
        SectionKind::Modules,
        SectionKind::GenerationConfig,
        SectionKind::TokenizerConfig,
        SectionKind::ChatTemplate,
        SectionKind::TokenizerTables,
    ];

    /// The kind of this number.
    pub fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == value)
    }
}

/// Element type of a tensor, in safetensors' terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum DType {
    /// IEEE single precision, 4 bytes.
    F32 = 1,
    /// bfloat16, 2 bytes.
    Bf16 = 2,
    /// Signed integer, 1 byte.
    Int8 = 3,
    /// Bytes of blocks of quantised numbers; the tensor's name says of which kind.
    Blocks = 4,
}

impl DType {
    /// The type of this number.
    pub fn from_u32(value: u32) -> Option<Self> {
        [DType::F32, DType::Bf16, DType::Int8, DType::Blocks].into_iter().find(|dtype| *dtype as u32 == value)
    }

    /// Size of one element in bytes.
    pub fn size_bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
            DType::Int8 | DType::Blocks => 1,
        }
    }
}

/// One entry of the section table, as it lies in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionEntry {
    /// Number of a [`SectionKind`].
    pub kind: u32,
    /// Zero.
    pub reserved: u32,
    /// Offset in the image, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len_bytes: u64,
}

impl SectionEntry {
    /// The entry as bytes.
    pub fn encode(&self) -> [u8; SECTION_ENTRY_BYTES] {
        let mut out = [0; SECTION_ENTRY_BYTES];
        write_u32(&mut out, section("kind"), self.kind);
        write_u32(&mut out, section("reserved"), self.reserved);
        write_u64(&mut out, section("offset"), self.offset);
        write_u64(&mut out, section("len_bytes"), self.len_bytes);
        out
    }

    /// The entry of these bytes, unchecked values.
    pub fn decode(bytes: &[u8; SECTION_ENTRY_BYTES]) -> Self {
        SectionEntry {
            kind: read_u32(bytes, section("kind")),
            reserved: read_u32(bytes, section("reserved")),
            offset: read_u64(bytes, section("offset")),
            len_bytes: read_u64(bytes, section("len_bytes")),
        }
    }
}

/// One entry of the tensor directory, as it lies in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorEntry {
    /// Offset of the name in the name table, bytes.
    pub name_offset: u32,
    /// Length of the name, bytes.
    pub name_bytes: u32,
    /// Number of a [`DType`].
    pub dtype: u32,
    /// Number of dimensions.
    pub rank: u32,
    /// Dimensions, outermost first; zero past `rank`.
    pub shape: [u64; MAX_RANK as usize],
    /// Offset of the data in the image, bytes.
    pub data_offset: u64,
    /// Length of the data, bytes.
    pub len_bytes: u64,
}

impl TensorEntry {
    /// The entry as bytes.
    pub fn encode(&self) -> [u8; TENSOR_ENTRY_BYTES] {
        let mut out = [0; TENSOR_ENTRY_BYTES];
        write_u32(&mut out, tensor("name_offset"), self.name_offset);
        write_u32(&mut out, tensor("name_bytes"), self.name_bytes);
        write_u32(&mut out, tensor("dtype"), self.dtype);
        write_u32(&mut out, tensor("rank"), self.rank);
        for (axis, dimension) in self.shape.iter().enumerate() {
            write_u64(&mut out, tensor("shape") + 8 * axis, *dimension);
        }
        write_u64(&mut out, tensor("data_offset"), self.data_offset);
        write_u64(&mut out, tensor("len_bytes"), self.len_bytes);
        out
    }

    /// The entry of these bytes, unchecked values.
    pub fn decode(bytes: &[u8; TENSOR_ENTRY_BYTES]) -> Self {
        let mut shape = [0; MAX_RANK as usize];
        for (axis, dimension) in shape.iter_mut().enumerate() {
            *dimension = read_u64(bytes, tensor("shape") + 8 * axis);
        }
        TensorEntry {
            name_offset: read_u32(bytes, tensor("name_offset")),
            name_bytes: read_u32(bytes, tensor("name_bytes")),
            dtype: read_u32(bytes, tensor("dtype")),
            rank: read_u32(bytes, tensor("rank")),
            shape,
            data_offset: read_u64(bytes, tensor("data_offset")),
            len_bytes: read_u64(bytes, tensor("len_bytes")),
        }
    }
}

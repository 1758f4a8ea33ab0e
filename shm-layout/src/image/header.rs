//! The header: plain values to write, a checked form to read. Cheap; all that a process needs which only passes images on.

use super::ImageError;
use super::layout::{
    HEADER_BYTES, HEADER_FIELDS, LAYOUT_VERSION, MAGIC, MAX_DIMENSION, MAX_IMAGE_BYTES, MAX_NAMES_BYTES,
    MAX_SECTIONS, MAX_TENSORS, PAGE_ALIGN_BYTES, RESERVED_FROM, SECTION_ENTRY_BYTES, TENSOR_ENTRY_BYTES,
    content_hash_range, read_u32, read_u64, write_u32, write_u64,
};
use crate::table::offset_of;
use crate::wire::{Decode, Encode};

const fn at(name: &str) -> usize {
    offset_of(HEADER_FIELDS, name)
}

/// Which model code computes the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Family {
    /// BERT encoders: absolute positions counted from zero.
    Bert = 1,
    /// RoBERTa and XLM-RoBERTa encoders: positions counted from the padding id.
    Roberta = 2,
    /// MPNet encoders: relative position buckets.
    Mpnet = 3,
    /// ModernBERT encoders: rotary positions, local and global layers, gated feed-forward blocks.
    ModernBert = 4,
    /// Nomic BERT encoders: rotary positions, gated feed-forward blocks.
    NomicBert = 5,
    /// Qwen3 decoders: grouped-query attention with normalised queries and keys.
    Qwen3 = 6,
    /// Llama decoders: grouped-query attention.
    Llama = 7,
    /// T5 encoder-decoders.
    T5 = 8,
}

impl Family {
    /// All of them, in the order of their numbers.
    pub const ALL: [Family; 8] = [
        Family::Bert,
        Family::Roberta,
        Family::Mpnet,
        Family::ModernBert,
        Family::NomicBert,
        Family::Qwen3,
        Family::Llama,
        Family::T5,
    ];

    fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|family| *family as u32 == value)
    }

    /// Its name in `config.json` files and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Bert => "bert",
            Family::Roberta => "roberta",
            Family::Mpnet => "mpnet",
            Family::ModernBert => "modernbert",
            Family::NomicBert => "nomic_bert",
            Family::Qwen3 => "qwen3",
            Family::Llama => "llama",
            Family::T5 => "t5",
        }
    }
}

/// What a model is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Encode, Decode)]
#[repr(u32)]
pub enum Task {
    /// A text becomes a vector.
    #[default]
    Embed = 1,
    /// A text, or a pair of texts, gets a score for each label; a reranker is one with a single label.
    Classify = 2,
    /// A text becomes another one.
    TextToText = 3,
    /// A conversation, or a text, is continued.
    Chat = 4,
}

impl Task {
    /// All of them, in the order of their numbers.
    pub const ALL: [Task; 4] = [Task::Embed, Task::Classify, Task::TextToText, Task::Chat];

    fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|task| *task as u32 == value)
    }

    /// Its name in settings and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Task::Embed => "embedding",
            Task::Classify => "classifier",
            Task::TextToText => "text2text",
            Task::Chat => "chat",
        }
    }
}

/// Precision of the matrices, and of what they are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Precision {
    /// IEEE single precision.
    F32 = 1,
    /// bfloat16 with single-precision sums.
    Bf16 = 2,
    /// 8-bit integers: weights with a scale for each output, activations with scale and zero for each token.
    Int8 = 3,
}

impl Precision {
    /// All of them, most exact first.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Int8];

    fn from_u32(value: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|precision| *precision as u32 == value)
    }

    /// Its name in settings: `f32`, `bf16`, `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Int8 => "int8",
        }
    }
}

/// Instruction set that the tensors are packed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Isa {
    /// Tensors that every CPU reads.
    Any = 1,
}

impl Isa {
    fn from_u32(value: u32) -> Option<Self> {
        (value == Isa::Any as u32).then_some(Isa::Any)
    }
}

/// A set of pooling modes; their outputs are concatenated in the order CLS, max, mean, mean by square root of length,
/// last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pooling(u32);

impl Pooling {
    /// The first token's hidden state.
    pub const CLS: Pooling = Pooling(1);
    /// Maximum over tokens, per component.
    pub const MAX: Pooling = Pooling(2);
    /// Mean over tokens.
    pub const MEAN: Pooling = Pooling(4);
    /// Sum over tokens divided by the square root of their number.
    pub const MEAN_SQRT_LEN: Pooling = Pooling(8);
    /// The last token's hidden state.
    pub const LAST: Pooling = Pooling(16);
    /// All single modes in output order.
    pub const ALL: [Pooling; 5] = [Self::CLS, Self::MAX, Self::MEAN, Self::MEAN_SQRT_LEN, Self::LAST];

    /// The set of these bits, or `None` when it is empty or has an unknown bit.
    pub fn from_bits(bits: u32) -> Option<Self> {
        (bits != 0 && bits < 32).then_some(Pooling(bits))
    }

    /// The bits of the set.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Whether `mode` is in the set.
    pub fn contains(self, mode: Pooling) -> bool {
        self.0 & mode.0 == mode.0
    }

    /// Both sets together.
    pub fn union(self, other: Pooling) -> Pooling {
        Pooling(self.0 | other.0)
    }

    /// Number of modes, 1 to 4.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }
}

/// The values of a header, as the compiler plans them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderValues {
    /// Length of the image, bytes.
    pub total_bytes: u64,
    /// BLAKE3 of the image with these bytes as zero.
    pub content_hash: [u8; 32],
    /// Model family.
    pub family: Family,
    /// What the model is for.
    pub task: Task,
    /// Precision of the matrices.
    pub precision: Precision,
    /// Instruction set the tensors are packed for.
    pub isa: Isa,
    /// Pooling modes.
    pub pooling: Pooling,
    /// Whether output vectors are L2-normalised.
    pub normalize: bool,
    /// Whether texts are lower-cased before tokenization.
    pub lower_case: bool,
    /// Width of the hidden state.
    pub hidden_dim: u32,
    /// Length of an output vector; the number of labels of a classifier; `hidden_dim` of what generates text.
    pub output_dim: u32,
    /// Longest sequence in tokens, special tokens included.
    pub max_seq_tokens: u32,
    /// Number of token ids.
    pub vocab_size: u32,
    /// Number of layers; of a T5 those of its encoder.
    pub layer_count: u32,
    /// Number of sections.
    pub section_count: u32,
    /// Offset of the section entries, bytes.
    pub sections_offset: u64,
    /// Number of tensors.
    pub tensor_count: u32,
    /// Offset of the tensor directory, bytes.
    pub directory_offset: u64,
    /// Offset of the name table, bytes.
    pub names_offset: u64,
    /// Length of the name table, bytes.
    pub names_bytes: u64,
    /// Offset of the first tensor, bytes.
    pub data_offset: u64,
}

const FLAG_NORMALIZE: u32 = 1;
const FLAG_LOWER_CASE: u32 = 2;

impl HeaderValues {
    /// Names weights, tokenizer, pooling and precision in one number: the first eight bytes of the content hash, which
    /// covers them all, read as little-endian.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.content_hash;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[at("magic")..at("magic") + 8].copy_from_slice(&MAGIC);
        out[content_hash_range()].copy_from_slice(&self.content_hash);
        let flags = if self.normalize { FLAG_NORMALIZE } else { 0 }
            | if self.lower_case { FLAG_LOWER_CASE } else { 0 };
        for (offset, value) in [
            (at("layout_version"), LAYOUT_VERSION),
            (at("header_bytes"), HEADER_BYTES as u32),
            (at("family"), self.family as u32),
            (at("task"), self.task as u32),
            (at("precision"), self.precision as u32),
            (at("isa"), self.isa as u32),
            (at("pooling"), self.pooling.bits()),
            (at("flags"), flags),
            (at("hidden_dim"), self.hidden_dim),
            (at("output_dim"), self.output_dim),
            (at("max_seq_tokens"), self.max_seq_tokens),
            (at("vocab_size"), self.vocab_size),
            (at("layer_count"), self.layer_count),
            (at("section_count"), self.section_count),
            (at("section_entry_bytes"), SECTION_ENTRY_BYTES as u32),
            (at("tensor_count"), self.tensor_count),
            (at("tensor_entry_bytes"), TENSOR_ENTRY_BYTES as u32),
        ] {
            write_u32(&mut out, offset, value);
        }
        for (offset, value) in [
            (at("total_bytes"), self.total_bytes),
            (at("sections_offset"), self.sections_offset),
            (at("directory_offset"), self.directory_offset),
            (at("names_offset"), self.names_offset),
            (at("names_bytes"), self.names_bytes),
            (at("data_offset"), self.data_offset),
            (at("data_bytes"), self.total_bytes.saturating_sub(self.data_offset)),
        ] {
            write_u64(&mut out, offset, value);
        }
        out
    }
}

/// A header that passed every check that needs no other byte of the image: version, ranges, and that all tables lie
/// inside the image, in order and without overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckedHeader(HeaderValues);

impl CheckedHeader {
    /// Parses the header of an image whose object is `total_len` bytes long.
    ///
    /// # Errors
    /// [`ImageError`] naming the first field that is out of range.
    pub fn parse(bytes: &[u8; HEADER_BYTES], total_len: u64) -> Result<Self, ImageError> {
        if bytes[at("magic")..at("magic") + 8] != MAGIC {
            return Err(ImageError::BadMagic);
        }
        let version = read_u32(bytes, at("layout_version"));
        if version != LAYOUT_VERSION {
            return Err(ImageError::Version { found: version });
        }
        let bad = |field: &'static str, value: u64| ImageError::Header { field, value };
        let word = |field: &'static str| read_u32(bytes, at(field));
        let long = |field: &'static str| read_u64(bytes, at(field));
        let fixed = |field: &'static str, wanted: u64| match u64::from(word(field)) {
            value if value == wanted => Ok(()),
            value => Err(bad(field, value)),
        };
        fixed("header_bytes", HEADER_BYTES as u64)?;
        fixed("section_entry_bytes", SECTION_ENTRY_BYTES as u64)?;
        fixed("tensor_entry_bytes", TENSOR_ENTRY_BYTES as u64)?;
        if let Some(byte) = bytes[RESERVED_FROM..].iter().find(|byte| **byte != 0) {
            return Err(bad("reserved", u64::from(*byte)));
        }
        let ranged = |field: &'static str, low: u64, high: u64| {
            let value = word(field);
            if (low..=high).contains(&u64::from(value)) {
                Ok(value)
            } else {
                Err(bad(field, u64::from(value)))
            }
        };
        let total_bytes = long("total_bytes");
        if total_bytes > MAX_IMAGE_BYTES {
            return Err(bad("total_bytes", total_bytes));
        }
        if total_bytes != total_len {
            return Err(ImageError::Length { claimed_bytes: total_bytes, len_bytes: total_len });
        }
        let flags = ranged("flags", 0, u64::from(FLAG_NORMALIZE | FLAG_LOWER_CASE))?;
        let mut content_hash = [0; 32];
        content_hash.copy_from_slice(&bytes[content_hash_range()]);
        let family = word("family");
        let task = word("task");
        let precision = word("precision");
        let isa = word("isa");
        let pooling = word("pooling");
        let values = HeaderValues {
            total_bytes,
            content_hash,
            family: Family::from_u32(family).ok_or(bad("family", u64::from(family)))?,
            task: Task::from_u32(task).ok_or(bad("task", u64::from(task)))?,
            precision: Precision::from_u32(precision).ok_or(bad("precision", u64::from(precision)))?,
            isa: Isa::from_u32(isa).ok_or(bad("isa", u64::from(isa)))?,
            pooling: Pooling::from_bits(pooling).ok_or(bad("pooling", u64::from(pooling)))?,
            normalize: flags & FLAG_NORMALIZE != 0,
            lower_case: flags & FLAG_LOWER_CASE != 0,
            hidden_dim: ranged("hidden_dim", 1, MAX_DIMENSION)?,
            output_dim: ranged("output_dim", 1, MAX_DIMENSION)?,
            max_seq_tokens: ranged("max_seq_tokens", 1, MAX_DIMENSION)?,
            vocab_size: ranged("vocab_size", 1, MAX_DIMENSION)?,
            layer_count: ranged("layer_count", 1, u64::from(MAX_TENSORS))?,
            section_count: ranged("section_count", 1, u64::from(MAX_SECTIONS))?,
            sections_offset: long("sections_offset"),
            tensor_count: ranged("tensor_count", 1, u64::from(MAX_TENSORS))?,
            directory_offset: long("directory_offset"),
            names_offset: long("names_offset"),
            names_bytes: long("names_bytes"),
            data_offset: long("data_offset"),
        };
        values.check_places(long("data_bytes"))?;
        Ok(CheckedHeader(values))
    }

    /// The checked values.
    pub fn values(&self) -> &HeaderValues {
        &self.0
    }
}

impl HeaderValues {
    /// The tables lie behind the header in the order sections, directory, names, section contents, data. With every
    /// offset bounded by `total_bytes` (at most 2^40) and every count bounded, no sum below can overflow.
    fn check_places(&self, data_bytes: u64) -> Result<(), ImageError> {
        let bad = |field: &'static str, value: u64| Err(ImageError::Header { field, value });
        for (field, value) in [
            ("sections_offset", self.sections_offset),
            ("directory_offset", self.directory_offset),
            ("names_offset", self.names_offset),
            ("data_offset", self.data_offset),
        ] {
            if value > self.total_bytes {
                return bad(field, value);
            }
        }
        if self.names_bytes > MAX_NAMES_BYTES {
            return bad("names_bytes", self.names_bytes);
        }
        let sections_end = self.sections_offset + u64::from(self.section_count) * SECTION_ENTRY_BYTES as u64;
        let directory_end = self.directory_offset + u64::from(self.tensor_count) * TENSOR_ENTRY_BYTES as u64;
        let names_end = self.names_offset + self.names_bytes;
        if self.sections_offset < HEADER_BYTES as u64 || !self.sections_offset.is_multiple_of(8) {
            return bad("sections_offset", self.sections_offset);
        }
        if self.directory_offset < sections_end || !self.directory_offset.is_multiple_of(8) {
            return bad("directory_offset", self.directory_offset);
        }
        if self.names_offset < directory_end {
            return bad("names_offset", self.names_offset);
        }
        if self.data_offset < names_end || !self.data_offset.is_multiple_of(PAGE_ALIGN_BYTES) {
            return bad("data_offset", self.data_offset);
        }
        if data_bytes != self.total_bytes - self.data_offset {
            return bad("data_bytes", data_bytes);
        }
        Ok(())
    }
}

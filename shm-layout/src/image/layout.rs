//! The byte layout of an image: the field tables, the bounds, and the offsets derived from them. No parsing here.

use crate::table::{Field, assert_packed, offset_of};
use std::ops::Range;

/// First bytes of every image.
pub const MAGIC: [u8; 8] = *b"MBIMAGE\0";
/// Version of this layout; any change of a table below increases it.
pub const LAYOUT_VERSION: u32 = 3;
/// Size of the header in bytes.
pub const HEADER_BYTES: usize = 256;
/// Size of one section entry in bytes.
pub const SECTION_ENTRY_BYTES: usize = 24;
/// Size of one tensor directory entry in bytes.
pub const TENSOR_ENTRY_BYTES: usize = 64;

/// Largest image, bytes. Keeps every offset far from overflow.
pub const MAX_IMAGE_BYTES: u64 = 1 << 40;
/// Most tensors in an image.
pub const MAX_TENSORS: u32 = 16_384;
/// Most sections in an image.
pub const MAX_SECTIONS: u32 = 32;
/// Largest section, bytes.
pub const MAX_SECTION_BYTES: u64 = 256 << 20;
/// Longest tensor name, bytes.
pub const MAX_NAME_BYTES: u32 = 256;
/// Largest name table, bytes.
pub const MAX_NAMES_BYTES: u64 = MAX_TENSORS as u64 * MAX_NAME_BYTES as u64;
/// Most dimensions of a tensor.
pub const MAX_RANK: u32 = 4;
/// Largest single dimension of a tensor.
pub const MAX_DIMENSION: u64 = 1 << 31;
/// Alignment of every tensor, bytes: one cache line, one AVX-512 register.
pub const TENSOR_ALIGN_BYTES: u64 = 64;
/// Alignment of tensors of at least this size, bytes: one page, so that they can be mapped alone.
pub const PAGE_ALIGN_BYTES: u64 = 4096;

/// Alignment in bytes that a tensor of `len_bytes` bytes has in an image.
pub const fn tensor_align_bytes(len_bytes: u64) -> u64 {
    if len_bytes >= PAGE_ALIGN_BYTES { PAGE_ALIGN_BYTES } else { TENSOR_ALIGN_BYTES }
}

/// The header, at offset 0. Bytes past the last field up to [`HEADER_BYTES`] are zero.
pub const HEADER_FIELDS: &[Field] = &[
    Field::new("magic", 0, 8, "[u8; 8]", "compiler", "`MBIMAGE` and a zero byte"),
    Field::new("layout_version", 8, 4, "u32", "compiler", "version of this layout"),
    Field::new("header_bytes", 12, 4, "u32", "compiler", "size of this header"),
    Field::new("total_bytes", 16, 8, "u64", "compiler", "length of the whole image"),
    Field::new(
        "content_hash",
        24,
        32,
        "[u8; 32]",
        "compiler",
        "BLAKE3 of the image with these 32 bytes as zero",
    ),
    Field::new(
        "family",
        56,
        4,
        "u32",
        "compiler",
        "model family: 1 BERT, 2 RoBERTa and XLM-RoBERTa, 3 MPNet, 4 ModernBERT, 5 Nomic BERT, 6 Qwen3, 7 Llama, 8 T5",
    ),
    Field::new("precision", 60, 4, "u32", "compiler", "precision of the matrices: 1 f32, 2 bf16, 3 int8"),
    Field::new("isa", 64, 4, "u32", "compiler", "instruction set the tensors are packed for: 1 any"),
    Field::new(
        "pooling",
        68,
        4,
        "u32",
        "compiler",
        "bit set, outputs concatenated in this order: 1 CLS, 2 max, 4 mean, 8 mean by square root of length, 16 last",
    ),
    Field::new(
        "flags",
        72,
        4,
        "u32",
        "compiler",
        "bit 0: vectors are L2-normalised; bit 1: texts are lower-cased first",
    ),
    Field::new("hidden_dim", 76, 4, "u32", "compiler", "width of the hidden state"),
    Field::new(
        "output_dim",
        80,
        4,
        "u32",
        "compiler",
        "length of an output vector; number of labels of a classifier; hidden_dim of a generator",
    ),
    Field::new(
        "max_seq_tokens",
        84,
        4,
        "u32",
        "compiler",
        "longest sequence with special tokens; longer ones are cut",
    ),
    Field::new("vocab_size", 88, 4, "u32", "compiler", "number of token ids"),
    Field::new("layer_count", 92, 4, "u32", "compiler", "number of layers; of a T5 those of its encoder"),
    Field::new("section_count", 96, 4, "u32", "compiler", "number of section entries"),
    Field::new("section_entry_bytes", 100, 4, "u32", "compiler", "size of one section entry"),
    Field::new("sections_offset", 104, 8, "u64", "compiler", "offset of the section entries"),
    Field::new("tensor_count", 112, 4, "u32", "compiler", "number of tensor directory entries"),
    Field::new("tensor_entry_bytes", 116, 4, "u32", "compiler", "size of one tensor directory entry"),
    Field::new("directory_offset", 120, 8, "u64", "compiler", "offset of the tensor directory"),
    Field::new("names_offset", 128, 8, "u64", "compiler", "offset of the name table: UTF-8, no separators"),
    Field::new("names_bytes", 136, 8, "u64", "compiler", "length of the name table"),
    Field::new("data_offset", 144, 8, "u64", "compiler", "offset of the first tensor, page-aligned"),
    Field::new("data_bytes", 152, 8, "u64", "compiler", "bytes from data_offset to the end of the image"),
    Field::new(
        "task",
        160,
        4,
        "u32",
        "compiler",
        "what the model is for: 1 embed, 2 classify, 3 text to text, 4 chat",
    ),
];

/// One section entry.
pub const SECTION_ENTRY_FIELDS: &[Field] = &[
    Field::new(
        "kind",
        0,
        4,
        "u32",
        "compiler",
        "1 model id (UTF-8), 2 config.json, 3 tokenizer.json (checked and cleaned), 4 sentence_bert_config.json, \
         5 config_sentence_transformers.json, 6 modules.json, 7 generation_config.json, 8 tokenizer_config.json, \
         9 chat template (Jinja), 10 tables of a Unigram tokenizer",
    ),
    Field::new("reserved", 4, 4, "u32", "compiler", "zero"),
    Field::new("offset", 8, 8, "u64", "compiler", "offset of the section in the image"),
    Field::new("len_bytes", 16, 8, "u64", "compiler", "length of the section"),
];

/// One tensor directory entry.
pub const TENSOR_ENTRY_FIELDS: &[Field] = &[
    Field::new("name_offset", 0, 4, "u32", "compiler", "offset of the name in the name table"),
    Field::new("name_bytes", 4, 4, "u32", "compiler", "length of the name"),
    Field::new("dtype", 8, 4, "u32", "compiler", "1 F32, 2 BF16, 3 I8, 4 bytes of quantised blocks"),
    Field::new("rank", 12, 4, "u32", "compiler", "number of dimensions, 1 to 4"),
    Field::new("shape", 16, 32, "[u64; 4]", "compiler", "dimensions, outermost first; past rank: zero"),
    Field::new("data_offset", 48, 8, "u64", "compiler", "offset of the data in the image"),
    Field::new(
        "len_bytes",
        56,
        8,
        "u64",
        "compiler",
        "length of the data: product of shape times size of dtype",
    ),
];

const _: () = assert_packed(HEADER_FIELDS, HEADER_BYTES);
const _: () = assert_packed(SECTION_ENTRY_FIELDS, SECTION_ENTRY_BYTES);
const _: () = assert_packed(TENSOR_ENTRY_FIELDS, TENSOR_ENTRY_BYTES);
const _: () = assert!(HEADER_FIELDS[HEADER_FIELDS.len() - 1].end() == RESERVED_FROM);
const _: () = assert!(TENSOR_ENTRY_FIELDS[TENSOR_ENTRY_FIELDS.len() - 1].end() == TENSOR_ENTRY_BYTES);
const _: () = assert!(SECTION_ENTRY_FIELDS[SECTION_ENTRY_FIELDS.len() - 1].end() == SECTION_ENTRY_BYTES);

/// First header byte that no field uses.
pub(super) const RESERVED_FROM: usize = 164;

/// Bytes of the image that the content hash itself occupies and that count as zero in it.
pub const fn content_hash_range() -> Range<usize> {
    const START: usize = offset_of(HEADER_FIELDS, "content_hash");
    START..START + 32
}

/// Reads the little-endian `u32` at `offset`; the caller has checked the range.
pub(super) fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(raw)
}

/// Reads the little-endian `u64` at `offset`; the caller has checked the range.
pub(super) fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(raw)
}

/// Writes a little-endian `u32` at `offset`.
pub(super) fn write_u32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

/// Writes a little-endian `u64` at `offset`.
pub(super) fn write_u64(bytes: &mut [u8], offset: usize, value: u64) {
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

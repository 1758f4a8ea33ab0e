//! The image: a compiled model as one flat object. Layout, checks and read-only views; no I/O, no hashing, no model knowledge.
//!
//! An image is written once and then only read, by processes that did not write it. So a reader believes nothing: the
//! header is parsed and range-checked by [`CheckedHeader`], everything behind it by [`CheckedImage`]. Both are total: any
//! bytes give either a view whose every offset lies inside the bytes, or an [`ImageError`].

mod bytes;
mod checked;
mod entry;
mod header;
mod layout;

pub use bytes::{HeapImage, ImageBytes};
pub use checked::{CheckedImage, TensorView};
pub use entry::{DType, SectionEntry, SectionKind, TensorEntry};
pub use header::{CheckedHeader, Family, HeaderValues, Isa, Pooling, Precision, Task};
pub use layout::{
    HEADER_BYTES, HEADER_FIELDS, LAYOUT_VERSION, MAGIC, MAX_DIMENSION, MAX_IMAGE_BYTES, MAX_NAME_BYTES,
    MAX_NAMES_BYTES, MAX_RANK, MAX_SECTION_BYTES, MAX_SECTIONS, MAX_TENSORS, PAGE_ALIGN_BYTES,
    SECTION_ENTRY_BYTES, SECTION_ENTRY_FIELDS, TENSOR_ALIGN_BYTES, TENSOR_ENTRY_BYTES, TENSOR_ENTRY_FIELDS,
    content_hash_range, tensor_align_bytes,
};

/// Why bytes are not a usable image. Every case names what was found, so that a report tells which field lies.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The object is shorter than a header.
    #[error(
        "image of {len_bytes} bytes is shorter than its header of {HEADER_BYTES} bytes; compile the model again"
    )]
    TooShort {
        /// Length of the object in bytes.
        len_bytes: u64,
    },
    /// The first bytes are not the image magic.
    #[error("not a model image: the magic bytes are missing; point to a file that this program compiled")]
    BadMagic,
    /// The image was written by a version with another layout.
    #[error(
        "image has layout version {found}, this program reads version {LAYOUT_VERSION}; compile the model again"
    )]
    Version {
        /// Version named in the header.
        found: u32,
    },
    /// A header field holds a value outside its range.
    #[error(
        "image header field `{field}` has the impossible value {value}; the image is corrupt, compile the model again"
    )]
    Header {
        /// Field of [`HEADER_FIELDS`].
        field: &'static str,
        /// The value found.
        value: u64,
    },
    /// The header's total length is not the length of the object.
    #[error(
        "image says it has {claimed_bytes} bytes but the object has {len_bytes}; it is truncated or was replaced"
    )]
    Length {
        /// Length named in the header, bytes.
        claimed_bytes: u64,
        /// Length of the object, bytes.
        len_bytes: u64,
    },
    /// A section entry is wrong.
    #[error("image section {index}: {reason}; the image is corrupt, compile the model again")]
    Section {
        /// Index in the section table.
        index: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A tensor directory entry is wrong.
    #[error("image tensor {index}: {reason}; the image is corrupt, compile the model again")]
    Tensor {
        /// Index in the tensor directory.
        index: u32,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The mapping does not start on the alignment that tensors rely on.
    #[error(
        "image bytes start at an address that is not a multiple of {TENSOR_ALIGN_BYTES}; map the object, do not copy it"
    )]
    Misaligned,
}

#[cfg(test)]
mod tests;

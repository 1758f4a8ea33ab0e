//! The checked view of a whole image: every table entry is verified once, so that later reads need no further checks.

use super::ImageError;
use super::entry::{DType, SectionEntry, SectionKind, TensorEntry};
use super::header::CheckedHeader;
use super::layout::{
    HEADER_BYTES, MAX_DIMENSION, MAX_NAME_BYTES, MAX_RANK, MAX_SECTION_BYTES, SECTION_ENTRY_BYTES,
    TENSOR_ENTRY_BYTES, tensor_align_bytes,
};
use std::collections::HashMap;

/// A tensor of a checked image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorView<'a> {
    /// Name, unique in the image.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    rank: usize,
    dimensions: [u64; MAX_RANK as usize],
    /// Offset of the data in the image, bytes; a multiple of 64.
    pub data_offset: u64,
    /// The data, little-endian, row-major.
    pub data: &'a [u8],
}

impl TensorView<'_> {
    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[u64] {
        &self.dimensions[..self.rank]
    }
}

/// An image all of whose offsets, lengths, names and shapes were checked against the bytes it borrows.
#[derive(Debug, Clone)]
pub struct CheckedImage<'a> {
    bytes: &'a [u8],
    header: CheckedHeader,
    sections: Vec<(SectionKind, &'a [u8])>,
    tensors: HashMap<&'a str, TensorView<'a>>,
    order: Vec<&'a str>,
}

impl<'a> CheckedImage<'a> {
    /// Checks `bytes` as an image. Reads header and tables only, never the tensors: cost grows with the number of
    /// tensors, not with their size. Whether the content is what the compiler wrote is the content hash's business.
    ///
    /// # Errors
    /// [`ImageError`] naming the first thing that is wrong.
    pub fn new(bytes: &'a [u8]) -> Result<Self, ImageError> {
        let len_bytes = bytes.len() as u64;
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(ImageError::TooShort { len_bytes });
        };
        let header = CheckedHeader::parse(head, len_bytes)?;
        let mut image =
            CheckedImage { bytes, header, sections: Vec::new(), tensors: HashMap::new(), order: Vec::new() };
        image.check_sections()?;
        image.check_tensors()?;
        Ok(image)
    }

    /// The checked header.
    pub fn header(&self) -> &CheckedHeader {
        &self.header
    }

    /// All bytes of the image.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The section of this kind, if the image has one.
    pub fn section(&self, kind: SectionKind) -> Option<&'a [u8]> {
        self.sections.iter().find(|(found, _)| *found == kind).map(|(_, data)| *data)
    }

    /// The tensor of this name, if the image has it.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'a>> {
        self.tensors.get(name).copied()
    }

    /// All tensors in the order in which they lie in the image.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'a>> + '_ {
        self.order.iter().filter_map(|name| self.tensor(name))
    }

    /// `bytes[start..start + len]` when that lies inside `low..high`, which lie inside the image.
    fn range(&self, start: u64, len: u64, low: u64, high: u64) -> Option<&'a [u8]> {
        let end = start.checked_add(len)?;
        if start < low || end > high {
            return None;
        }
        self.bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    /// Entry `index` of a table of entries of `N` bytes at `offset`; the header check bounded the table.
    fn entry<const N: usize>(&self, offset: u64, index: u32) -> Option<&'a [u8; N]> {
        let start = offset + u64::from(index) * N as u64;
        self.range(start, N as u64, 0, self.bytes.len() as u64)?.first_chunk()
    }

    fn check_sections(&mut self) -> Result<(), ImageError> {
        let values = self.header.values().clone();
        // Contents lie between the name table and the tensors, in the order of their entries.
        let mut low = values.names_offset + values.names_bytes;
        for index in 0..values.section_count {
            let bad = |reason: &'static str| ImageError::Section { index, reason };
            let raw = self
                .entry::<SECTION_ENTRY_BYTES>(values.sections_offset, index)
                .ok_or(bad("entry lies outside the image"))?;
            let entry = SectionEntry::decode(raw);
            let kind = SectionKind::from_u32(entry.kind).ok_or(bad("unknown kind"))?;
            if entry.reserved != 0 {
                return Err(bad("reserved bytes are not zero"));
            }
            if entry.len_bytes > MAX_SECTION_BYTES {
                return Err(bad("longer than any section may be"));
            }
            if self.section(kind).is_some() {
                return Err(bad("second section of one kind"));
            }
            let data = self
                .range(entry.offset, entry.len_bytes, low, values.data_offset)
                .ok_or(bad("contents overlap or lie outside the place of sections"))?;
            low = entry.offset + entry.len_bytes;
            self.sections.push((kind, data));
        }
        Ok(())
    }

    fn check_tensors(&mut self) -> Result<(), ImageError> {
        let values = self.header.values().clone();
        let mut low = values.data_offset;
        let names_end = values.names_offset + values.names_bytes;
        for index in 0..values.tensor_count {
            let bad = |reason: &'static str| ImageError::Tensor { index, reason };
            let raw = self
                .entry::<TENSOR_ENTRY_BYTES>(values.directory_offset, index)
                .ok_or(bad("entry lies outside the image"))?;
            let entry = TensorEntry::decode(raw);
            if entry.name_bytes == 0 || entry.name_bytes > MAX_NAME_BYTES {
                return Err(bad("name is empty or too long"));
            }
            let name_start = values.names_offset + u64::from(entry.name_offset);
            let name = self
                .range(name_start, u64::from(entry.name_bytes), values.names_offset, names_end)
                .ok_or(bad("name lies outside the name table"))?;
            let name = std::str::from_utf8(name).map_err(|_| bad("name is not UTF-8"))?;
            let dtype = DType::from_u32(entry.dtype).ok_or(bad("unknown dtype"))?;
            if entry.rank == 0 || entry.rank > MAX_RANK {
                return Err(bad("rank is not 1 to 4"));
            }
            let rank = entry.rank as usize;
            let mut len_bytes = dtype.size_bytes();
            for dimension in &entry.shape[..rank] {
                if *dimension == 0 || *dimension > MAX_DIMENSION {
                    return Err(bad("dimension is zero or absurd"));
                }
                len_bytes = len_bytes.checked_mul(*dimension).ok_or(bad("shape overflows"))?;
            }
            if entry.shape[rank..].iter().any(|dimension| *dimension != 0) {
                return Err(bad("dimensions past the rank are not zero"));
            }
            if len_bytes != entry.len_bytes {
                return Err(bad("length is not that of its shape"));
            }
            if !entry.data_offset.is_multiple_of(tensor_align_bytes(len_bytes)) {
                return Err(bad("data is not aligned"));
            }
            let data = self
                .range(entry.data_offset, len_bytes, low, values.total_bytes)
                .ok_or(bad("data overlaps or lies outside the image"))?;
            low = entry.data_offset + len_bytes;
            let view = TensorView {
                name,
                dtype,
                rank,
                dimensions: entry.shape,
                data_offset: entry.data_offset,
                data,
            };
            if self.tensors.insert(name, view).is_some() {
                return Err(bad("second tensor of one name"));
            }
            self.order.push(name);
        }
        Ok(())
    }
}

//! The image: foreign bytes as a whole, or a good image with some words replaced.

use super::reader::Reader;
use shm_layout::image::{
    CheckedHeader, CheckedImage, Family, HEADER_BYTES, HeaderValues, HeapImage, ImageBytes, Isa,
    PAGE_ALIGN_BYTES, Pooling, Precision, SECTION_ENTRY_BYTES, SectionEntry, SectionKind, TENSOR_ALIGN_BYTES,
    TENSOR_ENTRY_BYTES, Task, TensorEntry, tensor_align_bytes,
};

/// First byte even: the rest is the image. Odd: the rest is a list of changes of a good one.
pub fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    if input.u8() & 1 == 0 {
        check(input.rest());
    } else {
        let mut bytes = sample();
        while !input.is_empty() {
            let at = usize::from(input.u16()) % (TABLES_BYTES - 8);
            let len = usize::from(input.u8() % 9);
            for (to, from) in bytes[at..].iter_mut().zip(input.take(len)) {
                *to = *from;
            }
        }
        check(&bytes);
    }
}

/// Bytes of the sample that hold header, entries and names.
const TABLES_BYTES: usize = HEADER_BYTES + 3 * SECTION_ENTRY_BYTES + 3 * TENSOR_ENTRY_BYTES + 12;

fn check(bytes: &[u8]) {
    let copy = HeapImage::new(bytes);
    let bytes = copy.as_bytes();
    if let Some(head) = bytes.first_chunk::<HEADER_BYTES>() {
        for len in [bytes.len() as u64, 0, u64::MAX] {
            if let Ok(header) = CheckedHeader::parse(head, len) {
                // What was accepted is exactly what would be written.
                assert_eq!(&header.values().encode(), head);
            }
        }
    }
    let Ok(image) = CheckedImage::new(bytes) else { return };
    let range = bytes.as_ptr_range();
    let inside = |part: &[u8]| {
        let part = part.as_ptr_range();
        assert!(range.start <= part.start && part.end <= range.end);
    };
    let mut last_end = image.header().values().data_offset;
    let mut count = 0;
    for tensor in image.tensors() {
        let elements: u64 = tensor.shape().iter().product();
        assert_eq!(tensor.data.len() as u64, elements * tensor.dtype.size_bytes());
        assert!(tensor.data_offset.is_multiple_of(TENSOR_ALIGN_BYTES));
        assert!(tensor.data_offset >= last_end);
        last_end = tensor.data_offset + tensor.data.len() as u64;
        inside(tensor.data);
        assert_eq!(image.tensor(tensor.name), Some(tensor));
        count += 1;
    }
    assert_eq!(count, image.header().values().tensor_count);
    for kind in SectionKind::ALL {
        if let Some(section) = image.section(kind) {
            inside(section);
        }
    }
}

/// A small valid image with three sections and three tensors, one of them page-sized.
#[must_use]
pub fn sample() -> Vec<u8> {
    let sections: [(SectionKind, &[u8]); 3] = [
        (SectionKind::ModelId, b"a/model"),
        (SectionKind::Config, b"{}"),
        (SectionKind::Tokenizer, b"{\"a\":1}"),
    ];
    let tensors: [(&str, &[u64]); 3] = [("first", &[4, 4]), ("big", &[2, 512]), ("last", &[3])];
    let sections_offset = HEADER_BYTES as u64;
    let directory_offset = sections_offset + (sections.len() * SECTION_ENTRY_BYTES) as u64;
    let names_offset = directory_offset + (tensors.len() * TENSOR_ENTRY_BYTES) as u64;
    let names: String = tensors.iter().map(|(name, _)| *name).collect();
    let contents = names_offset + names.len() as u64;
    let (mut entries, mut body) = (Vec::new(), Vec::new());
    for (kind, data) in sections {
        let offset = contents + body.len() as u64;
        let entry = SectionEntry { kind: kind as u32, reserved: 0, offset, len_bytes: data.len() as u64 };
        entries.extend_from_slice(&entry.encode());
        body.extend_from_slice(data);
    }
    let data_offset = (contents + body.len() as u64).next_multiple_of(PAGE_ALIGN_BYTES);
    let (mut end, mut name_offset) = (data_offset, 0);
    for (name, dimensions) in tensors {
        let len_bytes = 4 * dimensions.iter().product::<u64>();
        let data_offset = end.next_multiple_of(tensor_align_bytes(len_bytes));
        end = data_offset + len_bytes;
        let mut shape = [0; 4];
        shape[..dimensions.len()].copy_from_slice(dimensions);
        let (name_bytes, rank) = (name.len() as u32, dimensions.len() as u32);
        let entry = TensorEntry { name_offset, name_bytes, dtype: 1, rank, shape, data_offset, len_bytes };
        name_offset += name_bytes;
        entries.extend_from_slice(&entry.encode());
    }
    let header = HeaderValues {
        total_bytes: end,
        content_hash: [7; 32],
        family: Family::Bert,
        task: Task::Embed,
        precision: Precision::F32,
        isa: Isa::Any,
        pooling: Pooling::MEAN,
        normalize: true,
        lower_case: false,
        hidden_dim: 4,
        output_dim: 4,
        max_seq_tokens: 16,
        vocab_size: 4,
        layer_count: 1,
        section_count: sections.len() as u32,
        sections_offset,
        tensor_count: tensors.len() as u32,
        directory_offset,
        names_offset,
        names_bytes: names.len() as u64,
        data_offset,
    };
    let mut out = header.encode().to_vec();
    out.extend(entries);
    out.extend(names.as_bytes());
    out.extend(body);
    out.resize(end as usize, 1);
    out
}

/// Inputs to start from: a good image, cut ones, and one lie per interesting field.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    use shm_layout::image::{HEADER_FIELDS, SECTION_ENTRY_FIELDS, TENSOR_ENTRY_FIELDS};
    let whole = [&[0][..], &sample()].concat();
    let mut seeds = vec![
        ("whole".into(), whole.clone()),
        ("header-only".into(), whole[..=HEADER_BYTES].to_vec()),
        ("cut-in-directory".into(), whole[..400].to_vec()),
        ("unchanged".into(), vec![1]),
    ];
    let first_tensor = HEADER_BYTES + 3 * SECTION_ENTRY_BYTES;
    let tables = [
        ("header", 0, HEADER_FIELDS),
        ("section", HEADER_BYTES + SECTION_ENTRY_BYTES, SECTION_ENTRY_FIELDS),
        ("tensor", first_tensor + TENSOR_ENTRY_BYTES, TENSOR_ENTRY_FIELDS),
    ];
    for (table, start, fields) in tables {
        for field in fields {
            let at = (start + field.offset) as u16;
            let len = field.size.min(8) as u8;
            let mut seed = vec![1];
            seed.extend_from_slice(&at.to_le_bytes());
            seed.push(len);
            seed.extend(std::iter::repeat_n(0xff, usize::from(len)));
            seeds.push((format!("{table}-{}", field.name), seed));
        }
    }
    seeds
}

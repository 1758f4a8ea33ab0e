//! Tests of the image checks: a good image passes, and no change of any byte, length or entry makes the checks panic.

use super::*;
use proptest::prelude::*;

fn pad(out: &mut Vec<u8>, align: u64) {
    while !(out.len() as u64).is_multiple_of(align) {
        out.push(0);
    }
}

/// A small valid image with three sections and three tensors, one of them page-sized.
fn sample() -> Vec<u8> {
    let sections: [(SectionKind, &[u8]); 3] = [
        (SectionKind::ModelId, b"a/model"),
        (SectionKind::Config, b"{}"),
        (SectionKind::Tokenizer, b"{\"a\":1}"),
    ];
    let tensors: [(&str, &[u64]); 3] = [("first", &[4, 4]), ("big", &[2, 1024]), ("last", &[3])];
    let sections_offset = HEADER_BYTES as u64;
    let directory_offset = sections_offset + (sections.len() * SECTION_ENTRY_BYTES) as u64;
    let names_offset = directory_offset + (tensors.len() * TENSOR_ENTRY_BYTES) as u64;
    let names: String = tensors.iter().map(|(name, _)| *name).collect();
    let mut body = Vec::new();
    let mut section_entries = Vec::new();
    let contents = names_offset + names.len() as u64;
    for (kind, data) in sections {
        let entry = SectionEntry {
            kind: kind as u32,
            reserved: 0,
            offset: contents + body.len() as u64,
            len_bytes: data.len() as u64,
        };
        section_entries.extend_from_slice(&entry.encode());
        body.extend_from_slice(data);
    }
    let data_offset = (contents + body.len() as u64).next_multiple_of(PAGE_ALIGN_BYTES);
    let mut end = data_offset;
    let mut directory = Vec::new();
    let mut name_offset = 0;
    for (name, dimensions) in tensors {
        let len_bytes = 4 * dimensions.iter().product::<u64>();
        let offset = end.next_multiple_of(tensor_align_bytes(len_bytes));
        end = offset + len_bytes;
        let mut shape = [0; 4];
        shape[..dimensions.len()].copy_from_slice(dimensions);
        let entry = TensorEntry {
            name_offset,
            name_bytes: name.len() as u32,
            dtype: 1,
            rank: dimensions.len() as u32,
            shape,
            data_offset: offset,
            len_bytes,
        };
        name_offset += name.len() as u32;
        directory.extend_from_slice(&entry.encode());
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
    out.extend(section_entries);
    out.extend(directory);
    out.extend(names.as_bytes());
    out.extend(body);
    pad(&mut out, PAGE_ALIGN_BYTES);
    out.resize(end as usize, 1);
    out
}

#[test]
fn a_good_image_is_accepted_and_read_back() {
    let bytes = sample();
    let image = CheckedImage::new(&bytes).expect("valid");
    assert_eq!(image.section(SectionKind::ModelId), Some(&b"a/model"[..]));
    assert_eq!(image.section(SectionKind::Modules), None);
    let big = image.tensor("big").expect("present");
    assert_eq!(big.shape(), &[2, 1024]);
    assert!(big.data_offset.is_multiple_of(PAGE_ALIGN_BYTES));
    assert_eq!(big.data.len(), 8192);
    assert_eq!(image.tensors().map(|tensor| tensor.name).collect::<Vec<_>>(), ["first", "big", "last"]);
    assert!(image.header().values().normalize);
}

#[test]
fn every_table_byte_matters_or_is_harmless_but_never_panics() {
    let good = sample();
    let tables = good.len().min(HEADER_BYTES + 3 * SECTION_ENTRY_BYTES + 3 * TENSOR_ENTRY_BYTES + 64);
    for position in 0..tables {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[position] ^= change;
            let _ = CheckedImage::new(&bytes);
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    let good = sample();
    for len in 0..good.len() {
        assert!(CheckedImage::new(&good[..len]).is_err(), "accepted at {len} bytes");
    }
}

#[test]
fn another_version_is_named() {
    let mut bytes = sample();
    bytes[8] = 9;
    assert_eq!(CheckedImage::new(&bytes).err(), Some(ImageError::Version { found: 9 }));
}

#[test]
fn heap_images_are_page_aligned() {
    let image = HeapImage::new(&sample());
    assert!((image.as_bytes().as_ptr() as usize).is_multiple_of(PAGE_ALIGN_BYTES as usize));
    assert_eq!(image.as_bytes(), sample());
}

/// Numbers that break careless arithmetic.
fn lie() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(u64::MAX - 7),
        Just(1 << 40),
        Just((1 << 40) + 4096),
        Just(u64::from(u32::MAX)),
        0..20_000u64,
        any::<u64>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn lying_fields_never_panic_and_views_stay_inside(fields in prop::collection::vec((0usize..520, lie()), 1..4)) {
        let mut bytes = sample();
        for (position, value) in fields {
            let position = position / 8 * 8;
            bytes[position..position + 8].copy_from_slice(&value.to_le_bytes());
        }
        if let Ok(image) = CheckedImage::new(&bytes) {
            for tensor in image.tensors() {
                let product: u64 = tensor.shape().iter().product();
                prop_assert_eq!(tensor.data.len() as u64, 4 * product);
                prop_assert!(tensor.data_offset.is_multiple_of(TENSOR_ALIGN_BYTES));
            }
        }
    }

    #[test]
    fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        prop_assert!(CheckedImage::new(&bytes).is_err());
    }

    #[test]
    fn noise_behind_a_good_magic_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 256..2048)) {
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&LAYOUT_VERSION.to_le_bytes());
        let _ = CheckedImage::new(&bytes);
    }
}

//! Files of saved vectors with bytes changed in them: what is still read must be what was written.

use super::reader::Reader;
use shm_layout::cache::{CacheKey, SAVED_HEADER_BYTES, SavedFormat, SavedRecord, saved_identity};

/// Length of a vector, number of records, and the records; then changes, each a place and what is flipped there; the last
/// one may cut the file.
pub fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    let dim = 1 + usize::from(input.u8() % 8);
    let Ok(format) = SavedFormat::new(saved_identity(&[b"fuzz"]), dim) else {
        panic!("{dim} numbers are allowed")
    };
    let mut file = format.header().to_vec();
    for _ in 0..input.u8() % 4 {
        let key = CacheKey::new(u64::from(input.u32()), u64::from(input.u32()));
        let record = SavedRecord { key, expires_at_ms: u64::from(input.word()) };
        let vector: Vec<f32> = (0..dim).map(|_| f32::from_bits(input.u32())).collect();
        let before = file.len();
        let is_finite = vector.iter().all(|number| number.is_finite());
        assert_eq!(format.encode(record, &vector, &mut file).is_ok(), is_finite);
        assert_eq!(file.len() - before, if is_finite { format.record_bytes() } else { 0 });
    }
    let good = file.clone();
    while !input.is_empty() {
        let at = usize::from(input.u16());
        match input.u8() {
            0 => file.truncate(at),
            flipped if !file.is_empty() => {
                let at = at % file.len();
                file[at] ^= flipped;
            }
            _ => {}
        }
    }
    let Some((header, records)) = file.split_at_checked(SAVED_HEADER_BYTES) else { return };
    let header: &[u8; SAVED_HEADER_BYTES] = header.try_into().expect("of this length");
    assert_eq!(format.check_header(header).is_ok(), *header == good[..SAVED_HEADER_BYTES]);
    let originals = good[SAVED_HEADER_BYTES..].chunks(format.record_bytes());
    for (bytes, original) in records.chunks(format.record_bytes()).zip(originals) {
        let mut vector = Vec::new();
        let read = format.decode(bytes, &mut vector);
        assert_eq!(
            read.is_ok(),
            bytes == original,
            "a record that was not written was read, or one that was is not"
        );
        assert_eq!(vector, if read.is_ok() { &original[32..] } else { &[] });
    }
}

/// Inputs to start from.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let record = |dim: usize| -> Vec<u8> {
        let head = [1u32, 2].iter().flat_map(|word| word.to_le_bytes()).chain([5]);
        head.chain((0..dim).flat_map(|i| (i as f32 + 0.5).to_le_bytes())).collect()
    };
    let file = |dim: u8, count: u8| -> Vec<u8> {
        let records = record(usize::from(dim)).repeat(usize::from(count));
        [&[dim - 1, count][..], &records].concat()
    };
    let mut seeds = Vec::new();
    let mut add = |name: &str, file: Vec<u8>, changes: &[u8]| {
        seeds.push((name.to_owned(), [file, changes.to_vec()].concat()))
    };
    add("empty", file(1, 0), &[]);
    for (dim, count) in [(1, 1), (2, 3), (8, 2)] {
        add(&format!("whole-{count}x{dim}"), file(dim, count), &[]);
    }
    for (name, at) in [("magic", 0u16), ("identity", 20), ("header-checksum", 60)] {
        let [low, high] = at.to_le_bytes();
        add(&format!("changed-{name}"), file(2, 2), &[low, high, 1]);
    }
    for (name, at) in [("key", 64u16), ("expiry", 80), ("checksum", 90), ("number", 100)] {
        let [low, high] = at.to_le_bytes();
        add(&format!("changed-{name}"), file(2, 2), &[low, high, 0x80]);
    }
    add("changed-and-back", file(2, 2), &[100, 0, 4, 100, 0, 4]);
    add("cut-in-header", file(2, 2), &[30, 0, 0]);
    add("cut-in-record", file(2, 2), &[110, 0, 0]);
    add("not-finite", [&[0, 1][..], &[1, 0, 0, 0, 2, 0, 0, 0, 5], &f32::NAN.to_le_bytes()].concat(), &[]);
    seeds
}

//! Vectors in a file, so that a cache outlives its broker: the bytes of the file's header and of one record. Reading and
//! writing files is the engine's, expiry is judged where a clock is.
//!
//! The file is a stranger's: its owner, a disk or a power cut may have changed any byte. The header must be exactly the one
//! that this program would write for this model; a record must carry a checksum that is keyed with the model's identity.
//! Whatever does not is left out, so no byte of a file can lead to a wrong vector by accident. Against somebody who means it
//! no checksum helps: a file that another user could have written is not opened at all.

use super::key::CacheKey;
use super::layout::MAX_CACHE_DIM;
use crate::table::{Field, assert_packed, offset_of};

/// First eight bytes of every file of saved vectors.
pub const SAVED_MAGIC: [u8; 8] = *b"MBVECTOR";
/// Version of header and records.
pub const SAVED_VERSION: u32 = 1;
/// What the names of these files end in.
pub const SAVED_FILE_ENDING: &str = ".mbvc";
/// Bytes of the header.
pub const SAVED_HEADER_BYTES: usize = 64;
/// Separates identities from all other hashes.
const IDENTITY_DOMAIN: &[u8] = b"modelbroker saved vectors 1\0";

/// The file's header.
pub const SAVED_HEADER_FIELDS: &[Field] = &[
    Field::new("magic", 0, 8, "[u8; 8]", "engine", "`MBVECTOR`"),
    Field::new("version", 8, 4, "u32", "engine", "1"),
    Field::new("dim", 12, 4, "u32", "engine", "numbers in a vector"),
    Field::new("identity", 16, 32, "[u8; 32]", "engine", "names all that a vector depends on but the text"),
    Field::new("record_bytes", 48, 8, "u64", "engine", "size of a record, 32 + 4 × dim"),
    Field::new("checksum", 56, 8, "u64", "engine", "of the bytes before it"),
];
const _: () = assert_packed(SAVED_HEADER_FIELDS, SAVED_HEADER_BYTES);

/// One record; records follow the header and each other without gaps.
pub const SAVED_RECORD_FIELDS: &[Field] = &[
    Field::new("key_low", 0, 8, "u64", "engine", "bits 0 to 63 of the key, never 0"),
    Field::new("key_high", 8, 8, "u64", "engine", "bits 64 to 127 of the key"),
    Field::new(
        "expires_at_ms",
        16,
        8,
        "u64",
        "engine",
        "wall clock, ms since 1970; 0 = as the cache is set up",
    ),
    Field::new("checksum", 24, 8, "u64", "engine", "of the bytes before and after it"),
    Field::new("vector", 32, 4, "f32", "engine", "the first of `dim` numbers; the others follow"),
];
const _: () = assert_packed(SAVED_RECORD_FIELDS, 36);

const HEADER_CHECKSUM: usize = offset_of(SAVED_HEADER_FIELDS, "checksum");
const KEY_LOW: usize = offset_of(SAVED_RECORD_FIELDS, "key_low");
const KEY_HIGH: usize = offset_of(SAVED_RECORD_FIELDS, "key_high");
const EXPIRES_AT: usize = offset_of(SAVED_RECORD_FIELDS, "expires_at_ms");
const CHECKSUM: usize = offset_of(SAVED_RECORD_FIELDS, "checksum");
const VECTOR: usize = offset_of(SAVED_RECORD_FIELDS, "vector");

/// Why bytes of a file are not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SavedFault {
    /// No file can hold such vectors.
    #[error("vectors of {dim} numbers are not kept; 1 to {MAX_CACHE_DIM} are")]
    Dim {
        /// Numbers in a vector.
        dim: usize,
    },
    /// The header is not the one that is written for this model by this version.
    #[error("saved vectors: field {0} of the header is another model's, another version's, or damaged")]
    Header(&'static str),
    /// A record is damaged.
    #[error("saved vectors: a record is damaged")]
    Record,
}

/// What a record says besides its vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedRecord {
    /// What the vector is found by.
    pub key: CacheKey,
    /// When it expires: ms since 1970; 0 = as the cache is set up.
    pub expires_at_ms: u64,
}

/// The identity of a model for [`SavedFormat`]: a hash of everything that its vectors depend on but the text, as `parts`
/// whose boundaries count.
#[must_use]
pub fn saved_identity(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(IDENTITY_DOMAIN);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    *hasher.finalize().as_bytes()
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn first_word(hash: &blake3::Hash) -> u64 {
    word(hash.as_bytes(), 0)
}

/// How the vectors of one model lie in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedFormat {
    identity: [u8; 32],
    dim: usize,
}

impl SavedFormat {
    /// For vectors of `dim` numbers of the model that `identity` names.
    ///
    /// # Errors
    /// [`SavedFault::Dim`] for vectors that no cache holds.
    pub fn new(identity: [u8; 32], dim: usize) -> Result<SavedFormat, SavedFault> {
        if dim == 0 || dim > MAX_CACHE_DIM {
            return Err(SavedFault::Dim { dim });
        }
        Ok(SavedFormat { identity, dim })
    }

    /// The file's name: half of the identity in hexadecimal digits, the length of a vector, `.mbvc`.
    #[must_use]
    pub fn file_name(&self) -> String {
        let digits: String = self.identity[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digits}-{}{SAVED_FILE_ENDING}", self.dim)
    }

    /// Bytes of one record.
    #[must_use]
    pub const fn record_bytes(&self) -> usize {
        VECTOR + 4 * self.dim
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> [u8; SAVED_HEADER_BYTES] {
        let mut bytes = [0; SAVED_HEADER_BYTES];
        let mut put = |name, value: &[u8]| {
            let at = offset_of(SAVED_HEADER_FIELDS, name);
            bytes[at..at + value.len()].copy_from_slice(value);
        };
        put("magic", &SAVED_MAGIC);
        put("version", &SAVED_VERSION.to_le_bytes());
        put("dim", &(self.dim as u32).to_le_bytes());
        put("identity", &self.identity);
        put("record_bytes", &(self.record_bytes() as u64).to_le_bytes());
        let checksum = first_word(&blake3::hash(&bytes[..HEADER_CHECKSUM]));
        bytes[HEADER_CHECKSUM..].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// Checks a header that was read: there is only one that is right.
    ///
    /// # Errors
    /// [`SavedFault::Header`] naming the first field that differs.
    pub fn check_header(&self, bytes: &[u8; SAVED_HEADER_BYTES]) -> Result<(), SavedFault> {
        let wanted = self.header();
        match SAVED_HEADER_FIELDS.iter().find(|f| bytes[f.offset..f.end()] != wanted[f.offset..f.end()]) {
            Some(field) => Err(SavedFault::Header(field.name)),
            None => Ok(()),
        }
    }

    /// First 64 bits of BLAKE3, keyed with the identity, over the record without its checksum.
    fn checksum(&self, record: &[u8]) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.identity);
        hasher.update(&record[..CHECKSUM]).update(&record[VECTOR..]);
        first_word(&hasher.finalize())
    }

    /// Appends a record to `into`.
    ///
    /// # Errors
    /// [`SavedFault::Record`], and nothing appended, when `vector` has another length than the format's or a number that is
    /// not finite.
    pub fn encode(&self, record: SavedRecord, vector: &[f32], into: &mut Vec<u8>) -> Result<(), SavedFault> {
        if vector.len() != self.dim || !vector.iter().all(|number| number.is_finite()) {
            return Err(SavedFault::Record);
        }
        let from = into.len();
        for number in [record.key.low, record.key.high, record.expires_at_ms, 0] {
            into.extend_from_slice(&number.to_le_bytes());
        }
        for number in vector {
            into.extend_from_slice(&number.to_le_bytes());
        }
        let checksum = self.checksum(&into[from..]);
        into[from + CHECKSUM..from + VECTOR].copy_from_slice(&checksum.to_le_bytes());
        Ok(())
    }

    /// Reads one record: appends its vector to `into` as little-endian bytes, as they lie in the record and in messages.
    ///
    /// # Errors
    /// [`SavedFault::Record`], and nothing appended, when `bytes` are not [`SavedFormat::record_bytes`] that were written for
    /// this model, or a number is not finite.
    pub fn decode(&self, bytes: &[u8], into: &mut Vec<u8>) -> Result<SavedRecord, SavedFault> {
        if bytes.len() != self.record_bytes() || word(bytes, CHECKSUM) != self.checksum(bytes) {
            return Err(SavedFault::Record);
        }
        let (low, vector) = (word(bytes, KEY_LOW), &bytes[VECTOR..]);
        let mut numbers = vector.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number));
        if low == 0 || !numbers.all(f32::is_finite) {
            return Err(SavedFault::Record);
        }
        into.extend_from_slice(vector);
        let key = CacheKey::new(low, word(bytes, KEY_HIGH));
        Ok(SavedRecord { key, expires_at_ms: word(bytes, EXPIRES_AT) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(dim: usize) -> SavedFormat {
        SavedFormat::new(saved_identity(&[b"weights", b"path"]), dim).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        for dim in [1, 2, 3, 384] {
            let format = format(dim);
            let vector: Vec<f32> = (0..dim).map(|i| i as f32 - 0.5).collect();
            let record = SavedRecord { key: CacheKey::of_text("a"), expires_at_ms: 77 };
            let mut bytes = vec![9];
            format.encode(record, &vector, &mut bytes).unwrap();
            assert_eq!(bytes.len(), 1 + format.record_bytes());
            let mut out = vec![1];
            assert_eq!(format.decode(&bytes[1..], &mut out), Ok(record));
            let numbers: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
            assert_eq!(out[1..], numbers);
            format.check_header(&format.header()).unwrap();
        }
        for dim in [0, MAX_CACHE_DIM + 1] {
            assert_eq!(SavedFormat::new([0; 32], dim), Err(SavedFault::Dim { dim }));
        }
    }

    #[test]
    fn what_is_no_vector_is_neither_written_nor_read() {
        let format = format(2);
        let record = SavedRecord { key: CacheKey::of_text("a"), expires_at_ms: 0 };
        let mut bytes = Vec::new();
        for bad in [&[1.0][..], &[1.0, 2.0, 3.0], &[f32::NAN, 0.0], &[0.0, f32::INFINITY]] {
            assert_eq!(format.encode(record, bad, &mut bytes), Err(SavedFault::Record));
        }
        assert!(bytes.is_empty());
        format.encode(record, &[1.0, 2.0], &mut bytes).unwrap();
        // A right checksum does not make it one.
        for (at, wrong) in [(KEY_LOW, 0u64.to_le_bytes()), (VECTOR, 0x7fc0_0000u64.to_le_bytes())] {
            let mut bytes = bytes.clone();
            bytes[at..at + 8].copy_from_slice(&wrong);
            let checksum = format.checksum(&bytes).to_le_bytes();
            bytes[CHECKSUM..VECTOR].copy_from_slice(&checksum);
            assert_eq!(format.decode(&bytes, &mut Vec::new()), Err(SavedFault::Record));
        }
    }

    #[test]
    fn no_changed_bit_goes_unseen() {
        let format = format(3);
        let step = if cfg!(miri) { 97 } else { 1 };
        for bit in (0..8 * SAVED_HEADER_BYTES).step_by(step) {
            let mut header = format.header();
            header[bit / 8] ^= 1 << (bit % 8);
            let field =
                SAVED_HEADER_FIELDS.iter().find(|f| (f.offset..f.end()).contains(&(bit / 8))).unwrap();
            assert_eq!(format.check_header(&header), Err(SavedFault::Header(field.name)));
        }
        let mut record = Vec::new();
        let told = SavedRecord { key: CacheKey::of_text("a"), expires_at_ms: 9 };
        format.encode(told, &[1.0, 2.0, 3.0], &mut record).unwrap();
        for bit in (0..8 * record.len()).step_by(step) {
            let mut record = record.clone();
            record[bit / 8] ^= 1 << (bit % 8);
            let mut out = Vec::new();
            assert_eq!(format.decode(&record, &mut out), Err(SavedFault::Record), "bit {bit}");
            assert!(out.is_empty());
        }
    }

    #[test]
    fn models_do_not_read_each_others_records() {
        let (ours, other) = (format(2), SavedFormat::new(saved_identity(&[b"weightsp", b"ath"]), 2).unwrap());
        assert_ne!(ours.file_name(), other.file_name());
        assert_eq!(other.check_header(&ours.header()), Err(SavedFault::Header("identity")));
        assert_eq!(format(3).check_header(&ours.header()), Err(SavedFault::Header("dim")));
        let mut bytes = Vec::new();
        ours.encode(SavedRecord { key: CacheKey::of_text("a"), expires_at_ms: 0 }, &[1.0, 2.0], &mut bytes)
            .unwrap();
        assert_eq!(other.decode(&bytes, &mut Vec::new()), Err(SavedFault::Record));
        assert_eq!(ours.decode(&bytes[1..], &mut Vec::new()), Err(SavedFault::Record));
    }
}

//! Where everything lies in a cache region. The tables here are the layout: the code takes its offsets from them and
//! `docs/layout.md` is rendered from them.

use super::memory::{CacheRead, CacheWrite};
use crate::table::{Field, assert_packed, offset_of};
use std::sync::atomic::Ordering;

/// First eight bytes of every cache region.
pub const CACHE_MAGIC: u64 = u64::from_le_bytes(*b"MBCACHE1");
/// Entries that one set holds.
pub const WAYS: usize = 8;
/// Most vectors that one cache may hold.
pub const MAX_CACHE_ENTRIES: usize = 1 << 20;
/// Longest vector that is kept, numbers.
pub const MAX_CACHE_DIM: usize = 1 << 16;
/// Largest cache region, bytes. A cache that would be larger holds fewer entries.
pub const MAX_CACHE_BYTES: usize = 4 << 30;
/// Bytes of the header.
const HEADER_BYTES: usize = 64;
/// What entries and tag lines are multiples of.
const LINE_BYTES: usize = 64;

/// The region's header: written once by the broker, checked once by each reader; but for its last word.
pub const CACHE_HEADER_FIELDS: &[Field] = &[
    Field::new("magic", 0, 8, "u64", "broker", "`MBCACHE1`"),
    Field::new("layout_hash", 8, 8, "u64", "broker", "hash of the tables of this region"),
    Field::new("region_bytes", 16, 8, "u64", "broker", "size of the whole region"),
    Field::new("fingerprint", 24, 8, "u64", "broker", "the model's, as in answers"),
    Field::new("sets", 32, 8, "u64", "broker", "sets of 8 entries"),
    Field::new("dim", 40, 8, "u64", "broker", "numbers in a vector"),
    Field::new("entry_bytes", 48, 8, "u64", "broker", "size of one entry, a multiple of 64"),
    Field::new(
        "superseded_by",
        56,
        8,
        "atomic u64",
        "broker",
        "the generation that replaced this one's; 0 = none has",
    ),
];
const _: () = assert_packed(CACHE_HEADER_FIELDS, HEADER_BYTES);

pub(super) const SUPERSEDED_BY: usize = offset_of(CACHE_HEADER_FIELDS, "superseded_by");

/// One entry; the numbers follow, padded with zeros.
pub const CACHE_ENTRY_FIELDS: &[Field] = &[
    Field::new("sequence", 0, 8, "atomic u64", "broker", "even = whole, odd = being written, 0 = never used"),
    Field::new("key_low", 8, 8, "atomic u64", "broker", "bits 0 to 63 of the key"),
    Field::new("key_high", 16, 8, "atomic u64", "broker", "bits 64 to 127 of the key"),
    Field::new("expires_at_ns", 24, 8, "atomic u64", "broker", "`CLOCK_MONOTONIC`, ns; 0 = never"),
    Field::new("vector", 32, 8, "atomic u64", "broker", "the first two of `dim` f32; the others follow"),
];
const _: () = assert_packed(CACHE_ENTRY_FIELDS, 40);
pub(super) const SEQUENCE: usize = offset_of(CACHE_ENTRY_FIELDS, "sequence");
pub(super) const KEY_LOW: usize = offset_of(CACHE_ENTRY_FIELDS, "key_low");
pub(super) const KEY_HIGH: usize = offset_of(CACHE_ENTRY_FIELDS, "key_high");
pub(super) const EXPIRES_AT: usize = offset_of(CACHE_ENTRY_FIELDS, "expires_at_ns");
pub(super) const VECTOR: usize = offset_of(CACHE_ENTRY_FIELDS, "vector");

/// Hash (FNV-1a, 64 bits) of every number of this layout.
pub const CACHE_LAYOUT_HASH: u64 = {
    let mut hash = crate::table::fnv(0xcbf2_9ce4_8422_2325, WAYS as u64);
    let tables = [CACHE_HEADER_FIELDS, CACHE_ENTRY_FIELDS];
    let mut t = 0;
    while t < tables.len() {
        let mut f = 0;
        while f < tables[t].len() {
            hash = crate::table::fnv(hash, tables[t][f].offset as u64);
            hash = crate::table::fnv(hash, tables[t][f].size as u64);
            f += 1;
        }
        t += 1;
    }
    hash
};

/// A region that is not a cache of this layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CacheFault {
    /// A field of the header is wrong.
    #[error(
        "cache header: field {0} is not what this layout writes; broker and client must be of one version"
    )]
    Header(&'static str),
    /// No such cache can be laid out.
    #[error(
        "a cache of {entries} vectors of {dim} numbers cannot be laid out; give 1 to {MAX_CACHE_ENTRIES} entries"
    )]
    Geometry {
        /// Entries asked for.
        entries: usize,
        /// Numbers in a vector.
        dim: usize,
    },
}

/// Sizes and places in a region; private to each process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheGeometry {
    /// Sets of [`WAYS`] entries.
    pub sets: usize,
    /// Numbers in a vector.
    pub dim: usize,
}

impl CacheGeometry {
    /// A region with room for about `entries` vectors: a quarter more slots, because sets do not fill evenly, and fewer
    /// where it would be larger than [`MAX_CACHE_BYTES`].
    ///
    /// # Errors
    /// [`CacheFault::Geometry`] for no entries, too many, or vectors that cannot be kept.
    pub fn for_entries(entries: usize, dim: usize) -> Result<CacheGeometry, CacheFault> {
        if entries == 0 || entries > MAX_CACHE_ENTRIES || dim == 0 || dim > MAX_CACHE_DIM {
            return Err(CacheFault::Geometry { entries, dim });
        }
        let of_one_set = CacheGeometry { sets: 1, dim }.region_bytes() - HEADER_BYTES;
        let most_sets = ((MAX_CACHE_BYTES - 4096) / of_one_set).max(1);
        let sets = (entries + entries / 4).div_ceil(WAYS).min(most_sets);
        Ok(CacheGeometry { sets, dim })
    }

    /// Bytes of one entry.
    #[must_use]
    pub const fn entry_bytes(&self) -> usize {
        (VECTOR + 4 * self.dim).next_multiple_of(LINE_BYTES)
    }

    /// Entries that there is room for.
    #[must_use]
    pub const fn slots(&self) -> usize {
        self.sets * WAYS
    }

    /// Bytes of the whole region.
    #[must_use]
    pub const fn region_bytes(&self) -> usize {
        HEADER_BYTES + self.sets * (LINE_BYTES + WAYS * self.entry_bytes())
    }

    /// The set in which a key lies. The product spreads the upper bits over all sets without a bias worth naming.
    pub(super) const fn set_of(&self, key_high: u64) -> usize {
        ((key_high as u128 * self.sets as u128) >> 64) as usize
    }

    pub(super) const fn tag_at(&self, set: usize, way: usize) -> usize {
        HEADER_BYTES + set * LINE_BYTES + 8 * way
    }

    pub(super) const fn entry_at(&self, set: usize, way: usize) -> usize {
        HEADER_BYTES + self.sets * LINE_BYTES + (set * WAYS + way) * self.entry_bytes()
    }

    /// Words that a vector takes.
    pub(super) const fn vector_words(&self) -> usize {
        self.dim.div_ceil(2)
    }

    /// Writes the header of a fresh region.
    pub(super) fn write_header<M: CacheWrite>(&self, memory: &M, fingerprint: u64) {
        for (name, value) in self.header(fingerprint) {
            memory.store(offset_of(CACHE_HEADER_FIELDS, name), value, Ordering::Relaxed);
        }
    }

    fn header(&self, fingerprint: u64) -> [(&'static str, u64); 7] {
        [
            ("magic", CACHE_MAGIC),
            ("layout_hash", CACHE_LAYOUT_HASH),
            ("region_bytes", self.region_bytes() as u64),
            ("fingerprint", fingerprint),
            ("sets", self.sets as u64),
            ("dim", self.dim as u64),
            ("entry_bytes", self.entry_bytes() as u64),
        ]
    }

    /// Reads and checks the header of a region against what the reader was told otherwise.
    pub(super) fn check<M: CacheRead>(
        memory: &M,
        dim: usize,
        fingerprint: u64,
    ) -> Result<CacheGeometry, CacheFault> {
        if memory.len_bytes() < HEADER_BYTES {
            return Err(CacheFault::Header("region_bytes"));
        }
        let get = |name| memory.load(offset_of(CACHE_HEADER_FIELDS, name), Ordering::Relaxed);
        // Each word is read once; geometry comes from the copy.
        let sets = get("sets");
        if dim == 0 || dim > MAX_CACHE_DIM {
            return Err(CacheFault::Header("dim"));
        }
        if sets == 0 || sets > (2 * MAX_CACHE_ENTRIES / WAYS) as u64 {
            return Err(CacheFault::Header("sets"));
        }
        let geometry = CacheGeometry { sets: sets as usize, dim };
        for (name, value) in geometry.header(fingerprint) {
            if name != "sets" && get(name) != value {
                return Err(CacheFault::Header(name));
            }
        }
        if memory.len_bytes() != geometry.region_bytes() {
            return Err(CacheFault::Header("region_bytes"));
        }
        Ok(geometry)
    }
}

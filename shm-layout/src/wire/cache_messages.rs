//! What the messages say about vector caches. Plain data; the order of fields is the encoding: append, never reorder.

use super::{Decode, Encode};

/// A vector cache as its readers are told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct CacheDescription {
    /// Size of the region in bytes.
    pub region_bytes: u64,
}

/// State of one vector cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct CacheReport {
    /// Vectors that it holds, expired ones that nothing has replaced counted.
    pub entries: u64,
    /// Most vectors that it holds.
    pub capacity: u64,
    /// Size of its region; pages that were never written take no memory.
    pub region_bytes: u64,
    /// What was found in it and what was not.
    pub totals: CacheTotals,
}

/// What was found in a vector cache, in the life of the present engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct CacheTotals {
    /// Texts that clients found in their own process, as they say.
    pub client_hits: u64,
    /// Texts that clients did not find there, as they say; the engine looks for them again.
    pub client_misses: u64,
    /// Texts that the engine found.
    pub engine_hits: u64,
    /// Texts that it computed because they were not there.
    pub engine_misses: u64,
    /// Texts that it did not compute because another job of the same batch had the same text.
    pub shared: u64,
}

/// What a vector of a [`super::FromEngine::CacheInsert`] is found by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct CacheInsertKey {
    /// Bits 0 to 63 of the key.
    pub low: u64,
    /// Bits 64 to 127 of the key.
    pub high: u64,
    /// Time until it expires, in ms, when it is old already; 0 = as the broker is set up.
    pub left_ms: u64,
}

//! The vector cache of one model generation: layout, keys, the one writer's end and the readers' end, and how its vectors lie
//! in a file. No system calls and no clock: mapping and files live in `shm-os`, times are arguments.
//!
//! # Who may do what
//! One process writes: the broker, in the one writable mapping that will ever exist (the object is sealed with
//! `F_SEAL_FUTURE_WRITE` behind it). Engines and clients map it read-only, so none of them can change what another one
//! reads. The header is checked once, on mapping; geometry is private from then on.
//!
//! # Why no torn vector is ever seen
//! Each entry is a seqlock (Boehm, "Can seqlocks get along with programming language memory models?", MSPC 2012): the
//! writer makes the sequence odd, fences, writes key, expiry and numbers, and makes it even again with Release. A reader
//! takes the sequence with Acquire, copies, fences, and takes it again: equal and even means that what it copied is one
//! entry. All words are relaxed atomics, so that there is no data race in between. After [`READ_TRIES`] the answer is a
//! miss, so a reader never waits. A writer that dies in the middle leaves an odd sequence: that slot is a miss.
//!
//! # Why no wrong vector is ever seen
//! An entry answers only for the 128 bits of BLAKE3 that it carries ([`CacheKey`]), and weights, precision and pooling are
//! those of the generation. Tags are hints: a wrong one leads to an entry whose key differs.

mod key;
mod layout;
mod memory;
mod reader;
mod saved;
mod writer;

pub use key::CacheKey;
pub use layout::{
    CACHE_ENTRY_FIELDS, CACHE_HEADER_FIELDS, CACHE_LAYOUT_HASH, CACHE_MAGIC, CacheFault, CacheGeometry,
    MAX_CACHE_BYTES, MAX_CACHE_DIM, MAX_CACHE_ENTRIES, WAYS,
};
pub use memory::{CacheRead, CacheWrite, HeapCacheMemory, RawCacheReader, RawCacheWriter};
pub use reader::{CacheReader, READ_TRIES};
pub use saved::{
    SAVED_FILE_ENDING, SAVED_HEADER_BYTES, SAVED_HEADER_FIELDS, SAVED_MAGIC, SAVED_RECORD_FIELDS,
    SAVED_VERSION, SavedFault, SavedFormat, SavedRecord, saved_identity,
};
pub use writer::{CacheWriter, Insert};

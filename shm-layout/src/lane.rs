//! The lane region: one client's jobs and their answers, in memory that both sides map. Layout, both ends of the
//! protocol, and the memory they work on. No system calls: waiting and waking live in `shm-os`.
//!
//! # Protocol
//! The **client** writes input into an arena slot, fills a free *job cell* and publishes its number in the *submission
//! ring*. The **engine** takes entries, computes, writes output into the arena slot that the client named, publishes an
//! entry in the *completion ring*, then marks the cell done. Answers come in any order. A job's cell and arena slots
//! are the client's again once it has reaped the completion.
//!
//! # What the other side can change under you
//! Everything, at any time: both sides map the region writable. So geometry is never read from it, every index is read
//! once and checked against private state, every entry is copied out before it is checked, and payload bytes are copied
//! before they are interpreted. A peer that breaks the rules gets a [`LaneFault`]; memory outside the region is never
//! touched.
//!
//! # Death of an engine
//! The region outlives it. [`EngineLane::adopt`] finds what was submitted and not answered, including jobs that a dead
//! engine had taken, and answers each exactly once, at whichever instant it died: a completion that was published but
//! not yet marked done can only be the last one in the ring, and adopting looks at that one first.
//!
//! # Wake-ups
//! Each sleeper announces itself, fences, and looks again; each waker publishes, fences, and looks for a sleeper. The
//! two `SeqCst` fences of a pair make it impossible that both miss each other; loom and Miri find it when one is taken
//! away.

mod client;
mod engine;
mod fault;
mod geometry;
mod memory;

pub use client::{ClientLane, Completion, JobRequest, OutputSlot, SubmitError, Ticket};
pub use engine::{CheckedJob, EngineLane};
pub use fault::LaneFault;
pub use geometry::{
    CLIENT_CELL_FIELDS, COMPLETION_ENTRY_FIELDS, CONTROL_FIELDS, ENGINE_CELL_FIELDS, Geometry,
    LANE_HEADER_FIELDS, LANE_MAGIC, LAYOUT_HASH, LINE_BYTES, REGION_BYTES, SUBMISSION_ENTRY_FIELDS,
    SlotClass,
};
pub use memory::{HeapLaneMemory, LaneMemory, RawLaneMemory};

/// Writes a fresh region: header and control words. Called once, by the broker, before anybody else has the region.
pub fn initialize<M: LaneMemory>(memory: &M, geometry: &Geometry, lane_id: u64) {
    geometry::write_header(memory, geometry, lane_id);
}

/// Publishes the client's counts of texts found in the cache and not found, for the engine's statistics.
pub fn publish_cache_counts<M: LaneMemory>(memory: &M, hits: u64, misses: u64) {
    memory.store_u64(geometry::CACHE_HITS, hits, std::sync::atomic::Ordering::Relaxed);
    memory.store_u64(geometry::CACHE_MISSES, misses, std::sync::atomic::Ordering::Relaxed);
}

/// The client's counts of texts found in the cache and not found: whatever the client says, worth a statistic.
pub fn cache_counts<M: LaneMemory>(memory: &M) -> (u64, u64) {
    let load = |at| memory.load_u64(at, std::sync::atomic::Ordering::Relaxed);
    (load(geometry::CACHE_HITS), load(geometry::CACHE_MISSES))
}

/// Checks the header of a region that was received, against this build's layout.
///
/// # Errors
/// [`LaneFault::Header`] when it was made by another layout.
pub fn check_header<M: LaneMemory>(memory: &M, geometry: &Geometry) -> Result<u64, LaneFault> {
    geometry::check_header(memory, geometry)
}

//! Where everything lies in a lane region. The tables here are the layout: the code takes its offsets from them and
//! `docs/layout.md` is rendered from them.

use super::fault::LaneFault;
use super::memory::LaneMemory;
use crate::table::{Field, assert_packed, fnv, offset_of};
use std::sync::atomic::Ordering;

/// Distance between words of different writers: two cache lines, so that the adjacent-line prefetcher does not couple
/// them either.
pub const LINE_BYTES: usize = 128;
/// First eight bytes of every lane region.
pub const LANE_MAGIC: u64 = u64::from_le_bytes(*b"MBLANE01");
/// Bytes of the region's header.
const HEADER_BYTES: usize = 256;
/// Slot classes in the arena.
const CLASS_COUNT: usize = 5;

/// The region's header: written once by the broker, for the receiver's check; never read again by anybody.
pub const LANE_HEADER_FIELDS: &[Field] = &[
    Field::new("magic", 0, 8, "u64", "broker", "`MBLANE01`"),
    Field::new("layout_hash", 8, 8, "u64", "broker", "hash of all tables of this region, see `LAYOUT_HASH`"),
    Field::new("region_bytes", 16, 8, "u64", "broker", "size of the whole region"),
    Field::new("lane_id", 24, 8, "u64", "broker", "the lane, unique in the broker's life"),
    Field::new("jobs", 32, 4, "u32", "broker", "job cells; also entries of both rings"),
];
const _: () = assert_packed(LANE_HEADER_FIELDS, HEADER_BYTES);

/// The control words, each on a line of its own; offsets from the start of the region.
pub const CONTROL_FIELDS: &[Field] = &[
    Field::new("submission_tail", 256, 4, "atomic u32", "client", "entries ever submitted, wrapping"),
    Field::new("submission_head", 384, 4, "atomic u32", "engine", "entries ever taken, wrapping"),
    Field::new(
        "engine_armed",
        512,
        4,
        "atomic u32",
        "engine sets, client swaps to 0",
        "1 = the engine sleeps: ring the doorbell",
    ),
    Field::new(
        "completion_tail",
        640,
        4,
        "atomic u32",
        "engine",
        "entries ever completed, wrapping; the futex word that a client sleeps on",
    ),
    Field::new("completion_head", 768, 4, "atomic u32", "client", "entries ever reaped, wrapping"),
    Field::new("cache_hits", 776, 8, "atomic u64", "client", "texts found in the cache, for statistics only"),
    Field::new(
        "cache_misses",
        784,
        8,
        "atomic u64",
        "client",
        "texts looked for in vain, for statistics only",
    ),
    Field::new(
        "client_waiting",
        896,
        4,
        "atomic u32",
        "client sets, engine swaps to 0",
        "1 = the client sleeps: wake the futex",
    ),
];
const RINGS_AT: usize = 1024;
const _: () = assert_packed(CONTROL_FIELDS, RINGS_AT);
pub(super) const SUBMISSION_TAIL: usize = offset_of(CONTROL_FIELDS, "submission_tail");
pub(super) const SUBMISSION_HEAD: usize = offset_of(CONTROL_FIELDS, "submission_head");
pub(super) const ENGINE_ARMED: usize = offset_of(CONTROL_FIELDS, "engine_armed");
pub(super) const COMPLETION_TAIL: usize = offset_of(CONTROL_FIELDS, "completion_tail");
pub(super) const COMPLETION_HEAD: usize = offset_of(CONTROL_FIELDS, "completion_head");
/// Where a client counts what it found in the cache.
pub(super) const CACHE_HITS: usize = offset_of(CONTROL_FIELDS, "cache_hits");
/// Where it counts what it did not find.
pub(super) const CACHE_MISSES: usize = offset_of(CONTROL_FIELDS, "cache_misses");
pub(super) const CLIENT_WAITING: usize = offset_of(CONTROL_FIELDS, "client_waiting");

/// One entry of the submission ring, written and read as one word.
pub const SUBMISSION_ENTRY_FIELDS: &[Field] = &[
    Field::new("cell", 0, 4, "u32", "client", "the job's cell"),
    Field::new("position", 4, 4, "u32", "client", "the entry's own ring position: a tripwire"),
];
const SUBMISSION_ENTRY_BYTES: usize = 8;
const _: () = assert_packed(SUBMISSION_ENTRY_FIELDS, SUBMISSION_ENTRY_BYTES);

/// One entry of the completion ring.
pub const COMPLETION_ENTRY_FIELDS: &[Field] = &[
    Field::new("sequence", 0, 8, "u64", "engine", "which job of the cell is answered"),
    Field::new("position", 8, 4, "u32", "engine", "the entry's own ring position: a tripwire"),
    Field::new("cell", 12, 4, "u32", "engine", "the job's cell"),
    Field::new("status", 16, 4, "u32", "engine", "a code; 0 = done"),
    Field::new("output_bytes", 20, 4, "u32", "engine", "bytes in the output slot: the result, or a message"),
    Field::new("queue_us", 24, 4, "u32", "engine", "time from being taken to being computed, µs"),
    Field::new("execution_us", 28, 4, "u32", "engine", "time computing, µs"),
];
pub(super) const COMPLETION_ENTRY_BYTES: usize = 64;
const _: () = assert_packed(COMPLETION_ENTRY_FIELDS, COMPLETION_ENTRY_BYTES);

/// The client's half of a job cell.
pub const CLIENT_CELL_FIELDS: &[Field] = &[
    Field::new(
        "submitted_sequence",
        0,
        8,
        "atomic u64",
        "client",
        "number of the job, rising in a lane; written last",
    ),
    Field::new(
        "cancelled_sequence",
        8,
        8,
        "atomic u64",
        "client",
        "the job whose answer nobody wants any more",
    ),
    Field::new("position", 16, 4, "u32", "client", "submission-ring position of the job"),
    Field::new("operation", 20, 2, "u16", "client", "what is asked"),
    Field::new("priority", 22, 2, "u16", "client", "0 interactive, 1 bulk"),
    Field::new("deadline_ns", 24, 8, "u64", "client", "`CLOCK_MONOTONIC`, ns; 0 = none"),
    Field::new("input_class", 32, 2, "u16", "client", "slot class of the input"),
    Field::new("input_index", 34, 2, "u16", "client", "slot number in its class"),
    Field::new("input_bytes", 36, 4, "u32", "client", "bytes of the input"),
    Field::new("output_class", 40, 2, "u16", "client", "slot class of the output"),
    Field::new("output_index", 42, 2, "u16", "client", "slot number in its class"),
    Field::new("output_capacity_bytes", 44, 4, "u32", "client", "room for the output"),
];
const CLIENT_CELL_BYTES: usize = 128;
const _: () = assert_packed(CLIENT_CELL_FIELDS, CLIENT_CELL_BYTES);
pub(super) const SUBMITTED_SEQUENCE: usize = offset_of(CLIENT_CELL_FIELDS, "submitted_sequence");
pub(super) const CANCELLED_SEQUENCE: usize = offset_of(CLIENT_CELL_FIELDS, "cancelled_sequence");
/// The plain bytes of a client cell begin here; the control words lie before.
pub(super) const CELL_BODY: usize = offset_of(CLIENT_CELL_FIELDS, "position");
pub(super) const CELL_BODY_BYTES: usize = 32;

/// The engine's half of a job cell.
pub const ENGINE_CELL_FIELDS: &[Field] = &[
    Field::new("done_sequence", 0, 8, "atomic u64", "engine", "the last job of this cell that was answered"),
    Field::new(
        "attempts",
        8,
        8,
        "atomic u64",
        "engine",
        "low 8 bits: times the job in the upper 56 bits was begun; says after a crash which job may be its cause",
    ),
];
const ENGINE_CELL_BYTES: usize = 64;
const _: () = assert_packed(ENGINE_CELL_FIELDS, ENGINE_CELL_BYTES);
pub(super) const DONE_SEQUENCE: usize = offset_of(ENGINE_CELL_FIELDS, "done_sequence");
pub(super) const ATTEMPTS: usize = offset_of(ENGINE_CELL_FIELDS, "attempts");

/// Slots of one size in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotClass {
    /// Bytes of a slot.
    pub slot_bytes: usize,
    /// Slots of that size.
    pub count: usize,
}

/// Sizes and places of everything in a region. Private to each process: never read from shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Job cells, and entries of both rings; a power of two.
    pub jobs: usize,
    /// The arena's classes, ascending.
    pub classes: [SlotClass; CLASS_COUNT],
    submission_ring: usize,
    completion_ring: usize,
    client_cells: usize,
    engine_cells: usize,
    arena: usize,
    region_bytes: usize,
}

impl Geometry {
    /// The geometry of protocol version 1: 128 jobs; 4 KiB to 1 MiB slots, 16 MiB of arena, touched only when used.
    pub const V1: Geometry = Geometry::new(
        128,
        [
            SlotClass { slot_bytes: 4 << 10, count: 256 },
            SlotClass { slot_bytes: 16 << 10, count: 64 },
            SlotClass { slot_bytes: 64 << 10, count: 32 },
            SlotClass { slot_bytes: 256 << 10, count: 16 },
            SlotClass { slot_bytes: 1 << 20, count: 8 },
        ],
    );

    /// Lays out a region. Other geometries than [`Geometry::V1`] serve tests that must stay small.
    ///
    /// # Panics
    /// When `jobs` is not a power of two or a class has slots that are not a multiple of 8 bytes.
    #[must_use]
    pub const fn new(jobs: usize, classes: [SlotClass; CLASS_COUNT]) -> Geometry {
        assert!(jobs.is_power_of_two());
        let submission_ring = RINGS_AT;
        let completion_ring = (submission_ring + jobs * SUBMISSION_ENTRY_BYTES).next_multiple_of(LINE_BYTES);
        let client_cells = (completion_ring + jobs * COMPLETION_ENTRY_BYTES).next_multiple_of(LINE_BYTES);
        let engine_cells = client_cells + jobs * CLIENT_CELL_BYTES;
        let arena = (engine_cells + jobs * ENGINE_CELL_BYTES).next_multiple_of(4096);
        let mut region_bytes = arena;
        let mut class = 0;
        while class < CLASS_COUNT {
            assert!(classes[class].slot_bytes.is_multiple_of(8));
            region_bytes += classes[class].slot_bytes * classes[class].count;
            class += 1;
        }
        Geometry {
            jobs,
            classes,
            submission_ring,
            completion_ring,
            client_cells,
            engine_cells,
            arena,
            region_bytes: region_bytes.next_multiple_of(4096),
        }
    }

    /// Size of the whole region in bytes.
    #[must_use]
    pub const fn region_bytes(&self) -> usize {
        self.region_bytes
    }

    /// Start of the arena in bytes from the start of the region.
    #[must_use]
    pub const fn arena_offset(&self) -> usize {
        self.arena
    }

    /// Start of the submission ring, completion ring, client cells and engine cells, in this order.
    #[must_use]
    pub const fn table_offsets(&self) -> [usize; 4] {
        [self.submission_ring, self.completion_ring, self.client_cells, self.engine_cells]
    }

    pub(super) const fn submission_entry(&self, position: u32) -> usize {
        self.submission_ring + (position as usize & (self.jobs - 1)) * SUBMISSION_ENTRY_BYTES
    }

    pub(super) const fn completion_entry(&self, position: u32) -> usize {
        self.completion_ring + (position as usize & (self.jobs - 1)) * COMPLETION_ENTRY_BYTES
    }

    pub(super) const fn client_cell(&self, cell: u32) -> usize {
        self.client_cells + cell as usize * CLIENT_CELL_BYTES
    }

    pub(super) const fn engine_cell(&self, cell: u32) -> usize {
        self.engine_cells + cell as usize * ENGINE_CELL_BYTES
    }

    /// Offset of an arena slot, `None` when there is no such slot or it is smaller than `len_bytes`.
    #[must_use]
    pub fn slot_offset(&self, class: u16, index: u16, len_bytes: u32) -> Option<usize> {
        let of = self.classes.get(class as usize)?;
        if index as usize >= of.count || len_bytes as usize > of.slot_bytes {
            return None;
        }
        let before: usize = self.classes[..class as usize].iter().map(|c| c.slot_bytes * c.count).sum();
        Some(self.arena + before + index as usize * of.slot_bytes)
    }
}

/// Size of a lane region of this build, in bytes.
pub const REGION_BYTES: u64 = Geometry::V1.region_bytes() as u64;

/// Hash (FNV-1a, 64 bits) of every number of the lane's layout. Two builds with the same value agree on every byte.
pub const LAYOUT_HASH: u64 = {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let tables = [
        LANE_HEADER_FIELDS,
        CONTROL_FIELDS,
        SUBMISSION_ENTRY_FIELDS,
        COMPLETION_ENTRY_FIELDS,
        CLIENT_CELL_FIELDS,
        ENGINE_CELL_FIELDS,
    ];
    let mut t = 0;
    while t < tables.len() {
        let mut f = 0;
        while f < tables[t].len() {
            hash = fnv(hash, tables[t][f].offset as u64);
            hash = fnv(hash, tables[t][f].size as u64);
            f += 1;
        }
        t += 1;
    }
    let g = Geometry::V1;
    hash = fnv(hash, g.jobs as u64);
    let offsets = g.table_offsets();
    let mut i = 0;
    while i < offsets.len() {
        hash = fnv(hash, offsets[i] as u64);
        i += 1;
    }
    hash = fnv(hash, g.arena as u64);
    let mut c = 0;
    while c < CLASS_COUNT {
        hash = fnv(hash, g.classes[c].slot_bytes as u64);
        hash = fnv(hash, g.classes[c].count as u64);
        c += 1;
    }
    hash
};

pub(super) fn write_header<M: LaneMemory>(memory: &M, geometry: &Geometry, lane_id: u64) {
    let put = |name, bytes: &[u8]| memory.write(offset_of(LANE_HEADER_FIELDS, name), bytes);
    put("magic", &LANE_MAGIC.to_le_bytes());
    put("layout_hash", &LAYOUT_HASH.to_le_bytes());
    put("region_bytes", &(geometry.region_bytes as u64).to_le_bytes());
    put("lane_id", &lane_id.to_le_bytes());
    put("jobs", &(geometry.jobs as u32).to_le_bytes());
    // Armed from birth: the first submission rings, whoever serves the lane by then.
    memory.store_u32(ENGINE_ARMED, 1, Ordering::Release);
}

pub(super) fn check_header<M: LaneMemory>(memory: &M, geometry: &Geometry) -> Result<u64, LaneFault> {
    if memory.len_bytes() < geometry.region_bytes {
        return Err(LaneFault::Header("region_bytes"));
    }
    let get = |name| {
        let mut bytes = [0; 8];
        memory.read(offset_of(LANE_HEADER_FIELDS, name), &mut bytes);
        u64::from_le_bytes(bytes)
    };
    if get("magic") != LANE_MAGIC {
        return Err(LaneFault::Header("magic"));
    }
    if get("layout_hash") != LAYOUT_HASH {
        return Err(LaneFault::Header("layout_hash"));
    }
    if get("region_bytes") != geometry.region_bytes as u64 {
        return Err(LaneFault::Header("region_bytes"));
    }
    Ok(get("lane_id"))
}

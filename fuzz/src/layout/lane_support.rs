//! What both lane targets share: a small geometry, and memory that refuses writes where its owner must not write.

use super::reader::Reader;
use shm_layout::lane::{Geometry, HeapLaneMemory, LaneMemory, SlotClass, initialize};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Few jobs and small slots, so that rings wrap and arenas fill within short inputs.
pub(super) const SMALL: Geometry = Geometry::new(
    4,
    [
        SlotClass { slot_bytes: 16, count: 4 },
        SlotClass { slot_bytes: 32, count: 2 },
        SlotClass { slot_bytes: 64, count: 1 },
        SlotClass { slot_bytes: 128, count: 1 },
        SlotClass { slot_bytes: 256, count: 1 },
    ],
);
/// Bytes of the largest slot.
pub(super) const LARGEST_SLOT_BYTES: usize = 256;

/// Control words, in the order of `CONTROL_FIELDS`.
pub(super) const CONTROL_WORDS: [usize; 6] = [256, 384, 512, 640, 768, 896];

/// Whose end of the lane writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Engine,
}

/// Lane memory that panics when its side writes what the layout gives to the other side.
#[derive(Debug, Clone)]
pub(super) struct Guarded {
    inner: Arc<HeapLaneMemory>,
    side: Side,
}

/// A fresh, initialised region.
pub(super) fn region() -> Arc<HeapLaneMemory> {
    let memory = Arc::new(HeapLaneMemory::new(SMALL.region_bytes()));
    initialize(&memory, &SMALL, 1);
    memory
}

impl Guarded {
    pub(super) fn new(inner: &Arc<HeapLaneMemory>, side: Side) -> Guarded {
        Guarded { inner: inner.clone(), side }
    }

    fn check(&self, offset: usize, len: usize) {
        let [submissions, completions, client_cells, engine_cells] = SMALL.table_offsets();
        let arena = SMALL.arena_offset();
        let allowed = match self.side {
            Side::Client => [
                256..260,
                512..516,
                768..772,
                896..900,
                submissions..completions,
                client_cells..engine_cells,
                arena..SMALL.region_bytes(),
            ],
            Side::Engine => [
                384..388,
                512..516,
                640..644,
                896..900,
                completions..client_cells,
                engine_cells..arena,
                arena..SMALL.region_bytes(),
            ],
        };
        assert!(
            len == 0 || allowed.iter().any(|range| range.start <= offset && offset + len <= range.end),
            "{:?} wrote {len} bytes at {offset}",
            self.side
        );
    }
}

impl LaneMemory for Guarded {
    fn len_bytes(&self) -> usize {
        self.inner.len_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.inner.load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.check(offset, 4);
        self.inner.store_u32(offset, value, order);
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.check(offset, 4);
        self.inner.swap_u32(offset, value, order)
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.inner.load_u64(offset, order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.check(offset, 8);
        self.inner.store_u64(offset, value, order);
    }
    fn fence(&self, order: Ordering) {
        self.inner.fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.inner.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.check(offset, from.len());
        self.inner.write(offset, from);
    }
}

/// One write that a peer who keeps no rule may do: a control word, a table entry, or any bytes.
pub(super) fn scribble(memory: &HeapLaneMemory, input: &mut Reader<'_>) {
    let tables = SMALL.table_offsets();
    match input.u8() % 4 {
        0 => {
            let word = CONTROL_WORDS[usize::from(input.u8()) % CONTROL_WORDS.len()];
            memory.store_u32(word, input.word(), Ordering::Relaxed);
        }
        1 => {
            // A word of a table: entries and cells of every ring lie here.
            let words = (SMALL.arena_offset() - tables[0]) / 4;
            let at = tables[0] + 4 * (usize::from(input.u16()) % words);
            memory.store_u32(at, input.word(), Ordering::Relaxed);
        }
        2 => {
            let at = usize::from(input.u16()) % SMALL.region_bytes();
            let len = usize::from(input.u8()) % 33;
            let bytes = input.take(len.min(SMALL.region_bytes() - at));
            memory.write(at, bytes);
        }
        _ => {
            // A whole submission that points at a cell: the shortest way past the tripwire.
            let position = input.word();
            let cell = input.word();
            let at = tables[0] + 8 * (position as usize % SMALL.jobs);
            memory.store_u64(at, u64::from(cell) | u64::from(position) << 32, Ordering::Relaxed);
        }
    }
}

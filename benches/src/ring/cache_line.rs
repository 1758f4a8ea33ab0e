//! The floor of all polled transports: one word to the other core and one word back. Nothing is carried.

use super::{Caller, Patience};
use shm_layout::lane::{CONTROL_FIELDS, LaneMemory};
use shm_layout::table::offset_of;
use shm_os::lane_mapping::LaneMapping;
use std::sync::atomic::Ordering;

/// The words, on lines of their own; this lane is used for nothing else.
const THERE: usize = offset_of(CONTROL_FIELDS, "submission_tail");
const BACK: usize = offset_of(CONTROL_FIELDS, "completion_tail");

/// The asking end.
pub(super) struct LineCaller {
    memory: LaneMapping,
    count: u32,
}

impl LineCaller {
    /// Takes a fresh region.
    pub(super) fn new(memory: LaneMapping) -> LineCaller {
        LineCaller { memory, count: 0 }
    }
}

impl Caller for LineCaller {
    #[inline]
    fn call(&mut self, input: &[u8], output: &mut Vec<u8>) -> anyhow::Result<()> {
        self.count = self.count.wrapping_add(1);
        self.memory.store_u32(THERE, self.count, Ordering::Release);
        let mut patience = Patience::new();
        while self.memory.load_u32(BACK, Ordering::Acquire) != self.count {
            patience.spin()?;
        }
        // The payload goes nowhere: the "echo" is our own.
        output.clear();
        output.extend_from_slice(input);
        Ok(())
    }
}

/// The echoing end.
pub(super) struct LineEcho {
    memory: LaneMapping,
    count: u32,
}

impl LineEcho {
    /// Takes the same region.
    pub(super) fn new(memory: LaneMapping) -> LineEcho {
        LineEcho { memory, count: 0 }
    }

    /// Echoes so many times.
    pub(super) fn echo(&mut self, round_trips: u32) -> anyhow::Result<()> {
        for _ in 0..round_trips {
            let mut patience = Patience::new();
            let next = self.count.wrapping_add(1);
            while self.memory.load_u32(THERE, Ordering::Acquire) != next {
                patience.spin()?;
            }
            self.count = next;
            self.memory.store_u32(BACK, next, Ordering::Release);
        }
        Ok(())
    }
}

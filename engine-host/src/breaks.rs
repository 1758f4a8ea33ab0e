//! What is done in the breaks of a batch of bulk work, on a thread that computes it: lanes are looked at, and interactive work
//! that came is computed at once. The batch itself, and what is answered, are `execute`'s.

use crate::compute::Loader;
use crate::execute::Moment;
use crate::host::Host;
use shm_os::process::monotonic_ns;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Least time between two breaks, in ns: a look costs some hundred for each lane.
const INTERVAL_NS: u64 = 400_000;
/// Bulk goes on for at least so great a part of the time that the last break took: one in so many.
const BULK_SHARE: u64 = 8;

/// Who is in a break, and when the next one may be.
#[derive(Debug, Default)]
pub(crate) struct Breaks {
    is_taken: AtomicBool,
    not_before_ns: AtomicU64,
}

/// The one thread that is in a break.
struct Turn<'a> {
    breaks: &'a Breaks,
    begun_ns: u64,
}

impl Turn<'_> {
    fn end(&self, now_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.begun_ns);
        self.breaks.not_before_ns.store(now_ns + INTERVAL_NS.max(elapsed_ns / BULK_SHARE), Ordering::Relaxed);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.breaks.is_taken.store(false, Ordering::Release);
    }
}

impl Breaks {
    /// The turn, when it is time and no other thread has it.
    fn begin(&self, now_ns: u64) -> Option<Turn<'_>> {
        let is_early = now_ns < self.not_before_ns.load(Ordering::Relaxed);
        (!is_early && !self.is_taken.swap(true, Ordering::Acquire))
            .then_some(Turn { breaks: self, begun_ns: now_ns })
    }
}

impl<L: Loader> Host<L> {
    /// Computes interactive work that has come, one batch at most: bulk goes on in between.
    pub(crate) fn take_a_break(&self) {
        let Some(turn) = self.breaks.begin(monotonic_ns()) else { return };
        let lanes: Vec<_> = {
            let mut state = self.state();
            if state.draining {
                return;
            }
            state.accepting += 1;
            state.lanes.values().map(Arc::clone).collect()
        };
        for lane in lanes {
            let mut taken = Vec::new();
            if let Err(fault) = lane.drain_in_passing(&mut taken) {
                // There is nobody to answer what was taken just now.
                taken.clear();
                self.forget_faulty(&lane, &fault.to_string());
            }
            if !taken.is_empty() {
                self.accept_from_lane(&lane, taken);
            }
        }
        self.state().accepting -= 1;
        if let Some(work) = self.next_work(Moment::Break) {
            self.execute(work);
        }
        turn.end(monotonic_ns());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_and_not_too_often() {
        let breaks = Breaks::default();
        let turn = breaks.begin(1000).unwrap();
        assert!(breaks.begin(10 * INTERVAL_NS).is_none());
        turn.end(2000);
        drop(turn);
        assert!(breaks.begin(1999 + INTERVAL_NS).is_none());
        let turn = breaks.begin(2000 + INTERVAL_NS).unwrap();
        // A long one is followed by a longer time for bulk.
        let end_ns = turn.begun_ns + 80 * INTERVAL_NS;
        turn.end(end_ns);
        drop(turn);
        assert!(breaks.begin(end_ns + 80 * INTERVAL_NS / BULK_SHARE - 1).is_none());
        assert!(breaks.begin(end_ns + 80 * INTERVAL_NS / BULK_SHARE).is_some());
    }
}

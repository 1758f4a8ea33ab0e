//! How long jobs wait and compute, and how they fail: counted without locks by whichever thread answers, read when the broker
//! asks. What it means is the broker's.

use shm_layout::code::Code;
use shm_layout::wire::{CodeCount, DURATION_SIZES, DurationCounts, EngineMetrics};
use std::sync::atomic::{AtomicU64, Ordering};

/// Jobs between two reports that nobody asked for.
pub(crate) const REPORT_EVERY_JOBS: u64 = 512;
/// Numbers that codes may have.
const MAX_CODES: usize = 64;

/// Durations by size.
#[derive(Debug)]
struct Durations {
    counts: [AtomicU64; DURATION_SIZES],
    sum_us: AtomicU64,
}

impl Durations {
    fn add_us(&self, duration_us: u32) {
        let duration_us = u64::from(duration_us);
        self.counts[DurationCounts::size_of_us(duration_us)].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(duration_us, Ordering::Relaxed);
    }

    fn report(&self) -> DurationCounts {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        DurationCounts { counts, sum_us: self.sum_us.load(Ordering::Relaxed) }
    }
}

/// What is counted of each job as it is answered.
#[derive(Debug)]
pub(crate) struct Measured {
    queue: Durations,
    execution: Durations,
    errors: [AtomicU64; MAX_CODES],
}

impl Default for Measured {
    fn default() -> Measured {
        let durations =
            || Durations { counts: [const { AtomicU64::new(0) }; DURATION_SIZES], sum_us: AtomicU64::new(0) };
        Measured {
            queue: durations(),
            execution: durations(),
            errors: [const { AtomicU64::new(0) }; MAX_CODES],
        }
    }
}

impl Measured {
    /// Counts an answered job.
    pub(crate) fn answered(&self, code: Code, queue_us: u32, execution_us: u32) {
        self.queue.add_us(queue_us);
        self.execution.add_us(execution_us);
        if code != Code::Ok
            && let Some(count) = self.errors.get(code as usize)
        {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The numbers as they are sent.
    pub(crate) fn report(&self) -> EngineMetrics {
        let counted = Code::ALL.iter().filter_map(|code| {
            let count = self.errors.get(*code as usize)?.load(Ordering::Relaxed);
            (count > 0).then_some(CodeCount { code: *code, count })
        });
        EngineMetrics {
            queue: self.queue.report(),
            execution: self.execution.report(),
            errors: counted.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_can_be_counted_and_every_duration_is() {
        let measured = Measured::default();
        for code in Code::ALL {
            assert!((*code as usize) < MAX_CODES, "{code} has no place");
            measured.answered(*code, 3, u32::MAX);
        }
        let report = measured.report();
        assert_eq!(report.errors.len(), Code::ALL.len() - 1);
        assert_eq!(
            (report.queue.total(), report.queue.counts[2]),
            (Code::ALL.len() as u64, Code::ALL.len() as u64)
        );
        assert_eq!(report.execution.total(), Code::ALL.len() as u64);
    }
}

//! Samples of durations and what is said about them: percentiles of blocks, and the median and spread over blocks.

use hdrhistogram::Histogram;
use std::time::Duration;

/// The longest duration that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(600);

/// Durations of one kind of operation, measured in blocks that alternate with blocks of other kinds.
#[derive(Debug)]
pub(crate) struct Samples {
    all: Histogram<u64>,
    block: Histogram<u64>,
    block_p50_ns: Vec<u64>,
}

/// What is reported of [`Samples`]; all in µs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary {
    /// Median over the blocks of each block's median.
    pub(crate) p50_us: f64,
    /// 99th percentile of all samples.
    pub(crate) p99_us: f64,
    /// Lowest and highest median of a block.
    pub(crate) spread_us: (f64, f64),
    /// Samples in all.
    pub(crate) count: u64,
}

impl Samples {
    /// No samples yet.
    #[must_use]
    pub(crate) fn new() -> Samples {
        // Bounds and digits are constants that the histogram accepts.
        let empty = || match Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, 3) {
            Ok(histogram) => histogram,
            Err(error) => unreachable!("histogram of constant bounds: {error}"),
        };
        Samples { all: empty(), block: empty(), block_p50_ns: Vec::new() }
    }

    /// Adds a sample to the current block.
    #[inline]
    pub(crate) fn record(&mut self, duration: Duration) {
        self.block.saturating_record(duration.as_nanos() as u64);
    }

    /// Adds so many samples of one duration to the current block.
    pub(crate) fn record_many(&mut self, duration: Duration, count: u64) {
        self.block.saturating_record_n(duration.as_nanos() as u64, count);
    }

    /// Ends the current block.
    pub(crate) fn end_block(&mut self) {
        if !self.block.is_empty() {
            self.block_p50_ns.push(self.block.value_at_quantile(0.5));
            // Both histograms have the same bounds.
            let _ = self.all.add(&self.block);
            self.block.reset();
        }
    }

    /// Percentiles; a block that was not ended does not count. `None` without samples.
    #[must_use]
    pub(crate) fn summary(&self) -> Option<Summary> {
        let mut medians = self.block_p50_ns.clone();
        medians.sort_unstable();
        let (first, last) = (*medians.first()?, *medians.last()?);
        let us = |ns: u64| ns as f64 / 1e3;
        Some(Summary {
            p50_us: us(medians[medians.len() / 2]),
            p99_us: us(self.all.value_at_quantile(0.99)),
            spread_us: (us(first), us(last)),
            count: self.all.len(),
        })
    }
}

/// The value that so large a share of the values does not exceed (nearest rank); `None` without values. Sorts them.
pub(crate) fn quantile(values: &mut [f64], share: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * share).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_blocks_is_not_moved_by_one_bad_block() {
        let mut samples = Samples::new();
        assert!(samples.summary().is_none());
        for block_us in [10, 10, 5000, 11, 9] {
            for _ in 0..100 {
                samples.record(Duration::from_micros(block_us));
            }
            samples.end_block();
        }
        let summary = samples.summary().unwrap();
        assert!((summary.p50_us - 10.0).abs() < 0.1, "{summary:?}");
        assert!(summary.p99_us > 4900.0, "{summary:?}");
        assert!(summary.spread_us.0 < 9.1 && summary.spread_us.1 > 4900.0, "{summary:?}");
        assert_eq!(summary.count, 500);
    }

    #[test]
    fn a_block_that_was_not_ended_does_not_count() {
        let mut samples = Samples::new();
        samples.record(Duration::from_micros(1));
        assert!(samples.summary().is_none());
        samples.end_block();
        samples.end_block();
        assert_eq!(samples.summary().unwrap().count, 1);
    }

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&mut values, 0.5), Some(50.0));
        assert_eq!(quantile(&mut values, 0.99), Some(99.0));
        assert_eq!(quantile(&mut [7.0], 0.99), Some(7.0));
        assert_eq!(quantile(&mut [], 0.5), None);
    }
}

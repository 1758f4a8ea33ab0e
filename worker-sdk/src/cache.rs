//! The client's look into the broker's vector cache: in this process, without a system call, before any job is made. Who
//! fills the cache, and with what, is not known here.

use crate::embeddings::Embeddings;
use shm_layout::cache::{CacheKey, CacheReader};
use shm_layout::lane::publish_cache_counts;
use shm_layout::wire::{CacheDescription, ModelDescription};
use shm_os::cache_mapping::CacheMapping;
use shm_os::lane_mapping::LaneMapping;
use shm_os::process::monotonic_ns;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Weak;
use std::sync::atomic::{AtomicU64, Ordering};

/// A generation's cache, mapped read-only. It outlives broker and engine: what was there can still be read.
#[derive(Debug)]
pub(crate) struct ClientCache {
    reader: CacheReader<CacheMapping>,
    hits: AtomicU64,
    misses: AtomicU64,
    /// Where the counts are shown to the engine, while there is a lane.
    lane: Weak<LaneMapping>,
}

/// What a look-up gave.
#[derive(Debug)]
pub(crate) struct Found {
    /// The vectors that were there, in the order of their texts.
    pub(crate) rows: Embeddings,
    /// The texts without one, by position in the list.
    pub(crate) missing: Vec<usize>,
}

impl ClientCache {
    /// Maps a cache that came with a lease; without one, and with one that is not this model's, calls go on without.
    pub(crate) fn map(
        cache: Option<CacheDescription>,
        fd: Option<OwnedFd>,
        model: &ModelDescription,
        lane: Weak<LaneMapping>,
    ) -> Option<ClientCache> {
        let (cache, fd) = (cache?, fd?);
        let refused = |error: &dyn std::fmt::Display| tracing::warn!(%error, "the vector cache is not used");
        let mapping = CacheMapping::map(fd.as_fd(), cache.region_bytes).inspect_err(|e| refused(e)).ok()?;
        let reader = CacheReader::new(mapping, model.output_dim as usize, model.fingerprint)
            .inspect_err(|e| refused(e))
            .ok()?;
        Some(ClientCache { reader, hits: AtomicU64::new(0), misses: AtomicU64::new(0), lane })
    }

    /// Whether another generation of the model has taken the place of this one. Costs one load.
    pub(crate) fn is_superseded(&self) -> bool {
        self.reader.superseded_by().is_some()
    }

    /// Looks every text up. Costs no system call.
    pub(crate) fn look_up<T: AsRef<str>>(&self, texts: &[T]) -> Found {
        let dim = self.reader.dim();
        // Room is made as vectors are found: of a long list often none is there.
        let mut values = Vec::new();
        let mut missing = Vec::new();
        for (index, text) in texts.iter().enumerate() {
            if !self.reader.lookup(CacheKey::of_text(text.as_ref()), monotonic_ns, &mut values) {
                missing.push(index);
            }
        }
        let hits = texts.len() - missing.len();
        self.count(hits as u64, missing.len() as u64);
        let rows = Embeddings::from_parts(dim, self.reader.fingerprint(), vec![true; hits], values);
        Found { rows, missing }
    }

    fn count(&self, hits: u64, misses: u64) {
        let hits = self.hits.fetch_add(hits, Ordering::Relaxed).wrapping_add(hits);
        let misses = self.misses.fetch_add(misses, Ordering::Relaxed).wrapping_add(misses);
        if let Some(lane) = self.lane.upgrade() {
            // Two threads may exchange their stores; the next call repairs the figure.
            publish_cache_counts(&lane, hits, misses);
        }
    }
}

impl Found {
    /// The whole list in its order, with what was computed for the missing texts; `None` when another model than the
    /// cache's computed it, or it is not that many vectors.
    pub(crate) fn merge(self, computed: &Embeddings) -> Option<Embeddings> {
        let Found { rows, missing } = self;
        let (dim, fingerprint) = (rows.dim(), rows.fingerprint());
        if (computed.dim(), computed.fingerprint(), computed.len()) != (dim, fingerprint, missing.len()) {
            return None;
        }
        let count = rows.len() + missing.len();
        let mut cached = Vec::with_capacity(count);
        let mut values = Vec::with_capacity(count.saturating_mul(dim));
        let (mut found, mut others) = (rows.rows(), computed.rows().zip(computed.cached()));
        let mut missing = missing.into_iter().peekable();
        for index in 0..count {
            let (row, is_cached) = if missing.next_if_eq(&index).is_some() {
                others.next().map(|(row, is_cached)| (row, *is_cached))?
            } else {
                (found.next()?, true)
            };
            values.extend_from_slice(row);
            cached.push(is_cached);
        }
        Some(Embeddings::from_parts(dim, fingerprint, cached, values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(fingerprint: u64, cached: &[bool], first: f32) -> Embeddings {
        let values = (0..2 * cached.len()).map(|n| first + n as f32).collect();
        Embeddings::from_parts(2, fingerprint, cached.to_vec(), values)
    }

    #[test]
    fn what_was_found_and_what_was_computed_come_together_in_order() {
        for mask in 0..32u32 {
            let missing: Vec<usize> = (0..5).filter(|n| mask >> n & 1 == 1).collect();
            let found =
                Found { rows: rows(7, &vec![true; 5 - missing.len()], 0.0), missing: missing.clone() };
            let flags: Vec<bool> = missing.iter().map(|n| n % 2 == 0).collect();
            let all = found.merge(&rows(7, &flags, 100.0)).unwrap();
            assert_eq!(all.len(), 5);
            let (mut from_cache, mut computed) = (0.0, 100.0);
            for n in 0..5 {
                let next = if missing.contains(&n) { &mut computed } else { &mut from_cache };
                assert_eq!(all[n], [*next, *next + 1.0]);
                *next += 2.0;
                assert_eq!(all.cached()[n], !missing.contains(&n) || n % 2 == 0);
            }
        }
    }

    #[test]
    fn vectors_of_two_models_are_never_mixed() {
        let found = || Found { rows: rows(7, &[true], 0.0), missing: vec![0] };
        assert!(found().merge(&rows(8, &[false], 0.0)).is_none());
        assert!(found().merge(&rows(7, &[false, false], 0.0)).is_none());
        assert!(found().merge(&rows(7, &[false], 0.0)).is_some());
    }
}

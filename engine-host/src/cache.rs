//! The engine's side of a generation's vector cache: looks texts up, remembers what it has just computed, and says to the
//! broker what is new. It maps the cache read-only; only the broker writes it.

use crate::link::Link;
use shm_layout::cache::{CacheKey, CacheReader};
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::wire::{CacheInsertKey, CacheTotals, FromEngine, Priority};
use shm_os::cache_mapping::CacheMapping;
use shm_os::process::monotonic_ns;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Vectors that the engine remembers itself, until the broker has surely written them.
const MAX_RECENT_VECTORS: usize = 256;
/// How long it remembers them, in ns: far longer than the broker takes, far shorter than any time to live.
const MAX_RECENT_NS: u64 = 200_000_000;
/// Bytes that wait for the broker beyond which new vectors are not sent: it is a cache.
const MAX_UNSENT_BYTES: usize = 1 << 20;
/// Bytes of a key in a frame, with room for the frame's other fields spread over them.
const KEY_FRAME_BYTES: usize = 32;

/// A vector, shared between the job that it answers and what is remembered.
pub(crate) type Vector = Arc<[f32]>;

/// A vector that was computed, with what it is found by.
pub(crate) type Fresh = (CacheKey, Vector);

#[derive(Debug, Default)]
struct Recent {
    vectors: HashMap<CacheKey, (u64, Vector)>,
    order: VecDeque<(u64, CacheKey)>,
}

impl Recent {
    fn forget_old(&mut self, now_ns: u64, most: usize) {
        while let Some((at_ns, key)) = self.order.front().copied() {
            if self.order.len() <= most && now_ns.saturating_sub(at_ns) < MAX_RECENT_NS {
                return;
            }
            self.order.pop_front();
            // Remembered anew since: it stays for its later place in the line.
            if self.vectors.get(&key).is_some_and(|(at, _)| *at == at_ns) {
                self.vectors.remove(&key);
            }
        }
    }

    fn put(&mut self, now_ns: u64, key: CacheKey, vector: &Vector) {
        self.forget_old(now_ns, MAX_RECENT_VECTORS - 1);
        self.vectors.insert(key, (now_ns, Arc::clone(vector)));
        self.order.push_back((now_ns, key));
    }

    fn get(&mut self, now_ns: u64, key: CacheKey) -> Option<Vector> {
        self.forget_old(now_ns, MAX_RECENT_VECTORS);
        self.vectors.get(&key).map(|(_, vector)| Arc::clone(vector))
    }
}

/// A generation's cache as the engine holds it.
#[derive(Debug)]
pub(crate) struct Cache {
    reader: CacheReader<CacheMapping>,
    recent: Mutex<Recent>,
    hits: AtomicU64,
    misses: AtomicU64,
    shared: AtomicU64,
    /// Vectors that were computed and may have come into the cache.
    new: AtomicU64,
    /// Counts of clients whose lanes are gone.
    past_client_hits: AtomicU64,
    past_client_misses: AtomicU64,
}

impl Cache {
    /// Around a mapped and checked region.
    pub(crate) fn new(reader: CacheReader<CacheMapping>) -> Cache {
        Cache {
            reader,
            recent: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            shared: AtomicU64::new(0),
            new: AtomicU64::new(0),
            past_client_hits: AtomicU64::new(0),
            past_client_misses: AtomicU64::new(0),
        }
    }

    /// The vector of a key, if it is there.
    pub(crate) fn find(&self, key: CacheKey) -> Option<Vector> {
        let mut vector = Vec::new();
        if self.reader.lookup(key, monotonic_ns, &mut vector) {
            return Some(vector.into());
        }
        self.recent.lock().unwrap_or_else(PoisonError::into_inner).get(monotonic_ns(), key)
    }

    /// Remembers what was just computed, so that the next batch finds it.
    pub(crate) fn remember(&self, fresh: &[Fresh]) {
        let now_ns = monotonic_ns();
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        // More than fits would only push each other out. The last ones, since they come to the broker last.
        for (key, vector) in fresh.iter().skip(fresh.len().saturating_sub(MAX_RECENT_VECTORS)) {
            recent.put(now_ns, *key, vector);
        }
        drop(recent);
        self.new.fetch_add(fresh.len() as u64, Ordering::Relaxed);
    }

    /// Numbers in a vector.
    pub(crate) fn dim(&self) -> usize {
        self.reader.dim()
    }

    /// Entries that there is room for.
    pub(crate) fn slots(&self) -> usize {
        self.reader.slots()
    }

    /// Vectors that were computed so far and may have come into the cache.
    pub(crate) fn count_of_new(&self) -> u64 {
        self.new.load(Ordering::Relaxed)
    }

    /// The vector that was computed last, if that was a short time ago: the broker may not have written it yet.
    pub(crate) fn newest(&self) -> Option<CacheKey> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.forget_old(monotonic_ns(), MAX_RECENT_VECTORS);
        recent.order.back().map(|(_, key)| *key)
    }

    /// Whether the broker has written this key's vector.
    pub(crate) fn contains(&self, key: CacheKey) -> bool {
        self.reader.lookup(key, monotonic_ns, &mut Vec::new())
    }

    /// Whether nothing that lives is in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.reader.walk(monotonic_ns(), |_, _, _| Err(())).is_ok()
    }

    /// As [`CacheReader::walk`].
    pub(crate) fn walk<E>(
        &self,
        now_ns: u64,
        visit: impl FnMut(CacheKey, u64, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.reader.walk(now_ns, visit)
    }

    /// Counts texts that were found, that were computed, and that shared another one's computation.
    pub(crate) fn count(&self, hits: usize, misses: usize, shared: usize) {
        for (counter, more) in [(&self.hits, hits), (&self.misses, misses), (&self.shared, shared)] {
            counter.fetch_add(more as u64, Ordering::Relaxed);
        }
    }

    /// Takes over the counts of a lane that is gone. They are what its client says, so they add up without overflow.
    pub(crate) fn retire_counts(&self, (hits, misses): (u64, u64)) {
        for (counter, more) in [(&self.past_client_hits, hits), (&self.past_client_misses, misses)] {
            let _ = counter
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_add(more)));
        }
    }

    /// The counters, with those of the lanes that live.
    pub(crate) fn totals(&self, living: impl Iterator<Item = (u64, u64)>) -> CacheTotals {
        let mut totals = CacheTotals {
            client_hits: self.past_client_hits.load(Ordering::Relaxed),
            client_misses: self.past_client_misses.load(Ordering::Relaxed),
            engine_hits: self.hits.load(Ordering::Relaxed),
            engine_misses: self.misses.load(Ordering::Relaxed),
            shared: self.shared.load(Ordering::Relaxed),
        };
        for (hits, misses) in living {
            totals.client_hits = totals.client_hits.saturating_add(hits);
            totals.client_misses = totals.client_misses.saturating_add(misses);
        }
        totals
    }
}

/// Vectors that fit into a message of `most_bytes`, which is at most [`MAX_PAYLOAD_BYTES`]; one always does.
pub(crate) fn vectors_at_once(dim: usize, most_bytes: usize) -> usize {
    (most_bytes / (4 * dim + KEY_FRAME_BYTES)).max(1)
}

/// Sends what was computed to the broker, which keeps it; not when the broker is behind with reading.
pub(crate) fn send(link: &Link, generation: u64, priority: Priority, dim: usize, fresh: &[Fresh]) {
    for some in fresh.chunks(vectors_at_once(dim, MAX_PAYLOAD_BYTES)) {
        if link.queued_bytes() > MAX_UNSENT_BYTES {
            tracing::debug!(generation, "the broker is busy: vectors are not cached");
            return;
        }
        let keys =
            some.iter().map(|(key, _)| CacheInsertKey { low: key.low, high: key.high, left_ms: 0 }).collect();
        let mut values = Vec::with_capacity(4 * dim * some.len());
        for number in some.iter().flat_map(|(_, vector)| vector.iter()) {
            values.extend_from_slice(&number.to_le_bytes());
        }
        link.send(&FromEngine::CacheInsert { generation, bulk: priority == Priority::Bulk, keys, values });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_computed_is_remembered_for_a_while_and_within_bounds() {
        let mut recent = Recent::default();
        let vector: Vector = vec![1.0].into();
        let key = |n: usize| CacheKey::new(n as u64 + 1, 0);
        for n in 0..MAX_RECENT_VECTORS + 10 {
            recent.put(1000, key(n), &vector);
        }
        assert_eq!(recent.vectors.len(), MAX_RECENT_VECTORS);
        assert!(recent.get(1000, key(9)).is_none() && recent.get(1000, key(10)).is_some());
        recent.put(1500, key(10), &vector);
        assert!(recent.get(1000 + MAX_RECENT_NS, key(11)).is_none());
        assert!(recent.get(1000 + MAX_RECENT_NS, key(10)).is_some());
        assert!(recent.get(1500 + MAX_RECENT_NS, key(10)).is_none());
        assert!(recent.vectors.is_empty() && recent.order.is_empty());
    }
}

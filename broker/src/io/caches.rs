//! The broker's end of the vector caches: the only process that writes them. Which generation has one is the core's.

use shm_layout::cache::{CacheFault, CacheGeometry, CacheKey, CacheWriter, Insert};
use shm_layout::wire::{CacheDescription, CacheInsertKey, CacheReport};
use shm_os::cache_mapping::CacheWriteMapping;
use shm_os::mapping::MappingError;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Why a generation is served without a cache.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// The region cannot be had.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// It cannot be laid out.
    #[error(transparent)]
    Layout(#[from] CacheFault),
}

/// One generation's cache.
pub(crate) struct Cache {
    writer: CacheWriter<CacheWriteMapping>,
    /// What readers get; it can only be read.
    pub(crate) region: OwnedFd,
    region_bytes: u64,
    dim: usize,
    ttl_ns: u64,
}

impl Cache {
    /// Makes an empty cache.
    ///
    /// # Errors
    /// [`CacheError`] when the system has no memory or cannot seal it, or vectors are too long to be kept.
    pub(crate) fn make(
        entries: usize,
        ttl: Duration,
        dim: u32,
        fingerprint: u64,
    ) -> Result<Cache, CacheError> {
        let dim = dim as usize;
        let geometry = CacheGeometry::for_entries(entries, dim)?;
        let (mapping, region) = CacheWriteMapping::create(geometry.region_bytes())?;
        let writer = CacheWriter::create(mapping, geometry, entries, fingerprint)?;
        let ttl_ns = u64::try_from(ttl.as_nanos()).unwrap_or(u64::MAX);
        Ok(Cache { writer, region, region_bytes: geometry.region_bytes() as u64, dim, ttl_ns })
    }

    /// What readers are told.
    pub(crate) fn description(&self) -> CacheDescription {
        CacheDescription { region_bytes: self.region_bytes }
    }

    /// Keeps what can be kept; `values` holds a vector for each key, one after the other.
    pub(crate) fn fill(&mut self, now_ns: u64, bulk: bool, keys: &[CacheInsertKey], values: &[u8]) {
        let mut vector = Vec::with_capacity(self.dim);
        for (key, bytes) in keys.iter().zip(values.chunks_exact(4 * self.dim)) {
            vector.clear();
            vector.extend(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)));
            // An old vector keeps the shorter of its own time and the present setting.
            let left_ns = match (key.left_ms.saturating_mul(1_000_000), self.ttl_ns) {
                (0, own) | (own, 0) => own,
                (told, own) => told.min(own),
            };
            let expires_at_ns = if left_ns == 0 { 0 } else { now_ns.saturating_add(left_ns) };
            let key = CacheKey::new(key.low, key.high);
            if self.writer.insert(key, &vector, expires_at_ns, now_ns, bulk) == Insert::Refused {
                tracing::warn!("the engine sent a vector that is none; it is not kept");
            }
        }
    }

    /// Tells readers that another generation has taken the place of this one's.
    pub(crate) fn supersede(&self, by: u64) {
        self.writer.supersede(by);
    }

    /// What its vectors take, in bytes.
    pub(crate) fn used_bytes(&self) -> u64 {
        (self.writer.entries() as u64).saturating_mul(4 * self.dim as u64)
    }

    /// How full it is; what was found in it is left as it is.
    pub(crate) fn report(&self, into: &mut CacheReport) {
        into.entries = self.writer.entries() as u64;
        into.capacity = self.writer.capacity() as u64;
    }
}

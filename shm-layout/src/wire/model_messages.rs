//! What the messages say about the life of models: orders of clients, what became of them, and what a report tells of a
//! model and of the whole. Plain data; the order of variants and fields is the encoding: append, never reorder.

use super::backing_kind::BackingKind;
use super::messages::ModelDescription;
use super::{Decode, Encode};
use crate::code::Code;

/// What a client wants done with a model. An empty name is the broker's default model.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ModelCommand {
    /// Load it if it is not loaded; answered by [`ModelOutcome::Loaded`] once it is served.
    Load {
        /// Model id, alias or folder.
        model: String,
        /// Longest wait, in ms.
        wait_ms: u32,
    },
    /// Let go of it; answered by [`ModelOutcome::Unloaded`] once no page of it is mapped by broker and engine.
    Unload {
        /// Model id, alias or folder.
        model: String,
        /// What to do when it is in use.
        mode: UnloadMode,
    },
    /// Load another generation beside the present one and switch to it; answered by [`ModelOutcome::Reloaded`] once
    /// new leases get it. Loads a model that is not loaded.
    Reload {
        /// Model id, alias or folder.
        model: String,
        /// Longest wait, in ms; the reload goes on after it.
        wait_ms: u32,
    },
    /// Have the engine compute something known with it; answered by [`ModelOutcome::Healthy`] or `Refused`.
    Health {
        /// Model id, alias or folder.
        model: String,
        /// Longest wait, in ms.
        wait_ms: u32,
    },
}

/// What to do with a model in use that is to be unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Encode, Decode)]
pub enum UnloadMode {
    /// Refuse, naming who holds it.
    #[default]
    IfIdle,
    /// Unload it as soon as nobody uses it; answered at once.
    WhenIdle,
    /// Forget it at once: who holds it keeps its generation until it lets go of it, who asks next loads it anew.
    Force,
}

/// What became of a [`ModelCommand`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ModelOutcome {
    /// It is loaded and served.
    Loaded {
        /// What it is.
        model: ModelDescription,
        /// Duration of its load, in µs.
        load_us: u64,
        /// It was loaded before it was asked for.
        was_loaded: bool,
    },
    /// It is not loaded any more, or will not be once it is idle.
    Unloaded {
        /// Canonical id, or the name where it was never loaded.
        model_id: String,
        /// Size of the images that were let go of; 0 = it was not loaded.
        freed_bytes: u64,
        /// Somebody uses it still: its memory comes back when they let go of it.
        pending: bool,
    },
    /// New leases get a new generation.
    Reloaded {
        /// What it is now.
        model: ModelDescription,
        /// The generation before; 0 = there was none.
        replaced: u64,
        /// Duration of the load, in µs.
        load_us: u64,
    },
    /// It computes what it should.
    Healthy {
        /// What it is.
        model: ModelDescription,
        /// Time that the engine computed, in µs.
        probe_us: u64,
        /// Process of the engine.
        engine_pid: u32,
    },
}

/// A lease's generation was replaced. The lease stays good; a new one on the same model gets the new generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Superseded {
    /// The lease.
    pub lease_id: u64,
    /// The new generation.
    pub generation: u64,
}

/// What a report tells of a model beside [`super::ModelReport`]'s other fields.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ModelDetail {
    /// Ids of the configuration that mean this model.
    pub ids: Vec<String>,
    /// What it is configured for: `embedding`, `reranker`, `classifier`, `text2text`, `chat` or `custom`.
    pub kind: Option<String>,
    /// What the loader is given.
    pub source: String,
    /// Where it computes.
    pub device: String,
    /// Where it is configured to compute.
    pub device_wished: String,
    /// Precision of its matrices, once it was loaded.
    pub precision: Option<String>,
    /// Neither idleness nor the bound on models unloads it.
    pub pinned: bool,
    /// A reload is under way.
    pub reloading: bool,
    /// The last failure of a load, reload or engine, also when the model was loaded since.
    pub last_error: Option<LastError>,
    /// The generations that are held, the present one and those before it.
    pub generations: Vec<GenerationReport>,
    /// Who holds leases on any of its generations.
    pub references: Vec<ProcessReferences>,
    /// Requests for a lease that wait.
    pub waiting: u32,
    /// Jobs on the socket that are not answered.
    pub queued_jobs: u32,
    /// When a model that failed is tried again, in ms; 0 = at the next request.
    pub retry_after_ms: u32,
    /// Time until it is unloaded if nobody uses it, in µs; `None` = it is in use, not loaded, or stays.
    pub unload_in_us: Option<u64>,
    /// Reloads that succeeded.
    pub reloads: u32,
    /// Times that it was unloaded: by order, by idleness, or to make room.
    pub unloads: u32,
    /// Times that it was unloaded to make room for another model.
    pub evictions: u32,
    /// Loads and reloads that failed.
    pub failures: u32,
}

/// The last failure of a model.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct LastError {
    /// Why, as a code.
    pub code: Code,
    /// Why, in words.
    pub message: String,
    /// Time since then, in µs.
    pub age_us: u64,
}

/// One generation of a model that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct GenerationReport {
    /// The generation.
    pub generation: u64,
    /// Size of its image.
    pub image_bytes: u64,
    /// What the image lies in.
    pub backing: BackingKind,
    /// New leases get it.
    pub is_current: bool,
    /// The engine serves it.
    pub is_served: bool,
    /// Leases on it.
    pub leases: u32,
    /// Time since it was loaded, in µs.
    pub age_us: u64,
}

/// Leases that one process holds on a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ProcessReferences {
    /// The process.
    pub pid: u32,
    /// Its leases.
    pub count: u32,
}

/// Durations, counted by size: entry `n` counts those of 2^(n-1) up to 2^n - 1 µs, entry 0 those below 1 µs, and the last
/// all that are longer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct DurationCounts {
    /// How many of each size; at most [`DURATION_SIZES`] entries.
    pub counts: Vec<u64>,
    /// Their sum, in µs.
    pub sum_us: u64,
}

/// Entries of [`DurationCounts`]: the last begins at 2^30 µs, about 18 minutes.
pub const DURATION_SIZES: usize = 32;

impl DurationCounts {
    /// The entry that counts a duration.
    #[must_use]
    pub const fn size_of_us(duration_us: u64) -> usize {
        let bits = (u64::BITS - duration_us.leading_zeros()) as usize;
        if bits < DURATION_SIZES { bits } else { DURATION_SIZES - 1 }
    }

    /// Counts a duration.
    pub fn add_us(&mut self, duration_us: u64) {
        let size = Self::size_of_us(duration_us);
        if self.counts.len() <= size {
            self.counts.resize(size + 1, 0);
        }
        self.counts[size] += 1;
        self.sum_us = self.sum_us.saturating_add(duration_us);
    }

    /// How many there are.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// An upper bound of the given part (0 to 1) of the durations, in µs: 2^n - 1 of the entry in which it lies. `None`
    /// where there are none.
    #[must_use]
    pub fn quantile_us(&self, part: f64) -> Option<u64> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        let wanted = ((part.clamp(0.0, 1.0) * total as f64).ceil() as u64).max(1);
        let mut seen = 0u64;
        for (size, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= wanted {
                return Some((1u64 << size.min(63)) - 1);
            }
        }
        None
    }

    /// Takes away what was counted before; what is not in both is left as it is.
    #[must_use]
    pub fn since(&self, before: &DurationCounts) -> DurationCounts {
        let old = |size: usize| before.counts.get(size).copied().unwrap_or(0);
        let counts = self.counts.iter().enumerate().map(|(size, n)| n.saturating_sub(old(size))).collect();
        DurationCounts { counts, sum_us: self.sum_us.saturating_sub(before.sum_us) }
    }

    /// Adds what was counted elsewhere.
    pub fn merge(&mut self, other: &DurationCounts) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len().min(DURATION_SIZES), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*theirs);
        }
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
    }
}

/// How often something ended with a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct CodeCount {
    /// The code.
    pub code: Code,
    /// How often.
    pub count: u64,
}

/// What an engine measured since its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct EngineMetrics {
    /// Time of jobs in its queue.
    pub queue: DurationCounts,
    /// Time of jobs computing.
    pub execution: DurationCounts,
    /// Jobs that ended with an error, by code.
    pub errors: Vec<CodeCount>,
}

/// A number now, and the most that it was in this broker's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Level {
    /// Now.
    pub now: u64,
    /// The most.
    pub peak: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct MemoryReport {
    /// Images that are held.
    pub image_bytes: u64,
    /// Vectors in caches.
    pub cache_bytes: u64,
    /// What private copies of the models would take more: for each generation its size times its references less one.
    pub saved_bytes: u64,
    /// What images and caches may take; `None` = no budget is set.
    pub budget_bytes: Option<u64>,
    /// What the system or the control group has left; `None` = it cannot be read.
    pub available_bytes: Option<u64>,
}

/// What the broker measured in its life.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Metrics {
    /// Time of loads, from request to image.
    pub load: DurationCounts,
    /// Time from asking for a lease to having it.
    pub access: DurationCounts,
    /// Time of jobs in engines' queues.
    pub queue: DurationCounts,
    /// Time of jobs computing.
    pub execution: DurationCounts,
    /// Refusals and failed jobs, by code.
    pub errors: Vec<CodeCount>,
    /// Sessions.
    pub sessions: Level,
    /// Leases.
    pub leases: Level,
    /// Jobs on the socket that are not answered.
    pub jobs: Level,
    /// Loads that were begun.
    pub loads: u64,
    /// Loads that failed.
    pub load_failures: u64,
    /// Models that were let go of.
    pub unloads: u64,
    /// Models that were let go of to make room.
    pub evictions: u64,
    /// Models that were replaced by another generation.
    pub reloads: u64,
    /// Memory.
    pub memory: MemoryReport,
}

/// Something that has got worse and lasts.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Alert {
    /// What: `latency`, `errors`, `memory` or `engine_restarts`.
    pub name: String,
    /// How bad: `warning` or `critical`.
    pub severity: String,
    /// The figures.
    pub message: String,
    /// Since when, in µs.
    pub age_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_counted_by_their_size() {
        let mut counts = DurationCounts::default();
        assert_eq!(counts.quantile_us(0.5), None);
        for duration in [0, 1, 2, 3, 4, 1000, u64::MAX] {
            counts.add_us(duration);
        }
        assert_eq!(counts.counts[..4], [1, 1, 2, 1]);
        assert_eq!(counts.counts.len(), DURATION_SIZES);
        assert_eq!((counts.total(), counts.sum_us), (7, u64::MAX));
        assert_eq!(counts.quantile_us(0.0), Some(0));
        assert_eq!(counts.quantile_us(0.5), Some(3));
        assert_eq!(counts.quantile_us(0.85), Some(1023));
    }

    #[test]
    fn differences_and_sums_are_entry_by_entry() {
        let (mut before, mut now) = (DurationCounts::default(), DurationCounts::default());
        before.add_us(5);
        now.add_us(5);
        now.add_us(100);
        let since = now.since(&before);
        assert_eq!((since.total(), since.sum_us), (1, 100));
        before.merge(&since);
        assert_eq!(before, now);
        // From a peer: longer than it should be.
        let strange = DurationCounts { counts: vec![1; 1000], sum_us: u64::MAX };
        before.merge(&strange);
        assert_eq!(before.counts.len(), DURATION_SIZES);
    }
}

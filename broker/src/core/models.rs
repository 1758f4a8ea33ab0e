//! The registry of models: which names mean which model, who waits for a load, which generations exist. One load per
//! model however many ask. Pure bookkeeping: granting leases and talking to loaders and engines is decided in `acquire`.

use super::entry::Entry;
use super::event::ImageFacts;
use crate::config::Limits;
use shm_layout::code::Code;
use shm_layout::wire::{CacheDescription, CacheTotals, LoadProgress, ModelDescription, Refusal};
use std::collections::{BTreeMap, HashMap};

/// A request for a lease that waits for a load or for an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Waiter {
    pub(crate) session: u64,
    pub(crate) request_id: u64,
    pub(crate) asked_ns: u64,
    /// When the asker gives up.
    pub(crate) deadline_ns: u64,
    pub(crate) want_lane: bool,
    pub(crate) want_image: bool,
}

/// Where a model stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryState {
    /// Waits for a loader to become free.
    Queued,
    /// A loader is at work.
    Loading { load_id: u64, deadline_ns: u64, progress: Option<LoadProgress>, told_ns: u64 },
    /// An image is there.
    Loaded { generation: u64 },
    /// The last load failed.
    Failed { refusal: Refusal, retry_at_ns: u64 },
    /// Not loaded: never asked for, or let go of.
    Unloaded,
}

/// How far a load is that replaces a loaded generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reload {
    /// Waits for a loader to become free.
    Queued,
    /// A loader is at work.
    Loading { load_id: u64, deadline_ns: u64 },
    /// The new generation is there; the engine does not serve it yet.
    Warming { generation: u64 },
}

/// Whether the engine that runs now serves a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EngineSide {
    /// It was not told of it.
    Unsent,
    /// It was told and has not answered.
    Sent,
    /// It serves it.
    Ready,
    /// It cannot.
    Failed,
}

/// One image: an incarnation of a model.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) entry: u64,
    pub(crate) loaded_ns: u64,
    pub(crate) precision: &'static str,
    pub(crate) description: ModelDescription,
    pub(crate) engine: EngineSide,
    pub(crate) cache: CacheSide,
    /// What was found in the cache, in the life of the present engine.
    pub(crate) cache_totals: CacheTotals,
}

/// How far a generation's cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CacheSide {
    /// It is being made; nobody is told of the generation before.
    Making,
    /// It is there.
    Made(CacheDescription),
    /// There is none.
    Absent,
}

impl CacheSide {
    /// What readers are told.
    pub(crate) fn description(self) -> Option<CacheDescription> {
        match self {
            CacheSide::Made(cache) => Some(cache),
            CacheSide::Making | CacheSide::Absent => None,
        }
    }
}

/// What a request for a model has to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// It is loaded, or being loaded, or was put in line to be.
    Entry(u64),
    /// It cannot be had now.
    Refused(Refusal),
}

/// What became of a finished load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finished {
    /// A new generation of this entry; loads of the same model under other names that became needless are named.
    New { entry: u64, generation: u64, needless_loads: Vec<u64> },
    /// The model was there under another name; waiters moved to that entry, the new image is not needed.
    Known { entry: u64 },
    /// No such load.
    Unknown,
}

/// All models.
#[derive(Debug, Default)]
pub(crate) struct Models {
    pub(super) names: HashMap<String, u64>,
    pub(crate) entries: BTreeMap<u64, Entry>,
    pub(crate) images: BTreeMap<u64, Image>,
    pub(super) last_id: u64,
    last_generation: u64,
}

impl Models {
    /// The entry for a name, made and queued if need be.
    pub(crate) fn lookup(&mut self, name: &str, now_ns: u64, limits: &Limits) -> Lookup {
        if let Some(id) = self.names.get(name).copied() {
            let Some(entry) = self.entries.get_mut(&id) else {
                // Names and entries are kept together; a name without entry would be looked up anew.
                self.names.remove(name);
                return self.lookup(name, now_ns, limits);
            };
            match &entry.state {
                EntryState::Failed { refusal, retry_at_ns } if now_ns < *retry_at_ns => {
                    let mut refusal = refusal.clone();
                    refusal.retry_after_ms = ms_until(*retry_at_ns, now_ns);
                    return Lookup::Refused(refusal);
                }
                EntryState::Failed { .. } | EntryState::Unloaded => entry.queue(now_ns),
                EntryState::Queued | EntryState::Loading { .. } | EntryState::Loaded { .. } => {}
            }
            return Lookup::Entry(id);
        }
        if self.entries.len() >= limits.max_models || self.names.len() >= limits.max_model_names {
            self.forget_unused();
        }
        let reached = if self.entries.len() >= limits.max_models {
            Some(format!("{} models are loaded, the limit", self.entries.len()))
        } else if self.names.len() >= limits.max_model_names {
            Some(format!("{} model names are known, the limit", self.names.len()))
        } else {
            None
        };
        if let Some(reached) = reached {
            return Lookup::Refused(Refusal {
                code: Code::TooMany,
                message: format!("{reached}; use fewer models, or restart the broker"),
                retry_after_ms: 0,
            });
        }
        let id = self.add(name, now_ns);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.queue(now_ns);
        }
        Lookup::Entry(id)
    }

    /// Adds a model that is not loaded.
    pub(super) fn add(&mut self, name: &str, now_ns: u64) -> u64 {
        self.last_id += 1;
        self.names.insert(name.to_owned(), self.last_id);
        self.entries.insert(self.last_id, Entry::new(name, now_ns));
        self.last_id
    }

    /// Forgets failed and unloaded models that nobody waits for and that are not configured, so that names cannot fill the
    /// registry.
    fn forget_unused(&mut self) {
        let images = &self.images;
        let kept_by_image = |id: u64| images.values().any(|image| image.entry == id);
        let gone: Vec<u64> = self
            .entries
            .iter()
            .filter(|(id, e)| {
                matches!(e.state, EntryState::Failed { .. } | EntryState::Unloaded)
                    && e.waiters.is_empty()
                    && e.askers.is_empty()
                    && !e.settings.is_kept()
                    && !kept_by_image(**id)
            })
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.entries.remove(&id);
        }
        let entries = &self.entries;
        self.names.retain(|_, id| entries.contains_key(id));
    }

    /// The entry whose load this is.
    pub(crate) fn entry_of_load(&self, load_id: u64) -> Option<u64> {
        self.entries.iter().find(|(_, e)| e.load_id() == Some(load_id)).map(|(id, _)| *id)
    }

    /// Loads under way.
    pub(crate) fn loads_running(&self) -> usize {
        self.entries.values().filter(|e| e.load_id().is_some()).count()
    }

    /// The entries that wait for a loader, first asked first.
    pub(crate) fn queued(&self) -> Vec<u64> {
        let mut queued: Vec<(u64, u64)> =
            self.entries.iter().filter(|(_, e)| e.is_queued()).map(|(id, e)| (e.requested_ns, *id)).collect();
        queued.sort_unstable();
        queued.into_iter().map(|(_, id)| id).collect()
    }

    /// Models that are loaded or being loaded, whatever their number of generations.
    pub(crate) fn occupied(&self) -> usize {
        let takes_room =
            |e: &&Entry| matches!(e.state, EntryState::Loading { .. } | EntryState::Loaded { .. });
        self.entries.values().filter(takes_room).count()
    }

    /// Takes a checked image as the result of a load.
    pub(crate) fn finish_load(&mut self, load_id: u64, facts: ImageFacts, now_ns: u64) -> Finished {
        let Some(id) = self.entry_of_load(load_id) else { return Finished::Unknown };
        let twin = self
            .entries
            .iter()
            .find(|(other, e)| **other != id && e.canonical.as_deref() == Some(facts.model_id.as_str()))
            .or_else(|| {
                let named = self.names.get(&facts.model_id).filter(|other| **other != id)?;
                self.entries.get_key_value(named)
            })
            .map(|(other, e)| (*other, matches!(e.state, EntryState::Loaded { .. }), e.load_id()));
        let mut needless_loads = Vec::new();
        match twin {
            Some((other, true, _)) => {
                self.merge(id, other);
                return Finished::Known { entry: other };
            }
            Some((other, false, load)) => {
                needless_loads.extend(load);
                self.merge(other, id);
            }
            None => {}
        }
        self.names.insert(facts.model_id.clone(), id);
        let Some(generation) = self.add_image(id, facts, now_ns) else { return Finished::Unknown };
        let Some(entry) = self.entries.get_mut(&id) else { return Finished::Unknown };
        entry.state = EntryState::Loaded { generation };
        entry.last_use_ns = now_ns;
        Finished::New { entry: id, generation, needless_loads }
    }

    /// Takes a checked image as a new generation of an entry.
    pub(crate) fn add_image(&mut self, id: u64, facts: ImageFacts, now_ns: u64) -> Option<u64> {
        let entry = self.entries.get_mut(&id)?;
        self.last_generation += 1;
        let generation = self.last_generation;
        entry.canonical = Some(facts.model_id.clone());
        entry.loads += 1;
        entry.failures = 0;
        entry.planned_bytes = 0;
        entry.load_us = now_ns.saturating_sub(entry.requested_ns) / 1000;
        let precision = facts.precision;
        let description = ModelDescription {
            model_id: facts.model_id,
            generation,
            output_dim: facts.output_dim,
            max_seq_tokens: facts.max_seq_tokens,
            image_bytes: facts.image_bytes,
            fingerprint: facts.fingerprint,
            content_hash: facts.content_hash,
            backing: facts.backing,
            facts: facts.facts,
        };
        let image = Image {
            entry: id,
            loaded_ns: now_ns,
            precision,
            description,
            engine: EngineSide::Unsent,
            cache: CacheSide::Making,
            cache_totals: CacheTotals::default(),
        };
        self.images.insert(generation, image);
        Some(generation)
    }

    /// Makes every name, waiter and image of `from` those of `into`.
    fn merge(&mut self, from: u64, into: u64) {
        let Some(gone) = self.entries.remove(&from) else { return };
        for id in self.names.values_mut().filter(|id| **id == from) {
            *id = into;
        }
        for image in self.images.values_mut().filter(|image| image.entry == from) {
            image.entry = into;
        }
        if let Some(entry) = self.entries.get_mut(&into) {
            entry.waiters.extend(gone.waiters);
            entry.askers.extend(gone.askers);
            entry.loads += gone.loads;
            entry.settings.absorb(gone.settings);
        }
    }

    /// Takes the failure of a model, at its load or in its engine; gives those who waited for it.
    pub(crate) fn fail(
        &mut self,
        id: u64,
        mut refusal: Refusal,
        now_ns: u64,
        limits: &Limits,
    ) -> Vec<Waiter> {
        let Some(entry) = self.entries.get_mut(&id) else { return Vec::new() };
        entry.failures = entry.failures.saturating_add(1);
        // The first failure costs no wait: a killed loader says nothing about the model. Memory does not come back at once.
        let wait_ns = match entry.failures {
            0 | 1 if refusal.code == Code::OutOfMemory => nanos(limits.load_retry_base),
            0 | 1 => 0,
            n => backoff_ns(limits.load_retry_base, limits.load_retry_cap, n - 2),
        };
        entry.note_failure(&refusal, now_ns);
        entry.planned_bytes = 0;
        let retry_at_ns = now_ns.saturating_add(wait_ns);
        refusal.retry_after_ms = ms_until(retry_at_ns, now_ns);
        entry.state = EntryState::Failed { refusal, retry_at_ns };
        std::mem::take(&mut entry.waiters)
    }

    /// The earliest instant at which a waiter gives up or a load has taken too long.
    pub(crate) fn next_timer_ns(&self) -> Option<u64> {
        self.entries
            .values()
            .flat_map(|e| {
                let asked = e.askers.iter().map(|a| a.deadline_ns);
                e.waiters.iter().map(|w| w.deadline_ns).chain(asked).chain(e.load_deadline_ns())
            })
            .min()
    }

    /// Takes out the waiters for which `gone` holds.
    pub(crate) fn take_waiters(&mut self, mut gone: impl FnMut(&Waiter) -> bool) -> Vec<Waiter> {
        let mut taken = Vec::new();
        for entry in self.entries.values_mut() {
            taken.extend(entry.waiters.extract_if(.., |w| gone(w)));
        }
        taken
    }

    /// Whether this generation is what its entry gives to new askers, or will be.
    pub(crate) fn is_wanted(&self, generation: u64) -> bool {
        let entry = self.images.get(&generation).and_then(|image| self.entries.get(&image.entry));
        entry.is_some_and(|e| {
            e.state == EntryState::Loaded { generation } || e.reload == Some(Reload::Warming { generation })
        })
    }

    /// Whether this generation is what its entry gives to new askers.
    pub(crate) fn is_current(&self, generation: u64) -> bool {
        let entry = self.images.get(&generation).and_then(|image| self.entries.get(&image.entry));
        entry.is_some_and(|e| e.state == EntryState::Loaded { generation })
    }

    /// Whether somebody waits for a model whose image is there: only the engine is missing.
    pub(crate) fn engine_is_waited_for(&self) -> bool {
        self.entries.values().any(|e| {
            let is_warming = matches!(e.reload, Some(Reload::Warming { .. }));
            matches!(e.state, EntryState::Loaded { .. }) && (e.is_waited_for() || is_warming)
        })
    }
}

/// `base * 2^step`, at most `cap`, in ns.
pub(crate) fn backoff_ns(base: std::time::Duration, cap: std::time::Duration, step: u32) -> u64 {
    let factor = 1u64.checked_shl(step).unwrap_or(u64::MAX);
    nanos(base).saturating_mul(factor).min(nanos(cap))
}

/// A duration in ns.
pub(crate) fn nanos(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Time from `now_ns` to `then_ns` in ms, rounded up.
pub(crate) fn ms_until(then_ns: u64, now_ns: u64) -> u32 {
    u32::try_from(then_ns.saturating_sub(now_ns).div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::image::Task;
    use shm_layout::wire::BackingKind;
    use shm_layout::wire::TaskFacts;

    fn facts(model_id: &str) -> ImageFacts {
        ImageFacts {
            model_id: model_id.into(),
            output_dim: 4,
            max_seq_tokens: 8,
            image_bytes: 4096,
            fingerprint: 1,
            content_hash: [1; 32],
            backing: BackingKind::SealedMemfd,
            facts: TaskFacts::of(Task::Embed),
            precision: "f32",
        }
    }

    fn begin(models: &mut Models, name: &str, load_id: u64) -> u64 {
        begin_at(models, name, load_id, 0, &Limits::default())
    }

    fn begin_at(models: &mut Models, name: &str, load_id: u64, now_ns: u64, limits: &Limits) -> u64 {
        let Lookup::Entry(id) = models.lookup(name, now_ns, limits) else { panic!("refused") };
        models.entries.get_mut(&id).unwrap().state =
            EntryState::Loading { load_id, deadline_ns: 1, progress: None, told_ns: 0 };
        models.entries.get_mut(&id).unwrap().waiters.push(Waiter {
            session: load_id,
            request_id: 1,
            asked_ns: 0,
            deadline_ns: 5,
            want_lane: false,
            want_image: false,
        });
        id
    }

    #[test]
    fn two_names_of_one_model_become_one_entry() {
        let mut models = Models::default();
        let a = begin(&mut models, "alias", 1);
        let b = begin(&mut models, "folder", 2);
        assert_ne!(a, b);
        assert_eq!(
            models.finish_load(1, facts("org/model"), 9),
            Finished::New { entry: a, generation: 1, needless_loads: vec![] }
        );
        assert_eq!(models.finish_load(2, facts("org/model"), 9), Finished::Known { entry: a });
        assert_eq!(models.entries.len(), 1);
        assert_eq!(models.entries[&a].waiters.len(), 2);
        for name in ["alias", "folder", "org/model"] {
            assert_eq!(models.lookup(name, 9, &Limits::default()), Lookup::Entry(a));
        }
    }

    #[test]
    fn a_load_under_the_canonical_name_becomes_needless() {
        let mut models = Models::default();
        let a = begin(&mut models, "org/model", 1);
        let b = begin(&mut models, "alias", 2);
        assert_eq!(
            models.finish_load(2, facts("org/model"), 9),
            Finished::New { entry: b, generation: 1, needless_loads: vec![1] }
        );
        assert!(!models.entries.contains_key(&a));
        assert_eq!(models.finish_load(1, facts("org/model"), 9), Finished::Unknown);
    }

    #[test]
    fn failures_are_retried_at_once_first_and_then_later_and_later() {
        let limits = Limits::default();
        let mut models = Models::default();
        let refusal = Refusal { code: Code::ModelLoadError, message: "x".into(), retry_after_ms: 0 };
        let mut now = 0;
        let mut waits = Vec::new();
        for load in 1..9 {
            let id = begin_at(&mut models, "m", load, now, &limits);
            assert_eq!(models.fail(id, refusal.clone(), now, &limits).len(), 1);
            let EntryState::Failed { retry_at_ns, .. } = models.entries[&id].state else { panic!() };
            if retry_at_ns > now {
                let Lookup::Refused(r) = models.lookup("m", now, &limits) else { panic!("loads too early") };
                assert_eq!((r.code, r.retry_after_ms), (Code::ModelLoadError, ms_until(retry_at_ns, now)));
            }
            waits.push((retry_at_ns - now) / 1_000_000);
            now = retry_at_ns;
        }
        assert_eq!(waits, [0, 250, 500, 1000, 2000, 4000, 8000, 10_000]);
    }

    #[test]
    fn wrong_names_cannot_fill_the_registry() {
        let limits = Limits { max_models: 3, ..Limits::default() };
        let mut models = Models::default();
        let refusal = Refusal { code: Code::ModelNotFound, message: "x".into(), retry_after_ms: 0 };
        for n in 0..50 {
            let id = begin_at(&mut models, &format!("m{n}"), n, 0, &limits);
            models.fail(id, refusal.clone(), 0, &limits);
        }
        assert!(models.entries.len() <= 3 && models.names.len() <= 3);
        for n in 0..3 {
            begin_at(&mut models, &format!("l{n}"), 100 + n, 0, &limits);
        }
        assert!(
            matches!(models.lookup("one more", 0, &limits), Lookup::Refused(r) if r.code == Code::TooMany)
        );
    }
}

//! When models leave: by idleness, to make room for another, by order; and which are loaded without being asked for. What
//! lets go of a generation that is not wanted any more is `clients::retire_unused`.

use super::entry::{EntrySettings, Order};
use super::models::{EngineSide, EntryState, Reload};
use super::{Core, nanos};
use crate::config::ModelSettings;
use shm_layout::limits::MAX_MODEL_NAME_BYTES;
use std::time::Duration;
use tracing::{info, warn};

/// Loads in a row that may fail before a model that is to be kept loaded waits for somebody to ask for it.
const MAX_PRELOAD_TRIES: u32 = 5;
/// Models named in a refusal for lack of room.
const MAX_NAMED_MODELS: usize = 8;
/// Processes named for each of them.
const MAX_NAMED_PIDS: usize = 8;

/// How long models stay and how many, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// How long a model without lease or job stays; zero = for ever.
    pub(crate) unload_after: Duration,
    /// Models loaded at once; 0 = no bound.
    pub(crate) max_shared_models: usize,
    /// Bytes that images and caches may take; `None` = what the system has.
    pub(crate) memory_budget_bytes: Option<u64>,
    /// Whether loads, unloads and their like are logged.
    pub(crate) log_model_usage: bool,
}

/// Why a model is let go of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// Nobody used it for as long as configured.
    Idle,
    /// Another one needs its place.
    Room,
    /// Another one needs its memory.
    Memory,
    /// Somebody said so.
    Order,
}

impl Why {
    const fn name(self) -> &'static str {
        match self {
            Why::Idle => "idle",
            Why::Room => "room",
            Why::Memory => "memory",
            Why::Order => "order",
        }
    }
}

impl Core {
    /// Takes the configured models into the registry, and puts those in line that are to be loaded at once.
    pub(super) fn configure_models(&mut self, now_ns: u64, models: &[ModelSettings], preload: &[String]) {
        for settings in models {
            if settings.id.is_empty()
                || settings.source.is_empty()
                || settings.source.starts_with('-')
                || settings.id.len().max(settings.source.len()) > MAX_MODEL_NAME_BYTES
            {
                warn!(id = settings.id, "a configured model is left out: its id or source is no usable name");
                continue;
            }
            let known = [&settings.source, &settings.id].into_iter().find_map(|n| self.models.names.get(n));
            let id = known.copied().unwrap_or_else(|| self.models.add(&settings.source, now_ns));
            self.models.names.insert(settings.source.clone(), id);
            self.models.names.insert(settings.id.clone(), id);
            if let Some(entry) = self.models.entries.get_mut(&id) {
                entry.settings.absorb(EntrySettings::from(settings));
            }
        }
        for name in preload {
            let name = if name.is_empty() { self.config.default_model.clone() } else { name.clone() };
            let id = match self.models.names.get(&name) {
                Some(id) => *id,
                None => self.models.add(&name, now_ns),
            };
            if let Some(entry) = self.models.entries.get_mut(&id) {
                entry.settings.pinned = true;
            }
        }
        for entry in self.models.entries.values_mut() {
            if entry.settings.pinned && entry.state == EntryState::Unloaded {
                entry.queue(now_ns);
            }
        }
    }

    /// How long a model without lease or job stays; `None` = for ever.
    fn stays_ns(&self, settings: &EntrySettings) -> Option<u64> {
        let after = settings.unload_after.unwrap_or(self.config.policy.unload_after);
        (!after.is_zero() && !settings.pinned).then(|| nanos(after))
    }

    /// Whether anybody awaits a model, or holds or computes with one of its generations: who holds the one before will
    /// want the present one.
    pub(super) fn in_use(&self, id: u64) -> bool {
        let Some(entry) = self.models.entries.get(&id) else { return false };
        let mut generations = self.models.images.iter().filter(|(_, image)| image.entry == id);
        entry.is_waited_for() || generations.any(|(of, _)| self.leases.holds(*of) || self.relay.uses(*of))
    }

    /// When a loaded model is let go of if nothing happens; `None` = it is in use, or stays.
    pub(super) fn unload_due_ns(&self, id: u64) -> Option<u64> {
        let entry = self.models.entries.get(&id)?;
        entry.generation()?;
        let due_ns = match self.stays_ns(&entry.settings) {
            _ if entry.unload_when_idle => 0,
            Some(after_ns) => entry.last_use_ns.saturating_add(after_ns),
            None => return None,
        };
        (entry.reload.is_none() && !self.in_use(id)).then_some(due_ns)
    }

    /// The next instant at which something here is due.
    pub(super) fn lifecycle_timer_ns(&self) -> Option<u64> {
        if self.leaving.has_begun() {
            return None;
        }
        let unloads = self.models.entries.keys().filter_map(|id| self.unload_due_ns(*id));
        let retries = self.models.entries.values().filter_map(|entry| match entry.state {
            EntryState::Failed { retry_at_ns, .. } if entry.is_retried() => Some(retry_at_ns),
            _ => None,
        });
        unloads.chain(retries).min()
    }

    /// Lets go of what nobody used for long enough, and puts failed models in line again that are to be kept loaded.
    pub(super) fn lifecycle_overdue(&mut self, now_ns: u64) {
        if self.leaving.has_begun() {
            return;
        }
        let ids: Vec<u64> = self.models.entries.keys().copied().collect();
        for id in ids {
            // The cheap half of the question first: it is asked after every event.
            let ripe = self.models.entries.get(&id).is_some_and(|entry| {
                entry.unload_when_idle
                    || self
                        .stays_ns(&entry.settings)
                        .is_some_and(|n| entry.last_use_ns.saturating_add(n) <= now_ns)
            });
            if ripe && self.unload_due_ns(id).is_some_and(|due_ns| due_ns <= now_ns) {
                let ordered = self.models.entries.get(&id).is_some_and(|entry| entry.unload_when_idle);
                self.unload(now_ns, id, if ordered { Why::Order } else { Why::Idle });
            }
            if let Some(entry) = self.models.entries.get_mut(&id)
                && let EntryState::Failed { retry_at_ns, .. } = entry.state
                && retry_at_ns <= now_ns
                && entry.is_retried()
            {
                entry.queue(now_ns);
            }
        }
    }

    /// Lets go of a loaded model; whoever holds its generation keeps it. Gives the generation.
    pub(super) fn unload(&mut self, now_ns: u64, id: u64, why: Why) -> Option<u64> {
        self.cancel_reload(now_ns, id, "the model was unloaded meanwhile");
        let entry = self.models.entries.get_mut(&id)?;
        let generation = entry.generation()?;
        entry.state = EntryState::Unloaded;
        entry.unload_when_idle = false;
        entry.forget_probes();
        entry.counts.unloads = entry.counts.unloads.saturating_add(1);
        if matches!(why, Why::Room | Why::Memory) {
            entry.counts.evictions = entry.counts.evictions.saturating_add(1);
            self.metrics.evictions += 1;
        }
        self.metrics.unloads += 1;
        if self.config.policy.log_model_usage {
            let (model, idle_s) = (entry.name(), now_ns.saturating_sub(entry.last_use_ns) / 1_000_000_000);
            info!(event = "model.unload", model, generation, why = why.name(), idle_s, "model unloaded");
        }
        Some(generation)
    }

    /// The idle model that was used least recently and may leave to make room.
    pub(super) fn least_recently_used(&self) -> Option<u64> {
        let may_leave = |(id, entry): &(&u64, &super::entry::Entry)| {
            entry.generation().is_some()
                && !entry.settings.pinned
                && entry.reload.is_none()
                && !self.in_use(**id)
        };
        let idle = self.models.entries.iter().filter(may_leave);
        idle.min_by_key(|(id, entry)| (entry.last_use_ns, **id)).map(|(id, _)| *id)
    }

    /// Whether one model more may be loaded, once idle ones have left.
    pub(super) fn has_room(&self) -> bool {
        let most = self.config.policy.max_shared_models;
        most == 0 || self.models.occupied() < most || self.least_recently_used().is_some()
    }

    /// Makes room for one model more; false when every one is in use.
    pub(super) fn make_room(&mut self, now_ns: u64) -> bool {
        let most = self.config.policy.max_shared_models;
        while most > 0 && self.models.occupied() >= most {
            let Some(id) = self.least_recently_used() else { return false };
            self.unload(now_ns, id, Why::Room);
        }
        true
    }

    /// Why there is no room, naming the limit and who holds what.
    pub(super) fn no_room(&self) -> String {
        let loaded = self
            .models
            .entries
            .iter()
            .filter(|(_, e)| matches!(e.state, EntryState::Loaded { .. } | EntryState::Loading { .. }));
        let named: Vec<String> = loaded
            .take(MAX_NAMED_MODELS)
            .map(|(id, e)| format!("{} ({})", e.name(), self.held_by(*id)))
            .collect();
        format!(
            "{} models are loaded, the limit (sharing.max_shared_models), and none is idle: {}; release one, unload one, \
             or raise the limit",
            self.models.occupied(),
            named.join(", ")
        )
    }

    /// Who uses a model, in words.
    pub(super) fn held_by(&self, id: u64) -> String {
        let Some(entry) = self.models.entries.get(&id) else { return "nobody".into() };
        let mut pids: Vec<u32> = self
            .leases
            .iter()
            .filter(|(_, lease)| self.models.images.get(&lease.generation).is_some_and(|i| i.entry == id))
            .filter_map(|(session, _)| self.sessions.get(session).map(|known| known.pid))
            .collect();
        pids.sort_unstable();
        pids.dedup();
        let more = pids.len().saturating_sub(MAX_NAMED_PIDS);
        pids.truncate(MAX_NAMED_PIDS);
        let named: Vec<String> = pids.iter().map(u32::to_string).collect();
        match (pids.is_empty(), more) {
            (true, _) if matches!(entry.state, EntryState::Loading { .. } | EntryState::Queued) => {
                "being loaded".into()
            }
            (true, _) if entry.is_waited_for() => "waited for".into(),
            (true, _) if entry.settings.pinned => "preloaded".into(),
            (true, _) => "jobs in flight".into(),
            (false, 0) => format!("held by processes {}", named.join(", ")),
            (false, more) => format!("held by processes {} and {more} more", named.join(", ")),
        }
    }

    /// Whether every generation that the engine was told to let go of is gone from there.
    pub(super) fn note_unloaded(&mut self, generation: u64) {
        if let Some(gone) = self.going.remove(&generation) {
            self.answer_unloaded(gone);
        }
    }

    /// The engine is gone, and with it all that it mapped.
    pub(super) fn all_unloaded(&mut self) {
        for (_, gone) in std::mem::take(&mut self.going) {
            self.answer_unloaded(gone);
        }
    }

    /// Drops the vectors of an idle model: its cache is made anew, empty. The engine takes the generation up again.
    pub(super) fn drop_cache(&mut self, now_ns: u64, generation: u64) {
        let Some(image) = self.models.images.get_mut(&generation) else { return };
        if image.cache.description().is_none() {
            return;
        }
        image.cache = super::models::CacheSide::Making;
        if matches!(image.engine, EngineSide::Sent | EngineSide::Ready) {
            image.engine = EngineSide::Unsent;
            self.tell_engine(shm_layout::wire::ToEngine::UnloadModel { generation }, Vec::new());
        }
        if self.config.policy.log_model_usage {
            info!(event = "cache.drop", generation, "vectors of an idle model dropped to make room");
        }
        self.make_cache(now_ns, generation);
    }
}

impl super::entry::Entry {
    /// Whether a failed load is tried again without anybody asking.
    fn is_retried(&self) -> bool {
        self.settings.pinned && self.failures < MAX_PRELOAD_TRIES
    }

    /// Health checks that were sent are sent again to whatever serves the model next.
    pub(crate) fn forget_probes(&mut self) {
        for asker in &mut self.askers {
            if let Order::Health { sent } = &mut asker.order {
                *sent = false;
            }
        }
    }

    /// Whether a reload is under way.
    pub(crate) fn is_reloading(&self) -> bool {
        matches!(self.reload, Some(Reload::Queued | Reload::Loading { .. } | Reload::Warming { .. }))
    }
}

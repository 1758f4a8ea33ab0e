//! One model as the registry keeps it: its names, its settings, how far its loads are, who waits for it. Pure data and
//! what follows from it alone; the registry as a whole is in `models`.

use super::models::{EntryState, Reload, Waiter};
use crate::config::{DeviceChoice, ModelKind, ModelSettings};
use shm_layout::code::Code;
use shm_layout::wire::Refusal;
use std::time::Duration;

/// An order that waits for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asker {
    pub(crate) session: u64,
    pub(crate) request_id: u64,
    /// When the asker gives up.
    pub(crate) deadline_ns: u64,
    pub(crate) order: Order,
}

/// What an order wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// That the model is served; `was_loaded` when it was loaded already as it was asked for.
    Load { was_loaded: bool },
    /// That the generation is replaced.
    Reload,
    /// That the engine computes something known; `sent` once it was told to.
    Health { sent: bool },
}

/// What was counted of a model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct EntryCounts {
    pub(crate) reloads: u32,
    pub(crate) unloads: u32,
    pub(crate) evictions: u32,
    pub(crate) failures: u32,
}

/// The last failure of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FailureNote {
    pub(crate) code: Code,
    pub(crate) message: String,
    pub(crate) at_ns: u64,
}

/// What the configuration says of a model; several ids may mean the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EntrySettings {
    pub(crate) ids: Vec<String>,
    pub(crate) kind: Option<ModelKind>,
    /// Loaded at start and kept.
    pub(crate) pinned: bool,
    /// Instead of the broker's own; zero = for ever.
    pub(crate) unload_after: Option<Duration>,
    pub(crate) shared: bool,
    pub(crate) device: DeviceChoice,
    /// Whether its vectors are kept.
    pub(crate) cache: bool,
}

impl Default for EntrySettings {
    fn default() -> EntrySettings {
        EntrySettings {
            ids: Vec::new(),
            kind: None,
            pinned: false,
            unload_after: None,
            shared: true,
            device: DeviceChoice::Auto,
            cache: true,
        }
    }
}

impl From<&ModelSettings> for EntrySettings {
    fn from(settings: &ModelSettings) -> EntrySettings {
        EntrySettings {
            ids: vec![settings.id.clone()],
            kind: Some(settings.kind),
            pinned: settings.preload && settings.shared,
            unload_after: settings.unload_after,
            shared: settings.shared,
            device: settings.device,
            cache: settings.cache,
        }
    }
}

impl EntrySettings {
    /// Whether the model stays in the registry when it is not loaded.
    pub(crate) fn is_kept(&self) -> bool {
        self.pinned || !self.ids.is_empty()
    }

    /// Takes in what is said of the same model elsewhere: it stays as long as the longer of both says. The first one's
    /// kind and device count.
    pub(crate) fn absorb(&mut self, other: EntrySettings) {
        if !self.is_kept() {
            *self = other;
            return;
        }
        if !other.is_kept() {
            return;
        }
        self.ids.extend(other.ids);
        self.kind = self.kind.or(other.kind);
        self.pinned |= other.pinned;
        self.shared |= other.shared;
        self.cache |= other.cache;
        self.unload_after = match (self.unload_after, other.unload_after) {
            (Some(Duration::ZERO), _) | (_, Some(Duration::ZERO)) => Some(Duration::ZERO),
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
    }
}

/// One model.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// The name it was first asked for by.
    pub(crate) asked_name: String,
    /// Its canonical id, known once it was loaded.
    pub(crate) canonical: Option<String>,
    /// What the loader is given.
    pub(crate) source: String,
    /// What the configuration says of it.
    pub(crate) settings: EntrySettings,
    pub(crate) state: EntryState,
    /// A new generation on its way while the present one is served; only in the state `Loaded`.
    pub(crate) reload: Option<Reload>,
    pub(crate) waiters: Vec<Waiter>,
    /// Orders that wait for a load, a reload or the engine.
    pub(crate) askers: Vec<Asker>,
    /// It is let go of as soon as nobody uses it.
    pub(crate) unload_when_idle: bool,
    /// What the load under way says it will take; 0 = nothing said yet.
    pub(crate) planned_bytes: u64,
    /// How much of it is there already.
    pub(crate) done_bytes: u64,
    pub(crate) counts: EntryCounts,
    pub(crate) last_error: Option<FailureNote>,
    /// Loads in a row that failed.
    pub(crate) failures: u32,
    /// Loads that succeeded.
    pub(crate) loads: u32,
    /// When the present or last load was asked for.
    pub(crate) requested_ns: u64,
    /// Duration of the last load.
    pub(crate) load_us: u64,
    /// When a lease was last granted or ended.
    pub(crate) last_use_ns: u64,
}

impl Entry {
    /// A model that was never loaded.
    pub(crate) fn new(name: &str, now_ns: u64) -> Entry {
        Entry {
            asked_name: name.to_owned(),
            canonical: None,
            source: name.to_owned(),
            settings: EntrySettings::default(),
            state: EntryState::Unloaded,
            reload: None,
            waiters: Vec::new(),
            askers: Vec::new(),
            unload_when_idle: false,
            planned_bytes: 0,
            done_bytes: 0,
            counts: EntryCounts::default(),
            last_error: None,
            failures: 0,
            loads: 0,
            requested_ns: now_ns,
            load_us: 0,
            last_use_ns: now_ns,
        }
    }

    /// The name for people: the canonical one once it is known.
    pub(crate) fn name(&self) -> &str {
        self.canonical.as_deref().unwrap_or(&self.asked_name)
    }

    /// Puts it in line for a loader.
    pub(crate) fn queue(&mut self, now_ns: u64) {
        self.state = EntryState::Queued;
        self.requested_ns = now_ns;
        self.unload_when_idle = false;
    }

    /// The generation that new leases get.
    pub(crate) fn generation(&self) -> Option<u64> {
        match self.state {
            EntryState::Loaded { generation } => Some(generation),
            _ => None,
        }
    }

    /// The load or reload under way, if one is.
    pub(crate) fn load_id(&self) -> Option<u64> {
        match (&self.state, &self.reload) {
            (EntryState::Loading { load_id, .. }, _) | (_, Some(Reload::Loading { load_id, .. })) => {
                Some(*load_id)
            }
            _ => None,
        }
    }

    /// When the load or reload under way has taken too long.
    pub(crate) fn load_deadline_ns(&self) -> Option<u64> {
        match (&self.state, &self.reload) {
            (EntryState::Loading { deadline_ns, .. }, _) | (_, Some(Reload::Loading { deadline_ns, .. })) => {
                Some(*deadline_ns)
            }
            _ => None,
        }
    }

    /// Whether it waits for a loader.
    pub(crate) fn is_queued(&self) -> bool {
        self.state == EntryState::Queued || self.reload == Some(Reload::Queued)
    }

    /// Whether anybody waits for it to be loaded or looked at.
    pub(crate) fn is_waited_for(&self) -> bool {
        !(self.waiters.is_empty() && self.askers.is_empty())
    }

    /// Notes a failure for reports.
    pub(crate) fn note_failure(&mut self, refusal: &Refusal, now_ns: u64) {
        self.counts.failures = self.counts.failures.saturating_add(1);
        self.last_error =
            Some(FailureNote { code: refusal.code, message: refusal.message.clone(), at_ns: now_ns });
    }
}

//! The report on everything. It waits a moment for the engine's counters, so that they are of now.

use super::entry::Entry;
use super::models::{EngineSide, EntryState, ms_until};
use super::{Core, nanos};
use shm_layout::wire::{
    BrokerMessage, CacheReport, EngineReport, GenerationReport, LastError, ModelDetail, ModelReport,
    ModelState, ProcessReferences, SessionReport, StatusReport, ToEngine,
};
use std::collections::BTreeMap;

/// Reports that one session may have waiting; further ones are answered with the last known counters.
const MAX_WAITING_PER_SESSION: usize = 4;

/// Reports that wait for the engine's counters.
#[derive(Debug, Default)]
pub(crate) struct StatusWaiters {
    waiting: Vec<(u64, u64)>,
    deadline_ns: u64,
}

impl StatusWaiters {
    pub(crate) fn forget(&mut self, session: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != session);
    }

    pub(crate) fn next_timer_ns(&self) -> Option<u64> {
        (!self.waiting.is_empty()).then_some(self.deadline_ns)
    }
}

impl Core {
    pub(super) fn status_wanted(&mut self, now_ns: u64, session: u64, request_id: u64) {
        let Some(known) = self.sessions.get_mut(session) else { return };
        if !self.engine.is_up() || known.status_waiting >= MAX_WAITING_PER_SESSION {
            let report = self.report(now_ns);
            self.send(session, request_id, BrokerMessage::Status(report));
            return;
        }
        known.status_waiting += 1;
        if self.status.waiting.is_empty() {
            self.status.deadline_ns = now_ns.saturating_add(nanos(self.config.limits.status_wait));
            self.tell_engine(ToEngine::Totals, Vec::new());
        }
        self.status.waiting.push((session, request_id));
    }

    /// Answers every report that waits.
    pub(super) fn answer_status(&mut self, now_ns: u64) {
        let waiting = std::mem::take(&mut self.status.waiting);
        if waiting.is_empty() {
            return;
        }
        let report = self.report(now_ns);
        for (session, request_id) in waiting {
            if let Some(known) = self.sessions.get_mut(session) {
                known.status_waiting = known.status_waiting.saturating_sub(1);
            }
            self.send(session, request_id, BrokerMessage::Status(report.clone()));
        }
    }

    pub(super) fn status_overdue(&mut self, now_ns: u64) {
        if self.status.next_timer_ns().is_some_and(|due| due <= now_ns) {
            self.answer_status(now_ns);
        }
    }

    /// The report; the I/O side fills in the number of open descriptors and how full the caches are.
    fn report(&self, now_ns: u64) -> StatusReport {
        let us_since = |then_ns: u64| now_ns.saturating_sub(then_ns) / 1000;
        let mut holders: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        let mut held: BTreeMap<u64, u32> = BTreeMap::new();
        for (session, lease) in self.leases.iter() {
            let Some(image) = self.models.images.get(&lease.generation) else { continue };
            *held.entry(image.entry).or_default() += 1;
            if let Some(known) = self.sessions.get(session) {
                holders.entry(image.entry).or_default().push(known.pid);
            }
        }
        let models = self
            .models
            .entries
            .iter()
            .map(|(id, entry)| {
                let (state, generation, error) = match &entry.state {
                    EntryState::Unloaded => (ModelState::Unloaded, None, None),
                    EntryState::Queued | EntryState::Loading { .. } => (ModelState::Loading, None, None),
                    EntryState::Loaded { generation } => (ModelState::Ready, Some(*generation), None),
                    EntryState::Failed { refusal, .. } => {
                        (ModelState::Failed, None, Some(format!("{}: {}", refusal.code, refusal.message)))
                    }
                };
                let image = generation.and_then(|generation| self.models.images.get(&generation));
                let mut lease_pids = holders.remove(id).unwrap_or_default();
                lease_pids.sort_unstable();
                lease_pids.dedup();
                ModelReport {
                    model_id: entry.name().to_owned(),
                    state,
                    description: image.map(|image| image.description.clone()),
                    load_us: entry.load_us,
                    leases: held.get(id).copied().unwrap_or(0),
                    lease_pids,
                    loads: entry.loads,
                    idle_us: us_since(entry.last_use_ns),
                    error,
                    cache: image.and_then(|image| {
                        let region_bytes = image.cache.description()?.region_bytes;
                        Some(CacheReport {
                            region_bytes,
                            totals: image.cache_totals,
                            ..CacheReport::default()
                        })
                    }),
                    detail: self.model_detail(now_ns, *id, entry),
                }
            })
            .collect();
        let engines = vec![EngineReport {
            pid: self.engine.pid,
            incarnation: self.engine.incarnation,
            restarts: self.engine.restarts(),
            lanes: u32::try_from(self.lanes.len()).unwrap_or(u32::MAX),
            threads: self.engine.threads,
            totals: self.engine.totals,
        }];
        let sessions = self
            .sessions
            .iter()
            .map(|(session_id, known)| {
                let (leases, lanes) = self.leases.count(session_id);
                SessionReport {
                    session_id,
                    pid: known.pid,
                    client_name: known.client_name.clone(),
                    leases: u32::try_from(leases).unwrap_or(u32::MAX),
                    lanes: u32::try_from(lanes).unwrap_or(u32::MAX),
                    socket_jobs: u32::try_from(self.relay.count(session_id)).unwrap_or(u32::MAX),
                    age_us: us_since(known.opened_ns),
                }
            })
            .collect();
        StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            broker_pid: self.config.broker_pid,
            boot_id: self.config.boot_id,
            uptime_us: us_since(self.started_ns),
            default_model: self.config.default_model.clone(),
            models,
            engines,
            sessions,
            faults: self.faults,
            open_descriptors: 0,
            provided: self.provided_report(now_ns),
            metrics: Box::new(self.metrics_report()),
            alerts: self.alerts.report(now_ns),
        }
    }

    /// What there is to say of one model beside its state.
    fn model_detail(&self, now_ns: u64, id: u64, entry: &Entry) -> ModelDetail {
        let us_since = |then_ns: u64| now_ns.saturating_sub(then_ns) / 1000;
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut references: BTreeMap<u32, u32> = BTreeMap::new();
        for (session, lease) in self.leases.iter() {
            let is_ours = self.models.images.get(&lease.generation).is_some_and(|image| image.entry == id);
            if is_ours && let Some(known) = self.sessions.get(session) {
                *references.entry(known.pid).or_default() += 1;
            }
        }
        let images = || self.models.images.iter().filter(|(_, image)| image.entry == id);
        let settings = &entry.settings;
        ModelDetail {
            ids: settings.ids.clone(),
            kind: settings.kind.map(|kind| kind.name().to_owned()),
            source: entry.source.clone(),
            device: super::devices::CPU.to_owned(),
            device_wished: settings.device.to_string(),
            precision: images().next_back().map(|(_, image)| image.precision.to_owned()),
            pinned: settings.pinned,
            reloading: entry.is_reloading(),
            last_error: entry.last_error.as_ref().map(|note| LastError {
                code: note.code,
                message: note.message.clone(),
                age_us: us_since(note.at_ns),
            }),
            generations: images()
                .map(|(generation, image)| GenerationReport {
                    generation: *generation,
                    image_bytes: image.description.image_bytes,
                    backing: image.description.backing,
                    is_current: self.models.is_current(*generation),
                    is_served: image.engine == EngineSide::Ready,
                    leases: narrow(self.leases.count_of(*generation)),
                    age_us: us_since(image.loaded_ns),
                })
                .collect(),
            references: references.into_iter().map(|(pid, count)| ProcessReferences { pid, count }).collect(),
            waiting: narrow(entry.waiters.len()),
            queued_jobs: narrow(images().map(|(generation, _)| self.relay.count_of(*generation)).sum()),
            retry_after_ms: match &entry.state {
                EntryState::Failed { retry_at_ns, .. } => ms_until(*retry_at_ns, now_ns),
                _ => 0,
            },
            unload_in_us: self.unload_due_ns(id).map(|due_ns| due_ns.saturating_sub(now_ns) / 1000),
            reloads: entry.counts.reloads,
            unloads: entry.counts.unloads,
            evictions: entry.counts.evictions,
            failures: entry.counts.failures,
        }
    }
}

//! The engine: when it is started, what is handed over to it, what its death leads to. No job that was accepted is lost
//! with an engine, and no client is told of its death.

use super::engine::Phase;
use super::lanes::LaneState;
use super::models::{CacheSide, EngineSide, Reload, ms_until};
use super::{Action, Attachment, Core};
use shm_layout::code::Code;
use shm_layout::wire::{CacheTotals, FromEngine, Refusal, ToEngine};
use std::collections::BTreeSet;
use tracing::{debug, info, warn};

impl Core {
    /// Starts an engine when one is needed and may be started.
    pub(super) fn supervise(&mut self, now_ns: u64) {
        match self.engine.phase {
            Phase::Down { retry_at_ns } if retry_at_ns <= now_ns && self.engine_is_needed() => {
                let incarnation = self.engine.begin(now_ns, &self.config.limits);
                self.actions.push(Action::StartEngine { incarnation });
            }
            Phase::Starting { deadline_ns } if deadline_ns <= now_ns => {
                let incarnation = self.engine.incarnation;
                self.engine_lost(now_ns, incarnation, "it did not report itself in time".to_owned());
            }
            _ => {}
        }
    }

    /// An engine is kept ready even when nobody needs it, unless it cannot be started: then only who needs it makes the
    /// broker try again.
    fn engine_is_needed(&self) -> bool {
        let used =
            self.lanes.len() > 0 || self.relay.owes_from_engine() || self.models.engine_is_waited_for();
        if self.leaving.has_begun() {
            self.leaving_needs_engine()
        } else {
            used || !self.engine.is_broken(self.limits())
        }
    }

    pub(super) fn engine_timer_ns(&self) -> Option<u64> {
        match self.engine.phase {
            Phase::Down { retry_at_ns } => self.engine_is_needed().then_some(retry_at_ns),
            Phase::Starting { deadline_ns } => Some(deadline_ns),
            Phase::Up { .. } | Phase::Dying => None,
        }
    }

    pub(super) fn engine_started(&mut self, incarnation: u64, pid: u32) {
        if incarnation == self.engine.incarnation {
            self.engine.pid = pid;
            info!(pid, incarnation, "engine started");
        }
    }

    pub(super) fn engine_says(&mut self, now_ns: u64, incarnation: u64, message: FromEngine) {
        if incarnation != self.engine.incarnation || matches!(self.engine.phase, Phase::Down { .. }) {
            return;
        }
        match message {
            FromEngine::Ready { threads } => {
                if !matches!(self.engine.phase, Phase::Starting { .. }) {
                    return;
                }
                info!(pid = self.engine.pid, incarnation, threads, "engine ready");
                self.engine.up(threads, now_ns);
                let generations: Vec<u64> = self.models.images.keys().copied().collect();
                for generation in generations {
                    self.offer_model(generation);
                }
            }
            FromEngine::ModelReady { generation } => self.model_served(now_ns, generation),
            FromEngine::ModelFailed { generation, code, message } => {
                self.model_refused(now_ns, generation, code, message);
            }
            FromEngine::ModelUnloaded { generation } => {
                debug!(generation, "engine let go of a generation");
                self.note_unloaded(generation);
            }
            FromEngine::Probed { generation, code, message, probe_us } => {
                self.engine.worked();
                if self.models.is_current(generation) {
                    self.probed(generation, code, message, probe_us);
                }
            }
            FromEngine::Metrics(measured) => {
                self.metrics.engine = measured;
                self.look_for_alerts(now_ns);
            }
            FromEngine::LaneFault { lane_id, message } => {
                let Some(lane) = self.lanes.get(lane_id) else { return };
                if lane.state != LaneState::Dropping {
                    let message = format!("the rules of a lane were broken: {}", super::cut(message));
                    self.fault(now_ns, lane.session, Code::BadFrame, &message);
                }
            }
            FromEngine::LaneDropped { lane_id } => {
                self.engine.worked();
                if self.lanes.get(lane_id).is_some_and(|lane| lane.state == LaneState::Dropping) {
                    self.lanes.remove(lane_id);
                }
            }
            FromEngine::JobStarted { relay_id } => self.relay.mark_started(relay_id),
            FromEngine::Answer(answer) => {
                self.engine.worked();
                self.job_answered(answer);
            }
            FromEngine::Partial(partial) => self.job_goes_on(partial),
            FromEngine::CacheInsert { generation, bulk, keys, values } => {
                self.fill_cache(generation, bulk, keys, values);
            }
            FromEngine::CacheTotals { generation, totals } => {
                if let Some(image) = self.models.images.get_mut(&generation) {
                    image.cache_totals = totals;
                }
            }
            FromEngine::Totals(totals) => {
                self.engine.totals = totals;
                self.answer_status(now_ns);
            }
        }
    }

    /// Tells the engine of a generation if it serves and does not know it.
    pub(super) fn offer_model(&mut self, generation: u64) {
        if !self.engine.is_up() || self.engine.drain_sent {
            return;
        }
        let Some(image) = self.models.images.get_mut(&generation) else { return };
        if image.engine != EngineSide::Unsent || image.cache == CacheSide::Making {
            return;
        }
        image.engine = EngineSide::Sent;
        let cache = image.cache.description();
        let message = ToEngine::LoadModel {
            generation,
            image_bytes: image.description.image_bytes,
            backing: image.description.backing,
            cache,
        };
        let mut attachments = vec![Attachment::Image(generation)];
        attachments.extend(cache.map(|_| Attachment::Cache(generation)));
        self.tell_engine(message, attachments);
    }

    fn model_served(&mut self, now_ns: u64, generation: u64) {
        let Some(image) = self.models.images.get_mut(&generation) else { return };
        if image.engine != EngineSide::Sent {
            return;
        }
        image.engine = EngineSide::Ready;
        let lanes: Vec<u64> =
            self.lanes.live().filter(|(_, lane)| lane.generation == generation).map(|(id, _)| id).collect();
        for lane_id in lanes {
            self.hand_over_lane(lane_id, generation);
        }
        self.send_held_jobs(now_ns);
        self.note_device(now_ns, generation);
        self.switch_if_warm(now_ns, generation);
        self.grant_waiters(now_ns, generation);
        self.answer_loaded(generation);
        self.send_probe(generation);
    }

    fn model_refused(&mut self, now_ns: u64, generation: u64, code: Code, message: String) {
        let Some(image) = self.models.images.get_mut(&generation) else { return };
        if image.engine != EngineSide::Sent {
            return;
        }
        image.engine = EngineSide::Failed;
        let entry = image.entry;
        warn!(model = image.description.model_id, generation, %code, "the engine cannot serve a model: {message}");
        let code = if code == Code::Ok { Code::ModelUnavailable } else { code };
        let refusal = Refusal { code, message: super::cut(message), retry_after_ms: 0 };
        if self.models.is_current(generation) {
            self.fail_model(now_ns, entry, refusal.clone());
        } else if self.models.is_wanted(generation) {
            // On its way to replace another one, which goes on.
            self.fail_reload(now_ns, entry, refusal.clone());
        }
        // Whoever has a lane would wait in it for ever; told so, it can connect and ask again.
        let bereft: BTreeSet<u64> =
            self.lanes.live().filter(|(_, l)| l.generation == generation).map(|(_, l)| l.session).collect();
        for session in bereft {
            self.close_session(now_ns, session, refusal.clone());
        }
        self.send_held_jobs(now_ns);
    }

    /// The engine's link is gone or unusable, or it is too late: whatever it is, it must not write into lanes any more.
    pub(super) fn engine_lost(&mut self, now_ns: u64, incarnation: u64, reason: String) {
        let lives = !matches!(self.engine.phase, Phase::Down { .. } | Phase::Dying);
        if incarnation == self.engine.incarnation && lives {
            self.engine.dying(Some(reason), now_ns, &self.config.limits);
            self.actions.push(Action::KillEngine { incarnation });
        }
    }

    /// The engine is gone for good: it writes nowhere any more. `orderly` = it was told to leave and did.
    pub(super) fn engine_dead(&mut self, now_ns: u64, incarnation: u64, why: String, orderly: bool) {
        let why = self
            .engine
            .killed_because
            .take()
            .map_or(why, |reason| format!("the engine was killed: {reason}"));
        if incarnation != self.engine.incarnation || matches!(self.engine.phase, Phase::Down { .. }) {
            return;
        }
        if orderly {
            info!(incarnation, "engine finished and left");
        } else {
            warn!(pid = self.engine.pid, incarnation, "{why}");
        }
        let limits = self.config.limits.clone();
        self.engine.dead(why, now_ns, &limits);
        for image in self.models.images.values_mut() {
            image.engine = EngineSide::Unsent;
            image.cache_totals = CacheTotals::default();
        }
        self.lanes.engine_gone();
        self.all_unloaded();
        self.probes_lost();
        self.metrics.engine_gone();
        if !orderly {
            self.alerts.engine_died(now_ns);
            self.look_for_alerts(now_ns);
        }
        self.jobs_lost_their_engine();
        self.answer_status(now_ns);
        self.leaving_engine_dead(orderly);
        if self.engine.is_broken(&limits) {
            self.give_up_on_engine(now_ns);
        }
    }

    /// The engine cannot be started: those who wait for it are told, with the reason.
    fn give_up_on_engine(&mut self, now_ns: u64) {
        let retry_after_ms = match self.engine.phase {
            Phase::Down { retry_at_ns } => ms_until(retry_at_ns, now_ns).max(1000),
            _ => 1000,
        };
        let message = format!(
            "{}; {} starts in a row failed; see the broker's log",
            self.engine.last_error, self.engine.failed_starts
        );
        let waiting: Vec<u64> = self
            .models
            .entries
            .iter()
            .filter(|(_, e)| matches!(e.state, super::models::EntryState::Loaded { .. }))
            .map(|(id, _)| *id)
            .collect();
        for id in waiting {
            let Some(entry) = self.models.entries.get_mut(&id) else { continue };
            let (waiters, askers) = (std::mem::take(&mut entry.waiters), std::mem::take(&mut entry.askers));
            let refusal = Refusal { code: Code::ModelUnavailable, message: message.clone(), retry_after_ms };
            self.refuse_waiters(waiters, &refusal);
            self.refuse_askers(askers, &refusal);
            if self.models.entries.get(&id).is_some_and(|e| matches!(e.reload, Some(Reload::Warming { .. })))
            {
                self.fail_reload(now_ns, id, refusal);
            }
        }
        self.answer_for_engine(Code::ModelUnavailable, &message);
    }
}

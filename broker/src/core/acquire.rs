//! Loads and leases: one load for however many ask, who waits for how long, who gets what.

use super::lanes::{Lane, LaneState};
use super::models::{CacheSide, EngineSide, EntryState, Finished, Reload, Waiter};
use super::orders::check_name;
use super::{Action, Attachment, Core, ImageFacts, nanos};
use shm_layout::code::Code;
use shm_layout::lane::REGION_BYTES;
use shm_layout::wire::{
    Acquire, BrokerMessage, LaneDescription, Leased, LoadProgress, PROVIDED_PREFIX, Refusal, ToEngine,
};
use tracing::{info, warn};

/// When a client that hit a limit on leases or lanes may try again, in ms.
const RETRY_LIMIT_MS: u32 = 1000;

impl Core {
    pub(super) fn acquire(&mut self, now_ns: u64, session: u64, request_id: u64, wish: Acquire) {
        if let Err(refusal) = self.admit_acquire(session, &wish) {
            self.send(session, request_id, BrokerMessage::Refused(refusal));
            return;
        }
        let name = if wish.model.is_empty() { self.config.default_model.clone() } else { wish.model };
        if name.starts_with(PROVIDED_PREFIX) {
            self.acquire_provided(now_ns, session, request_id, name, wish.want_image, wish.wait_ms);
            return;
        }
        let entry = match self.lookup(now_ns, &name) {
            Ok(entry) => entry,
            Err(refusal) => {
                self.send(session, request_id, BrokerMessage::Refused(refusal));
                return;
            }
        };
        let waiter = Waiter {
            session,
            request_id,
            asked_ns: now_ns,
            deadline_ns: now_ns.saturating_add(u64::from(wish.wait_ms) * 1_000_000),
            want_lane: wish.want_lane,
            want_image: wish.want_image,
        };
        if let Some(known) = self.sessions.get_mut(session) {
            known.waiting += 1;
        }
        let Some(entry) = self.models.entries.get_mut(&entry) else { return };
        let progress = match &entry.state {
            EntryState::Loading { progress, .. } => progress.clone(),
            _ => None,
        };
        let generation = match entry.state {
            EntryState::Loaded { generation } => Some(generation),
            _ => None,
        };
        entry.waiters.push(waiter);
        if let Some(progress) = progress {
            self.send(session, request_id, BrokerMessage::Progress(progress));
        }
        if let Some(generation) = generation {
            self.grant_waiters(now_ns, generation);
        }
    }

    fn admit_acquire(&self, session: u64, wish: &Acquire) -> Result<(), Refusal> {
        let refusal = |code, message: String, retry_after_ms| Err(Refusal { code, message, retry_after_ms });
        if self.leaving.has_begun() {
            return refusal(Code::ShuttingDown, "the broker is leaving and grants nothing new".into(), 100);
        }
        check_name(&wish.model)?;
        let Some(known) = self.sessions.get(session) else {
            return refusal(Code::BadState, "no session".into(), 0);
        };
        if wish.want_lane && !known.shared_memory {
            let message = "this session said in its Hello that it uses no shared memory; send jobs as frames, or name \
                           the layout hash";
            return refusal(Code::LayoutMismatch, message.into(), 0);
        }
        let (leases, _) = self.leases.count(session);
        if leases + known.waiting >= self.limits().max_leases_per_session {
            let message = format!(
                "this session holds or waits for {} leases, the limit; release some, or share one between threads",
                leases + known.waiting
            );
            return refusal(Code::TooMany, message, 0);
        }
        Ok(())
    }

    /// Grants what can be granted of a generation now. Leases for computing in the client's own process need no engine.
    pub(super) fn grant_waiters(&mut self, now_ns: u64, generation: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        if image.cache == CacheSide::Making {
            return;
        }
        let served = image.engine == EngineSide::Ready;
        let Some(entry) = self.models.entries.get_mut(&image.entry) else { return };
        if entry.state != (EntryState::Loaded { generation }) {
            return;
        }
        let image_alone = |w: &Waiter| w.want_image && !w.want_lane;
        let ready: Vec<Waiter> = entry.waiters.extract_if(.., |w| served || image_alone(w)).collect();
        if !ready.is_empty() {
            entry.last_use_ns = now_ns;
        }
        for waiter in ready {
            self.waits_no_more(waiter.session);
            self.metrics.accessed(now_ns.saturating_sub(waiter.asked_ns) / 1000);
            self.grant(generation, &waiter);
        }
    }

    pub(super) fn waits_no_more(&mut self, session: u64) {
        if let Some(known) = self.sessions.get_mut(session) {
            known.waiting = known.waiting.saturating_sub(1);
        }
    }

    fn grant(&mut self, generation: u64, waiter: &Waiter) {
        let session = waiter.session;
        if self.sessions.get(session).is_none() {
            return;
        }
        if !waiter.want_lane {
            let lease_id = self.leases.grant(session, generation, None);
            self.send_lease(session, waiter.request_id, lease_id, generation, None, waiter.want_image);
            return;
        }
        let (_, lanes) = self.leases.count(session);
        let reached = if lanes >= self.limits().max_lanes_per_session {
            Some(format!(
                "this session has {lanes} lanes, the limit; release some, or share one between threads"
            ))
        } else if self.lanes.len() >= self.limits().max_lanes {
            Some(format!(
                "{} lanes exist, the limit; try again later, or send jobs as frames",
                self.lanes.len()
            ))
        } else {
            None
        };
        if let Some(message) = reached {
            self.refuse(session, waiter.request_id, Code::TooMany, message, RETRY_LIMIT_MS);
            return;
        }
        let lane_id = self.lanes.new_id();
        let lease_id = self.leases.grant(session, generation, Some(lane_id));
        let state = LaneState::Making { request_id: waiter.request_id, want_image: waiter.want_image };
        self.lanes.insert(lane_id, Lane { session, lease_id, generation, state });
        self.actions.push(Action::MakeLane { lane_id });
    }

    pub(super) fn lane_made(&mut self, lane_id: u64, outcome: Result<(), String>) {
        let Some(Lane { session, lease_id, generation, state: LaneState::Making { request_id, want_image } }) =
            self.lanes.get(lane_id)
        else {
            // Its session ended meanwhile; whatever was made is closed.
            self.actions.push(Action::CloseLane { lane_id });
            return;
        };
        if let Err(why) = outcome {
            warn!(session, "a lane could not be made: {why}");
            self.lanes.remove(lane_id);
            self.leases.end(session, lease_id);
            let message = "the broker is out of memory or descriptors for a lane; try again later, or send jobs as frames";
            self.refuse(session, request_id, Code::TooMany, message, RETRY_LIMIT_MS);
            return;
        }
        self.lanes.set(lane_id, LaneState::Live { in_engine: false });
        // The engine first: the lane is served from the moment that the client has it.
        if self.models.images.get(&generation).is_some_and(|image| image.engine == EngineSide::Ready) {
            self.hand_over_lane(lane_id, generation);
        }
        self.send_lease(session, request_id, lease_id, generation, Some(lane_id), want_image);
    }

    /// Gives a lane to the engine.
    pub(super) fn hand_over_lane(&mut self, lane_id: u64, generation: u64) {
        self.lanes.set(lane_id, LaneState::Live { in_engine: true });
        self.tell_engine(ToEngine::AddLane { lane_id, generation }, vec![Attachment::Lane(lane_id)]);
    }

    fn send_lease(
        &mut self,
        session: u64,
        request_id: u64,
        lease_id: u64,
        generation: u64,
        lane: Option<u64>,
        image: bool,
    ) {
        let Some(held) = self.models.images.get(&generation) else { return };
        let (model, mut cache) = (held.description.clone(), held.cache.description());
        if lane.is_none() && !image {
            // A session without shared memory: its jobs find what is cached in the engine.
            cache = None;
        }
        let mut attachments = Vec::new();
        attachments.extend(lane.map(Attachment::Lane));
        attachments.extend(image.then_some(Attachment::Image(generation)));
        attachments.extend(cache.map(|_| Attachment::Cache(generation)));
        let lane = lane.map(|lane_id| LaneDescription { lane_id, region_bytes: REGION_BYTES });
        let message = BrokerMessage::Leased(Leased { lease_id, model, lane, image, cache });
        self.actions.push(Action::Send { session, request_id, message, attachments });
    }

    /// Starts as many queued loads as may run at once.
    pub(super) fn start_loaders(&mut self, now_ns: u64) {
        if self.leaving.has_begun() {
            return;
        }
        for id in self.models.queued() {
            if self.models.loads_running() >= self.config.limits.max_loads_at_once {
                return;
            }
            let is_reload = self.models.entries.get(&id).is_some_and(|entry| entry.generation().is_some());
            if !is_reload && !self.make_room(now_ns) {
                // It waits in line until one of the others is idle, for as long as somebody waits for it.
                if let Some(entry) = self.models.entries.get_mut(&id)
                    && !entry.is_waited_for()
                    && !entry.settings.pinned
                {
                    entry.state = EntryState::Unloaded;
                }
                continue;
            }
            self.start_loader(now_ns, id);
        }
    }

    fn start_loader(&mut self, now_ns: u64, id: u64) {
        self.last_load_id += 1;
        let load_id = self.last_load_id;
        let deadline_ns = now_ns.saturating_add(nanos(self.config.limits.load_timeout));
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        (entry.planned_bytes, entry.done_bytes) = (0, 0);
        let is_reload = entry.generation().is_some();
        if is_reload {
            entry.reload = Some(Reload::Loading { load_id, deadline_ns });
        } else {
            entry.state = EntryState::Loading { load_id, deadline_ns, progress: None, told_ns: 0 };
        }
        let source = entry.source.clone();
        if self.config.policy.log_model_usage {
            let event = if is_reload { "model.reload.begin" } else { "model.load.begin" };
            info!(event, model = entry.name(), source, load_id, "load begins");
        }
        self.actions.push(Action::StartLoader { load_id, model: source });
    }

    pub(super) fn load_progress(&mut self, now_ns: u64, load_id: u64, news: LoadProgress) {
        let interval_ns = nanos(self.config.limits.progress_interval);
        let Some(id) = self.models.entry_of_load(load_id) else { return };
        self.watch_memory(now_ns, id, &news);
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        let EntryState::Loading { progress, told_ns, .. } = &mut entry.state else { return };
        let same_stage = progress.as_ref().is_some_and(|p| p.stage == news.stage);
        let news = LoadProgress { stage: news.stage.chars().take(32).collect(), ..news };
        *progress = Some(news.clone());
        if same_stage && now_ns.saturating_sub(*told_ns) < interval_ns {
            return;
        }
        *told_ns = now_ns;
        let told: Vec<(u64, u64)> = entry.waiters.iter().map(|w| (w.session, w.request_id)).collect();
        for (session, request_id) in told {
            self.send(session, request_id, BrokerMessage::Progress(news.clone()));
        }
    }

    pub(super) fn load_done(&mut self, now_ns: u64, load_id: u64, facts: ImageFacts) {
        if let Some(id) = self.models.entry_of_load(load_id)
            && self.models.entries.get(&id).is_some_and(|entry| entry.generation().is_some())
        {
            self.reload_done(now_ns, id, load_id, facts);
            return;
        }
        match self.models.finish_load(load_id, facts, now_ns) {
            Finished::Unknown => self.actions.push(Action::DiscardImage { load_id }),
            Finished::Known { entry } => {
                self.actions.push(Action::DiscardImage { load_id });
                if let Some(EntryState::Loaded { generation }) =
                    self.models.entries.get(&entry).map(|e| e.state.clone())
                {
                    self.grant_waiters(now_ns, generation);
                    self.answer_loaded(generation);
                }
            }
            Finished::New { entry, generation, needless_loads } => {
                for load_id in needless_loads {
                    self.actions.push(Action::KillLoader { load_id });
                }
                if let Some(entry) = self.models.entries.get(&entry) {
                    let (model, load_us) = (entry.name(), entry.load_us);
                    self.metrics.loaded(load_us);
                    if self.config.policy.log_model_usage {
                        info!(event = "model.load.end", model, generation, load_us, "model loaded");
                    }
                }
                self.actions.push(Action::KeepImage { load_id, generation });
                self.make_cache(now_ns, generation);
            }
        }
    }

    pub(super) fn load_failed(&mut self, now_ns: u64, load_id: u64, code: Code, message: String) {
        let Some(id) = self.models.entry_of_load(load_id) else { return };
        let code = if code == Code::Ok { Code::Internal } else { code };
        let refusal = Refusal { code, message: super::cut(message), retry_after_ms: 0 };
        let Some(entry) = self.models.entries.get(&id) else { return };
        if entry.generation().is_some() {
            self.fail_reload(now_ns, id, refusal);
            return;
        }
        self.metrics.load_failures += 1;
        warn!(event = "model.load.failed", model = entry.name(), %code, "load failed: {}", refusal.message);
        self.fail_model(now_ns, id, refusal);
    }

    /// Marks a model as failed and tells those who wait for it.
    pub(super) fn fail_model(&mut self, now_ns: u64, entry: u64, refusal: Refusal) {
        self.cancel_reload(now_ns, entry, &refusal.message);
        let waiters = self.models.fail(entry, refusal, now_ns, &self.config.limits);
        let Some(failed) = self.models.entries.get_mut(&entry) else { return };
        let EntryState::Failed { refusal, .. } = failed.state.clone() else { return };
        let askers = std::mem::take(&mut failed.askers);
        self.refuse_waiters(waiters, &refusal);
        self.refuse_askers(askers, &refusal);
    }

    /// Tells waiters, already taken out of their entries, that they get nothing.
    pub(super) fn refuse_waiters(&mut self, waiters: Vec<Waiter>, refusal: &Refusal) {
        for waiter in waiters {
            self.waits_no_more(waiter.session);
            self.send(waiter.session, waiter.request_id, BrokerMessage::Refused(refusal.clone()));
        }
    }

    pub(super) fn waiters_overdue(&mut self, now_ns: u64) {
        let is_late = |w: &Waiter| w.deadline_ns <= now_ns;
        let in_line =
            |e: &super::entry::Entry| e.state == EntryState::Queued && e.waiters.iter().any(is_late);
        if self.models.entries.values().any(in_line) && !self.has_room() {
            let refusal = Refusal {
                code: Code::ModelUnavailable,
                message: self.no_room(),
                retry_after_ms: RETRY_LIMIT_MS,
            };
            let queued = self.models.entries.values_mut().filter(|e| e.state == EntryState::Queued);
            let late: Vec<Waiter> =
                queued.flat_map(|e| e.waiters.extract_if(.., |w| is_late(w)).collect::<Vec<_>>()).collect();
            self.refuse_waiters(late, &refusal);
        }
        let late = self.models.take_waiters(is_late);
        let message =
            "the model was not ready within the wait that was asked for; it goes on loading, ask again";
        let refusal =
            Refusal { code: Code::LoadTimeout, message: message.into(), retry_after_ms: RETRY_LIMIT_MS };
        self.refuse_waiters(late, &refusal);
    }

    pub(super) fn loads_overdue(&mut self, now_ns: u64) {
        let late: Vec<u64> = self
            .models
            .entries
            .values()
            .filter(|e| e.load_deadline_ns().is_some_and(|deadline_ns| deadline_ns <= now_ns))
            .filter_map(super::entry::Entry::load_id)
            .collect();
        for load_id in late {
            self.actions.push(Action::KillLoader { load_id });
            let message =
                format!("the load took longer than {} s, the limit", self.limits().load_timeout.as_secs());
            self.load_failed(now_ns, load_id, Code::ModelLoadError, message);
        }
    }
}

//! What clients order to be done with a model: load, unload, reload, health. Each order is answered once, with what became
//! of it or with a refusal.

use super::entry::{Asker, Order};
use super::lifecycle::Why;
use super::models::{EngineSide, EntryState, Lookup};
use super::{Action, Core};
use shm_layout::code::Code;
use shm_layout::limits::MAX_MODEL_NAME_BYTES;
use shm_layout::wire::{BrokerMessage, ModelCommand, ModelOutcome, Refusal, ToEngine, UnloadMode};
use tracing::info;

/// When an order that ran out of time may be given again, in ms.
const RETRY_ORDER_MS: u32 = 1000;

/// A generation that the engine was told to let go of, and the orders that wait for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Going {
    pub(crate) model_id: String,
    pub(crate) image_bytes: u64,
    pub(crate) askers: Vec<(u64, u64)>,
}

fn refusal(code: Code, message: impl Into<String>) -> Refusal {
    Refusal { code, message: super::cut(message.into()), retry_after_ms: 0 }
}

impl Core {
    pub(super) fn model_command(
        &mut self,
        now_ns: u64,
        session: u64,
        request_id: u64,
        command: ModelCommand,
    ) {
        let (name, owner_only) = match &command {
            ModelCommand::Load { model, .. } | ModelCommand::Health { model, .. } => (model, false),
            ModelCommand::Unload { model, .. } | ModelCommand::Reload { model, .. } => (model, true),
        };
        let name = if name.is_empty() { self.config.default_model.clone() } else { name.clone() };
        if let Err(refusal) = self.admit_order(session, &name, owner_only) {
            self.send(session, request_id, BrokerMessage::Refused(refusal));
            return;
        }
        let deadline = |wait_ms: u32| now_ns.saturating_add(u64::from(wait_ms) * 1_000_000);
        let asker = |wait_ms, order| Asker { session, request_id, deadline_ns: deadline(wait_ms), order };
        match command {
            ModelCommand::Load { wait_ms, .. } => {
                self.order_load(now_ns, &name, |was_loaded| asker(wait_ms, Order::Load { was_loaded }))
            }
            ModelCommand::Reload { wait_ms, .. } => {
                self.order_reload(now_ns, &name, asker(wait_ms, Order::Reload))
            }
            ModelCommand::Health { wait_ms, .. } => {
                self.order_health(&name, asker(wait_ms, Order::Health { sent: false }));
            }
            ModelCommand::Unload { mode, .. } => self.order_unload(now_ns, session, request_id, &name, mode),
        }
    }

    fn admit_order(&self, session: u64, name: &str, owner_only: bool) -> Result<(), Refusal> {
        if self.leaving.has_begun() {
            return Err(Refusal {
                retry_after_ms: 100,
                ..refusal(Code::ShuttingDown, "the broker is leaving")
            });
        }
        let Some(known) = self.sessions.get(session) else {
            return Err(refusal(Code::BadState, "no session"));
        };
        if owner_only && known.uid != self.config.own_uid {
            let message = "only the user who started the broker can unload or reload models";
            return Err(refusal(Code::PermissionDenied, message));
        }
        check_name(name)?;
        let (leases, _) = self.leases.count(session);
        if leases + known.waiting >= self.limits().max_leases_per_session {
            let message = format!(
                "this session holds or waits for {} leases, the limit, orders counted; release some, or wait for answers",
                leases + known.waiting
            );
            return Err(refusal(Code::TooMany, message));
        }
        Ok(())
    }

    /// Adds an order to those that wait for a model.
    fn enlist(&mut self, id: u64, asker: Asker) {
        if let Some(known) = self.sessions.get_mut(asker.session) {
            known.waiting += 1;
        }
        if let Some(entry) = self.models.entries.get_mut(&id) {
            entry.askers.push(asker);
        }
    }

    fn order_load(&mut self, now_ns: u64, name: &str, asker: impl FnOnce(bool) -> Asker) {
        let was_loaded = self
            .models
            .names
            .get(name)
            .and_then(|id| self.models.entries.get(id))
            .is_some_and(|entry| entry.generation().is_some());
        let asker = asker(was_loaded);
        match self.lookup(now_ns, name) {
            Err(refusal) => self.send(asker.session, asker.request_id, BrokerMessage::Refused(refusal)),
            Ok(id) => {
                self.enlist(id, asker);
                if let Some(generation) = self.models.entries.get(&id).and_then(|entry| entry.generation()) {
                    self.answer_loaded(generation);
                }
            }
        }
    }

    fn order_reload(&mut self, now_ns: u64, name: &str, asker: Asker) {
        match self.lookup(now_ns, name) {
            Err(refusal) => self.send(asker.session, asker.request_id, BrokerMessage::Refused(refusal)),
            Ok(id) => {
                let is_loaded =
                    self.models.entries.get(&id).is_some_and(|entry| entry.generation().is_some());
                if is_loaded {
                    self.begin_reload(now_ns, id);
                }
                self.enlist(id, asker);
            }
        }
    }

    fn order_health(&mut self, name: &str, asker: Asker) {
        let id = self.models.names.get(name).copied();
        let generation = id.and_then(|id| self.models.entries.get(&id)).and_then(|entry| entry.generation());
        let (Some(id), Some(generation)) = (id, generation) else {
            let message = format!("{name} is not loaded; load it first");
            let refusal = refusal(Code::ModelUnavailable, message);
            self.send(asker.session, asker.request_id, BrokerMessage::Refused(refusal));
            return;
        };
        self.enlist(id, asker);
        self.send_probe(generation);
    }

    fn order_unload(&mut self, now_ns: u64, session: u64, request_id: u64, name: &str, mode: UnloadMode) {
        let Some(id) = self.models.names.get(name).copied() else {
            let message =
                format!("no model is known as {name}; `modelbroker model list` shows those that are");
            return self.refuse(session, request_id, Code::ModelNotFound, message, 0);
        };
        let in_use = self.in_use(id);
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        let model_id = entry.name().to_owned();
        let unloaded = |freed_bytes, pending| {
            let model_id = model_id.clone();
            BrokerMessage::Model(ModelOutcome::Unloaded { model_id, freed_bytes, pending })
        };
        if in_use && mode == UnloadMode::IfIdle {
            let message = format!(
                "{model_id} is in use, {}; let go of it there, or unload it when it is idle, or by force",
                self.held_by(id)
            );
            return self.refuse(session, request_id, Code::ModelInUse, message, RETRY_ORDER_MS);
        }
        if entry.generation().is_none() {
            if matches!(entry.state, EntryState::Queued | EntryState::Loading { .. }) {
                return self.abandon_load(now_ns, session, request_id, id, mode);
            }
            return self.send(session, request_id, unloaded(0, false));
        }
        if in_use && mode == UnloadMode::WhenIdle {
            entry.unload_when_idle = true;
            return self.send(session, request_id, unloaded(0, true));
        }
        // Nobody waits: whoever waited made it in use, and by force they are granted what is there.
        let Some(generation) = self.unload(now_ns, id, Why::Order) else { return };
        let bytes = self.models.images.get(&generation).map_or(0, |image| image.description.image_bytes);
        if in_use {
            self.orphaned_waiters(now_ns, id);
            return self.send(session, request_id, unloaded(bytes, true));
        }
        self.unload_orders.push((generation, session, request_id));
    }

    /// Stops a load that is in line or under way.
    fn abandon_load(&mut self, now_ns: u64, session: u64, request_id: u64, id: u64, mode: UnloadMode) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        let model_id = entry.name().to_owned();
        if mode == UnloadMode::WhenIdle && entry.is_waited_for() {
            entry.unload_when_idle = true;
            let outcome = ModelOutcome::Unloaded { model_id, freed_bytes: 0, pending: true };
            return self.send(session, request_id, BrokerMessage::Model(outcome));
        }
        if let Some(load_id) = entry.load_id() {
            self.actions.push(Action::KillLoader { load_id });
        }
        entry.state = EntryState::Unloaded;
        entry.planned_bytes = 0;
        if self.config.policy.log_model_usage {
            info!(event = "model.load.cancelled", model = model_id, "load cancelled by order");
        }
        self.refuse_all_waiting(
            id,
            &refusal(Code::Cancelled, "the load was cancelled: the model was unloaded by order"),
        );
        let _ = now_ns;
        let outcome = ModelOutcome::Unloaded { model_id, freed_bytes: 0, pending: false };
        self.send(session, request_id, BrokerMessage::Model(outcome));
    }

    /// Those who waited for a model that was taken away by force load it anew.
    fn orphaned_waiters(&mut self, now_ns: u64, id: u64) {
        if let Some(entry) = self.models.entries.get_mut(&id)
            && entry.is_waited_for()
        {
            entry.queue(now_ns);
        }
    }

    /// Tells everybody who waits for a model that they get nothing.
    fn refuse_all_waiting(&mut self, id: u64, refusal: &Refusal) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        let (waiters, askers) = (std::mem::take(&mut entry.waiters), std::mem::take(&mut entry.askers));
        self.refuse_waiters(waiters, refusal);
        self.refuse_askers(askers, refusal);
    }

    /// Tells orders, already taken out of their entries, that nothing comes of them.
    pub(super) fn refuse_askers(&mut self, askers: Vec<Asker>, refusal: &Refusal) {
        for asker in askers {
            self.waits_no_more(asker.session);
            self.send(asker.session, asker.request_id, BrokerMessage::Refused(refusal.clone()));
        }
    }

    /// Takes out the orders for which `gone` holds.
    pub(super) fn take_askers(&mut self, mut gone: impl FnMut(&Asker) -> bool) -> Vec<Asker> {
        let entries = self.models.entries.values_mut();
        entries.flat_map(|entry| entry.askers.extract_if(.., |a| gone(a)).collect::<Vec<_>>()).collect()
    }

    pub(super) fn askers_overdue(&mut self, now_ns: u64) {
        for asker in self.take_askers(|a| a.deadline_ns <= now_ns) {
            let (code, message) = match asker.order {
                Order::Load { .. } => {
                    (Code::LoadTimeout, "the model was not ready in time; it goes on loading")
                }
                Order::Reload => (Code::LoadTimeout, "the reload was not done in time; it goes on"),
                Order::Health { .. } => {
                    (Code::DeadlineExceeded, "the engine did not answer its health check in time")
                }
            };
            let refusal = Refusal { retry_after_ms: RETRY_ORDER_MS, ..refusal(code, message) };
            self.refuse_askers(vec![asker], &refusal);
        }
    }

    /// The model is served: orders to load it are done, as are those to reload it that found it not loaded.
    pub(super) fn answer_loaded(&mut self, generation: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        if image.engine != EngineSide::Ready || !self.models.is_current(generation) {
            return;
        }
        let model = image.description.clone();
        let Some(entry) = self.models.entries.get_mut(&image.entry) else { return };
        let (load_us, reloads) = (entry.load_us, entry.is_reloading());
        let done = |a: &mut Asker| match a.order {
            Order::Load { .. } => true,
            Order::Reload => !reloads,
            Order::Health { .. } => false,
        };
        for asker in entry.askers.extract_if(.., done).collect::<Vec<_>>() {
            self.waits_no_more(asker.session);
            let model = model.clone();
            let outcome = match asker.order {
                Order::Load { was_loaded } => ModelOutcome::Loaded { model, load_us, was_loaded },
                Order::Reload | Order::Health { .. } => {
                    ModelOutcome::Reloaded { model, replaced: 0, load_us }
                }
            };
            self.send(asker.session, asker.request_id, BrokerMessage::Model(outcome));
        }
    }

    /// Has the engine compute something known if somebody asked for it and it serves the model.
    pub(super) fn send_probe(&mut self, generation: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        if image.engine != EngineSide::Ready || !self.models.is_current(generation) {
            return;
        }
        let Some(entry) = self.models.entries.get_mut(&image.entry) else { return };
        let under_way = entry.askers.iter().any(|a| a.order == Order::Health { sent: true });
        let mut wanted = false;
        for asker in entry.askers.iter_mut().filter(|a| a.order == Order::Health { sent: false }) {
            asker.order = Order::Health { sent: true };
            wanted = true;
        }
        // One probe answers all who asked until it ends.
        if wanted && !under_way {
            self.tell_engine(ToEngine::Probe { generation }, Vec::new());
        }
    }

    /// A probe's end.
    pub(super) fn probed(&mut self, generation: u64, code: Code, message: String, probe_us: u64) {
        let Some(image) = self.models.images.get(&generation) else { return };
        let model = image.description.clone();
        let Some(entry) = self.models.entries.get_mut(&image.entry) else { return };
        let asked = |a: &mut Asker| a.order == Order::Health { sent: true };
        let askers: Vec<Asker> = entry.askers.extract_if(.., asked).collect();
        if code != Code::Ok {
            let message = format!("the model does not compute what it should: {message}");
            return self.refuse_askers(askers, &refusal(code, message));
        }
        for asker in askers {
            self.waits_no_more(asker.session);
            let engine_pid = self.engine.pid;
            let outcome = ModelOutcome::Healthy { model: model.clone(), probe_us, engine_pid };
            self.send(asker.session, asker.request_id, BrokerMessage::Model(outcome));
        }
    }

    /// The engine died: what it was computing for a health check is its answer.
    pub(super) fn probes_lost(&mut self) {
        let lost = self.take_askers(|a| a.order == Order::Health { sent: true });
        let message = "the engine died before it had answered the health check; another one is being started";
        let refusal = Refusal { retry_after_ms: RETRY_ORDER_MS, ..refusal(Code::ModelUnavailable, message) };
        self.refuse_askers(lost, &refusal);
    }

    /// A generation is gone from everywhere.
    pub(super) fn answer_unloaded(&mut self, gone: Going) {
        for (session, request_id) in gone.askers {
            let (model_id, freed_bytes) = (gone.model_id.clone(), gone.image_bytes);
            let outcome = ModelOutcome::Unloaded { model_id, freed_bytes, pending: false };
            self.send(session, request_id, BrokerMessage::Model(outcome));
        }
    }

    /// The entry for a name that a client gave, put in line to be loaded if need be.
    pub(super) fn lookup(&mut self, now_ns: u64, name: &str) -> Result<u64, Refusal> {
        if let Some(entry) = self.models.names.get(name).and_then(|id| self.models.entries.get(id))
            && !entry.settings.shared
        {
            let message = format!("{name} is configured as not shared: each process loads it for itself");
            return Err(refusal(Code::ModelUnavailable, message));
        }
        match self.models.lookup(name, now_ns, &self.config.limits) {
            Lookup::Entry(id) => Ok(id),
            Lookup::Refused(refusal) => Err(refusal),
        }
    }
}

/// Checks a name that becomes an argument of the loader: it must not be read as an option there.
pub(super) fn check_name(name: &str) -> Result<(), Refusal> {
    if name.len() > MAX_MODEL_NAME_BYTES {
        let message = format!("a model name of {} bytes; the limit is {MAX_MODEL_NAME_BYTES}", name.len());
        return Err(refusal(Code::TooLarge, message));
    }
    if name.starts_with('-') || name.chars().any(char::is_control) {
        let message = "a model name must not begin with '-' nor contain control characters; for a folder, give its \
                       absolute path";
        return Err(refusal(Code::ModelNotFound, message));
    }
    Ok(())
}

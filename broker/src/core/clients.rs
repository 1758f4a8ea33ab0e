//! What a client's frame leads to, and what the end of a session leads to.

use super::lanes::LaneState;
use super::models::EngineSide;
use super::orders::Going;
use super::{Action, Core, nanos};
use shm_layout::code::Code;
use shm_layout::lane::LAYOUT_HASH;
use shm_layout::wire::{
    BrokerMessage, ClientMessage, Hello, PROTOCOL_MAJOR, PROTOCOL_MINOR, Refusal, ToEngine, Welcome,
};
use tracing::{debug, info, warn};

/// When a refused client may come back, in ms.
const RETRY_SOON_MS: u32 = 100;

impl Core {
    pub(super) fn connected(&mut self, now_ns: u64, session: u64, pid: u32, uid: u32) {
        let refusal = if uid != self.config.own_uid && !self.config.allow_other_users {
            warn!(pid, uid, "refused a process of another user");
            let message = "this broker serves the user who started it only; start a broker of your own";
            Some((Code::PermissionDenied, message.to_owned(), 0))
        } else if self.leaving.has_begun() {
            Some((
                Code::ShuttingDown,
                "the broker is leaving; connect again in a moment".to_owned(),
                RETRY_SOON_MS,
            ))
        } else if self.sessions.len() >= self.limits().max_sessions {
            warn!(pid, "refused a session: limit reached");
            let message = format!("{} sessions are open, the limit; close some first", self.sessions.len());
            Some((Code::TooMany, message, 1000))
        } else {
            None
        };
        if let Some((code, message, retry_after_ms)) = refusal {
            self.refuse(session, 0, code, message, retry_after_ms);
            self.actions.push(Action::Close { session });
            return;
        }
        let hello_deadline_ns = now_ns.saturating_add(nanos(self.limits().hello_timeout));
        self.sessions.insert(session, pid, uid, now_ns, hello_deadline_ns);
        self.idle_since_ns = None;
    }

    pub(super) fn client(&mut self, now_ns: u64, session: u64, request_id: u64, message: ClientMessage) {
        let Some(known) = self.sessions.get(session) else { return };
        let is_open = known.hello_deadline_ns.is_none();
        let is_owner = known.uid == self.config.own_uid;
        match (is_open, message) {
            (false, ClientMessage::Hello(hello)) => self.hello(now_ns, session, request_id, &hello),
            (false, _) => self.fault(now_ns, session, Code::BadState, "the first message must be Hello"),
            (true, ClientMessage::Hello(_)) => {
                self.fault(now_ns, session, Code::BadState, "a session says Hello once");
            }
            (true, ClientMessage::Acquire(wish)) => self.acquire(now_ns, session, request_id, wish),
            (true, ClientMessage::Release { lease_id }) => {
                self.release(now_ns, session, request_id, lease_id)
            }
            (true, ClientMessage::Submit(job)) => self.submit(now_ns, session, request_id, job),
            (true, ClientMessage::Cancel { job_id }) => self.cancel(session, job_id),
            (true, ClientMessage::Status) => self.status_wanted(now_ns, session, request_id),
            (true, ClientMessage::Shutdown { .. }) if !is_owner => {
                let message = "only the user who started the broker can end it";
                self.refuse(session, request_id, Code::PermissionDenied, message, 0);
            }
            (true, ClientMessage::Shutdown { drain_ms }) => {
                info!(session, drain_ms, "a client asks the broker to leave");
                self.send(session, request_id, BrokerMessage::ShuttingDown);
                self.begin_leaving(now_ns, std::time::Duration::from_millis(u64::from(drain_ms)));
            }
            (true, ClientMessage::ReloadConfiguration) => self.reload_wanted(session, request_id, is_owner),
            (true, ClientMessage::Model(command)) => self.model_command(now_ns, session, request_id, command),
            (true, ClientMessage::Ping) => self.send(session, request_id, BrokerMessage::Pong),
            (true, ClientMessage::Provide(offer)) => self.provide(now_ns, session, request_id, offer),
            (true, ClientMessage::ProviderAnswer(answer)) => self.provider_answered(now_ns, session, answer),
            (true, ClientMessage::Withdraw { model_id }) => {
                self.withdraw(now_ns, session, request_id, &model_id);
            }
        }
    }

    fn hello(&mut self, now_ns: u64, session: u64, request_id: u64, hello: &Hello) {
        let refusal = if hello.protocol_major != PROTOCOL_MAJOR {
            let message = format!(
                "the client speaks protocol {}.{}, this broker {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}; use one version of \
                 modelbroker on both sides",
                hello.protocol_major, hello.protocol_minor
            );
            Some((Code::ProtocolVersion, message))
        } else if hello.layout_hash != 0 && hello.layout_hash != LAYOUT_HASH {
            let message = format!(
                "the client was built with lane layout {:#018x}, this broker with {LAYOUT_HASH:#018x}; use one build of \
                 modelbroker on both sides, or connect without shared memory",
                hello.layout_hash
            );
            Some((Code::LayoutMismatch, message))
        } else {
            None
        };
        if let Some((code, message)) = refusal {
            warn!(session, %code, "refused a session: {message}");
            self.refuse(session, request_id, code, message, 0);
            self.end_session(now_ns, session);
            self.actions.push(Action::Close { session });
            return;
        }
        self.sessions.open(session, &hello.client_name, hello.layout_hash != 0);
        if let Some(known) = self.sessions.get(session) {
            debug!(session, pid = known.pid, client = known.client_name, "session opened");
        }
        let welcome = Welcome {
            protocol_major: PROTOCOL_MAJOR,
            protocol_minor: PROTOCOL_MINOR,
            session_id: session,
            boot_id: self.config.boot_id,
            broker_pid: self.config.broker_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        self.send(session, request_id, BrokerMessage::Welcome(welcome));
    }

    /// Ends a session that broke the protocol, naming why.
    pub(super) fn fault(&mut self, now_ns: u64, session: u64, code: Code, message: &str) {
        let Some(known) = self.sessions.get(session) else { return };
        self.faults += 1;
        warn!(session, pid = known.pid, client = known.client_name, %code, "client fault: {message}");
        self.close_session(
            now_ns,
            session,
            Refusal { code, message: super::cut(message.to_owned()), retry_after_ms: 0 },
        );
    }

    /// Tells a session why it ends, and ends it.
    pub(super) fn close_session(&mut self, now_ns: u64, session: u64, refusal: Refusal) {
        if self.sessions.get(session).is_none() {
            return;
        }
        self.end_session(now_ns, session);
        self.send(session, 0, BrokerMessage::Refused(refusal));
        self.actions.push(Action::Close { session });
    }

    /// Takes back everything that a session had.
    pub(super) fn end_session(&mut self, now_ns: u64, session: u64) {
        let Some(ended) = self.sessions.remove(session) else { return };
        debug!(session, pid = ended.pid, client = ended.client_name, "session ended");
        self.models.take_waiters(|w| w.session == session);
        self.take_askers(|a| a.session == session);
        self.unload_orders.retain(|(_, asked, _)| *asked != session);
        self.going.values_mut().for_each(|gone| gone.askers.retain(|(asked, _)| *asked != session));
        self.status.forget(session);
        self.forget_reloads(session);
        for relay_id in self.relay.session_gone(session) {
            self.cancel_running(relay_id);
        }
        for lease_id in self.leases.of_session(session) {
            self.end_lease(now_ns, session, lease_id);
        }
        self.provider_left(now_ns, session);
    }

    fn release(&mut self, now_ns: u64, session: u64, request_id: u64, lease_id: u64) {
        if self.end_lease(now_ns, session, lease_id) {
            self.send(session, request_id, BrokerMessage::Released);
        } else {
            let message = format!("this session holds no lease {lease_id}; it was released before");
            self.refuse(session, request_id, Code::Stale, message, 0);
        }
    }

    /// Takes a lease and its lane back; false when there is no such lease.
    pub(super) fn end_lease(&mut self, now_ns: u64, session: u64, lease_id: u64) -> bool {
        let Some(lease) = self.leases.end(session, lease_id) else { return false };
        if let Some(lane_id) = lease.lane_id {
            self.end_lane(lane_id);
        }
        if let Some(image) = self.models.images.get(&lease.generation)
            && let Some(entry) = self.models.entries.get_mut(&image.entry)
        {
            entry.last_use_ns = now_ns;
        }
        true
    }

    /// Closes a lane; the engine is told, and the lane counts until it has let go of it.
    fn end_lane(&mut self, lane_id: u64) {
        let Some(lane) = self.lanes.get(lane_id) else { return };
        if lane.state == (LaneState::Live { in_engine: true }) {
            self.lanes.set(lane_id, LaneState::Dropping);
            self.tell_engine(ToEngine::DropLane { lane_id }, Vec::new());
        } else {
            self.lanes.remove(lane_id);
        }
        self.actions.push(Action::CloseLane { lane_id });
    }

    /// Lets go of generations that are not the current ones of their models and that nobody uses any more.
    pub(super) fn retire_unused(&mut self) {
        let superseded =
            self.models.images.keys().copied().filter(|generation| !self.models.is_wanted(*generation));
        let unused: Vec<u64> = superseded
            .filter(|generation| !self.leases.holds(*generation) && !self.relay.uses(*generation))
            .collect();
        for generation in unused {
            let Some(image) = self.models.images.remove(&generation) else { continue };
            let (model_id, image_bytes) = (image.description.model_id, image.description.image_bytes);
            if self.config.policy.log_model_usage {
                info!(event = "model.free", model = model_id, generation, image_bytes, "generation let go");
            }
            let orders = self.unload_orders.extract_if(.., |(of, ..)| *of == generation);
            let askers = orders.map(|(_, session, request_id)| (session, request_id)).collect();
            let gone = Going { model_id, image_bytes, askers };
            if matches!(image.engine, EngineSide::Sent | EngineSide::Ready) {
                self.tell_engine(ToEngine::UnloadModel { generation }, Vec::new());
                self.going.insert(generation, gone);
                self.actions.push(Action::CloseImage { generation });
            } else {
                self.actions.push(Action::CloseImage { generation });
                self.answer_unloaded(gone);
            }
        }
    }
}

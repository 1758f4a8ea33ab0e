//! How the broker leaves: what was accepted is finished first, for a bounded time; nothing new is taken meanwhile.

use super::engine::Phase;
use super::models::EngineSide;
use super::{Action, Core, nanos};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, Refusal, ToEngine};
use std::time::Duration;
use tracing::{info, warn};

/// How far the broker is on its way out.
#[derive(Debug, Default)]
pub(crate) enum Leaving {
    /// It stays.
    #[default]
    No,
    /// It finishes what it accepted, until then at most.
    Draining { deadline_ns: u64, engine_finished: bool },
    /// It is told to exit; nothing is decided any more.
    Done,
}

impl Leaving {
    pub(crate) fn has_begun(&self) -> bool {
        !matches!(self, Leaving::No)
    }

    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Leaving::Done)
    }
}

impl Core {
    /// The first signal begins the drain, the second ends it.
    pub(super) fn stop_signal(&mut self, now_ns: u64) {
        if self.leaving.has_begun() {
            warn!("second signal: leaving at once");
            self.leave_now(now_ns);
        } else {
            info!("signal: finishing what was accepted, then leaving");
            self.begin_leaving(now_ns, self.config.limits.drain_timeout);
        }
    }

    pub(super) fn begin_leaving(&mut self, now_ns: u64, within: Duration) {
        if let Leaving::Draining { deadline_ns, .. } = &mut self.leaving {
            *deadline_ns = now_ns.saturating_add(nanos(within)).min(*deadline_ns);
            return;
        }
        if self.leaving.is_done() {
            return;
        }
        self.leaving =
            Leaving::Draining { deadline_ns: now_ns.saturating_add(nanos(within)), engine_finished: false };
        let open: Vec<u64> =
            self.sessions.iter().filter(|(_, s)| s.hello_deadline_ns.is_none()).map(|(id, _)| id).collect();
        for session in open {
            self.send(session, 0, BrokerMessage::ShuttingDown);
        }
        let waiters = self.models.take_waiters(|_| true);
        let message = "the broker is leaving and grants nothing new".to_owned();
        let refusal = Refusal { code: Code::ShuttingDown, message, retry_after_ms: 100 };
        self.refuse_waiters(waiters, &refusal);
        self.refuse_provided_waiters(&refusal);
        let askers = self.take_askers(|_| true);
        let message = "the broker is leaving".to_owned();
        self.refuse_askers(askers, &Refusal { code: Code::ShuttingDown, message, retry_after_ms: 100 });
        let loads: Vec<u64> = self.models.entries.values().filter_map(|e| e.load_id()).collect();
        for load_id in loads {
            self.actions.push(Action::KillLoader { load_id });
        }
    }

    /// Whether anything that was accepted is unfinished: jobs on the socket, and lanes, in which the broker does not look.
    fn unfinished(&self) -> bool {
        self.relay.owes() || self.lanes.live().next().is_some()
    }

    pub(super) fn leaving_needs_engine(&self) -> bool {
        match self.leaving {
            Leaving::Draining { engine_finished, .. } => {
                self.relay.owes_from_engine() || (self.lanes.live().next().is_some() && !engine_finished)
            }
            Leaving::No | Leaving::Done => false,
        }
    }

    /// The engine is gone while the broker leaves; one that left in an orderly way has emptied the lanes.
    pub(super) fn leaving_engine_dead(&mut self, orderly: bool) {
        if let Leaving::Draining { engine_finished, .. } = &mut self.leaving {
            *engine_finished |= orderly;
        }
    }

    /// The next step out, after each event.
    pub(super) fn advance_leaving(&mut self, now_ns: u64) {
        match self.leaving {
            Leaving::No => {
                let idle = self.config.idle_exit.zip(self.idle_since_ns);
                if idle.is_some_and(|(after, since_ns)| now_ns >= since_ns.saturating_add(nanos(after))) {
                    info!("no session for the configured time: leaving");
                    if self.engine_has_to_save() {
                        self.begin_leaving(now_ns, self.config.limits.drain_timeout);
                        self.drain_engine();
                    } else {
                        self.leave_now(now_ns);
                    }
                }
            }
            Leaving::Done => {}
            Leaving::Draining { deadline_ns, engine_finished } => {
                if now_ns >= deadline_ns {
                    if self.unfinished() {
                        warn!(
                            jobs = self.relay.len(),
                            "time to finish is over; leaving with work unfinished"
                        );
                    }
                    self.leave_now(now_ns);
                } else if !self.relay.owes()
                    && (engine_finished || self.lanes.live().next().is_none())
                    && !self.engine_has_to_save()
                {
                    self.leave_now(now_ns);
                } else {
                    self.drain_engine();
                }
            }
        }
    }

    /// Whether an engine is up that saves its caches when it drains. Any other has nothing that is worth a wait.
    fn engine_has_to_save(&self) -> bool {
        self.config.engine_saves && self.engine.is_up()
    }

    /// Tells the engine to finish once it has everything that it is to finish.
    fn drain_engine(&mut self) {
        let awaiting = self.models.images.values().any(|i| i.engine == EngineSide::Sent);
        if matches!(self.engine.phase, Phase::Up { .. })
            && !self.engine.drain_sent
            && !awaiting
            && !self.relay.holds()
        {
            self.engine.drain_sent = true;
            self.tell_engine(ToEngine::Drain, Vec::new());
        }
    }

    fn leave_now(&mut self, now_ns: u64) {
        self.answer_status(now_ns);
        self.all_unloaded();
        self.answer_all(
            Code::ShuttingDown,
            "the broker left before the job was done; send it to its successor",
        );
        self.actions.push(Action::Exit);
        self.leaving = Leaving::Done;
    }

    pub(super) fn leaving_timer_ns(&self) -> Option<u64> {
        match self.leaving {
            Leaving::No => {
                let (after, since_ns) = self.config.idle_exit.zip(self.idle_since_ns)?;
                Some(since_ns.saturating_add(nanos(after)))
            }
            Leaving::Draining { deadline_ns, .. } => Some(deadline_ns),
            Leaving::Done => None,
        }
    }
}

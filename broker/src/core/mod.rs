//! Every decision of the broker, as one state machine: events in, actions out. No clock, no descriptor, no system call;
//! time is an argument, and whatever must be done is an [`Action`] for the I/O side.
//!
//! | file | decides |
//! |---|---|
//! | `clients` | what a client's frame leads to: hello, faults, release, shutdown, the end of a session |
//! | `acquire` | loads and leases: one load for many askers, who waits, who gets what |
//! | `jobs` | jobs on the socket: admission, relaying, one answer each |
//! | `orders` | what clients order to be done with a model: load, unload, reload, health |
//! | `lifecycle` | when models leave: idleness, room, order; which are loaded at start |
//! | `reload` | another generation beside the one that is served, and the switch |
//! | `memory` | whether a load still fits, and what is given up for it |
//! | `caches` | vector caches: made before their generation is served, filled by what engines say |
//! | `serving` | the engine: start, hand-over of models, lanes and jobs, death and restart |
//! | `provide`, `provided_jobs`, `provider_children` | models that clients' processes provide: who offers what, who gets which job |
//! | `devices` | where models compute, and what is said where that is not as wished |
//! | `leaving` | draining, idle exit, the end |
//! | `reconfigure` | reading the configuration again: one at a time, and what it changes |
//! | `status` | the report |
//! | `metrics`, `alerts` | what is counted, and when it has got worse |
//! | `session`, `models`, `entry`, `leases`, `lanes`, `relay`, `engine`, `providers` | the bookkeeping that these share |

mod acquire;
mod alerts;
mod caches;
mod clients;
mod devices;
mod engine;
mod entry;
mod event;
mod jobs;
mod lanes;
mod leases;
mod leaving;
mod lifecycle;
mod memory;
mod metrics;
mod models;
mod orders;
mod provide;
mod provided_jobs;
mod provider_children;
mod providers;
mod reconfigure;
mod relay;
mod reload;
mod serving;
mod session;
mod status;
#[cfg(test)]
mod tests;

pub(crate) use event::{Action, Attachment, ChildExit, Event, ImageFacts};
pub(crate) use lifecycle::Policy;
pub(crate) use models::nanos;
pub(crate) use providers::check_id as check_provided_id;

use crate::config::{Limits, ModelSettings};
use shm_layout::code::Code;
use shm_layout::limits::MAX_MESSAGE_BYTES;
use shm_layout::wire::{BrokerMessage, Refusal, ToEngine};
use std::collections::BTreeMap;
use std::time::Duration;

/// What the decisions need to know of the surroundings.
#[derive(Debug, Clone)]
pub(crate) struct CoreConfig {
    pub(crate) default_model: String,
    pub(crate) limits: Limits,
    pub(crate) policy: Policy,
    /// Models with an id of their own.
    pub(crate) models: Vec<ModelSettings>,
    /// Names that are loaded at start and kept.
    pub(crate) preload: Vec<String>,
    pub(crate) idle_exit: Option<Duration>,
    /// Whether memory that grows short is told as an alert.
    pub(crate) memory_monitoring: bool,
    pub(crate) allow_other_users: bool,
    /// Whether generations get a cache.
    pub(crate) caches: bool,
    /// Whether engines save something when they drain, and so are drained even when no work is left.
    pub(crate) engine_saves: bool,
    /// The models for which provider processes are kept running, one for each time that a model is named.
    pub(crate) provider_models: Vec<String>,
    pub(crate) own_uid: u32,
    pub(crate) boot_id: u64,
    pub(crate) broker_pid: u32,
}

/// The broker's state.
pub(crate) struct Core {
    config: CoreConfig,
    started_ns: u64,
    sessions: session::Sessions,
    models: models::Models,
    leases: leases::Leases,
    lanes: lanes::Lanes,
    relay: relay::Relay,
    engine: engine::Engine,
    devices: devices::Devices,
    providers: providers::Providers,
    provider_children: provider_children::ProviderChildren,
    leaving: leaving::Leaving,
    status: status::StatusWaiters,
    reconfigure: reconfigure::Reconfigure,
    memory: memory::Memory,
    metrics: metrics::Metrics,
    alerts: alerts::Alerts,
    /// Generations that the engine was told to let go of.
    going: BTreeMap<u64, orders::Going>,
    /// Orders that wait for their generation to be let go of: generation, session, request.
    unload_orders: Vec<(u64, u64, u64)>,
    last_load_id: u64,
    faults: u64,
    /// Since when there has been no session.
    idle_since_ns: Option<u64>,
    actions: Vec<Action>,
}

impl Core {
    /// A broker that has just begun to listen. The engine is started by the first event.
    pub(crate) fn new(config: CoreConfig, now_ns: u64) -> Core {
        let provider_children = provider_children::ProviderChildren::new(&config.provider_models);
        let (models, preload) = (config.models.clone(), config.preload.clone());
        let mut core = Core {
            config,
            started_ns: now_ns,
            sessions: session::Sessions::default(),
            models: models::Models::default(),
            leases: leases::Leases::default(),
            lanes: lanes::Lanes::default(),
            relay: relay::Relay::default(),
            engine: engine::Engine::default(),
            devices: devices::Devices::default(),
            providers: providers::Providers::default(),
            provider_children,
            leaving: leaving::Leaving::default(),
            status: status::StatusWaiters::default(),
            reconfigure: reconfigure::Reconfigure::default(),
            memory: memory::Memory::default(),
            metrics: metrics::Metrics::default(),
            alerts: alerts::Alerts::default(),
            going: BTreeMap::new(),
            unload_orders: Vec::new(),
            last_load_id: 0,
            faults: 0,
            idle_since_ns: Some(now_ns),
            actions: Vec::new(),
        };
        core.configure_models(now_ns, &models, &preload);
        core
    }

    /// Takes what happened and gives what is to be done, in order.
    pub(crate) fn handle(&mut self, now_ns: u64, event: Event) -> Vec<Action> {
        if !self.leaving.is_done() {
            self.dispatch(now_ns, event);
            self.timers(now_ns);
            self.start_loaders(now_ns);
            self.retire_unused();
            self.supervise(now_ns);
            self.supervise_providers(now_ns);
            self.note_levels();
            self.advance_leaving(now_ns);
        }
        std::mem::take(&mut self.actions)
    }

    fn dispatch(&mut self, now_ns: u64, event: Event) {
        match event {
            Event::Connected { session, pid, uid } => self.connected(now_ns, session, pid, uid),
            Event::Client { session, request_id, message } => {
                self.client(now_ns, session, request_id, message)
            }
            Event::ClientFault { session, code, message } => self.fault(now_ns, session, code, &message),
            Event::ClientGone { session } => self.end_session(now_ns, session),
            Event::CacheMade { generation, cache } => self.cache_made(now_ns, generation, cache),
            Event::LaneMade { lane_id, outcome } => self.lane_made(lane_id, outcome),
            Event::LoaderNotStarted { load_id, message } => {
                let message = format!("the loader cannot be started: {message}");
                self.load_failed(now_ns, load_id, Code::ModelLoadError, message);
            }
            Event::LoaderProgress { load_id, progress } => self.load_progress(now_ns, load_id, progress),
            Event::LoaderImage { load_id, facts } => self.load_done(now_ns, load_id, facts),
            Event::LoaderFailed { load_id, code, message } => {
                self.load_failed(now_ns, load_id, code, message)
            }
            Event::LoaderExited { load_id, exit } => {
                let message = format!("the loader {exit} before the model was ready; try again");
                self.load_failed(now_ns, load_id, Code::ModelLoadError, message);
            }
            Event::EngineStarted { incarnation, pid } => self.engine_started(incarnation, pid),
            Event::EngineNotStarted { incarnation, message } => {
                self.engine_dead(
                    now_ns,
                    incarnation,
                    format!("the engine cannot be started: {message}"),
                    false,
                );
            }
            Event::Engine { incarnation, message } => self.engine_says(now_ns, incarnation, message),
            Event::EngineLinkLost { incarnation, reason } => self.engine_lost(now_ns, incarnation, reason),
            Event::EngineExited { incarnation, exit } => {
                let orderly = exit == ChildExit::Status(0) && self.engine.drain_sent;
                self.engine_dead(now_ns, incarnation, format!("the engine {exit}"), orderly);
            }
            Event::ProviderStarted { child, pid } => self.provider_started(child, pid),
            Event::ProviderNotStarted { child, message } => {
                self.provider_not_started(now_ns, child, &message)
            }
            Event::ProviderExited { child, exit } => self.provider_exited(now_ns, child, exit),
            Event::ReloadSignal => self.reload_signal(),
            Event::ConfigurationRead(outcome) => self.configuration_read(now_ns, *outcome),
            Event::Memory { available_bytes, caches } => self.memory_seen(now_ns, available_bytes, caches),
            Event::StopSignal => self.stop_signal(now_ns),
            Event::Tick => {}
        }
    }

    fn timers(&mut self, now_ns: u64) {
        for session in self.sessions.overdue(now_ns) {
            self.fault(now_ns, session, Code::BadState, "no Hello came in time");
        }
        self.waiters_overdue(now_ns);
        self.askers_overdue(now_ns);
        self.lifecycle_overdue(now_ns);
        self.loads_overdue(now_ns);
        self.jobs_overdue(now_ns);
        self.provided_jobs_overdue(now_ns);
        self.provided_waiters_overdue(now_ns);
        self.retire_provided(now_ns);
        self.status_overdue(now_ns);
    }

    /// When [`Event::Tick`] is due; `None` = nothing is timed.
    pub(crate) fn next_timer_ns(&self) -> Option<u64> {
        if self.leaving.is_done() {
            return None;
        }
        [
            self.sessions.next_timer_ns(),
            self.models.next_timer_ns(),
            self.lifecycle_timer_ns(),
            self.relay.next_timer_ns(),
            self.status.next_timer_ns(),
            self.engine_timer_ns(),
            self.providers_timer_ns(),
            self.provider_children_timer_ns(),
            self.leaving_timer_ns(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn limits(&self) -> &Limits {
        &self.config.limits
    }

    fn send(&mut self, session: u64, request_id: u64, message: BrokerMessage) {
        self.metrics.told(&message);
        self.actions.push(Action::Send { session, request_id, message, attachments: Vec::new() });
    }

    fn refuse(
        &mut self,
        session: u64,
        request_id: u64,
        code: Code,
        message: impl Into<String>,
        retry_after_ms: u32,
    ) {
        let message = cut(message.into());
        self.send(session, request_id, BrokerMessage::Refused(Refusal { code, message, retry_after_ms }));
    }

    fn tell_engine(&mut self, message: ToEngine, attachments: Vec<Attachment>) {
        self.actions.push(Action::ToEngine { message, attachments });
    }
}

/// Cuts a message to what a frame's message may have, at a character.
fn cut(mut message: String) -> String {
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(end);
    }
    message
}

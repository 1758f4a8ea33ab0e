//! The one thread and its one poller: waits, hands what happened to the core, does what the core says. Sleeps without
//! end when nothing is timed.

use super::caches::Cache;
use super::children::{Child, EngineLink};
use super::clients::reserve;
use super::connection::{Connection, ConnectionBounds};
use super::perform::LaneDescriptors;
use super::providers::ProviderProcesses;
use super::reload::Reloader;
use crate::config::{BrokerConfig, Limits};
use crate::core::{Core, CoreConfig, Event, Policy, nanos};
use crate::reloaded::ReadAgain;
use shm_os::image_backing::BackingChoice;
use shm_os::process::monotonic_ns;
use shm_os::run_dir::effective_uid;
use shm_os::socket::Listener;
use shm_os::{Interest, OsError, PollEvent, Poller};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// What a poll event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    Listener,
    Signals,
    Client(u64),
    ClientPid(u64),
    LoaderLink(u64),
    LoaderPid(u64),
    EngineLink(u64),
    EnginePid(u64),
    /// A provider's process, by its place in the configuration.
    ProviderPid(u64),
    Hangups,
    Reloader,
}

/// Bits of a token's id; the kind lies above. Ids count up from 1 and never come near.
const ID_BITS: u32 = 56;

impl Token {
    pub(crate) fn pack(self) -> u64 {
        let (kind, id): (u64, u64) = match self {
            Token::Listener => (0, 0),
            Token::Signals => (1, 0),
            Token::Client(id) => (2, id),
            Token::ClientPid(id) => (3, id),
            Token::LoaderLink(id) => (4, id),
            Token::LoaderPid(id) => (5, id),
            Token::EngineLink(id) => (6, id),
            Token::EnginePid(id) => (7, id),
            Token::ProviderPid(id) => (10, id),
            Token::Hangups => (8, 0),
            Token::Reloader => (9, 0),
        };
        kind << ID_BITS | id
    }

    fn unpack(token: u64) -> Option<Token> {
        let id = token & ((1 << ID_BITS) - 1);
        Some(match token >> ID_BITS {
            0 => Token::Listener,
            1 => Token::Signals,
            2 => Token::Client(id),
            3 => Token::ClientPid(id),
            4 => Token::LoaderLink(id),
            5 => Token::LoaderPid(id),
            6 => Token::EngineLink(id),
            7 => Token::EnginePid(id),
            10 => Token::ProviderPid(id),
            8 => Token::Hangups,
            9 => Token::Reloader,
            _ => return None,
        })
    }
}

/// The broker's open descriptors and processes, around its core.
pub(crate) struct EventLoop {
    pub(crate) core: Core,
    pub(crate) limits: Limits,
    pub(crate) bounds: ConnectionBounds,
    pub(crate) engine_command: Vec<OsString>,
    pub(crate) loader_command: Vec<OsString>,
    pub(crate) backing: BackingChoice,
    pub(crate) cache_dir: PathBuf,
    pub(crate) poller: Poller,
    pub(crate) listener: Listener,
    pub(crate) accepting: bool,
    pub(crate) reserve: Option<File>,
    signals: UnixStream,
    hangups: UnixStream,
    pub(crate) on_reload: Option<ReadAgain>,
    pub(crate) reloader: Option<Reloader>,
    /// The time of this turn.
    pub(crate) now_ns: u64,
    pub(crate) events: VecDeque<Event>,
    pub(crate) connections: HashMap<u64, Connection>,
    pub(crate) last_session: u64,
    /// Clients for which something was queued in this turn.
    pub(crate) dirty: BTreeSet<u64>,
    /// Clients with a timer.
    pub(crate) timed: BTreeSet<u64>,
    /// Clients whose frames did not all get their turn.
    pub(crate) more_frames: BTreeSet<u64>,
    pub(crate) lanes: HashMap<u64, LaneDescriptors>,
    pub(crate) images: HashMap<u64, OwnedFd>,
    pub(crate) caches: HashMap<u64, Cache>,
    pub(crate) cache_entries: usize,
    pub(crate) cache_ttl: Duration,
    /// Images that loaders handed over and the core has not decided about.
    pub(crate) offered_images: HashMap<u64, OwnedFd>,
    pub(crate) loaders: HashMap<u64, Child>,
    pub(crate) engine: EngineLink,
    pub(crate) providers: ProviderProcesses,
    pub(crate) exiting: bool,
}

impl EventLoop {
    /// Everything set up, nothing begun. `signals` becomes readable with each stop signal, `hangups` with each SIGHUP.
    ///
    /// # Errors
    /// [`OsError`] when the poller cannot be made.
    pub(crate) fn new(
        config: BrokerConfig,
        listener: Listener,
        signals: UnixStream,
        hangups: UnixStream,
    ) -> Result<EventLoop, OsError> {
        let poller = Poller::new()?;
        poller.add(&listener, Token::Listener.pack(), Interest::READABLE)?;
        poller.add(&signals, Token::Signals.pack(), Interest::READABLE)?;
        poller.add(&hangups, Token::Hangups.pack(), Interest::READABLE)?;
        let now_ns = monotonic_ns();
        let core = Core::new(
            CoreConfig {
                default_model: config.default_model,
                limits: config.limits.clone(),
                policy: Policy {
                    unload_after: config.unload_after,
                    max_shared_models: config.max_shared_models,
                    memory_budget_bytes: config.memory_budget_bytes,
                    log_model_usage: config.log_model_usage,
                },
                models: config.models,
                preload: config.preload,
                idle_exit: config.idle_exit,
                memory_monitoring: config.memory_monitoring,
                allow_other_users: config.allow_other_users,
                caches: config.cache_entries > 0,
                engine_saves: config.cache_persist && config.cache_entries > 0,
                provider_models: config.providers.iter().map(|p| p.model_id.clone()).collect(),
                own_uid: effective_uid(),
                // Keyed by the system's randomness, anew in each process.
                boot_id: std::hash::RandomState::new().build_hasher().finish() | 1,
                broker_pid: std::process::id(),
            },
            now_ns,
        );
        let bounds = ConnectionBounds {
            half_frame_ns: nanos(config.limits.half_frame_timeout),
            stall_ns: nanos(config.limits.outgoing_stall),
            outgoing_bytes: config.limits.outgoing_queue_bytes,
        };
        Ok(EventLoop {
            core,
            limits: config.limits,
            bounds,
            engine_command: config.engine_command,
            loader_command: config.loader_command,
            backing: config.backing,
            cache_dir: config.cache_dir,
            poller,
            listener,
            accepting: true,
            reserve: reserve(),
            signals,
            hangups,
            on_reload: config.on_reload,
            reloader: None,
            now_ns,
            events: VecDeque::new(),
            connections: HashMap::new(),
            last_session: 0,
            dirty: BTreeSet::new(),
            timed: BTreeSet::new(),
            more_frames: BTreeSet::new(),
            lanes: HashMap::new(),
            images: HashMap::new(),
            caches: HashMap::new(),
            cache_entries: config.cache_entries,
            cache_ttl: config.cache_ttl,
            offered_images: HashMap::new(),
            loaders: HashMap::new(),
            engine: EngineLink::default(),
            providers: ProviderProcesses::new(config.providers, &config.socket_path)?,
            exiting: false,
        })
    }

    /// Runs until the core says to leave; then writes out what is queued and ends every child.
    ///
    /// # Errors
    /// [`OsError`] when waiting for events fails; children are ended then too.
    pub(crate) fn run(mut self) -> Result<(), OsError> {
        self.events.push_back(Event::Tick);
        let outcome = self.turns();
        if outcome.is_ok() {
            self.write_out();
        }
        self.end_children();
        outcome
    }

    fn turns(&mut self) -> Result<(), OsError> {
        let mut polled: Vec<PollEvent> = Vec::new();
        loop {
            self.now_ns = monotonic_ns();
            self.run_events();
            let connection_timer_ns = self.settle();
            if self.exiting {
                return Ok(());
            }
            let timeout = if self.more_frames.is_empty() {
                [
                    self.core.next_timer_ns(),
                    connection_timer_ns,
                    self.next_child_timer_ns(),
                    self.engine.retry_at_ns,
                ]
                .into_iter()
                .flatten()
                .min()
                .map(|due| Duration::from_nanos(due.saturating_sub(self.now_ns)))
            } else {
                Some(Duration::ZERO)
            };
            self.poller.wait(&mut polled, timeout)?;
            self.now_ns = monotonic_ns();
            for event in &polled {
                self.happened(event);
                self.run_events();
            }
            for session in std::mem::take(&mut self.more_frames) {
                self.take_frames(session);
                self.run_events();
            }
            if self.core.next_timer_ns().is_some_and(|due| due <= self.now_ns) {
                self.events.push_back(Event::Tick);
            }
        }
    }

    /// Acts on timers and writes, until that leads to nothing new; gives the connections' next timer.
    fn settle(&mut self) -> Option<u64> {
        loop {
            let next = self.connection_timers();
            self.child_timers();
            self.run_events();
            self.flush_clients();
            self.pump_engine(self.now_ns);
            if self.events.is_empty() && self.dirty.is_empty() {
                return next.into_iter().chain(self.next_connection_timer()).min();
            }
            self.run_events();
        }
    }

    fn next_connection_timer(&self) -> Option<u64> {
        use super::connection::Timed;
        let states = self.timed.iter().filter_map(|s| self.connections.get(s));
        states
            .filter_map(|c| match c.timed(self.now_ns, self.bounds) {
                Timed::Not(due) => due,
                Timed::HalfFrame | Timed::Stalled | Timed::Lingered => Some(self.now_ns),
            })
            .min()
    }

    fn happened(&mut self, event: &PollEvent) {
        let ended = event.hangup || event.error;
        match Token::unpack(event.token) {
            None => {}
            Some(Token::Listener) => self.accept(),
            Some(Token::Signals) => {
                let mut bytes = [0; 64];
                let count = (&self.signals).read(&mut bytes).unwrap_or(0);
                self.events.extend((0..count).map(|_| Event::StopSignal));
            }
            Some(Token::Hangups) => {
                // Several that came at once are one: the reading comes after all of them.
                let read = (&self.hangups).read(&mut [0; 64]);
                self.events.extend(read.is_ok_and(|count| count > 0).then_some(Event::ReloadSignal));
            }
            Some(Token::Reloader) => self.reloader_ready(),
            Some(Token::Client(session)) => {
                if event.readable || ended {
                    self.client_ready(session, ended);
                }
                if event.writable {
                    self.dirty.insert(session);
                }
            }
            Some(Token::ClientPid(session)) => {
                // What it said before it ended is still heard: a program may say one thing and leave.
                self.client_ready(session, true);
                self.run_events();
                self.client_gone(session);
            }
            Some(Token::LoaderLink(load_id)) => self.loader_link_ready(load_id),
            Some(Token::LoaderPid(load_id)) => self.loader_ended(load_id),
            // Writing happens in each turn anyway.
            Some(Token::EngineLink(incarnation)) if event.readable || ended => {
                self.engine_link_ready(incarnation)
            }
            Some(Token::EngineLink(_)) => {}
            Some(Token::EnginePid(incarnation)) => self.engine_ended(incarnation),
            Some(Token::ProviderPid(child)) => self.provider_ended(child),
        }
    }

    /// The last answers get a bounded time to reach their clients.
    fn write_out(&mut self) {
        let until_ns = monotonic_ns().saturating_add(nanos(self.limits.exit_flush));
        let mut polled = Vec::new();
        loop {
            let waiting: Vec<u64> = self
                .connections
                .iter()
                .filter(|(_, c)| c.stream.queued_bytes() > 0)
                .map(|(id, _)| *id)
                .collect();
            for session in waiting {
                self.flush_client(session);
            }
            self.now_ns = monotonic_ns();
            let rest = self.connections.values().any(|c| c.stream.queued_bytes() > 0);
            if !rest || self.now_ns >= until_ns {
                return;
            }
            let left = Duration::from_nanos(until_ns - self.now_ns);
            if self.poller.wait(&mut polled, Some(left)).is_err() {
                return;
            }
            for event in &polled {
                let gone = event.hangup || event.error;
                match Token::unpack(event.token) {
                    Some(Token::Client(session)) if gone => self.client_gone(session),
                    Some(Token::ClientPid(session)) => self.client_gone(session),
                    _ => self.ignore(event.token),
                }
            }
        }
    }

    /// Stops watching what would otherwise wake the last writes again and again.
    fn ignore(&mut self, token: u64) {
        match Token::unpack(token) {
            Some(Token::Client(session)) => {
                if let Some(connection) = self.connections.get_mut(&session)
                    && connection.interest.readable
                {
                    let interest = Interest { readable: false, ..connection.interest };
                    let _ = self.poller.modify(&connection.stream, token, interest);
                    connection.interest = interest;
                }
            }
            Some(Token::Listener) => self.set_accepting(false),
            Some(Token::Signals) => {
                let _ = self.poller.remove(&self.signals);
            }
            Some(Token::Hangups) => {
                let _ = self.poller.remove(&self.hangups);
            }
            Some(Token::Reloader) => self.end_reloader(),
            Some(Token::EngineLink(_) | Token::EnginePid(_)) => self.end_engine(),
            Some(Token::LoaderLink(load_id) | Token::LoaderPid(load_id)) => {
                if let Some(mut child) = self.loaders.remove(&load_id) {
                    child.close_link(&self.poller);
                    child.end();
                }
            }
            Some(Token::ProviderPid(child)) => self.providers.end_one(child),
            Some(Token::ClientPid(_)) | None => {}
        }
    }

    fn end_engine(&mut self) {
        if let Some(mut child) = self.engine.child.take() {
            child.close_link(&self.poller);
            child.end();
        }
    }

    fn end_children(&mut self) {
        self.end_engine();
        self.providers.end();
        for (_, mut child) in self.loaders.drain() {
            child.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were() {
        for token in [
            Token::Listener,
            Token::Signals,
            Token::Client(1),
            Token::ClientPid(u64::MAX >> 8),
            Token::LoaderLink(3),
            Token::LoaderPid(4),
            Token::EngineLink(5),
            Token::EnginePid(6),
            Token::ProviderPid(0),
            Token::Hangups,
            Token::Reloader,
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}

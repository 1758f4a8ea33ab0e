//! A process's connection to the broker: made when needed, made anew when the broker comes back, by one thread for all.
//! What is asked over it is the callers' affair.

use crate::error::SdkError;
use crate::session::{Reply, Session, Watch};
use crate::settings::{Settings, StartBroker};
use crate::start::{Started, broker_lives, start_broker};
use crate::time::{Deadline, SLICE, backoff};
use shm_layout::wire::ClientMessage;
use shm_os::socket::{self, SocketError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Pause before the first repetition of an attempt to connect, and the longest one.
pub(crate) const RECONNECT_BASE: Duration = Duration::from_millis(4);
pub(crate) const RECONNECT_CAP: Duration = Duration::from_millis(400);
/// How long the broker of a faster starter is waited for, and the pause between looks.
const RIVAL_WAIT: Duration = Duration::from_secs(5);
const RIVAL_PAUSE: Duration = Duration::from_millis(10);
/// Looks for a faster starter's broker before its lock file must name it.
const RIVAL_LOOKS: u32 = 10;
/// Brokers started in one attempt, where those before were dead before they could be connected to.
const MAX_STARTS: u32 = 3;
/// How often an unanswered question is asked again because the broker went away.
const MAX_ASKS: u32 = 8;

#[derive(Debug, Default)]
struct Slot {
    session: Option<Arc<Session>>,
    /// A thread is connecting for all.
    connecting: bool,
    /// Attempts that have ended, and the error of the last when it failed.
    attempts: u64,
    last_error: Option<SdkError>,
    /// Sessions opened; all but the first are reconnections.
    sessions: u64,
    last_boot_id: Option<u64>,
}

/// What one process knows of its broker. A forked child has one of its own.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) settings: Arc<Settings>,
    /// Numbers for requests, jobs and seats: never used twice, so that no answer can be taken for another's.
    ids: Arc<AtomicU64>,
    slot: Mutex<Slot>,
    changed: Condvar,
}

impl Core {
    pub(crate) fn new(settings: Arc<Settings>) -> Core {
        let ids = Arc::new(AtomicU64::new(1));
        Core { settings, ids, slot: Mutex::default(), changed: Condvar::new() }
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sessions opened so far, less the first.
    pub(crate) fn reconnects(&self) -> u64 {
        self.lock().sessions.saturating_sub(1)
    }

    /// A session that stands, by one attempt to make one where there is none. Of several callers one makes the attempt
    /// and all share its outcome.
    pub(crate) fn session(
        &self,
        start: StartBroker,
        deadline: Deadline,
        watch: Watch<'_>,
    ) -> Result<Arc<Session>, SdkError> {
        let mut slot = self.lock();
        let seen = slot.attempts;
        loop {
            if let Some(session) = slot.session.as_ref().filter(|session| session.is_alive()) {
                return Ok(Arc::clone(session));
            }
            if slot.attempts != seen
                && let Some(error) = &slot.last_error
            {
                return Err(error.clone());
            }
            if deadline.has_passed() {
                return Err(SdkError::DeadlineExceeded(deadline.allowed));
            }
            if !slot.connecting {
                break;
            }
            let slice = deadline.left_within(SLICE);
            slot = self.changed.wait_timeout(slot, slice).unwrap_or_else(PoisonError::into_inner).0;
            drop(slot);
            watch(None);
            slot = self.lock();
        }
        slot.connecting = true;
        let old = slot.session.take();
        drop(slot);
        self.note_boot(old);
        let outcome = self.attempt(start, deadline, watch);
        let mut slot = self.lock();
        slot.connecting = false;
        slot.attempts += 1;
        let outcome = outcome.map(Arc::new);
        match &outcome {
            Ok(session) => {
                slot.session = Some(Arc::clone(session));
                slot.last_error = None;
                slot.sessions += 1;
            }
            Err(error) => slot.last_error = Some(error.clone()),
        }
        drop(slot);
        self.changed.notify_all();
        outcome
    }

    /// Remembers which broker a session that ended belonged to.
    fn note_boot(&self, old: Option<Arc<Session>>) {
        if let Some(welcome) = old.and_then(|session| session.welcome()) {
            self.lock().last_boot_id = Some(welcome.boot_id);
        }
    }

    /// Whether `session` is with another broker process than the one before. Lease and lane numbers and generations
    /// of different brokers have nothing to do with each other.
    pub(crate) fn is_other_broker(&self, session: &Session) -> bool {
        let last = self.lock().last_boot_id;
        matches!((last, session.welcome()), (Some(last), Some(welcome)) if welcome.boot_id != last)
    }

    fn attempt(&self, start: StartBroker, deadline: Deadline, watch: Watch<'_>) -> Result<Session, SdkError> {
        let settings = &*self.settings;
        let deadline = Deadline::after(Some(deadline.left_within(settings.connect_timeout)));
        let absent = match self.connect(deadline) {
            Ok(session) => return Ok(session),
            Err(SocketError::NotThere { .. } | SocketError::Stale { .. } | SocketError::Closed) => {
                SdkError::NoBroker {
                    socket: settings.socket.clone(),
                    reason:
                        "none is listening there, and this client does not start one: run `modelbroker serve`"
                            .into(),
                }
            }
            Err(error) => return Err(SdkError::Connect(error.to_string())),
        };
        if start == StartBroker::Never {
            return Err(absent);
        }
        let mut failure = absent;
        for _ in 0..MAX_STARTS {
            let (ended, is_broken) = match start_broker(settings, deadline, watch)? {
                Started::Serves => (None, false),
                Started::Ended { pid, error, lost_race } => {
                    failure = error;
                    (Some(pid), !lost_race)
                }
            };
            if let Some(session) = self.connect_to_any(ended, deadline, watch)? {
                return Ok(session);
            }
            if is_broken || deadline.has_passed() {
                break;
            }
            // Whoever served, this process's broker or a faster starter's, is dead already.
        }
        Err(failure)
    }

    /// Connects to the broker that was just started, or to that of a faster starter; `None` when none of them lives.
    /// `ended`: the process that was started here and ended.
    fn connect_to_any(
        &self,
        ended: Option<u32>,
        deadline: Deadline,
        watch: Watch<'_>,
    ) -> Result<Option<Session>, SdkError> {
        let rival_deadline = Deadline::after(Some(deadline.left_within(RIVAL_WAIT)));
        for look in 0.. {
            match self.connect(deadline) {
                Ok(session) => return Ok(Some(session)),
                Err(SocketError::NotThere { .. } | SocketError::Stale { .. } | SocketError::Closed) => {}
                Err(error) => return Err(SdkError::Connect(error.to_string())),
            }
            let hopeless = look >= RIVAL_LOOKS && !broker_lives(&self.settings.socket, ended);
            if hopeless || rival_deadline.has_passed() {
                break;
            }
            watch(None);
            std::thread::sleep(RIVAL_PAUSE);
        }
        Ok(None)
    }

    fn connect(&self, deadline: Deadline) -> Result<Session, SocketError> {
        let settings = &*self.settings;
        let timeout = deadline.left_within(settings.connect_timeout);
        let connection = socket::connect(&settings.socket, timeout, settings.peer)?;
        Session::open(connection.into(), &settings.name, Arc::clone(&self.ids)).map_err(|error| match error {
            SdkError::Disconnected { .. } => SocketError::Closed,
            other => SocketError::Os(shm_os::OsError::new(
                "opening a session",
                std::io::Error::other(other.to_string()),
            )),
        })
    }

    /// Asks the broker something that may be asked twice, reconnecting when it goes away meanwhile; gives the session
    /// too that the answer came over.
    pub(crate) fn ask(
        &self,
        message: &ClientMessage,
        start: StartBroker,
        deadline: Deadline,
    ) -> Result<(Arc<Session>, Reply), SdkError> {
        let mut asked = 0;
        loop {
            let session = self.session(start, deadline, &mut |_| {})?;
            match session.request(message, deadline, &mut |_| {}) {
                Err(SdkError::Disconnected { .. }) if asked < MAX_ASKS => {
                    std::thread::sleep(deadline.left_within(backoff(asked, RECONNECT_BASE, RECONNECT_CAP)));
                    asked += 1;
                }
                outcome => return outcome.map(|reply| (session, reply)),
            }
        }
    }
}

//! One connection to a broker: requests and their answers, jobs sent as frames, and noticing that the other end is gone.
//! Reconnecting is `connect`'s affair, lanes are `seat`'s.
//!
//! Any number of threads use a session. One of those that wait reads the socket for all (without holding the lock while
//! it sleeps) and hands each answer to whoever it is for; when it leaves, another takes over.

use crate::error::SdkError;
use crate::time::{Deadline, SLICE};
use shm_layout::code::Code;
use shm_layout::lane::LAYOUT_HASH;
use shm_layout::wire::{
    AnswerFrame, BrokerMessage, ClientMessage, ConfigurationReloaded, FrameHead, Hello, JobFrame, Leased,
    LoadProgress, ModelOutcome, PROTOCOL_MAJOR, PROTOCOL_MINOR, Partial, Refusal, StatusReport, Superseded,
    Welcome, decode_body,
};
use shm_os::framed::{Fill, Flush, FramedError, FramedStream};
use shm_os::{Interest, PollEvent, Poller};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes of frames that wait to be sent; jobs beyond it stay with their model and are sent later.
const MAX_QUEUED_BYTES: usize = 4 << 20;
/// Most leases that are remembered as replaced: more than a session may have.
const MAX_SUPERSEDED: usize = 1024;
/// Most progress messages kept for a caller that is slow to take them; the newest count.
const MAX_PROGRESS: usize = 64;

/// A broker's answer to one request.
#[derive(Debug)]
pub(crate) enum Reply {
    Leased(Box<Leased>, Vec<OwnedFd>),
    Released,
    Status(Box<StatusReport>),
    ConfigurationReloaded(ConfigurationReloaded),
    ShuttingDown,
    Pong,
    Model(Box<ModelOutcome>),
}

/// A job's answer, as it came over the socket.
#[derive(Debug)]
pub(crate) enum JobReply {
    Answered(AnswerFrame),
    Refused {
        job_id: u64,
        refusal: Refusal,
    },
    /// A piece of an answer that is still being made.
    Piece(Partial),
}

/// What a caller sees while it waits: progress of a load, or just that time passes (`None`).
pub(crate) type Watch<'a> = &'a mut dyn FnMut(Option<LoadProgress>);

/// Whether a job was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    Yes,
    /// Too much waits to be sent already.
    Full,
}

#[derive(Debug)]
enum Waiting {
    Open {
        progress: Vec<LoadProgress>,
    },
    Done(Result<Reply, SdkError>),
    /// Nobody waits any more; a lease that comes all the same goes back.
    Abandoned,
}

#[derive(Debug)]
struct Inner {
    stream: FramedStream,
    /// A thread is reading for all.
    reading: bool,
    /// The poller watches for room to write.
    watching_writes: bool,
    waiting: HashMap<u64, Waiting>,
    /// Which seat sent the job, until it is answered.
    job_seats: HashMap<u64, u64>,
    mail: HashMap<u64, Vec<JobReply>>,
    welcome: Option<Welcome>,
    /// What the broker said before it closed the connection.
    parting: Option<SdkError>,
    dead: Option<SdkError>,
    /// Leases whose generation was replaced.
    superseded: BTreeSet<u64>,
}

/// A connection to a broker.
#[derive(Debug)]
pub(crate) struct Session {
    hello_id: u64,
    ids: Arc<AtomicU64>,
    poller: Poller,
    inner: Mutex<Inner>,
    changed: Condvar,
    dead: AtomicBool,
    /// Whether the generation of any lease was replaced.
    superseded: AtomicBool,
}

fn failure(error: FramedError) -> SdkError {
    match error {
        FramedError::Closed => SdkError::hung_up("it closed the connection"),
        FramedError::Socket(error) if error.is_disconnect() => SdkError::hung_up("it closed the connection"),
        FramedError::Head(_) | FramedError::Codec(_) | FramedError::Descriptors { .. } => {
            SdkError::Fault { peer: "the broker", what: error.to_string() }
        }
        FramedError::TimedOut(_) => SdkError::hung_up(error.to_string()),
        FramedError::Socket(_) | FramedError::Os(_) => SdkError::os(error),
    }
}

impl Session {
    /// Opens a session on a connected socket. The broker's welcome is not waited for: the first request's answer comes
    /// behind it, so a wrong version shows there and nobody pays a round trip for it.
    pub(crate) fn open(socket: OwnedFd, client_name: &str, ids: Arc<AtomicU64>) -> Result<Session, SdkError> {
        let mut stream = FramedStream::new(socket).map_err(failure)?;
        let poller = Poller::new().map_err(SdkError::os)?;
        poller.add(stream.as_fd(), 0, Interest::READABLE).map_err(SdkError::os)?;
        let hello = ClientMessage::Hello(Hello {
            protocol_major: PROTOCOL_MAJOR,
            protocol_minor: PROTOCOL_MINOR,
            layout_hash: LAYOUT_HASH,
            client_name: client_name.to_owned(),
        });
        let hello_id = ids.fetch_add(1, Ordering::Relaxed);
        stream.queue(hello_id, &hello, Vec::new()).map_err(failure)?;
        // Sent at once: a broker does not keep silent connections for long.
        if stream.flush().map_err(failure)? == Flush::Blocked {
            return Err(SdkError::hung_up("it does not read"));
        }
        let inner = Inner {
            stream,
            reading: false,
            watching_writes: false,
            waiting: HashMap::new(),
            job_seats: HashMap::new(),
            mail: HashMap::new(),
            welcome: None,
            parting: None,
            dead: None,
            superseded: BTreeSet::new(),
        };
        Ok(Session {
            hello_id,
            ids,
            poller,
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            dead: AtomicBool::new(false),
            superseded: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// Whether nothing is known to be wrong with the connection. Costs no system call.
    pub(crate) fn is_alive(&self) -> bool {
        !self.dead.load(Ordering::Acquire)
    }

    /// Reads what has arrived and says whether the connection still stands.
    pub(crate) fn check_alive(&self) -> bool {
        if self.is_alive() {
            let mut inner = self.lock();
            if !inner.reading {
                self.read_ready(&mut inner);
            }
        }
        self.is_alive()
    }

    /// Whether the generation of a lease was replaced, as far as was read. Costs no lock where none was.
    pub(crate) fn is_superseded(&self, lease_id: u64) -> bool {
        self.superseded.load(Ordering::Acquire) && self.lock().superseded.contains(&lease_id)
    }

    /// Forgets a lease that was given back.
    pub(crate) fn forget_superseded(&self, lease_id: u64) {
        if self.superseded.load(Ordering::Acquire) {
            let mut inner = self.lock();
            inner.superseded.remove(&lease_id);
            if inner.superseded.is_empty() {
                self.superseded.store(false, Ordering::Release);
            }
        }
    }

    /// The broker's greeting, once it has come.
    pub(crate) fn welcome(&self) -> Option<Welcome> {
        self.lock().welcome.clone()
    }

    /// Waits for the broker's greeting.
    pub(crate) fn wait_welcome(&self, deadline: Deadline) -> Result<Welcome, SdkError> {
        let mut inner = self.lock();
        self.flush(&mut inner);
        loop {
            if let Some(welcome) = &inner.welcome {
                return Ok(welcome.clone());
            }
            if let Some(error) = &inner.dead {
                return Err(error.clone());
            }
            if deadline.has_passed() {
                return Err(SdkError::DeadlineExceeded(deadline.allowed));
            }
            inner = self.pump(inner, deadline.left_within(SLICE));
        }
    }

    /// Asks, and waits for the answer.
    pub(crate) fn request(
        &self,
        message: &ClientMessage,
        deadline: Deadline,
        watch: Watch<'_>,
    ) -> Result<Reply, SdkError> {
        let id = self.next_id();
        let mut inner = self.lock();
        if let Some(error) = &inner.dead {
            return Err(error.clone());
        }
        inner.stream.queue(id, message, Vec::new()).map_err(failure)?;
        inner.waiting.insert(id, Waiting::Open { progress: Vec::new() });
        self.flush(&mut inner);
        loop {
            match inner.waiting.get_mut(&id) {
                Some(Waiting::Open { progress }) if !progress.is_empty() => {
                    let news = std::mem::take(progress);
                    drop(inner);
                    news.into_iter().for_each(|step| watch(Some(step)));
                    inner = self.lock();
                    continue;
                }
                Some(Waiting::Open { .. }) => {}
                Some(Waiting::Done(_) | Waiting::Abandoned) | None => {
                    return match inner.waiting.remove(&id) {
                        Some(Waiting::Done(reply)) => reply,
                        _ => {
                            Err(inner.dead.clone().unwrap_or_else(|| SdkError::hung_up("the session ended")))
                        }
                    };
                }
            }
            if deadline.has_passed() {
                inner.waiting.insert(id, Waiting::Abandoned);
                return Err(SdkError::DeadlineExceeded(deadline.allowed));
            }
            inner = self.pump(inner, deadline.left_within(SLICE));
            if matches!(inner.waiting.get(&id), Some(Waiting::Open { .. })) {
                drop(inner);
                watch(None);
                inner = self.lock();
            }
        }
    }

    /// Waits until the broker has closed the connection; false when the time ran out first.
    pub(crate) fn wait_hang_up(&self, deadline: Deadline) -> bool {
        let mut inner = self.lock();
        while inner.dead.is_none() {
            if deadline.has_passed() {
                return false;
            }
            inner = self.pump(inner, deadline.left_within(SLICE));
        }
        true
    }

    /// Sends a message that nobody waits for an answer of.
    pub(crate) fn tell(&self, message: &ClientMessage) {
        let id = self.next_id();
        let mut inner = self.lock();
        if inner.dead.is_none() && inner.stream.queue(id, message, Vec::new()).is_ok() {
            self.flush(&mut inner);
        }
    }

    /// Sends a job; its answer comes with [`Session::wait_mail`] of the same seat.
    pub(crate) fn send_job(&self, seat_id: u64, job: JobFrame) -> Result<Sent, SdkError> {
        let mut inner = self.lock();
        if let Some(error) = &inner.dead {
            return Err(error.clone());
        }
        if inner.stream.queued_bytes() > 0
            && inner.stream.queued_bytes() + job.payload.len() > MAX_QUEUED_BYTES
        {
            return Ok(Sent::Full);
        }
        let job_id = job.job_id;
        inner.stream.queue(job_id, &ClientMessage::Submit(job), Vec::new()).map_err(failure)?;
        inner.job_seats.insert(job_id, seat_id);
        self.flush(&mut inner);
        Ok(Sent::Yes)
    }

    /// The answers that came for a seat's jobs; waits up to `timeout` for the first.
    pub(crate) fn wait_mail(&self, seat_id: u64, timeout: Duration) -> Vec<JobReply> {
        let mut inner = self.lock();
        if let Some(mail) = inner.mail.remove(&seat_id) {
            return mail;
        }
        if inner.dead.is_none() {
            inner = self.pump(inner, timeout);
        }
        inner.mail.remove(&seat_id).unwrap_or_default()
    }

    /// Forgets what was for a seat that is gone.
    pub(crate) fn drop_seat(&self, seat_id: u64) {
        self.lock().mail.remove(&seat_id);
    }

    /// Sleeps until something came or `timeout` is over, reading for all if nobody does.
    fn pump<'a>(&'a self, mut inner: MutexGuard<'a, Inner>, timeout: Duration) -> MutexGuard<'a, Inner> {
        if inner.reading {
            return self.changed.wait_timeout(inner, timeout).unwrap_or_else(PoisonError::into_inner).0;
        }
        inner.reading = true;
        drop(inner);
        let mut events: Vec<PollEvent> = Vec::new();
        let outcome = self.poller.wait(&mut events, Some(timeout));
        let mut inner = self.lock();
        inner.reading = false;
        if let Err(error) = outcome {
            self.die(&mut inner, SdkError::os(error));
        } else if !events.is_empty() {
            if events.iter().any(|event| event.writable) {
                self.flush(&mut inner);
            }
            self.read_ready(&mut inner);
        }
        self.changed.notify_all();
        inner
    }

    fn flush(&self, inner: &mut Inner) {
        match inner.stream.flush() {
            Ok(state) => {
                let blocked = state == Flush::Blocked;
                if blocked != inner.watching_writes {
                    let interest = if blocked { Interest::READ_WRITE } else { Interest::READABLE };
                    match self.poller.modify(inner.stream.as_fd(), 0, interest) {
                        Ok(()) => inner.watching_writes = blocked,
                        Err(error) => self.die(inner, SdkError::os(error)),
                    }
                }
            }
            Err(FramedError::Closed) => {
                // What the broker said before it closed is worth more than that it closed.
                self.read_ready(inner);
                self.die(inner, SdkError::hung_up("it closed the connection"));
            }
            Err(error) => self.die(inner, failure(error)),
        }
    }

    fn read_ready(&self, inner: &mut Inner) {
        if inner.dead.is_some() {
            return;
        }
        let filled = inner.stream.fill();
        loop {
            match inner.stream.next_frame() {
                Ok(Some((head, body))) => {
                    if let Err(error) = self.dispatch(inner, head, &body) {
                        return self.die(inner, error);
                    }
                }
                Ok(None) => break,
                Err(error) => return self.die(inner, failure(error)),
            }
        }
        match filled {
            Ok(Fill::Open) => self.changed.notify_all(),
            Ok(Fill::Closed) => {
                let why =
                    inner.parting.take().unwrap_or_else(|| SdkError::hung_up("it closed the connection"));
                self.die(inner, why);
            }
            Err(error) => self.die(inner, failure(error)),
        }
    }

    fn die(&self, inner: &mut Inner, error: SdkError) {
        if inner.dead.is_none() {
            tracing::debug!(%error, "session ended");
            for waiting in inner.waiting.values_mut() {
                if matches!(waiting, Waiting::Open { .. }) {
                    *waiting = Waiting::Done(Err(error.clone()));
                }
            }
            inner.job_seats.clear();
            inner.dead = Some(error);
            self.dead.store(true, Ordering::Release);
        }
        self.changed.notify_all();
    }

    fn dispatch(&self, inner: &mut Inner, head: FrameHead, body: &[u8]) -> Result<(), SdkError> {
        let id = head.request_id;
        let message: BrokerMessage = decode_body(body)
            .map_err(|error| SdkError::Fault { peer: "the broker", what: error.to_string() })?;
        match message {
            BrokerMessage::Welcome(welcome) => {
                if id != self.hello_id || welcome.protocol_major != PROTOCOL_MAJOR {
                    let message = format!(
                        "the broker (version {}) speaks protocol {}, this program speaks {PROTOCOL_MAJOR}: use one \
                         version of modelbroker for both",
                        welcome.version, welcome.protocol_major
                    );
                    let code = Code::ProtocolVersion;
                    return Err(SdkError::Refused { code, message, retry_after: Duration::ZERO });
                }
                inner.welcome = Some(welcome);
            }
            BrokerMessage::Refused(refusal) => {
                if id == self.hello_id {
                    return Err(SdkError::refused(refusal));
                } else if let Some(seat_id) = inner.job_seats.remove(&id) {
                    let reply = JobReply::Refused { job_id: id, refusal };
                    inner.mail.entry(seat_id).or_default().push(reply);
                } else if id == 0 {
                    inner.parting = Some(SdkError::refused(refusal));
                } else {
                    settle(inner, id, Err(SdkError::refused(refusal)));
                }
            }
            BrokerMessage::Leased(leased) => {
                let count = 2 * usize::from(leased.lane.is_some())
                    + usize::from(leased.image)
                    + usize::from(leased.cache.is_some());
                let fds = inner.stream.take_descriptors(count).map_err(failure)?;
                let lease_id = leased.lease_id;
                if !settle(inner, id, Ok(Reply::Leased(Box::new(leased), fds))) {
                    let release = ClientMessage::Release { lease_id };
                    inner.stream.queue(self.next_id(), &release, Vec::new()).map_err(failure)?;
                    self.flush(inner);
                }
            }
            BrokerMessage::Progress(step) => {
                if let Some(Waiting::Open { progress }) = inner.waiting.get_mut(&id) {
                    if progress.len() == MAX_PROGRESS {
                        progress.remove(0);
                    }
                    progress.push(step);
                }
            }
            BrokerMessage::Answer(answer) => match inner.job_seats.remove(&answer.job_id) {
                Some(seat_id) => inner.mail.entry(seat_id).or_default().push(JobReply::Answered(answer)),
                None => {
                    let what = format!("an answer to job {}, which waits for none", answer.job_id);
                    return Err(SdkError::Fault { peer: "the broker", what });
                }
            },
            // Behind a cancellation pieces may come that nobody waits for.
            BrokerMessage::Partial(partial) => {
                if let Some(seat_id) = inner.job_seats.get(&partial.job_id) {
                    inner.mail.entry(*seat_id).or_default().push(JobReply::Piece(partial));
                }
            }
            BrokerMessage::Released => drop(settle(inner, id, Ok(Reply::Released))),
            BrokerMessage::Status(report) => drop(settle(inner, id, Ok(Reply::Status(Box::new(report))))),
            BrokerMessage::ConfigurationReloaded(what) => {
                let _ = settle(inner, id, Ok(Reply::ConfigurationReloaded(what)));
            }
            BrokerMessage::ShuttingDown => drop(settle(inner, id, Ok(Reply::ShuttingDown))),
            BrokerMessage::Pong => drop(settle(inner, id, Ok(Reply::Pong))),
            // Providers have connections of their own.
            BrokerMessage::Provided { .. }
            | BrokerMessage::ProviderJob(_)
            | BrokerMessage::ProviderCancel { .. }
            | BrokerMessage::Withdrawn => {
                let what = "a message for providers to a session that provides nothing".into();
                return Err(SdkError::Fault { peer: "the broker", what });
            }
            BrokerMessage::Model(outcome) => drop(settle(inner, id, Ok(Reply::Model(Box::new(outcome))))),
            BrokerMessage::Superseded(Superseded { lease_id, .. }) => {
                inner.superseded.insert(lease_id);
                // The oldest is one that was given back as this was said.
                if inner.superseded.len() > MAX_SUPERSEDED {
                    inner.superseded.pop_first();
                }
                self.superseded.store(true, Ordering::Release);
            }
        }
        Ok(())
    }
}

/// Gives a reply to whoever waits for it; false when nobody does.
fn settle(inner: &mut Inner, id: u64, reply: Result<Reply, SdkError>) -> bool {
    match inner.waiting.get_mut(&id) {
        Some(waiting @ Waiting::Open { .. }) => {
            *waiting = Waiting::Done(reply);
            true
        }
        Some(Waiting::Abandoned) => {
            inner.waiting.remove(&id);
            false
        }
        Some(Waiting::Done(_)) | None => false,
    }
}

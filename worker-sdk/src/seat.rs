//! One model in one process: its lease, its lane, and all jobs of all threads that use it. The callers' types are
//! `model` and `job`; what a job's bytes mean is theirs.
//!
//! # Who does the work
//! There is no thread of the SDK's own while callers block. One of the callers that wait *leads*: it sends what waits to
//! be sent, sleeps until answers come, takes them for all, and sees to a broker that died. The others *follow*: each
//! sleeps on a condition variable of its own until its job is done or the leader has left. Futures are led by a blocked
//! caller too, and by one background thread for each model where there is none.
//!
//! One private lock guards everything here; the leader does not hold it while it sleeps.

mod driver;
mod jobs;
mod lead;
mod link;
mod renew;

pub(crate) use jobs::{Answer, JobSpec};

use crate::cache::ClientCache;
use crate::connect::Core;
use crate::error::SdkError;
use crate::settings::Route;
use crate::time::{Deadline, SLICE, backoff};
use jobs::Jobs;
use link::{Arrival, Link};
use shm_layout::code::Code;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::wire::{ModelDescription, Partial};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// Jobs that wait to be sent, beyond which `submit` waits.
const MAX_BACKLOG_JOBS: usize = 1024;
/// Times in a row that an engine or broker may break the protocol before callers are told.
const MAX_FAULTS: u32 = 4;
/// Times that a job without a deadline is sent before it is taken for the reason why brokers go away.
const MAX_SENDS: u32 = 64;
/// Pauses before a refused job is sent again.
const REFUSED_BASE: Duration = Duration::from_millis(4);
const REFUSED_CAP: Duration = Duration::from_millis(250);
/// What an answer grows to when it did not fit.
const CAPACITY_FACTOR: usize = 8;
/// Time beyond a load's own limit after which its answer is not waited for any more.
pub(crate) const LOAD_GRACE: Duration = Duration::from_secs(5);

/// What a seat was asked for; the same in a forked child and after a broker's death.
#[derive(Debug)]
pub(crate) struct SeatRequest {
    pub(crate) name: String,
    pub(crate) wait: Duration,
    pub(crate) route: Route,
    /// The caller can go on without a broker: jobs with a deadline wait for one no longer than those without.
    pub(crate) fall_back: bool,
}

/// How far a job is whose answer comes in pieces.
#[derive(Debug)]
pub(crate) enum Progress {
    /// More of the text.
    Piece(String),
    /// Its end.
    End(Result<Answer, SdkError>),
}

#[derive(Debug)]
struct Outage {
    since: Instant,
    attempts: u32,
    not_before: Instant,
}

#[derive(Debug)]
struct State {
    link: Option<Link>,
    /// What the model was when it was last leased.
    model: Option<Arc<ModelDescription>>,
    links: u64,
    jobs: Jobs,
    leading: bool,
    outage: Option<Outage>,
    faults: u32,
    /// The background thread runs.
    driver: bool,
    closed: bool,
}

/// One model in one process.
#[derive(Debug)]
pub(crate) struct Seat {
    id: u64,
    generation: u64,
    core: Arc<Core>,
    request: Arc<SeatRequest>,
    state: Mutex<State>,
    /// The cache of the model as last leased; stays when the broker goes away. Beside the state, so that looking a text up
    /// waits for nobody who sends or takes answers.
    cache: RwLock<Option<Arc<ClientCache>>>,
    /// Wakes the background thread.
    driver: Condvar,
    /// When the broker's news are looked for again.
    look_due_ns: AtomicU64,
    /// A thread is taking up a new generation.
    renewing: AtomicBool,
}

type Guard<'a> = MutexGuard<'a, State>;

impl Seat {
    pub(crate) fn new(core: Arc<Core>, request: Arc<SeatRequest>) -> Seat {
        let state = State {
            link: None,
            model: None,
            links: 0,
            jobs: Jobs::default(),
            leading: false,
            outage: None,
            faults: 0,
            driver: false,
            closed: false,
        };
        Seat {
            id: core.next_id(),
            generation: shm_os::fork_generation(),
            core,
            request,
            state: Mutex::new(state),
            cache: RwLock::new(None),
            driver: Condvar::new(),
            look_due_ns: AtomicU64::new(0),
            renewing: AtomicBool::new(false),
        }
    }

    /// False in a forked child: then nothing here may be touched, not even the lock.
    pub(crate) fn belongs_to_this_process(&self) -> bool {
        self.generation == shm_os::fork_generation()
    }

    fn lock(&self) -> Guard<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up the lock, then wakes the futures whose jobs were done meanwhile.
    fn unlock(&self, mut state: Guard<'_>) {
        let wakers = state.jobs.take_wakers();
        drop(state);
        for waker in wakers {
            // A waker is foreign code; if it panics, the leader must not die of it.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake())).is_err() {
                tracing::error!("a waker panicked");
            }
        }
    }

    /// Gives up the lock; if nobody leads, somebody who waits is called to.
    fn leave(&self, state: Guard<'_>) {
        if !state.leading && !state.jobs.call_follower() && state.jobs.watched() > 0 {
            self.driver.notify_one();
        }
        self.unlock(state);
    }

    /// The model as it was last leased; takes up the lease where there is none yet (in a forked child).
    pub(crate) fn model(&self) -> Result<Arc<ModelDescription>, SdkError> {
        if let Some(model) = &self.lock().model {
            return Ok(Arc::clone(model));
        }
        self.open(Deadline::after(None), &mut |_| {})
    }

    /// The model as it was last leased; `None` where it never was.
    #[cfg(feature = "local")]
    pub(crate) fn known_model(&self) -> Option<Arc<ModelDescription>> {
        self.lock().model.clone()
    }

    /// Whether there is a lease with a broker that lives, as far as is known.
    #[cfg(feature = "local")]
    pub(crate) fn is_linked(&self) -> bool {
        let mut state = self.lock();
        self.look_after_silence(&mut state);
        state.link.as_ref().is_some_and(|link| link.session.check_alive())
    }

    /// The cache to look into before a job is made.
    pub(crate) fn cache(&self) -> Option<Arc<ClientCache>> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn install(&self, state: &mut State, mut link: Link) {
        *self.cache.write().unwrap_or_else(PoisonError::into_inner) = link.cache.take().map(Arc::new);
        if let Some(before) = &state.model
            && before.fingerprint != link.model.fingerprint
        {
            tracing::warn!(model = %link.model.model_id, "the model was replaced by another one of that name");
        }
        state.model = Some(Arc::clone(&link.model));
        state.link = Some(link);
        state.links += 1;
        state.outage = None;
        self.push(state);
    }

    /// Puts a job in line and sends it if there is room.
    pub(crate) fn enqueue(&self, spec: Arc<JobSpec>) -> u64 {
        let id = self.core.next_id();
        let mut state = self.lock();
        state.jobs.add(id, spec);
        self.look_after_silence(&mut state);
        self.push(&mut state);
        self.unlock(state);
        id
    }

    /// As [`Seat::enqueue`] for all or none, without any waiting.
    pub(crate) fn try_enqueue(&self, specs: &[Arc<JobSpec>]) -> Result<Vec<u64>, SdkError> {
        let mut state = self.lock();
        self.look_after_silence(&mut state);
        let ids: Vec<u64> = specs
            .iter()
            .map(|spec| {
                let id = self.core.next_id();
                state.jobs.add(id, Arc::clone(spec));
                id
            })
            .collect();
        self.push(&mut state);
        let taken = !ids.iter().any(|id| state.jobs.is_queued(*id));
        if !taken {
            ids.iter().for_each(|id| state.forget(*id));
        }
        self.unlock(state);
        if taken { Ok(ids) } else { Err(SdkError::WouldBlock) }
    }

    /// After a pause nobody knows whether the broker still lives; looking costs less than finding out by waiting.
    fn look_after_silence(&self, state: &mut State) {
        if let Some(link) = &mut state.link
            && link.heard.elapsed() > SLICE
        {
            if link.session.check_alive() {
                link.heard = Instant::now();
            } else {
                state.link_down();
            }
        }
    }

    /// Sends what is in line, as far as there is room.
    fn push(&self, state: &mut State) {
        self.push_once(state);
        if state.jobs.backlog_len() > 0 && state.link.as_ref().is_some_and(|link| link.lane.is_some()) {
            // Room may be had by taking answers, also when no one leads just now.
            if self.reap(state) > 0 {
                self.push_once(state);
            }
        }
    }

    fn push_once(&self, state: &mut State) {
        let Some(link) = &mut state.link else { return };
        if !link.session.is_alive() || state.jobs.backlog_len() == 0 {
            return;
        }
        let (seat_id, core) = (self.id, &self.core);
        state.jobs.send_each(Instant::now(), |id, entry| link.push(seat_id, core.next_id(), id, entry));
        link.ring();
    }

    /// Takes what the lane has; gives how many answers there were. A fault ends the link.
    fn reap(&self, state: &mut State) -> usize {
        let Some(link) = &mut state.link else { return 0 };
        let (arrivals, fault) = link.reap();
        let count = arrivals.len();
        self.deliver(state, arrivals);
        if let Some(fault) = fault {
            self.fault(state, &fault.to_string());
        }
        count
    }

    fn deliver(&self, state: &mut State, arrivals: Vec<Arrival>) {
        for arrival in arrivals {
            self.deliver_one(state, arrival);
        }
    }

    /// Keeps a piece of an answer for whoever reads it. A job that is run anew sends its pieces again: those that are there are
    /// left out, by their place.
    fn add_piece(&self, state: &mut State, job: u64, partial: Partial) {
        if state.jobs.add_piece(job, partial.offset_bytes, &partial.text).is_err() {
            self.fault(state, "a piece of a text that leaves a hole, or more than a text may have");
        }
    }

    fn deliver_one(&self, state: &mut State, arrival: Arrival) {
        let known = state.link.as_ref().map(|link| (link.dim(), link.number, link.is_provided()));
        let Some((dim, link_number, provided)) = known else { return };
        let Arrival { job: id, status, bytes, retry_after } = arrival;
        if state.jobs.sent_as(id).is_none() {
            // Cancelled, late, or nobody's any more.
            return;
        }
        let Some(entry) = state.jobs.get_mut(id) else { return };
        let refused = |code| {
            let message = match String::from_utf8_lossy(&bytes).into_owned() {
                message if message.is_empty() => String::from("the engine gave no reason"),
                message => message,
            };
            SdkError::Refused { code, message, retry_after }
        };
        match status {
            Code::Ok => {
                state.faults = 0;
                state.jobs.finish(id, Ok(Answer { bytes, dim, link_number, provided }));
            }
            Code::OutputTooSmall if entry.capacity_bytes.is_none_or(|bytes| bytes < MAX_PAYLOAD_BYTES) => {
                let before = entry.capacity_bytes.unwrap_or(MAX_PAYLOAD_BYTES / CAPACITY_FACTOR);
                entry.capacity_bytes = Some(before.saturating_mul(CAPACITY_FACTOR).min(MAX_PAYLOAD_BYTES));
                state.jobs.requeue(id, None);
            }
            Code::Overloaded | Code::ShuttingDown => {
                let now = Instant::now();
                let since = *entry.refused_since.get_or_insert(now);
                let pause = retry_after.max(backoff(entry.refusals, REFUSED_BASE, REFUSED_CAP));
                entry.refusals += 1;
                let given_up = match entry.spec.deadline.at() {
                    Some(at) => now + pause >= at,
                    None => now.duration_since(since) > self.core.settings.patience(),
                };
                if given_up {
                    state.jobs.finish(id, Err(refused(status)));
                } else {
                    state.jobs.requeue(id, Some(now + pause));
                }
            }
            Code::Stale => {
                // The lease is not ours any more: take up another one and ask again.
                state.jobs.requeue(id, None);
                self.fault(state, "the lease was no longer known");
            }
            Code::DeadlineExceeded => {
                let allowed = entry.spec.deadline.allowed;
                state.jobs.finish(id, Err(SdkError::DeadlineExceeded(allowed)));
            }
            Code::Cancelled => state.jobs.finish(id, Err(SdkError::Cancelled)),
            code => state.jobs.finish(id, Err(refused(code))),
        }
    }

    /// The other side broke the protocol: let go of this lease and its lane, and take up another one.
    fn fault(&self, state: &mut State, what: &str) {
        tracing::warn!(model = %self.request.name, fault = what, "taking up a new lane");
        state.faults += 1;
        if let Some(link) = state.link.take() {
            state.jobs.requeue_all();
            link.release();
        }
        if state.faults > MAX_FAULTS {
            state.faults = 0;
            state.jobs.fail(&SdkError::Fault { peer: "the engine", what: what.to_owned() }, |_| true);
        }
    }

    /// An answer that came over link `link_number` could not be read.
    pub(crate) fn distrust(&self, link_number: u64, what: &str) {
        let mut state = self.lock();
        // A provider's wrong answer says nothing against the broker, through which alone it came; another provider may
        // give the next.
        if state.link.as_ref().is_some_and(|link| link.number == link_number && !link.is_provided()) {
            self.fault(&mut state, what);
        }
        self.unlock(state);
    }

    /// Waits for a job's end, leading if nobody does.
    pub(crate) fn wait(&self, id: u64) -> Result<Answer, SdkError> {
        let mut state = self.lock();
        loop {
            if let Some(outcome) = state.jobs.take_done(id) {
                self.leave(state);
                return outcome;
            }
            let Some(deadline) = state.jobs.deadline(id) else {
                self.leave(state);
                return Err(SdkError::Cancelled);
            };
            if deadline.has_passed() {
                state.forget(id);
                self.leave(state);
                return Err(SdkError::DeadlineExceeded(deadline.allowed));
            }
            state = if state.leading { self.follow(state, id, deadline) } else { self.lead(state, deadline) };
        }
    }

    /// Waits for the next piece of a job's answer, or for its end, leading if nobody does.
    pub(crate) fn wait_progress(&self, id: u64) -> Progress {
        let mut state = self.lock();
        loop {
            if let Some(text) = state.jobs.take_pieces(id) {
                self.leave(state);
                return Progress::Piece(text);
            }
            if let Some(outcome) = state.jobs.take_done(id) {
                self.leave(state);
                return Progress::End(outcome);
            }
            let Some(deadline) = state.jobs.deadline(id) else {
                self.leave(state);
                return Progress::End(Err(SdkError::Cancelled));
            };
            if deadline.has_passed() {
                state.forget(id);
                self.leave(state);
                return Progress::End(Err(SdkError::DeadlineExceeded(deadline.allowed)));
            }
            state = if state.leading { self.follow(state, id, deadline) } else { self.lead(state, deadline) };
        }
    }

    /// Waits until the line is short enough for more.
    pub(crate) fn wait_room(&self, deadline: Deadline) -> Result<(), SdkError> {
        let mut state = self.lock();
        while state.jobs.backlog_len() >= MAX_BACKLOG_JOBS {
            if deadline.has_passed() {
                self.leave(state);
                return Err(SdkError::DeadlineExceeded(deadline.allowed));
            }
            if state.leading {
                self.unlock(state);
                std::thread::sleep(REFUSED_BASE);
                state = self.lock();
            } else {
                state = self.lead(state, deadline);
            }
        }
        self.leave(state);
        Ok(())
    }

    fn follow<'a>(&'a self, mut state: Guard<'a>, id: u64, deadline: Deadline) -> Guard<'a> {
        if state.jobs.has_wakers() {
            self.unlock(state);
            return self.lock();
        }
        let bell = state.jobs.follow(id);
        state = match deadline.at() {
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                bell.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
            None => bell.wait(state).unwrap_or_else(PoisonError::into_inner),
        };
        state.jobs.unfollow(id);
        state
    }

    /// The outcome of a job that is done, without any waiting.
    pub(crate) fn try_take(&self, id: u64) -> Option<Result<Answer, SdkError>> {
        let mut state = self.lock();
        if !state.leading {
            // Nobody else looks.
            self.reap(&mut state);
            state.expire();
        }
        let outcome = match state.jobs.deadline(id) {
            Some(_) => state.jobs.take_done(id),
            None => Some(Err(SdkError::Cancelled)),
        };
        self.leave(state);
        outcome
    }

    /// Ends a job with "cancelled" and tells the engine.
    pub(crate) fn cancel(&self, id: u64) {
        let mut state = self.lock();
        state.cancel_wire(id);
        state.jobs.finish(id, Err(SdkError::Cancelled));
        self.unlock(state);
    }

    /// Cancels a job that nobody waits for any more.
    pub(crate) fn forget(&self, id: u64) {
        let mut state = self.lock();
        state.forget(id);
        self.leave(state);
    }

    /// Times that the lease was taken up, less the first.
    pub(crate) fn relinks(&self) -> u64 {
        self.lock().links.saturating_sub(1)
    }

    /// The last handle is gone: gives the lease back and lets go of the lane.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.jobs.fail(&SdkError::Cancelled, |_| true);
        let link = state.link.take();
        *self.cache.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.driver.notify_all();
        self.unlock(state);
        if let Some(link) = link {
            if let Some(lane) = &link.lane {
                // The background thread may sleep in the lane.
                let _ = lane.mapping.wake_client();
            }
            link.session.drop_seat(self.id);
            link.release();
        }
    }
}

impl State {
    fn is_linked_by(&self, number: u64) -> bool {
        self.link.as_ref().is_some_and(|link| link.number == number)
    }

    /// The broker is gone: what was out waits for the next one.
    fn link_down(&mut self) {
        if self.link.take().is_some() {
            let jobs = self.jobs.requeue_all();
            tracing::warn!(jobs, "the broker is gone: reconnecting");
            let lost = SdkError::hung_up("each time that this job was sent");
            self.jobs.fail_resent(MAX_SENDS, &lost);
        }
    }

    fn cancel_wire(&self, id: u64) {
        if let (Some(wire), Some(link)) = (self.jobs.sent_as(id), &self.link) {
            link.cancel(wire);
        }
    }

    fn forget(&mut self, id: u64) {
        self.cancel_wire(id);
        self.jobs.remove(id);
    }

    fn expire(&mut self) {
        if self.jobs.next_deadline().is_none() {
            return;
        }
        for wire in self.jobs.expire(Instant::now()) {
            if let Some(link) = &self.link {
                link.cancel(wire);
            }
        }
    }

    /// How long may be slept: until the next thing that has its time.
    fn slice(&self, until: Deadline) -> Duration {
        let now = Instant::now();
        let next = [self.jobs.next_deadline(), self.jobs.next_due(now)].into_iter().flatten().min();
        let slice = until.left_within(SLICE);
        next.map_or(slice, |at| slice.min(at.saturating_duration_since(now)))
    }
}

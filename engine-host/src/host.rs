//! The state that both threads share, and what is done with jobs on their way in and out: accepting, refusing,
//! answering, forgetting a client. Waiting lives in `worker`, the broker's commands in `commands`, computing in
//! `execute`.
//!
//! Locks, always in this order: link turn, state, a lane's end, link stream. None is held while a model computes, loads
//! or is dropped.

use crate::HostError;
use crate::accept::{Offer, Refused, check};
use crate::breaks::Breaks;
use crate::cache::Cache;
use crate::compute::{ComputeError, Loader, ModelFacts};
use crate::generate::Generator;
use crate::job::{Job, Origin, message_of};
use crate::lane::{Lane, Taken};
use crate::link::{Farewell, Link};
use crate::measured::{Measured, REPORT_EVERY_JOBS};
use crate::persist::Keeper;
use crate::schedule::{Client, JobKey, Schedule};
use shm_layout::code::Code;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::wire::{AnswerFrame, EngineTotals, FromEngine, Priority};
use shm_os::process::monotonic_ns;
use shm_os::{Doorbell, Poller};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Poller token of the link.
pub(crate) const LINK_TOKEN: u64 = 0;
/// Poller token of the bell that wakes a thread so that it sees the end.
pub(crate) const WAKER_TOKEN: u64 = 1;
/// Poller token of lane 0.
pub(crate) const FIRST_LANE_TOKEN: u64 = 2;
/// Most bytes of input held for jobs that came over the socket, of all sessions together. The broker admits fewer.
pub(crate) const MAX_RELAYED_INPUT_BYTES: usize = 64 << 20;

/// A model that is served. Whoever holds it keeps the image mapped.
#[derive(Debug)]
pub(crate) struct Served<C> {
    pub(crate) model: C,
    pub(crate) facts: ModelFacts,
    pub(crate) cache: Option<Arc<Cache>>,
    // Last: it speaks when the model is gone.
    pub(crate) farewell: Farewell,
}

/// A job that came over the socket and is not answered.
#[derive(Debug)]
pub(crate) struct Relayed {
    pub(crate) key: JobKey,
    pub(crate) client: Client,
    pub(crate) priority: Priority,
    pub(crate) cancelled: Arc<AtomicBool>,
}

/// What changes under the lock.
#[derive(Debug)]
pub(crate) struct State<C> {
    pub(crate) schedule: Schedule,
    /// Every job that waits, whole or in part; those in the running batch are with the thread that computes it.
    pub(crate) jobs: HashMap<JobKey, Job>,
    next_key: JobKey,
    pub(crate) lanes: HashMap<u64, Arc<Lane>>,
    /// Lanes of clients that broke the protocol, until the broker drops them.
    pub(crate) faulted: HashMap<u64, Weak<Lane>>,
    /// Lanes that must be looked at: their bell rang, and they have not been found empty since.
    pub(crate) unarmed: VecDeque<u64>,
    pub(crate) relayed: HashMap<u64, Relayed>,
    pub(crate) models: HashMap<u64, Arc<Served<C>>>,
    /// A batch is being computed, or text is being generated.
    pub(crate) computing: bool,
    /// The thread that generates waits for its turn: the next that is free to compute is its.
    pub(crate) generator_waits: bool,
    /// Texts that are being generated or wait for it.
    pub(crate) generations: usize,
    /// Threads that hold jobs which are in no queue yet.
    pub(crate) accepting: usize,
    /// Nothing new is taken.
    pub(crate) draining: bool,
}

/// Counters since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) jobs: AtomicU64,
    pub(crate) texts: AtomicU64,
    pub(crate) tokens: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) measured: Measured,
}

/// Everything of one engine process.
#[derive(Debug)]
pub(crate) struct Host<L: Loader> {
    pub(crate) loader: L,
    pub(crate) link: Arc<Link>,
    pub(crate) poller: Arc<Poller>,
    pub(crate) waker: Doorbell,
    state: Mutex<State<L::Model>>,
    pub(crate) counters: Counters,
    pub(crate) breaks: Breaks,
    pub(crate) generator: Generator<L::Model>,
    /// Told when a batch is done and the thread that generates waits.
    pub(crate) compute_free: Condvar,
    pub(crate) relayed_bytes: Arc<AtomicUsize>,
    /// Keeps caches over restarts, where that is wanted.
    pub(crate) keeper: Option<Keeper>,
    stopped: AtomicBool,
    outcome: Mutex<Option<Result<(), HostError>>>,
    ended: Condvar,
}

/// Lanes whose clients are to be woken, each once.
#[derive(Debug, Default)]
pub(crate) struct Wakes(Vec<Arc<Lane>>);

impl Wakes {
    fn add(&mut self, lane: &Arc<Lane>) {
        if !self.0.iter().any(|other| Arc::ptr_eq(other, lane)) {
            self.0.push(Arc::clone(lane));
        }
    }

    /// Wakes them.
    pub(crate) fn fire(self) {
        for lane in self.0 {
            lane.wake();
        }
    }
}

impl<L: Loader> Host<L> {
    /// Takes the link; nothing is said on it yet.
    pub(crate) fn new(link: OwnedFd, loader: L) -> Result<Host<L>, HostError> {
        let poller = Arc::new(Poller::new()?);
        let waker = Doorbell::new().map_err(HostError::waker)?;
        poller.add(&waker, WAKER_TOKEN, shm_os::Interest::DOORBELL)?;
        let link = Link::new(link, Arc::clone(&poller), LINK_TOKEN)?;
        Ok(Host {
            loader,
            link: Arc::new(link),
            poller,
            waker,
            state: Mutex::new(State {
                schedule: Schedule::default(),
                jobs: HashMap::new(),
                next_key: 1,
                lanes: HashMap::new(),
                faulted: HashMap::new(),
                unarmed: VecDeque::new(),
                relayed: HashMap::new(),
                models: HashMap::new(),
                computing: false,
                generator_waits: false,
                generations: 0,
                accepting: 0,
                draining: false,
            }),
            counters: Counters::default(),
            breaks: Breaks::default(),
            generator: Generator::default(),
            compute_free: Condvar::new(),
            relayed_bytes: Arc::default(),
            keeper: None,
            stopped: AtomicBool::new(false),
            outcome: Mutex::new(None),
            ended: Condvar::new(),
        })
    }

    /// The shared state. A panic under this lock ends the engine, so its poison is not looked at.
    pub(crate) fn state(&self) -> MutexGuard<'_, State<L::Model>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the engine; the first outcome counts.
    pub(crate) fn stop(&self, outcome: Result<(), HostError>) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.stopped.swap(true, Ordering::AcqRel) {
            *slot = Some(outcome);
        }
        self.ended.notify_all();
        drop(slot);
        // Whoever waits under these locks looks again.
        drop(self.state());
        self.compute_free.notify_all();
        self.generator.wake();
        self.wake_a_thread();
    }

    /// Whether the end has come.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Wakes one thread that waits for events.
    pub(crate) fn wake_a_thread(&self) {
        if let Err(error) = self.waker.ring() {
            tracing::warn!(%error, "the engine's own bell cannot be rung");
        }
    }

    /// Waits for the end.
    pub(crate) fn wait_for_end(&self) -> Result<(), HostError> {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = slot.take() {
                return outcome;
            }
            slot = self.ended.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the engine when it drains and everything accepted is answered.
    pub(crate) fn stop_when_drained(&self) {
        let state = self.state();
        let is_done = state.draining
            && !state.computing
            && state.generations == 0
            && state.accepting == 0
            && state.jobs.is_empty()
            && state.schedule.queued_jobs() == 0;
        drop(state);
        if is_done {
            self.stop(Ok(()));
        }
    }

    /// Takes jobs from a lane into the queue, or answers them at once.
    pub(crate) fn accept_from_lane(&self, lane: &Arc<Lane>, taken: Vec<Taken>) {
        let offers = taken.into_iter().map(|Taken { job, input }| Offer {
            client: Client::Lane(lane.id()),
            operation: job.operation,
            priority: job.priority,
            generation: lane.generation(),
            deadline_ns: job.deadline_ns,
            attempts: job.attempts,
            output_capacity_bytes: job.output_capacity_bytes,
            origin: Origin::Lane { lane: Arc::clone(lane), job },
            input,
        });
        self.accept(lane.generation(), offers);
    }

    /// Checks offers for one model outside of the lock and queues them.
    pub(crate) fn accept(&self, generation: u64, offers: impl Iterator<Item = Offer>) {
        let served = self.state().models.get(&generation).cloned();
        let now_ns = monotonic_ns();
        let (mut jobs, mut refused, mut wakes) = (Vec::new(), Vec::new(), Wakes::default());
        for offer in offers {
            let mut job = match check(offer, served.as_ref().map(|served| &served.facts), now_ns) {
                Ok(job) => job,
                Err(refusal) => {
                    refused.push(refusal);
                    continue;
                }
            };
            if let Some((served, cache)) = served.as_ref().and_then(|s| Some((s, s.cache.as_ref()?))) {
                if let Err(ComputeError { code, message }) = job.look_up(cache) {
                    refused.push(Refused { origin: job.origin, code, message: message.into() });
                    continue;
                }
                if job.is_complete() {
                    // Everything is there: it is answered without ever being scheduled.
                    self.answer(job, &served.facts, &mut wakes);
                    continue;
                }
            }
            jobs.push(job);
        }
        wakes.fire();
        if !jobs.is_empty() {
            let mut guard = self.state();
            let state = &mut *guard;
            for mut job in jobs {
                if job.is_abandoned() {
                    continue;
                }
                if !state.models.contains_key(&generation) {
                    refused.push(Refused::new(job.origin, Code::ModelUnavailable));
                    continue;
                }
                job.key = state.next_key;
                state.next_key += 1;
                if let Origin::Relay { relay_id, cancelled } = &job.origin {
                    let relayed = Relayed {
                        key: job.key,
                        client: job.client,
                        priority: job.priority,
                        cancelled: Arc::clone(cancelled),
                    };
                    state.relayed.insert(*relay_id, relayed);
                }
                state.schedule.push(job.ask(), now_ns);
                state.jobs.insert(job.key, job);
            }
        }
        self.refuse_all(refused);
    }

    /// Answers what was not taken on.
    pub(crate) fn refuse_all(&self, refused: Vec<Refused>) {
        let mut wakes = Wakes::default();
        for Refused { origin, code, message } in refused {
            self.deliver(origin, code, message.as_bytes(), (0, 0), &mut wakes);
        }
        wakes.fire();
    }

    /// Answers a job with a code and its usual words.
    pub(crate) fn give_up(&self, job: Job, code: Code, wakes: &mut Wakes) {
        let times = job.times_us(monotonic_ns());
        self.deliver(job.origin, code, message_of(code).as_bytes(), times, wakes);
    }

    /// The one way out: posts an answer. `times` are queue and execution, in µs.
    pub(crate) fn deliver(
        &self,
        origin: Origin,
        code: Code,
        payload: &[u8],
        (queue_us, execution_us): (u32, u32),
        wakes: &mut Wakes,
    ) {
        let before = self.counters.jobs.fetch_add(1, Ordering::Relaxed);
        if code != Code::Ok {
            self.counters.errors.fetch_add(1, Ordering::Relaxed);
        }
        self.counters.measured.answered(code, queue_us, execution_us);
        if (before + 1).is_multiple_of(REPORT_EVERY_JOBS) {
            self.link.send(&FromEngine::Metrics(self.counters.measured.report()));
        }
        match origin {
            Origin::Lane { lane, job } => {
                if lane.has_departed() {
                    return;
                }
                match lane.post(job, code, payload, queue_us, execution_us) {
                    Ok(()) => wakes.add(&lane),
                    Err(fault) => self.forget_faulty(&lane, &fault.to_string()),
                }
            }
            Origin::Relay { relay_id, .. } => {
                self.state().relayed.remove(&relay_id);
                let (status, payload) = if payload.len() > MAX_PAYLOAD_BYTES {
                    (Code::OutputTooSmall, message_of(Code::OutputTooSmall).as_bytes())
                } else {
                    (code, payload)
                };
                let payload = payload.to_vec();
                let answer = AnswerFrame { job_id: relay_id, status, payload, queue_us, execution_us };
                self.link.send(&FromEngine::Answer(answer));
            }
        }
    }

    /// Takes a lane out of service and gives the jobs that waited for it. `None` when it was not in service.
    pub(crate) fn retire(&self, lane_id: u64) -> Option<(Arc<Lane>, Vec<Job>)> {
        let mut guard = self.state();
        let state = &mut *guard;
        let lane = state.lanes.remove(&lane_id)?;
        if let Some(cache) = state.models.get(&lane.generation()).and_then(|served| served.cache.as_ref()) {
            cache.retire_counts(lane.cache_counts());
        }
        // Under the lock: the thread that computes looks at this before it puts a job back.
        lane.depart();
        let keys = state.schedule.remove_client(Client::Lane(lane_id));
        let jobs = keys.iter().filter_map(|key| state.jobs.remove(key)).collect();
        drop(guard);
        if let Err(error) = self.poller.remove(lane.bell()) {
            tracing::warn!(lane_id, %error, "a bell cannot be taken from the poller");
        }
        Some((lane, jobs))
    }

    /// The client broke the protocol: its lane is no longer served, and the broker is told.
    pub(crate) fn forget_faulty(&self, lane: &Arc<Lane>, message: &str) {
        let lane_id = lane.id();
        if self.retire(lane_id).is_some() {
            tracing::warn!(lane_id, message, "a client broke its lane's protocol");
            self.state().faulted.insert(lane_id, Arc::downgrade(lane));
            self.link.send(&FromEngine::LaneFault { lane_id, message: message.to_owned() });
        }
    }

    /// The counters of each generation's cache, as they are sent.
    pub(crate) fn cache_totals(&self) -> Vec<FromEngine> {
        let state = self.state();
        let of = |(generation, served): (&u64, &Arc<Served<L::Model>>)| {
            let lanes = state.lanes.values().filter(|lane| lane.generation() == *generation);
            let totals = served.cache.as_ref()?.totals(lanes.map(|lane| lane.cache_counts()));
            Some(FromEngine::CacheTotals { generation: *generation, totals })
        };
        state.models.iter().filter_map(of).collect()
    }

    /// The counters as they are sent.
    pub(crate) fn totals(&self) -> EngineTotals {
        let queued = self.state().schedule.queued_jobs();
        EngineTotals {
            jobs: self.counters.jobs.load(Ordering::Relaxed),
            texts: self.counters.texts.load(Ordering::Relaxed),
            tokens: self.counters.tokens.load(Ordering::Relaxed),
            errors: self.counters.errors.load(Ordering::Relaxed),
            queued_jobs: u32::try_from(queued).unwrap_or(u32::MAX),
        }
    }
}

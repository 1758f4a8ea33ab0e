//! Serving a provided model: one thread reads, others compute and answer. Answers are written by whoever made them; the
//! reader only writes what the socket did not take at once.

use super::job::{ProvidedJob, ProviderError};
use super::link::{Link, WITHDRAW_ID};
use crate::connect::{RECONNECT_BASE, RECONNECT_CAP};
use crate::error::SdkError;
use crate::settings::Settings;
use crate::time::{Deadline, backoff};
use shm_layout::code::Code;
use shm_layout::wire::{AnswerFrame, BrokerMessage, ClientMessage, Provide, ProviderJob};
use shm_os::framed::{Fill, Flush};
use shm_os::{Doorbell, Interest, PollEvent, Poller};
use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time beyond a job's own for which a provider that stops waits for its last answers.
const STOP_GRACE: Duration = Duration::from_secs(5);

const SOCKET_TOKEN: u64 = 0;
const BELL_TOKEN: u64 = 1;

/// What the threads of a provider share.
#[derive(Debug)]
pub(super) struct Shared {
    work: Mutex<Work>,
    /// There is work, or none will come any more.
    more: Condvar,
    /// Never held while computing or sleeping.
    line: Mutex<Line>,
    /// Wakes the reader.
    bell: Doorbell,
    stopping: AtomicBool,
    registrations: AtomicU64,
}

/// Jobs that were taken.
#[derive(Debug, Default)]
struct Work {
    queue: VecDeque<Task>,
    /// Of every job that is not answered, whether it was given up; by connection and relay id.
    open: HashMap<(u64, u64), Arc<AtomicBool>>,
    ended: bool,
}

#[derive(Debug)]
struct Task {
    /// The connection it came over: its answer must not go over another.
    epoch: u64,
    job: ProvidedJob,
}

/// The present connection.
#[derive(Debug, Default)]
struct Line {
    epoch: u64,
    link: Option<Link>,
    failed: bool,
}

impl Shared {
    pub(super) fn new() -> Result<Shared, SdkError> {
        Ok(Shared {
            work: Mutex::default(),
            more: Condvar::new(),
            line: Mutex::default(),
            bell: Doorbell::new().map_err(SdkError::os)?,
            stopping: AtomicBool::new(false),
            registrations: AtomicU64::new(0),
        })
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake_reader();
    }

    pub(super) fn reconnects(&self) -> u64 {
        self.registrations.load(Ordering::Relaxed).saturating_sub(1)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    fn wake_reader(&self) {
        if let Err(error) = self.bell.ring() {
            tracing::warn!(%error, "the provider's reader could not be woken");
        }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a job's one answer, if its connection still stands.
    fn answer(
        &self,
        epoch: u64,
        relay_id: u64,
        max_output_bytes: u32,
        outcome: Result<Vec<u8>, ProviderError>,
    ) {
        self.work().open.remove(&(epoch, relay_id));
        let outcome = match outcome {
            Ok(payload) if payload.len() > max_output_bytes as usize => Err(ProviderError::failed(format!(
                "the answer has {} bytes; this model's answers have {max_output_bytes} at most",
                payload.len()
            ))),
            other => other,
        };
        let (status, payload) = match outcome {
            Ok(payload) => (Code::Ok, payload),
            Err(error) => (error.code(), error.message().as_bytes().to_vec()),
        };
        let frame = AnswerFrame { job_id: relay_id, status, payload, queue_us: 0, execution_us: 0 };
        self.send(epoch, 0, &ClientMessage::ProviderAnswer(frame));
    }

    fn send(&self, epoch: u64, request_id: u64, message: &ClientMessage) {
        let mut line = self.line();
        if line.epoch != epoch {
            return;
        }
        let Some(link) = &mut line.link else { return };
        let sent = link.stream.queue(request_id, message, Vec::new()).and_then(|()| link.stream.flush());
        let wake = match sent {
            Ok(Flush::Done) => false,
            Ok(Flush::Blocked) => true,
            Err(_) => {
                line.failed = true;
                true
            }
        };
        drop(line);
        if wake {
            self.wake_reader();
        }
    }

    /// A thread that computes.
    fn compute<F>(&self, handler: &F)
    where
        F: Fn(&ProvidedJob) -> Result<Vec<u8>, ProviderError> + Sync,
    {
        loop {
            let task = {
                let mut work = self.work();
                loop {
                    if let Some(task) = work.queue.pop_front() {
                        break task;
                    }
                    if work.ended {
                        return;
                    }
                    work = self.more.wait(work).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let Task { epoch, job } = task;
            let outcome = if job.is_cancelled() {
                Err(ProviderError::cancelled())
            } else if job.remaining().is_some_and(|left| left.is_zero()) {
                Err(ProviderError::with_code(Code::DeadlineExceeded, "the deadline passed before its turn"))
            } else {
                catch_unwind(AssertUnwindSafe(|| handler(&job))).unwrap_or_else(|panic| {
                    let what = panic_message(panic.as_ref());
                    tracing::error!(model = %job.offer.model_id, "the provider's handler panicked: {what}");
                    Err(ProviderError::failed(format!("the provider's handler panicked: {what}")))
                })
            };
            self.answer(epoch, job.frame.relay_id, job.offer.max_output_bytes, outcome);
            if self.is_stopping() {
                self.wake_reader();
            }
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Serves until stopped, or until the broker refuses for good.
pub(super) fn serve<F>(
    shared: &Shared,
    settings: &Settings,
    offer: &Provide,
    threads: usize,
    first: Option<Link>,
    handler: &F,
) -> Result<(), SdkError>
where
    F: Fn(&ProvidedJob) -> Result<Vec<u8>, ProviderError> + Sync,
{
    shared.work().ended = false;
    std::thread::scope(|scope| {
        let mut outcome = Ok(());
        for number in 0..threads {
            let name = format!("modelbroker-provider-{number}");
            let spawned =
                std::thread::Builder::new().name(name).spawn_scoped(scope, || shared.compute(handler));
            if let Err(error) = spawned {
                outcome = Err(SdkError::Os(format!("starting a provider's thread: {error}")));
                break;
            }
        }
        let outcome = outcome.and_then(|()| Reader::new(shared, settings, offer)?.run(first));
        let mut line = shared.line();
        *line = Line { epoch: line.epoch + 1, link: None, failed: false };
        drop(line);
        let mut work = shared.work();
        work.ended = true;
        give_up_all(&mut work);
        drop(work);
        shared.more.notify_all();
        outcome
    })
}

/// Nobody wants what came over a connection that is gone.
fn give_up_all(work: &mut Work) {
    work.queue.clear();
    work.open.drain().for_each(|(_, cancelled)| cancelled.store(true, Ordering::Relaxed));
}

/// The thread that reads, connects and reconnects.
struct Reader<'a> {
    shared: &'a Shared,
    settings: &'a Settings,
    offer: Arc<Provide>,
    poller: Poller,
    /// Whether the poller watches for room to write.
    watching_writes: bool,
    withdrawal: Option<Deadline>,
    withdrawn: bool,
}

impl<'a> Reader<'a> {
    fn new(shared: &'a Shared, settings: &'a Settings, offer: &Provide) -> Result<Reader<'a>, SdkError> {
        let poller = Poller::new().map_err(SdkError::os)?;
        poller.add(&shared.bell, BELL_TOKEN, Interest::READABLE).map_err(SdkError::os)?;
        let offer = Arc::new(offer.clone());
        Ok(Reader {
            shared,
            settings,
            offer,
            poller,
            watching_writes: false,
            withdrawal: None,
            withdrawn: false,
        })
    }

    fn run(&mut self, first: Option<Link>) -> Result<(), SdkError> {
        let mut next = first;
        let mut attempts = 0;
        loop {
            if self.shared.is_stopping() && next.is_none() {
                return Ok(());
            }
            let link = match next.take() {
                Some(link) => Ok(link),
                None => Link::register(self.settings, &self.offer, Deadline::after(None)),
            };
            match link {
                Ok(link) => {
                    self.shared.registrations.fetch_add(1, Ordering::Relaxed);
                    let began = std::time::Instant::now();
                    match self.serve_link(link) {
                        Ok(()) => return Ok(()),
                        Err(why) => {
                            tracing::warn!(model = %self.offer.model_id, %why, "the broker is gone: offering again")
                        }
                    }
                    if began.elapsed() > RECONNECT_CAP {
                        attempts = 0;
                    }
                }
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => tracing::debug!(%error, "the model could not be offered"),
            }
            let pause = backoff(attempts, RECONNECT_BASE, RECONNECT_CAP);
            attempts += 1;
            self.pause(pause)?;
        }
    }

    /// Sleeps, or until told to stop.
    fn pause(&self, pause: Duration) -> Result<(), SdkError> {
        let mut events: Vec<PollEvent> = Vec::new();
        self.poller.wait(&mut events, Some(pause)).map_err(SdkError::os)?;
        self.shared.bell.silence().map_err(SdkError::os)?;
        Ok(())
    }

    /// Serves over one connection; `Ok`: stopped in good order, else why the connection is gone.
    fn serve_link(&mut self, mut link: Link) -> Result<(), SdkError> {
        self.poller.add(link.stream.as_fd(), SOCKET_TOKEN, Interest::READABLE).map_err(SdkError::os)?;
        self.watching_writes = false;
        let early = std::mem::take(&mut link.early);
        let epoch = {
            let mut line = self.shared.line();
            line.epoch += 1;
            line.failed = false;
            line.link = Some(link);
            line.epoch
        };
        let mut outcome = early.into_iter().try_for_each(|message| self.take(epoch, message));
        // What arrived together with the registration lies in the buffer: no event tells of it.
        outcome = outcome.and_then(|()| self.read(epoch));
        let outcome = match outcome {
            Ok(()) => self.turns(epoch),
            Err(error) => Err(error),
        };
        // Closing the descriptor takes it out of the poller.
        let mut line = self.shared.line();
        line.link = None;
        line.epoch += 1;
        drop(line);
        give_up_all(&mut self.shared.work());
        outcome
    }

    fn turns(&mut self, epoch: u64) -> Result<(), SdkError> {
        let mut events: Vec<PollEvent> = Vec::new();
        loop {
            if self.shared.is_stopping() && self.has_stopped(epoch) {
                return Ok(());
            }
            self.flush()?;
            let timeout = self.withdrawal.map(|until| until.left_within(STOP_GRACE));
            self.poller.wait(&mut events, timeout).map_err(SdkError::os)?;
            for event in &events {
                if event.token == BELL_TOKEN {
                    self.shared.bell.silence().map_err(SdkError::os)?;
                } else if event.readable || event.hangup || event.error {
                    self.read(epoch)?;
                }
            }
        }
    }

    /// Withdraws, and says whether everything is answered or there is no time left for it.
    fn has_stopped(&mut self, epoch: u64) -> bool {
        let until = match self.withdrawal {
            Some(until) => until,
            None => {
                let timeout = Duration::from_millis(u64::from(self.offer.job_timeout_ms));
                let until = Deadline::after(Some(timeout + STOP_GRACE));
                self.withdrawal = Some(until);
                let model_id = self.offer.model_id.clone();
                self.shared.send(epoch, WITHDRAW_ID, &ClientMessage::Withdraw { model_id });
                until
            }
        };
        let unanswered = !self.shared.work().open.is_empty();
        let unsent = self.shared.line().link.as_ref().is_some_and(|link| link.stream.queued_bytes() > 0);
        until.has_passed() || (self.withdrawn && !unanswered && !unsent)
    }

    fn flush(&mut self) -> Result<(), SdkError> {
        let mut line = self.shared.line();
        if line.failed {
            return Err(SdkError::hung_up("it closed the connection"));
        }
        let Some(link) = &mut line.link else { return Err(SdkError::hung_up("no connection")) };
        let blocked = link.stream.flush().map_err(|error| super::link::failure(&error))? == Flush::Blocked;
        if blocked != self.watching_writes {
            let interest = if blocked { Interest::READ_WRITE } else { Interest::READABLE };
            self.poller.modify(link.stream.as_fd(), SOCKET_TOKEN, interest).map_err(SdkError::os)?;
            self.watching_writes = blocked;
        }
        Ok(())
    }

    /// Takes what has arrived.
    fn read(&mut self, epoch: u64) -> Result<(), SdkError> {
        let mut messages = Vec::new();
        let filled = {
            let mut line = self.shared.line();
            let Some(link) = &mut line.link else { return Err(SdkError::hung_up("no connection")) };
            let filled = link.stream.fill().map_err(|error| super::link::failure(&error))?;
            while let Some((_, message)) = link.next()? {
                messages.push(message);
            }
            filled
        };
        messages.into_iter().try_for_each(|message| self.take(epoch, message))?;
        match filled {
            Fill::Open => Ok(()),
            Fill::Closed => Err(SdkError::hung_up("it closed the connection")),
        }
    }

    fn take(&mut self, epoch: u64, message: BrokerMessage) -> Result<(), SdkError> {
        match message {
            BrokerMessage::ProviderJob(frame) => self.enqueue(epoch, frame),
            BrokerMessage::ProviderCancel { relay_id } => {
                if let Some(cancelled) = self.shared.work().open.get(&(epoch, relay_id)) {
                    // Answered when its turn comes, or by a handler that looks.
                    cancelled.store(true, Ordering::Relaxed);
                }
                Ok(())
            }
            BrokerMessage::Withdrawn => {
                self.withdrawn = true;
                Ok(())
            }
            BrokerMessage::Refused(refusal) => Err(SdkError::refused(refusal)),
            _ => Ok(()),
        }
    }

    fn enqueue(&self, epoch: u64, frame: ProviderJob) -> Result<(), SdkError> {
        let mut work = self.shared.work();
        if work.open.len() >= self.offer.max_in_flight as usize {
            let what = "more jobs at once than this provider takes".to_owned();
            return Err(SdkError::Fault { peer: "the broker", what });
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        work.open.insert((epoch, frame.relay_id), Arc::clone(&cancelled));
        let job = ProvidedJob { frame, offer: Arc::clone(&self.offer), cancelled };
        work.queue.push_back(Task { epoch, job });
        drop(work);
        self.shared.more.notify_one();
        Ok(())
    }
}

/// Whether offering again can lead to nothing.
fn is_final(error: &SdkError) -> bool {
    match error {
        SdkError::Refused { code, retry_after, .. } => {
            retry_after.is_zero() && !matches!(code, Code::ShuttingDown | Code::TooMany | Code::Overloaded)
        }
        SdkError::Fault { .. } => true,
        _ => false,
    }
}

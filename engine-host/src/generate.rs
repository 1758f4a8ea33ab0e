//! Text that is being generated: its queue, and the thread that goes on with all of it, a token at a time. How a token comes
//! about is the model's affair.
//!
//! # Turns
//! Only one thing is computed at a time, as it may use every core. Between two steps this thread lets one batch of other work
//! go first, if there is any, so neither keeps the other waiting for longer than the other's one turn.
//!
//! # Company
//! What waits joins what is under way after any step, up to [`MAX_TOGETHER`] texts of a model. When a step fails, each of those in it
//! begins again alone, so that only the one to blame gets the error; pieces that were sent before are sent again, and whoever
//! reads them knows them by their place.

use crate::batch::probe;
use crate::compute::{Compute, ComputeError, Generating, Loader};
use crate::execute::Moment;
use crate::host::{Host, MAX_RELAYED_INPUT_BYTES, Relayed, Served, Wakes};
use crate::job::{Origin, message_of};
use crate::lane::Permit;
use crate::schedule::Client;
use shm_layout::code::Code;
use shm_layout::limits::{ISOLATE_AFTER_ATTEMPTS, MAX_JOB_ATTEMPTS, MAX_MESSAGE_BYTES};
use shm_layout::wire::{
    FinishReason, FromEngine, GenerateAnswer, GenerateRequest, JobFrame, Partial, Priority, decode_body,
    encode_body, task_does,
};
use shm_os::process::monotonic_ns;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Texts of one model that are generated together: beyond it each token takes longer than more of them gain.
pub(crate) const MAX_TOGETHER: usize = 16;
/// Texts that wait to be generated. Beyond: `OVERLOADED`.
pub(crate) const MAX_WAITING: usize = 256;

/// A job that was accepted; consumed by its answer.
#[derive(Debug)]
struct Task<C> {
    origin: Origin,
    cancelled: Arc<AtomicBool>,
    relay_id: u64,
    priority: Priority,
    generation: u64,
    served: Arc<Served<C>>,
    request: GenerateRequest,
    deadline_ns: u64,
    taken_ns: u64,
    /// Whether nothing may be generated beside it.
    isolated: bool,
    _permit: Permit,
}

/// A text under way.
struct Active<C: Compute> {
    task: Task<C>,
    run: C::Run,
    begun_ns: u64,
    sent_bytes: u64,
}

/// What waits.
#[derive(Debug)]
pub(crate) struct Generator<C> {
    waiting: Mutex<VecDeque<Task<C>>>,
    news: Condvar,
}

impl<C> Default for Generator<C> {
    fn default() -> Generator<C> {
        Generator { waiting: Mutex::new(VecDeque::new()), news: Condvar::new() }
    }
}

impl<C> Generator<C> {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Task<C>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the thread look again.
    pub(crate) fn wake(&self) {
        // With the lock: between its look and its sleep nothing is missed.
        drop(self.lock());
        self.news.notify_all();
    }

    /// Puts a task in line; gives it back when the line is full.
    fn push(&self, task: Task<C>) -> Option<Task<C>> {
        let mut waiting = self.lock();
        if waiting.len() >= MAX_WAITING {
            return Some(task);
        }
        // Interactive before bulk, otherwise in order.
        let at = match task.priority {
            Priority::Bulk => waiting.len(),
            Priority::Interactive => {
                waiting.iter().position(|other| other.priority == Priority::Bulk).unwrap_or(waiting.len())
            }
        };
        waiting.insert(at, task);
        drop(waiting);
        self.news.notify_one();
        None
    }

    /// Takes out what nobody wants any more, with the reason.
    fn take_unwanted(&self, now_ns: u64) -> Vec<(Task<C>, Code)> {
        let mut waiting = self.lock();
        let mut unwanted = Vec::new();
        let mut at = 0;
        while at < waiting.len() {
            match waiting[at].unwanted(now_ns) {
                Some(code) => unwanted.extend(waiting.remove(at).map(|task| (task, code))),
                None => at += 1,
            }
        }
        unwanted
    }

    /// What may join `active`: of a model of which not enough are under way, and nothing beside what must be alone.
    fn take_joining(&self, active: &[(u64, bool)]) -> Vec<Task<C>> {
        let mut waiting = self.lock();
        let mut company = active.to_vec();
        let mut joining = Vec::new();
        let mut at = 0;
        while at < waiting.len() {
            let task = &waiting[at];
            let of_model = company.iter().filter(|(generation, _)| *generation == task.generation).count();
            let fits = if task.isolated {
                company.is_empty()
            } else {
                of_model < MAX_TOGETHER && !company.iter().any(|(_, isolated)| *isolated)
            };
            if !fits {
                // What must be alone keeps its place: nothing overtakes it for ever.
                if task.isolated {
                    break;
                }
                at += 1;
                continue;
            }
            company.push((task.generation, task.isolated));
            joining.extend(waiting.remove(at));
        }
        joining
    }
}

impl<C> Task<C> {
    /// Why nobody wants it any more.
    fn unwanted(&self, now_ns: u64) -> Option<Code> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Some(Code::Cancelled);
        }
        (self.deadline_ns != 0 && now_ns >= self.deadline_ns).then_some(Code::DeadlineExceeded)
    }
}

impl<L: Loader> Host<L> {
    /// Checks a job that came over the socket and puts it in line.
    pub(crate) fn accept_generation(
        &self,
        relay_id: u64,
        session_id: u64,
        generation: u64,
        attempts: u32,
        job: JobFrame,
    ) {
        let cancelled = Arc::new(AtomicBool::new(false));
        let origin = Origin::Relay { relay_id, cancelled: Arc::clone(&cancelled) };
        let refuse = |origin, code: Code, message: &str| {
            self.deliver(origin, code, message.as_bytes(), (0, 0), &mut Wakes::default());
        };
        let now_ns = monotonic_ns();
        let served = self.state().models.get(&generation).cloned();
        let code = match &served {
            _ if attempts >= MAX_JOB_ATTEMPTS => Some(Code::JobCrashedEngine),
            _ if job.deadline_ns != 0 && now_ns >= job.deadline_ns => Some(Code::DeadlineExceeded),
            None => Some(Code::ModelUnavailable),
            Some(served) if !task_does(served.facts.task, job.operation) => Some(Code::WrongTask),
            Some(_) => None,
        };
        let (Some(served), None) = (served, code) else {
            let code = code.unwrap_or(Code::ModelUnavailable);
            return refuse(origin, code, message_of(code));
        };
        let permit = Permit::acquire(&self.relayed_bytes, job.payload.len(), MAX_RELAYED_INPUT_BYTES);
        let Some(permit) = permit else {
            return refuse(origin, Code::Overloaded, message_of(Code::Overloaded));
        };
        let request = match decode_body::<GenerateRequest>(&job.payload) {
            Ok(request) => request,
            Err(error) => return refuse(origin, Code::BadPayload, &error.to_string()),
        };
        if let Err(what) = request.check() {
            return refuse(origin, Code::TooLarge, what);
        }
        let mut state = self.state();
        // Key 0 is no job's: the flag alone says that it is cancelled.
        let relayed = Relayed {
            key: 0,
            client: Client::Session(session_id),
            priority: job.priority,
            cancelled: Arc::clone(&cancelled),
        };
        state.relayed.insert(relay_id, relayed);
        state.generations += 1;
        drop(state);
        let task = Task {
            origin,
            cancelled,
            relay_id,
            priority: job.priority,
            generation,
            served,
            request,
            deadline_ns: job.deadline_ns,
            taken_ns: now_ns,
            isolated: attempts >= ISOLATE_AFTER_ATTEMPTS,
            _permit: permit,
        };
        if let Some(task) = self.generator.push(task) {
            self.end(task, None, Code::Overloaded, b"too many texts wait to be generated; try again later");
        }
    }

    /// Generates until the engine ends.
    pub(crate) fn generate(&self) {
        let mut active: Vec<Active<L::Model>> = Vec::new();
        while self.wait_for_tasks(&active) {
            for (task, code) in self.generator.take_unwanted(monotonic_ns()) {
                self.end(task, None, code, message_of(code).as_bytes());
            }
            let company: Vec<_> =
                active.iter().map(|active| (active.task.generation, active.task.isolated)).collect();
            let joining = self.generator.take_joining(&company);
            if !self.take_turn() {
                return;
            }
            for task in joining {
                active.extend(self.begin(task));
            }
            active = self.step(active);
            let is_interactive = active.iter().any(|active| active.task.priority == Priority::Interactive);
            self.end_turn(is_interactive);
            // One turn for whatever else there is.
            self.look_at_lanes();
            if let Some(work) = self.next_work(Moment::Free) {
                self.execute(work);
            }
            if active.is_empty() {
                // The rest of that is the other threads'.
                self.wake_a_thread();
            }
        }
    }

    /// Sleeps while there is nothing to do; false when the engine ends.
    fn wait_for_tasks(&self, active: &[Active<L::Model>]) -> bool {
        let mut waiting = self.generator.lock();
        while waiting.is_empty() && active.is_empty() && !self.is_stopped() {
            waiting = self.generator.news.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        !self.is_stopped()
    }

    /// Waits until nothing else is computed; false when the engine ends.
    fn take_turn(&self) -> bool {
        let mut state = self.state();
        while state.computing && !self.is_stopped() {
            state.generator_waits = true;
            state = self.compute_free.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.generator_waits = false;
        state.computing = true;
        !self.is_stopped()
    }

    /// Lets others compute; where somebody waits for a text, bulk work is cut as for other interactive work.
    fn end_turn(&self, is_interactive: bool) {
        let mut state = self.state();
        state.computing = false;
        if is_interactive {
            state.schedule.interactive_is_about(monotonic_ns());
        }
    }

    /// Begins with a task, unless it is unwanted or cannot be begun.
    fn begin(&self, task: Task<L::Model>) -> Option<Active<L::Model>> {
        let begun_ns = monotonic_ns();
        if let Some(code) = task.unwanted(begun_ns) {
            self.end(task, None, code, message_of(code).as_bytes());
            return None;
        }
        self.link.send(&FromEngine::JobStarted { relay_id: task.relay_id });
        let outcome = catch_unwind(AssertUnwindSafe(|| task.served.model.begin(&task.request)));
        match outcome.unwrap_or_else(|_| Err(panicked())) {
            Ok(run) => Some(Active { task, run, begun_ns, sent_bytes: 0 }),
            Err(error) => {
                self.end_failed(task, begun_ns, &error);
                None
            }
        }
    }

    /// One step of everything under way, each model for itself; gives what goes on.
    fn step(&self, active: Vec<Active<L::Model>>) -> Vec<Active<L::Model>> {
        let mut goes_on = Vec::new();
        let mut rest = active;
        while let Some(generation) = rest.first().map(|active| active.task.generation) {
            let (mut now, later): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|active| active.task.generation == generation);
            rest = later;
            let served = Arc::clone(&now[0].task.served);
            let mut runs: Vec<&mut _> = now.iter_mut().map(|active| &mut active.run).collect();
            let outcome = catch_unwind(AssertUnwindSafe(|| served.model.step(&mut runs)));
            match outcome.unwrap_or_else(|_| Err(panicked())) {
                Ok(()) => goes_on.extend(now.into_iter().filter_map(|active| self.report(active))),
                Err(error) => self.failed_together(now, &error),
            }
        }
        goes_on
    }

    /// Sends what is new of a text, and its answer when it is done.
    fn report(&self, mut active: Active<L::Model>) -> Option<Active<L::Model>> {
        if let Some(code) = active.task.unwanted(monotonic_ns()) {
            self.end(active.task, Some(active.begun_ns), code, message_of(code).as_bytes());
            return None;
        }
        let text = active.run.take_text();
        if active.task.request.stream && !text.is_empty() {
            let offset_bytes = active.sent_bytes;
            active.sent_bytes += text.len() as u64;
            let partial = Partial { job_id: active.task.relay_id, offset_bytes, text };
            self.link.send(&FromEngine::Partial(partial));
        }
        if !active.run.is_done() {
            return Some(active);
        }
        let run = &active.run;
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let answer = GenerateAnswer {
            text: run.text(),
            token_ids: run.token_ids().to_vec(),
            finish: run.finish().unwrap_or(FinishReason::Length),
            prompt_tokens: count(run.prompt_tokens()),
            output_tokens: count(run.output_tokens()),
            fingerprint: active.task.served.facts.fingerprint,
        };
        self.counters.texts.fetch_add(1, Ordering::Relaxed);
        let tokens = run.prompt_tokens() + run.output_tokens();
        self.counters.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
        match encode_body(&answer) {
            Ok(payload) => self.end(active.task, Some(active.begun_ns), Code::Ok, &payload),
            Err(_) => {
                let message = message_of(Code::OutputTooSmall).as_bytes();
                self.end(active.task, Some(active.begun_ns), Code::OutputTooSmall, message);
            }
        }
        None
    }

    /// A step failed: alone, it is that text's fault; together, each is tried again alone.
    fn failed_together(&self, mut failed: Vec<Active<L::Model>>, error: &ComputeError) {
        if let Ok(served) = failed.first().map(|active| Arc::clone(&active.task.served)).ok_or(())
            && let Err(error) = probe(&served.model)
        {
            // What is not answered stays with the broker for the engine that replaces this one.
            return self.stop(Err(crate::HostError::ModelBroken { reason: error.message }));
        }
        if failed.len() == 1
            && let Some(active) = failed.pop()
        {
            return self.end_failed(active.task, active.begun_ns, error);
        }
        let mut waiting = self.generator.lock();
        for active in failed.into_iter().rev() {
            let mut task = active.task;
            task.isolated = true;
            waiting.push_front(task);
        }
    }

    fn end_failed(&self, task: Task<L::Model>, begun_ns: u64, error: &ComputeError) {
        let message = &error.message[..error.message.floor_char_boundary(MAX_MESSAGE_BYTES)];
        self.end(task, Some(begun_ns), error.code, message.as_bytes());
    }

    /// Answers a task; `begun_ns` where it was begun.
    fn end(&self, task: Task<L::Model>, begun_ns: Option<u64>, code: Code, payload: &[u8]) {
        let now_ns = monotonic_ns();
        let us = |ns: u64| u32::try_from(ns / 1000).unwrap_or(u32::MAX);
        let begun_ns = begun_ns.unwrap_or(now_ns);
        let times = (us(begun_ns.saturating_sub(task.taken_ns)), us(now_ns.saturating_sub(begun_ns)));
        self.deliver(task.origin, code, payload, times, &mut Wakes::default());
        // Its hold on the model ends before it counts as done.
        drop(task.served);
        self.state().generations -= 1;
        if code != Code::Ok {
            tracing::debug!(%code, "a generation ended");
        }
        self.stop_when_drained();
    }
}

fn panicked() -> ComputeError {
    ComputeError::new(Code::Internal, "generating from this input failed inside the engine")
}

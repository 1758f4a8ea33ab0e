//! Jobs on the socket. A submitted job is either refused (`Refused`, nothing was taken) or accepted; an accepted one gets
//! exactly one `Answer`, whatever happens to engines, unless its session ends first.

use super::Core;
use super::models::{EngineSide, EntryState};
use super::relay::JobState;
use shm_layout::code::Code;
use shm_layout::limits::{MAX_JOB_ATTEMPTS, MAX_PAYLOAD_BYTES};
use shm_layout::wire::{AnswerFrame, BrokerMessage, JobFrame, Partial, ToEngine, is_provided};
use tracing::{debug, warn};

/// When a client that hit a limit on jobs may try again, in ms.
const RETRY_OVERLOADED_MS: u32 = 20;

impl Core {
    pub(super) fn submit(&mut self, now_ns: u64, session: u64, request_id: u64, job: JobFrame) {
        match self.admit_job(now_ns, session, &job) {
            Err((code, message, retry_after_ms)) => {
                self.refuse(session, request_id, code, message, retry_after_ms)
            }
            Ok(generation) => {
                let relay_id = self.relay.take(session, request_id, generation, job);
                if is_provided(generation) {
                    self.relay.note_accepted(relay_id, now_ns);
                    self.give_jobs(now_ns, generation);
                } else {
                    self.send_job(now_ns, relay_id);
                }
            }
        }
    }

    fn admit_job(&self, now_ns: u64, session: u64, job: &JobFrame) -> Result<u64, (Code, String, u32)> {
        if self.leaving.has_begun() {
            return Err((Code::ShuttingDown, "the broker is leaving and takes no new jobs".into(), 100));
        }
        let Some(lease) = self.leases.get(session, job.lease_id) else {
            return Err((
                Code::Stale,
                format!("this session holds no lease {}; acquire one", job.lease_id),
                0,
            ));
        };
        if job.payload.len() > MAX_PAYLOAD_BYTES {
            let message = format!(
                "a payload of {} bytes; the limit is {MAX_PAYLOAD_BYTES}; send fewer texts in one job",
                job.payload.len()
            );
            return Err((Code::TooLarge, message, 0));
        }
        if is_provided(lease.generation) {
            self.admit_provided(lease.generation, job)?;
        }
        if job.deadline_ns != 0 && job.deadline_ns <= now_ns {
            return Err((Code::DeadlineExceeded, "the deadline had passed when the job arrived".into(), 0));
        }
        if self.relay.knows(session, job.job_id) {
            let message =
                format!("a job {} of this session is in flight; give each job another id", job.job_id);
            return Err((Code::BadState, message, 0));
        }
        if let Err(reached) = self.relay.admit(session, job.payload.len(), self.limits()) {
            let message = format!("{reached}; wait for answers, then send again");
            return Err((Code::Overloaded, message, RETRY_OVERLOADED_MS));
        }
        Ok(lease.generation)
    }

    /// Gives a held job to the engine if it serves the job's model; answers it if it can never be served.
    fn send_job(&mut self, now_ns: u64, relay_id: u64) {
        let Some(job) = self.relay.get(relay_id) else { return };
        if job.state != JobState::Held || is_provided(job.generation) {
            return;
        }
        let Some(image) = self.models.images.get(&job.generation) else {
            self.answer_here(relay_id, Code::ModelUnavailable, "the model is no longer loaded");
            return;
        };
        match image.engine {
            EngineSide::Ready => {
                if job.frame.deadline_ns != 0 && job.frame.deadline_ns <= now_ns {
                    self.answer_here(
                        relay_id,
                        Code::DeadlineExceeded,
                        "the deadline passed before an engine was free",
                    );
                    return;
                }
                let message = ToEngine::Job {
                    relay_id,
                    session_id: job.session.unwrap_or(0),
                    generation: job.generation,
                    attempts: job.attempts,
                    job: job.frame.clone(),
                };
                self.relay.mark_sent(relay_id);
                self.tell_engine(message, Vec::new());
            }
            EngineSide::Failed => {
                let why = match self.models.entries.get(&image.entry).map(|e| &e.state) {
                    Some(EntryState::Failed { refusal, .. }) => refusal.message.clone(),
                    _ => "the engine cannot serve this model".to_owned(),
                };
                self.answer_here(relay_id, Code::ModelUnavailable, &why);
            }
            EngineSide::Unsent | EngineSide::Sent => {}
        }
    }

    /// Gives the engine every held job whose model it serves.
    pub(super) fn send_held_jobs(&mut self, now_ns: u64) {
        for relay_id in self.relay.held() {
            self.send_job(now_ns, relay_id);
        }
    }

    pub(super) fn cancel(&mut self, session: u64, job_id: u64) {
        let Some(relay_id) = self.relay.find(session, job_id) else { return };
        let Some(job) = self.relay.get(relay_id) else { return };
        if job.cancelled {
            return;
        }
        match job.state {
            JobState::Held => self.answer_here(relay_id, Code::Cancelled, "cancelled"),
            JobState::Sent { .. } => {
                self.relay.mark_cancelled(relay_id);
                self.cancel_running(relay_id);
            }
            JobState::Provided { .. } => self.answer_provided(relay_id, Code::Cancelled, "cancelled"),
        }
    }

    /// Tells whoever has a job that nobody wants its answer any more.
    pub(super) fn cancel_running(&mut self, relay_id: u64) {
        match self.relay.get(relay_id).map(|job| job.state) {
            Some(JobState::Provided { provider, .. }) => {
                self.send(provider, 0, BrokerMessage::ProviderCancel { relay_id });
            }
            _ => self.tell_engine(ToEngine::CancelJob { relay_id }, Vec::new()),
        }
    }

    /// The engine answered a job.
    pub(super) fn job_answered(&mut self, answer: AnswerFrame) {
        let Some(job) = self.relay.finish(answer.job_id) else {
            debug!(relay_id = answer.job_id, "an answer to a job that is no longer waited for");
            return;
        };
        let Some(session) = job.session else { return };
        let answer = AnswerFrame { job_id: job.frame.job_id, ..answer };
        self.send(session, job.request_id, BrokerMessage::Answer(answer));
    }

    /// A piece of a job's answer, while the rest is still being made.
    pub(super) fn job_goes_on(&mut self, partial: Partial) {
        let Some(job) = self.relay.get(partial.job_id).filter(|job| !job.cancelled) else { return };
        let Some(session) = job.session else { return };
        let partial = Partial { job_id: job.frame.job_id, ..partial };
        self.send(session, job.request_id, BrokerMessage::Partial(partial));
    }

    /// Answers a job without an engine.
    pub(super) fn answer_here(&mut self, relay_id: u64, status: Code, message: &str) {
        let payload = super::cut(message.to_owned()).into_bytes();
        self.metrics.failed(status);
        self.job_answered(AnswerFrame { job_id: relay_id, status, payload, queue_us: 0, execution_us: 0 });
    }

    /// The engine is gone; jobs wait for the next one, except those that must not.
    pub(super) fn jobs_lost_their_engine(&mut self) {
        for relay_id in self.relay.engine_gone() {
            let Some(job) = self.relay.get(relay_id) else { continue };
            if job.attempts >= MAX_JOB_ATTEMPTS {
                warn!(
                    session = job.session,
                    "a job was running each time {MAX_JOB_ATTEMPTS} engines died; it is given up"
                );
                let message =
                    format!("an engine died each of the {MAX_JOB_ATTEMPTS} times that this job was running");
                self.answer_here(relay_id, Code::JobCrashedEngine, &message);
            } else {
                self.answer_here(relay_id, Code::Cancelled, "cancelled");
            }
        }
    }

    pub(super) fn jobs_overdue(&mut self, now_ns: u64) {
        if self.relay.next_timer_ns().is_none_or(|due| due > now_ns) {
            return;
        }
        for relay_id in self.relay.held() {
            if self
                .relay
                .get(relay_id)
                .is_some_and(|j| j.frame.deadline_ns != 0 && j.frame.deadline_ns <= now_ns)
            {
                self.answer_here(
                    relay_id,
                    Code::DeadlineExceeded,
                    "the deadline passed before anybody was free to compute it",
                );
            }
        }
    }

    /// Answers every job that an engine owes an answer, in the same way.
    pub(super) fn answer_for_engine(&mut self, status: Code, message: &str) {
        for relay_id in self.relay.owed() {
            if self.relay.get(relay_id).is_some_and(|job| !is_provided(job.generation)) {
                self.answer_here(relay_id, status, message);
            }
        }
    }

    /// Answers every job that is owed an answer, in the same way.
    pub(super) fn answer_all(&mut self, status: Code, message: &str) {
        for relay_id in self.relay.owed() {
            self.answer_here(relay_id, status, message);
        }
    }
}

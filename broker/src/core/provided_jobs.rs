//! Jobs of provided models: which provider gets which, what their answers, their silence and their deaths lead to. An
//! accepted job gets exactly one answer, whatever providers do; whoever misbehaves is the only one to suffer for it.

use super::models::nanos;
use super::relay::{JobState, RelayedJob};
use super::{Core, cut};
use shm_layout::code::Code;
use shm_layout::limits::{ISOLATE_AFTER_ATTEMPTS, MAX_JOB_ATTEMPTS, MAX_MESSAGE_BYTES};
use shm_layout::wire::{AnswerFrame, BrokerMessage, JobFrame, Operation, Priority, ProviderJob};
use std::collections::HashMap;
use tracing::debug;

/// Interactive jobs given in a row while bulk work waits; then one bulk job has its turn.
const INTERACTIVE_RUN: u32 = 8;

impl Core {
    /// Checks a job against what the providers of its model have offered.
    pub(super) fn admit_provided(&self, generation: u64, job: &JobFrame) -> Result<(), (Code, String, u32)> {
        let model = self.providers.models.get(&generation).filter(|_| self.providers.is_current(generation));
        let Some(model) = model else {
            let message = "another model is provided under this id now; acquire it".to_owned();
            return Err((Code::Stale, message, 0));
        };
        let offer = &model.offer;
        if !offer.operations.contains(&given_as(job.operation)) {
            let message = format!(
                "{} ({}) does not know the operation {:?}; it knows {:?}",
                offer.model_id, offer.kind, job.operation, offer.operations
            );
            return Err((Code::UnsupportedOperation, message, 0));
        }
        if job.payload.len() > offer.max_input_bytes as usize {
            let message = format!(
                "a payload of {} bytes; {} takes {} at most: send less in one call",
                job.payload.len(),
                offer.model_id,
                offer.max_input_bytes
            );
            return Err((Code::TooLarge, message, 0));
        }
        Ok(())
    }

    /// Gives waiting jobs of a model to its providers, as many as these take.
    pub(super) fn give_jobs(&mut self, now_ns: u64, generation: u64) {
        while let Some(relay_id) = self.next_provided_job(generation) {
            let Some(job) = self.relay.get(relay_id) else { return };
            if job.frame.deadline_ns != 0 && job.frame.deadline_ns <= now_ns {
                let message = "the deadline passed before a provider was free";
                self.answer_provided(relay_id, Code::DeadlineExceeded, message);
                continue;
            }
            let alone = job.attempts >= ISOLATE_AFTER_ATTEMPTS;
            let bytes = job.frame.payload.len();
            let most_bytes = self.config.limits.outgoing_queue_bytes;
            // A job that must be alone holds up the others until a provider has become free for it.
            let Some(provider) = self.providers.choose(generation, alone, bytes, most_bytes) else { return };
            let message = ProviderJob {
                relay_id,
                generation,
                operation: given_as(job.frame.operation),
                priority: job.frame.priority,
                deadline_ns: job.frame.deadline_ns,
                attempts: job.attempts,
                payload: job.frame.payload.clone(),
            };
            let priority = job.frame.priority;
            let timeout_ns =
                self.providers.places.get(&(generation, provider)).map_or(0, |p| p.job_timeout_ns);
            self.providers.give(generation, provider, alone, bytes);
            if let Some(model) = self.providers.models.get_mut(&generation) {
                model.interactive_run =
                    if priority == Priority::Bulk { 0 } else { model.interactive_run + 1 };
            }
            self.relay.mark_provided(relay_id, provider, now_ns, now_ns.saturating_add(timeout_ns));
            self.send(provider, 0, BrokerMessage::ProviderJob(message));
        }
    }

    /// The job whose turn it is: interactive before bulk, but not without end; then of the session that has the fewest
    /// with providers; then the oldest.
    fn next_provided_job(&self, generation: u64) -> Option<u64> {
        let mut at_work: HashMap<u64, usize> = HashMap::new();
        let mut held: Vec<(u64, &RelayedJob)> = Vec::new();
        for (id, job) in self.relay.of_generation(generation) {
            match (job.state, job.session) {
                (JobState::Held, _) => held.push((id, job)),
                (_, Some(session)) => *at_work.entry(session).or_default() += 1,
                _ => {}
            }
        }
        let run = self.providers.models.get(&generation).map_or(0, |model| model.interactive_run);
        let first = if run >= INTERACTIVE_RUN { Priority::Bulk } else { Priority::Interactive };
        held.into_iter()
            .min_by_key(|(id, job)| {
                let others = job.session.and_then(|s| at_work.get(&s)).copied().unwrap_or(0);
                (job.frame.priority != first, others, *id)
            })
            .map(|(id, _)| id)
    }

    /// A provider answers.
    pub(super) fn provider_answered(&mut self, now_ns: u64, session: u64, answer: AnswerFrame) {
        let Some(pid) = self.providers.sessions.get(&session).map(|provider| provider.pid) else {
            self.fault(now_ns, session, Code::BadState, "an answer from a session that provides nothing");
            return;
        };
        let relay_id = answer.job_id;
        let Some(RelayedJob {
            state: JobState::Provided { provider, since_ns, .. },
            generation,
            accepted_ns,
            ..
        }) = self.relay.get(relay_id).filter(|job| is_with(job, session)).cloned()
        else {
            self.provider_fault(
                now_ns,
                session,
                "it answered a job that it does not have, or answered twice",
            );
            return;
        };
        self.provider_children.worked(pid);
        let us = |from_ns: u64, to_ns: u64| to_ns.saturating_sub(from_ns) / 1000;
        let (queue_us, execution_us) = (us(accepted_ns, since_ns), us(since_ns, now_ns));
        let most = self.providers.models.get(&generation).map_or(0, |model| model.offer.max_output_bytes);
        let too_big = (answer.status == Code::Ok && answer.payload.len() > most as usize).then(|| {
            format!(
                "it answered with {} bytes; it offered to answer with {most} at most",
                answer.payload.len()
            )
        });
        let (status, payload) = match &too_big {
            Some(what) => {
                (Code::ProviderFailed, format!("the provider broke its promise: {what}").into_bytes())
            }
            None => passed_on(answer.status, answer.payload),
        };
        self.metrics.failed(status);
        if let Some(model) = self.providers.models.get_mut(&generation) {
            model.totals.jobs += 1;
            model.totals.errors += u64::from(status != Code::Ok);
            model.totals.queue_us = model.totals.queue_us.saturating_add(queue_us);
            model.totals.execution_us = model.totals.execution_us.saturating_add(execution_us);
        }
        if let Some(job) = self.relay.get(relay_id) {
            self.providers.take_back(generation, provider, job.frame.payload.len());
        }
        let short = |us: u64| u32::try_from(us).unwrap_or(u32::MAX);
        self.job_answered(AnswerFrame {
            job_id: relay_id,
            status,
            payload,
            queue_us: short(queue_us),
            execution_us: short(execution_us),
        });
        if let Some(what) = too_big {
            self.provider_fault(now_ns, session, &what);
        }
        self.give_jobs(now_ns, generation);
    }

    /// Answers a job of a provided model without its provider. If one has it, that is told so, and its place stays taken
    /// until it has let go.
    pub(super) fn answer_provided(&mut self, relay_id: u64, status: Code, message: &str) {
        let Some(job) = self.relay.get(relay_id) else { return };
        let JobState::Provided { provider, .. } = job.state else {
            self.answer_here(relay_id, status, message);
            return;
        };
        let Some((session, request_id, job_id)) = self.relay.orphan(relay_id) else { return };
        self.metrics.failed(status);
        let payload = cut(message.to_owned()).into_bytes();
        let answer = AnswerFrame { job_id, status, payload, queue_us: 0, execution_us: 0 };
        self.send(session, request_id, BrokerMessage::Answer(answer));
        self.send(provider, 0, BrokerMessage::ProviderCancel { relay_id });
    }

    /// A provider died: its jobs go to others or wait for its return, except those that have killed too many.
    pub(super) fn jobs_lost_their_provider(&mut self, now_ns: u64, generation: u64, session: u64) {
        for relay_id in self.relay.provider_gone(generation, session) {
            let Some(job) = self.relay.get(relay_id) else { continue };
            if job.attempts >= MAX_JOB_ATTEMPTS {
                let message =
                    format!("a provider died each of the {MAX_JOB_ATTEMPTS} times that it had this job");
                self.answer_here(relay_id, Code::ProviderFailed, &message);
                continue;
            }
            debug!(relay_id, attempts = job.attempts, "a job lost its provider");
            // Its wait for a provider begins anew.
            self.relay.note_accepted(relay_id, now_ns);
            if let Some(model) = self.providers.models.get_mut(&generation) {
                model.totals.retries += 1;
            }
        }
    }

    /// When a held job of a model without provider is given up.
    fn absence_ends_ns(&self, job: &RelayedJob) -> Option<u64> {
        let since_ns = self.providers.models.get(&job.generation)?.absent_since_ns?;
        Some(since_ns.max(job.accepted_ns).saturating_add(nanos(self.config.limits.provider_return)))
    }

    /// When something is due about a job of a provided model. Deadlines of held ones are looked after with all others.
    pub(super) fn provided_jobs_timer_ns(&self) -> Option<u64> {
        let due = |job: &RelayedJob| match job.state {
            JobState::Provided { due_ns, .. } => {
                let deadline = Some(job.frame.deadline_ns).filter(|at| *at != 0 && job.session.is_some());
                Some(deadline.map_or(due_ns, |at| at.min(due_ns)))
            }
            JobState::Held => self.absence_ends_ns(job),
            JobState::Sent { .. } => None,
        };
        self.relay.provided().filter_map(|(_, job)| due(job)).min()
    }

    /// Ends what has taken too long.
    pub(super) fn provided_jobs_overdue(&mut self, now_ns: u64) {
        if self.provided_jobs_timer_ns().is_none_or(|due| due > now_ns) {
            return;
        }
        let jobs: Vec<u64> = self.relay.provided().map(|(id, _)| id).collect();
        for relay_id in jobs {
            let Some(job) = self.relay.get(relay_id) else { continue };
            let generation = job.generation;
            match job.state {
                JobState::Held if self.absence_ends_ns(job).is_some_and(|at| at <= now_ns) => {
                    let message = "no provider of the model came back in time; start it, or see its log";
                    self.answer_provided(relay_id, Code::ModelUnavailable, message);
                }
                JobState::Provided { provider, since_ns, due_ns } => {
                    let deadline_ns = job.frame.deadline_ns;
                    let wanted = job.session.is_some();
                    if due_ns <= now_ns {
                        let timeout_ns = self
                            .providers
                            .places
                            .get(&(generation, provider))
                            .map_or(0, |p| p.job_timeout_ns);
                        let message =
                            format!("the provider did not answer within its {} ms", timeout_ns / 1_000_000);
                        // Asked again and again while it keeps the job: silence adds up.
                        let again_ns = now_ns.saturating_add(timeout_ns.max(1));
                        self.relay.mark_provided(relay_id, provider, since_ns, again_ns);
                        if wanted {
                            if let Some(model) = self.providers.models.get_mut(&generation) {
                                model.totals.timeouts += 1;
                            }
                            self.answer_provided(relay_id, Code::ProviderTimeout, &message);
                        }
                        self.provider_fault(now_ns, provider, "it did not answer a job within its own time");
                    } else if wanted && deadline_ns != 0 && deadline_ns <= now_ns {
                        let message = "the deadline passed before the provider had answered";
                        self.answer_provided(relay_id, Code::DeadlineExceeded, message);
                    }
                }
                JobState::Held | JobState::Sent { .. } => {}
            }
        }
    }
}

/// As what an operation is given to a provider.
fn given_as(operation: Operation) -> Operation {
    match operation {
        // There is no cache to be left aside.
        Operation::EmbedFresh => Operation::Embed,
        other => other,
    }
}

fn is_with(job: &RelayedJob, session: u64) -> bool {
    matches!(job.state, JobState::Provided { provider, .. } if provider == session)
}

/// A provider's status and payload as its client gets them: codes that speak of leases, sessions or engines are not a
/// provider's to give, and would mislead.
fn passed_on(status: Code, mut payload: Vec<u8>) -> (Code, Vec<u8>) {
    if status == Code::Ok {
        return (status, payload);
    }
    payload.truncate(MAX_MESSAGE_BYTES);
    let status = match status {
        Code::EmptyInput
        | Code::TooLarge
        | Code::InvalidUtf8
        | Code::BadPayload
        | Code::UnsupportedOperation
        | Code::Overloaded
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::BadResult => status,
        _ => Code::ProviderFailed,
    };
    (status, payload)
}

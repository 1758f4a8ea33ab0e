//! Jobs that came over the socket: kept until answered, each answered exactly once or dropped with its session.
//! Pure bookkeeping and the arithmetic of admission; frames are sent by the callers.

use crate::config::Limits;
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::wire::{JobFrame, is_provided};
use std::collections::{BTreeMap, HashMap};

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobState {
    /// No engine has it.
    Held,
    /// The present engine has it; `started` once it computes it.
    Sent { started: bool },
    /// A provider has it, since then; `due_ns` is when that one is at fault for not answering.
    Provided { provider: u64, since_ns: u64, due_ns: u64 },
}

/// One job.
#[derive(Debug, Clone)]
pub(crate) struct RelayedJob {
    /// Whose it is; `None` once that session is gone.
    pub(crate) session: Option<u64>,
    /// The frame id that its answer repeats.
    pub(crate) request_id: u64,
    pub(crate) generation: u64,
    /// Times it was being computed when an engine died.
    pub(crate) attempts: u32,
    pub(crate) state: JobState,
    pub(crate) cancelled: bool,
    /// When it was accepted; kept for jobs of provided models only.
    pub(crate) accepted_ns: u64,
    pub(crate) frame: JobFrame,
}

/// All jobs.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    jobs: BTreeMap<u64, RelayedJob>,
    by_job: HashMap<(u64, u64), u64>,
    per_session: HashMap<u64, (usize, usize)>,
    total_bytes: usize,
    held: usize,
    /// Jobs of provided models.
    provided: usize,
    last_id: u64,
}

/// Why a job is not taken: the limit that is reached, in words.
pub(crate) type Full = String;

impl Relay {
    /// Whether a further job of this session fits.
    pub(crate) fn admit(&self, session: u64, payload_bytes: usize, limits: &Limits) -> Result<(), Full> {
        let (jobs, bytes) = self.per_session.get(&session).copied().unwrap_or_default();
        if jobs >= limits.max_session_jobs {
            return Err(format!("{jobs} jobs of this session are in flight, the limit for one session"));
        }
        if bytes.saturating_add(payload_bytes) > limits.max_session_job_bytes {
            return Err(format!(
                "{bytes} bytes of this session's jobs are in flight; the limit for one session is {}",
                limits.max_session_job_bytes
            ));
        }
        if self.jobs.len() >= limits.max_jobs {
            return Err(format!("{} jobs are in flight, the limit for all sessions", self.jobs.len()));
        }
        if self.total_bytes.saturating_add(payload_bytes) > limits.max_job_bytes {
            return Err(format!(
                "{} bytes of jobs are in flight; the limit for all sessions is {}",
                self.total_bytes, limits.max_job_bytes
            ));
        }
        Ok(())
    }

    /// Whether this session has a job of this id in flight.
    pub(crate) fn knows(&self, session: u64, job_id: u64) -> bool {
        self.by_job.contains_key(&(session, job_id))
    }

    /// Takes a job; gives its relay id.
    pub(crate) fn take(&mut self, session: u64, request_id: u64, generation: u64, frame: JobFrame) -> u64 {
        self.last_id += 1;
        let counters = self.per_session.entry(session).or_default();
        counters.0 += 1;
        counters.1 += frame.payload.len();
        self.total_bytes += frame.payload.len();
        self.held += 1;
        self.provided += usize::from(is_provided(generation));
        self.by_job.insert((session, frame.job_id), self.last_id);
        self.jobs.insert(
            self.last_id,
            RelayedJob {
                session: Some(session),
                request_id,
                generation,
                attempts: 0,
                state: JobState::Held,
                cancelled: false,
                accepted_ns: 0,
                frame,
            },
        );
        self.last_id
    }

    /// Notes when a job of a provided model was accepted.
    pub(crate) fn note_accepted(&mut self, relay_id: u64, now_ns: u64) {
        if let Some(job) = self.jobs.get_mut(&relay_id) {
            job.accepted_ns = now_ns;
        }
    }

    /// A provider has the job now.
    pub(crate) fn mark_provided(&mut self, relay_id: u64, provider: u64, since_ns: u64, due_ns: u64) {
        if let Some(job) = self.jobs.get_mut(&relay_id) {
            self.held -= usize::from(job.state == JobState::Held);
            job.state = JobState::Provided { provider, since_ns, due_ns };
        }
    }

    /// A provider is gone: its jobs that are still wanted are held again, and counted as attempted; the others end.
    /// Gives the former.
    pub(crate) fn provider_gone(&mut self, generation: u64, session: u64) -> Vec<u64> {
        let theirs: Vec<u64> = self
            .of_generation(generation)
            .filter(|(_, j)| matches!(j.state, JobState::Provided { provider, .. } if provider == session))
            .map(|(id, _)| id)
            .collect();
        let mut held = Vec::new();
        for id in theirs {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            if job.session.is_none() {
                self.finish(id);
                continue;
            }
            job.attempts += 1;
            job.state = JobState::Held;
            self.held += 1;
            held.push(id);
        }
        held
    }

    /// Takes the asker off a job that a provider has: it is being answered now, while the provider's place stays taken
    /// until that has let go of it. Gives the asker's session, frame id and job id.
    pub(crate) fn orphan(&mut self, relay_id: u64) -> Option<(u64, u64, u64)> {
        let job = self.jobs.get_mut(&relay_id)?;
        let session = job.session.take()?;
        let (request_id, job_id, bytes) = (job.request_id, job.frame.job_id, job.frame.payload.len());
        self.forget_asker(session, job_id, bytes);
        Some((session, request_id, job_id))
    }

    fn forget_asker(&mut self, session: u64, job_id: u64, payload_bytes: usize) {
        self.by_job.remove(&(session, job_id));
        if let Some(counters) = self.per_session.get_mut(&session) {
            counters.0 -= 1;
            counters.1 -= payload_bytes;
            if counters.0 == 0 {
                self.per_session.remove(&session);
            }
        }
    }

    /// The jobs of one generation, oldest first.
    pub(crate) fn of_generation(&self, generation: u64) -> impl Iterator<Item = (u64, &RelayedJob)> {
        // Most brokers have none: then nothing is looked through.
        let none = is_provided(generation) && self.provided == 0;
        let jobs = (!none).then_some(&self.jobs).into_iter().flatten();
        jobs.filter(move |(_, j)| j.generation == generation).map(|(id, j)| (*id, j))
    }

    /// The jobs of provided models, oldest first.
    pub(crate) fn provided(&self) -> impl Iterator<Item = (u64, &RelayedJob)> {
        let jobs = (self.provided > 0).then_some(&self.jobs).into_iter().flatten();
        jobs.filter(|(_, j)| is_provided(j.generation)).map(|(id, j)| (*id, j))
    }

    pub(crate) fn get(&self, relay_id: u64) -> Option<&RelayedJob> {
        self.jobs.get(&relay_id)
    }

    /// The relay id of a session's job.
    pub(crate) fn find(&self, session: u64, job_id: u64) -> Option<u64> {
        self.by_job.get(&(session, job_id)).copied()
    }

    pub(crate) fn mark_sent(&mut self, relay_id: u64) {
        if let Some(job) = self.jobs.get_mut(&relay_id) {
            self.held -= usize::from(job.state == JobState::Held);
            job.state = JobState::Sent { started: false };
        }
    }

    pub(crate) fn mark_started(&mut self, relay_id: u64) {
        if let Some(RelayedJob { state: JobState::Sent { started }, .. }) = self.jobs.get_mut(&relay_id) {
            *started = true;
        }
    }

    pub(crate) fn mark_cancelled(&mut self, relay_id: u64) {
        if let Some(job) = self.jobs.get_mut(&relay_id) {
            job.cancelled = true;
        }
    }

    /// Takes a job out: it is being answered, or nobody wants it.
    pub(crate) fn finish(&mut self, relay_id: u64) -> Option<RelayedJob> {
        let job = self.jobs.remove(&relay_id)?;
        self.total_bytes -= job.frame.payload.len();
        self.held -= usize::from(job.state == JobState::Held);
        self.provided -= usize::from(is_provided(job.generation));
        if let Some(session) = job.session {
            self.forget_asker(session, job.frame.job_id, job.frame.payload.len());
        }
        Some(job)
    }

    /// A session is gone. Held jobs end; those that an engine or a provider has stay counted until it lets go of them.
    /// Gives the latter's relay ids.
    pub(crate) fn session_gone(&mut self, session: u64) -> Vec<u64> {
        let mine: Vec<u64> =
            self.jobs.iter().filter(|(_, j)| j.session == Some(session)).map(|(id, _)| *id).collect();
        let mut in_engine = Vec::new();
        for id in mine {
            let Some(job) = self.jobs.get_mut(&id) else { continue };
            if job.state == JobState::Held {
                self.finish(id);
            } else {
                job.session = None;
                self.by_job.remove(&(session, job.frame.job_id));
                in_engine.push(id);
            }
        }
        self.per_session.remove(&session);
        in_engine
    }

    /// The engine died; jobs of provided models are no affair of it. Jobs without session end; the others are held again,
    /// and counted as attempted if they were being computed. Gives those that are not to be tried again: cancelled ones,
    /// and those over their attempts.
    pub(crate) fn engine_gone(&mut self) -> Vec<u64> {
        let orphans: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, j)| j.session.is_none() && !is_provided(j.generation))
            .map(|(id, _)| *id)
            .collect();
        for id in orphans {
            self.finish(id);
        }
        let mut done = Vec::new();
        for (id, job) in self.jobs.iter_mut().filter(|(_, j)| !is_provided(j.generation)) {
            if let JobState::Sent { started } = job.state {
                job.attempts += u32::from(started);
                job.state = JobState::Held;
                self.held += 1;
            }
            if job.cancelled || job.attempts >= MAX_JOB_ATTEMPTS {
                done.push(*id);
            }
        }
        done
    }

    /// The held jobs, oldest first.
    pub(crate) fn held(&self) -> Vec<u64> {
        if self.held == 0 {
            return Vec::new();
        }
        self.jobs.iter().filter(|(_, j)| j.state == JobState::Held).map(|(id, _)| *id).collect()
    }

    /// The earliest deadline of a held job. Those that an engine has are its business; those that a provider has are
    /// looked after with the providers.
    pub(crate) fn next_timer_ns(&self) -> Option<u64> {
        if self.held == 0 {
            return None;
        }
        let due = self.jobs.values().filter(|j| j.state == JobState::Held && j.frame.deadline_ns != 0);
        due.map(|j| j.frame.deadline_ns).min()
    }

    /// Number of a session's jobs.
    pub(crate) fn count(&self, session: u64) -> usize {
        self.per_session.get(&session).map_or(0, |(jobs, _)| *jobs)
    }

    /// Whether any job is owed an answer.
    pub(crate) fn owes(&self) -> bool {
        !self.by_job.is_empty()
    }

    /// Whether any job that an engine is to compute is owed an answer.
    pub(crate) fn owes_from_engine(&self) -> bool {
        self.jobs.values().any(|j| j.session.is_some() && !is_provided(j.generation))
    }

    /// Whether any job for an engine is held.
    pub(crate) fn holds(&self) -> bool {
        self.held > 0 && self.jobs.values().any(|j| j.state == JobState::Held && !is_provided(j.generation))
    }

    /// Whether any job is for this generation.
    pub(crate) fn uses(&self, generation: u64) -> bool {
        self.jobs.values().any(|j| j.generation == generation)
    }

    /// Jobs for this generation.
    pub(crate) fn count_of(&self, generation: u64) -> usize {
        self.jobs.values().filter(|j| j.generation == generation).count()
    }

    /// Every job that is owed an answer.
    pub(crate) fn owed(&self) -> Vec<u64> {
        self.jobs.iter().filter(|(_, j)| j.session.is_some()).map(|(id, _)| *id).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.jobs.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use shm_layout::wire::{Operation, PROVIDED_GENERATION, Priority};

    fn frame(job_id: u64, bytes: usize) -> JobFrame {
        JobFrame {
            lease_id: 1,
            job_id,
            operation: Operation::Embed,
            priority: Priority::Interactive,
            deadline_ns: 0,
            payload: vec![0; bytes],
        }
    }

    #[test]
    fn admission_names_the_limit() {
        let limits = Limits {
            max_session_jobs: 2,
            max_session_job_bytes: 100,
            max_jobs: 3,
            max_job_bytes: 150,
            ..Limits::default()
        };
        let mut relay = Relay::default();
        assert!(relay.admit(1, 101, &limits).unwrap_err().contains("one session is 100"));
        relay.take(1, 1, 1, frame(1, 60));
        assert!(relay.admit(1, 41, &limits).is_err());
        relay.take(1, 1, 1, frame(2, 10));
        assert!(relay.admit(1, 0, &limits).unwrap_err().contains("2 jobs of this session"));
        assert!(relay.admit(2, 81, &limits).unwrap_err().contains("all sessions is 150"));
        relay.take(2, 1, 1, frame(1, 10));
        assert!(relay.admit(2, 0, &limits).unwrap_err().contains("3 jobs are in flight"));
        relay.finish(1);
        assert!(relay.admit(2, 0, &limits).is_ok());
    }

    #[test]
    fn only_what_was_running_counts_as_tried() {
        let mut relay = Relay::default();
        let (a, b) = (relay.take(1, 1, 1, frame(1, 1)), relay.take(1, 1, 1, frame(2, 1)));
        for death in 1..=MAX_JOB_ATTEMPTS {
            relay.mark_sent(a);
            relay.mark_sent(b);
            relay.mark_started(a);
            let done = relay.engine_gone();
            assert_eq!(done, if death < MAX_JOB_ATTEMPTS { vec![] } else { vec![a] });
        }
        assert_eq!(relay.get(b).unwrap().attempts, 0);
        assert_eq!(relay.held(), [a, b]);
    }

    proptest! {
        #[test]
        fn counters_follow_the_jobs(steps in prop::collection::vec((0u8..10, 1u64..4, 1u64..6, 0usize..50), 0..200)) {
            let mut relay = Relay::default();
            for (step, session, job_id, bytes) in steps {
                let found = relay.find(session, job_id);
                match (step, found) {
                    (0 | 1, None) => { relay.take(session, 1, 1, frame(job_id, bytes)); }
                    (7, None) => { relay.take(session, 1, PROVIDED_GENERATION, frame(job_id, bytes)); }
                    (7, Some(id)) if is_provided(relay.get(id).unwrap().generation) => {
                        relay.mark_provided(id, session, 1, 2);
                    }
                    (8, Some(id)) if matches!(relay.get(id).unwrap().state, JobState::Provided { .. }) => {
                        relay.orphan(id);
                    }
                    (9, _) => { relay.provider_gone(PROVIDED_GENERATION, session); }
                    (2, Some(id)) if !is_provided(relay.get(id).unwrap().generation) => relay.mark_sent(id),
                    (3, Some(id)) => relay.mark_started(id),
                    (4, Some(id)) => { relay.finish(id); }
                    (5, _) => { relay.session_gone(session); }
                    (6, _) => for id in relay.engine_gone() { relay.finish(id); },
                    _ => {}
                }
                let bytes_now: usize = relay.jobs.values().map(|j| j.frame.payload.len()).sum();
                prop_assert_eq!(relay.total_bytes, bytes_now);
                let held = relay.jobs.values().filter(|j| j.state == JobState::Held).count();
                prop_assert_eq!(relay.held, held);
                prop_assert_eq!(relay.provided, relay.of_generation(PROVIDED_GENERATION).count());
                for session in 1..4 {
                    let mine = relay.jobs.values().filter(|j| j.session == Some(session));
                    prop_assert_eq!(relay.count(session), mine.count());
                }
                prop_assert_eq!(relay.by_job.len(), relay.owed().len());
            }
        }
    }
}

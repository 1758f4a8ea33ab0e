//! The jobs of one seat: which wait to be sent, which are out, which are done, and who must be told. Pure bookkeeping:
//! nothing here sends, sleeps or looks at the clock.

use crate::error::SdkError;
use crate::time::Deadline;
use shm_layout::lane::Ticket;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::wire::{Operation, Priority};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar};
use std::task::Waker;
use std::time::Instant;

/// A job as it was asked for; kept until it is answered, because a broker may die and the job be sent again.
#[derive(Debug)]
pub(crate) struct JobSpec {
    pub(crate) operation: Operation,
    pub(crate) priority: Priority,
    pub(crate) deadline: Deadline,
    /// The texts, encoded.
    pub(crate) payload: Vec<u8>,
    /// How many they are.
    pub(crate) texts: usize,
}

/// A job's result as it came.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    /// Dimensions of the model that answered.
    pub(crate) dim: usize,
    /// Which link it came over; to be named when the bytes turn out to be wrong.
    pub(crate) link_number: u64,
    /// A client's process computed it, not an engine.
    pub(crate) provided: bool,
}

impl Answer {
    /// Whose answer it is, for messages.
    pub(crate) fn peer(&self) -> &'static str {
        if self.provided { "the provider" } else { "the engine" }
    }
}

/// How a job was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wire {
    Lane(Ticket),
    Socket(u64),
}

#[derive(Debug)]
enum Phase {
    Queued,
    Sent(Wire),
    Done(Result<Answer, SdkError>),
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) spec: Arc<JobSpec>,
    phase: Phase,
    /// Room for the answer when the usual turned out to be too small.
    pub(crate) capacity_bytes: Option<usize>,
    /// Times that it was sent.
    sends: u32,
    /// Not to be sent again before this.
    not_before: Option<Instant>,
    /// First refusal for lack of room, and how many there were.
    pub(crate) refused_since: Option<Instant>,
    pub(crate) refusals: u32,
    follower: Option<Arc<Condvar>>,
    waker: Option<Waker>,
    /// Text that came ahead of the answer and was not taken yet, and the bytes of it in all.
    pieces: String,
    piece_bytes: u64,
}

/// The jobs of one seat.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    entries: HashMap<u64, Entry>,
    backlog: VecDeque<u64>,
    /// Not later than the earliest deadline of an unfinished job.
    next_deadline: Option<Instant>,
    /// Unfinished jobs that a future waits for.
    watched: usize,
    followers: Vec<(u64, Arc<Condvar>)>,
    wakers: Vec<Waker>,
}

impl Jobs {
    /// Adds a job at the end of the line.
    pub(crate) fn add(&mut self, id: u64, spec: Arc<JobSpec>) {
        if let Some(at) = spec.deadline.at() {
            self.next_deadline = Some(self.next_deadline.map_or(at, |next| next.min(at)));
        }
        let entry = Entry {
            spec,
            phase: Phase::Queued,
            capacity_bytes: None,
            sends: 0,
            not_before: None,
            refused_since: None,
            refusals: 0,
            follower: None,
            waker: None,
            pieces: String::new(),
            piece_bytes: 0,
        };
        self.entries.insert(id, entry);
        self.backlog.push_back(id);
    }

    pub(crate) fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    pub(crate) fn is_queued(&self, id: u64) -> bool {
        matches!(self.entries.get(&id), Some(Entry { phase: Phase::Queued, .. }))
    }

    pub(crate) fn sent_as(&self, id: u64) -> Option<Wire> {
        match self.entries.get(&id)?.phase {
            Phase::Sent(wire) => Some(wire),
            _ => None,
        }
    }

    pub(crate) fn deadline(&self, id: u64) -> Option<Deadline> {
        self.entries.get(&id).map(|entry| entry.spec.deadline)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// Offers each job in line to `send`, in order, until `send` has no room; those not due yet stay.
    pub(crate) fn send_each(&mut self, now: Instant, mut send: impl FnMut(u64, &Entry) -> Push) {
        if self.backlog.is_empty() {
            return;
        }
        let mut early = Vec::new();
        let mut failed = Vec::new();
        while let Some(id) = self.backlog.pop_front() {
            let Some(entry) = self.entries.get_mut(&id).filter(|entry| matches!(entry.phase, Phase::Queued))
            else {
                continue;
            };
            if entry.not_before.is_some_and(|at| at > now) {
                early.push(id);
                continue;
            }
            match send(id, entry) {
                Push::Sent(wire) => {
                    entry.phase = Phase::Sent(wire);
                    entry.sends += 1;
                }
                Push::Full => {
                    self.backlog.push_front(id);
                    break;
                }
                Push::Failed(error) => failed.push((id, error)),
            }
        }
        early.into_iter().rev().for_each(|id| self.backlog.push_front(id));
        failed.into_iter().for_each(|(id, error)| self.finish(id, Err(error)));
    }

    /// When the next job that waits for its time may be sent; those that may be sent already wait for room instead.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.backlog.iter().filter_map(|id| self.entries.get(id)?.not_before).filter(|at| *at > now).min()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.next_deadline
    }

    /// Adds a piece of text that begins after `offset_bytes` bytes of it, as far as it is new.
    ///
    /// # Errors
    /// When it leaves a hole, cuts a character, or makes the text longer than an answer may be.
    pub(crate) fn add_piece(&mut self, id: u64, offset_bytes: u64, text: &str) -> Result<(), ()> {
        let Some(entry) = self.entries.get_mut(&id) else { return Ok(()) };
        let known = entry.piece_bytes.checked_sub(offset_bytes).ok_or(())?;
        if known >= text.len() as u64 {
            return Ok(());
        }
        let fresh = text.get(known as usize..).ok_or(())?;
        entry.piece_bytes += fresh.len() as u64;
        if entry.piece_bytes > MAX_PAYLOAD_BYTES as u64 {
            return Err(());
        }
        entry.pieces.push_str(fresh);
        if let Some(follower) = &entry.follower {
            follower.notify_one();
        }
        Ok(())
    }

    /// The text that came ahead of a job's answer since the last call.
    pub(crate) fn take_pieces(&mut self, id: u64) -> Option<String> {
        let entry = self.entries.get_mut(&id)?;
        (!entry.pieces.is_empty()).then(|| std::mem::take(&mut entry.pieces))
    }

    /// Ends a job and tells whoever waits for it. Without effect on a job that is done or gone.
    pub(crate) fn finish(&mut self, id: u64, outcome: Result<Answer, SdkError>) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if matches!(entry.phase, Phase::Done(_)) {
            return;
        }
        entry.phase = Phase::Done(outcome);
        if let Some(follower) = entry.follower.take() {
            follower.notify_one();
        }
        if let Some(waker) = entry.waker.take() {
            self.watched -= 1;
            self.wakers.push(waker);
        }
    }

    /// Puts a sent job back in line, to be sent not before `not_before`.
    pub(crate) fn requeue(&mut self, id: u64, not_before: Option<Instant>) {
        if let Some(entry) = self.entries.get_mut(&id)
            && matches!(entry.phase, Phase::Sent(_))
        {
            entry.phase = Phase::Queued;
            entry.not_before = not_before;
            self.backlog.push_back(id);
        }
    }

    /// Puts all sent jobs back at the head of the line, oldest first; gives how many there were.
    pub(crate) fn requeue_all(&mut self) -> usize {
        let mut sent: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, e)| matches!(e.phase, Phase::Sent(_)))
            .map(|(id, _)| *id)
            .collect();
        sent.sort_unstable();
        for id in sent.iter().rev() {
            if let Some(entry) = self.entries.get_mut(id) {
                entry.phase = Phase::Queued;
                self.backlog.push_front(*id);
            }
        }
        sent.len()
    }

    /// Ends the jobs whose deadline is over; gives how those were sent that were out.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Wire> {
        if self.next_deadline.is_none_or(|next| next > now) {
            return Vec::new();
        }
        let mut late = Vec::new();
        let mut next: Option<Instant> = None;
        for (id, entry) in &self.entries {
            let (Some(at), false) = (entry.spec.deadline.at(), matches!(entry.phase, Phase::Done(_))) else {
                continue;
            };
            if at <= now {
                late.push((*id, entry.spec.deadline.allowed));
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        self.next_deadline = next;
        let out = late.iter().filter_map(|(id, _)| self.sent_as(*id)).collect();
        for (id, allowed) in late {
            self.finish(id, Err(SdkError::DeadlineExceeded(allowed)));
        }
        out
    }

    /// Ends the jobs without a deadline that were sent `most` times.
    pub(crate) fn fail_resent(&mut self, most: u32, error: &SdkError) {
        let worn: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.sends >= most && entry.spec.deadline.at().is_none())
            .map(|(id, _)| *id)
            .collect();
        worn.into_iter().for_each(|id| self.finish(id, Err(error.clone())));
    }

    /// Ends every unfinished job that `which` names.
    pub(crate) fn fail(&mut self, error: &SdkError, which: impl Fn(&JobSpec) -> bool) {
        let unfinished: Vec<u64> = self
            .entries
            .iter()
            .filter(|(_, entry)| !matches!(entry.phase, Phase::Done(_)) && which(&entry.spec))
            .map(|(id, _)| *id)
            .collect();
        for id in unfinished {
            self.finish(id, Err(error.clone()));
        }
    }

    /// The outcome of a finished job; it is forgotten with this.
    pub(crate) fn take_done(&mut self, id: u64) -> Option<Result<Answer, SdkError>> {
        if !matches!(self.entries.get(&id)?.phase, Phase::Done(_)) {
            return None;
        }
        match self.entries.remove(&id)?.phase {
            Phase::Done(outcome) => Some(outcome),
            Phase::Queued | Phase::Sent(_) => None,
        }
    }

    /// Forgets a job that nobody waits for any more.
    pub(crate) fn remove(&mut self, id: u64) {
        if let Some(entry) = self.entries.remove(&id) {
            // Its place in the line is skipped when it is reached.
            self.watched -= usize::from(entry.waker.is_some());
        }
    }

    /// Notes that a future waits for the job.
    pub(crate) fn watch(&mut self, id: u64, waker: &Waker) {
        if let Some(entry) = self.entries.get_mut(&id) {
            match &mut entry.waker {
                Some(known) => known.clone_from(waker),
                none => {
                    *none = Some(waker.clone());
                    self.watched += 1;
                }
            }
        }
    }

    /// Unfinished jobs that futures wait for.
    pub(crate) fn watched(&self) -> usize {
        self.watched
    }

    /// The futures to be woken, outside of any lock.
    pub(crate) fn take_wakers(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.wakers)
    }

    pub(crate) fn has_wakers(&self) -> bool {
        !self.wakers.is_empty()
    }

    /// Notes that a thread is about to sleep until the job is done or nobody leads; gives what it sleeps on.
    pub(crate) fn follow(&mut self, id: u64) -> Arc<Condvar> {
        let bell = Arc::new(Condvar::new());
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.follower = Some(Arc::clone(&bell));
        }
        self.followers.push((id, Arc::clone(&bell)));
        bell
    }

    /// The thread is awake again.
    pub(crate) fn unfollow(&mut self, id: u64) {
        self.followers.retain(|(follower, _)| *follower != id);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.follower = None;
        }
    }

    /// Wakes one sleeping thread so that it leads; false when there is none.
    pub(crate) fn call_follower(&self) -> bool {
        match self.followers.first() {
            Some((_, bell)) => {
                bell.notify_one();
                true
            }
            None => false,
        }
    }
}

/// What became of an attempt to send a job.
#[derive(Debug)]
pub(crate) enum Push {
    Sent(Wire),
    /// No room; this one and those behind it wait.
    Full,
    /// It can never be sent.
    Failed(SdkError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn spec(timeout: Option<Duration>) -> Arc<JobSpec> {
        Arc::new(JobSpec {
            operation: Operation::Embed,
            priority: Priority::Interactive,
            deadline: Deadline::after(timeout),
            payload: vec![],
            texts: 1,
        })
    }

    fn answer() -> Answer {
        Answer { bytes: vec![], dim: 1, link_number: 1, provided: false }
    }

    fn send_all(jobs: &mut Jobs, room: usize) -> Vec<u64> {
        let mut sent = Vec::new();
        jobs.send_each(Instant::now(), |id, _| {
            if sent.len() == room {
                return Push::Full;
            }
            sent.push(id);
            Push::Sent(Wire::Socket(id))
        });
        sent
    }

    #[test]
    fn order_is_kept_through_a_full_ring_and_a_lost_broker() {
        let mut jobs = Jobs::default();
        (1..=5).for_each(|id| jobs.add(id, spec(None)));
        assert_eq!(send_all(&mut jobs, 3), [1, 2, 3]);
        jobs.finish(2, Ok(answer()));
        assert_eq!(jobs.requeue_all(), 2);
        assert_eq!(send_all(&mut jobs, 9), [1, 3, 4, 5]);
        assert!(matches!(jobs.take_done(2), Some(Ok(_))));
        assert!(jobs.take_done(2).is_none() && jobs.take_done(1).is_none());
    }

    #[test]
    fn forgotten_jobs_leave_no_trace() {
        let mut jobs = Jobs::default();
        (1..=3).for_each(|id| jobs.add(id, spec(None)));
        jobs.watch(2, Waker::noop());
        jobs.watch(2, Waker::noop());
        assert_eq!(jobs.watched(), 1);
        jobs.remove(2);
        assert_eq!(jobs.watched(), 0);
        assert_eq!(send_all(&mut jobs, 9), [1, 3]);
        jobs.remove(1);
        jobs.finish(1, Ok(answer()));
        jobs.finish(3, Ok(answer()));
        assert!(jobs.take_done(1).is_none() && jobs.take_done(3).is_some());
        assert!(jobs.entries.is_empty());
    }

    #[test]
    fn deadlines_end_jobs_wherever_they_are() {
        let mut jobs = Jobs::default();
        jobs.add(1, spec(Some(Duration::ZERO)));
        jobs.add(2, spec(Some(Duration::from_secs(1000))));
        jobs.add(3, spec(None));
        send_all(&mut jobs, 1);
        jobs.watch(1, Waker::noop());
        assert_eq!(jobs.expire(Instant::now()), [Wire::Socket(1)]);
        assert!(matches!(jobs.take_done(1), Some(Err(SdkError::DeadlineExceeded(_)))));
        assert_eq!((jobs.watched(), jobs.take_wakers().len()), (0, 1));
        assert!(jobs.next_deadline().is_some());
        assert!(jobs.expire(Instant::now()).is_empty());
    }

    #[test]
    fn a_job_that_brokers_die_of_ends() {
        let mut jobs = Jobs::default();
        jobs.add(1, spec(None));
        jobs.add(2, spec(Some(Duration::from_secs(1000))));
        for _ in 0..3 {
            send_all(&mut jobs, 9);
            jobs.requeue_all();
            jobs.fail_resent(3, &SdkError::hung_up("x"));
        }
        assert!(matches!(jobs.take_done(1), Some(Err(SdkError::Disconnected { .. }))));
        assert_eq!(send_all(&mut jobs, 9), [2]);
    }

    #[test]
    fn a_job_that_must_wait_does_not_hold_up_others() {
        let mut jobs = Jobs::default();
        (1..=3).for_each(|id| jobs.add(id, spec(None)));
        send_all(&mut jobs, 1);
        let later = Instant::now() + Duration::from_secs(1000);
        jobs.requeue(1, Some(later));
        assert_eq!(send_all(&mut jobs, 9), [2, 3]);
        assert_eq!(jobs.next_due(Instant::now()), Some(later));
        assert_eq!(jobs.next_due(later), None);
        assert_eq!(jobs.backlog_len(), 1);
    }
}

//! Which texts are computed next: pure decisions, events in, batches out. No clock, no lane, no model, no thread: times
//! are given, and whoever asks does what the answer says.
//!
//! # Rules
//! - **Two classes.** Interactive goes before bulk; while both wait, bulk still gets [`BULK_SHARE_PERCENT`] of the time.
//! - **Between clients** of a class: deficit round-robin over cost, so that a client with long texts or many jobs gets
//!   no more than its neighbours. Inside a client: first come, first served.
//! - **A batch** is of one model and of one class. It is bounded by time, not by count: the measured time per unit of cost
//!   turns a target into a budget. With interactive work about, bulk batches are cut to [`SHARED_TARGET_US`];
//!   without, they grow to [`ALONE_TARGET_US`].
//! - **Breaks**: interactive work that comes while bulk is computed is computed in its breaks, which a model has
//!   some times in a millisecond. It does not wait for the batch, and bulk always goes on after one such batch.
//! - **Jobs are cut between texts**: a batch takes as many texts of a job as fit, the rest stays at the head of its
//!   client's queue.
//! - **Suspects run alone**: a job that was running when an engine died, or when a batch failed, shares no batch.
//! - Nothing waits for company: a batch is whatever is there when the compute becomes free.

use shm_layout::wire::Priority;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// Names a job inside this process.
pub(crate) type JobKey = u64;

/// Cost that a client's turn adds to what it may take, in cost units (about one token each).
pub(crate) const QUANTUM: u64 = 64;
/// Most cost in one batch: bounds the activations in memory.
pub(crate) const MAX_BATCH_COST: u64 = 4096;
/// Time that a batch of bulk work aims at while no interactive work is about, in µs.
pub(crate) const ALONE_TARGET_US: f64 = 150_000.0;
/// Time that a batch of bulk work aims at while interactive work is about, in µs.
pub(crate) const SHARED_TARGET_US: f64 = 40_000.0;
/// Time that a batch of bulk work aims at which goes before waiting interactive work, in µs; as much must have been earned.
pub(crate) const CREDIT_TARGET_US: f64 = 4_000.0;
/// Time that a batch of interactive work aims at, in µs.
pub(crate) const INTERACTIVE_TARGET_US: f64 = 10_000.0;
/// Share of the time that bulk gets while interactive work never ceases, in percent.
pub(crate) const BULK_SHARE_PERCENT: f64 = 10.0;
/// Interactive work is about when the last such job came at most so long ago, in ns.
pub(crate) const INTERACTIVE_MEMORY_NS: u64 = 1_000_000_000;
/// Time per unit of cost that is assumed until a batch was measured, in µs.
const FIRST_RATE_US: f64 = 60.0;
/// Measured times per unit of cost are held between these, in µs.
const RATE_RANGE_US: (f64, f64) = (0.02, 1_000_000.0);
/// Batches of less cost say only how long a unit takes at most: most of their time is spent once a batch.
const FULL_MEASURE_COST: u64 = 64;
/// Weight of the newest measurement in the mean.
const RATE_WEIGHT: f64 = 0.25;

/// Whom a job is for, as far as fairness goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Client {
    /// The client of a lane.
    Lane(u64),
    /// A session that sends its jobs over the socket.
    Session(u64),
}

/// A job as the schedule sees it.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    /// Its name.
    pub(crate) key: JobKey,
    /// Whom it is for.
    pub(crate) client: Client,
    /// Its class.
    pub(crate) priority: Priority,
    /// Its model.
    pub(crate) generation: u64,
    /// `CLOCK_MONOTONIC` in ns after which nobody wants the answer; 0 = none.
    pub(crate) deadline_ns: u64,
    /// Whether it must share no batch.
    pub(crate) isolated: bool,
    /// Cost of each text, in cost units, each at least 1.
    pub(crate) costs: Arc<[u32]>,
    /// First text that is still to be computed.
    pub(crate) next_text: usize,
}

/// Consecutive texts of one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Slice {
    /// The job.
    pub(crate) key: JobKey,
    /// The texts, by position in the job.
    pub(crate) texts: Range<usize>,
}

/// Texts that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    /// The one model.
    pub(crate) generation: u64,
    /// The one class.
    pub(crate) priority: Priority,
    /// At most one slice a job.
    pub(crate) slices: Vec<Slice>,
    /// Cost of all slices.
    pub(crate) cost: u64,
    /// Whether it went before waiting work of the other class, on the share that bulk had earned.
    pub(crate) on_credit: bool,
}

/// Why a job left the queue without being computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unwanted {
    /// Its deadline is over.
    Expired,
    /// Its client said so.
    Cancelled,
}

#[derive(Debug, Default)]
struct ClientQueue {
    jobs: VecDeque<Ask>,
    deficit: u64,
    // The last batch was full before this client's turn was over: it goes on without a new quantum.
    in_turn: bool,
    // The last batch that took something from here.
    served_in: u64,
}

/// Queues of one class.
#[derive(Debug, Default)]
struct Class {
    queues: HashMap<Client, ClientQueue>,
    // Every client that has a queue, once; the next in turn first.
    ring: VecDeque<Client>,
    // Number of the batch that is being made.
    batch: u64,
}

/// All that waits to be computed.
#[derive(Debug, Default)]
pub(crate) struct Schedule {
    interactive: Class,
    bulk: Class,
    queued_jobs: usize,
    last_interactive_ns: Option<u64>,
    // Time that bulk has earned by waiting, in µs.
    bulk_credit_us: f64,
    rates_us: HashMap<(u64, Priority), f64>,
}

impl Schedule {
    /// Jobs of which at least one text waits.
    pub(crate) fn queued_jobs(&self) -> usize {
        self.queued_jobs
    }

    /// Somebody waits for something that is computed elsewhere: bulk is cut short as for interactive work.
    pub(crate) fn interactive_is_about(&mut self, now_ns: u64) {
        self.last_interactive_ns = Some(now_ns);
    }

    /// Queues a job behind those of its client.
    pub(crate) fn push(&mut self, ask: Ask, now_ns: u64) {
        self.insert(ask, now_ns, VecDeque::push_back);
    }

    /// Queues a job, or what is left of it, before those of its client: it has waited already.
    pub(crate) fn push_front(&mut self, ask: Ask, now_ns: u64) {
        self.insert(ask, now_ns, VecDeque::push_front);
    }

    fn insert(&mut self, ask: Ask, now_ns: u64, put: fn(&mut VecDeque<Ask>, Ask)) {
        if ask.priority == Priority::Interactive {
            self.last_interactive_ns = Some(now_ns);
        }
        self.queued_jobs += 1;
        let class = self.class(ask.priority);
        let client = ask.client;
        let queue = class.queues.entry(client).or_insert_with(|| {
            class.ring.push_back(client);
            ClientQueue::default()
        });
        put(&mut queue.jobs, ask);
    }

    fn class(&mut self, priority: Priority) -> &mut Class {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Bulk => &mut self.bulk,
        }
    }

    /// Takes a job out; false when it does not wait here.
    pub(crate) fn remove(&mut self, client: Client, priority: Priority, key: JobKey) -> bool {
        let Some(queue) = self.class(priority).queues.get_mut(&client) else { return false };
        let Some(at) = queue.jobs.iter().position(|ask| ask.key == key) else { return false };
        // An empty queue stays until its next turn, as after a turn that took its last job.
        queue.jobs.remove(at);
        self.queued_jobs -= 1;
        true
    }

    /// Takes out what waits for a client that is gone.
    pub(crate) fn remove_client(&mut self, client: Client) -> Vec<JobKey> {
        let mut removed = Vec::new();
        for class in [&mut self.interactive, &mut self.bulk] {
            if let Some(queue) = class.queues.remove(&client) {
                class.ring.retain(|other| *other != client);
                removed.extend(queue.jobs.iter().map(|ask| ask.key));
            }
        }
        self.queued_jobs -= removed.len();
        removed
    }

    /// Takes out what waits for a model that is gone.
    pub(crate) fn remove_generation(&mut self, generation: u64) -> Vec<JobKey> {
        let mut removed = Vec::new();
        for class in [&mut self.interactive, &mut self.bulk] {
            for queue in class.queues.values_mut() {
                queue.jobs.retain(|ask| {
                    let stays = ask.generation != generation;
                    if !stays {
                        removed.push(ask.key);
                    }
                    stays
                });
            }
        }
        self.rates_us.retain(|(of, _), _| *of != generation);
        self.queued_jobs -= removed.len();
        removed
    }

    /// The next batch, and the jobs found on the way that nobody wants any more. `None` when nothing waits; calling it
    /// again at once gives the batch after that, so call it when the compute is free.
    pub(crate) fn next_batch(
        &mut self,
        now_ns: u64,
        is_cancelled: impl FnMut(JobKey) -> bool,
    ) -> (Option<Batch>, Vec<(JobKey, Unwanted)>) {
        self.batch_for(Moment::Free, now_ns, is_cancelled)
    }

    /// As [`Schedule::next_batch`], for a break in a batch of bulk work: interactive work that may run beside another batch.
    /// Nothing is earned or paid by it, since bulk goes on afterwards; [`Schedule::batch_done`] is not told of it.
    pub(crate) fn next_urgent(
        &mut self,
        now_ns: u64,
        is_cancelled: impl FnMut(JobKey) -> bool,
    ) -> (Option<Batch>, Vec<(JobKey, Unwanted)>) {
        self.batch_for(Moment::Break, now_ns, is_cancelled)
    }

    fn batch_for(
        &mut self,
        moment: Moment,
        now_ns: u64,
        mut is_cancelled: impl FnMut(JobKey) -> bool,
    ) -> (Option<Batch>, Vec<(JobKey, Unwanted)>) {
        let mut unwanted = Vec::new();
        let mut verdict = |ask: &Ask| {
            if is_cancelled(ask.key) {
                Some(Unwanted::Cancelled)
            } else if ask.deadline_ns != 0 && now_ns >= ask.deadline_ns {
                Some(Unwanted::Expired)
            } else {
                None
            }
        };
        let first = if self.bulk.ring.is_empty() {
            self.bulk_credit_us = 0.0;
            Priority::Interactive
        } else if self.bulk_credit_us >= CREDIT_TARGET_US {
            Priority::Bulk
        } else {
            Priority::Interactive
        };
        let second = if first == Priority::Bulk { Priority::Interactive } else { Priority::Bulk };
        let shared =
            self.last_interactive_ns.is_some_and(|last| now_ns.saturating_sub(last) < INTERACTIVE_MEMORY_NS);
        let mut batch = None;
        let order: &[Priority] = match moment {
            Moment::Free => &[first, second],
            Moment::Break => &[Priority::Interactive],
        };
        for &priority in order {
            let target_us = match priority {
                Priority::Interactive => INTERACTIVE_TARGET_US,
                Priority::Bulk if first == Priority::Bulk => CREDIT_TARGET_US,
                Priority::Bulk if shared => SHARED_TARGET_US,
                Priority::Bulk => ALONE_TARGET_US,
            };
            let rates_us = &self.rates_us;
            let budget = |generation| {
                let rate_us = rates_us.get(&(generation, priority)).copied().unwrap_or(FIRST_RATE_US);
                ((target_us / rate_us) as u64).clamp(1, MAX_BATCH_COST)
            };
            let class = match priority {
                Priority::Interactive => &mut self.interactive,
                Priority::Bulk => &mut self.bulk,
            };
            let mut taken_jobs = 0;
            batch = class.take(priority, moment, budget, &mut verdict, &mut unwanted, &mut taken_jobs);
            self.queued_jobs -= taken_jobs;
            if let Some(batch) = &mut batch {
                batch.on_credit = priority == Priority::Bulk && first == Priority::Bulk;
                break;
            }
        }
        self.queued_jobs -= unwanted.len();
        (batch, unwanted)
    }

    /// A batch has been computed, in `elapsed_us`.
    pub(crate) fn batch_done(&mut self, batch: &Batch, elapsed_us: u64) {
        let elapsed_us = elapsed_us as f64;
        match batch.priority {
            Priority::Interactive if !self.bulk.ring.is_empty() => {
                let earned_us = elapsed_us * BULK_SHARE_PERCENT / (100.0 - BULK_SHARE_PERCENT);
                self.bulk_credit_us = (self.bulk_credit_us + earned_us).min(4.0 * CREDIT_TARGET_US);
            }
            Priority::Interactive => {}
            // May go below zero: a text that costs more than a slice is paid for later.
            Priority::Bulk if batch.on_credit => {
                self.bulk_credit_us = (self.bulk_credit_us - elapsed_us).max(-16.0 * CREDIT_TARGET_US);
            }
            Priority::Bulk => {}
        }
        if batch.cost > 0 {
            let (least_us, most_us) = RATE_RANGE_US;
            let measured_us = (elapsed_us / batch.cost as f64).clamp(least_us, most_us);
            let rate_us = self.rates_us.entry((batch.generation, batch.priority)).or_insert(FIRST_RATE_US);
            if batch.cost >= FULL_MEASURE_COST || measured_us < *rate_us {
                *rate_us += (measured_us - *rate_us) * RATE_WEIGHT;
            }
        }
    }
}

impl Class {
    /// One batch of this class: rounds over the clients until it is full or nobody has anything that fits it.
    fn take(
        &mut self,
        priority: Priority,
        moment: Moment,
        budget: impl Fn(u64) -> u64,
        verdict: &mut impl FnMut(&Ask) -> Option<Unwanted>,
        unwanted: &mut Vec<(JobKey, Unwanted)>,
        taken_jobs: &mut usize,
    ) -> Option<Batch> {
        self.batch += 1;
        let mut batch: Option<Batch> = None;
        // Clients whose first job does not go with this batch.
        let mut passed_over = Vec::new();
        // A suspect has the batch to itself.
        let mut alone = None;
        let mut is_full = false;
        while !is_full {
            let Some(client) = self.ring.pop_front() else { break };
            let Some(queue) = self.queues.get_mut(&client) else { continue };
            let was_in_turn = std::mem::take(&mut queue.in_turn);
            let deficit_before = queue.deficit;
            if !was_in_turn {
                queue.deficit += QUANTUM;
            }
            let (mut fits, mut took) = (true, false);
            while let Some(ask) = queue.jobs.front_mut() {
                // In a later round the batch may hold a part of the job; only then has it been begun.
                let slice = match &mut batch {
                    Some(batch) if ask.next_text > 0 => {
                        batch.slices.iter().position(|slice| slice.key == ask.key)
                    }
                    _ => None,
                };
                if slice.is_none()
                    && let Some(why) = verdict(ask)
                {
                    unwanted.push((ask.key, why));
                    queue.jobs.pop_front();
                    continue;
                }
                fits = match (&batch, alone) {
                    // A suspect would not be alone in a break.
                    (None, _) => !(ask.isolated && moment == Moment::Break),
                    (Some(_), Some(key)) => ask.key == key,
                    (Some(batch), None) => batch.generation == ask.generation && !ask.isolated,
                };
                if !fits {
                    break;
                }
                let before = batch.as_ref().map(|batch| batch.cost);
                let (end, cost, stop) = ask.affordable(queue.deficit, budget(ask.generation), before);
                if end > ask.next_text {
                    took = true;
                    queue.deficit -= cost;
                    let into = batch.get_or_insert_with(|| Batch {
                        generation: ask.generation,
                        priority,
                        slices: Vec::new(),
                        cost: 0,
                        on_credit: false,
                    });
                    into.cost += cost;
                    match slice {
                        Some(at) => into.slices[at].texts.end = end,
                        None => into.slices.push(Slice { key: ask.key, texts: ask.next_text..end }),
                    }
                    ask.next_text = end;
                    if ask.isolated {
                        alone = Some(ask.key);
                    }
                }
                match stop {
                    Stop::Done => {
                        queue.jobs.pop_front();
                        *taken_jobs += 1;
                        is_full = alone.is_some();
                        if is_full {
                            break;
                        }
                    }
                    Stop::Deficit => break,
                    Stop::Full => {
                        is_full = true;
                        break;
                    }
                }
            }
            if took {
                queue.served_in = self.batch;
            }
            if queue.jobs.is_empty() {
                self.queues.remove(&client);
            } else if !fits {
                if !took {
                    // Its turn has not come: nothing is saved up either.
                    (queue.deficit, queue.in_turn) = (deficit_before, was_in_turn);
                }
                passed_over.push(client);
            } else if is_full {
                queue.in_turn = true;
                self.ring.push_front(client);
            } else {
                self.ring.push_back(client);
            }
        }
        // Those that got nothing come first next time, in their order; those that got something, last.
        for client in passed_over.into_iter().rev() {
            if self.queues.get(&client).is_some_and(|queue| queue.served_in == self.batch) {
                self.ring.push_back(client);
            } else {
                self.ring.push_front(client);
            }
        }
        batch
    }
}

/// When a batch is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The compute is free.
    Free,
    /// A batch of bulk work pauses.
    Break,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// All texts fit.
    Done,
    /// The client's turn is over.
    Deficit,
    /// The batch is full.
    Full,
}

impl Ask {
    /// How far the texts go that the client's deficit and the batch's budget allow, what they cost, and what ended them.
    /// The first text of a batch is taken whatever it costs, once the client can pay for it.
    fn affordable(&self, deficit: u64, budget: u64, taken: Option<u64>) -> (usize, u64, Stop) {
        let before = taken.unwrap_or(0);
        let mut is_first = taken.is_none();
        let (mut end, mut cost) = (self.next_text, 0);
        for text in self.next_text..self.costs.len() {
            let after = cost + u64::from(self.costs[text]);
            if !is_first && before + after > budget {
                return (end, cost, Stop::Full);
            }
            if after > deficit {
                return (end, cost, Stop::Deficit);
            }
            is_first = false;
            (end, cost) = (text + 1, after);
        }
        (end, cost, Stop::Done)
    }
}

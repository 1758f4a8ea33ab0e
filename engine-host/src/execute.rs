//! Takes the next batch, has it computed, and brings the results where they belong. One batch at a time: it may use
//! every core.

use crate::HostError;
use crate::batch::{self, BatchError, Part};
use crate::cache;
use crate::compute::{Compute, ComputeError, Loader, ModelFacts};
use crate::host::{Host, Served, State, Wakes};
use crate::job::{Job, Origin};
use crate::schedule::{Batch, Client, JobKey, Slice, Unwanted};
use shm_layout::code::Code;
use shm_layout::limits::MAX_MESSAGE_BYTES;
use shm_layout::wire::{FromEngine, Priority};
use shm_os::process::monotonic_ns;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A batch with everything that is needed to compute it. While it exists `State::computing` is set, in a break by the batch that
/// pauses.
#[derive(Debug)]
pub(crate) struct Work<C> {
    batch: Batch,
    served: Arc<Served<C>>,
    parts: Vec<(Job, Range<usize>)>,
    moment: Moment,
}

/// When a batch is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// By itself, on all threads.
    Free,
    /// On one thread of a bulk batch that pauses there.
    Break,
}

/// A job after its batch, unless it was complete.
enum After {
    /// It has an error for an answer; texts of it may still be queued.
    Failed(Client, Priority, JobKey),
    /// Some texts are still to be computed.
    GoesOn(Job),
    /// Its batch failed, and it is not known whose fault that was: it runs again, alone.
    Suspect(Job),
}

impl<L: Loader> Host<L> {
    /// The next batch, if the compute is free; answers what nobody wants any more.
    pub(crate) fn next_work(&self, moment: Moment) -> Option<Work<L::Model>> {
        let mut given_up = Vec::new();
        let mut guard = self.state();
        let State { schedule, jobs, models, computing, generator_waits, .. } = &mut *guard;
        if *computing != (moment == Moment::Break) || self.is_stopped() {
            return None;
        }
        if moment == Moment::Free && *generator_waits {
            return None;
        }
        let is_cancelled = |key| jobs.get(&key).is_some_and(Job::is_cancelled);
        let (batch, unwanted) = match moment {
            Moment::Free => schedule.next_batch(monotonic_ns(), is_cancelled),
            Moment::Break => schedule.next_urgent(monotonic_ns(), is_cancelled),
        };
        for (key, why) in unwanted {
            let code = match why {
                Unwanted::Expired => Code::DeadlineExceeded,
                Unwanted::Cancelled => Code::Cancelled,
            };
            given_up.extend(jobs.remove(&key).map(|job| (job, code)));
        }
        let work = batch.and_then(|batch| {
            let take = |slice: &Slice| Some((jobs.remove(&slice.key)?, slice.texts.clone()));
            let parts: Vec<_> = batch.slices.iter().filter_map(take).collect();
            let Some(served) = models.get(&batch.generation).map(Arc::clone) else {
                // Unloading empties the queues of a model, so this is not reached; its jobs get an answer all the same.
                for (job, _) in parts {
                    schedule.remove(job.client, job.priority, job.key);
                    given_up.push((job, Code::ModelUnavailable));
                }
                return None;
            };
            Some(Work { batch, served, parts, moment })
        });
        *computing |= work.is_some();
        drop(guard);
        let mut wakes = Wakes::default();
        for (job, code) in given_up {
            self.give_up(job, code, &mut wakes);
        }
        wakes.fire();
        work
    }

    /// Computes a batch, answers the jobs that are complete, and puts the others back.
    pub(crate) fn execute(&self, work: Work<L::Model>) {
        let Work { batch, served, mut parts, moment } = work;
        let begun_ns = monotonic_ns();
        for (job, _) in parts.iter_mut().filter(|(job, _)| job.begun_ns.is_none()) {
            job.begun_ns = Some(begun_ns);
            match &job.origin {
                Origin::Lane { lane, job } => lane.begin(job),
                Origin::Relay { relay_id, .. } => {
                    self.link.send(&FromEngine::JobStarted { relay_id: *relay_id });
                }
            }
        }
        if let Some(cache) = &served.cache {
            parts.iter_mut().for_each(|(job, range)| job.look_again(cache, range));
        }
        let wanted: Vec<Part<'_>> = parts
            .iter()
            .map(|(job, range)| Part {
                operation: job.operation,
                query: job.query.as_deref(),
                texts: &job.texts,
                range: range.clone(),
                keys: &job.keys,
                known: &job.known,
            })
            .collect();
        // A suspect is alone, and so is whoever would pay for its crash.
        let has_breaks = moment == Moment::Free
            && batch.priority == Priority::Bulk
            && !parts.iter().any(|(job, _)| job.isolated);
        let breaks = || {
            if has_breaks {
                self.take_a_break();
            }
        };
        let compute = || batch::compute(&served.model, &served.facts, &wanted, &breaks);
        let computed = match moment {
            Moment::Free => compute(),
            Moment::Break => served.model.on_this_thread(compute),
        };
        let elapsed_us = monotonic_ns().saturating_sub(begun_ns) / 1000;

        let (mut wakes, mut needs_probe, mut fresh) = (Wakes::default(), false, Vec::new());
        let mut after = Vec::new();
        let alone = parts.len() == 1;
        match computed {
            Ok(computed) => {
                self.counters.texts.fetch_add(computed.texts as u64, Ordering::Relaxed);
                fresh = computed.fresh;
                if let Some(cache) = &served.cache {
                    cache.count(computed.found, fresh.len(), computed.shared);
                    cache.remember(&fresh);
                }
                self.counters.tokens.fetch_add(computed.tokens, Ordering::Relaxed);
                for ((mut job, range), outcome) in parts.into_iter().zip(computed.parts) {
                    job.execution_us += elapsed_us;
                    match outcome.and_then(|output| job.gather(output, range.len())) {
                        Ok(()) if job.is_complete() => self.answer(job, &served.facts, &mut wakes),
                        Ok(()) => after.push(After::GoesOn(job)),
                        Err(error) => {
                            needs_probe |= error.code == Code::BadResult;
                            after.push(self.fail(job, &error, &mut wakes));
                        }
                    }
                }
            }
            Err(error) => {
                needs_probe = true;
                if error == BatchError::Panicked {
                    tracing::error!(jobs = parts.len(), "a computation panicked");
                }
                for (mut job, _) in parts {
                    job.execution_us += elapsed_us;
                    after.push(if alone {
                        self.fail(job, &error.to_compute_error(), &mut wakes)
                    } else {
                        After::Suspect(job)
                    });
                }
            }
        }
        wakes.fire();
        let probe = || match moment {
            Moment::Free => batch::probe(&served.model),
            Moment::Break => served.model.on_this_thread(|| batch::probe(&served.model)),
        };
        // Nobody waits for this one; a model that never passed has only itself to blame, not this engine.
        if served.model.wants_probe() {
            if let Err(error) = probe() {
                tracing::error!(generation = batch.generation, %error, "a model fails its first probe");
            }
        } else if needs_probe && let Err(error) = probe() {
            // What is not answered stays in its lane, or with the broker, for the engine that replaces this one.
            return self.stop(Err(HostError::ModelBroken { reason: error.message }));
        }
        // Not under the lock: the last hold on an unloaded model unmaps its image.
        let dim = served.facts.dim;
        drop(served);
        self.settle(&batch, moment, elapsed_us, after);
        // After the answers, and when the compute is free again: nobody waits for this.
        cache::send(&self.link, batch.generation, batch.priority, dim, &fresh);
    }

    /// Answers a job whose texts are all computed, unless nobody wants it any more.
    pub(crate) fn answer(&self, mut job: Job, facts: &ModelFacts, wakes: &mut Wakes) {
        let now_ns = monotonic_ns();
        if job.is_cancelled() {
            return self.give_up(job, Code::Cancelled, wakes);
        }
        if job.is_expired(now_ns) {
            return self.give_up(job, Code::DeadlineExceeded, wakes);
        }
        let payload = job.encode(facts);
        let times = job.times_us(now_ns);
        self.deliver(job.origin, Code::Ok, &payload, times, wakes);
    }

    fn fail(&self, job: Job, error: &ComputeError, wakes: &mut Wakes) -> After {
        let after = After::Failed(job.client, job.priority, job.key);
        let message = &error.message[..error.message.floor_char_boundary(MAX_MESSAGE_BYTES)];
        let times = job.times_us(monotonic_ns());
        self.deliver(job.origin, error.code, message.as_bytes(), times, wakes);
        after
    }

    /// Puts back what is not answered, and frees the compute for the next batch.
    fn settle(&self, batch: &Batch, moment: Moment, elapsed_us: u64, after: Vec<After>) {
        let (mut given_up, mut abandoned) = (Vec::new(), Vec::new());
        let mut guard = self.state();
        let state = &mut *guard;
        if moment == Moment::Free {
            state.computing = false;
            if state.generator_waits {
                self.compute_free.notify_one();
            }
            state.schedule.batch_done(batch, elapsed_us);
        }
        for job in after {
            let (mut job, is_suspect) = match job {
                After::Failed(client, priority, key) => {
                    state.schedule.remove(client, priority, key);
                    continue;
                }
                After::GoesOn(job) => (job, false),
                After::Suspect(job) => (job, true),
            };
            // What happened to it while it was computed:
            let gone = if job.is_abandoned() {
                Some(None)
            } else if job.is_cancelled() {
                Some(Some(Code::Cancelled))
            } else if !state.models.contains_key(&job.generation) {
                Some(Some(Code::ModelUnavailable))
            } else {
                None
            };
            if is_suspect || gone.is_some() {
                state.schedule.remove(job.client, job.priority, job.key);
            }
            match gone {
                Some(Some(code)) => given_up.push((job, code)),
                // Its drop may unmap a lane: not under the lock.
                Some(None) => abandoned.push(job),
                None => {
                    if is_suspect {
                        job.isolated = true;
                        state.schedule.push_front(job.ask(), monotonic_ns());
                    }
                    state.jobs.insert(job.key, job);
                }
            }
        }
        drop(guard);
        drop(abandoned);
        let mut wakes = Wakes::default();
        for (job, code) in given_up {
            self.give_up(job, code, &mut wakes);
        }
        wakes.fire();
    }
}

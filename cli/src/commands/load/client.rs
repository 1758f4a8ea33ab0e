//! One client process of a load: sends requests in a closed loop, checks and counts the answers. What is sent is the
//! plan's; adding up is `report`'s.

use super::plan::{ClientLine, ClientResult, Plan, Reference, TOLERANCE, ThreadPlan};
use super::texts;
use crate::args::RouteArg;
use crate::commands::worker::{read_plan, say, wait_for_end_of_stdin};
use crate::failure::{Exit, Failure};
use hdrhistogram::Histogram;
use std::borrow::Cow;
use std::io::BufRead;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use worker_sdk::{EmbedOptions, Embeddings, Model, Priority};

/// Time beyond a request's timeout after which it counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(5);
/// Pause after a failed request, so that an absent broker is not asked in a tight loop.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);
/// Longest time that is told apart, in µs.
pub(crate) const MAX_LATENCY_US: u64 = 3_600_000_000;
/// Decimal digits that are kept of a time.
pub(crate) const LATENCY_DIGITS: u8 = 3;

/// Runs the plan on stdin; see [`ClientLine`] for the talk with the parent. The end of stdin stops it early.
pub(crate) fn run(socket: Option<PathBuf>) -> Result<(), Failure> {
    let plan: Plan = read_plan()?;
    let client = crate::commands::client(socket, "load", None).connect()?;
    let route = if plan.socket_route { RouteArg::Socket } else { RouteArg::Lane };
    let model = crate::commands::lease(&client, &plan.model, route)?;
    let checker = plan.reference.as_ref().map(Checker::read).transpose()?.map(Arc::new);
    let threads: Vec<Thread> = plan.threads.iter().map(|t| Thread::new(t, &plan, &model, &checker)).collect();
    say(&ClientLine::Ready)?;
    if std::io::stdin().lock().read_line(&mut String::new())? == 0 {
        return Ok(());
    }

    let started = Instant::now();
    let end = started + Duration::from_millis(plan.duration_ms);
    let stop = Arc::new(AtomicBool::new(false));
    let watcher_stop = Arc::clone(&stop);
    std::thread::spawn(move || {
        wait_for_end_of_stdin();
        watcher_stop.store(true, Ordering::Relaxed);
    });
    let tallies: Vec<Arc<Mutex<Tally>>> = threads.iter().map(|thread| Arc::clone(&thread.tally)).collect();
    let (done, ended) = channel();
    for thread in threads {
        let (done, stop) = (done.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            thread.send_until(end, &stop);
            let _ = done.send(());
        });
    }
    // Not joined: a request that never returns must not keep the others' results back.
    let last = end + Duration::from_millis(plan.timeout_ms) + LOST_AFTER;
    for _ in &tallies {
        if ended.recv_timeout(last.saturating_duration_since(Instant::now())).is_err() {
            break;
        }
    }
    let elapsed_us = u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX);
    let mut result = ClientResult {
        pid: std::process::id(),
        elapsed_us,
        reconnects: model.reconnects(),
        ..ClientResult::default()
    };
    for tally in tallies {
        tally.lock().unwrap_or_else(PoisonError::into_inner).add_to(&mut result);
    }
    say(&ClientLine::Done(result))
}

/// One thread's work.
struct Thread {
    plan: ThreadPlan,
    model: Model,
    timeout: Duration,
    cached: bool,
    /// Mean distance of requests, unless one follows the other.
    interval: Option<Duration>,
    checker: Option<Arc<Checker>>,
    tally: Arc<Mutex<Tally>>,
}

/// What one thread has counted so far.
struct Tally {
    bulk: bool,
    submitted: u64,
    latency_us: Histogram<u64>,
    /// All but the answered ones' times; `interactive` and `bulk` of it stay empty.
    counts: ClientResult,
    completed: u64,
    texts: u64,
    texts_in_time: f64,
}

impl Thread {
    fn new(plan: &ThreadPlan, all: &Plan, model: &Model, checker: &Option<Arc<Checker>>) -> Thread {
        let tally = Tally {
            bulk: plan.bulk,
            submitted: 0,
            latency_us: new_histogram(),
            counts: ClientResult::default(),
            completed: 0,
            texts: 0,
            texts_in_time: 0.0,
        };
        Thread {
            plan: plan.clone(),
            model: model.clone(),
            timeout: Duration::from_millis(all.timeout_ms),
            cached: all.cached,
            interval: all.rate.filter(|_| !plan.bulk).map(|rate| Duration::from_secs_f64(1.0 / rate)),
            checker: checker.clone(),
            tally: Arc::new(Mutex::new(tally)),
        }
    }

    fn send_until(&self, end: Instant, stop: &AtomicBool) {
        let priority = if self.plan.bulk { Priority::Bulk } else { Priority::Interactive };
        let options =
            EmbedOptions::default().priority(priority).timeout(self.timeout).bypass_cache(!self.cached);
        let mut before: Option<Vec<usize>> = None;
        let mut first = 0;
        let mut fresh = self.plan.fresh.map(|fresh| texts::Fresh::new(fresh.seed, fresh.tokens));
        let mut due = Instant::now();
        while Instant::now() < end && !stop.load(Ordering::Relaxed) {
            if let Some(interval) = self.interval {
                due += interval.mul_f64(uneven(first));
                if due >= end {
                    break;
                }
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            let (rows, texts) = match &mut fresh {
                Some(fresh) => (Vec::new(), (0..self.plan.batch).map(|_| Cow::Owned(fresh.next())).collect()),
                None => self.request(first),
            };
            first += 1;
            self.with_tally(|tally| tally.submitted += 1);
            // Whoever is late has made somebody wait.
            let begun = if self.interval.is_some() { due } else { Instant::now() };
            let outcome = self.model.submit(&texts, &options).and_then(worker_sdk::Job::wait);
            let took = begun.elapsed();
            let in_time = share_before(end.saturating_duration_since(begun), took);
            let failed = outcome.is_err();
            self.with_tally(|tally| match outcome {
                Ok(answer) => {
                    tally.answered(took, texts.len(), in_time);
                    if let Some(checker) = &self.checker {
                        tally.judged(&checker.judge(&answer, &rows, before.as_deref()));
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a request failed");
                    *tally.counts.errors.entry(error.code().to_owned()).or_default() += 1;
                }
            });
            before = Some(rows);
            if failed {
                std::thread::sleep(PAUSE_AFTER_ERROR);
            }
        }
    }

    /// Request number `number`: rows of the reference and texts. Consecutive requests begin with different texts.
    fn request(&self, number: usize) -> (Vec<usize>, Vec<Cow<'_, str>>) {
        let own = &self.plan.texts;
        (0..self.plan.batch)
            .map(|offset| &own[(number + offset) % own.len()])
            .map(|(r, t)| (*r, Cow::Borrowed(t.as_str())))
            .unzip()
    }

    fn with_tally(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Tally {
    /// `in_time` is the share of the request that lay before the end of the run.
    fn answered(&mut self, took: Duration, texts: usize, in_time: f64) {
        self.completed += 1;
        self.texts += texts as u64;
        self.texts_in_time += texts as f64 * in_time;
        self.latency_us.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
    }

    fn judged(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Right { diff } => self.counts.max_abs_diff = self.counts.max_abs_diff.max(*diff),
            Verdict::Wrong => self.counts.wrong += 1,
            Verdict::Repeated => self.counts.duplicated += 1,
        }
    }

    fn add_to(&self, all: &mut ClientResult) {
        all.submitted += self.submitted;
        let settled = self.completed + self.counts.error_count();
        all.lost += self.submitted.saturating_sub(settled);
        all.wrong += self.counts.wrong;
        all.duplicated += self.counts.duplicated;
        for (code, count) in &self.counts.errors {
            *all.errors.entry(code.clone()).or_default() += count;
        }
        all.max_abs_diff = all.max_abs_diff.max(self.counts.max_abs_diff);
        let class = if self.bulk { &mut all.bulk } else { &mut all.interactive };
        class.completed += self.completed;
        class.texts += self.texts;
        class.texts_in_time += self.texts_in_time;
        class.latency_us.extend(
            self.latency_us.iter_recorded().map(|step| (step.value_iterated_to(), step.count_at_value())),
        );
    }
}

/// Distance before request number `number`, with a mean of 1, so that requests do not keep step with anything: 1/2 to 3/2, by the
/// golden ratio.
fn uneven(number: usize) -> f64 {
    0.5 + (number as f64 * 0.618_033_988_749_894_9).fract()
}

/// The share of a request that took `took` and began so long before the end which lay before the end.
fn share_before(left: Duration, took: Duration) -> f64 {
    if took <= left { 1.0 } else { left.as_secs_f64() / took.as_secs_f64() }
}

/// An empty histogram of times in µs.
pub(crate) fn new_histogram() -> Histogram<u64> {
    let mut histogram = Histogram::new_with_bounds(1, MAX_LATENCY_US, LATENCY_DIGITS)
        .unwrap_or_else(|_| unreachable!("the bounds are constants that a test holds"));
    histogram.auto(false);
    histogram
}

/// What an answer is.
#[derive(Debug, PartialEq)]
enum Verdict {
    Right {
        diff: f32,
    },
    Wrong,
    /// The answer to the request before.
    Repeated,
}

/// Knows what the answers must be.
struct Checker {
    dim: usize,
    fingerprint: u64,
    values: Vec<f32>,
}

impl Checker {
    fn read(reference: &Reference) -> Result<Checker, Failure> {
        let bytes = std::fs::read(&reference.path)?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        if reference.dim == 0 || !values.len().is_multiple_of(reference.dim) || values.is_empty() {
            return Err(Failure::new(Exit::Failed, "the reference vectors are not whole"));
        }
        Ok(Checker { dim: reference.dim, fingerprint: reference.fingerprint, values })
    }

    fn judge(&self, answer: &Embeddings, rows: &[usize], before: Option<&[usize]>) -> Verdict {
        if (answer.dim(), answer.fingerprint()) != (self.dim, self.fingerprint) {
            return Verdict::Wrong;
        }
        self.judge_rows(answer.values(), rows, before)
    }

    fn judge_rows(&self, values: &[f32], rows: &[usize], before: Option<&[usize]>) -> Verdict {
        match self.diff(values, rows) {
            Some(diff) => Verdict::Right { diff },
            None if before.is_some_and(|before| self.diff(values, before).is_some()) => Verdict::Repeated,
            None => Verdict::Wrong,
        }
    }

    /// The largest difference from the reference's `rows`, if it is one that rounding may make.
    fn diff(&self, values: &[f32], rows: &[usize]) -> Option<f32> {
        if values.len() != rows.len() * self.dim {
            return None;
        }
        let mut largest: f32 = 0.0;
        for (vector, row) in values.chunks_exact(self.dim).zip(rows) {
            let expected = self.values.get(row * self.dim..(row + 1) * self.dim)?;
            for (value, expected) in vector.iter().zip(expected) {
                let diff = (value - expected).abs();
                // Not a number is not within the tolerance either.
                if diff.is_nan() || diff > TOLERANCE {
                    return None;
                }
                largest = largest.max(diff);
            }
        }
        Some(largest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let checker = Checker { dim: 2, fingerprint: 1, values: vec![0.0, 1.0, 1.0, 0.0, 0.5, 0.5] };
        let judge = |values: &[f32], rows: &[usize]| checker.judge_rows(values, rows, Some(&[2]));
        assert_eq!(judge(&[1.0, 0.0], &[1]), Verdict::Right { diff: 0.0 });
        assert!(matches!(judge(&[1.0, 5e-6], &[1]), Verdict::Right { diff } if diff > 0.0));
        assert_eq!(judge(&[1.0, 2e-5], &[1]), Verdict::Wrong);
        assert_eq!(judge(&[f32::NAN, 0.0], &[1]), Verdict::Wrong);
        assert_eq!(judge(&[0.5, 0.5], &[1]), Verdict::Repeated);
        assert_eq!(judge(&[1.0, 0.0], &[1, 1]), Verdict::Wrong);
        assert_eq!(judge(&[1.0, 0.0, 0.0, 1.0], &[1, 0]), Verdict::Right { diff: 0.0 });
    }

    #[test]
    fn requests_beyond_the_end_count_by_their_share() {
        let ms = Duration::from_millis;
        assert_eq!(share_before(ms(5), ms(5)), 1.0);
        assert_eq!(share_before(ms(0), ms(0)), 1.0);
        assert_eq!(share_before(ms(0), ms(5)), 0.0);
        assert!((share_before(ms(1), ms(4)) - 0.25).abs() < 1e-9);
    }

    #[test]
    fn distances_are_uneven_with_a_mean_of_one() {
        let all: Vec<f64> = (0..10_000).map(uneven).collect();
        assert!(all.iter().all(|distance| (0.5..1.5).contains(distance)));
        assert!((all.iter().sum::<f64>() / 10_000.0 - 1.0).abs() < 1e-3);
        assert!(all.windows(2).all(|two| (two[0] - two[1]).abs() > 0.3));
    }

    #[test]
    fn what_has_not_come_back_is_lost() {
        let mut tally = Tally {
            bulk: true,
            submitted: 5,
            latency_us: new_histogram(),
            counts: ClientResult::default(),
            completed: 0,
            texts: 0,
            texts_in_time: 0.0,
        };
        tally.answered(Duration::from_millis(3), 32, 1.0);
        tally.answered(Duration::from_secs(100_000), 32, 0.25);
        tally.counts.errors.insert("OVERLOADED".into(), 2);
        let mut all = ClientResult::default();
        tally.add_to(&mut all);
        assert_eq!((all.submitted, all.completed(), all.error_count(), all.lost), (5, 2, 2, 1));
        assert!((all.bulk.texts_in_time - 40.0).abs() < 1e-9);
        assert_eq!((all.bulk.texts, all.bulk.latency_us.len(), all.interactive.completed), (64, 2, 0));
    }
}

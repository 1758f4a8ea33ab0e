//! The supervisor's memory of the engine: in which phase it is, how often it died, when it is started again. Pure
//! bookkeeping; what is handed over to a new engine is decided in `serving`.

use super::models::{backoff_ns, nanos};
use crate::config::Limits;
use shm_layout::wire::EngineTotals;

/// Where the engine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No process. `retry_at_ns` is when a start is allowed.
    Down { retry_at_ns: u64 },
    /// A process was made and has not reported itself.
    Starting { deadline_ns: u64 },
    /// It serves.
    Up { since_ns: u64 },
    /// It was told to die and is not reaped yet.
    Dying,
}

/// The engine.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) phase: Phase,
    /// 1 for the first process; 0 before it.
    pub(crate) incarnation: u64,
    pub(crate) pid: u32,
    pub(crate) threads: u32,
    pub(crate) totals: EngineTotals,
    /// Whether the present incarnation was told to finish and leave.
    pub(crate) drain_sent: bool,
    /// Why the last one died or could not be started.
    pub(crate) last_error: String,
    /// Why it is being killed, where its exit will not tell.
    pub(crate) killed_because: Option<String>,
    /// Starts in a row that did not end with an engine that reported itself.
    pub(crate) failed_starts: u32,
    /// Deaths in a row without work in between.
    idle_deaths: u32,
    /// Whether the present incarnation answered anything, or was up for long enough.
    worked: bool,
    was_up: bool,
}

impl Default for Engine {
    fn default() -> Engine {
        Engine {
            phase: Phase::Down { retry_at_ns: 0 },
            incarnation: 0,
            pid: 0,
            threads: 0,
            totals: EngineTotals::default(),
            drain_sent: false,
            last_error: String::new(),
            killed_because: None,
            failed_starts: 0,
            idle_deaths: 0,
            worked: false,
            was_up: false,
        }
    }
}

impl Engine {
    /// Begins a new incarnation; gives its number.
    pub(crate) fn begin(&mut self, now_ns: u64, limits: &Limits) -> u64 {
        self.incarnation += 1;
        let deadline_ns = now_ns.saturating_add(nanos(limits.engine_start_timeout));
        self.phase = Phase::Starting { deadline_ns };
        self.pid = 0;
        self.threads = 0;
        self.totals = EngineTotals::default();
        self.drain_sent = false;
        self.killed_because = None;
        self.worked = false;
        self.was_up = false;
        self.incarnation
    }

    /// The engine reported itself.
    pub(crate) fn up(&mut self, threads: u32, now_ns: u64) {
        self.phase = Phase::Up { since_ns: now_ns };
        self.threads = threads;
        self.was_up = true;
        self.failed_starts = 0;
    }

    /// The engine did something useful.
    pub(crate) fn worked(&mut self) {
        self.worked = true;
    }

    /// Remembers that the engine is being killed, for its record of health.
    pub(crate) fn dying(&mut self, reason: Option<String>, now_ns: u64, limits: &Limits) {
        self.note_health(now_ns, limits);
        self.phase = Phase::Dying;
        self.killed_because = reason;
    }

    fn note_health(&mut self, now_ns: u64, limits: &Limits) {
        if let Phase::Up { since_ns } = self.phase {
            self.worked |= now_ns.saturating_sub(since_ns) >= nanos(limits.engine_healthy_after);
        }
    }

    /// The engine is gone, or could not be started. Decides when the next one may start: at once, unless several died
    /// in a row without any work in between.
    pub(crate) fn dead(&mut self, why: String, now_ns: u64, limits: &Limits) {
        self.note_health(now_ns, limits);
        self.idle_deaths = if self.worked { 0 } else { self.idle_deaths.saturating_add(1) };
        if !self.was_up {
            self.failed_starts = self.failed_starts.saturating_add(1);
        }
        let delay_ns = match self.idle_deaths.checked_sub(limits.engine_free_restarts + 1) {
            None => 0,
            Some(step) => backoff_ns(limits.engine_backoff_base, limits.engine_backoff_cap, step),
        };
        self.phase = Phase::Down { retry_at_ns: now_ns.saturating_add(delay_ns) };
        self.pid = 0;
        self.threads = 0;
        self.last_error = why;
    }

    /// Whether it serves.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up { .. })
    }

    /// Whether starting it fails again and again.
    pub(crate) fn is_broken(&self, limits: &Limits) -> bool {
        self.failed_starts >= limits.engine_failed_starts
    }

    /// Times it was replaced.
    pub(crate) fn restarts(&self) -> u64 {
        self.incarnation.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delay_ms(engine: &Engine, now_ns: u64) -> u64 {
        let Phase::Down { retry_at_ns } = engine.phase else { panic!("not down") };
        (retry_at_ns - now_ns) / 1_000_000
    }

    #[test]
    fn restarts_are_delayed_only_after_many_deaths_without_work() {
        let limits = Limits { engine_free_restarts: 3, ..Limits::default() };
        let mut engine = Engine::default();
        let mut delays = Vec::new();
        for _ in 0..12 {
            engine.begin(0, &limits);
            engine.up(1, 0);
            engine.dead("x".into(), 0, &limits);
            delays.push(delay_ms(&engine, 0));
        }
        assert_eq!(delays, [0, 0, 0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        engine.begin(0, &limits);
        engine.up(1, 0);
        engine.worked();
        engine.dead("x".into(), 0, &limits);
        assert_eq!(delay_ms(&engine, 0), 0);
    }

    #[test]
    fn an_engine_that_was_up_for_a_while_counts_as_one_that_worked() {
        let limits = Limits { engine_free_restarts: 0, ..Limits::default() };
        let mut engine = Engine::default();
        let healthy_ns = nanos(limits.engine_healthy_after);
        for (up_ns, delayed) in [(healthy_ns - 1, true), (healthy_ns, false)] {
            engine.begin(0, &limits);
            engine.up(1, 0);
            engine.dying(None, up_ns, &limits);
            engine.dead("x".into(), up_ns, &limits);
            assert_eq!(delay_ms(&engine, up_ns) > 0, delayed);
        }
    }

    #[test]
    fn broken_means_that_starts_fail_in_a_row() {
        let limits = Limits::default();
        let mut engine = Engine::default();
        for n in 1..=limits.engine_failed_starts {
            engine.begin(0, &limits);
            engine.dead("x".into(), 0, &limits);
            assert_eq!(engine.is_broken(&limits), n == limits.engine_failed_starts);
        }
        engine.begin(0, &limits);
        engine.up(1, 0);
        assert!(!engine.is_broken(&limits));
    }
}

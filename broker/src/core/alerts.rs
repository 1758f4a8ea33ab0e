//! What has got worse and lasts: pure arithmetic over figures that come now and then, with hysteresis, so that nothing is
//! raised and lowered from one look to the next.

use shm_layout::wire::{Alert, DurationCounts};
use std::collections::VecDeque;

/// Shortest time between two looks.
pub(crate) const LOOK_INTERVAL_NS: u64 = 1_000_000_000;
/// Jobs between two looks below which their times and errors say nothing.
const MIN_JOBS: u64 = 50;
/// The 99th percentile is over so many times its long-run mean: raised.
const LATENCY_RAISE: f64 = 4.0;
/// It is under so many times: lowered.
const LATENCY_LOWER: f64 = 2.0;
/// Looks before the long-run mean of the 99th percentile is trusted.
const LATENCY_LOOKS: u32 = 5;
/// Weight of a look in the long-run mean.
const LATENCY_WEIGHT: f64 = 0.05;
/// Part of jobs that fail: raised.
const ERRORS_RAISE: f64 = 0.05;
/// Lowered.
const ERRORS_LOWER: f64 = 0.02;
/// Part of the budget that is taken: warning, critical, and lowered.
const MEMORY_WARNING: f64 = 0.80;
const MEMORY_CRITICAL: f64 = 0.90;
const MEMORY_LOWER: f64 = 0.75;
/// Unplanned deaths of engines within [`RESTART_WINDOW_NS`]: raised; none in it: lowered.
const RESTARTS_RAISE: usize = 3;
const RESTART_WINDOW_NS: u64 = 60_000_000_000;

/// One look at the figures; all counts are of the broker's whole life.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    pub(crate) jobs: u64,
    pub(crate) errors: u64,
    pub(crate) execution: DurationCounts,
    pub(crate) memory_bytes: u64,
    pub(crate) budget_bytes: Option<u64>,
}

/// What came of a look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// It began, or got worse.
    Raised(Alert),
    /// It ended.
    Lowered(String),
}

#[derive(Debug, Clone)]
struct Raised {
    name: &'static str,
    severity: &'static str,
    message: String,
    since_ns: u64,
}

/// What is raised, and what the next look is compared with.
#[derive(Debug, Default)]
pub(crate) struct Alerts {
    raised: Vec<Raised>,
    last: Figures,
    looked_ns: Option<u64>,
    mean_p99_us: f64,
    latency_looks: u32,
    deaths_ns: VecDeque<u64>,
}

impl Alerts {
    /// Whether a look is due.
    pub(crate) fn is_due(&self, now_ns: u64) -> bool {
        self.looked_ns.is_none_or(|at| now_ns.saturating_sub(at) >= LOOK_INTERVAL_NS)
    }

    /// An engine died that was not told to.
    pub(crate) fn engine_died(&mut self, now_ns: u64) {
        if self.deaths_ns.len() == RESTARTS_RAISE {
            self.deaths_ns.pop_front();
        }
        self.deaths_ns.push_back(now_ns);
    }

    /// Takes a look; gives what began and what ended.
    pub(crate) fn look(&mut self, now_ns: u64, figures: Figures) -> Vec<Change> {
        let mut changes = Vec::new();
        self.looked_ns = Some(now_ns);
        let jobs = figures.jobs.saturating_sub(self.last.jobs);
        let errors = figures.errors.saturating_sub(self.last.errors);
        // Too few jobs are kept until there are enough.
        if jobs >= MIN_JOBS || figures.jobs < self.last.jobs {
            self.look_at_errors(now_ns, jobs, errors, &mut changes);
            let since = figures.execution.since(&self.last.execution);
            self.look_at_latency(now_ns, &since, &mut changes);
            self.last = figures.clone();
        }
        self.look_at_memory(now_ns, &figures, &mut changes);
        self.look_at_deaths(now_ns, &mut changes);
        changes
    }

    fn look_at_errors(&mut self, now_ns: u64, jobs: u64, errors: u64, changes: &mut Vec<Change>) {
        let part = errors as f64 / jobs.max(1) as f64;
        if part > ERRORS_RAISE {
            let message = format!("{errors} of the last {jobs} jobs failed ({:.1} %)", 100.0 * part);
            self.raise(now_ns, "errors", "warning", message, changes);
        } else if part < ERRORS_LOWER {
            self.lower("errors", changes);
        }
    }

    fn look_at_latency(&mut self, now_ns: u64, since: &DurationCounts, changes: &mut Vec<Change>) {
        if since.total() < MIN_JOBS {
            return;
        }
        let Some(p99_us) = since.quantile_us(0.99).map(|us| us as f64) else { return };
        let factor = p99_us / self.mean_p99_us.max(1.0);
        let is_trusted = self.latency_looks >= LATENCY_LOOKS;
        if is_trusted && factor > LATENCY_RAISE {
            let message = format!(
                "the slowest hundredth of the last {} jobs computed {p99_us:.0} us and longer, {factor:.1} times the \
                 long-run mean",
                since.total()
            );
            self.raise(now_ns, "latency", "warning", message, changes);
        } else if factor < LATENCY_LOWER {
            self.lower("latency", changes);
        }
        // A mean over the first looks, then one that follows slowly: what lasts becomes the usual.
        self.latency_looks = self.latency_looks.saturating_add(1);
        let weight = (1.0 / f64::from(self.latency_looks)).max(LATENCY_WEIGHT);
        // One outlier does not make the next one look usual.
        let bounded_us =
            if is_trusted { p99_us.min(LATENCY_RAISE * self.mean_p99_us.max(1.0)) } else { p99_us };
        self.mean_p99_us += weight * (bounded_us - self.mean_p99_us);
    }

    fn look_at_memory(&mut self, now_ns: u64, figures: &Figures, changes: &mut Vec<Change>) {
        let Some(budget_bytes) = figures.budget_bytes.filter(|bytes| *bytes > 0) else {
            return self.lower("memory", changes);
        };
        let part = figures.memory_bytes as f64 / budget_bytes as f64;
        let message =
            || format!("{} of {budget_bytes} bytes are taken ({:.0} %)", figures.memory_bytes, 100.0 * part);
        if part > MEMORY_CRITICAL {
            self.raise(now_ns, "memory", "critical", message(), changes);
        } else if part > MEMORY_WARNING {
            self.raise(now_ns, "memory", "warning", message(), changes);
        } else if part < MEMORY_LOWER {
            self.lower("memory", changes);
        }
    }

    fn look_at_deaths(&mut self, now_ns: u64, changes: &mut Vec<Change>) {
        self.deaths_ns.retain(|at| now_ns.saturating_sub(*at) < RESTART_WINDOW_NS);
        if self.deaths_ns.len() >= RESTARTS_RAISE {
            let message = format!("{RESTARTS_RAISE} engines or more died within a minute");
            self.raise(now_ns, "engine_restarts", "critical", message, changes);
        } else if self.deaths_ns.is_empty() {
            self.lower("engine_restarts", changes);
        }
    }

    fn raise(
        &mut self,
        now_ns: u64,
        name: &'static str,
        severity: &'static str,
        message: String,
        changes: &mut Vec<Change>,
    ) {
        if let Some(known) = self.raised.iter_mut().find(|raised| raised.name == name) {
            let is_news = known.severity != severity;
            (known.severity, known.message) = (severity, message);
            if is_news {
                changes.push(Change::Raised(known.report(now_ns)));
            }
            return;
        }
        let raised = Raised { name, severity, message, since_ns: now_ns };
        changes.push(Change::Raised(raised.report(now_ns)));
        self.raised.push(raised);
    }

    fn lower(&mut self, name: &'static str, changes: &mut Vec<Change>) {
        if let Some(at) = self.raised.iter().position(|raised| raised.name == name) {
            self.raised.remove(at);
            changes.push(Change::Lowered(name.to_owned()));
        }
    }

    /// What is raised now.
    pub(crate) fn report(&self, now_ns: u64) -> Vec<Alert> {
        self.raised.iter().map(|raised| raised.report(now_ns)).collect()
    }
}

impl Raised {
    fn report(&self, now_ns: u64) -> Alert {
        Alert {
            name: self.name.to_owned(),
            severity: self.severity.to_owned(),
            message: self.message.clone(),
            age_us: now_ns.saturating_sub(self.since_ns) / 1000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    struct Rig {
        alerts: Alerts,
        figures: Figures,
        now_ns: u64,
    }

    impl Rig {
        fn new() -> Rig {
            Rig { alerts: Alerts::default(), figures: Figures::default(), now_ns: 0 }
        }

        fn jobs(&mut self, count: u64, errors: u64, each_us: u64) -> Vec<String> {
            self.figures.jobs += count;
            self.figures.errors += errors;
            (0..count).for_each(|_| self.figures.execution.add_us(each_us));
            self.look()
        }

        fn look(&mut self) -> Vec<String> {
            self.now_ns += SECOND;
            let changes = self.alerts.look(self.now_ns, self.figures.clone());
            let name = |change| match change {
                Change::Raised(alert) => format!("+{} {}", alert.name, alert.severity),
                Change::Lowered(name) => format!("-{name}"),
            };
            changes.into_iter().map(name).collect()
        }
    }

    #[test]
    fn errors_are_raised_over_five_percent_and_lowered_under_two() {
        let mut rig = Rig::new();
        assert!(rig.jobs(100, 5, 10).is_empty());
        assert_eq!(rig.jobs(100, 6, 10), ["+errors warning"]);
        assert!(rig.jobs(100, 6, 10).is_empty(), "told once");
        assert!(rig.jobs(100, 3, 10).is_empty(), "between the two it stays");
        assert_eq!(rig.alerts.report(rig.now_ns).len(), 1);
        assert_eq!(rig.jobs(100, 1, 10), ["-errors"]);
        assert!(rig.jobs(10, 10, 10).is_empty(), "ten jobs say nothing");
        assert_eq!(rig.jobs(40, 40, 10), ["+errors warning"], "together they do");
    }

    #[test]
    fn latency_is_compared_with_its_own_past() {
        let mut rig = Rig::new();
        for _ in 0..10 {
            assert!(rig.jobs(100, 0, 1000).is_empty());
        }
        assert!(rig.jobs(100, 0, 2000).is_empty());
        assert_eq!(rig.jobs(100, 0, 60_000), ["+latency warning"]);
        assert_eq!(rig.jobs(100, 0, 1000), ["-latency"]);
        // What lasts becomes the usual.
        assert_eq!(rig.jobs(100, 0, 16_000), ["+latency warning"]);
        let lowered = (0..200).any(|_| rig.jobs(100, 0, 16_000) == ["-latency"]);
        assert!(lowered);
    }

    #[test]
    fn memory_has_two_steps_and_a_budget_is_needed() {
        let mut rig = Rig::new();
        rig.figures.memory_bytes = 1000;
        assert!(rig.look().is_empty());
        rig.figures.budget_bytes = Some(1100);
        assert_eq!(rig.look(), ["+memory critical"]);
        rig.figures.memory_bytes = 900;
        assert_eq!(rig.look(), ["+memory warning"]);
        rig.figures.memory_bytes = 850;
        assert!(rig.look().is_empty());
        rig.figures.memory_bytes = 100;
        assert_eq!(rig.look(), ["-memory"]);
    }

    #[test]
    fn engines_that_die_in_a_row_are_told_for_a_minute() {
        let mut rig = Rig::new();
        for _ in 0..2 {
            rig.alerts.engine_died(rig.now_ns);
            assert!(rig.look().is_empty());
        }
        rig.alerts.engine_died(rig.now_ns);
        assert_eq!(rig.look(), ["+engine_restarts critical"]);
        rig.now_ns += 61 * SECOND;
        assert_eq!(rig.look(), ["-engine_restarts"]);
    }

    #[test]
    fn a_jump_of_the_clock_or_counters_that_go_back_raise_nothing() {
        let mut rig = Rig::new();
        rig.jobs(100, 0, 10);
        rig.now_ns += 1 << 60;
        assert!(rig.look().is_empty());
        rig.figures = Figures::default();
        assert!(rig.look().is_empty());
        assert!(rig.jobs(60, 0, 10).is_empty());
    }
}

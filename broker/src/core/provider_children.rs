//! Processes of providers that the broker itself keeps running: when one is started, how long a failing one is left
//! alone. What they provide is none of this file's business; they come over the socket like any other provider.

use super::event::ChildExit;
use super::models::{backoff_ns, nanos};
use super::{Action, Core};
use crate::config::Limits;
use shm_layout::wire::{ProvidedReport, ProvidedTotals, ProviderChildReport};
use tracing::{info, warn};

/// Where one process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is none; started again from then on.
    Down { retry_at_ns: u64 },
    /// It was asked for, or runs.
    Up { since_ns: u64 },
}

/// One process.
#[derive(Debug, Clone)]
struct ProviderChild {
    /// The model that it is to provide.
    model_id: String,
    phase: Phase,
    pid: u32,
    starts: u64,
    /// Ends in a row without any work done and soon after the start.
    failures: u32,
    /// The present process answered something.
    worked: bool,
    last_exit: Option<String>,
}

/// All of them, by their place in the configuration.
#[derive(Debug, Default)]
pub(crate) struct ProviderChildren(Vec<ProviderChild>);

impl ProviderChildren {
    /// None of them started yet.
    pub(crate) fn new(model_ids: &[String]) -> ProviderChildren {
        let child = |model_id: &String| ProviderChild {
            model_id: model_id.clone(),
            phase: Phase::Down { retry_at_ns: 0 },
            pid: 0,
            starts: 0,
            failures: 0,
            worked: false,
            last_exit: None,
        };
        ProviderChildren(model_ids.iter().map(child).collect())
    }

    /// Whether a process is kept running for this model.
    pub(crate) fn has(&self, model_id: &str) -> bool {
        self.0.iter().any(|child| child.model_id == model_id)
    }

    /// Which of them runs as this process.
    pub(crate) fn of_pid(&self, pid: u32) -> Option<usize> {
        self.0.iter().position(|child| child.pid == pid && pid != 0)
    }

    /// A process answered a job.
    pub(crate) fn worked(&mut self, pid: u32) {
        if let Some(child) = self.of_pid(pid).and_then(|child| self.0.get_mut(child)) {
            child.worked = true;
        }
    }

    fn ended(&mut self, child: usize, why: String, now_ns: u64, limits: &Limits) {
        let Some(child) = self.0.get_mut(child) else { return };
        let Phase::Up { since_ns } = child.phase else { return };
        let healthy = child.worked || now_ns.saturating_sub(since_ns) >= nanos(limits.provider_healthy_after);
        child.failures = if healthy { 0 } else { child.failures.saturating_add(1) };
        let wait_ns = match child.failures.checked_sub(1) {
            None => 0,
            Some(step) => backoff_ns(limits.provider_backoff_base, limits.provider_backoff_cap, step),
        };
        child.phase = Phase::Down { retry_at_ns: now_ns.saturating_add(wait_ns) };
        child.pid = 0;
        child.last_exit = Some(why);
    }

    /// Adds the processes to the reports of their models; a model that was never offered gets a report of its own.
    pub(crate) fn report_into(&self, reports: &mut Vec<ProvidedReport>) {
        for child in &self.0 {
            let at = match reports.iter().position(|report| report.model_id == child.model_id) {
                Some(at) => at,
                None => {
                    reports.push(never_offered(child.model_id.clone()));
                    reports.len() - 1
                }
            };
            if let Some(report) = reports.get_mut(at) {
                report.children.push(ProviderChildReport {
                    pid: child.pid,
                    starts: child.starts,
                    last_exit: child.last_exit.clone(),
                });
            }
        }
    }
}

fn never_offered(model_id: String) -> ProvidedReport {
    ProvidedReport {
        model_id,
        generation: 0,
        kind: String::new(),
        description: String::new(),
        input_kind: String::new(),
        output_kind: String::new(),
        operations: Vec::new(),
        output_dim: 0,
        fingerprint: 0,
        providers: Vec::new(),
        leases: 0,
        lease_pids: Vec::new(),
        queued_jobs: 0,
        absent_us: 0,
        totals: ProvidedTotals::default(),
        last_fault: None,
        children: Vec::new(),
    }
}

impl Core {
    /// Starts the processes that are down and may be started.
    pub(super) fn supervise_providers(&mut self, now_ns: u64) {
        if !self.provider_processes_are_wanted() {
            return;
        }
        for (child, state) in self.provider_children.0.iter_mut().enumerate() {
            if matches!(state.phase, Phase::Down { retry_at_ns } if retry_at_ns <= now_ns) {
                state.phase = Phase::Up { since_ns: now_ns };
                state.worked = false;
                state.starts += 1;
                self.actions.push(Action::StartProvider { child });
            }
        }
    }

    /// A broker that leaves needs them for what it accepted, and for nothing else.
    fn provider_processes_are_wanted(&self) -> bool {
        !self.leaving.has_begun() || self.relay.provided().any(|(_, job)| job.session.is_some())
    }

    pub(super) fn provider_children_timer_ns(&self) -> Option<u64> {
        if !self.provider_processes_are_wanted() {
            return None;
        }
        let due = self.provider_children.0.iter().filter_map(|child| match child.phase {
            Phase::Down { retry_at_ns } => Some(retry_at_ns),
            Phase::Up { .. } => None,
        });
        due.min()
    }

    pub(super) fn provider_started(&mut self, child: usize, pid: u32) {
        if let Some(state) = self.provider_children.0.get_mut(child) {
            state.pid = pid;
            info!(model = state.model_id, pid, starts = state.starts, "provider's process started");
        }
    }

    pub(super) fn provider_not_started(&mut self, now_ns: u64, child: usize, message: &str) {
        let why = super::cut(format!("it cannot be started: {message}"));
        self.note_provider_end(now_ns, child, why);
    }

    pub(super) fn provider_exited(&mut self, now_ns: u64, child: usize, exit: ChildExit) {
        self.note_provider_end(now_ns, child, format!("it {exit}"));
    }

    fn note_provider_end(&mut self, now_ns: u64, child: usize, why: String) {
        if let Some(state) = self.provider_children.0.get(child) {
            warn!(model = state.model_id, pid = state.pid, "provider's process: {why}");
        }
        self.provider_children.ended(child, why, now_ns, &self.config.limits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_failing_process_is_started_later_and_later_and_a_working_one_at_once() {
        let limits = Limits {
            provider_backoff_base: Duration::from_millis(100),
            provider_backoff_cap: Duration::from_millis(350),
            provider_healthy_after: Duration::from_secs(1),
            ..Limits::default()
        };
        let mut children = ProviderChildren::new(&["custom/x".to_owned()]);
        let mut waits_ms = Vec::new();
        for up_ns in [0, 5, 0, 0, 1_000_000_000, 0] {
            children.0[0].phase = Phase::Up { since_ns: 0 };
            children.ended(0, "x".into(), up_ns, &limits);
            let Phase::Down { retry_at_ns } = children.0[0].phase else { panic!() };
            waits_ms.push((retry_at_ns - up_ns) / 1_000_000);
        }
        assert_eq!(waits_ms, [100, 200, 350, 350, 0, 100]);
        let mut reports = Vec::new();
        children.report_into(&mut reports);
        assert_eq!((reports[0].model_id.as_str(), reports[0].children.len()), ("custom/x", 1));
    }
}

//! What the broker counts in its life. Plain numbers of the one thread that decides; engines keep their own and send them
//! with their totals.

use super::Core;
use super::alerts::{Change, Figures};
use shm_layout::code::Code;
use shm_layout::wire::{
    Alert, BrokerMessage, CodeCount, DurationCounts, EngineMetrics, Level, MemoryReport, Metrics as Report,
};
use std::collections::BTreeMap;
use tracing::{info, warn};

/// Counters and durations.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    load: DurationCounts,
    access: DurationCounts,
    errors: BTreeMap<u16, u64>,
    sessions_peak: u64,
    leases_peak: u64,
    jobs_peak: u64,
    loads: u64,
    pub(super) load_failures: u64,
    pub(super) unloads: u64,
    pub(super) evictions: u64,
    pub(super) reloads: u64,
    /// What the present engine measured, as last told.
    pub(super) engine: EngineMetrics,
    /// What engines before it measured.
    before: EngineMetrics,
}

impl Metrics {
    /// A load ended well.
    pub(super) fn loaded(&mut self, load_us: u64) {
        self.loads += 1;
        self.load.add_us(load_us);
    }

    /// A lease was granted so long after it was asked for.
    pub(super) fn accessed(&mut self, access_us: u64) {
        self.access.add_us(access_us);
    }

    /// Counts what a client is told, where it is a refusal.
    pub(super) fn told(&mut self, message: &BrokerMessage) {
        if let BrokerMessage::Refused(refusal) = message {
            self.failed(refusal.code);
        }
    }

    /// Counts a refusal, or a job that was answered without an engine. Engines count what they answer.
    pub(super) fn failed(&mut self, code: Code) {
        if code != Code::Ok {
            *self.errors.entry(code as u16).or_default() += 1;
        }
    }

    /// Keeps what the engine that died had measured.
    pub(super) fn engine_gone(&mut self) {
        let gone = std::mem::take(&mut self.engine);
        self.before = sum(&self.before, &gone);
    }

    /// What all engines measured so far.
    pub(super) fn engines(&self) -> EngineMetrics {
        sum(&self.before, &self.engine)
    }
}

fn sum(a: &EngineMetrics, b: &EngineMetrics) -> EngineMetrics {
    let mut all = a.clone();
    all.queue.merge(&b.queue);
    all.execution.merge(&b.execution);
    for count in &b.errors {
        match all.errors.iter_mut().find(|known| known.code == count.code) {
            Some(known) => known.count = known.count.saturating_add(count.count),
            // Each code once: an engine names no more codes than there are.
            None => all.errors.push(*count),
        }
    }
    all
}

impl Core {
    /// Compares the figures with what was usual; tells what began and what ended.
    pub(super) fn look_for_alerts(&mut self, now_ns: u64) {
        if !self.alerts.is_due(now_ns) {
            return;
        }
        let engines = self.metrics.engines();
        let counted = engines.errors.iter().filter(|count| count.code != Code::Cancelled);
        let figures = Figures {
            jobs: engines.execution.total(),
            errors: counted.fold(0, |sum, count| sum.saturating_add(count.count)),
            execution: engines.execution,
            memory_bytes: self.held_bytes().saturating_add(self.cache_bytes()),
            budget_bytes: self.config.policy.memory_budget_bytes.filter(|_| self.config.memory_monitoring),
        };
        for change in self.alerts.look(now_ns, figures) {
            match change {
                Change::Raised(Alert { name, severity, message, .. }) => {
                    warn!(event = "alert", alert = name, severity, "{message}");
                }
                Change::Lowered(name) => info!(event = "alert.end", alert = name, "the alert is over"),
            }
        }
    }

    /// Notes how much there is of what changes with every event.
    pub(super) fn note_levels(&mut self) {
        let raise = |peak: &mut u64, now: usize| *peak = (*peak).max(now as u64);
        raise(&mut self.metrics.sessions_peak, self.sessions.len());
        raise(&mut self.metrics.leases_peak, self.leases.len());
        raise(&mut self.metrics.jobs_peak, self.relay.len());
    }

    /// The report; the I/O side adds what the system says of memory.
    pub(super) fn metrics_report(&self) -> Report {
        let metrics = &self.metrics;
        let engines = metrics.engines();
        let mut errors = engines.errors;
        for (number, count) in &metrics.errors {
            let Some(code) = Code::from_number(u32::from(*number)) else { continue };
            match errors.iter_mut().find(|known| known.code == code) {
                Some(known) => known.count = known.count.saturating_add(*count),
                None => errors.push(CodeCount { code, count: *count }),
            }
        }
        errors.sort_unstable_by_key(|count| count.code as u16);
        let saved = self.models.images.iter().fold(0u64, |sum, (generation, image)| {
            let others = self.leases.count_of(*generation).saturating_sub(1) as u64;
            sum.saturating_add(others.saturating_mul(image.description.image_bytes))
        });
        Report {
            load: metrics.load.clone(),
            access: metrics.access.clone(),
            queue: engines.queue,
            execution: engines.execution,
            errors,
            sessions: Level { now: self.sessions.len() as u64, peak: metrics.sessions_peak },
            leases: Level { now: self.leases.len() as u64, peak: metrics.leases_peak },
            jobs: Level { now: self.relay.len() as u64, peak: metrics.jobs_peak },
            loads: metrics.loads,
            load_failures: metrics.load_failures,
            unloads: metrics.unloads,
            evictions: metrics.evictions,
            reloads: metrics.reloads,
            memory: MemoryReport {
                image_bytes: self.held_bytes(),
                cache_bytes: self.cache_bytes(),
                saved_bytes: saved,
                budget_bytes: self.config.policy.memory_budget_bytes,
                available_bytes: self.memory.available_bytes,
            },
        }
    }
}

//! What `status --json` says of metrics, alerts and the details of a model. The whole of it is described by
//! docs/status.schema.json, which a test compares with what is printed.

use serde_json::{Value, json};
use shm_layout::wire::{
    Alert, DurationCounts, GenerationReport, Level, MemoryReport, Metrics, ModelReport, ModelState,
    StatusReport,
};
use std::collections::BTreeSet;

/// Durations as figures: how many, their sum, and upper bounds of their quantiles.
fn durations_json(durations: &DurationCounts) -> Value {
    json!({
        "count": durations.total(),
        "sum_us": durations.sum_us,
        "p50_us": durations.quantile_us(0.50),
        "p90_us": durations.quantile_us(0.90),
        "p99_us": durations.quantile_us(0.99),
        "log2_counts": durations.counts,
    })
}

fn level_json(level: Level) -> Value {
    json!({ "now": level.now, "peak": level.peak })
}

/// Proportional share (PSS) of a process, in bytes; `None` where it is not ours to read.
fn pss_bytes(pid: u32) -> Option<u64> {
    shm_os::smaps::process_memory(pid).ok().map(|memory| memory.pss_bytes)
}

/// What processes take is read here, not by the broker: walking their page tables takes milliseconds each.
fn memory_json(memory: &MemoryReport, report: &StatusReport) -> Value {
    let pids: BTreeSet<u32> = report.sessions.iter().map(|session| session.pid).collect();
    let shares: Vec<u64> = pids.into_iter().filter_map(pss_bytes).collect();
    json!({
        "image_bytes": memory.image_bytes,
        "cache_bytes": memory.cache_bytes,
        "saved_bytes": memory.saved_bytes,
        "budget_bytes": memory.budget_bytes,
        "available_bytes": memory.available_bytes,
        "broker_pss_bytes": pss_bytes(report.broker_pid),
        "engine_pss_bytes": report.engines.first().filter(|e| e.pid != 0).and_then(|e| pss_bytes(e.pid)),
        "sessions_pss_bytes": (!shares.is_empty()).then(|| shares.iter().sum::<u64>()),
    })
}

/// The broker's measurements.
pub(super) fn metrics_json(report: &StatusReport) -> Value {
    let metrics: &Metrics = &report.metrics;
    let errors: serde_json::Map<String, Value> =
        metrics.errors.iter().map(|error| (error.code.name().to_owned(), error.count.into())).collect();
    json!({
        "load": durations_json(&metrics.load),
        "access": durations_json(&metrics.access),
        "queue": durations_json(&metrics.queue),
        "execution": durations_json(&metrics.execution),
        "errors": errors,
        "sessions": level_json(metrics.sessions),
        "leases": level_json(metrics.leases),
        "socket_jobs": level_json(metrics.jobs),
        "loads": metrics.loads,
        "load_failures": metrics.load_failures,
        "unloads": metrics.unloads,
        "evictions": metrics.evictions,
        "reloads": metrics.reloads,
        "memory": memory_json(&metrics.memory, report),
    })
}

/// What has got worse.
pub(super) fn alerts_json(alerts: &[Alert]) -> Vec<Value> {
    let one = |alert: &Alert| {
        json!({
            "name": alert.name,
            "severity": alert.severity,
            "message": alert.message,
            "age_us": alert.age_us,
        })
    };
    alerts.iter().map(one).collect()
}

fn generation_json(generation: &GenerationReport) -> Value {
    json!({
        "generation": generation.generation,
        "image_bytes": generation.image_bytes,
        "backing": generation.backing.name(),
        "is_current": generation.is_current,
        "is_served": generation.is_served,
        "leases": generation.leases,
        "age_us": generation.age_us,
    })
}

/// Adds to a model's fields those of its detail, and the six by which other model managers know it.
pub(super) fn add_detail(fields: &mut Value, model: &ModelReport) {
    let detail = &model.detail;
    let is_loaded = model.state == ModelState::Ready;
    let image_bytes: u64 = detail.generations.iter().map(|generation| generation.image_bytes).sum();
    let cache_bytes = match (&model.cache, &model.description) {
        (Some(cache), Some(description)) => cache.entries * 4 * u64::from(description.output_dim),
        _ => 0,
    };
    let last_error = detail
        .last_error
        .as_ref()
        .map(|error| json!({ "code": error.code.name(), "message": error.message, "age_us": error.age_us }));
    let references: Vec<Value> =
        detail.references.iter().map(|one| json!({ "pid": one.pid, "count": one.count })).collect();
    let more = json!({
        "is_loaded": is_loaded,
        "model_name": model.model_id,
        "load_time": is_loaded.then_some(model.load_us as f64 / 1e6),
        "memory_usage": image_bytes + cache_bytes,
        "device": detail.device,
        "error_message": model.error,
        "ids": detail.ids,
        "kind": detail.kind,
        "source": detail.source,
        "device_wished": detail.device_wished,
        "precision": detail.precision,
        "pinned": detail.pinned,
        "reloading": detail.reloading,
        "last_error": last_error,
        "generations": detail.generations.iter().map(generation_json).collect::<Vec<_>>(),
        "references": references,
        "waiting": detail.waiting,
        "queued_jobs": detail.queued_jobs,
        "retry_after_ms": detail.retry_after_ms,
        "unload_in_us": detail.unload_in_us,
        "reloads": detail.reloads,
        "unloads": detail.unloads,
        "evictions": detail.evictions,
        "failures": detail.failures,
    });
    if let (Value::Object(fields), Value::Object(more)) = (fields, more) {
        fields.extend(more);
    }
}

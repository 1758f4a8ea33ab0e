//! `status`, `models`, `stop`: questions and orders to a broker that runs. None of them starts one.

use super::metrics_json::{add_detail, alerts_json, metrics_json};
use crate::args::{JsonArgs, StopArgs};
use crate::failure::Failure;
use crate::terminal::{bold, bytes, micros};
use serde_json::{Value, json};
use shm_layout::wire::{CacheReport, CacheTotals, EngineReport, ModelReport, ModelState, SessionReport};
use std::path::PathBuf;
use std::time::Duration;
use worker_sdk::{StartBroker, StatusReport};

fn report(socket: Option<PathBuf>, name: &str) -> Result<StatusReport, Failure> {
    let client = super::client(socket, name, Some(StartBroker::Never)).connect()?;
    Ok(client.status()?)
}

/// Prints the state of everything.
pub(super) fn status(socket: Option<PathBuf>, args: &JsonArgs) -> Result<(), Failure> {
    let report = report(socket, "status")?;
    if args.json {
        println!("{}", status_json(&report));
        return Ok(());
    }
    println!(
        "{} {}, process {}, up {}, default model {}",
        bold("broker"),
        report.version,
        report.broker_pid,
        micros(report.uptime_us),
        report.default_model
    );
    for model in &report.models {
        println!("{}", model_line(model));
        if let Some(cache) = &model.cache {
            println!("{}", cache_line(cache));
        }
    }
    for model in &report.provided {
        super::provided::lines(model).iter().for_each(|line| println!("{line}"));
    }
    for engine in &report.engines {
        println!(
            "{} process {}, {} threads, {} lanes, {} restarts; {} jobs, {} texts, {} tokens, {} errors, {} waiting",
            bold("engine"),
            engine.pid,
            engine.threads,
            engine.lanes,
            engine.restarts,
            engine.totals.jobs,
            engine.totals.texts,
            engine.totals.tokens,
            engine.totals.errors,
            engine.totals.queued_jobs
        );
    }
    for session in &report.sessions {
        println!(
            "{} {} process {}: {} leases, {} lanes, {} jobs on the socket, {}",
            bold("session"),
            session.client_name,
            session.pid,
            session.leases,
            session.lanes,
            session.socket_jobs,
            micros(session.age_us)
        );
    }
    for alert in &report.alerts {
        println!("{} {} {}: {}", bold("alert"), alert.severity, alert.name, alert.message);
    }
    if report.faults > 0 {
        println!("{} sessions were ended because their client broke the protocol", report.faults);
    }
    Ok(())
}

/// Prints the models that the broker knows.
pub(super) fn models(socket: Option<PathBuf>, args: &JsonArgs) -> Result<(), Failure> {
    let report = report(socket, "models")?;
    if args.json {
        println!("{}", json!({ "default": report.default_model, "models": models_json(&report.models) }));
        return Ok(());
    }
    if report.models.is_empty() {
        println!("no model has been asked for yet; the default is {}", report.default_model);
    }
    for model in &report.models {
        println!("{}", model_line(model));
    }
    Ok(())
}

/// Has the broker read its configuration again and says what changed.
pub(super) fn reload_config(socket: Option<PathBuf>, args: &JsonArgs) -> Result<(), Failure> {
    let client = super::client(socket, "reload-config", Some(StartBroker::Never)).connect()?;
    let what = client.reload_configuration()?;
    if args.json {
        println!("{}", json!({ "applied": what.applied, "pending": what.pending }));
        return Ok(());
    }
    if what.applied.is_empty() && what.pending.is_empty() {
        println!("nothing changed");
    }
    for line in &what.applied {
        println!("{} {line}", bold("applied"));
    }
    for line in &what.pending {
        println!("{} {line}", bold("not applied"));
    }
    Ok(())
}

/// Asks the broker to leave and waits until it is gone.
pub(super) fn stop(socket: Option<PathBuf>, args: &StopArgs) -> Result<(), Failure> {
    let client = super::client(socket, "stop", Some(StartBroker::Never)).connect()?;
    Ok(client.shutdown(Duration::from_secs(args.drain))?)
}

pub(super) fn state_name(state: ModelState) -> &'static str {
    match state {
        ModelState::Loading => "loading",
        ModelState::Ready => "ready",
        ModelState::Failed => "failed",
        ModelState::Unloaded => "unloaded",
    }
}

pub(super) fn model_line(model: &ModelReport) -> String {
    let what = match (&model.description, &model.error) {
        (Some(d), _) => format!(
            "{} dimensions, {} tokens at most, image {} ({}), loaded in {}, {} leases",
            d.output_dim,
            d.max_seq_tokens,
            bytes(d.image_bytes),
            d.backing.name(),
            micros(model.load_us),
            model.leases
        ),
        (None, Some(error)) => error.clone(),
        (None, None) => String::new(),
    };
    format!("{} {} {}: {what}", bold("model"), model.model_id, state_name(model.state))
}

fn status_json(report: &StatusReport) -> Value {
    json!({
        "version": report.version,
        "broker_pid": report.broker_pid,
        "boot_id": format!("{:016x}", report.boot_id),
        "uptime_us": report.uptime_us,
        "default_model": report.default_model,
        "models": models_json(&report.models),
        "engines": report.engines.iter().map(engine_json).collect::<Vec<_>>(),
        "sessions": report.sessions.iter().map(session_json).collect::<Vec<_>>(),
        "faults": report.faults,
        "open_descriptors": report.open_descriptors,
        "provided": report.provided.iter().map(super::provided::as_json).collect::<Vec<_>>(),
        "metrics": metrics_json(report),
        "alerts": alerts_json(&report.alerts),
    })
}

fn models_json(models: &[ModelReport]) -> Vec<Value> {
    models.iter().map(model_json).collect()
}

pub(super) fn model_json(model: &ModelReport) -> Value {
    let description = model.description.as_ref().map(|d| {
        json!({
            "generation": d.generation,
            "output_dim": d.output_dim,
            "max_seq_tokens": d.max_seq_tokens,
            "image_bytes": d.image_bytes,
            "fingerprint": format!("{:016x}", d.fingerprint),
            "content_hash": d.content_hash.iter().map(|b| format!("{b:02x}")).collect::<String>(),
            "backing": d.backing.name(),
        })
    });
    let mut fields = json!({
        "id": model.model_id,
        "state": state_name(model.state),
        "image": description,
        "load_us": model.load_us,
        "loads": model.loads,
        "leases": model.leases,
        "lease_pids": model.lease_pids,
        "idle_us": model.idle_us,
        "error": model.error,
        "cache": model.cache.as_ref().map(cache_json),
    });
    add_detail(&mut fields, model);
    fields
}

/// Texts that were found, of those that were asked for, in percent; `None` when none was.
fn hit_rate_percent(totals: &CacheTotals) -> Option<f64> {
    let hits = totals.client_hits as f64 + totals.engine_hits as f64;
    let asked = hits + totals.engine_misses as f64 + totals.shared as f64;
    (asked > 0.0).then(|| 100.0 * hits / asked)
}

fn cache_json(cache: &CacheReport) -> Value {
    let totals = &cache.totals;
    json!({
        "entries": cache.entries,
        "capacity": cache.capacity,
        "region_bytes": cache.region_bytes,
        "client_hits": totals.client_hits,
        "client_misses": totals.client_misses,
        "engine_hits": totals.engine_hits,
        "engine_misses": totals.engine_misses,
        "shared": totals.shared,
        "hit_rate_percent": hit_rate_percent(totals),
    })
}

fn cache_line(cache: &CacheReport) -> String {
    let totals = &cache.totals;
    let rate =
        hit_rate_percent(totals).map_or("nothing asked yet".to_owned(), |rate| format!("{rate:.1} % found"));
    format!(
        "{} {} of {} vectors, up to {}; {rate}: {} in clients, {} in the engine, {} computed, {} shared a computation",
        bold("cache"),
        cache.entries,
        cache.capacity,
        bytes(cache.region_bytes),
        totals.client_hits,
        totals.engine_hits,
        totals.engine_misses,
        totals.shared
    )
}

fn engine_json(engine: &EngineReport) -> Value {
    json!({
        "pid": engine.pid,
        "incarnation": engine.incarnation,
        "restarts": engine.restarts,
        "lanes": engine.lanes,
        "threads": engine.threads,
        "jobs": engine.totals.jobs,
        "texts": engine.totals.texts,
        "tokens": engine.totals.tokens,
        "errors": engine.totals.errors,
        "queued_jobs": engine.totals.queued_jobs,
    })
}

fn session_json(session: &SessionReport) -> Value {
    json!({
        "session_id": session.session_id,
        "pid": session.pid,
        "client_name": session.client_name,
        "leases": session.leases,
        "lanes": session.lanes,
        "socket_jobs": session.socket_jobs,
        "age_us": session.age_us,
    })
}

//! `model`: orders to a broker about models. None of them computes anything here.

use super::control::{model_json, model_line, state_name};
use crate::args::{ModelArgs, ModelCommand};
use crate::failure::{Exit, Failure};
use crate::terminal::{bold, bytes, micros};
use serde_json::json;
use shm_layout::wire::ModelReport;
use std::path::PathBuf;
use std::time::Duration;
use worker_sdk::{Client, StartBroker, UnloadMode};

/// Runs one order.
pub(super) fn run(socket: Option<PathBuf>, args: &ModelArgs) -> Result<(), Failure> {
    let client = super::client(socket, "model", Some(StartBroker::Never)).connect()?;
    match &args.command {
        ModelCommand::Load { id, timeout } => load(&client, &super::model_name(id), *timeout, args.json),
        ModelCommand::Unload { id, when_idle, force } => {
            let mode = match (when_idle, force) {
                (_, true) => UnloadMode::Force,
                (true, _) => UnloadMode::WhenIdle,
                _ => UnloadMode::IfIdle,
            };
            unload(&client, &super::model_name(id), mode, args.json)
        }
        ModelCommand::Reload { id, timeout } => reload(&client, &super::model_name(id), *timeout, args.json),
        ModelCommand::Health { id, timeout } => health(&client, &super::model_name(id), *timeout, args.json),
        ModelCommand::List { id } => list(&client, id.as_deref(), args.json),
    }
}

fn micros_of(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn load(client: &Client, id: &str, timeout: u64, json: bool) -> Result<(), Failure> {
    let loaded = client.load_model(id, Duration::from_secs(timeout))?;
    let load_us = micros_of(loaded.load_time);
    if json {
        println!(
            "{}",
            json!({
                "id": loaded.description.model_id,
                "generation": loaded.description.generation,
                "image_bytes": loaded.description.image_bytes,
                "load_us": load_us,
                "was_loaded": loaded.was_loaded,
            })
        );
    } else {
        let when = if loaded.was_loaded { "was loaded before" } else { "loaded" };
        println!(
            "{} {}: {when} in {}, image {}",
            bold("model"),
            loaded.description.model_id,
            micros(load_us),
            bytes(loaded.description.image_bytes)
        );
    }
    Ok(())
}

fn unload(client: &Client, id: &str, mode: UnloadMode, json: bool) -> Result<(), Failure> {
    let unloaded = client.unload_model(id, mode)?;
    if json {
        println!(
            "{}",
            json!({
                "id": unloaded.model_id,
                "freed_bytes": unloaded.freed_bytes,
                "pending": unloaded.pending,
            })
        );
        return Ok(());
    }
    let what = match (unloaded.pending, mode, unloaded.freed_bytes) {
        (true, UnloadMode::Force, _) => {
            "forgotten; its memory comes back when those who hold it let go of it".into()
        }
        (true, ..) => "will be unloaded as soon as nobody uses it".into(),
        (false, _, 0) => "was not loaded".into(),
        (false, _, freed) => format!("unloaded, {} given back", bytes(freed)),
    };
    println!("{} {}: {what}", bold("model"), unloaded.model_id);
    Ok(())
}

fn reload(client: &Client, id: &str, timeout: u64, json: bool) -> Result<(), Failure> {
    let reloaded = client.reload_model(id, Duration::from_secs(timeout))?;
    let load_us = micros_of(reloaded.load_time);
    if json {
        println!(
            "{}",
            json!({
                "id": reloaded.description.model_id,
                "generation": reloaded.description.generation,
                "replaced": reloaded.replaced,
                "load_us": load_us,
            })
        );
    } else {
        let before = reloaded.replaced.map_or("nothing".to_owned(), |g| format!("generation {g}"));
        println!(
            "{} {}: generation {} in place of {before}, loaded in {}",
            bold("model"),
            reloaded.description.model_id,
            reloaded.description.generation,
            micros(load_us)
        );
    }
    Ok(())
}

fn health(client: &Client, id: &str, timeout: u64, json: bool) -> Result<(), Failure> {
    let healthy = client.model_health(id, Duration::from_secs(timeout))?;
    let probe_us = micros_of(healthy.probe_time);
    if json {
        println!(
            "{}",
            json!({
                "id": healthy.description.model_id,
                "generation": healthy.description.generation,
                "healthy": true,
                "probe_us": probe_us,
                "engine_pid": healthy.engine_pid,
            })
        );
    } else {
        println!(
            "{} {}: computes what it should, in {}, engine process {}",
            bold("model"),
            healthy.description.model_id,
            micros(probe_us),
            healthy.engine_pid
        );
    }
    Ok(())
}

fn list(client: &Client, id: Option<&str>, json: bool) -> Result<(), Failure> {
    let report = client.status()?;
    let is_meant = |model: &&ModelReport| {
        id.is_none_or(|id| {
            model.model_id == id
                || model.detail.source == id
                || model.detail.ids.iter().any(|known| known == id)
        })
    };
    let models: Vec<&ModelReport> = report.models.iter().filter(is_meant).collect();
    if let (Some(id), true) = (id, models.is_empty()) {
        let message =
            format!("the broker knows no model {id}; `modelbroker model list` shows those that it knows");
        return Err(Failure::new(Exit::Model, message));
    }
    if json {
        let models: Vec<_> = models.into_iter().map(model_json).collect();
        println!("{}", json!({ "default": report.default_model, "models": models }));
        return Ok(());
    }
    for model in models {
        println!("{}", model_line(model));
        let detail = &model.detail;
        let mut facts = Vec::new();
        if !detail.ids.is_empty() {
            facts.push(format!("configured as {}", detail.ids.join(", ")));
        }
        facts.push(format!("device {}", detail.device));
        if detail.pinned {
            facts.push("kept loaded".into());
        }
        if detail.reloading {
            facts.push("being reloaded".into());
        }
        if let Some(left_us) = detail.unload_in_us {
            facts.push(format!("idle, unloaded in {}", micros(left_us)));
        }
        for reference in &detail.references {
            facts.push(format!("process {} holds {}", reference.pid, reference.count));
        }
        if let Some(error) = &detail.last_error {
            facts.push(format!("last error {} ago: {}: {}", micros(error.age_us), error.code, error.message));
        }
        println!("  {}: {}", state_name(model.state), facts.join("; "));
    }
    Ok(())
}

//! `mixed`: somebody asks for single texts while others index in bulk as fast as they can; each alone and both together,
//! in phases that alternate. Clients are processes of `modelbroker load`; the same is asked of infinity where it is there.

use crate::fixture::{self, Broker};
use crate::infinity::{self, Infinity};
use crate::lane::Rates;
use crate::report::{Report, Table, rounded, short};
use crate::samples::{Samples, Summary};
use crate::{machine, python, texts};
use anyhow::{Context, ensure};
use engine::compile::Precision;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Aimed at: 99th percentile of a text beside bulk, by the median of one when idle.
const GOAL_LATENCY: f64 = 3.0;
/// Aimed at: share of the bulk rate that is left beside interactive texts, at least.
const GOAL_BULK: f64 = 0.9;
/// Seed of the first phase's texts; each phase has another.
const FIRST_SEED: u64 = 1000;
/// Phases of infinity beside bulk last so many times as long as ours: it answers few texts.
const INFINITY_PHASES: u32 = 3;
/// Characters of what a failed load said that are passed on, at most.
const MAX_SAID_CHARS: usize = 500;

/// Arguments of `mixed`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Rounds; each has a phase when idle, one of bulk alone, and one of both.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a phase.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    phase: f64,
    /// Tokens of a text that somebody waits for.
    #[arg(long, default_value_t = 16)]
    tokens: usize,
    /// Single texts a second, at uneven distances; 0 = one after the other.
    #[arg(long, value_name = "PER_SECOND", default_value_t = 20.0)]
    rate: f64,
    /// Tokens of a text that is indexed.
    #[arg(long, default_value_t = 128)]
    bulk_tokens: usize,
    /// Processes that index.
    #[arg(long, default_value_t = 4)]
    bulk_clients: usize,
    /// Texts of a bulk request.
    #[arg(long, default_value_t = 32)]
    bulk_batch: usize,
    /// What ours computes in.
    #[arg(long, default_value = "f32", value_parser = fixture::precision)]
    precision: Precision,
    /// Compute threads [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    python: python::Arguments,
}

/// Who asks in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    BulkAlone,
    Both,
}

/// What one server showed.
#[derive(Debug)]
struct Found {
    idle: Samples,
    loaded: Samples,
    bulk_alone: Vec<f64>,
    bulk_mixed: Vec<f64>,
}

impl Found {
    fn new() -> Found {
        Found { idle: Samples::new(), loaded: Samples::new(), bulk_alone: Vec::new(), bulk_mixed: Vec::new() }
    }
}

/// The same, summed up; what was not measured is not there.
#[derive(Debug, Clone, Copy)]
struct Figures {
    idle: Option<Summary>,
    loaded: Option<Summary>,
    bulk_alone: Option<Rates>,
    bulk_mixed: Option<Rates>,
}

impl Figures {
    fn of(found: Found) -> Figures {
        Figures {
            idle: found.idle.summary(),
            loaded: found.loaded.summary(),
            bulk_alone: Rates::of(found.bulk_alone),
            bulk_mixed: Rates::of(found.bulk_mixed),
        }
    }

    /// The keys that programs read.
    fn to_json(self) -> Map<String, Value> {
        let ms = |us: f64| rounded(us / 1e3);
        let mut object = Map::new();
        for (name, summary) in [("idle", self.idle), ("loaded", self.loaded)] {
            object.insert(format!("{name}_p50_ms"), json!(summary.map(|s| ms(s.p50_us))));
            object.insert(format!("{name}_p99_ms"), json!(summary.map(|s| ms(s.p99_us))));
            let spread = summary.map(|s| [ms(s.spread_us.0), ms(s.spread_us.1)]);
            object.insert(format!("{name}_p50_spread_ms"), json!(spread));
            object.insert(format!("{name}_texts"), json!(summary.map(|s| s.count)));
        }
        for (name, rates) in [("bulk_alone", self.bulk_alone), ("bulk_mixed", self.bulk_mixed)] {
            object.insert(format!("{name}_tps"), json!(rates.map(|r| rounded(r.median))));
            let spread = rates.map(|r| [rounded(r.low), rounded(r.high)]);
            object.insert(format!("{name}_spread_tps"), json!(spread));
        }
        object
    }

    fn cells(self, who: String) -> Vec<String> {
        let latency = |summary: Option<Summary>| {
            summary.map_or("-".into(), |s| {
                let ms = |us: f64| short(us / 1e3);
                let spread = format!("{}-{}", ms(s.spread_us.0), ms(s.spread_us.1));
                format!("{} / {} ({spread})", ms(s.p50_us), ms(s.p99_us))
            })
        };
        let rate = |rates: Option<Rates>| {
            rates.map_or("-".into(), |r| format!("{} ({}-{})", short(r.median), short(r.low), short(r.high)))
        };
        vec![who, latency(self.idle), latency(self.loaded), rate(self.bulk_alone), rate(self.bulk_mixed)]
    }

    /// (p99 beside bulk / idle p50, bulk alone / bulk beside interactive).
    fn ratios(self) -> (Option<f64>, Option<f64>) {
        let latency = self.loaded.zip(self.idle).map(|(loaded, idle)| loaded.p99_us / idle.p50_us);
        let bulk = self.bulk_alone.zip(self.bulk_mixed).map(|(alone, mixed)| alone.median / mixed.median);
        (latency, bulk)
    }
}

/// Runs the bench.
///
/// # Errors
/// When the model cannot be loaded, or a request failed or was lost.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(arguments.rounds > 0 && arguments.bulk_clients > 0, "rounds and bulk clients must be at least 1");
    ensure!(arguments.bulk_batch > 0, "--bulk-batch must be at least 1");
    let phase = Duration::try_from_secs_f64(arguments.phase).context("--phase is no length of time")?;
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => machine::allowed_cores()?.len(),
    };
    let folder = fixture::small_model_folder()?;
    let name = folder.to_str().context("the model folder's name is not UTF-8")?;
    let broker = Broker::start(threads)?;
    let named = format!("{name}:{}", arguments.precision.name());
    let held = broker.load(&named)?;
    held.embed(&["a first text"])?;

    let mut remarks = Vec::new();
    let server = match arguments.python.find()?.as_deref().and_then(infinity::python) {
        Some(python) => match Infinity::start(&python, name, threads) {
            Ok(server) => Some(server),
            Err(why) => {
                remarks.push(format!("infinity was not measured: {why:#}"));
                None
            }
        },
        None => {
            remarks.push("infinity was not measured: it is not installed (benches/peers/install.sh)".into());
            None
        }
    };

    let mut ours = Found::new();
    let mut theirs = Found::new();
    let mut seed = FIRST_SEED;
    for round in 0..arguments.rounds {
        for phase in [Phase::Idle, Phase::BulkAlone, Phase::Both] {
            seed += 1;
            load(arguments, &broker, &named, phase, seed, &mut ours)?;
        }
        // Its answers come slowly, so its turn is long and comes once, in the middle.
        if let Some(server) = &server
            && round == arguments.rounds / 2
        {
            let singles = &mut texts::Texts::new(arguments.tokens);
            ask_infinity(arguments, server, Phase::Idle, phase, singles, &mut theirs)?;
            let long = phase * INFINITY_PHASES;
            ask_infinity(arguments, server, Phase::Both, long, singles, &mut theirs)?;
        }
    }
    if let Some(server) = server {
        remarks.push(format!(
            "infinity: {}; f32 with its torch engine over HTTP, one turn in the middle of the run: {} single texts beside \
             bulk",
            server.versions,
            theirs.loaded.summary().map_or(0, |summary| summary.count)
        ));
        return Ok(report(arguments, threads, Figures::of(ours), Some(Figures::of(theirs)), remarks));
    }
    Ok(report(arguments, threads, Figures::of(ours), None, remarks))
}

/// What is read of the JSON that `modelbroker load` prints.
#[derive(Debug, Deserialize)]
struct Loaded {
    errors: u64,
    lost: u64,
    clients_failed: u64,
    interactive: Class,
    bulk: Class,
}

#[derive(Debug, Deserialize)]
struct Class {
    steady_texts_per_s: f64,
    latency_us: Vec<(u64, u64)>,
}

fn load(
    arguments: &Arguments,
    broker: &Broker,
    model: &str,
    phase: Phase,
    seed: u64,
    found: &mut Found,
) -> anyhow::Result<()> {
    let (clients, bulk) = match phase {
        Phase::Idle => (1, 0.0),
        Phase::BulkAlone => (arguments.bulk_clients, 1.0),
        Phase::Both => {
            let clients = arguments.bulk_clients + 1;
            (clients, arguments.bulk_clients as f64 / clients as f64)
        }
    };
    let mut command = Command::new(broker.program());
    command.arg("--socket").arg(broker.socket()).args(["load", "--json", "--histogram", "--no-repeat"]);
    command.args(["--model", model]);
    for (option, value) in [
        ("--clients", clients.to_string()),
        ("--bulk", bulk.to_string()),
        ("--duration", arguments.phase.to_string()),
        ("--tokens", arguments.tokens.to_string()),
        ("--bulk-tokens", arguments.bulk_tokens.to_string()),
        ("--bulk-batch", arguments.bulk_batch.to_string()),
        ("--seed", seed.to_string()),
    ] {
        command.args([option, &value]);
    }
    if arguments.rate > 0.0 {
        command.args(["--rate", &arguments.rate.to_string()]);
    }
    let output = command.output().context("running modelbroker load")?;
    let said =
        || -> String { String::from_utf8_lossy(&output.stderr).chars().take(MAX_SAID_CHARS).collect() };
    ensure!(output.status.success(), "modelbroker load failed: {}: {}", output.status, said());
    let loaded: Loaded = serde_json::from_slice(&output.stdout).context("what modelbroker load prints")?;
    ensure!(
        (loaded.errors, loaded.lost, loaded.clients_failed) == (0, 0, 0),
        "{} requests failed, {} were lost, {} clients failed",
        loaded.errors,
        loaded.lost,
        loaded.clients_failed
    );
    let samples = if phase == Phase::Idle { &mut found.idle } else { &mut found.loaded };
    for (us, count) in loaded.interactive.latency_us {
        samples.record_many(Duration::from_micros(us), count);
    }
    samples.end_block();
    match phase {
        Phase::Idle => {}
        Phase::BulkAlone => found.bulk_alone.push(loaded.bulk.steady_texts_per_s),
        Phase::Both => found.bulk_mixed.push(loaded.bulk.steady_texts_per_s),
    }
    Ok(())
}

/// The same of infinity: each client is a connection of this process, which does nothing but wait.
fn ask_infinity(
    arguments: &Arguments,
    server: &Infinity,
    phase: Phase,
    duration: Duration,
    singles: &mut texts::Texts,
    found: &mut Found,
) -> anyhow::Result<()> {
    let end = Instant::now() + duration;
    let bulk_clients = if phase == Phase::Both { arguments.bulk_clients } else { 0 };
    let make = Mutex::new(texts::Texts::new(arguments.bulk_tokens));
    let batch = || -> Vec<String> {
        let mut make = make.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (0..arguments.bulk_batch).map(|_| make.next()).collect()
    };
    let samples = if phase == Phase::Idle { &mut found.idle } else { &mut found.loaded };
    let texts_done = std::thread::scope(|scope| -> anyhow::Result<f64> {
        let index = || -> anyhow::Result<f64> {
            let connection = server.connect();
            let mut done = 0.0;
            while Instant::now() < end {
                let begun = Instant::now();
                let texts = connection.embed(&batch())?.len() as f64;
                // As `modelbroker load` counts: what goes beyond the end counts by its share before it.
                let left = end.saturating_duration_since(begun).as_secs_f64();
                done += texts * (left / begun.elapsed().as_secs_f64()).min(1.0);
            }
            Ok(done)
        };
        let indexing: Vec<_> = (0..bulk_clients).map(|_| scope.spawn(index)).collect();
        let connection = server.connect();
        let mut due = Instant::now();
        while Instant::now() < end {
            let mut begun = Instant::now();
            if arguments.rate > 0.0 {
                due += Duration::from_secs_f64(1.0 / arguments.rate);
                if due >= end {
                    break;
                }
                std::thread::sleep(due.saturating_duration_since(begun));
                begun = due;
            }
            connection.embed(&[singles.next()])?;
            samples.record(begun.elapsed());
        }
        let mut done = 0.0;
        for thread in indexing {
            done += thread.join().map_err(|_| anyhow::anyhow!("a client of infinity panicked"))??;
        }
        Ok(done)
    })?;
    samples.end_block();
    if bulk_clients > 0 {
        found.bulk_mixed.push(texts_done / duration.as_secs_f64());
    }
    Ok(())
}

fn report(
    arguments: &Arguments,
    threads: usize,
    ours: Figures,
    theirs: Option<Figures>,
    remarks: Vec<String>,
) -> Report {
    let mut report = Report::new("mixed");
    let precision = arguments.precision.name();
    report.figure("threads", threads);
    report.figure("precision", precision);
    report.figure("tokens", arguments.tokens);
    report.figure("bulk_tokens", arguments.bulk_tokens);
    report.figure("bulk_clients", arguments.bulk_clients);
    report.figure("bulk_batch", arguments.bulk_batch);
    ours.to_json().into_iter().for_each(|(key, value)| report.figure(key, value));
    report.figure("infinity", json!(theirs.map(Figures::to_json)));
    let mut table = Table::new(
        format!(
            "Single texts of {} tokens: p50 / p99 ms (spread of p50); bulk texts of {} tokens a second: median (spread)",
            arguments.tokens, arguments.bulk_tokens
        ),
        &["who", "single, idle", "single, beside bulk", "bulk alone", "bulk beside singles"],
    );
    table.row(ours.cells(format!("modelbroker {precision}")));
    if let Some(theirs) = theirs {
        table.row(theirs.cells("infinity f32".into()));
    }
    report.table(table);
    let (latency, bulk) = ours.ratios();
    let conditions = format!("{} and {} tokens, {precision}", arguments.tokens, arguments.bulk_tokens);
    report.goal(
        format!("p99 beside bulk / p50 when idle, one text; {conditions}"),
        latency.map(rounded),
        GOAL_LATENCY,
    );
    report.goal(
        format!("bulk alone / bulk beside single texts, texts a second; {conditions}"),
        bulk.map(rounded),
        1.0 / GOAL_BULK,
    );
    let pace = match arguments.rate {
        rate if rate > 0.0 => format!("{rate} texts a second, timed from when each was due"),
        _ => "one text after the other".to_owned(),
    };
    report.remark(format!(
        "bulk: {} processes, each with one request of {} texts after the other; single: one process, {pace}; no text twice",
        arguments.bulk_clients, arguments.bulk_batch
    ));
    remarks.into_iter().for_each(|remark| report.remark(remark));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_stable_keys_and_ratios_need_both_sides() {
        let mut found = Found::new();
        for (samples, ms) in [(&mut found.idle, 2), (&mut found.loaded, 5)] {
            samples.record_many(Duration::from_millis(ms), 100);
            samples.end_block();
        }
        found.bulk_alone = vec![100.0, 110.0, 90.0];
        let figures = Figures::of(found);
        let (latency, bulk) = figures.ratios();
        assert!((latency.unwrap() - 2.5).abs() < 0.01 && bulk.is_none());
        let object = figures.to_json();
        for key in ["idle_p50_ms", "idle_p99_ms", "loaded_p50_ms", "loaded_p99_ms", "bulk_alone_tps"] {
            assert!(object[key].as_f64().is_some(), "{key} in {object:?}");
        }
        assert!(object["bulk_mixed_tps"].is_null());
        assert_eq!(figures.cells("x".into())[4], "-");
    }
}

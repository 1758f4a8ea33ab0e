//! `managers`: a library that builds many embedding managers. Twenty in one process, one after the other and from ten threads
//! at once, and in twenty processes; beside as many SentenceTransformer loads in one process, in the same run.

use crate::fixture::{self, Broker};
use crate::report::{Report, Table, rounded, short};
use crate::worker::{Mode, Worker};
use crate::{machine, python};
use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::json;
use shm_os::smaps::process_memory;
use std::path::Path;
use std::time::Instant;
use worker_sdk::{Embeddings, Model};

/// Threads that build managers at once.
const THREADS: usize = 10;
/// How far a peer's number may be from ours: both compute in single precision.
const SAME_WITHIN: f32 = 1e-5;
const GOAL_ALL_MS: f64 = 1000.0;
const GOAL_LATER_MS: f64 = 1.0;

/// Arguments of `managers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Managers, and processes.
    #[arg(long, default_value_t = 20)]
    managers: usize,
    #[command(flatten)]
    python: python::Arguments,
}

/// What the peer's script says.
#[derive(Debug, Clone, Deserialize)]
struct PeerSaid {
    import_s: f64,
    each_s: Vec<f64>,
    total_s: f64,
    private_bytes: u64,
    first: Vec<f32>,
}

/// One way to get all managers.
struct Way {
    what: String,
    key: &'static str,
    total_ms: f64,
    first_ms: f64,
    /// Median of all but the first.
    later_ms: f64,
    loads: u32,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Runs the bench.
///
/// # Errors
/// When a process fails, or a manager gives another vector than the others.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let count = arguments.managers;
    ensure!(count >= 2, "--managers must be at least 2");
    let threads = machine::allowed_cores()?.len();
    let peer = arguments.python.find()?;
    let folder = fixture::small_model_folder()?;
    let model = folder.to_str().context("the model folder's name is not UTF-8")?;
    let mut vectors = Vec::new();
    let mut ways =
        vec![in_line(count, threads, model, &mut vectors)?, at_once(threads, model, &mut vectors)?];
    ways.push(in_processes(count, threads, model)?);
    let memory_bytes = process_memory(std::process::id())?.private_bytes();
    let reference = vectors.first().context("no vector")?.clone();
    ensure!(
        vectors.iter().all(|rows| rows.values() == reference.values()),
        "managers gave different vectors"
    );
    let theirs = match &peer {
        Some(python) => Some((python::versions(python)?, measure_peer(python, model, count, threads)?)),
        None => None,
    };
    if let Some((_, said)) = &theirs {
        let differs = said.first.iter().zip(&reference[0]).any(|(a, b)| (a - b).abs() > SAME_WITHIN);
        ensure!(!differs, "the peer's vector is another one");
    }
    Ok(report(count, &ways, vectors.len(), memory_bytes, theirs))
}

/// A manager as the library makes it: a connection of its own, the model, and one text, so that it is known to work.
fn manager(broker: &Broker, model: &str) -> anyhow::Result<(f64, Model)> {
    let start = Instant::now();
    let model = broker.connect()?.model(model)?;
    Ok((start.elapsed().as_secs_f64() * 1e3, model))
}

fn loads(broker: &Broker) -> anyhow::Result<u32> {
    Ok(broker.connect()?.status()?.models.iter().map(|model| model.loads).sum())
}

fn vector(model: &Model) -> anyhow::Result<Embeddings> {
    Ok(model.embed_with(&["the same text"], &fixture::single_options())?)
}

/// A broker that has compiled the model before, as it is after the machine's first use of it, but has not loaded it.
fn warm_broker(threads: usize, model: &str) -> anyhow::Result<Broker> {
    let broker = Broker::start_again(Broker::new_folder()?, threads)?;
    drop(broker.load(model)?);
    Broker::start_again(broker.stop()?, threads)
}

fn in_line(count: usize, threads: usize, model: &str, vectors: &mut Vec<Embeddings>) -> anyhow::Result<Way> {
    let broker = warm_broker(threads, model)?;
    let (mut each, mut held) = (Vec::new(), Vec::new());
    let start = Instant::now();
    for _ in 0..count {
        let (ms, model) = manager(&broker, model)?;
        each.push(ms);
        held.push(model);
    }
    let total_ms = start.elapsed().as_secs_f64() * 1e3;
    for model in &held {
        vectors.push(vector(model)?);
    }
    let first_ms = each.remove(0);
    Ok(Way {
        what: format!("{count} managers in one process, one after the other"),
        key: "in_line",
        total_ms,
        first_ms,
        later_ms: median(each),
        loads: loads(&broker)?,
    })
}

fn at_once(threads: usize, model: &str, vectors: &mut Vec<Embeddings>) -> anyhow::Result<Way> {
    let broker = warm_broker(threads, model)?;
    let start = Instant::now();
    let made: Vec<anyhow::Result<(f64, Embeddings)>> = std::thread::scope(|scope| {
        let all: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| {
                    let (ms, model) = manager(&broker, model)?;
                    Ok((ms, vector(&model)?))
                })
            })
            .collect();
        let joined = all
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))));
        joined.collect()
    });
    let total_ms = start.elapsed().as_secs_f64() * 1e3;
    let mut each = Vec::new();
    for one in made {
        let (ms, rows) = one?;
        each.push(ms);
        vectors.push(rows);
    }
    each.sort_by(f64::total_cmp);
    Ok(Way {
        what: format!("{THREADS} managers from {THREADS} threads at once, one text each"),
        key: "at_once",
        total_ms,
        first_ms: each.first().copied().unwrap_or_default(),
        later_ms: median(each),
        loads: loads(&broker)?,
    })
}

fn in_processes(count: usize, threads: usize, model: &str) -> anyhow::Result<Way> {
    let broker = warm_broker(threads, model)?;
    let start = Instant::now();
    let mut workers = Vec::with_capacity(count);
    for _ in 0..count {
        workers.push(Worker::start(Mode::Thin, broker.socket(), model, 0)?);
    }
    let mut each = Vec::new();
    for worker in &mut workers {
        each.push(worker.ready()?.steps.total_us() / 1e3);
    }
    let total_ms = start.elapsed().as_secs_f64() * 1e3;
    each.sort_by(f64::total_cmp);
    Ok(Way {
        what: format!("{count} processes at once, their start counted"),
        key: "processes",
        total_ms,
        first_ms: each.first().copied().unwrap_or_default(),
        later_ms: median(each),
        loads: loads(&broker)?,
    })
}

fn measure_peer(python: &Path, model: &str, count: usize, threads: usize) -> anyhow::Result<PeerSaid> {
    // Once beforehand, so that Python's and the model's files are in memory.
    drop(python::start(python, "st_managers.py", &[model, "1"], threads)?.line()?);
    let mut worker = python::start(python, "st_managers.py", &[model, &count.to_string()], threads)?;
    serde_json::from_str(&worker.line()?).context("what st_managers.py says")
}

fn report(
    count: usize,
    ways: &[Way],
    vectors: usize,
    memory_bytes: u64,
    theirs: Option<(String, PeerSaid)>,
) -> Report {
    let mut report = Report::new("managers");
    let mut table = Table::new(
        format!("{count} embedding managers: ms"),
        &["what", "all", "first (it waits for the load)", "later ones, median", "loads of the model"],
    );
    report.figure("managers", count);
    for way in ways {
        report.figure(
            way.key,
            json!({"total_ms": rounded(way.total_ms), "first_ms": rounded(way.first_ms),
                   "later_p50_ms": rounded(way.later_ms), "loads": way.loads}),
        );
        // Those that are built at once all wait for the one load.
        let (first, later) = match way.key {
            "in_line" => (short(way.first_ms), short(way.later_ms)),
            _ => ("-".into(), format!("{} (all)", short(way.later_ms))),
        };
        table.row(vec![way.what.clone(), short(way.total_ms), first, later, way.loads.to_string()]);
        report.goal(format!("loads, {}", way.what), Some(f64::from(way.loads)), 1.0);
    }
    if let Some(way) = ways.first() {
        report.goal(format!("ms, {}", way.what), Some(rounded(way.total_ms)), GOAL_ALL_MS);
        report.goal("ms, a later manager", Some(rounded(way.later_ms)), GOAL_LATER_MS);
    }
    report.figure("equal_vectors", vectors);
    report.figure("own_private_bytes", memory_bytes);
    match theirs {
        Some((versions, said)) => {
            let later = median(said.each_s.iter().skip(1).map(|s| s * 1e3).collect());
            let first = said.each_s.first().copied().unwrap_or_default() * 1e3;
            table.row(vec![
                format!("{count} x SentenceTransformer in one process"),
                short(said.total_s * 1e3),
                short(first),
                short(later),
                count.to_string(),
            ]);
            report.figure(
                "sentence_transformers",
                json!({"total_ms": rounded(said.total_s * 1e3), "first_ms": rounded(first), "later_p50_ms": rounded(later),
                       "import_ms": rounded(said.import_s * 1e3), "private_bytes": said.private_bytes, "versions": versions}),
            );
            report.remark(format!(
                "sentence-transformers: {versions}; importing it took another {} ms; {:.0} MB private with all {count}, ours {:.0} MB",
                short(said.import_s * 1e3),
                said.private_bytes as f64 / 1e6,
                memory_bytes as f64 / 1e6
            ));
        }
        None => report.remark(
            "sentence-transformers was not measured: no Python that has it (benches/peers/install.sh)",
        ),
    }
    report.table(table);
    report.remark(format!(
        "{vectors} managers gave the same vector bit for bit; each broker had the model compiled, not loaded"
    ));
    report
}

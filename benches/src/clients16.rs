//! `clients16`: sixteen processes that each have a list of texts to embed: through one broker, each for itself on the
//! attached model, and each with a private copy in sentence-transformers. From the first start to the last being done,
//! and the memory that all hold together then.

use crate::fixture::{self, Broker};
use crate::report::{Report, Table, rounded, short};
use crate::worker::{Mode, Worker};
use crate::{machine, python, texts};
use anyhow::{Context, ensure};
use engine::compile::Precision;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shm_os::smaps;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Processes, at most; each of a peer's holds half a gigabyte.
const MAX_CLIENTS: usize = 64;
/// Aimed at: seconds of ours by those of private copies.
const GOAL_SECONDS: f64 = 1.0;
/// Aimed at: memory of ours by that of private copies.
const GOAL_MEMORY: f64 = 1.0 / 12.0;
/// Texts that a peer computes at once: its own default.
const PEER_BATCH: usize = 32;
/// Largest difference of a component that passes for the same vector in f32.
const SAME_WITHIN: f32 = 1e-4;
/// Bytes in the MB that are reported.
const MB: f64 = 1e6;

/// Arguments of `clients16`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Client processes.
    #[arg(long, default_value_t = 16)]
    clients: usize,
    /// Texts of each.
    #[arg(long, default_value_t = 64)]
    texts: usize,
    /// Tokens of a text.
    #[arg(long, default_value_t = 128)]
    tokens: usize,
    /// What ours computes in.
    #[arg(long, default_value = "f32", value_parser = fixture::precision)]
    precision: Precision,
    /// Compute threads of the engine, and of each process that computes itself [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    python: python::Arguments,
}

/// What a client process says when its texts are embedded.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Done {
    /// From the start of the program until it could embed, s.
    pub(crate) ready_s: f64,
    /// Its texts, s.
    pub(crate) embed_s: f64,
    /// The vector of its first text.
    pub(crate) first: Vec<f32>,
}

/// One kind of clients, measured.
struct Row {
    name: &'static str,
    /// Starting the broker and compiling the model, before the first client; 0 without one.
    broker_s: f64,
    /// From the first start of a client to the last being done.
    clients_s: f64,
    /// Mean over the clients.
    ready_s: f64,
    /// All processes together when all are done: each page counted once.
    pss_bytes: u64,
    /// What one client holds for itself, median.
    private_bytes: u64,
    /// The first vector of each client.
    first: Vec<Vec<f32>>,
}

impl Row {
    fn total_s(&self) -> f64 {
        self.broker_s + self.clients_s
    }
}

/// Runs the bench.
///
/// # Errors
/// When a process fails, or ours and theirs give different vectors.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(
        (1..=MAX_CLIENTS).contains(&arguments.clients) && arguments.texts > 0,
        "--clients must be from 1 to {MAX_CLIENTS}, --texts at least 1"
    );
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => machine::allowed_cores()?.len(),
    };
    let python = arguments.python.find()?;
    let folder = fixture::small_model_folder()?;
    let model = folder.to_str().context("the model folder's name is not UTF-8")?;
    let files = tempfile::tempdir().context("making a folder for the texts")?;
    let mut make = texts::Texts::new(arguments.tokens);
    let lists: Vec<PathBuf> = (0..arguments.clients)
        .map(|number| {
            let texts: Vec<String> = (0..arguments.texts).map(|_| make.next()).collect();
            let file = files.path().join(format!("{number}.json"));
            std::fs::write(&file, serde_json::to_vec(&texts)?).context("writing the texts")?;
            Ok(file)
        })
        .collect::<anyhow::Result<_>>()?;

    let mut rows = Vec::new();
    for (name, mode) in [("lane", Mode::Thin), ("attached", Mode::Attached)] {
        rows.push(through_broker(name, mode, model, arguments.precision, &lists, threads)?);
    }
    let versions = match &python {
        Some(python) => {
            // Once beforehand, so that Python's and the model's files are in memory for all.
            drop(python::start(python, "st_load.py", &[model], threads)?.line()?);
            let start = |list: &Path| {
                let list = list.to_str().context("the temporary folder's name is not UTF-8")?;
                python::start(python, "st_client.py", &[model, list, &PEER_BATCH.to_string()], threads)
            };
            rows.push(measure("sentence_transformers", &lists, start, &[])?);
            if arguments.precision == Precision::F32 {
                same_work(&rows)?;
            }
            Some(python::versions(python)?)
        }
        None => None,
    };
    Ok(report(arguments, threads, &rows, versions))
}

fn through_broker(
    name: &'static str,
    mode: Mode,
    model: &str,
    precision: Precision,
    lists: &[PathBuf],
    threads: usize,
) -> anyhow::Result<Row> {
    // A broker of its own, with an empty cache: what it costs to start it and to compile the model counts.
    let start = Instant::now();
    let broker = Broker::start(threads)?;
    let named = format!("{model}:{}", precision.name());
    let held = broker.load(&named)?;
    let broker_s = start.elapsed().as_secs_f64();
    let begin = |list: &Path| Worker::start_list(mode, broker.socket(), &named, list, threads);
    let row = measure(name, lists, begin, &broker.processes()?)?;
    drop(held);
    Ok(Row { broker_s, ..row })
}

/// Starts a client for each list and waits until all are done; `services` are processes whose memory counts too.
fn measure(
    name: &'static str,
    lists: &[PathBuf],
    begin: impl Fn(&Path) -> anyhow::Result<Worker>,
    services: &[u32],
) -> anyhow::Result<Row> {
    let start = Instant::now();
    let mut workers = Vec::with_capacity(lists.len());
    for list in lists {
        workers.push(begin(list)?);
    }
    let mut done: Vec<Done> = Vec::with_capacity(lists.len());
    for worker in &mut workers {
        done.push(serde_json::from_str(&worker.line()?).context("what a client says")?);
    }
    let clients_s = start.elapsed().as_secs_f64();
    let mut pss_bytes = 0;
    for pid in services {
        pss_bytes += smaps::process_memory(*pid)?.pss_bytes;
    }
    let mut private_bytes = Vec::with_capacity(workers.len());
    for worker in &workers {
        let memory = smaps::process_memory(worker.pid())?;
        pss_bytes += memory.pss_bytes;
        private_bytes.push(memory.private_bytes());
    }
    private_bytes.sort_unstable();
    Ok(Row {
        name,
        broker_s: 0.0,
        clients_s,
        ready_s: done.iter().map(|done| done.ready_s).sum::<f64>() / done.len().max(1) as f64,
        pss_bytes,
        private_bytes: private_bytes.get(private_bytes.len() / 2).copied().unwrap_or_default(),
        first: done.into_iter().map(|done| done.first).collect(),
    })
}

/// # Errors
/// When two kinds gave different vectors for the same texts.
fn same_work(rows: &[Row]) -> anyhow::Result<()> {
    let Some((first, others)) = rows.split_first() else { return Ok(()) };
    for row in others {
        for (a, b) in first.first.iter().zip(&row.first) {
            ensure!(a.len() == b.len(), "{} and {} give vectors of different lengths", first.name, row.name);
            let difference = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            ensure!(
                difference <= SAME_WITHIN,
                "{} and {} differ by {difference}: not the same work",
                first.name,
                row.name
            );
        }
    }
    Ok(())
}

fn report(arguments: &Arguments, threads: usize, rows: &[Row], versions: Option<String>) -> Report {
    let mut report = Report::new("clients16");
    let precision = arguments.precision.name();
    report.figure("clients", arguments.clients);
    report.figure("texts_each", arguments.texts);
    report.figure("tokens", arguments.tokens);
    report.figure("precision", precision);
    report.figure("threads", threads);
    let mut table = Table::new(
        format!(
            "{} processes, {} texts of {} tokens each, ours {precision}",
            arguments.clients, arguments.texts, arguments.tokens
        ),
        &[
            "how",
            "seconds until all done",
            "of these the broker's start",
            "client ready after (mean)",
            "MB together (PSS)",
            "MB private, each (median)",
        ],
    );
    for row in rows {
        let broker = if row.broker_s > 0.0 { short(row.broker_s) } else { "-".into() };
        let mb = |bytes: u64| bytes as f64 / MB;
        table.row(vec![
            row.name.replace('_', "-"),
            short(row.total_s()),
            broker,
            short(row.ready_s),
            short(mb(row.pss_bytes)),
            short(mb(row.private_bytes)),
        ]);
        report.figure(
            row.name,
            json!({
                "total_s": rounded(row.total_s()), "broker_s": rounded(row.broker_s),
                "clients_s": rounded(row.clients_s), "ready_mean_s": rounded(row.ready_s),
                "pss_bytes": row.pss_bytes, "private_median_bytes": row.private_bytes,
            }),
        );
    }
    if versions.is_none() {
        report.figure("sentence_transformers", json!(null));
        report.remark(
            "sentence-transformers was not measured: no Python that has it (benches/peers/install.sh)",
        );
    }
    report.table(table);
    let of = |name: &str| rows.iter().find(|row| row.name == name);
    let theirs = of("sentence_transformers");
    for name in ["lane", "attached"] {
        let ratio = |figure: fn(&Row) -> f64| {
            of(name).zip(theirs).map(|(ours, theirs)| rounded(figure(ours) / figure(theirs)))
        };
        let what =
            |figure: &str| format!("{name} / sentence-transformers, {figure}, {} clients", arguments.clients);
        report.goal(what("seconds until all done"), ratio(Row::total_s), GOAL_SECONDS);
        // Who attaches computes in its own memory: its activations are its own choice.
        if name == "lane" {
            report.goal(what("memory together"), ratio(|row| row.pss_bytes as f64), GOAL_MEMORY);
        } else if let Some(ratio) = ratio(|row| row.pss_bytes as f64) {
            report.remark(format!("attached / sentence-transformers, memory together: {}", short(ratio)));
        }
    }
    if let Some(versions) = versions {
        report.remark(format!("sentence-transformers: {versions}; f32, batches of {PEER_BATCH}"));
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, first: &[f32]) -> Row {
        Row {
            name,
            broker_s: 0.5,
            clients_s: 1.0,
            ready_s: 0.1,
            pss_bytes: 100,
            private_bytes: 10,
            first: vec![first.to_vec()],
        }
    }

    #[test]
    fn other_vectors_are_other_work() {
        same_work(&[row("lane", &[1.0, 0.0]), row("attached", &[1.0, 1e-5])]).unwrap();
        assert!(same_work(&[row("lane", &[1.0, 0.0]), row("attached", &[1.0, 1e-3])]).is_err());
        assert!(same_work(&[row("lane", &[1.0, 0.0]), row("attached", &[1.0])]).is_err());
        assert!((row("lane", &[]).total_s() - 1.5).abs() < 1e-9);
    }
}

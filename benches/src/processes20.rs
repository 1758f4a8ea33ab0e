//! `processes20`: twenty processes that start at once and each want the model. Ours connect and lease, or attach; the peer
//! loads it with sentence-transformers. Starting a process costs the same whoever starts it, so it is measured too and
//! taken off.

use crate::fixture::{self, Broker};
use crate::report::{Report, Table, rounded, short};
use crate::worker::{Mode, Worker};
use crate::{machine, python};
use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::json;
use std::path::Path;
use std::time::Instant;

/// Aimed at, ms, for all processes together, beyond their start.
const GOAL_MS: f64 = 20.0;

/// Arguments of `processes20`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Processes at once.
    #[arg(long, default_value_t = 20)]
    processes: usize,
    /// Rounds; the kinds alternate. The peer has one round only.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    #[command(flatten)]
    python: python::Arguments,
}

/// What the peer's script says.
#[derive(Debug, Clone, Copy, Deserialize)]
struct PeerSaid {
    import_s: f64,
    load_s: f64,
    private_bytes: u64,
}

/// Milliseconds from the first start to the last process being ready, over the rounds.
#[derive(Debug, Clone)]
struct Walls {
    ms: Vec<f64>,
    /// Mean over the processes of what each needed by its own clock, of each round.
    own_ms: Vec<f64>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Runs the bench.
///
/// # Errors
/// When a process fails.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(arguments.processes > 0 && arguments.rounds > 0, "--processes and --rounds must be at least 1");
    let threads = machine::allowed_cores()?.len();
    let peer = arguments.python.find()?;
    let folder = fixture::small_model_folder()?;
    let model = folder.to_str().context("the model folder's name is not UTF-8")?;
    let broker = Broker::start(threads)?;
    let held = broker.load(model)?;
    held.embed(&["a first text"])?;
    let modes = [Mode::Nothing, Mode::Thin, Mode::Attached];
    let mut walls = modes.map(|mode| (mode, Walls { ms: Vec::new(), own_ms: Vec::new() }));
    for round in 0..arguments.rounds {
        for turn in 0..modes.len() {
            let (mode, walls) = &mut walls[(round + turn) % modes.len()];
            let start = Instant::now();
            let mut workers = Vec::with_capacity(arguments.processes);
            for _ in 0..arguments.processes {
                workers.push(Worker::start(*mode, broker.socket(), model, 0)?);
            }
            let mut own_us = 0.0;
            for worker in &mut workers {
                own_us += worker.ready()?.steps.total_us();
            }
            walls.ms.push(start.elapsed().as_secs_f64() * 1e3);
            walls.own_ms.push(own_us / 1e3 / arguments.processes as f64);
        }
    }
    let theirs = match &peer {
        Some(python) => {
            Some((python::versions(python)?, measure_peer(python, model, arguments.processes, threads)?))
        }
        None => None,
    };
    Ok(report(arguments, &walls, theirs))
}

struct Theirs {
    wall_ms: f64,
    said: Vec<PeerSaid>,
}

fn measure_peer(python: &Path, model: &str, processes: usize, threads: usize) -> anyhow::Result<Theirs> {
    // Once beforehand, so that Python's and the model's files are in memory for all.
    drop(python::start(python, "st_load.py", &[model], threads)?.line()?);
    let start = Instant::now();
    let mut workers = Vec::with_capacity(processes);
    for _ in 0..processes {
        workers.push(python::start(python, "st_load.py", &[model], threads)?);
    }
    let mut said = Vec::with_capacity(processes);
    for worker in &mut workers {
        said.push(serde_json::from_str(&worker.line()?).context("what st_load.py says")?);
    }
    Ok(Theirs { wall_ms: start.elapsed().as_secs_f64() * 1e3, said })
}

fn report(arguments: &Arguments, walls: &[(Mode, Walls); 3], theirs: Option<(String, Theirs)>) -> Report {
    let mut report = Report::new("processes20");
    let processes = arguments.processes;
    let start_ms = median(&walls[0].1.ms);
    let mut table = Table::new(
        format!("{processes} processes at once, until all have the model: ms (median, spread)"),
        &["what", "all, from the first start", "beyond starting processes", "each, by its own clock (mean)"],
    );
    report.figure("processes", processes);
    report.figure("start_only_ms", rounded(start_ms));
    for (mode, walls) in walls {
        let wall = median(&walls.ms);
        let (low, high) = walls.ms.iter().fold((f64::MAX, 0.0_f64), |(l, h), ms| (l.min(*ms), h.max(*ms)));
        let what = match mode {
            Mode::Nothing => "starting only",
            Mode::Thin => "ours, thin",
            Mode::Attached => "ours, attached",
            Mode::Private => "ours, private",
        };
        let spread = format!("{} ({}-{})", short(wall), short(low), short(high));
        if *mode == Mode::Nothing {
            table.row(vec![what.into(), spread, "-".into(), "-".into()]);
            continue;
        }
        let beyond = wall - start_ms;
        table.row(vec![what.into(), spread, short(beyond), short(median(&walls.own_ms))]);
        let name = mode.name();
        report.figure(
            name,
            json!({"wall_ms": rounded(wall), "beyond_start_ms": rounded(beyond), "spread_ms": [rounded(low), rounded(high)],
                   "each_ms": rounded(median(&walls.own_ms))}),
        );
        report.goal(
            format!("ms for {processes} processes beyond their start, {name}"),
            Some(rounded(beyond)),
            GOAL_MS,
        );
    }
    match theirs {
        Some((versions, theirs)) => {
            let mean =
                |of: &dyn Fn(&PeerSaid) -> f64| theirs.said.iter().map(of).sum::<f64>() / processes as f64;
            let (import_ms, load_ms) = (mean(&|s| s.import_s) * 1e3, mean(&|s| s.load_s) * 1e3);
            let private_mb = mean(&|s| s.private_bytes as f64) / 1e6;
            table.row(vec![
                "sentence-transformers".into(),
                short(theirs.wall_ms),
                "-".into(),
                format!("{} import, {} load", short(import_ms), short(load_ms)),
            ]);
            report.figure(
                "sentence_transformers",
                json!({"wall_ms": rounded(theirs.wall_ms), "import_mean_ms": rounded(import_ms),
                       "load_mean_ms": rounded(load_ms), "private_mean_mb": rounded(private_mb), "versions": versions}),
            );
            report.remark(format!(
                "sentence-transformers: {versions}; {private_mb:.0} MB private each once loaded"
            ));
        }
        None => report.remark(
            "sentence-transformers was not measured: no Python that has it (benches/peers/install.sh)",
        ),
    }
    report.table(table);
    report
}

//! `attach`: how long a worker needs until it can use a model that is loaded, for a small model and a large one. Thin: it
//! has a lane. Attached: it has the image mapped and checked, and can compute.

use crate::fixture::{self, Broker};
use crate::report::{Report, Table, rounded, short};
use crate::samples::{Samples, Summary};
use crate::worker::{self, Mode, Steps, Worker};
use crate::{big_model, machine};
use anyhow::ensure;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of weights of the large model, unless said otherwise.
const LARGE_BYTES: u64 = 2_000_000_000;
/// Attachments in a block.
const BLOCK: u32 = 20;
/// Aimed at for one attachment, µs.
const GOAL_US: f64 = 1000.0;

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Attachments of each kind within one process.
    #[arg(long, default_value_t = 400)]
    count: u32,
    /// Attachments of each kind by processes that were just started.
    #[arg(long, default_value_t = 60)]
    processes: u32,
    /// Bytes of weights of the large model; 0 leaves it out.
    #[arg(long, default_value_t = LARGE_BYTES)]
    large_bytes: u64,
}

/// One kind of attachment to one model.
struct Row {
    model: &'static str,
    bytes: u64,
    mode: Mode,
    from: &'static str,
    total: Summary,
    connect: Summary,
    lease: Summary,
    map: Option<Summary>,
}

struct Split {
    total: Samples,
    connect: Samples,
    lease: Samples,
    map: Samples,
}

impl Split {
    fn new() -> Split {
        Split { total: Samples::new(), connect: Samples::new(), lease: Samples::new(), map: Samples::new() }
    }

    fn record(&mut self, steps: Steps, total_us: f64) {
        self.total.record(us(total_us));
        self.connect.record(us(steps.connect_us));
        self.lease.record(us(steps.lease_us));
        if steps.map_us > 0.0 {
            self.map.record(us(steps.map_us));
        }
    }

    fn end_block(&mut self) {
        for samples in [&mut self.total, &mut self.connect, &mut self.lease, &mut self.map] {
            samples.end_block();
        }
    }
}

fn us(us: f64) -> Duration {
    Duration::from_nanos((us * 1e3) as u64)
}

/// Runs the bench.
///
/// # Errors
/// When a model cannot be loaded or a worker fails.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(arguments.count > 0 && arguments.processes > 0, "--count and --processes must be at least 1");
    let mut rows = Vec::new();
    let mut loads = Vec::new();
    let threads = machine::allowed_cores()?.len();
    {
        let broker = Broker::start_with_cache(threads)?;
        let folder = fixture::small_model_folder()?;
        measure("small", &broker, &folder, arguments, &mut rows, &mut loads)?;
    }
    if arguments.large_bytes > 0 {
        let broker = Broker::start_with_cache(threads)?;
        let folder = broker.folder().join("large-model");
        std::fs::create_dir(&folder)?;
        big_model::write(&folder, arguments.large_bytes)?;
        measure("large", &broker, &folder, arguments, &mut rows, &mut loads)?;
    }
    Ok(report(&rows, &loads))
}

fn measure(
    name: &'static str,
    broker: &Broker,
    folder: &Path,
    arguments: &Arguments,
    rows: &mut Vec<Row>,
    loads: &mut Vec<(&'static str, f64)>,
) -> anyhow::Result<()> {
    let model = folder.to_str().ok_or_else(|| anyhow::anyhow!("the model folder's name is not UTF-8"))?;
    let start = Instant::now();
    let held = broker.load(model)?;
    loads.push((name, start.elapsed().as_secs_f64()));
    let bytes = held.description()?.image_bytes;
    // What the first job pays for is not what is measured here.
    held.embed(&["a first text"])?;
    let mut kinds = [(Mode::Thin, Split::new(), Split::new()), (Mode::Attached, Split::new(), Split::new())];
    let mut left = arguments.count;
    while left > 0 {
        let block = left.min(BLOCK);
        for (mode, within, _) in &mut kinds {
            for _ in 0..block {
                let (steps, ready) = worker::get_ready(*mode, broker.socket(), model)?;
                within.record(steps, steps.total_us());
                // Letting go is not part of it.
                drop(ready);
            }
            within.end_block();
        }
        left -= block;
    }
    let mut left = arguments.processes;
    while left > 0 {
        let block = left.min(BLOCK);
        for (mode, _, fresh) in &mut kinds {
            for _ in 0..block {
                let said = Worker::start(*mode, broker.socket(), model, 0)?.ready()?;
                fresh.record(said.steps, said.since_main_us);
            }
            fresh.end_block();
        }
        left -= block;
    }
    for (mode, within, fresh) in kinds {
        for (from, split) in [("process", within), ("fresh", fresh)] {
            let (Some(total), Some(connect), Some(lease)) =
                (split.total.summary(), split.connect.summary(), split.lease.summary())
            else {
                continue;
            };
            rows.push(Row {
                model: name,
                bytes,
                mode,
                from,
                total,
                connect,
                lease,
                map: split.map.summary(),
            });
        }
    }
    Ok(())
}

fn report(rows: &[Row], loads: &[(&'static str, f64)]) -> Report {
    let mut report = Report::new("attach");
    let to_json = |row: &Row| {
        json!({
            "model": row.model, "bytes": row.bytes, "mode": row.mode.name(), "from": row.from,
            "p50_us": rounded(row.total.p50_us), "p99_us": rounded(row.total.p99_us),
            "p50_spread_us": [rounded(row.total.spread_us.0), rounded(row.total.spread_us.1)],
            "connect_p50_us": rounded(row.connect.p50_us), "lease_p50_us": rounded(row.lease.p50_us),
            "map_p50_us": row.map.map(|map| rounded(map.p50_us)), "count": row.total.count,
        })
    };
    report.figure("attach", rows.iter().map(to_json).collect::<Vec<_>>());
    // The headline of each model: attached, in a process that was just started, where there is one.
    for name in ["small", "large"] {
        let attached = rows.iter().filter(|row| row.model == name && row.mode == Mode::Attached);
        if let Some(row) = attached.max_by_key(|row| row.from == "fresh") {
            report.figure(name, to_json(row));
        }
    }
    report.figure(
        "first_load_seconds",
        loads
            .iter()
            .map(|(name, s)| ((*name).into(), rounded(*s).into()))
            .collect::<serde_json::Map<String, Value>>(),
    );
    let mut table = Table::new(
        "From nothing to ready, model loaded: µs",
        &[
            "model",
            "image bytes",
            "worker",
            "measured in",
            "p50",
            "p99",
            "p50 spread",
            "connect",
            "lease, lane",
            "map",
        ],
    );
    for row in rows {
        let from = if row.from == "fresh" { "fresh processes, from main()" } else { "one process" };
        table.row(vec![
            row.model.into(),
            row.bytes.to_string(),
            row.mode.name().into(),
            from.into(),
            short(row.total.p50_us),
            short(row.total.p99_us),
            format!("{}-{}", short(row.total.spread_us.0), short(row.total.spread_us.1)),
            short(row.connect.p50_us),
            short(row.lease.p50_us),
            row.map.map_or("-".into(), |map| short(map.p50_us)),
        ]);
    }
    report.table(table);
    let mut table = Table::new("First load of a model folder: seconds", &["model", "seconds"]);
    loads.iter().for_each(|(name, seconds)| table.row(vec![(*name).into(), short(*seconds)]));
    report.table(table);
    for row in rows {
        let what = format!("p50 µs, {} model, {}, {}", row.model, row.mode.name(), row.from);
        report.goal(what, Some(rounded(row.total.p50_us)), GOAL_US);
    }
    report.remark("attached includes a thin worker's lease and lane; the tokenizer is built at the first text, not here");
    report
}

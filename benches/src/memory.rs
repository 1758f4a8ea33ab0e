//! `memory`: how often the weights lie in memory, and what each process holds for itself, with 1, 4 and 16 workers. All
//! figures are the kernel's, from /proc; none is assumed.

use crate::fixture::{self, Broker};
use crate::machine;
use crate::report::{Report, Table, rounded, short};
use crate::worker::{Mode, Worker};
use anyhow::{Context, ensure};
use serde_json::json;
use shm_os::smaps::{self, MemoryReport};

/// Bytes of a page; images are mapped in whole pages.
const PAGE_BYTES: u64 = 4096;
/// Texts that each worker embeds before it is measured: an idle process holds less than one that worked.
const TEXTS: usize = 4;
/// Bytes in the MB that goals are given in.
const MB: f64 = 1e6;

/// Arguments of `memory`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Numbers of workers.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16])]
    workers: Vec<usize>,
}

/// A set of workers, measured.
struct Row {
    mode: Mode,
    workers: usize,
    /// Sum of the image's pages over all processes, each page counted once, by the size of the image.
    copies: f64,
    image_bytes: u64,
    worker_private_bytes: Vec<u64>,
    worker_anonymous_bytes: Vec<u64>,
    engine_private_bytes: u64,
    broker_private_bytes: u64,
    total_pss_bytes: u64,
}

/// Runs the bench.
///
/// # Errors
/// When a worker fails or /proc cannot be read.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let broker = Broker::start_with_cache(machine::allowed_cores()?.len())?;
    let folder = fixture::small_model_folder()?;
    let model = folder.to_str().context("the model folder's name is not UTF-8")?;
    let held = broker.load(model)?;
    // Every page of the weights is touched: a copy that nobody has looked at does not show.
    held.embed(&["some text to begin with", "and another one"])?;
    let image_bytes = held.description()?.image_bytes;
    let mut rows = Vec::new();
    for mode in [Mode::Thin, Mode::Attached] {
        for &workers in &arguments.workers {
            rows.push(measure(&broker, model, image_bytes, mode, workers)?);
        }
    }
    Ok(report(&rows))
}

fn measure(broker: &Broker, model: &str, image_bytes: u64, mode: Mode, count: usize) -> anyhow::Result<Row> {
    let mut workers = Vec::with_capacity(count);
    for _ in 0..count {
        workers.push(Worker::start(mode, broker.socket(), model, TEXTS)?);
    }
    for worker in &mut workers {
        worker.ready()?;
    }
    let services = broker.processes()?;
    let inode = image_inode(&services, image_bytes)?;
    let mut row = Row {
        mode,
        workers: count,
        copies: 0.0,
        image_bytes,
        worker_private_bytes: Vec::new(),
        worker_anonymous_bytes: Vec::new(),
        engine_private_bytes: 0,
        broker_private_bytes: 0,
        total_pss_bytes: 0,
    };
    let mut image_pss_bytes = 0;
    for (position, pid) in services.iter().copied().enumerate() {
        let memory = add(pid, inode, &mut image_pss_bytes, &mut row)?;
        match position {
            0 => row.broker_private_bytes = memory.private_bytes(),
            _ => row.engine_private_bytes += memory.private_bytes(),
        }
    }
    for worker in &workers {
        let memory = add(worker.pid(), inode, &mut image_pss_bytes, &mut row)?;
        row.worker_private_bytes.push(memory.private_bytes());
        row.worker_anonymous_bytes.push(memory.anonymous_bytes);
    }
    row.copies = image_pss_bytes as f64 / image_bytes as f64;
    Ok(row)
}

fn add(pid: u32, inode: u64, image_pss_bytes: &mut u64, row: &mut Row) -> anyhow::Result<MemoryReport> {
    let (image, _) = smaps::memory_by_inode(pid, inode)?;
    *image_pss_bytes += image.pss_bytes;
    let mut memory = smaps::process_memory(pid)?;
    row.total_pss_bytes += memory.pss_bytes;
    // What nobody else maps is still no copy of a process's own when it is the shared image: with one worker or engine
    // alone its pages count as private to the kernel.
    memory.private_clean_bytes = memory.private_clean_bytes.saturating_sub(image.private_clean_bytes);
    memory.private_dirty_bytes = memory.private_dirty_bytes.saturating_sub(image.private_dirty_bytes);
    Ok(memory)
}

/// The image as the engine maps it: the one object of its length.
pub(crate) fn image_inode(services: &[u32], image_bytes: u64) -> anyhow::Result<u64> {
    let mut lengths = std::collections::BTreeMap::<u64, u64>::new();
    for pid in services {
        let mut of_process = std::collections::BTreeMap::<u64, u64>::new();
        smaps::each_mapping(*pid, |mapping| {
            if mapping.inode != 0 {
                *of_process.entry(mapping.inode).or_default() += mapping.len_bytes;
            }
        })?;
        lengths.extend(
            of_process.into_iter().filter(|(_, len)| *len == image_bytes.next_multiple_of(PAGE_BYTES)),
        );
    }
    ensure!(lengths.len() == 1, "{} objects of the image's length are mapped, not one", lengths.len());
    lengths.into_keys().next().context("no image is mapped")
}

fn report(rows: &[Row]) -> Report {
    let mut report = Report::new("memory");
    let median = |values: &[u64]| {
        let mut sorted = values.to_vec();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied().unwrap_or_default() as f64 / MB
    };
    let largest = |values: &[u64]| values.iter().copied().max().unwrap_or_default() as f64 / MB;
    let mut table = Table::new(
        "Copies of the weights, and MB that each process holds for itself",
        &[
            "workers",
            "kind",
            "copies of the weights",
            "worker private (median)",
            "(largest)",
            "engine private",
            "broker private",
            "all processes (PSS)",
        ],
    );
    let mut figures = Vec::new();
    for row in rows {
        figures.push(json!({
            "workers": row.workers, "mode": row.mode.name(), "weights_copies": rounded(row.copies),
            "image_bytes": row.image_bytes,
            "worker_private_bytes": row.worker_private_bytes,
            "worker_anonymous_bytes": row.worker_anonymous_bytes,
            "engine_private_bytes": row.engine_private_bytes,
            "broker_private_bytes": row.broker_private_bytes,
            "total_pss_bytes": row.total_pss_bytes,
        }));
        table.row(vec![
            row.workers.to_string(),
            row.mode.name().into(),
            format!("{:.3}", row.copies),
            short(median(&row.worker_private_bytes)),
            short(largest(&row.worker_private_bytes)),
            short(row.engine_private_bytes as f64 / MB),
            short(row.broker_private_bytes as f64 / MB),
            short(row.total_pss_bytes as f64 / MB),
        ]);
        let what = |figure: &str| format!("{figure}, {} {} workers", row.workers, row.mode.name());
        report.goal(what("copies of the weights"), Some(rounded(row.copies)), 1.02);
        let (name, at_most) = match row.mode {
            Mode::Attached => ("MB private, largest, activations included", 12.0),
            _ => ("MB private, largest", 4.0),
        };
        report.goal(what(name), Some(rounded(largest(&row.worker_private_bytes))), at_most);
    }
    report.figure("memory", figures);
    report.table(table);
    report.remark(format!(
        "copies = the image's pages in all processes, each counted once (PSS), by the image's size; below 1 when pages \
         that no text needs were not touched; each worker has embedded {TEXTS} texts"
    ));
    report
}

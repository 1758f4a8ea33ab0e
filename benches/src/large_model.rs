//! `large-model`: a model of 2.3 GB as a RAG service uses it, one API-like process and four subprocesses, through one broker
//! and each on its own; attaching; and a broker's restart with a warm image, until its first answer.

use crate::fixture::Broker;
use crate::report::{Report, Table, rounded, short};
use crate::samples::Samples;
use crate::worker::{Mode, Worker};
use crate::{kure_model, machine, python};
use anyhow::{Context, ensure};
use serde_json::json;
use shm_os::smaps::{self, process_memory};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use worker_sdk::EmbedOptions;

/// Processes that use the model: an API server and four subprocesses.
const WORKERS: usize = 5;
/// Texts that each of them embeds before its memory is read.
const TEXTS: usize = 2;
/// Attachments between two blocks of samples.
const BLOCK: u32 = 20;
/// Memory that must stay free beside private copies, bytes.
const SPARE_BYTES: u64 = 3 << 30;
const GOAL_COPIES: f64 = 1.05;
const GOAL_ATTACH_US: f64 = 1000.0;
const GOAL_RESTART_MS: f64 = 300.0;

/// Arguments of `large-model`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Restarts of the broker.
    #[arg(long, default_value_t = 10)]
    restarts: u32,
    /// Processes that attach, one after the other.
    #[arg(long, default_value_t = 100)]
    attach: u32,
    /// Leave out the measurement with private copies, which needs some 16 GB.
    #[arg(long)]
    no_private: bool,
    /// A folder to keep the model in [default: a temporary one; making it takes half a minute]
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,
    #[command(flatten)]
    python: python::Arguments,
}

/// Memory of five processes that each have the model for themselves.
struct Private {
    what: String,
    /// Sum of the processes' proportional sets, bytes; of all five, or scaled up from as many as fitted.
    pss_bytes: f64,
    measured: usize,
}

/// Milliseconds of one restart, from starting the program.
#[derive(Debug, Clone, Copy)]
struct Restart {
    serves_ms: f64,
    leased_ms: f64,
    answered_ms: f64,
}

/// Runs the bench.
///
/// # Errors
/// When the model cannot be made or loaded, or a process fails.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    ensure!(arguments.restarts > 0 && arguments.attach > 0, "--restarts and --attach must be at least 1");
    let threads = machine::allowed_cores()?.len();
    let temporary = tempfile::Builder::new().prefix("bench-model-").tempdir()?;
    let folder = arguments.model_dir.clone().unwrap_or_else(|| temporary.path().join("kure-shaped"));
    if !folder.join("model.safetensors").exists() {
        std::fs::create_dir_all(&folder)?;
        kure_model::write(&folder)?;
    }
    let model = folder.to_str().context("the model folder's name is not UTF-8")?;
    let begun = Instant::now();
    let broker = Broker::start_again(Broker::new_folder()?, threads)?;
    let held = broker.load(model)?;
    held.embed(&["a first text"])?;
    let first_load_s = begun.elapsed().as_secs_f64();
    let image_bytes = held.description()?.image_bytes;
    let shared = shared_copies(&broker, model, image_bytes)?;
    let attach = attach(&broker, model, arguments.attach)?;
    drop(held);
    let (broker_folder, restarts) = restarts(broker, model, threads, arguments.restarts)?;
    let mut private = Vec::new();
    if !arguments.no_private {
        let image = image_file(broker_folder.path(), image_bytes)?;
        let image = image.to_str().context("the image's name is not UTF-8")?;
        let ours = private_copies("ours, weights in memory of its own", image_bytes, || {
            Worker::start(Mode::Private, Path::new("no-broker"), image, TEXTS)
        })?;
        private.push(ours);
        if let Some(python) = arguments.python.find()? {
            let what = format!("sentence-transformers ({})", python::versions(&python)?);
            private.push(private_copies(&what, image_bytes, || {
                python::start(&python, "st_load.py", &[model, "a text of a worker"], threads)
            })?);
        }
    }
    let summary = attach.summary().context("nothing was attached")?;
    Ok(report(image_bytes, first_load_s, &shared, summary, &restarts, &private))
}

/// Memory with all processes on one image.
struct Shared {
    /// Proportional set of the image's pages over all processes, by its length.
    copies: f64,
    /// Proportional set of all that the processes hold, bytes.
    pss_bytes: u64,
}

fn shared_copies(broker: &Broker, model: &str, image_bytes: u64) -> anyhow::Result<Shared> {
    let mut workers = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        workers.push(Worker::start(Mode::Attached, broker.socket(), model, TEXTS)?);
    }
    for worker in &mut workers {
        worker.ready()?;
    }
    let services = broker.processes()?;
    let inode = crate::memory::image_inode(&services, image_bytes)?;
    let (mut image_pss_bytes, mut pss_bytes) = (0, 0);
    for pid in services.iter().copied().chain(workers.iter().map(Worker::pid)) {
        image_pss_bytes += smaps::memory_by_inode(pid, inode)?.0.pss_bytes;
        pss_bytes += process_memory(pid)?.pss_bytes;
    }
    Ok(Shared { copies: image_pss_bytes as f64 / image_bytes as f64, pss_bytes })
}

/// From the beginning of `main` of a fresh process to a model that it can compute with.
fn attach(broker: &Broker, model: &str, count: u32) -> anyhow::Result<Samples> {
    let mut samples = Samples::new();
    for number in 1..=count {
        let said = Worker::start(Mode::Attached, broker.socket(), model, 0)?.ready()?;
        samples.record(Duration::from_nanos((said.since_main_us * 1e3) as u64));
        if number.is_multiple_of(BLOCK) {
            samples.end_block();
        }
    }
    samples.end_block();
    Ok(samples)
}

fn restarts(
    mut broker: Broker,
    model: &str,
    threads: usize,
    count: u32,
) -> anyhow::Result<(tempfile::TempDir, Vec<Restart>)> {
    let mut all = Vec::new();
    let options = EmbedOptions::default().bypass_cache(true);
    for _ in 0..count {
        let folder = broker.stop()?;
        let begun = Instant::now();
        broker = Broker::start_again(folder, threads)?;
        let serves = begun.elapsed();
        let leased_model = broker.load(model)?;
        let leased = begun.elapsed();
        leased_model.embed_with(&["what is the answer to the first question after a restart"], &options)?;
        let answered = begun.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        all.push(Restart { serves_ms: ms(serves), leased_ms: ms(leased), answered_ms: ms(answered) });
    }
    Ok((broker.stop()?, all))
}

/// The compiled image in a broker's cache.
fn image_file(broker_folder: &Path, image_bytes: u64) -> anyhow::Result<PathBuf> {
    for entry in std::fs::read_dir(broker_folder.join("cache").join("images"))? {
        let entry = entry?;
        if entry.metadata()?.len() == image_bytes {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("the cache folder has no compiled image")
}

fn private_copies(
    what: &str,
    image_bytes: u64,
    mut start: impl FnMut() -> anyhow::Result<Worker>,
) -> anyhow::Result<Private> {
    let mut workers = Vec::with_capacity(WORKERS);
    for _ in 0..WORKERS {
        if !workers.is_empty() && available_bytes()? < image_bytes * 2 + SPARE_BYTES {
            break;
        }
        let mut worker = start()?;
        // One after the other: while it loads, a process may hold twice what it holds then.
        worker.line()?;
        workers.push(worker);
    }
    let mut pss_bytes = 0;
    for worker in &workers {
        pss_bytes += process_memory(worker.pid())?.pss_bytes;
    }
    let measured = workers.len();
    let pss_bytes = pss_bytes as f64 * WORKERS as f64 / measured as f64;
    Ok(Private { what: what.to_owned(), pss_bytes, measured })
}

fn available_bytes() -> anyhow::Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo says nothing of available memory")? << 10)
}

fn report(
    image_bytes: u64,
    first_load_s: f64,
    shared: &Shared,
    attach: crate::samples::Summary,
    restarts: &[Restart],
    private: &[Private],
) -> Report {
    let mut report = Report::new("large-model");
    let of = |part: fn(&Restart) -> f64| {
        let mut values: Vec<f64> = restarts.iter().map(part).collect();
        values.sort_by(f64::total_cmp);
        (values[values.len() / 2], values[0], values[values.len() - 1])
    };
    let (restart, fastest, slowest) = of(|restart| restart.answered_ms);
    let copies = |bytes: f64| bytes / image_bytes as f64;
    report.figure("image_bytes", image_bytes);
    report.figure("n", json!({"workers": WORKERS, "attach": attach.count, "restarts": restarts.len()}));
    report.figure("copies", rounded(shared.copies));
    report.figure("total_pss_copies", rounded(copies(shared.pss_bytes as f64)));
    // The peer's where it was measured: it is what people do today. Ours beside it.
    report.figure("private_copies", private.last().map(|it| rounded(copies(it.pss_bytes))));
    report.figure(
        "private",
        private
            .iter()
            .map(|it| json!({"what": it.what, "copies": rounded(copies(it.pss_bytes)), "measured": it.measured}))
            .collect::<Vec<_>>(),
    );
    report.figure("attach_p50_us", rounded(attach.p50_us));
    report.figure("attach_p50_spread_us", json!([rounded(attach.spread_us.0), rounded(attach.spread_us.1)]));
    report.figure("warm_restart_ms", rounded(restart));
    report.figure("warm_restart_spread_ms", json!([rounded(fastest), rounded(slowest)]));
    report.figure("warm_restart_serves_ms", rounded(of(|restart| restart.serves_ms).0));
    report.figure("warm_restart_leased_ms", rounded(of(|restart| restart.leased_ms).0));
    report.figure("first_load_s", rounded(first_load_s));
    let gb = image_bytes as f64 / 1e9;
    let mut table = Table::new(
        format!("A KURE-v1-shaped model, image of {gb:.2} GB: {WORKERS} processes that compute on it"),
        &["processes", "copies of the image", "all their memory (PSS), in images"],
    );
    table.row(vec![
        "one broker, one engine, 5 attached workers".into(),
        format!("{:.3}", shared.copies),
        short(copies(shared.pss_bytes as f64)),
    ]);
    for it in private {
        let scaled = if it.measured < WORKERS {
            format!(" (from {} that fitted)", it.measured)
        } else {
            String::new()
        };
        table.row(vec![format!("5 x {}{scaled}", it.what), "-".into(), short(copies(it.pss_bytes))]);
    }
    report.table(table);
    let mut table = Table::new("How long it takes", &["what", "median", "fastest", "slowest"]);
    let mut row = |what: &str, (p50, low, high): (f64, f64, f64)| {
        table.row(vec![what.into(), short(p50), short(low), short(high)]);
    };
    row(
        "attach in a fresh process, from main(), µs (blocks' medians)",
        (attach.p50_us, attach.spread_us.0, attach.spread_us.1),
    );
    row("broker restarted, warm image: until it serves, ms", of(|restart| restart.serves_ms));
    row("until a client has its lease, ms", of(|restart| restart.leased_ms));
    row("until the first answer, ms", (restart, fastest, slowest));
    report.table(table);
    report.goal("copies of the image", Some(rounded(shared.copies)), GOAL_COPIES);
    report.goal("attach, p50 µs", Some(rounded(attach.p50_us)), GOAL_ATTACH_US);
    report.goal("restart to first answer, ms", Some(rounded(restart)), GOAL_RESTART_MS);
    report.remark(format!(
        "random weights; the first load, compiling included, took {}s; the image's file is in the page cache at each restart",
        short(first_load_s)
    ));
    if private.is_empty() {
        report.remark("private copies were not measured (--no-private)");
    }
    report
}

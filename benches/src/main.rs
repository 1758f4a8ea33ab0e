//! The bench runner: `cargo run --release -p benches -- NAME [--json]`. Only the choice of a bench is made here; each
//! lives in a module of its own.
#![forbid(unsafe_code)]

mod accuracy;
mod attach;
mod big_model;
mod cache;
mod clients16;
mod fixture;
mod infinity;
mod kure_model;
mod lane;
mod large_model;
mod machine;
mod managers;
mod memory;
mod mixed;
mod peers;
mod processes20;
mod python;
mod report;
mod ring;
mod samples;
mod texts;
mod throughput;
mod worker;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::time::Instant;

/// Measures modelbroker beside its peers, on this machine, in one run.
#[derive(Debug, Parser)]
#[command(name = "benches", version)]
struct Arguments {
    /// Print one JSON object instead of tables.
    #[arg(long, global = true)]
    json: bool,
    /// Also put the tables into this document, between the comments that name the bench.
    #[arg(long, global = true, value_name = "FILE")]
    into: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Round trips between two processes: lanes against iceoryx2 and a Unix socket.
    Ring(ring::Arguments),
    /// From nothing to ready: how long a worker needs until it can use a loaded model, small and large.
    Attach(attach::Arguments),
    /// A KURE-v1-shaped model (2.3 GB): copies in memory, attaching, and a restart with a warm image.
    LargeModel(large_model::Arguments),
    /// Copies of the weights, and what each process holds for itself, with 1, 4 and 16 workers.
    Memory(memory::Arguments),
    /// What it costs to have a text computed by the engine instead of in place.
    Lane(lane::Arguments),
    /// A text that was embedded before, answered from the cache, beside the same text computed.
    Cache(cache::Arguments),
    /// Twenty embedding managers in one process, from threads and in processes, against twenty SentenceTransformer loads.
    Managers(managers::Arguments),
    /// Twenty processes that each want the model, against twenty loads with sentence-transformers.
    Processes20(processes20::Arguments),
    /// Texts a second, against sentence-transformers.
    Throughput(throughput::Arguments),
    /// Texts a second and single texts, against sentence-transformers, ONNX Runtime, OpenVINO and fastembed.
    Peers(peers::Arguments),
    /// Single texts while others index in bulk.
    Mixed(mixed::Arguments),
    /// Sixteen processes with texts to embed, through one broker, against sixteen private copies.
    Clients16(clients16::Arguments),
    /// What precisions cost: cosines, neighbours and rank correlation, against f32 and other engines.
    Accuracy(accuracy::Arguments),
    /// A worker process; started by the others.
    #[command(hide = true)]
    Worker(worker::Arguments),
    /// Stock candle as a process; started by `peers`.
    #[command(hide = true)]
    Candle(peers::candle::Arguments),
    /// The other process of `ring`; started by it.
    #[command(hide = true)]
    RingPeer(ring::PeerArguments),
}

fn main() -> anyhow::Result<()> {
    let since_main = Instant::now();
    let arguments = Arguments::parse();
    let report = match &arguments.bench {
        Bench::Ring(ring) => ring::run(ring)?,
        Bench::Attach(attach) => attach::run(attach)?,
        Bench::LargeModel(large) => large_model::run(large)?,
        Bench::Managers(managers) => managers::run(managers)?,
        Bench::Memory(memory) => memory::run(memory)?,
        Bench::Lane(lane) => lane::run(lane)?,
        Bench::Cache(cache) => cache::run(cache)?,
        Bench::Processes20(processes) => processes20::run(processes)?,
        Bench::Throughput(throughput) => throughput::run(throughput)?,
        Bench::Peers(peers) => peers::run(peers)?,
        Bench::Mixed(mixed) => mixed::run(mixed)?,
        Bench::Clients16(clients) => clients16::run(clients)?,
        Bench::Accuracy(accuracy) => accuracy::run(accuracy)?,
        Bench::Worker(worker) => return worker::run(worker, since_main),
        Bench::Candle(candle) => return peers::candle::run(candle),
        Bench::RingPeer(peer) => return ring::run_peer(peer),
    };
    report.print(arguments.json);
    arguments.into.as_deref().map_or(Ok(()), |document| report.write_into(document))
}

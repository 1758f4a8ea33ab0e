//! `throughput`: texts a second, through a lane, in place on the attached model, and by sentence-transformers, in rounds
//! that alternate; all compute in f32 on the same number of threads.

use crate::fixture::{self, Broker};
use crate::lane::Rates;
use crate::report::{Report, Table, rounded, short};
use crate::worker::Worker;
use crate::{machine, python, texts};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use worker_sdk::{AttachedModel, Model};

/// Texts that the peer computes at once: its own default.
const PEER_BATCH: usize = 32;
/// Largest difference of a component that passes for the same vector.
const SAME_WITHIN: f32 = 1e-4;

/// Arguments of `throughput`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Rounds; the kinds alternate.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Lengths of a text in tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128])]
    tokens: Vec<usize>,
    /// Tokens of all texts of a round together.
    #[arg(long, default_value_t = 1 << 14)]
    round_tokens: usize,
    /// Compute threads of each [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    python: python::Arguments,
}

/// The peer: a process that computes what it is sent and says how long that took.
struct Peer {
    process: Worker,
}

impl Peer {
    fn start(python: &Path, model: &str, threads: usize) -> anyhow::Result<Peer> {
        let arguments = [model, &threads.to_string(), &PEER_BATCH.to_string()];
        let mut process = python::start(python, "st_serve.py", &arguments, threads)?;
        ensure!(process.line()?.trim() == "ready", "the peer did not get ready");
        Ok(Peer { process })
    }

    /// Seconds that the peer computed, by its own clock, and the first vector: sending texts is not its business.
    fn embed(&mut self, texts: &[String]) -> anyhow::Result<(f64, Vec<f32>)> {
        let orders = self.process.orders()?;
        serde_json::to_writer(&mut *orders, texts)?;
        orders.write_all(b"\n")?;
        orders.flush()?;
        let said: Value = serde_json::from_str(&self.process.line()?).context("what st_serve.py says")?;
        let seconds = said["seconds"].as_f64().context("no seconds in what st_serve.py says")?;
        Ok((seconds, serde_json::from_value(said["first"].clone())?))
    }
}

struct Row {
    tokens: usize,
    texts: usize,
    rates: Vec<(&'static str, Rates)>,
    max_difference: Option<f32>,
}

impl Row {
    fn rate(&self, name: &str) -> Option<f64> {
        self.rates.iter().find(|(n, _)| *n == name).map(|(_, rates)| rates.median)
    }
}

/// Runs the bench.
///
/// # Errors
/// When the model cannot be loaded, a text cannot be computed, or the two give different vectors.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => machine::allowed_cores()?.len(),
    };
    let folder = fixture::small_model_folder()?;
    let name = folder.to_str().context("the model folder's name is not UTF-8")?;
    let broker = Broker::start(threads)?;
    let model = broker.load(name)?;
    engine::set_threads(threads)?;
    let attached = model.attach()?;
    let python = arguments.python.find()?;
    let mut peer = match &python {
        Some(python) => Some(Peer::start(python, name, threads)?),
        None => None,
    };
    let mut rows = Vec::new();
    for &tokens in &arguments.tokens {
        rows.push(measure(arguments, &model, &attached, peer.as_mut(), tokens)?);
    }
    let versions = python.as_deref().map(python::versions).transpose()?;
    Ok(report(&rows, threads, versions))
}

fn measure(
    arguments: &Arguments,
    model: &Model,
    attached: &AttachedModel,
    mut peer: Option<&mut Peer>,
    tokens: usize,
) -> anyhow::Result<Row> {
    let mut make = texts::Texts::new(tokens);
    let count = (arguments.round_tokens / tokens.max(1)).max(1);
    let mut rates: [(&'static str, Vec<f64>); 3] =
        [("lane", Vec::new()), ("in_place", Vec::new()), ("sentence_transformers", Vec::new())];
    let mut max_difference: Option<f32> = None;
    // The first round warms everything up and is not counted.
    for round in 0..=arguments.rounds {
        let texts: Vec<String> = (0..count).map(|_| make.next()).collect();
        let mut first_ours = Vec::new();
        let mut first_theirs = Vec::new();
        for turn in 0..rates.len() {
            let (name, rates) = &mut rates[(round + turn) % 3];
            let seconds = match *name {
                "sentence_transformers" => {
                    let Some(peer) = peer.as_deref_mut() else { continue };
                    let (seconds, first) = peer.embed(&texts)?;
                    first_theirs = first;
                    seconds
                }
                name => {
                    let start = Instant::now();
                    let vectors = match name {
                        "lane" => model.embed_with(&texts, &fixture::bulk_options())?,
                        _ => attached.embed(&texts)?,
                    };
                    let seconds = start.elapsed().as_secs_f64();
                    first_ours = vectors.get(0).context("no vector")?.to_vec();
                    seconds
                }
            };
            if round > 0 {
                rates.push(count as f64 / seconds);
            }
        }
        if !first_theirs.is_empty() {
            ensure!(first_ours.len() == first_theirs.len(), "vectors of different lengths");
            let differences = first_ours.iter().zip(&first_theirs).map(|(a, b)| (a - b).abs());
            let difference = differences.fold(0.0, f32::max);
            ensure!(
                difference <= SAME_WITHIN,
                "the peer's vector differs by {difference}: not the same work"
            );
            max_difference = Some(max_difference.unwrap_or_default().max(difference));
        }
    }
    Ok(Row {
        tokens,
        texts: count,
        rates: rates.into_iter().filter_map(|(name, rates)| Some((name, Rates::of(rates)?))).collect(),
        max_difference,
    })
}

fn report(rows: &[Row], threads: usize, versions: Option<String>) -> Report {
    let mut report = Report::new("throughput");
    report.figure("threads", threads);
    report.figure("precision", "f32");
    let mut table = Table::new(
        format!("Texts a second, f32, {threads} threads"),
        &["tokens", "texts a round", "who", "median", "spread", "of sentence-transformers"],
    );
    let mut figures = Vec::new();
    for row in rows {
        let mut figure = serde_json::Map::new();
        figure.insert("tokens".into(), row.tokens.into());
        figure.insert("texts".into(), row.texts.into());
        figure.insert("max_difference".into(), json!(row.max_difference));
        let theirs = row.rate("sentence_transformers");
        for (name, rates) in &row.rates {
            figure.insert(format!("{name}_texts_per_s"), rounded(rates.median).into());
            figure.insert(
                format!("{name}_texts_per_s_spread"),
                json!([rounded(rates.low), rounded(rates.high)]),
            );
            let ratio = theirs.map(|theirs| rates.median / theirs);
            if *name != "sentence_transformers" {
                figure.insert(format!("{name}_to_sentence_transformers"), json!(ratio.map(rounded)));
            }
            table.row(vec![
                row.tokens.to_string(),
                row.texts.to_string(),
                (*name).into(),
                short(rates.median),
                format!("{}-{}", short(rates.low), short(rates.high)),
                ratio.map_or("-".into(), |ratio| format!("{ratio:.2}")),
            ]);
        }
        // A goal is met by being small: the peer's rate by ours.
        let what = format!("sentence-transformers / lane, texts a second, {} tokens", row.tokens);
        let ratio = theirs.zip(row.rate("lane")).map(|(theirs, ours)| rounded(theirs / ours));
        report.goal(what, ratio, 1.0 / 2.4);
        figures.push(Value::Object(figure));
    }
    report.figure("throughput", figures);
    report.table(table);
    match versions {
        Some(versions) => {
            report.figure("versions", versions.clone());
            report.remark(format!(
                "sentence-transformers: {versions}; batches of {PEER_BATCH}, times by its own clock"
            ));
        }
        None => report.remark(
            "sentence-transformers was not measured: no Python that has it (benches/peers/install.sh)",
        ),
    }
    report
}

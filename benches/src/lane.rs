//! `lane`: what it costs to have a text computed elsewhere. One text when nothing else runs, and many texts when all cores
//! are busy: through a lane, through the socket, and in place on the attached model, in blocks that alternate.

use crate::fixture::{self, Broker};
use crate::machine;
use crate::report::{Report, Table, rounded, short};
use crate::samples::{Samples, Summary};
use crate::texts;
use anyhow::Context;
use serde_json::json;
use std::time::Instant;
use worker_sdk::{AttachedModel, EmbedOptions, Model, ModelRequest, Route};

/// Single texts in a block.
const BLOCK: usize = 50;
/// Aimed at: how much longer one text takes through the lane, µs.
const GOAL_OVERHEAD_US: f64 = 60.0;
/// Aimed at: how much throughput the lane costs, as a share.
const GOAL_LOSS: f64 = 0.01;

/// Arguments of `lane`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Blocks of each route; they alternate.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Lengths of a text in tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128])]
    tokens: Vec<usize>,
    /// Texts of one measurement of throughput.
    #[arg(long, default_value_t = 256)]
    texts: usize,
}

/// A way to have texts computed.
enum Way {
    Lane(Model),
    Socket(Model),
    InPlace(AttachedModel),
}

impl Way {
    const fn name(&self) -> &'static str {
        match self {
            Way::Lane(_) => "lane",
            Way::Socket(_) => "socket",
            Way::InPlace(_) => "in_place",
        }
    }

    fn embed(&self, texts: &[String], options: &EmbedOptions) -> anyhow::Result<()> {
        let vectors = match self {
            Way::Lane(model) | Way::Socket(model) => model.embed_with(texts, options)?,
            Way::InPlace(model) => model.embed(texts)?,
        };
        anyhow::ensure!(vectors.len() == texts.len(), "{} vectors for {} texts", vectors.len(), texts.len());
        Ok(())
    }
}

/// One length of texts, measured.
struct Row {
    tokens: usize,
    idle: Vec<(&'static str, Summary)>,
    texts_per_s: Vec<(&'static str, Rates)>,
}

/// Texts a second: median, lowest and highest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    /// Median over the rounds.
    pub(crate) median: f64,
    /// Lowest of a round.
    pub(crate) low: f64,
    /// Highest of a round.
    pub(crate) high: f64,
}

impl Rates {
    /// `None` without rounds.
    pub(crate) fn of(mut rates: Vec<f64>) -> Option<Rates> {
        rates.sort_by(f64::total_cmp);
        Some(Rates { median: *rates.get(rates.len() / 2)?, low: *rates.first()?, high: *rates.last()? })
    }
}

impl Row {
    fn idle_p50(&self, way: &str) -> Option<f64> {
        self.idle.iter().find(|(name, _)| *name == way).map(|(_, summary)| summary.p50_us)
    }

    fn rate(&self, way: &str) -> Option<f64> {
        self.texts_per_s.iter().find(|(name, _)| *name == way).map(|(_, rates)| rates.median)
    }

    fn overhead_us(&self, way: &str) -> Option<f64> {
        Some(self.idle_p50(way)? - self.idle_p50("in_place")?)
    }

    fn loss(&self, way: &str) -> Option<f64> {
        Some(1.0 - self.rate(way)? / self.rate("in_place")?)
    }
}

/// Runs the bench.
///
/// # Errors
/// When the model cannot be loaded or a text cannot be computed.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let broker = Broker::start(machine::allowed_cores()?.len())?;
    let folder = fixture::small_model_folder()?;
    let name = folder.to_str().context("the model folder's name is not UTF-8")?;
    let held = broker.load(name)?;
    let socket = broker.connect()?.model_with(ModelRequest::new(name).route(Route::Socket))?;
    let mut ways = [Way::InPlace(held.attach()?), Way::Lane(held), Way::Socket(socket)];
    let mut rows = Vec::new();
    for &tokens in &arguments.tokens {
        rows.push(measure(arguments, &mut ways, tokens)?);
    }
    Ok(report(&rows))
}

fn measure(arguments: &Arguments, ways: &mut [Way; 3], tokens: usize) -> anyhow::Result<Row> {
    let mut texts = texts::Texts::new(tokens);
    let options = fixture::single_options();
    let mut idle: Vec<(&'static str, Samples)> =
        ways.iter().map(|way| (way.name(), Samples::new())).collect();
    for round in 0..arguments.rounds {
        for turn in 0..ways.len() {
            let at = (round + turn) % ways.len();
            let samples = &mut idle[at].1;
            for number in 0..BLOCK + BLOCK / 5 {
                let text = [texts.next()];
                let start = Instant::now();
                ways[at].embed(&text, &options)?;
                if number >= BLOCK / 5 {
                    samples.record(start.elapsed());
                }
            }
            samples.end_block();
        }
    }
    let bulk = fixture::bulk_options();
    let mut rates: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    for round in 0..arguments.rounds {
        for turn in 0..ways.len() {
            let at = (round + turn) % ways.len();
            let many: Vec<String> = (0..arguments.texts).map(|_| texts.next()).collect();
            let start = Instant::now();
            ways[at].embed(&many, &bulk)?;
            rates[at].push(many.len() as f64 / start.elapsed().as_secs_f64());
        }
    }
    Ok(Row {
        tokens,
        idle: idle.iter().filter_map(|(name, samples)| Some((*name, samples.summary()?))).collect(),
        texts_per_s: ways
            .iter()
            .zip(rates)
            .filter_map(|(way, rates)| Some((way.name(), Rates::of(rates)?)))
            .collect(),
    })
}

fn report(rows: &[Row]) -> Report {
    let mut report = Report::new("lane");
    let mut idle = Table::new(
        "One text when idle: µs",
        &["tokens", "way", "p50", "p99", "p50 spread", "p50 more than in place"],
    );
    let mut busy = Table::new(
        "Many texts, all cores busy: texts a second",
        &["tokens", "way", "median", "spread", "less than in place"],
    );
    let mut figures = Vec::new();
    for row in rows {
        let mut figure = serde_json::Map::new();
        figure.insert("tokens".into(), row.tokens.into());
        for (way, s) in &row.idle {
            let over = row.overhead_us(way).unwrap_or_default();
            figure.insert(format!("{way}_p50_us"), rounded(s.p50_us).into());
            figure.insert(format!("{way}_p99_us"), rounded(s.p99_us).into());
            figure.insert(format!("{way}_overhead_p50_us"), rounded(over).into());
            let spread = format!("{}-{}", short(s.spread_us.0), short(s.spread_us.1));
            idle.row(vec![
                row.tokens.to_string(),
                (*way).into(),
                short(s.p50_us),
                short(s.p99_us),
                spread,
                short(over),
            ]);
        }
        for (way, rates) in &row.texts_per_s {
            let loss = row.loss(way).unwrap_or_default();
            figure.insert(format!("{way}_texts_per_s"), rounded(rates.median).into());
            figure.insert(
                format!("{way}_texts_per_s_spread"),
                json!([rounded(rates.low), rounded(rates.high)]),
            );
            figure.insert(format!("{way}_throughput_loss"), rounded(loss).into());
            let spread = format!("{}-{}", short(rates.low), short(rates.high));
            let loss = format!("{:.1} %", loss * 100.0);
            busy.row(vec![row.tokens.to_string(), (*way).into(), short(rates.median), spread, loss]);
        }
        figures.push(serde_json::Value::Object(figure));
        let tokens = row.tokens;
        report.goal(
            format!("lane - in place, one text of {tokens} tokens, p50 µs"),
            row.overhead_us("lane").map(rounded),
            GOAL_OVERHEAD_US,
        );
        report.goal(
            format!("throughput lost through the lane, {tokens} tokens, share"),
            row.loss("lane").map(rounded),
            GOAL_LOSS,
        );
    }
    report.figure("lane", figures);
    report.table(idle);
    report.table(busy);
    report
}

//! `cache`: one text that was embedded before, answered in the client's process, beside the same text computed by the engine;
//! in blocks that alternate.

use crate::fixture::{self, Broker};
use crate::machine;
use crate::report::{Report, Table, rounded, short};
use crate::samples::{Samples, Summary};
use crate::texts;
use anyhow::{Context, ensure};
use std::time::{Duration, Instant};
use worker_sdk::{EmbedOptions, Model};

/// Texts that take turns: as many as a busy program may ask for again, and few enough to stay in the processor's caches.
const TEXTS: usize = 64;
/// Cached texts in a block.
const CACHED_BLOCK: usize = 2000;
/// Computed texts in a block.
const COMPUTED_BLOCK: usize = 40;
/// Aimed at for a cached text, µs.
const GOAL_US: f64 = 5.0;
/// How long the broker may take to have written what was computed.
const WRITTEN_WITHIN: Duration = Duration::from_secs(10);

/// Arguments of `cache`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Blocks of each kind; they alternate.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Lengths of a text in tokens.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128])]
    tokens: Vec<usize>,
}

/// One length of texts, measured.
struct Row {
    tokens: usize,
    cached: Summary,
    computed: Summary,
    missed: Summary,
}

/// Runs the bench.
///
/// # Errors
/// When the model cannot be loaded, a text cannot be computed, or one that was computed is not found.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let broker = Broker::start_with_cache(machine::allowed_cores()?.len())?;
    let folder = fixture::small_model_folder()?;
    let model = broker.load(folder.to_str().context("the model folder's name is not UTF-8")?)?;
    let rows: Vec<Row> = arguments
        .tokens
        .iter()
        .map(|tokens| measure(arguments, &model, *tokens))
        .collect::<anyhow::Result<_>>()?;
    Ok(report(&rows))
}

fn measure(arguments: &Arguments, model: &Model, tokens: usize) -> anyhow::Result<Row> {
    let mut source = texts::Texts::new(tokens);
    let texts: Vec<[String; 1]> = (0..TEXTS).map(|_| [source.next()]).collect();
    let until = Instant::now() + WRITTEN_WITHIN;
    for text in &texts {
        while !model.embed(text)?.cached()[0] {
            ensure!(Instant::now() < until, "a text is not found although it was computed");
        }
    }
    let fresh = EmbedOptions::default().bypass_cache(true);
    let (mut cached, mut computed, mut missed) = (Samples::new(), Samples::new(), Samples::new());
    for _ in 0..arguments.rounds {
        for text in texts.iter().cycle().take(CACHED_BLOCK) {
            let start = Instant::now();
            let vectors = model.embed(text)?;
            cached.record(start.elapsed());
            ensure!(vectors.cached()[0], "a text was computed that should have been found");
        }
        cached.end_block();
        for text in texts.iter().cycle().take(COMPUTED_BLOCK) {
            let start = Instant::now();
            let vectors = model.embed_with(text, &fresh)?;
            computed.record(start.elapsed());
            ensure!(!vectors.cached()[0], "a text was found that should have been computed");
        }
        computed.end_block();
        for _ in 0..COMPUTED_BLOCK {
            let text = [source.next()];
            let start = Instant::now();
            model.embed(&text)?;
            missed.record(start.elapsed());
        }
        missed.end_block();
    }
    Ok(Row {
        tokens,
        cached: cached.summary().context("no rounds")?,
        computed: computed.summary().context("no rounds")?,
        missed: missed.summary().context("no rounds")?,
    })
}

fn report(rows: &[Row]) -> Report {
    let mut report = Report::new("cache");
    let mut table = Table::new("One text: µs", &["tokens", "answered", "p50", "p99", "p50 spread"]);
    let mut figures = Vec::new();
    for row in rows {
        let mut figure = serde_json::Map::new();
        figure.insert("tokens".into(), row.tokens.into());
        for (key, name, s) in [
            ("cached", "from the cache", row.cached),
            ("computed", "computed, cache bypassed", row.computed),
            ("missed", "looked up in vain, computed, kept", row.missed),
        ] {
            figure.insert(format!("{key}_p50_us"), rounded(s.p50_us).into());
            figure.insert(format!("{key}_p99_us"), rounded(s.p99_us).into());
            let spread = format!("{}-{}", short(s.spread_us.0), short(s.spread_us.1));
            table.row(vec![row.tokens.to_string(), name.into(), short(s.p50_us), short(s.p99_us), spread]);
        }
        figures.push(serde_json::Value::Object(figure));
        report.goal(
            format!("one cached text of {} tokens, p50 µs", row.tokens),
            Some(rounded(row.cached.p50_us)),
            GOAL_US,
        );
    }
    report.figure("cache", figures);
    report.table(table);
    report
}

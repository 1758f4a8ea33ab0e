//! `peers`: texts a second and the time of one text, ours and other engines in one run, in rounds that alternate; each
//! from texts to vectors on its own clock. What the parts do is in the modules below.

mod chart;
mod contenders;
mod gemm;
mod results;
mod sets;

use crate::fixture::{self, Broker};
use crate::report::{Report, Table, rounded, short};
use crate::{machine, python};
use anyhow::{Context, ensure};
use clap::ValueEnum;
pub(crate) use contenders::Vectors;
use contenders::{Contender, Made, OURS, PEERS, Peer, ST, Way};
use engine::compile::Precision;
use gemm::Gemm;
use results::{Nearness, Row, Rows, Samples};
use serde_json::{Map, Value, json};
use sets::{Passages, Set, Sets};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Documents whose passages calibrate quantised models of peers, so many at most; the prose set has others.
const CALIBRATION_TEXTS: usize = 300;
/// Rounds after which the GEMM peak is measured again.
const ROUNDS_A_PEAK: usize = 3;
/// The environment variable that forces a path of ours; the engine reads it.
const FORCED_PATH: &str = "MODELBROKER_CPU_PATH";

/// Arguments of `peers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Rounds; the engines alternate in each.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Tokens of all texts of a batch together.
    #[arg(long, default_value_t = 1 << 13)]
    round_tokens: usize,
    /// Texts that are computed one by one in each round.
    #[arg(long, default_value_t = 12)]
    singles: usize,
    /// Which texts.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Set::value_variants().to_vec())]
    sets: Vec<Set>,
    /// Only these engines: modelbroker, sentence-transformers, onnxruntime, openvino, fastembed.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only these precisions: f32, bf16, int8.
    #[arg(long, value_delimiter = ',')]
    precisions: Vec<String>,
    /// Compute threads of each [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
    /// Draw the rates of the 128-token texts into this file, as SVG.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Where exported and quantised models of peers are kept [default: benches/peers/.models]
    #[arg(long, value_name = "FOLDER")]
    models: Option<PathBuf>,
    #[command(flatten)]
    python: python::Arguments,
}

impl Arguments {
    fn wants(&self, engine: &str, precision: Precision) -> bool {
        let among = |list: &[String], name: &str| list.is_empty() || list.iter().any(|listed| listed == name);
        among(&self.only, engine) && among(&self.precisions, precision.name())
    }

    /// # Errors
    /// When a name is none of an engine or precision, or a count is zero.
    fn check(&self) -> anyhow::Result<()> {
        let engines: Vec<&str> = PEERS.iter().map(|(engine, _)| *engine).chain([OURS]).collect();
        let precisions = Precision::ALL.map(Precision::name);
        for (given, known) in [(&self.only, &engines[..]), (&self.precisions, &precisions[..])] {
            for name in given {
                ensure!(known.contains(&name.as_str()), "{name} is none of {}", known.join(", "));
            }
        }
        ensure!(self.rounds > 0 && self.singles > 0, "at least one round and one single text are needed");
        ensure!(self.threads != Some(0), "at least one thread is needed");
        Ok(())
    }
}

/// Everything that is measured, ready.
struct Field {
    contenders: Vec<Contender>,
    processes: Vec<Peer>,
    gemm: Option<Gemm>,
    versions: BTreeMap<&'static str, String>,
    remarks: Vec<String>,
    // Last, so that it ends after those that it computes for.
    broker: Broker,
}

/// Runs the bench.
///
/// # Errors
/// When our own model cannot be loaded in f32, or a text cannot be computed by an engine that was ready.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    arguments.check()?;
    let threads = match arguments.threads {
        Some(threads) => threads,
        None => machine::allowed_cores()?.len(),
    };
    let folder = fixture::small_model_folder()?;
    let mut sets = Sets::new(&tree().join("demo/corpus"))?;
    let mut field = Field::new(arguments, &folder, threads)?;
    let mut rows = Vec::new();
    for &set in &arguments.sets {
        rows.extend(field.measure(arguments, set, &mut sets)?);
    }
    let operations = gemm::operations_a_token(&folder)?;
    let mut report = report(&rows, &field, threads, operations);
    if let Some(file) = &arguments.chart {
        let drawing = draw(&rows, threads);
        std::fs::write(file, drawing).with_context(|| format!("writing {}", file.display()))?;
        // Beside the document that the report goes into, as everything that it shows.
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        report.remark(format!("drawn: ![Texts of 128 tokens a second, by precision and engine]({name})"));
    }
    Ok(report)
}

/// The root of the source tree.
fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

impl Field {
    fn new(arguments: &Arguments, folder: &Path, threads: usize) -> anyhow::Result<Field> {
        let name = folder.to_str().context("the model folder's name is not UTF-8")?;
        engine::set_threads(threads)?;
        let mut field = Field {
            contenders: Vec::new(),
            processes: Vec::new(),
            gemm: None,
            versions: BTreeMap::new(),
            remarks: Vec::new(),
            broker: Broker::start(threads)?,
        };
        match arguments.python.find()? {
            Some(python) => field.add_peers(arguments, &python, name, threads)?,
            None => {
                let why = "peers and GEMM peak were not measured: no Python that has them (benches/peers/install.sh)";
                field.remarks.push(why.into());
            }
        }
        for precision in Precision::ALL {
            if arguments.wants(OURS, precision) {
                field.add_ours(name, precision)?;
            }
        }
        ensure!(!field.contenders.is_empty(), "nothing to measure: {}", field.remarks.join("; "));
        Ok(field)
    }

    fn add_ours(&mut self, name: &str, precision: Precision) -> anyhow::Result<()> {
        // Without a suffix a model is f32 unless the environment says otherwise, so it is always named.
        let named = format!("{name}:{}", precision.name());
        let loaded = self.broker.load(&named);
        let model = match (loaded, precision) {
            (Ok(model), _) => model,
            (Err(error), Precision::F32) => return Err(error),
            (Err(error), _) => {
                self.remarks.push(format!(
                    "{OURS} {} was not measured: {}",
                    precision.name(),
                    error.root_cause()
                ));
                return Ok(());
            }
        };
        let attached = model.attach()?;
        for (route, way) in [("lane", Way::Lane(model)), ("attached", Way::Attached(attached))] {
            self.contenders.push(Contender { engine: OURS, precision, route: route.into(), way });
        }
        Ok(())
    }

    fn add_peers(
        &mut self,
        arguments: &Arguments,
        python: &Path,
        model: &str,
        threads: usize,
    ) -> anyhow::Result<()> {
        let cache = arguments.models.clone().unwrap_or_else(|| tree().join("benches/peers/.models"));
        let made = match calibrated(python, model, &cache) {
            Ok(made) => made,
            Err(error) => {
                self.remarks.push(format!("peers were not measured: {error:#}"));
                return Ok(());
            }
        };
        for (name, why) in &made.errors {
            self.remarks.push(format!("{name} could not be made for its engine: {why}"));
        }
        let wanted = PEERS.into_iter().filter(|(engine, precision)| arguments.wants(engine, *precision));
        let started: Vec<Peer> = wanted
            .map(|peer| Peer::start(python, peer, model, &made, threads))
            .collect::<anyhow::Result<_>>()?;
        for mut peer in started {
            let (engine, precision) = (peer.engine, peer.precision);
            match peer.ready() {
                Ok((routes, versions)) => {
                    self.versions.insert(engine, versions);
                    let number = self.processes.len();
                    self.processes.push(peer);
                    self.contenders.extend(routes.into_iter().map(|route| Contender {
                        engine,
                        precision,
                        route,
                        way: Way::Process(number),
                    }));
                }
                Err(why) => {
                    self.remarks.push(format!("{engine} {} was not measured: {why:#}", precision.name()));
                }
            }
        }
        match Gemm::start(python, threads) {
            Ok(gemm) => self.gemm = Some(gemm),
            Err(why) => self.remarks.push(format!("the GEMM peak was not measured: {why:#}")),
        }
        Ok(())
    }

    fn measure(&mut self, arguments: &Arguments, set: Set, sets: &mut Sets) -> anyhow::Result<Vec<Row>> {
        let count = self.contenders.len();
        let mut samples: Vec<Samples> = (0..count).map(|_| Samples::default()).collect();
        // The first round warms everything up; only its vectors count.
        for round in 0..=arguments.rounds {
            let texts = sets.of_tokens(set, arguments.round_tokens);
            let singles = sets.some(set, arguments.singles);
            let mut vectors = vec![Vectors::default(); count];
            for turn in 0..count {
                let number = (round + turn) % count;
                let contender = &self.contenders[number];
                let whose =
                    || format!("{} {} {}", contender.engine, contender.precision.name(), contender.route);
                let (seconds, computed) = contender.batch(&mut self.processes, &texts).with_context(whose)?;
                vectors[number] = computed;
                let single_s = contender.singles(&mut self.processes, &singles).with_context(whose)?;
                if round > 0 {
                    samples[number].batch(texts.len(), seconds);
                    samples[number].singles(&single_s);
                }
            }
            let is_reference =
                |contender: &Contender| contender.engine == ST && contender.precision == Precision::F32;
            if let Some(reference) = self.contenders.iter().position(is_reference) {
                for (number, computed) in vectors.iter().enumerate() {
                    samples[number].near(Nearness::of(computed, &vectors[reference])?);
                }
            }
            if let Some(gemm) = self.gemm.as_mut().filter(|_| round % ROUNDS_A_PEAK == 1) {
                gemm.measure()?;
            }
        }
        let row = |(contender, samples): (&Contender, Samples)| {
            samples.row(contender.engine, contender.precision, contender.route.clone(), set)
        };
        Ok(self.contenders.iter().zip(samples).filter_map(row).collect())
    }
}

/// What peers load, quantised with passages of this project's documentation.
fn calibrated(python: &Path, model: &str, cache: &Path) -> anyhow::Result<Made> {
    let mut passages = Passages::read(&tree().join("docs"))?;
    let texts: Vec<String> = (0..CALIBRATION_TEXTS).map(|_| passages.next()).collect();
    contenders::make(python, model, cache, &texts)
}

fn report(rows: &[Row], field: &Field, threads: usize, operations_a_token: f64) -> Report {
    let mut report = Report::new("peers");
    let peak = |precision| field.gemm.as_ref().and_then(|gemm| gemm.peak(precision));
    let share = |row: &Row| {
        let operations = row.rates.median * row.set.tokens()? as f64 * operations_a_token;
        Some(operations / (peak(row.precision)?.gops * 1e9))
    };
    report.figure("threads", threads);
    let forced = std::env::var(FORCED_PATH).ok().filter(|path| !path.is_empty());
    report.figure("cpu_path", json!(forced));
    report.figure("results", rows.iter().map(|row| row.to_json(threads, share(row))).collect::<Vec<_>>());
    let mut gops = Map::new();
    let mut libraries = Map::new();
    let mut said = Vec::new();
    for precision in Precision::ALL {
        let found = peak(precision);
        gops.insert(precision.name().into(), json!(found.map(|peak| rounded(peak.gops))));
        libraries.insert(precision.name().into(), json!(found.map(|peak| &peak.library)));
        if let Some(peak) = found {
            said.push(format!("{} {} ({})", precision.name(), short(peak.gops), peak.library));
        }
    }
    report.figure("gemm_peak_gops", Value::Object(gops));
    report.figure("gemm_peak_library", Value::Object(libraries));
    report.figure("versions", json!(field.versions));

    report.table(across(rows, format!("Texts a second, {threads} threads: median (spread)"), |row| {
        format!("{} ({}-{})", short(row.rates.median), short(row.rates.low), short(row.rates.high))
    }));
    report.table(across(rows, "One text alone: p50 / p99 ms".into(), |row| {
        format!("{} / {}", short(row.p50_ms), short(row.p99_ms))
    }));
    report.table(across(rows, "Cosine to sentence-transformers f32: lowest (mean)".into(), |row| {
        row.nearness.map_or("-".into(), |near| format!("{:.6} ({:.6})", near.cosine_min, near.cosine_mean))
    }));
    report.table(across(rows, "Share of the GEMM peak".into(), |row| {
        share(row).map_or("-".into(), |share| format!("{:.0} %", share * 100.0))
    }));
    let allowed = peak(Precision::F32)
        .zip(Set::Medium.tokens())
        .map(|(peak, tokens)| peak.gops * 1e9 / (operations_a_token * tokens as f64));
    Rows(rows).goals(allowed).into_iter().for_each(|(what, value, at_most)| {
        report.goal(what, value.map(rounded), at_most);
    });
    if !said.is_empty() {
        report.remark(format!(
            "GEMM peak, 10^9 operations a second, the best product of big square matrices by numpy, torch and OpenVINO \
             (oneDNN): {}; a share is of the linear layers' operations, attention not counted",
            said.join(", ")
        ));
    }
    if let Some(path) = forced {
        report.remark(format!("{OURS} was kept to the path {path} ({FORCED_PATH})"));
    }
    for (engine, versions) in &field.versions {
        report.remark(format!("{engine}: {versions}"));
    }
    field.remarks.iter().for_each(|remark| report.remark(remark.clone()));
    report
}

/// One line for each engine, precision and route, one column for each set.
fn across(rows: &[Row], title: String, cell: impl Fn(&Row) -> String) -> Table {
    let mut sets: Vec<Set> = Vec::new();
    let mut lines: Vec<(&str, Precision, &str)> = Vec::new();
    for row in rows {
        let line = (row.engine, row.precision, row.route.as_str());
        if !sets.contains(&row.set) {
            sets.push(row.set);
        }
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    let mut header = vec!["precision", "engine", "route"];
    header.extend(sets.iter().map(|set| set.name()));
    let mut table = Table::new(title, &header);
    for precision in Precision::ALL {
        for (engine, _, route) in lines.iter().filter(|(_, of, _)| *of == precision) {
            let mut cells = vec![precision.name().to_owned(), (*engine).into(), (*route).into()];
            cells.extend(sets.iter().map(|set| {
                let of_line = |row: &&Row| {
                    row.set == *set
                        && row.precision == precision
                        && row.engine == *engine
                        && row.route == *route
                };
                rows.iter().find(of_line).map_or("-".into(), &cell)
            }));
            table.row(cells);
        }
    }
    table
}

/// The rates of the 128-token texts, grouped by precision.
fn draw(rows: &[Row], threads: usize) -> String {
    let groups = Precision::ALL.map(|precision| {
        let of_group = rows.iter().filter(|row| row.set == Set::Medium && row.precision == precision);
        let bars = of_group.map(|row| chart::Bar {
            label: if row.route == "in_process" {
                row.engine.into()
            } else {
                format!("{}, {}", row.engine, row.route.replace('_', " "))
            },
            value: row.rates.median,
            ours: row.engine == OURS,
        });
        chart::Group { name: precision.name().into(), bars: bars.collect() }
    });
    chart::svg(&format!("Texts of 128 tokens a second, all-MiniLM-L6-v2, {threads} threads"), &groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(engine: &'static str, precision: Precision, route: &str, set: Set) -> Row {
        let mut samples = Samples::default();
        samples.batch(10, 1.0);
        samples.singles(&[0.25]);
        samples.row(engine, precision, route.into(), set).unwrap()
    }

    #[test]
    fn tables_have_a_line_for_each_engine_and_a_column_for_each_set() {
        let rows = [
            row(OURS, Precision::Int8, "lane", Set::Short),
            row(OURS, Precision::F32, "lane", Set::Short),
            row(ST, Precision::F32, "in_process", Set::Mix),
        ];
        let table = format!("{:?}", across(&rows, "t".into(), |row| short(row.p50_ms)));
        let ours = table.find(r#"["f32", "modelbroker", "lane", "250", "-"]"#).expect(&table);
        let peer = table.find(r#"["f32", "sentence-transformers", "in_process", "-", "250"]"#).expect(&table);
        let int8 = table.find(r#"["int8", "modelbroker", "lane", "250", "-"]"#).expect(&table);
        assert!(ours < peer && peer < int8, "the most exact come first: {table}");
    }

    #[test]
    fn the_chart_shows_one_set_by_precision() {
        let rows = [
            row(OURS, Precision::F32, "lane", Set::Medium),
            row("openvino", Precision::Int8, "throughput_hint", Set::Medium),
            row(ST, Precision::F32, "in_process", Set::Mix),
        ];
        let drawing = draw(&rows, 2);
        assert!(drawing.contains("modelbroker, lane") && drawing.contains("openvino, throughput hint"));
        assert!(!drawing.contains("sentence-transformers"), "another set's rates are not drawn");
    }

    #[test]
    fn unknown_engines_and_empty_runs_are_refused() {
        let check = |line: &[&str]| {
            let given = ["benches", "peers"].iter().chain(line);
            match <crate::Arguments as clap::Parser>::try_parse_from(given).unwrap().bench {
                crate::Bench::Peers(arguments) => arguments.check(),
                other => panic!("{other:?}"),
            }
        };
        check(&["--only", "openvino,modelbroker", "--precisions", "bf16", "--sets", "128,prose"]).unwrap();
        assert!(check(&["--only", "torch"]).unwrap_err().to_string().contains("sentence-transformers"));
        assert!(check(&["--precisions", "f16"]).is_err());
        assert!(check(&["--rounds", "0"]).is_err());
        assert!(check(&["--threads", "0"]).is_err());
    }
}

//! `peers`: texts a second and the time of one text, ours and other engines in one run, in rounds that alternate; each
//! from texts to vectors on its own clock. What the parts do is in the modules below.

pub(crate) mod candle;
mod chart;
pub(crate) mod contenders;
pub(crate) mod field;
mod gemm;
pub(crate) mod results;
pub(crate) mod sets;

use crate::fixture;
use crate::report::{Report, Table, rounded, short};
use anyhow::{Context, ensure};
use clap::ValueEnum;
pub(crate) use contenders::Vectors;
use contenders::{Contender, OURS, PEERS};
use engine::CPU_PATH_VARIABLE;
use engine::compile::Precision;
use field::{Choice, Field, tree};
use gemm::Gemm;
use results::{Row, Rows, Samples};
use serde_json::{Map, Value, json};
use sets::{Set, Sets};
use std::path::PathBuf;

/// Forced paths compute so small a part of a round's texts: the slowest would take minutes for all.
const FORCED_PART: usize = 4;
/// Rounds after which the GEMM peak is measured again.
const ROUNDS_A_PEAK: usize = 3;

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
    /// Draw the rates of the 128-token texts into this file, as SVG.
    #[arg(long, value_name = "FILE")]
    chart: Option<PathBuf>,
    /// Measure ours also with these CPU paths forced, on a quarter of the 128-token texts: amx, avx512-vnni, avx512, avx2,
    /// portable.
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    cpu_paths: Vec<String>,
    #[command(flatten)]
    choice: Choice,
}

impl Arguments {
    /// # Errors
    /// When a name is none of an engine, or a count is zero.
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.rounds > 0 && self.singles > 0, "at least one round and one single text are needed");
        self.choice.check()
    }
}

/// Runs the bench.
///
/// # Errors
/// When our own model cannot be loaded in f32, or a text cannot be computed by an engine that was ready.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    arguments.check()?;
    let choice = &arguments.choice;
    let threads = choice.threads()?;
    let folder = fixture::small_model_folder()?;
    let mut sets = Sets::new(&tree().join("demo/corpus"))?;
    let mut field = Field::new(&folder, threads)?;
    let mut gemm = None;
    match choice.python.find()? {
        Some(python) => {
            field.add_peers(choice, &python, &PEERS)?;
            field.add_infinity(choice, &python);
            match Gemm::start(&python, threads) {
                Ok(started) => gemm = Some(started),
                Err(why) => field.remarks.push(format!("the GEMM peak was not measured: {why:#}")),
            }
        }
        None => {
            let why =
                "peers and GEMM peak were not measured: no Python that has them (benches/peers/install.sh)";
            field.remarks.push(why.into());
        }
    }
    field.add_candle(choice)?;
    field.add_ours(choice, &["lane", "socket", "attached"])?;
    field.add_paths(choice, &arguments.cpu_paths)?;
    ensure!(!field.contenders.is_empty(), "nothing to measure: {}", field.remarks.join("; "));
    let mut rows = Vec::new();
    for &set in &arguments.sets {
        rows.extend(measure(&mut field, &mut gemm, arguments, set, &mut sets)?);
    }
    let operations = gemm::operations_a_token(&folder)?;
    let mut report = report(&rows, &field, gemm.as_ref(), threads, operations);
    if let Some(file) = &arguments.chart {
        let drawing = draw(&rows, threads);
        std::fs::write(file, drawing).with_context(|| format!("writing {}", file.display()))?;
        // Beside the document that the report goes into, as everything that it shows.
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        report.remark(format!("drawn: ![Texts of 128 tokens a second, by precision and engine]({name})"));
    }
    Ok(report)
}

/// Every contender on one set, in rounds.
fn measure(
    field: &mut Field,
    gemm: &mut Option<Gemm>,
    arguments: &Arguments,
    set: Set,
    sets: &mut Sets,
) -> anyhow::Result<Vec<Row>> {
    let taking: Vec<usize> =
        (0..field.contenders.len()).filter(|number| field.contenders[*number].takes(set)).collect();
    let mut samples: Vec<Samples> = field.contenders.iter().map(|_| Samples::default()).collect();
    // The first round warms everything up; only its vectors count.
    for round in 0..=arguments.rounds {
        let texts = sets.of_tokens(set, arguments.round_tokens);
        let singles = sets.some(set, arguments.singles);
        let mut vectors: Vec<Option<Vectors>> = vec![None; samples.len()];
        for turn in 0..taking.len() {
            let number = taking[(round + turn) % taking.len()];
            let texts = match field.contenders[number].cpu_path {
                Some(_) => &texts[..texts.len().div_ceil(FORCED_PART)],
                None => &texts[..],
            };
            let (seconds, computed) = field.batch(number, texts)?;
            vectors[number] = Some(computed);
            let single_s = field.singles(number, &singles)?;
            if round > 0 {
                samples[number].batch(texts.len(), seconds);
                samples[number].singles(&single_s);
            }
        }
        for (samples, near) in samples.iter_mut().zip(field.nearness(&vectors)?) {
            near.into_iter().for_each(|near| samples.near(near));
        }
        if let Some(gemm) = gemm.as_mut().filter(|_| round % ROUNDS_A_PEAK == 1) {
            gemm.measure()?;
        }
    }
    let row = |(contender, samples): (&Contender, Samples)| samples.row(contender, set);
    Ok(field.contenders.iter().zip(samples).filter_map(row).collect())
}

fn report(
    rows: &[Row],
    field: &Field,
    gemm: Option<&Gemm>,
    threads: usize,
    operations_a_token: f64,
) -> Report {
    let mut report = Report::new("peers");
    let peak = |precision| gemm.and_then(|gemm| gemm.peak(precision));
    let share = |row: &Row| {
        let operations = row.rates.median * row.set.tokens()? as f64 * operations_a_token;
        Some(operations / (peak(row.precision)?.gops * 1e9))
    };
    report.figure("threads", threads);
    let forced = std::env::var(CPU_PATH_VARIABLE).ok().filter(|path| !path.is_empty());
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

    report.table(across(rows, format!("Texts a second, {threads} threads: median (spread)"), rate));
    report.table(across(rows, "One text alone: p50 / p99 ms".into(), |row| {
        format!("{} / {}", short(row.p50_ms), short(row.p99_ms))
    }));
    report.table(across(rows, "Cosine to sentence-transformers f32: lowest (mean)".into(), cosines));
    report.table(across(rows, "Share of the GEMM peak".into(), |row| {
        share(row).map_or("-".into(), |share| format!("{:.0} %", share * 100.0))
    }));
    forced_paths(rows, threads).into_iter().for_each(|table| report.table(table));
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
        report.remark(format!("{OURS} was kept to the path {path} ({CPU_PATH_VARIABLE})"));
    }
    for (engine, versions) in &field.versions {
        report.remark(format!("{engine}: {versions}"));
    }
    field.remarks.iter().for_each(|remark| report.remark(remark.clone()));
    report
}

/// One line for each engine, precision and route, one column for each set; forced paths have a table of their own.
fn across(rows: &[Row], title: String, cell: impl Fn(&Row) -> String) -> Table {
    let mut sets: Vec<Set> = Vec::new();
    let mut lines: Vec<(&str, Precision, &str)> = Vec::new();
    let rows: Vec<&Row> = rows.iter().filter(|row| row.cpu_path.is_none()).collect();
    for row in &rows {
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
                let of_line = |row: &&&Row| {
                    row.set == *set
                        && row.precision == precision
                        && row.engine == *engine
                        && row.route == *route
                };
                rows.iter().find(of_line).map_or("-".into(), |row| cell(row))
            }));
            table.row(cells);
        }
    }
    table
}

/// Ours kept to slower paths, beside the one that it takes by itself; `None` when no path was forced.
fn forced_paths(rows: &[Row], threads: usize) -> Option<Table> {
    rows.iter().find(|row| row.cpu_path.is_some())?;
    let mut table = Table::new(
        format!("Ours through the lane, kept to a CPU path: texts of 128 tokens, {threads} threads"),
        &["precision", "path", "texts a second", "one text: p50 / p99 ms", "cosine, lowest (mean)"],
    );
    let ours = |row: &&Row| row.engine == OURS && row.route == "lane" && row.set == Set::Medium;
    for precision in Precision::ALL {
        for row in rows.iter().filter(ours).filter(|row| row.precision == precision) {
            table.row(vec![
                precision.name().into(),
                row.cpu_path.clone().unwrap_or_else(|| "its own choice".into()),
                rate(row),
                format!("{} / {}", short(row.p50_ms), short(row.p99_ms)),
                cosines(row),
            ]);
        }
    }
    Some(table)
}

fn rate(row: &Row) -> String {
    format!("{} ({}-{})", short(row.rates.median), short(row.rates.low), short(row.rates.high))
}

fn cosines(row: &Row) -> String {
    row.nearness.map_or("-".into(), |near| format!("{:.6} ({:.6})", near.cosine_min, near.cosine_mean))
}

/// The rates of the 128-token texts, grouped by precision.
fn draw(rows: &[Row], threads: usize) -> String {
    let groups = Precision::ALL.map(|precision| {
        let of_group = rows.iter().filter(|row| row.set == Set::Medium && row.precision == precision);
        // Forced paths are no way that somebody would choose.
        let bars = of_group.filter(|row| row.cpu_path.is_none()).map(|row| chart::Bar {
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
    use super::contenders::ST;
    use super::*;

    fn row(engine: &'static str, precision: Precision, route: &str, set: Set) -> Row {
        let mut samples = Samples::default();
        samples.batch(10, 1.0);
        samples.singles(&[0.25]);
        samples.row(&Contender::unmeasurable(engine, precision, route), set).unwrap()
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
    fn forced_paths_have_a_table_of_their_own() {
        let own = row(OURS, Precision::F32, "lane", Set::Medium);
        assert!(forced_paths(std::slice::from_ref(&own), 2).is_none());
        let forced = Row { cpu_path: Some("avx2".into()), ..own.clone() };
        let rows = [forced, own, row(OURS, Precision::F32, "socket", Set::Medium)];
        let table = format!("{:?}", forced_paths(&rows, 2).unwrap());
        assert!(table.contains(r#""avx2""#) && table.contains(r#""its own choice""#), "{table}");
        assert!(!format!("{:?}", across(&rows, "t".into(), rate)).contains("avx2"));
        assert!(!draw(&rows, 2).contains("avx2"));
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
        assert!(check(&["--rounds", "0"]).is_err());
        assert!(check(&["--threads", "0"]).is_err());
    }
}

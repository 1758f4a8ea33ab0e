//! `accuracy`: what precisions cost in what vectors are for: how near they are to f32's, whether they find the same
//! neighbours, and whether they order pairs of sentences alike. Ours beside other engines, on the same texts. No times.

mod pairs;
mod statistics;

use crate::fixture;
use crate::peers::Vectors;
use crate::peers::contenders::{OPENVINO, ORT, OURS, PEERS, ST};
use crate::peers::field::{Choice, Field, tree};
use crate::peers::results::Nearness;
use crate::peers::sets::Passages;
use crate::report::{Report, Table, rounded};
use anyhow::{Context, ensure};
use engine::compile::Precision;
use pairs::Pairs;
use serde_json::json;
use statistics::{Agreement, Units, agreement, spearman};
use std::collections::HashSet;

/// Neighbours of a text that are compared.
const NEIGHBOURS: usize = 10;
/// Texts that are sent at once.
const BATCH: usize = 128;

/// Arguments of `accuracy`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Passages of prose whose vectors are compared with f32's.
    #[arg(long, default_value_t = 400)]
    passages: usize,
    #[command(flatten)]
    choice: Choice,
}

/// One engine at one precision.
#[derive(Debug, Clone)]
struct Row {
    engine: &'static str,
    precision: Precision,
    near: Nearness,
    neighbours: Agreement,
    /// Rank correlation of the cosines of pairs with the grades.
    to_grade: f64,
    /// The same with the reference's cosines.
    to_reference: f64,
}

/// Runs the bench.
///
/// # Errors
/// When our own model cannot be loaded in f32, or a text cannot be computed by an engine that was ready.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<Report> {
    let choice = &arguments.choice;
    choice.check()?;
    ensure!(arguments.passages > 0, "--passages must be at least 1");
    let pairs = Pairs::read().context("the graded pairs")?;
    let mut prose = Passages::read(&tree().join("demo/corpus"))?;
    // Neighbours are searched among single sentences: passages overlap, and find each other at any precision.
    let sentences = distinct(pairs.sentences.iter().cloned().chain(prose.sentences()));
    let passages: Vec<String> = (0..arguments.passages).map(|_| prose.next()).collect();

    let threads = choice.threads()?;
    let mut field = Field::new(&fixture::small_model_folder()?, threads)?;
    if let Some(python) = choice.python.find()? {
        let wanted: Vec<_> =
            PEERS.into_iter().filter(|(engine, _)| [ST, ORT, OPENVINO].contains(engine)).collect();
        field.add_peers(choice, &python, &wanted)?;
    }
    field.add_ours(choice, &["lane"])?;
    // Hints of one engine change its speed, not its vectors.
    let mut seen = HashSet::new();
    let taken: Vec<usize> = (0..field.contenders.len())
        .filter(|number| seen.insert((field.contenders[*number].engine, field.contenders[*number].precision)))
        .collect();
    let ours = || field.contenders.iter().position(|of| of.engine == OURS && of.precision == Precision::F32);
    let reference = field.reference().or_else(ours).context("nothing in f32 to compare with")?;
    let whose = field.contenders[reference].engine;
    if whose == OURS {
        let why = "sentence-transformers was not measured (benches/peers/install.sh): our own f32 stands in";
        field.remarks.push(why.into());
    }
    let reference = Measured::of(&mut field, reference, &passages, &sentences, &pairs)?;
    let mut rows = Vec::new();
    for number in taken {
        let measured = Measured::of(&mut field, number, &passages, &sentences, &pairs)?;
        let contender = &field.contenders[number];
        rows.push(
            measured
                .row(contender.engine, contender.precision, &reference, &pairs)
                .with_context(|| contender.name())?,
        );
    }
    Ok(report(&rows, &field, whose, [passages.len(), sentences.len(), pairs.pairs.len()]))
}

/// Every text once, in the order of their first coming.
fn distinct(texts: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen = HashSet::new();
    texts.filter(|text| seen.insert(text.clone())).collect()
}

/// What one engine makes of all texts.
struct Measured {
    prose: Vectors,
    neighbours: Vec<Vec<usize>>,
    cosines: Vec<f64>,
}

impl Measured {
    fn of(
        field: &mut Field,
        number: usize,
        passages: &[String],
        sentences: &[String],
        pairs: &Pairs,
    ) -> anyhow::Result<Measured> {
        let mut embed = |texts: &[String]| -> anyhow::Result<Vectors> {
            let mut all = Vectors::default();
            for batch in texts.chunks(BATCH) {
                let (_, vectors) = field.batch(number, batch)?;
                all.dim = vectors.dim;
                all.values.extend(vectors.values);
            }
            Ok(all)
        };
        let prose = embed(passages)?;
        // The sentences of the pairs come first, in their order.
        let units = Units::of(&embed(sentences)?)?;
        let cosines = pairs.pairs.iter().map(|(_, a, b)| units.cosine(*a, *b)).collect();
        Ok(Measured { prose, neighbours: units.neighbours(NEIGHBOURS), cosines })
    }

    fn row(
        &self,
        engine: &'static str,
        precision: Precision,
        reference: &Measured,
        pairs: &Pairs,
    ) -> anyhow::Result<Row> {
        let grades: Vec<f64> = pairs.pairs.iter().map(|(grade, ..)| f64::from(*grade)).collect();
        let flat = "cosines that are all the same";
        Ok(Row {
            engine,
            precision,
            near: Nearness::of(&self.prose, &reference.prose)?,
            neighbours: agreement(&self.neighbours, &reference.neighbours).context("no neighbours")?,
            to_grade: spearman(&self.cosines, &grades).context(flat)?,
            to_reference: spearman(&self.cosines, &reference.cosines).context(flat)?,
        })
    }
}

/// A figure of a row, the smaller the better.
type Loss = fn(&Row) -> f64;

/// What is lost against f32.
const LOSSES: [(&str, Loss); 5] = [
    ("1 - lowest cosine", |row| 1.0 - row.near.cosine_min),
    ("1 - mean cosine", |row| 1.0 - row.near.cosine_mean),
    ("nearest neighbours that are others", |row| 1.0 - row.neighbours.first),
    ("ten nearest neighbours that are others", |row| 1.0 - row.neighbours.overlap),
    ("1 - Spearman to f32's cosines", |row| 1.0 - row.to_reference),
];

/// What is aimed at: (what, measured, at most).
fn goals(rows: &[Row]) -> Vec<(String, Option<f64>, f64)> {
    let find =
        |engine: &str, precision| rows.iter().find(|row| row.engine == engine && row.precision == precision);
    let ours = |precision| find(OURS, precision);
    let millionths = |row: Option<&Row>, of: Loss| row.map(|row| of(row) * 1e6);
    let [(_, lowest), (_, mean), ..] = LOSSES;
    let int8 = ours(Precision::Int8);
    let mut goals = vec![
        ("(1 - lowest cosine) x 10^6, bf16".to_owned(), millionths(ours(Precision::Bf16), lowest), 100.0),
        ("(1 - lowest cosine) x 10^6, int8".to_owned(), millionths(int8, lowest), 8000.0),
        ("(1 - mean cosine) x 10^6, int8".to_owned(), millionths(int8, mean), 2000.0),
    ];
    for (what, of) in LOSSES {
        let peers = [ORT, OPENVINO].into_iter().filter_map(|engine| find(engine, Precision::Int8));
        let best = peers.map(of).min_by(f64::total_cmp).filter(|loss| *loss > 0.0);
        let value = int8.map(of).zip(best).map(|(ours, best)| ours / best);
        goals.push((format!("{what}, ours / better of ONNX Runtime and OpenVINO, int8"), value, 1.0));
    }
    goals
}

fn report(rows: &[Row], field: &Field, reference: &str, [passages, sentences, pairs]: [usize; 3]) -> Report {
    let mut report = Report::new("accuracy");
    report.figure("reference", reference);
    report.figure("passages", passages);
    report.figure("sentences", sentences);
    report.figure("pairs", pairs);
    // Cosines near 1 need more digits than other figures.
    let digits = |value: f64| (value * 1e7).round() / 1e7;
    let figure = |row: &Row| {
        json!({
            "engine": row.engine, "precision": row.precision.name(),
            "cosine_min": digits(row.near.cosine_min), "cosine_mean": digits(row.near.cosine_mean),
            "max_difference": row.near.max_difference,
            "top1_agreement": digits(row.neighbours.first), "top10_overlap": digits(row.neighbours.overlap),
            "spearman_grade": digits(row.to_grade), "spearman_f32": digits(row.to_reference),
        })
    };
    report.figure("results", rows.iter().map(figure).collect::<Vec<_>>());
    report.figure("versions", json!(field.versions));
    let mut table = Table::new(
        format!("Against {reference} f32: {passages} passages, {sentences} sentences, {pairs} graded pairs"),
        &[
            "precision",
            "engine",
            "cosine, lowest",
            "cosine, mean",
            "same nearest",
            "same among ten nearest",
            "Spearman to f32's cosines",
            "Spearman to the grades",
        ],
    );
    for precision in Precision::ALL {
        for row in rows.iter().filter(|row| row.precision == precision) {
            table.row(vec![
                precision.name().into(),
                row.engine.into(),
                format!("{:.6}", row.near.cosine_min),
                format!("{:.6}", row.near.cosine_mean),
                format!("{:.1} %", row.neighbours.first * 100.0),
                format!("{:.1} %", row.neighbours.overlap * 100.0),
                format!("{:.5}", row.to_reference),
                format!("{:.4}", row.to_grade),
            ]);
        }
    }
    report.table(table);
    for (what, value, at_most) in goals(rows) {
        report.goal(what, value.map(rounded), at_most);
    }
    for (engine, versions) in &field.versions {
        report.remark(format!("{engine}: {versions}"));
    }
    field.remarks.iter().for_each(|remark| report.remark(remark.clone()));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(engine: &'static str, precision: Precision, loss: f64) -> Row {
        let one = Vectors { dim: 1, values: vec![1.0] };
        let mut near = Nearness::of(&one, &one).unwrap();
        near.cosine_min = 1.0 - loss;
        near.cosine_mean = 1.0 - loss / 2.0;
        let neighbours = Agreement { first: 1.0 - loss, overlap: 1.0 - loss };
        Row { engine, precision, near, neighbours, to_grade: 0.8, to_reference: 1.0 - loss }
    }

    #[test]
    fn ours_is_held_against_the_better_of_the_peers() {
        let rows = [
            row(OURS, Precision::Int8, 0.002),
            row(ORT, Precision::Int8, 0.004),
            row(OPENVINO, Precision::Int8, 0.010),
            row(OURS, Precision::Bf16, 0.0001),
        ];
        let goals = goals(&rows);
        let value = |what: &str| goals.iter().find(|(name, ..)| name.starts_with(what)).unwrap().1.unwrap();
        assert!((value("(1 - lowest cosine) x 10^6, int8") - 2000.0).abs() < 1e-6);
        assert!((value("(1 - mean cosine) x 10^6, int8") - 1000.0).abs() < 1e-6);
        assert!((value("(1 - lowest cosine) x 10^6, bf16") - 100.0).abs() < 1e-6);
        for (what, _) in LOSSES {
            assert!((value(&format!("{what}, ours")) - 0.5).abs() < 1e-9, "{what}");
        }
        assert!(
            super::goals(&rows[..1])
                .iter()
                .filter(|(name, ..)| name.contains("better of"))
                .all(|goal| goal.1.is_none())
        );
    }

    #[test]
    fn texts_come_once() {
        let texts = ["a", "b", "a", "c", "b"].map(String::from);
        assert_eq!(distinct(texts.into_iter()), ["a", "b", "c"]);
    }
}

//! Samples of one engine on one set, what is said of them, and how they compare. Nothing is measured here.

use super::contenders::{Contender, OPENVINO, ORT, OURS, ST, Vectors};
use super::sets::Set;
use crate::lane::Rates;
use crate::report::rounded;
use crate::samples::quantile;
use anyhow::ensure;
use engine::compile::Precision;
use serde_json::{Value, json};

/// How near vectors are to the reference's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Nearness {
    /// Lowest cosine.
    pub(crate) cosine_min: f64,
    /// Mean cosine.
    pub(crate) cosine_mean: f64,
    /// Largest difference of a component.
    pub(crate) max_difference: f64,
    count: usize,
}

impl Nearness {
    /// Compares vectors of the same texts.
    ///
    /// # Errors
    /// When there are not as many of the same length, or one is nothing but zeros.
    pub(crate) fn of(ours: &Vectors, reference: &Vectors) -> anyhow::Result<Nearness> {
        ensure!(
            ours.dim == reference.dim && ours.values.len() == reference.values.len() && ours.dim > 0,
            "{} floats in vectors of {} against {} in vectors of {}",
            ours.values.len(),
            ours.dim,
            reference.values.len(),
            reference.dim
        );
        let mut nearness = Nearness { cosine_min: 1.0, ..Nearness::default() };
        for (a, b) in ours.values.chunks_exact(ours.dim).zip(reference.values.chunks_exact(ours.dim)) {
            let dot = |a: &[f32], b: &[f32]| -> f64 {
                a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
            };
            let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
            ensure!(cosine.is_finite(), "a vector of zeros or of what is no number");
            let difference = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
            nearness.add(Nearness {
                cosine_min: cosine,
                cosine_mean: cosine,
                max_difference: difference,
                count: 1,
            });
        }
        Ok(nearness)
    }

    /// Takes another comparison in.
    pub(crate) fn add(&mut self, other: Nearness) {
        let count = self.count + other.count;
        let sum = self.cosine_mean * self.count as f64 + other.cosine_mean * other.count as f64;
        self.cosine_min = self.cosine_min.min(other.cosine_min);
        self.max_difference = self.max_difference.max(other.max_difference);
        self.cosine_mean = if count == 0 { 0.0 } else { sum / count as f64 };
        self.count = count;
    }
}

/// What was measured of one engine on one set.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    rates: Vec<f64>,
    block_p50_ms: Vec<f64>,
    singles_ms: Vec<f64>,
    nearness: Option<Nearness>,
}

impl Samples {
    /// A batch: texts a second.
    pub(crate) fn batch(&mut self, texts: usize, seconds: f64) {
        self.rates.push(texts as f64 / seconds);
    }

    /// A block of single texts: seconds of each.
    pub(crate) fn singles(&mut self, seconds: &[f64]) {
        let mut block: Vec<f64> = seconds.iter().map(|seconds| seconds * 1e3).collect();
        self.singles_ms.extend(&block);
        self.block_p50_ms.extend(quantile(&mut block, 0.5));
    }

    /// A comparison with the reference.
    pub(crate) fn near(&mut self, nearness: Nearness) {
        self.nearness.get_or_insert(Nearness { cosine_min: 1.0, ..Nearness::default() }).add(nearness);
    }

    /// `None` without batches or single texts.
    pub(crate) fn row(mut self, contender: &Contender, set: Set) -> Option<Row> {
        Some(Row {
            engine: contender.engine,
            precision: contender.precision,
            route: contender.route.clone(),
            cpu_path: contender.cpu_path.clone(),
            set,
            rates: Rates::of(self.rates)?,
            p50_ms: quantile(&mut self.block_p50_ms, 0.5)?,
            p99_ms: quantile(&mut self.singles_ms, 0.99)?,
            nearness: self.nearness,
        })
    }
}

/// A result: one engine, one set.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// The engine.
    pub(crate) engine: &'static str,
    /// What it computes in.
    pub(crate) precision: Precision,
    /// How it is reached or set.
    pub(crate) route: String,
    /// The path that it was kept to.
    pub(crate) cpu_path: Option<String>,
    /// The texts.
    pub(crate) set: Set,
    /// Texts a second, all at once.
    pub(crate) rates: Rates,
    /// One text alone: median over the rounds of each round's median, ms.
    pub(crate) p50_ms: f64,
    /// One text alone: 99th percentile of all, ms.
    pub(crate) p99_ms: f64,
    /// How near its vectors are to the reference's.
    pub(crate) nearness: Option<Nearness>,
}

impl Row {
    /// For programs. `gemm_share` is the share of the GEMM peak, where a text has a known number of tokens.
    pub(crate) fn to_json(&self, threads: usize, gemm_share: Option<f64>) -> Value {
        // Cosines near 1 need more digits than rates.
        let digits = |value: f64| (value * 1e7).round() / 1e7;
        json!({
            "engine": self.engine,
            "precision": self.precision.name(),
            "threads": threads,
            "set": self.set.name(),
            "route": self.route,
            "cpu_path": self.cpu_path,
            "texts_per_s": rounded(self.rates.median),
            "texts_per_s_spread": [rounded(self.rates.low), rounded(self.rates.high)],
            "p50_ms": rounded(self.p50_ms),
            "p99_ms": rounded(self.p99_ms),
            "cosine_min": self.nearness.map(|near| digits(near.cosine_min)),
            "cosine_mean": self.nearness.map(|near| digits(near.cosine_mean)),
            "max_difference": self.nearness.map(|near| near.max_difference),
            "gemm_share": gemm_share.map(rounded),
        })
    }
}

/// Every result of a run, for questions across them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a>(pub(crate) &'a [Row]);

impl Rows<'_> {
    fn of(&self, engines: &[&str], precision: Precision, set: Set) -> impl Iterator<Item = &Row> {
        let fits = move |row: &&Row| row.precision == precision && row.set == set;
        self.0.iter().filter(fits).filter(move |row| engines.contains(&row.engine))
    }

    fn best_rate(&self, engines: &[&str], precision: Precision, set: Set) -> Option<f64> {
        self.of(engines, precision, set).map(|row| row.rates.median).max_by(f64::total_cmp)
    }

    fn lane(&self, precision: Precision, set: Set) -> Option<&Row> {
        self.of(&[OURS], precision, set).find(|row| row.route == "lane" && row.cpu_path.is_none())
    }

    fn lane_rate(&self, precision: Precision, set: Set) -> Option<f64> {
        Some(self.lane(precision, set)?.rates.median)
    }

    /// The best rate of some engines by that of our lane.
    fn theirs_to_ours(&self, engines: &[&str], precision: Precision, set: Set) -> Option<f64> {
        Some(self.best_rate(engines, precision, set)? / self.lane_rate(precision, set)?)
    }

    /// What is aimed at: (what, measured, at most). A ratio is met by being small, so the peer stands above the line.
    /// `peak_texts_per_s` is what the GEMM peak in f32 allows of 128-token texts.
    pub(crate) fn goals(&self, peak_texts_per_s: Option<f64>) -> Vec<(String, Option<f64>, f64)> {
        use Precision::{Bf16, F32, Int8};
        use Set::{Medium, Mix, Prose, Short};
        let runtimes = [ORT, OPENVINO];
        let millionths = |share: f64| share * 1e6;
        let mut goals: Vec<(String, Option<f64>, f64)> = vec![
            (
                "sentence-transformers / lane, f32, 128".into(),
                self.theirs_to_ours(&[ST], F32, Medium),
                1.0 / 2.4,
            ),
            (
                "better of ONNX Runtime and OpenVINO / lane, f32, 128".into(),
                self.theirs_to_ours(&runtimes, F32, Medium),
                1.0 / 1.1,
            ),
            (
                "better of ONNX Runtime and OpenVINO / lane, f32, mix".into(),
                self.theirs_to_ours(&runtimes, F32, Mix),
                1.0 / 1.2,
            ),
            (
                "what the GEMM peak allows / lane, f32, 128".into(),
                peak_texts_per_s.zip(self.lane_rate(F32, Medium)).map(|(peak, ours)| peak / ours),
                1.0 / 0.75,
            ),
            (
                "largest difference from sentence-transformers x 10^6, f32".into(),
                self.worst(F32, None, |near| millionths(near.max_difference)),
                2.0,
            ),
            ("OpenVINO / lane, bf16, 128".into(), self.theirs_to_ours(&[OPENVINO], Bf16, Medium), 1.0 / 1.25),
            (
                "f32 / bf16, lane, 128".into(),
                self.lane_rate(F32, Medium).zip(self.lane_rate(Bf16, Medium)).map(|(f32, bf16)| f32 / bf16),
                1.0 / 1.7,
            ),
            (
                "(1 - lowest cosine) x 10^6, bf16, all sets".into(),
                self.worst(Bf16, None, |near| millionths(1.0 - near.cosine_min)),
                100.0,
            ),
            (
                "OpenVINO (better hint) / lane, int8, 128".into(),
                self.theirs_to_ours(&[OPENVINO], Int8, Medium),
                1.0 / 1.1,
            ),
            (
                "(1 - lowest cosine) x 10^6, int8, prose".into(),
                self.worst(Int8, Some(Prose), |near| millionths(1.0 - near.cosine_min)),
                8000.0,
            ),
            (
                "(1 - mean cosine) x 10^6, int8, prose".into(),
                self.worst(Int8, Some(Prose), |near| millionths(1.0 - near.cosine_mean)),
                2000.0,
            ),
        ];
        for precision in Precision::ALL {
            let ours = self.lane(precision, Short).map(|row| row.p50_ms);
            let peers: Vec<&str> = self.0.iter().map(|row| row.engine).filter(|name| *name != OURS).collect();
            let best = self.of(&peers, precision, Short).map(|row| row.p50_ms).min_by(f64::total_cmp);
            let what = format!("lane / quickest peer, one text of 16 tokens, p50, {}", precision.name());
            goals.push((what, ours.zip(best).map(|(ours, best)| ours / best), 1.0));
        }
        goals
    }

    /// The worst of ours at a precision, on one set or on all.
    fn worst(&self, precision: Precision, set: Option<Set>, of: impl Fn(Nearness) -> f64) -> Option<f64> {
        let ours = self.0.iter().filter(|row| row.engine == OURS && row.precision == precision);
        let ours = ours.filter(|row| set.is_none_or(|set| row.set == set));
        ours.filter_map(|row| row.nearness.map(&of)).max_by(f64::total_cmp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(engine: &'static str, precision: Precision, route: &str, set: Set, rate: f64) -> Row {
        let mut samples = Samples::default();
        samples.batch(100, 100.0 / rate);
        samples.singles(&[1.0 / rate; 3]);
        samples.row(&Contender::unmeasurable(engine, precision, route), set).unwrap()
    }

    fn goal(rows: &[Row], peak: Option<f64>, what: &str) -> (Option<f64>, f64) {
        let goals = Rows(rows).goals(peak);
        let found = goals.into_iter().find(|(name, ..)| name.starts_with(what)).unwrap();
        (found.1, found.2)
    }

    #[test]
    fn ratios_take_the_best_hint_of_the_best_peer() {
        let f32 = Precision::F32;
        let rows = [
            row(OURS, f32, "lane", Set::Medium, 150.0),
            row(OURS, f32, "attached", Set::Medium, 999.0),
            row(OURS, Precision::Bf16, "lane", Set::Medium, 300.0),
            row(ST, f32, "in_process", Set::Medium, 50.0),
            row(ORT, f32, "in_process", Set::Medium, 110.0),
            row(OPENVINO, f32, "latency_hint", Set::Medium, 100.0),
            row(OPENVINO, f32, "throughput_hint", Set::Medium, 120.0),
            row(OPENVINO, f32, "throughput_hint", Set::Mix, 777.0),
        ];
        let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-9;
        assert!(close(goal(&rows, None, "sentence-transformers / lane").0, 1.0 / 3.0));
        assert!(close(goal(&rows, None, "better of ONNX Runtime and OpenVINO / lane, f32, 128").0, 0.8));
        assert!(close(goal(&rows, None, "f32 / bf16").0, 0.5));
        assert!(close(goal(&rows, Some(180.0), "what the GEMM peak allows").0, 1.2));
        assert_eq!(goal(&rows, None, "what the GEMM peak allows").0, None);
        assert_eq!(goal(&rows, None, "OpenVINO / lane, bf16").0, None);
        assert_eq!(goal(&rows, None, "better of ONNX Runtime and OpenVINO / lane, f32, mix").0, None);
    }

    #[test]
    fn a_single_text_is_held_against_the_quickest_peer_at_its_precision() {
        let rows = [
            row(OURS, Precision::Int8, "lane", Set::Short, 2000.0),
            row(ORT, Precision::Int8, "in_process", Set::Short, 500.0),
            row(OPENVINO, Precision::Int8, "latency_hint", Set::Short, 1000.0),
            row(ST, Precision::F32, "in_process", Set::Short, 9999.0),
        ];
        let (value, at_most) = goal(&rows, None, "lane / quickest peer, one text of 16 tokens, p50, int8");
        assert!((value.unwrap() - 0.5).abs() < 1e-9 && at_most == 1.0);
    }

    #[test]
    fn nearness_knows_angles_and_lengths() {
        let vectors = |values: &[f32]| Vectors { dim: 2, values: values.to_vec() };
        let near = Nearness::of(&vectors(&[1.0, 0.0, 0.0, 2.0]), &vectors(&[1.0, 0.0, 1.0, 1.0])).unwrap();
        assert!((near.cosine_min - 0.5f64.sqrt()).abs() < 1e-9);
        assert!((near.cosine_mean - (1.0 + 0.5f64.sqrt()) / 2.0).abs() < 1e-9);
        assert_eq!(near.max_difference, 1.0);
        let mut both = near;
        both.add(Nearness::of(&vectors(&[1.0, 1.0]), &vectors(&[1.0, 1.0])).unwrap());
        assert!((both.cosine_mean - (2.0 + 0.5f64.sqrt()) / 3.0).abs() < 1e-9);
        assert_eq!(both.cosine_min, near.cosine_min);
        assert!(Nearness::of(&vectors(&[1.0, 1.0]), &vectors(&[1.0, 1.0, 1.0, 1.0])).is_err());
        assert!(Nearness::of(&vectors(&[0.0, 0.0]), &vectors(&[1.0, 1.0])).is_err());
        assert!(Nearness::of(&Vectors::default(), &Vectors::default()).is_err());
    }

    #[test]
    fn there_is_no_row_without_samples() {
        let ours = Contender::unmeasurable(OURS, Precision::F32, "lane");
        assert!(Samples::default().row(&ours, Set::Mix).is_none());
    }
}

//! Ranks, correlation and nearest neighbours: pure functions of numbers. What they are computed of is not known here.

use crate::peers::Vectors;
use anyhow::ensure;

/// Ranks from 1, ascending; equal values share the mean of the ranks that they take up together.
pub(crate) fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut before = 0;
    for tied in order.chunk_by(|a, b| values[*a] == values[*b]) {
        // Ranks before + 1 to before + n, whose mean this is.
        let shared = before as f64 + (tied.len() as f64 + 1.0) / 2.0;
        tied.iter().for_each(|number| ranks[*number] = shared);
        before += tied.len();
    }
    ranks
}

/// Spearman's rank correlation, ties counted: Pearson's correlation of the ranks. `None` for fewer than two pairs, or when
/// one side has only one value.
pub(crate) fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    if a.len() != b.len() || a.len() < 2 {
        return None;
    }
    let (a, b) = (ranks(a), ranks(b));
    // The mean of all ranks, with ties or without.
    let mean = (a.len() as f64 + 1.0) / 2.0;
    let products =
        |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum() };
    let spread = (products(&a, &a) * products(&b, &b)).sqrt();
    (spread > 0.0).then(|| products(&a, &b) / spread)
}

/// Vectors of length 1 in f64.
#[derive(Debug)]
pub(crate) struct Units(Vec<Vec<f64>>);

impl Units {
    /// # Errors
    /// When a vector has no direction.
    pub(crate) fn of(vectors: &Vectors) -> anyhow::Result<Units> {
        ensure!(vectors.dim > 0, "vectors without components");
        let unit = |row: &[f32]| -> anyhow::Result<Vec<f64>> {
            let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            ensure!(length.is_finite() && length > 0.0, "a vector of zeros or of what is no number");
            Ok(row.iter().map(|x| f64::from(*x) / length).collect())
        };
        Ok(Units(vectors.values.chunks_exact(vectors.dim).map(unit).collect::<anyhow::Result<_>>()?))
    }

    /// The cosine of two of them.
    pub(crate) fn cosine(&self, a: usize, b: usize) -> f64 {
        self.0[a].iter().zip(&self.0[b]).map(|(a, b)| a * b).sum()
    }

    /// For each vector the `count` others that are nearest to it, the nearest first; of equals the first.
    pub(crate) fn neighbours(&self, count: usize) -> Vec<Vec<usize>> {
        let of = |number: usize| {
            let mut others: Vec<(f64, usize)> = (0..self.0.len())
                .filter(|other| *other != number)
                .map(|other| (self.cosine(number, other), other))
                .collect();
            others.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            others.into_iter().take(count).map(|(_, other)| other).collect()
        };
        (0..self.0.len()).map(of).collect()
    }
}

/// How much two lists of neighbours agree.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Agreement {
    /// Share of the texts whose nearest neighbour is the same.
    pub(crate) first: f64,
    /// Mean share of the neighbours that both lists have, in any order.
    pub(crate) overlap: f64,
}

/// Compares lists of neighbours of the same texts; `None` without neighbours.
pub(crate) fn agreement(a: &[Vec<usize>], b: &[Vec<usize>]) -> Option<Agreement> {
    if a.len() != b.len() || a.iter().chain(b).any(Vec::is_empty) || a.is_empty() {
        return None;
    }
    let pairs = || a.iter().zip(b);
    let same = pairs().filter(|(a, b)| a[0] == b[0]).count();
    let shared: f64 = pairs()
        .map(|(a, b)| {
            a.iter().filter(|number| b.contains(number)).count() as f64 / a.len().max(b.len()) as f64
        })
        .sum();
    Some(Agreement { first: same as f64 / a.len() as f64, overlap: shared / a.len() as f64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_share_their_ranks() {
        assert_eq!(ranks(&[30.0, 10.0, 20.0]), [3.0, 1.0, 2.0]);
        assert_eq!(ranks(&[5.0, 1.0, 5.0, 5.0, 0.0]), [4.0, 2.0, 4.0, 4.0, 1.0]);
        assert_eq!(ranks(&[]), Vec::<f64>::new());
    }

    #[test]
    fn rank_correlation_is_that_of_the_textbook() {
        let close = |a: &[f64], b: &[f64], expected: f64| {
            let found = spearman(a, b).unwrap();
            assert!((found - expected).abs() < 1e-12, "{found} instead of {expected}");
        };
        // Any growing function of the values keeps it at 1.
        close(&[1.0, 2.0, 3.0], &[1.0, 10.0, 11.0], 1.0);
        close(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0], -1.0);
        // Without ties: 1 - 6 * sum of d^2 / (n (n^2 - 1)), d = 1, 1, 0, 1, 1.
        close(&[1.0, 2.0, 3.0, 4.0, 5.0], &[2.0, 1.0, 3.0, 5.0, 4.0], 0.8);
        // With ties: ranks 1.5, 1.5, 3 and 1, 2, 3 have correlation 1.5 / sqrt(1.5 * 2).
        close(&[7.0, 7.0, 9.0], &[1.0, 2.0, 3.0], 1.5 / 3.0_f64.sqrt());
        assert!(spearman(&[1.0, 1.0], &[1.0, 2.0]).is_none(), "one value has no ranks");
        assert!(spearman(&[1.0], &[1.0]).is_none());
        assert!(spearman(&[1.0, 2.0], &[1.0]).is_none());
    }

    #[test]
    fn neighbours_are_by_angle_and_leave_out_the_text_itself() {
        let vectors = Vectors { dim: 2, values: vec![1.0, 0.0, 9.0, 1.0, 0.0, 2.0, -1.0, 0.1] };
        let units = Units::of(&vectors).unwrap();
        assert!((units.cosine(0, 1) - 9.0 / 82.0_f64.sqrt()).abs() < 1e-12);
        assert_eq!(units.neighbours(2), [vec![1, 2], vec![0, 2], vec![1, 3], vec![2, 1]]);
        assert_eq!(units.neighbours(10)[0].len(), 3);
        assert!(Units::of(&Vectors { dim: 2, values: vec![0.0, 0.0] }).is_err());
        assert!(Units::of(&Vectors { dim: 1, values: vec![f32::NAN] }).is_err());
    }

    #[test]
    fn agreement_counts_the_first_and_what_both_have() {
        let found = agreement(&[vec![1, 2], vec![3, 4]], &[vec![1, 3], vec![4, 3]]).unwrap();
        assert_eq!(found, Agreement { first: 0.5, overlap: 0.75 });
        assert!(agreement(&[vec![]], &[vec![]]).is_none());
        assert!(agreement(&[], &[]).is_none());
    }
}

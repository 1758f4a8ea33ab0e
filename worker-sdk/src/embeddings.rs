//! What comes back from `embed`: vectors with what made them. How they travel is `shm_layout::payload`'s.

use crate::error::SdkError;
use crate::sharing::Way;

/// How far from one the norm of a vector may be that was made of norm one.
const UNIT_TOLERANCE: f64 = 1e-3;

/// One vector for each text, in the order of the texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    dim: usize,
    fingerprint: u64,
    cached: Vec<bool>,
    values: Vec<f32>,
    way: Way,
}

impl Embeddings {
    pub(crate) fn with_capacity(dim: usize, fingerprint: u64, rows: usize) -> Embeddings {
        let values = Vec::with_capacity(rows.saturating_mul(dim));
        Embeddings { dim, fingerprint, cached: Vec::with_capacity(rows), values, way: Way::Shared }
    }

    pub(crate) fn from_parts(
        dim: usize,
        fingerprint: u64,
        cached: Vec<bool>,
        values: Vec<f32>,
    ) -> Embeddings {
        debug_assert_eq!(cached.len() * dim, values.len());
        Embeddings { dim, fingerprint, cached, values, way: Way::Shared }
    }

    pub(crate) fn append(&mut self, mut rows: Embeddings) {
        debug_assert_eq!((self.dim, self.fingerprint), (rows.dim, rows.fingerprint));
        self.cached.append(&mut rows.cached);
        self.values.append(&mut rows.values);
    }

    /// The first `dimensions` numbers of each vector, made of norm one again where the whole vector was: for models trained so
    /// that the first numbers are an embedding by themselves (Matryoshka). `None` = all.
    ///
    /// # Errors
    /// [`SdkError::Argument`] when that is none, or more than there are.
    pub fn shortened(self, dimensions: Option<usize>) -> Result<Embeddings, SdkError> {
        let Some(dimensions) = dimensions.filter(|dimensions| *dimensions != self.dim) else {
            return Ok(self);
        };
        if dimensions == 0 || dimensions > self.dim {
            return Err(SdkError::Argument(format!(
                "{dimensions} dimensions of a model that has {}: ask for 1 to {}",
                self.dim, self.dim
            )));
        }
        let norm = |row: &[f32]| row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
        let mut values = Vec::with_capacity(self.len() * dimensions);
        for row in self.rows() {
            let short = &row[..dimensions];
            let length = norm(short);
            let is_unit = (norm(row) - 1.0).abs() < UNIT_TOLERANCE && length > 0.0;
            let factor = if is_unit { 1.0 / length } else { 1.0 };
            values.extend(short.iter().map(|x| (f64::from(*x) * factor) as f32));
        }
        Ok(Embeddings { dim: dimensions, values, ..self })
    }

    /// Vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cached.len()
    }

    /// Whether there is no vector (the list of texts was empty).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cached.is_empty()
    }

    /// Numbers in a vector.
    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Names weights, tokenizer, pooling and precision that made the vectors: vectors of different fingerprints must
    /// not be compared.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The vector of text `index`, `dim` numbers; `None` past the end.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&[f32]> {
        let at = index.checked_mul(self.dim)?;
        self.values.get(at..at.checked_add(self.dim)?)
    }

    /// The vectors, each of `dim` numbers.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        // A model has at least one dimension; an empty result of an unknown model must not panic all the same.
        self.values.chunks_exact(self.dim.max(1))
    }

    #[cfg(feature = "local")]
    pub(crate) fn computed_privately(mut self) -> Embeddings {
        self.way = Way::Private;
        self
    }

    /// Whether the shared model gave these vectors, or one that this process had to load for itself
    /// ([`crate::Fallback::Local`]). They are the same bit for bit.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// For each vector, whether it came from a cache.
    #[must_use]
    pub fn cached(&self) -> &[bool] {
        &self.cached
    }

    /// All numbers, row after row: `len * dim`.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All numbers, row after row, without a copy.
    #[must_use]
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// The vectors as lists of their own, `len` of `dim` numbers.
    #[must_use]
    pub fn to_vecs(&self) -> Vec<Vec<f32>> {
        self.rows().map(<[f32]>::to_vec).collect()
    }
}

impl std::ops::Index<usize> for Embeddings {
    type Output = [f32];

    /// The vector of text `index`.
    ///
    /// # Panics
    /// When there is no such text, as a slice does.
    fn index(&self, index: usize) -> &[f32] {
        &self.values[index * self.dim..(index + 1) * self.dim]
    }
}

impl<'a> IntoIterator for &'a Embeddings {
    type Item = &'a [f32];
    type IntoIter = std::slice::ChunksExact<'a, f32>;

    fn into_iter(self) -> Self::IntoIter {
        self.rows()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_by_index_and_in_order() {
        let mut all = Embeddings::with_capacity(2, 7, 3);
        all.append(Embeddings::from_parts(2, 7, vec![false], vec![1., 2.]));
        all.append(Embeddings::from_parts(2, 7, vec![true, false], vec![3., 4., 5., 6.]));
        assert_eq!((all.len(), all.dim(), all.fingerprint()), (3, 2, 7));
        assert_eq!(all.rows().collect::<Vec<_>>(), [[1., 2.], [3., 4.], [5., 6.]]);
        assert_eq!(&all[2], [5., 6.]);
        assert_eq!(all.get(3), None);
        assert_eq!(all.get(usize::MAX), None);
        assert_eq!(all.cached(), [false, true, false]);
        assert_eq!(Embeddings::with_capacity(0, 0, 0).rows().count(), 0);
    }

    #[test]
    fn shortened_vectors_have_norm_one_where_the_whole_had() {
        let all = Embeddings::from_parts(3, 7, vec![false; 2], vec![0.6, 0.0, 0.8, 3.0, 4.0, 5.0]);
        let short = all.clone().shortened(Some(2)).unwrap();
        assert_eq!((short.dim(), short.len()), (2, 2));
        assert_eq!(short.values(), [1.0, 0.0, 3.0, 4.0]);
        assert_eq!(all.clone().shortened(None).unwrap(), all);
        assert_eq!(all.clone().shortened(Some(3)).unwrap(), all);
        assert!(all.clone().shortened(Some(0)).is_err() && all.shortened(Some(4)).is_err());
    }
}

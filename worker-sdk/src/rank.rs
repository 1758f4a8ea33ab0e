//! Calls on models that classify: pairs of a query and texts to scores, texts to labels. How jobs travel is `seat`'s.

use crate::embeddings::Embeddings;
use crate::error::SdkError;
use crate::model::{Model, embeddings, run, spec};
use crate::seat::JobSpec;
use crate::settings::EmbedOptions;
use crate::split::split;
use crate::time::Deadline;
use shm_layout::limits::MAX_TEXT_BYTES;
use shm_layout::payload::{PayloadError, encode_texts};
use shm_layout::wire::Operation;
use std::ops::Range;
use std::sync::Arc;

/// A text with its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranked {
    /// Place of the text in the list that was given.
    pub index: usize,
    /// Its score: 0 to 1, the sigmoid of what the model gives.
    pub score: f32,
}

/// A label with its score.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelScore {
    /// The model's name of the label; its number where it has none.
    pub label: String,
    /// 0 to 1: by softmax over all labels, by sigmoid where there is only one.
    pub score: f32,
}

/// `1 / (1 + e^-x)`, in double precision.
fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

/// `e^x / sum of e^x`, in double precision.
fn softmax(row: &[f32]) -> Vec<f32> {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = row.iter().map(|x| (f64::from(*x) - f64::from(largest)).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|power| (power / sum) as f32).collect()
}

impl Model {
    /// The raw scores of a reranker or classifier for `query` with each of `texts`: a row of as many numbers as the model has
    /// labels for each text, in order. Pairs longer than the model reads are cut, the longer text first.
    ///
    /// # Errors
    /// [`SdkError`]; `WRONG_TASK` of a model that does not classify.
    pub fn score_pairs<T: AsRef<str>>(
        &self,
        query: &str,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        if query.len() > MAX_TEXT_BYTES {
            return Err(SdkError::Argument(format!(
                "a query of {} bytes; the limit is {MAX_TEXT_BYTES}",
                query.len()
            )));
        }
        self.scores(texts, Operation::Rank, options, |part, deadline| {
            let count = part.len();
            let mut all = Vec::with_capacity(count + 1);
            all.push(query);
            all.extend(texts[part].iter().map(AsRef::as_ref));
            let payload = encode_texts(&all)?;
            let priority = options.priority;
            Ok(Arc::new(JobSpec { operation: Operation::Rank, priority, deadline, payload, texts: count }))
        })
    }

    /// The texts in the order of how well they answer `query`, best first, by a reranker.
    ///
    /// # Errors
    /// [`SdkError`]; `WRONG_TASK` of a model that does not classify, [`SdkError::Argument`] of one with several labels.
    pub fn rank<T: AsRef<str>>(&self, query: &str, texts: &[T]) -> Result<Vec<Ranked>, SdkError> {
        self.rank_with(query, texts, &EmbedOptions::default())
    }

    /// As [`Model::rank`], with priority and timeout.
    ///
    /// # Errors
    /// As [`Model::rank`].
    pub fn rank_with<T: AsRef<str>>(
        &self,
        query: &str,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Vec<Ranked>, SdkError> {
        let rows = self.score_pairs(query, texts, options)?;
        if rows.dim() != 1 && !texts.is_empty() {
            return Err(SdkError::Argument(format!(
                "the model has {} labels, so its scores have no order: use a reranker, which has one",
                rows.dim()
            )));
        }
        let mut ranked: Vec<Ranked> = rows
            .values()
            .iter()
            .enumerate()
            .map(|(index, score)| Ranked { index, score: sigmoid(*score) })
            .collect();
        // By what the model gave: different scores may have the same sigmoid.
        let raw = rows.values();
        ranked.sort_by(|a, b| raw[b.index].total_cmp(&raw[a.index]).then(a.index.cmp(&b.index)));
        Ok(ranked)
    }

    /// The raw scores of a classifier: a row of as many numbers as the model has labels for each text, in order.
    ///
    /// # Errors
    /// [`SdkError`]; `WRONG_TASK` of a model that does not classify.
    pub fn score_texts<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        self.scores(texts, Operation::Classify, options, |part, deadline| {
            spec(texts, part, Operation::Classify, options, deadline)
        })
    }

    /// For each text the model's labels with their scores, best first.
    ///
    /// # Errors
    /// As [`Model::score_texts`].
    pub fn classify<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<LabelScore>>, SdkError> {
        let rows = self.score_texts(texts, &EmbedOptions::default())?;
        let facts = &self.description()?.facts;
        let labelled = |row: &[f32]| {
            let scores = if let [only] = row { vec![sigmoid(*only)] } else { softmax(row) };
            let label = |index: usize| facts.labels.get(index).cloned().unwrap_or_else(|| index.to_string());
            let mut scores: Vec<LabelScore> = scores
                .into_iter()
                .enumerate()
                .map(|(index, score)| LabelScore { label: label(index), score })
                .collect();
            scores.sort_by(|a, b| b.score.total_cmp(&a.score));
            scores
        };
        Ok(rows.rows().map(labelled).collect())
    }

    fn scores<T: AsRef<str>>(
        &self,
        texts: &[T],
        operation: Operation,
        options: &EmbedOptions,
        make: impl Fn(Range<usize>, Deadline) -> Result<Arc<JobSpec>, SdkError>,
    ) -> Result<Embeddings, SdkError> {
        let deadline = Deadline::after(options.timeout);
        let seat = self.seat();
        let model = seat.model()?;
        let parts = split(texts, operation, model.output_dim as usize)?;
        let mut all = Embeddings::with_capacity(model.output_dim as usize, model.fingerprint, texts.len());
        run(
            &seat,
            parts,
            |part| make(part, deadline),
            |range, answer| {
                let rows = embeddings(&answer, range.len())?;
                if (rows.dim(), rows.fingerprint()) != (all.dim(), all.fingerprint()) {
                    // Replaced since the list was begun.
                    return Err(PayloadError::Malformed(
                        "scores of another model than the one that was leased",
                    ));
                }
                all.append(rows);
                Ok(true)
            },
        )?;
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_become_probabilities() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert!(sigmoid(-200.0) < 1e-30 && sigmoid(200.0) == 1.0);
        let row = softmax(&[1000.0, 1000.0, -1000.0]);
        assert_eq!(row, [0.5, 0.5, 0.0]);
    }
}

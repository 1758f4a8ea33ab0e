//! Services that are built on models: summaries, and the texts of a corpus that are most like a query. What a program would
//! otherwise write itself; how models are called is elsewhere.

use crate::call::CallOptions;
use crate::error::SdkError;
use crate::model::Model;
use crate::prompt::Prompt;
use crate::rank::Ranked;
use crate::settings::EmbedOptions;
use shm_layout::wire::{GenerateAnswer, GeneratePrompt, GenerateSettings};

/// What T5 models were trained to find before a text that they are to summarise.
pub const SUMMARY_PREFIX: &str = "summarize: ";

/// How a text is summarised; the defaults are those of the field's reference services.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SummaryOptions {
    /// What is put before the text.
    pub prefix: String,
    /// Longest input in tokens, longer texts are cut (512).
    pub max_input_tokens: u32,
    /// Longest summary in tokens (128).
    pub max_output_tokens: u32,
    /// Beams that are followed (4).
    pub num_beams: u32,
}

impl Default for SummaryOptions {
    fn default() -> SummaryOptions {
        SummaryOptions {
            prefix: SUMMARY_PREFIX.into(),
            max_input_tokens: 512,
            max_output_tokens: 128,
            num_beams: 4,
        }
    }
}

impl Model {
    /// Summarises a text with a text-to-text model: by beam search that ends early.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn summarize(
        &self,
        text: &str,
        options: &SummaryOptions,
        call: &CallOptions,
    ) -> Result<GenerateAnswer, SdkError> {
        let settings = GenerateSettings {
            max_input_tokens: Some(options.max_input_tokens),
            max_output_tokens: options.max_output_tokens,
            num_beams: options.num_beams,
            early_stopping: options.num_beams > 1,
            ..GenerateSettings::default()
        };
        self.generate(GeneratePrompt::Text(format!("{}{text}", options.prefix)), &settings, call)
    }

    /// The `most` texts of a corpus that are most like a query, best first, by the cosine of their vectors (-1 to 1). The corpus
    /// is embedded as bulk work and kept in the broker's cache, so the next query finds it there. `options` are those of the
    /// query: its prompt, and the timeout of each of the two calls.
    ///
    /// # Errors
    /// As [`Model::embed_with`].
    pub fn similar<T: AsRef<str>>(
        &self,
        query: &str,
        corpus: &[T],
        most: usize,
        options: &EmbedOptions,
    ) -> Result<Vec<Ranked>, SdkError> {
        let query = self.embed_with(&[query], options)?;
        let of_corpus = EmbedOptions { prompt: Prompt::ModelDefault, ..options.clone() };
        let rows = self.embed_with(corpus, &of_corpus.priority(shm_layout::wire::Priority::Bulk))?;
        Ok(nearest(query.values(), rows.rows(), most))
    }
}

/// The `most` rows with the largest cosine to `query`, largest first; equal ones in their order.
fn nearest<'a>(query: &[f32], rows: impl Iterator<Item = &'a [f32]>, most: usize) -> Vec<Ranked> {
    let product =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum() };
    let query_norm = product(query, query).sqrt();
    let mut ranked: Vec<Ranked> = rows
        .enumerate()
        .map(|(index, row)| {
            let norms = query_norm * product(row, row).sqrt();
            let score = if norms > 0.0 { product(query, row) / norms } else { 0.0 };
            Ranked { index, score: score as f32 }
        })
        .collect();
    ranked.sort_by(|a, b| b.score.total_cmp(&a.score).then(a.index.cmp(&b.index)));
    ranked.truncate(most);
    ranked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_come_first_whatever_their_length() {
        let rows: [&[f32]; 4] = [&[0.0, 1.0], &[5.0, 5.0], &[0.1, 0.0], &[0.0, 0.0]];
        let found = nearest(&[2.0, 0.0], rows.into_iter(), 3);
        assert_eq!(found.iter().map(|ranked| ranked.index).collect::<Vec<_>>(), [2, 1, 0]);
        assert_eq!(found[0].score, 1.0);
        assert!((found[1].score - 0.5f32.sqrt()).abs() < 1e-6);
    }
}

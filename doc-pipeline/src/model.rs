//! What the pipeline needs of a model, and the checks on its answers. No model lives here.

use std::ops::Range;

/// How far a unit vector's squared length may be from 1.
const UNIT_NORM_TOLERANCE: f32 = 1e-3;

/// The model as the pipeline sees it: a tokenizer and an embedder. An SDK client implements it in one place.
pub trait TextModel {
    /// Stable id of the model, e.g. `all-MiniLM-L6-v2`; a store remembers it.
    fn model_id(&self) -> &str;

    /// Hash in hex of weights, tokenizer, pooling and precision: two models with the same fingerprint give the
    /// same vectors. A store made with another fingerprint is refused.
    fn fingerprint(&self) -> String;

    /// Length of a vector.
    fn dimension(&self) -> usize;

    /// Longest input in tokens, special tokens included; the model may cut what is longer.
    fn max_tokens(&self) -> usize;

    /// How many special tokens the model adds to one text (2 for BERT: `[CLS]` and `[SEP]`).
    fn special_tokens(&self) -> usize {
        2
    }

    /// Byte ranges of the tokens of each text, special tokens excluded, ascending, **not truncated**: a text
    /// longer than [`max_tokens`](Self::max_tokens) yields all its tokens. One list per text, in order.
    fn token_spans(&self, texts: &[&str]) -> Result<Vec<Vec<Range<usize>>>, ModelFailure>;

    /// One vector of length [`dimension`](Self::dimension) and of unit norm per text, in order.
    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ModelFailure>;

    /// The vector of a search text. Models that want an instruction before a query override it.
    fn embed_query(&self, text: &str) -> Result<Vec<f32>, ModelFailure> {
        let mut vectors = self.embed(&[text])?;
        match (vectors.pop(), vectors.is_empty()) {
            (Some(vector), true) => Ok(vector),
            _ => Err(ModelFailure::bad_answer("the model did not return exactly one vector for one query")),
        }
    }
}

/// What kind of failure it was, for exit codes and for the decision whether another try makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// The model can't be had now (no broker, still loading, out of memory): a later try may work.
    Unavailable,
    /// The model refused the input.
    Refused,
    /// The model's answer breaks the contract of [`TextModel`].
    BadAnswer,
}

/// A failure of the model, whatever stands behind [`TextModel`].
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct ModelFailure {
    /// What kind it was.
    pub kind: FailureKind,
    /// Cause and fix, for people.
    pub message: String,
    /// The error underneath, when there is one.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl ModelFailure {
    /// The model can't be had now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Unavailable, message: message.into(), source: None }
    }

    /// The model refused the input.
    pub fn refused(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::Refused, message: message.into(), source: None }
    }

    /// The model's answer breaks the contract.
    pub fn bad_answer(message: impl Into<String>) -> Self {
        Self { kind: FailureKind::BadAnswer, message: message.into(), source: None }
    }

    /// The same failure with the error that caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
}

/// Checks one vector: right length, finite, of unit norm. A model that failed half-way must not poison a store.
pub(crate) fn check_vector(vector: &[f32], dimension: usize) -> Result<(), ModelFailure> {
    if vector.len() != dimension {
        return Err(ModelFailure::bad_answer(format!(
            "the model returned a vector of {} numbers, but its dimension is {dimension}",
            vector.len()
        )));
    }
    if vector.iter().any(|x| !x.is_finite()) {
        return Err(ModelFailure::bad_answer("the model returned a vector that is not finite"));
    }
    let square: f32 = vector.iter().map(|x| x * x).sum();
    if (square - 1.0).abs() > UNIT_NORM_TOLERANCE {
        return Err(ModelFailure::bad_answer(format!(
            "the model returned a vector of squared length {square}, not a unit vector"
        )));
    }
    Ok(())
}

/// A token's byte range within a text, compact: documents have millions of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// Checks the spans of `text` (in range, on character boundaries, ascending starts) and appends them, moved by
/// `base`, to `out`. `whole_max` is the number of tokens at which a truncating model would have stopped.
pub(crate) fn check_spans(
    text: &str,
    spans: &[Range<usize>],
    base: usize,
    whole_max: usize,
    out: &mut Vec<Span>,
) -> Result<(), ModelFailure> {
    let mut last_start = 0;
    for span in spans {
        let sound = span.start <= span.end
            && span.start >= last_start
            && text.is_char_boundary(span.start)
            && text.is_char_boundary(span.end);
        if !sound {
            return Err(ModelFailure::bad_answer(format!(
                "the tokenizer returned the byte range {}..{} for a text of {} bytes",
                span.start,
                span.end,
                text.len()
            )));
        }
        last_start = span.start;
        let (Ok(start), Ok(end)) = (u32::try_from(base + span.start), u32::try_from(base + span.end)) else {
            return Err(ModelFailure::bad_answer("a text is longer than 4 GiB"));
        };
        out.push(Span { start, end });
    }
    // A tokenizer that truncates would lose the rest of the text without a word: seen by the tail that it left.
    let tail = spans.last().map_or(0, |span| span.end);
    if spans.len() >= whole_max && text[tail..].chars().any(char::is_alphanumeric) {
        return Err(ModelFailure::bad_answer(format!(
            "the tokenizer stopped after {} tokens, {} bytes before the end of the text",
            spans.len(),
            text.len() - tail
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_that_break_the_contract_are_refused() {
        assert!(check_vector(&[1.0, 0.0], 2).is_ok());
        assert!(check_vector(&[1.0], 2).is_err());
        assert!(check_vector(&[f32::NAN, 0.0], 2).is_err());
        assert!(check_vector(&[0.0, 0.0], 2).is_err());
    }

    #[test]
    fn spans_off_the_text_or_inside_a_character_are_refused() {
        let mut out = Vec::new();
        for (start, end) in [(0, 2), (0, 9), (3, 1)] {
            let span = Range { start, end };
            assert!(check_spans("aé b", std::slice::from_ref(&span), 0, 100, &mut out).is_err(), "{span:?}");
        }
        assert!(check_spans("aé b", &[4..5, 0..1], 0, 100, &mut out).is_err());
        out.clear();
        check_spans("aé b", &[0..3, 4..5], 10, 100, &mut out).expect("sound spans");
        assert_eq!(out, [Span { start: 10, end: 13 }, Span { start: 14, end: 15 }]);
    }

    #[test]
    fn a_truncating_tokenizer_is_noticed() {
        let mut out = Vec::new();
        assert!(check_spans("a b c d", &[0..1, 2..3], 0, 2, &mut out).is_err());
        assert!(check_spans("a b ..", &[0..1, 2..3], 0, 2, &mut out).is_ok());
    }
}

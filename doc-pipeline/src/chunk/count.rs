//! The part of chunking that talks to the model: tokens of a plan, and the count of the finished chunks.

use super::pack::pack;
use super::plan::Plan;
use super::{Budget, Chunk, ChunkError, ChunkOptions};
use crate::document::Document;
use crate::limits::{REPACK_ATTEMPTS_MAX, TARGET_TOKENS_MIN, TOKENIZE_BATCH_BYTES, TOKENIZE_BATCH_TEXTS};
use crate::model::{ModelFailure, Span, TextModel, check_spans};

/// Cuts a document into chunks that `model` takes whole.
///
/// Joined pieces may count more tokens than the pieces apart, so the finished chunks are counted again; while one
/// is too long the document is packed with a smaller target.
pub fn chunk_document(
    document: &Document,
    model: &dyn TextModel,
    options: &ChunkOptions,
) -> Result<Vec<Chunk>, ChunkError> {
    let mut budget = options.budget(model)?;
    let plan = Plan::new(document);
    let tokens = tokenize(&plan, model)?;
    let mut longest = 0;
    for _ in 0..REPACK_ATTEMPTS_MAX {
        let mut chunks = pack(&plan, &tokens, budget)?;
        longest = count(&mut chunks, model)?;
        if longest <= budget.limit {
            return Ok(chunks);
        }
        budget = smaller(budget, longest);
    }
    Err(ChunkError::CannotFit { tokens: longest, limit: budget.limit })
}

/// A budget under which a chunk of `longest` tokens would have fitted, had it grown in proportion. What the model
/// takes does not change.
fn smaller(budget: Budget, longest: usize) -> Budget {
    let shrink = |tokens: usize| {
        (tokens * budget.limit / longest.max(1)).min(tokens.saturating_sub(1)).max(TARGET_TOKENS_MIN)
    };
    Budget { target: shrink(budget.target), wide: shrink(budget.wide), ..budget }
}

/// The tokens of each text of the plan.
fn tokenize(plan: &Plan, model: &dyn TextModel) -> Result<Vec<Vec<Span>>, ChunkError> {
    let mut out: Vec<Vec<Span>> = vec![Vec::new(); plan.texts.len()];
    let whole_max = model.max_tokens().saturating_sub(model.special_tokens()).max(1);
    let texts: Vec<&str> =
        plan.pieces.iter().map(|piece| &plan.texts[piece.text][piece.bytes.clone()]).collect();
    let mut at = 0;
    for batch in batches(&texts, TOKENIZE_BATCH_TEXTS, TOKENIZE_BATCH_BYTES) {
        for (text, spans) in batch.iter().zip(ask(model, batch)?) {
            let piece = &plan.pieces[at];
            check_spans(text, &spans, piece.bytes.start, whole_max, &mut out[piece.text])?;
            at += 1;
        }
    }
    Ok(out)
}

/// Counts the tokens of each chunk as it will be embedded; the largest count.
fn count(chunks: &mut [Chunk], model: &dyn TextModel) -> Result<usize, ChunkError> {
    let mut longest = 0;
    for group in chunks.chunks_mut(TOKENIZE_BATCH_TEXTS) {
        let owned: Vec<String> = group.iter().map(Chunk::embedding_text).collect();
        let texts: Vec<&str> = owned.iter().map(String::as_str).collect();
        let mut at = 0;
        for batch in batches(&texts, TOKENIZE_BATCH_TEXTS, TOKENIZE_BATCH_BYTES) {
            for spans in ask(model, batch)? {
                group[at].tokens = spans.len();
                longest = longest.max(spans.len());
                at += 1;
            }
        }
    }
    Ok(longest)
}

fn ask(model: &dyn TextModel, texts: &[&str]) -> Result<Vec<Vec<std::ops::Range<usize>>>, ModelFailure> {
    let spans = model.token_spans(texts)?;
    if spans.len() != texts.len() {
        return Err(ModelFailure::bad_answer(format!(
            "the model returned tokens of {} texts, but was asked for {}",
            spans.len(),
            texts.len()
        )));
    }
    Ok(spans)
}

/// `texts` in batches of at most so many texts and bytes; a longer text is a batch of its own.
pub(crate) fn batches<'a, 'b>(
    texts: &'a [&'b str],
    texts_max: usize,
    bytes_max: usize,
) -> impl Iterator<Item = &'a [&'b str]> {
    let mut rest = texts;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut bytes = 0;
        let mut taken = 0;
        while taken < rest.len().min(texts_max) && (taken == 0 || bytes + rest[taken].len() <= bytes_max) {
            bytes += rest[taken].len();
            taken += 1;
        }
        let (batch, left) = rest.split_at(taken);
        rest = left;
        Some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::batches;

    #[test]
    fn batches_hold_their_limits() {
        let texts = ["aaa", "bb", "c", "dddddddd", "e"];
        let got: Vec<Vec<&str>> = batches(&texts, 2, 5).map(<[&str]>::to_vec).collect();
        assert_eq!(got, [vec!["aaa", "bb"], vec!["c"], vec!["dddddddd"], vec!["e"]]);
        assert_eq!(batches(&[], 2, 5).count(), 0);
    }
}

//! Cutting a list of texts into jobs that keep to the limits. Pure: texts in, ranges out.

use crate::error::SdkError;
use shm_layout::limits::{MAX_PAYLOAD_BYTES, MAX_TEXT_BYTES, MAX_TEXTS_PER_JOB};
use shm_layout::payload::{PayloadError, embeddings_len_bytes};
use shm_layout::wire::Operation;
use std::ops::Range;

/// Texts in one job of a longer list. Far below the limit: an engine fills its batches from several jobs, and several
/// jobs in flight keep it busy while answers are taken.
const EMBED_TEXTS: usize = 64;
/// Bytes of text after which a job of a longer list is closed.
const EMBED_BYTES: usize = 64 * 1024;
/// The same for token spans, whose answers are larger than their questions.
const TOKENIZE_BYTES: usize = 16 * 1024;
/// Room for an answer that is only a message.
const MIN_OUTPUT_BYTES: usize = 1024;

/// Cuts `texts` into consecutive ranges that cover the list; `dim` is the model's number of dimensions.
///
/// # Errors
/// [`SdkError::Input`] for a single text over [`MAX_TEXT_BYTES`], with its position in the whole list.
pub(crate) fn split<T: AsRef<str>>(
    texts: &[T],
    operation: Operation,
    dim: usize,
) -> Result<Vec<Range<usize>>, SdkError> {
    let (most_texts, most_bytes) = match operation {
        Operation::Embed | Operation::EmbedFresh => {
            (EMBED_TEXTS.min(rows_per_answer(dim)).max(1), EMBED_BYTES)
        }
        // With each job of pairs goes the text that is compared with all.
        Operation::Rank | Operation::Classify => (EMBED_TEXTS.min(rows_per_answer(dim)).max(1), EMBED_BYTES),
        Operation::Tokenize | Operation::Call => (MAX_TEXTS_PER_JOB, TOKENIZE_BYTES),
        // One job each: never cut.
        Operation::Generate => (1, MAX_PAYLOAD_BYTES),
    };
    let mut parts = Vec::with_capacity(texts.len() / most_texts + 1);
    let (mut start, mut bytes) = (0, 0);
    for (index, text) in texts.iter().enumerate() {
        let len_bytes = text.as_ref().len();
        if len_bytes > MAX_TEXT_BYTES {
            return Err(PayloadError::TextTooLong { index, len_bytes }.into());
        }
        if index > start && (index - start == most_texts || bytes + len_bytes > most_bytes) {
            parts.push(start..index);
            (start, bytes) = (index, 0);
        }
        bytes += len_bytes;
    }
    if start < texts.len() {
        parts.push(start..texts.len());
    }
    Ok(parts)
}

/// Vectors of `dim` numbers that fit one answer.
fn rows_per_answer(dim: usize) -> usize {
    // Head and padding together are less than 32 bytes; each row has one flag byte.
    (MAX_PAYLOAD_BYTES - 32) / dim.saturating_mul(4).saturating_add(1)
}

/// Room that the answer to a job of `texts` texts needs, in bytes; for token spans an estimate that nearly always is
/// enough: one token a byte, two special ones a text.
pub(crate) fn output_capacity_bytes(
    operation: Operation,
    texts: usize,
    payload_bytes: usize,
    dim: usize,
) -> usize {
    let wanted = match operation {
        Operation::Embed | Operation::EmbedFresh | Operation::Rank | Operation::Classify => {
            embeddings_len_bytes(texts, dim)
        }
        Operation::Generate => MAX_PAYLOAD_BYTES,
        Operation::Tokenize => {
            let tokens = payload_bytes.saturating_add(2 * texts);
            tokens.saturating_mul(8).saturating_add(8 + 4 * texts).min(MAX_PAYLOAD_BYTES)
        }
        // No lane leads to a model that takes calls; an engine answers with a message.
        Operation::Call => MIN_OUTPUT_BYTES,
    };
    wanted.max(MIN_OUTPUT_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::payload::texts_len_bytes;

    /// Texts, cut from one long one, of deterministic lengths of every kind: empty, short, around the limits.
    fn lengths(long: &str, seed: u64, count: usize) -> Vec<&str> {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        (0..count)
            .map(|_| {
                let len = match next() % 8 {
                    0 => 0,
                    1..=5 => next() % 500,
                    6 => next() % (80 * 1024),
                    _ => MAX_TEXT_BYTES - next() % 1000,
                };
                &long[..len]
            })
            .collect()
    }

    #[test]
    fn parts_cover_the_list_in_order_and_keep_to_the_limits() {
        let long = "x".repeat(MAX_TEXT_BYTES);
        for seed in 0..20 {
            for (operation, dim) in
                [(Operation::Embed, 384), (Operation::Embed, 200_000), (Operation::Tokenize, 384)]
            {
                let texts = lengths(&long, seed, (seed as usize * 37) % 300);
                let parts = split(&texts, operation, dim).unwrap();
                let mut next = 0;
                for part in parts {
                    assert_eq!(part.start, next);
                    assert!(part.end > part.start);
                    next = part.end;
                    let payload_bytes = texts_len_bytes(&texts[part.clone()]).unwrap();
                    assert!(
                        output_capacity_bytes(operation, part.len(), payload_bytes, dim) <= MAX_PAYLOAD_BYTES
                    );
                }
                assert_eq!(next, texts.len());
            }
        }
    }

    #[test]
    fn an_overlong_text_is_named_by_its_place_in_the_whole_list() {
        let mut texts = vec![String::from("x"); 1000];
        texts[777] = "x".repeat(MAX_TEXT_BYTES + 1);
        assert!(matches!(
            split(&texts, Operation::Embed, 384),
            Err(SdkError::Input(PayloadError::TextTooLong { index: 777, .. }))
        ));
    }
}

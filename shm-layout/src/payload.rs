//! What lies in an arena slot or in a job frame: texts in, vectors or token spans out. Pure bytes, little-endian.
//! Decoding trusts nothing: every length is checked against what is there before it is used.

use crate::code::Code;
use crate::limits::{MAX_PAYLOAD_BYTES, MAX_TEXT_BYTES, MAX_TEXTS_PER_JOB};
use std::ops::Range;

/// Why a payload cannot be decoded or encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// The list is empty.
    #[error("the list of texts is empty; give at least one text")]
    Empty,
    /// More texts than one job takes.
    #[error("{count} texts in one job; the limit is {MAX_TEXTS_PER_JOB}: split the list")]
    TooManyTexts {
        /// Texts asked for.
        count: usize,
    },
    /// One text is over the limit.
    #[error("text {index} has {len_bytes} bytes; the limit is {MAX_TEXT_BYTES}: split it into passages")]
    TextTooLong {
        /// Position in the list.
        index: usize,
        /// Its length in bytes.
        len_bytes: usize,
    },
    /// All texts together are over the limit.
    #[error("the job has {len_bytes} bytes; the limit is {MAX_PAYLOAD_BYTES}: split the list")]
    TooLarge {
        /// Bytes of the encoded payload.
        len_bytes: usize,
    },
    /// A text is not UTF-8.
    #[error("text {index} is not valid UTF-8 at its byte {valid_up_to}")]
    InvalidUtf8 {
        /// Position in the list.
        index: usize,
        /// Bytes before the first bad one.
        valid_up_to: usize,
    },
    /// Lengths contradict each other or the bytes that are there.
    #[error("malformed payload: {0}")]
    Malformed(&'static str),
}

impl PayloadError {
    /// The code that a peer is told.
    #[must_use]
    pub const fn code(&self) -> Code {
        match self {
            PayloadError::Empty => Code::EmptyInput,
            PayloadError::TooManyTexts { .. }
            | PayloadError::TextTooLong { .. }
            | PayloadError::TooLarge { .. } => Code::TooLarge,
            PayloadError::InvalidUtf8 { .. } => Code::InvalidUtf8,
            PayloadError::Malformed(_) => Code::BadPayload,
        }
    }
}

/// Bytes before the length table of a texts payload: `count: u32`, `reserved: u32 = 0`.
const TEXTS_HEAD_BYTES: usize = 8;
/// Bytes before the rows of an embeddings payload: `count: u32`, `dim: u32`, `fingerprint: u64`.
const EMBEDDINGS_HEAD_BYTES: usize = 16;

/// Checks a list of texts against the limits and gives the size of its payload in bytes.
///
/// # Errors
/// [`PayloadError`] naming the text and the limit.
pub fn texts_len_bytes<T: AsRef<[u8]>>(texts: &[T]) -> Result<usize, PayloadError> {
    if texts.is_empty() {
        return Err(PayloadError::Empty);
    }
    if texts.len() > MAX_TEXTS_PER_JOB {
        return Err(PayloadError::TooManyTexts { count: texts.len() });
    }
    let mut len_bytes = TEXTS_HEAD_BYTES + 4 * texts.len();
    for (index, text) in texts.iter().enumerate() {
        let text_bytes = text.as_ref().len();
        if text_bytes > MAX_TEXT_BYTES {
            return Err(PayloadError::TextTooLong { index, len_bytes: text_bytes });
        }
        len_bytes += text_bytes;
    }
    if len_bytes > MAX_PAYLOAD_BYTES {
        return Err(PayloadError::TooLarge { len_bytes });
    }
    Ok(len_bytes)
}

/// The head of a texts payload: counts and lengths, in bytes as they are written before the texts themselves.
///
/// # Errors
/// As [`texts_len_bytes`].
pub fn texts_head<T: AsRef<[u8]>>(texts: &[T]) -> Result<Vec<u8>, PayloadError> {
    texts_len_bytes(texts)?;
    let mut head = Vec::with_capacity(TEXTS_HEAD_BYTES + 4 * texts.len());
    // Both counts are below the limits checked above, so they fit u32.
    head.extend_from_slice(&(texts.len() as u32).to_le_bytes());
    head.extend_from_slice(&0u32.to_le_bytes());
    for text in texts {
        head.extend_from_slice(&(text.as_ref().len() as u32).to_le_bytes());
    }
    Ok(head)
}

/// Encodes texts: `count u32, reserved u32, count × len u32, bytes`.
///
/// # Errors
/// As [`texts_len_bytes`].
pub fn encode_texts<T: AsRef<[u8]>>(texts: &[T]) -> Result<Vec<u8>, PayloadError> {
    let mut out = texts_head(texts)?;
    for text in texts {
        out.extend_from_slice(text.as_ref());
    }
    Ok(out)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// Decodes a texts payload that a peer wrote; `bytes` must be the reader's private copy.
///
/// # Errors
/// [`PayloadError`]: empty, over a limit, not UTF-8, or lengths that do not add up to exactly `bytes`.
pub fn decode_texts(bytes: &[u8]) -> Result<Vec<&str>, PayloadError> {
    let count = u32_at(bytes, 0).ok_or(PayloadError::Malformed("shorter than its head"))? as usize;
    if u32_at(bytes, 4) != Some(0) {
        return Err(PayloadError::Malformed("reserved word is not zero"));
    }
    if count == 0 {
        return Err(PayloadError::Empty);
    }
    if count > MAX_TEXTS_PER_JOB {
        return Err(PayloadError::TooManyTexts { count });
    }
    let mut at = TEXTS_HEAD_BYTES + 4 * count;
    let mut texts = Vec::with_capacity(count);
    for index in 0..count {
        let len_bytes = u32_at(bytes, TEXTS_HEAD_BYTES + 4 * index)
            .ok_or(PayloadError::Malformed("length table is cut off"))? as usize;
        if len_bytes > MAX_TEXT_BYTES {
            return Err(PayloadError::TextTooLong { index, len_bytes });
        }
        let end = at + len_bytes;
        let text = bytes.get(at..end).ok_or(PayloadError::Malformed("a text runs past the end"))?;
        let text = std::str::from_utf8(text)
            .map_err(|e| PayloadError::InvalidUtf8 { index, valid_up_to: e.valid_up_to() })?;
        texts.push(text);
        at = end;
    }
    if at != bytes.len() {
        return Err(PayloadError::Malformed("bytes after the last text"));
    }
    Ok(texts)
}

/// Size in bytes of an embeddings payload of `count` vectors of `dim` numbers.
#[must_use]
pub const fn embeddings_len_bytes(count: usize, dim: usize) -> usize {
    EMBEDDINGS_HEAD_BYTES + count.div_ceil(4) * 4 + count * dim * 4
}

/// Vectors as they came back: `count` rows of `dim` numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingRows {
    /// Numbers in a vector.
    pub dim: usize,
    /// Names weights, tokenizer, pooling and precision that made them.
    pub fingerprint: u64,
    /// For each row, whether it came from a cache.
    pub cached: Vec<bool>,
    /// All rows, one after the other; `cached.len() * dim` numbers.
    pub values: Vec<f32>,
}

/// Encodes vectors: `count u32, dim u32, fingerprint u64, count × cached u8 padded to 4, count × dim × f32`.
#[must_use]
pub fn encode_embeddings(rows: &EmbeddingRows) -> Vec<u8> {
    let count = rows.cached.len();
    let mut out = Vec::with_capacity(embeddings_len_bytes(count, rows.dim));
    out.extend_from_slice(&(count as u32).to_le_bytes());
    out.extend_from_slice(&(rows.dim as u32).to_le_bytes());
    out.extend_from_slice(&rows.fingerprint.to_le_bytes());
    out.extend(rows.cached.iter().map(|&c| u8::from(c)));
    out.resize(EMBEDDINGS_HEAD_BYTES + count.div_ceil(4) * 4, 0);
    for value in &rows.values {
        out.extend_from_slice(&value.to_le_bytes());
    }
    out
}

/// Decodes vectors; `bytes` must be the reader's private copy, `expected_count` the number of texts it sent.
///
/// # Errors
/// [`PayloadError::Malformed`] when counts and lengths contradict each other or the question.
pub fn decode_embeddings(bytes: &[u8], expected_count: usize) -> Result<EmbeddingRows, PayloadError> {
    let count = u32_at(bytes, 0).ok_or(PayloadError::Malformed("shorter than its head"))? as usize;
    let dim = u32_at(bytes, 4).ok_or(PayloadError::Malformed("shorter than its head"))? as usize;
    if count != expected_count {
        return Err(PayloadError::Malformed("another number of vectors than texts"));
    }
    if dim == 0 || dim > MAX_PAYLOAD_BYTES / 4 || bytes.len() != embeddings_len_bytes(count, dim) {
        return Err(PayloadError::Malformed("length does not match count and dimension"));
    }
    let fingerprint = bytes
        .get(8..16)
        .and_then(|b| b.try_into().ok())
        .map(u64::from_le_bytes)
        .ok_or(PayloadError::Malformed("shorter than its head"))?;
    let (flags, numbers) = bytes[EMBEDDINGS_HEAD_BYTES..].split_at(count.div_ceil(4) * 4);
    let cached = flags[..count].iter().map(|&b| b != 0).collect();
    let (words, _) = numbers.as_chunks::<4>();
    let values = words.iter().map(|w| f32::from_le_bytes(*w)).collect();
    Ok(EmbeddingRows { dim, fingerprint, cached, values })
}

/// Encodes token spans: `count u32, total u32, count × tokens u32, total × (start u32, end u32)`, byte offsets.
#[must_use]
pub fn encode_token_spans(spans: &[Vec<Range<usize>>]) -> Vec<u8> {
    let total: usize = spans.iter().map(Vec::len).sum();
    let mut out = Vec::with_capacity(8 + 4 * spans.len() + 8 * total);
    out.extend_from_slice(&(spans.len() as u32).to_le_bytes());
    out.extend_from_slice(&(total as u32).to_le_bytes());
    for of_text in spans {
        out.extend_from_slice(&(of_text.len() as u32).to_le_bytes());
    }
    for span in spans.iter().flatten() {
        out.extend_from_slice(&(span.start as u32).to_le_bytes());
        out.extend_from_slice(&(span.end as u32).to_le_bytes());
    }
    out
}

/// Decodes token spans of `texts`; each span lies inside its text.
///
/// # Errors
/// [`PayloadError::Malformed`] when counts, lengths or offsets contradict each other or the texts.
pub fn decode_token_spans<T: AsRef<[u8]>>(
    bytes: &[u8],
    texts: &[T],
) -> Result<Vec<Vec<Range<usize>>>, PayloadError> {
    const SHORT: PayloadError = PayloadError::Malformed("token spans are cut off");
    let count = u32_at(bytes, 0).ok_or(SHORT)? as usize;
    let total = u32_at(bytes, 4).ok_or(SHORT)? as usize;
    if count != texts.len() {
        return Err(PayloadError::Malformed("another number of span lists than texts"));
    }
    let spans_at = 8 + 4 * count;
    if total > MAX_PAYLOAD_BYTES / 8 || bytes.len() != spans_at + 8 * total {
        return Err(PayloadError::Malformed("length does not match the token count"));
    }
    let mut at = spans_at;
    let mut out = Vec::with_capacity(count);
    for (index, text) in texts.iter().enumerate() {
        let tokens = u32_at(bytes, 8 + 4 * index).ok_or(SHORT)? as usize;
        if tokens > (bytes.len() - at) / 8 {
            return Err(SHORT);
        }
        let mut of_text = Vec::with_capacity(tokens);
        for _ in 0..tokens {
            let start = u32_at(bytes, at).ok_or(SHORT)? as usize;
            let end = u32_at(bytes, at + 4).ok_or(SHORT)? as usize;
            if start > end || end > text.as_ref().len() {
                return Err(PayloadError::Malformed("a token span lies outside its text"));
            }
            of_text.push(start..end);
            at += 8;
        }
        out.push(of_text);
    }
    if at != bytes.len() {
        return Err(PayloadError::Malformed("token counts do not add up"));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_round_trip() {
        let texts = ["", "a", "grüße", "\u{1f600}"];
        let bytes = encode_texts(&texts).unwrap();
        assert_eq!(bytes.len(), texts_len_bytes(&texts).unwrap());
        assert_eq!(decode_texts(&bytes).unwrap(), texts);
    }

    #[test]
    fn limits_are_named() {
        assert_eq!(encode_texts::<&str>(&[]), Err(PayloadError::Empty));
        assert!(matches!(
            encode_texts(&vec!["x"; MAX_TEXTS_PER_JOB + 1]),
            Err(PayloadError::TooManyTexts { .. })
        ));
        let long = "x".repeat(MAX_TEXT_BYTES + 1);
        assert!(matches!(encode_texts(&["", &long]), Err(PayloadError::TextTooLong { index: 1, .. })));
        let half = "x".repeat(MAX_TEXT_BYTES);
        assert!(matches!(encode_texts(&[&half, &half]), Err(PayloadError::TooLarge { .. })));
        let mut bad = encode_texts(&["ab"]).unwrap();
        *bad.last_mut().unwrap() = 0xff;
        assert_eq!(decode_texts(&bad), Err(PayloadError::InvalidUtf8 { index: 0, valid_up_to: 1 }));
    }

    #[test]
    fn embeddings_and_spans_round_trip() {
        let rows = EmbeddingRows {
            dim: 2,
            fingerprint: 7,
            cached: vec![false, true, false],
            values: vec![1., 2., 3., 4., 5., 6.],
        };
        let bytes = encode_embeddings(&rows);
        assert_eq!(bytes.len(), embeddings_len_bytes(3, 2));
        assert_eq!(decode_embeddings(&bytes, 3).unwrap(), rows);
        assert!(decode_embeddings(&bytes, 2).is_err());
        let spans = vec![vec![0..1, 1..2], vec![], vec![0..3]];
        let bytes = encode_token_spans(&spans);
        assert_eq!(decode_token_spans(&bytes, &["ab", "", "abc"]).unwrap(), spans);
        assert!(decode_token_spans(&bytes, &["a", "", "abc"]).is_err());
    }
}

//! Payloads: texts, vectors and token spans as a peer may have written them.

use super::reader::Reader;
use shm_layout::limits::MAX_TEXTS_PER_JOB;
use shm_layout::payload::{
    EmbeddingRows, decode_embeddings, decode_texts, decode_token_spans, encode_embeddings, encode_texts,
    encode_token_spans,
};

/// First byte chooses the payload; vectors and spans take the number of texts from the second.
pub fn run(data: &[u8]) {
    let mut input = Reader::new(data);
    match input.u8() % 3 {
        0 => texts(input.rest()),
        1 => {
            let expected = usize::from(input.u8());
            embeddings(input.rest(), expected);
        }
        _ => {
            let lengths: Vec<u8> = (0..input.u8() % 8).map(|_| input.u8()).collect();
            let texts: Vec<Vec<u8>> = lengths.iter().map(|len| vec![b'x'; usize::from(*len)]).collect();
            spans(input.rest(), &texts);
        }
    }
}

fn texts(bytes: &[u8]) {
    if let Ok(texts) = decode_texts(bytes) {
        assert!(!texts.is_empty() && texts.len() <= MAX_TEXTS_PER_JOB);
        // What decodes within the limits has one encoding.
        assert_eq!(encode_texts(&texts).as_deref(), Ok(bytes));
    }
}

fn embeddings(bytes: &[u8], expected: usize) {
    if let Ok(rows) = decode_embeddings(bytes, expected) {
        assert_eq!(rows.cached.len(), expected);
        assert_eq!(rows.values.len(), expected * rows.dim);
        let again = encode_embeddings(&rows);
        assert_eq!(again.len(), bytes.len());
        let numbers = bytes.len() - 4 * rows.values.len();
        assert_eq!(&again[numbers..], &bytes[numbers..], "numbers keep their bits");
    }
}

fn spans(bytes: &[u8], texts: &[Vec<u8>]) {
    if let Ok(spans) = decode_token_spans(bytes, texts) {
        for (of_text, text) in spans.iter().zip(texts) {
            assert!(of_text.iter().all(|span| text.get(span.clone()).is_some()));
        }
        assert_eq!(encode_token_spans(&spans), bytes);
    }
}

/// Inputs to start from.
#[must_use]
// A list of one span is what is meant.
#[allow(clippy::single_range_in_vec_init)]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut add = |name: &str, head: &[u8], body: &[u8]| seeds.push((name.to_owned(), [head, body].concat()));
    for (name, list) in
        [("one", vec!["a"]), ("mixed", vec!["", "grüße", "\u{1f600}"]), ("many", vec!["x"; 256])]
    {
        add(&format!("texts-{name}"), &[0], &encode_texts(&list).unwrap_or_default());
    }
    add("texts-empty", &[0], &[0; 8]);
    add("texts-count-lies", &[0], &[255, 255, 255, 255, 0, 0, 0, 0]);
    add("texts-length-lies", &[0], &[1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 7, 0, b'a']);
    add("texts-bad-utf8", &[0], &[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0xff]);
    for (count, dim) in [(1usize, 4usize), (3, 2), (5, 8)] {
        let values = (0..count * dim).map(|i| i as f32).collect();
        let rows = EmbeddingRows { dim, fingerprint: 7, cached: vec![false; count], values };
        add(&format!("embeddings-{count}x{dim}"), &[1, count as u8], &encode_embeddings(&rows));
    }
    let none = EmbeddingRows { dim: 3, fingerprint: 0, cached: vec![], values: vec![] };
    add("embeddings-none", &[1, 0], &encode_embeddings(&none));
    add(
        "embeddings-dim-lies",
        &[1, 1],
        &[1, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    add("spans-two-texts", &[2, 2, 3, 2], &encode_token_spans(&[vec![0..1, 1..3], vec![0..2]]));
    add("spans-empty-text", &[2, 1, 0], &encode_token_spans(&[vec![]]));
    add("spans-outside", &[2, 1, 1], &encode_token_spans(&[vec![0..9]]));
    add("spans-total-lies", &[2, 1, 1], &[1, 0, 0, 0, 255, 255, 255, 255, 1, 0, 0, 0]);
    seeds
}

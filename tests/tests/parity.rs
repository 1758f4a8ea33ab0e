//! Vectors from the documented route equal those of sentence-transformers, on every route, alone and in a batch.
//! Reference: `tests/parity/minilm.f32`, made from `texts.json` by `tests/parity/make_vectors.py`.

use serde_json::Value;
use tests::program::workspace;
use tests::running::{Broker, assert_ok};
use worker_sdk::{EmbedOptions, Route};

const DIM: usize = 384;
/// Largest difference of any component from sentence-transformers' f32.
const MAX_ABS_DIFF: f32 = 2e-6;
const MIN_COSINE: f64 = 0.999_999;

fn reference() -> (Vec<String>, Vec<Vec<f32>>) {
    let folder = workspace().join("tests/parity");
    let texts = std::fs::read_to_string(folder.join("texts.json")).expect("the texts are in the tree");
    let texts: Vec<String> = serde_json::from_str(&texts).expect("a list of strings");
    let bytes = std::fs::read(folder.join("minilm.f32")).expect("the vectors are in the tree");
    let vectors: Vec<Vec<f32>> = numbers(&bytes).chunks_exact(DIM).map(<[f32]>::to_vec).collect();
    assert_eq!(vectors.len(), texts.len());
    (texts, vectors)
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    let (words, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty());
    words.iter().map(|w| f32::from_le_bytes(*w)).collect()
}

fn check(what: &str, found: &[f32], expected: &[f32], text: &str) {
    assert_eq!(found.len(), expected.len());
    let diff = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(found, expected) / (dot(found, found) * dot(expected, expected)).sqrt();
    let shown: String = text.chars().take(60).collect();
    assert!(diff <= MAX_ABS_DIFF, "{what}: {shown:?} differs by {diff}");
    assert!(cosine >= MIN_COSINE, "{what}: {shown:?} has cosine {cosine}");
}

#[test]
fn vectors_equal_those_of_sentence_transformers_on_every_route() {
    let (texts, expected) = reference();
    let broker = Broker::start(&[]);
    for (name, route) in [("lane", Route::Lane), ("socket", Route::Socket)] {
        let model = broker.model(route);
        let batch = model.embed(&texts).expect("all texts are embedded");
        assert_eq!((batch.len(), batch.dim()), (texts.len(), DIM));
        let description = model.description().expect("the model is described");
        assert_eq!(batch.fingerprint(), description.fingerprint, "a result names what made it");
        let bulk = model.embed_with(&texts, &EmbedOptions::bulk()).expect("bulk is embedded");
        for (i, text) in texts.iter().enumerate() {
            check(name, batch.get(i).unwrap(), &expected[i], text);
            check(&format!("{name}, bulk"), bulk.get(i).unwrap(), &expected[i], text);
            let single = model.embed(&[text]).expect("a lone text is embedded");
            check(&format!("{name}, alone"), single.values(), &expected[i], text);
        }
    }
    let attached = broker.model(Route::Lane).attach().expect("the image can be attached");
    let local = attached.embed(&texts).expect("all texts are embedded here");
    for (i, text) in texts.iter().enumerate() {
        check("attached", local.get(i).unwrap(), &expected[i], text);
    }
    drop(attached);
    broker.stop();
}

#[test]
fn the_program_prints_the_same_vectors_in_order() {
    let (texts, expected) = reference();
    let broker = Broker::start(&[]);
    let hello = broker.run(&["embed", "-"], b"hello\nworld\n");
    assert_ok(&hello);
    let rows = rows(&hello.stdout);
    assert_eq!(rows.iter().map(|r| r["index"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1]);
    assert!(rows.iter().all(|r| r["cached"] == Value::Bool(false)));
    for (word, row) in ["hello", "world"].iter().zip(&rows) {
        let at = texts.iter().position(|t| t == word).expect("both words are among the reference texts");
        check("embed -", &vector(&row["embedding"]), &expected[at], word);
    }
    let input: String = texts.iter().map(|t| format!("{}\n", serde_json::json!({ "text": t }))).collect();
    for route in ["lane", "socket"] {
        let output = broker.run(&["embed", "--input", "jsonl", "--route", route], input.as_bytes());
        assert_ok(&output);
        let rows = self::rows(&output.stdout);
        assert_eq!(rows.len(), texts.len());
        for (i, text) in texts.iter().enumerate() {
            check(&format!("embed --route {route}"), &vector(&rows[i]["embedding"]), &expected[i], text);
        }
    }
    let array = broker.run(&["embed", "--input", "jsonl", "--format", "npy"], input.as_bytes());
    assert_ok(&array);
    assert!(array.stdout.starts_with(b"\x93NUMPY"));
    let last = numbers(&array.stdout[array.stdout.len() - 4 * DIM..]);
    check("embed --format npy", &last, expected.last().unwrap(), texts.last().unwrap());
    let document = broker.run(&["embed", "--format", "json", "hello"], b"");
    assert_ok(&document);
    let document: Value = serde_json::from_slice(&document.stdout).unwrap();
    assert_eq!(document["dimension"], 384);
    broker.stop();
}

fn rows(output: &[u8]) -> Vec<Value> {
    std::str::from_utf8(output).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn vector(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

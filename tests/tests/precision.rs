//! Precisions by the documented routes: the end of a model's name, and `serve --precision`. Compared with the stored vectors
//! of sentence-transformers.

use serde_json::Value;
use tests::program::workspace;
use tests::running::{Broker, assert_ok, run_folder, run_program};
use worker_sdk::Route;

const DIM: usize = 384;
const MODEL: &str = "sentence-transformers/all-MiniLM-L6-v2";

/// Texts that are prose, and their vectors in single precision.
fn reference() -> Vec<(String, Vec<f32>)> {
    let folder = workspace().join("tests/parity");
    let texts = std::fs::read_to_string(folder.join("texts.json")).expect("the texts are in the tree");
    let texts: Vec<String> = serde_json::from_str(&texts).expect("a list of strings");
    let bytes = std::fs::read(folder.join("minilm.f32")).expect("the vectors are in the tree");
    let (words, _) = bytes.as_chunks::<4>();
    let numbers: Vec<f32> = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
    let prose = |text: &String| text.split_whitespace().count() >= 4 && text.is_ascii();
    texts
        .into_iter()
        .zip(numbers.chunks_exact(DIM).map(<[f32]>::to_vec))
        .filter(|(text, _)| prose(text))
        .collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn a_name_may_end_in_a_precision() {
    let reference = reference();
    assert!(reference.len() >= 8, "{} reference texts are prose", reference.len());
    let texts: Vec<&str> = reference.iter().map(|(text, _)| text.as_str()).collect();
    let broker = Broker::start(&[]);
    let exact = broker.model(Route::Lane);
    let exact_fingerprint = exact.embed(&texts).expect("f32 is embedded").fingerprint();
    for (precision, least_cosine) in [("bf16", 0.9999), ("int8", 0.99)] {
        let model = broker.client().model(&format!("{MODEL}:{precision}")).expect("the model is leased");
        assert_eq!(model.description().expect("described").model_id, format!("{MODEL}:{precision}"));
        let batch = model.embed(&texts).expect("texts are embedded");
        assert_ne!(batch.fingerprint(), exact_fingerprint, "a fingerprint names the precision");
        let attached = model.attach().expect("the image can be attached");
        let local = attached.embed(&texts).expect("texts are embedded here");
        for (index, (text, wanted)) in reference.iter().enumerate() {
            let found = batch.get(index).expect("a vector for each text");
            let cosine = cosine(found, wanted);
            assert!(cosine >= least_cosine, "{precision}: {text:?} has cosine {cosine}");
            assert_eq!(found, local.get(index).expect("a vector for each text"), "attached differs");
            assert_eq!(found, model.embed(&[text]).expect("embedded").values(), "{text:?} differs alone");
        }
    }
    let names: Vec<String> = broker.asked_models().into_iter().map(|model| model.model_id).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    broker.stop();
}

#[test]
fn a_broker_has_a_default_precision() {
    let broker = Broker::start(&["--precision", "int8"]);
    let output = broker.run(&["embed", "--format", "json", "hello"], b"");
    assert_ok(&output);
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(document["dimension"], DIM);
    assert_eq!(broker.status().models[0].model_id, format!("{MODEL}:int8"));
    // A name that says f32 is not overruled.
    let exact = broker.client().model(&format!("{MODEL}:f32")).expect("the model is leased");
    assert_eq!(exact.description().expect("described").model_id, format!("{MODEL}:f32"));
    broker.stop();
}

#[test]
fn a_precision_that_is_none_is_refused() {
    let folder = run_folder();
    let socket = folder.path().join("broker.sock");
    let output = run_program(Some(&socket), &["serve", "--precision", "int4"], b"");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("int4") && said.contains("bf16"), "{said}");
}

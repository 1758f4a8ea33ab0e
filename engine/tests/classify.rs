//! Classifiers and rerankers: their logits are those of transformers, of single texts and of pairs, the same in any batch.

mod common;

use common::{CLASSIFIERS, borrow, copy, expected, floats, model, model_in, stored, texts};
use engine::compile::Precision;
use engine::{EncodedText, Model, ModelError, describe};
use shm_layout::image::{CheckedImage, Family, HeapImage, ImageBytes, Task};

/// Queries and texts of pairs.json.
fn pairs(name: &str) -> [Vec<String>; 2] {
    let bytes = std::fs::read(stored(name).join("pairs.json")).expect("pairs");
    let all: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
    ["queries", "texts"].map(|key| serde_json::from_value(all[key].clone()).expect("strings"))
}

fn encoded_pairs(model: &Model, name: &str) -> Vec<EncodedText> {
    let [queries, texts] = pairs(name);
    queries.iter().flat_map(|query| model.encode_pairs(query, &borrow(&texts)).expect("encodes")).collect()
}

fn logits(model: &Model, encoded: &[EncodedText]) -> Vec<f32> {
    model.forward(&encoded.iter().collect::<Vec<_>>()).expect("computes").values
}

fn largest_difference(found: &[f32], wanted: &[f32]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_those_of_transformers() {
    for name in CLASSIFIERS {
        let model = model(name);
        assert_eq!(model.info().task, Task::Classify);
        let singles = model.embed(&borrow(&texts(name))).expect("computes");
        let off = largest_difference(&singles.values, &expected(name));
        assert!(off <= 5e-6, "{name}: single texts off by {off}");
        let found = logits(&model, &encoded_pairs(&model, name));
        let off = largest_difference(&found, &floats(name, "pairs.f32"));
        assert!(off <= 5e-6, "{name}: pairs off by {off}");
    }
}

#[test]
fn lower_precisions_stay_close() {
    for name in CLASSIFIERS {
        let wanted = floats(name, "pairs.f32");
        for (precision, tolerance) in [(Precision::Bf16, 0.06), (Precision::Int8, 0.35)] {
            let model = model_in(name, precision);
            let off = largest_difference(&logits(&model, &encoded_pairs(&model, name)), &wanted);
            assert!(off <= tolerance, "{name} {precision:?}: off by {off}");
        }
    }
}

#[test]
fn a_pair_gives_the_same_bits_alone_and_in_any_batch() {
    for name in CLASSIFIERS {
        for precision in Precision::ALL {
            let model = model_in(name, precision);
            let encoded = encoded_pairs(&model, name);
            let labels = model.info().output_dim;
            let together = logits(&model, &encoded);
            for (pair, row) in encoded.iter().zip(together.chunks_exact(labels)) {
                assert_eq!(logits(&model, std::slice::from_ref(pair)), row, "{name} {precision:?}");
            }
        }
    }
}

#[test]
fn pairs_that_are_too_long_are_cut_and_say_so() {
    let model = model("bert_reranker");
    let long = "the cat ".repeat(100);
    let encoded = model.encode_pairs("cat", &["mat", &long]).expect("encodes");
    assert!(!encoded[0].truncated() && encoded[1].truncated());
    assert_eq!(encoded[0].ids().len(), 5);
    assert_eq!(encoded[0].type_ids(), [0, 0, 0, 1, 1]);
    assert_eq!((encoded[1].ids().len(), encoded[1].total_tokens()), (model.info().max_seq_tokens, 204));
    let huge = "a".repeat(engine::model::MAX_TEXT_BYTES + 1);
    assert!(matches!(model.encode_pairs(&huge, &["a"]), Err(ModelError::TextTooLong { index: 0, .. })));
    assert!(matches!(model.encode_pairs("a", &["a", &huge]), Err(ModelError::TextTooLong { index: 2, .. })));
}

#[test]
fn images_say_what_they_are() {
    let facts = |name: &str| {
        let (image, _) = common::compile(&stored(name)).expect("compiles");
        let image = HeapImage::new(&image);
        describe(&CheckedImage::new(image.as_bytes()).expect("an image")).expect("described")
    };
    let classifier = facts("roberta_classifier");
    assert_eq!((classifier.task, classifier.family), (Task::Classify, Family::Roberta));
    assert_eq!(classifier.labels, ["contradiction", "entailment", "neutral"]);
    assert_eq!(classifier.problem_type.as_deref(), Some("single_label_classification"));
    assert_eq!((classifier.output_dim, classifier.max_seq_tokens), (3, 65));
    let embedder = facts("qwen3");
    assert_eq!((embedder.task, embedder.family, embedder.output_dim), (Task::Embed, Family::Qwen3, 32));
    assert_eq!(embedder.prompts.len(), 2);
    assert_eq!(embedder.prompts[1], ("query".to_owned(), "Instruct: find it\nQuery: ".to_owned()));
    assert_eq!(embedder.default_prompt.as_deref(), Some("document"));
    assert!(embedder.labels.is_empty() && !embedder.has_chat_template);
}

#[test]
fn a_default_prompt_must_exist() {
    let folder = copy("qwen3");
    let settings = serde_json::json!({"prompts": {"query": "q: "}, "default_prompt_name": "passage"});
    std::fs::write(folder.path().join("config_sentence_transformers.json"), settings.to_string())
        .expect("write");
    let error = common::compile_error(folder.path());
    assert!(error.contains("passage") && error.contains("names no prompt"), "{error}");
}

//! What the engine computes: equal to sentence-transformers and to candle's own BERT, the same alone and in any batch.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use common::{CHECKPOINTS, borrow, copy, expected, model, model_in, stored, texts};
use engine::ModelError;
use engine::compile::Precision;
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn vectors_are_those_of_sentence_transformers() {
    for name in CHECKPOINTS {
        let model = model(name);
        let (texts, expected) = (texts(name), expected(name));
        let vectors = model.embed(&borrow(&texts)).expect("embeds");
        assert_eq!(vectors.values.len(), expected.len(), "{name}");
        for (index, (found, wanted)) in vectors.rows().zip(expected.chunks_exact(vectors.dim)).enumerate() {
            let norm = wanted.iter().map(|value| value * value).sum::<f32>().sqrt();
            let worst = found.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= 2e-6 * norm.max(1.0), "{name}, text {index}: off by {worst}");
        }
    }
}

#[test]
fn lower_precisions_stay_close() {
    for name in CHECKPOINTS {
        let texts = texts(name);
        let exact = model(name).embed(&borrow(&texts)).expect("embeds");
        for (precision, least_cosine) in [(Precision::Bf16, 0.9995), (Precision::Int8, 0.99)] {
            let model = model_in(name, precision);
            assert_eq!(model.info().precision, precision);
            let vectors = model.embed(&borrow(&texts)).expect("embeds");
            for (index, (found, wanted)) in vectors.rows().zip(exact.rows()).enumerate() {
                let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
                let cosine = dot(found, wanted) / (dot(found, found) * dot(wanted, wanted)).sqrt();
                assert!(cosine >= least_cosine, "{name} {precision:?}, text {index}: cosine {cosine}");
            }
        }
    }
}

#[test]
fn a_text_gives_the_same_bits_alone_and_in_any_batch() {
    for (name, precision) in CHECKPOINTS.into_iter().flat_map(|name| Precision::ALL.map(|p| (name, p))) {
        let model = model_in(name, precision);
        let texts = texts(name);
        // Enough copies for several sub-batches.
        let many: Vec<&str> = borrow(&texts).into_iter().cycle().take(150).collect();
        let together = model.embed(&many).expect("embeds");
        for (text, row) in many.iter().zip(together.rows()).take(texts.len()) {
            assert_eq!(model.embed(&[text]).expect("embeds").values, row, "{name}: {text:?}");
        }
        for (index, row) in together.rows().enumerate().skip(texts.len()) {
            assert_eq!(row, together.rows().nth(index % texts.len()).expect("row"), "{name}: copy {index}");
        }
    }
}

#[test]
fn vectors_are_those_of_stock_candle() {
    let folder = stored("bert_mean");
    let config: Config =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).expect("read")).expect("config");
    let weights = std::fs::read(folder.join("model.safetensors")).expect("read");
    let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, &Device::Cpu).expect("weights");
    let stock = BertModel::load(weights, &config).expect("stock model");
    let model = model("bert_mean");
    for text in texts("bert_mean") {
        let encoded = model.encode(&[&text]).expect("encodes");
        let ids =
            Tensor::new(encoded[0].ids(), &Device::Cpu).expect("ids").unsqueeze(0).expect("batch of one");
        let hidden = stock.forward(&ids, &ids.zeros_like().expect("types"), None).expect("forward");
        let mean: Vec<f32> =
            hidden.mean(1).expect("mean").squeeze(0).expect("row").to_vec1().expect("floats");
        let norm = mean.iter().map(|value| value * value).sum::<f32>().sqrt();
        let found = model.forward(&[&encoded[0]]).expect("forward").values;
        for (found, wanted) in found.iter().zip(mean) {
            assert!((found - wanted / norm).abs() <= 1e-6, "{text:?}: {found} instead of {}", wanted / norm);
        }
    }
}

#[test]
fn long_texts_are_cut_and_say_so() {
    let model = model("bert_mean");
    let long = "the cat ".repeat(1000);
    let encoded = model.encode(&["cat", &long]).expect("encodes");
    assert!(!encoded[0].truncated());
    assert_eq!((encoded[0].total_tokens(), encoded[0].ids().len()), (3, 3));
    assert!(encoded[1].truncated());
    assert_eq!((encoded[1].total_tokens(), encoded[1].ids().len()), (2002, model.info().max_seq_tokens));
}

#[test]
fn spans_are_the_texts_tokens_uncut() {
    let model = model("bert_mean");
    let text = "The cat, sat!".repeat(100);
    let spans = model.token_spans(&text).expect("spans");
    assert_eq!(spans.len() + 2, model.encode(&[&text]).expect("encodes")[0].total_tokens());
    assert_eq!(&text[spans[0].clone()], "The");
    assert!(spans.windows(2).all(|pair| pair[0].end <= pair[1].start), "spans are not in order");
}

#[test]
fn texts_and_tokens_of_others_are_refused() {
    let bert = model("bert_mean");
    let huge = "a".repeat(engine::model::MAX_TEXT_BYTES + 1);
    assert!(matches!(bert.encode(&["a", &huge]), Err(ModelError::TextTooLong { index: 1, .. })));
    // XLM-RoBERTa sequences may be longer than this model's.
    let foreign = model("xlm_roberta").encode(&["1 ".repeat(500).as_str()]).expect("encodes");
    assert!(matches!(
        bert.forward(&[&foreign[0]]),
        Err(ModelError::TokenCount { .. } | ModelError::TokenId { .. })
    ));
    assert_eq!(bert.embed(&[]).expect("nothing to do").values.len(), 0);
}

#[test]
fn the_probe_passes_before_and_after_work() {
    let model = model("xlm_roberta");
    model.probe().expect("first");
    model.embed(&["cat", "the mat"]).expect("embeds");
    model.release_scratch();
    model.probe().expect("again");
}

#[test]
fn other_texts_can_be_computed_in_breaks() {
    for precision in Precision::ALL {
        let model = model_in("bert_mean", precision);
        let texts = texts("bert_mean");
        let wanted = model.embed(&borrow(&texts)).expect("embeds");
        // Shared by all threads, dealt out to them, and one at a time.
        for copies in [1, 40] {
            let many: Vec<&str> = borrow(&texts).into_iter().cycle().take(texts.len() * copies).collect();
            let encoded = model.encode(&many).expect("encodes");
            let breaks = AtomicUsize::new(0);
            let rest = || {
                let index = breaks.fetch_add(1, Ordering::Relaxed) % texts.len();
                let found = engine::on_this_thread(|| model.embed(&[texts[index].as_str()])).expect("embeds");
                assert_eq!(
                    found.values,
                    wanted.rows().nth(index).expect("row"),
                    "{precision:?}, text {index}"
                );
            };
            let found =
                model.forward_with_breaks(&encoded.iter().collect::<Vec<_>>(), &rest).expect("computes");
            for (index, row) in found.rows().enumerate() {
                assert_eq!(row, wanted.rows().nth(index % texts.len()).expect("row"), "{precision:?}");
            }
            assert!(breaks.into_inner() > 5, "hardly a break");
        }
    }
}

#[test]
fn many_threads_share_one_model() {
    let model = model("bert_mean");
    let texts = texts("bert_mean");
    let wanted = model.embed(&borrow(&texts)).expect("embeds");
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..10 {
                    assert_eq!(model.embed(&borrow(&texts)).expect("embeds"), wanted);
                }
            });
        }
    });
}

#[test]
fn equal_folders_have_equal_fingerprints_and_others_do_not() {
    let copied = copy("bert_mean");
    let (image, _) = common::compile(copied.path()).expect("compiles");
    let same =
        engine::Model::load(std::sync::Arc::new(shm_layout::image::HeapImage::new(&image))).expect("loads");
    assert_eq!(same.info().fingerprint, model("bert_mean").info().fingerprint);
    assert_ne!(same.info().fingerprint, model("xlm_roberta").info().fingerprint);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_gives_a_unit_vector_and_spans_inside_it(text in "\\PC{0,80}", control in any::<String>()) {
        for name in ["bert_mean", "xlm_roberta"] {
            let model = MODELS.with(|models| models.iter().find(|(found, _)| *found == name).map(|(_, model)| model.clone()));
            let model = model.expect("loaded");
            for text in [&text, &control] {
                let vector = model.embed(&[text]).expect("embeds").values;
                let norm = vector.iter().map(|value| value * value).sum::<f32>();
                prop_assert!((norm - 1.0).abs() < 1e-4);
                for span in model.token_spans(text).expect("spans") {
                    prop_assert!(text.get(span).is_some());
                }
            }
        }
    }
}

thread_local! {
    static MODELS: Vec<(&'static str, std::sync::Arc<engine::Model>)> =
        ["bert_mean", "xlm_roberta"].map(|name| (name, std::sync::Arc::new(model(name)))).to_vec();
}

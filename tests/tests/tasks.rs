//! Models that rank, classify and write, on the documented routes with real processes: what transformers gives for the same
//! weights (`tests/parity/make_tiny.py`, `tests/parity/make_generators.py`), in pieces and whole, and what is refused.

use serde_json::Value;
use std::path::{Path, PathBuf};
use tests::program::workspace;
use tests::running::{Broker, assert_ok, eventually};
use worker_sdk::{
    CallOptions, Code, EmbedOptions, FinishReason, GeneratePrompt, GenerateSettings, Model, ModelRequest,
    Prompt, Route, SdkError, SummaryOptions, Task, user_message,
};

/// Largest difference of a score from that of transformers.
const MAX_SCORE_DIFF: f32 = 1e-5;

fn stored(name: &str) -> PathBuf {
    workspace().join("tests/parity").join(name)
}

fn lease(broker: &Broker, folder: &Path, route: Route) -> Model {
    let request = ModelRequest::new(folder.to_str().expect("a path of this tree")).route(route);
    broker.client().model_with(request).expect("the model can be leased")
}

fn numbers(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).expect("the numbers are in the tree");
    bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("the file is in the tree")).expect("JSON")
}

fn refusal(error: SdkError) -> Code {
    error.protocol_code().unwrap_or_else(|| panic!("{error:?}"))
}

#[test]
fn a_reranker_gives_the_scores_of_transformers_on_every_route() {
    let broker = Broker::start(&[]);
    let folder = stored("tiny/bert_reranker");
    let stored = json(&folder.join("pairs.json"));
    let of = |key: &str| serde_json::from_value::<Vec<String>>(stored[key].clone()).expect("texts");
    let (queries, texts) = (of("queries"), of("texts"));
    let pairs: Vec<(&str, &str)> =
        queries.iter().flat_map(|query| texts.iter().map(|text| (query.as_str(), text.as_str()))).collect();
    let expected = numbers(&folder.join("pairs.f32"));
    for route in [Route::Lane, Route::Socket] {
        let model = lease(&broker, &folder, route);
        assert_eq!(model.description().expect("described").facts.task, Task::Classify);
        for ((query, text), wanted) in pairs.iter().zip(&expected) {
            let rows = model.score_pairs(query, &[text], &EmbedOptions::default()).expect("scored");
            assert!(
                (rows.values()[0] - wanted).abs() <= MAX_SCORE_DIFF,
                "{query:?}, {text:?}: {rows:?}, not {wanted}"
            );
        }
        // One query with many texts: more than a job takes.
        let (query, _) = &pairs[0];
        let texts: Vec<&str> = pairs.iter().map(|(_, text)| *text).cycle().take(150).collect();
        let rows = model.score_pairs(query, &texts, &EmbedOptions::bulk()).expect("scored");
        let alone = |text: &str| model.score_pairs(query, &[text], &EmbedOptions::default()).expect("scored");
        for (row, text) in rows.rows().zip(&texts).take(texts.len()) {
            assert_eq!(row, alone(text).values(), "a score does not depend on its company");
        }
        let ranked = model.rank(query, &texts).expect("ranked");
        assert!(ranked.windows(2).all(|two| two[0].score >= two[1].score));
        assert_eq!(ranked.len(), texts.len());
        assert_eq!(refusal(model.embed(&["a"]).expect_err("embedded")), Code::WrongTask);
    }
    let corpus: String =
        pairs.iter().map(|(_, text)| format!("{}\n", serde_json::json!({ "text": text }))).collect();
    let output = broker.run(
        &[
            "rank",
            pairs[0].0,
            "--corpus",
            "-",
            "--input",
            "jsonl",
            "--model",
            folder.to_str().unwrap(),
            "--json",
            "-k",
            "2",
        ],
        corpus.as_bytes(),
    );
    assert_ok(&output);
    let results: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(results["results"].as_array().expect("rows").len(), 2);
    broker.stop();
}

#[test]
fn a_classifier_names_its_labels() {
    let broker = Broker::start(&[]);
    let folder = stored("tiny/distilbert_classifier");
    let texts: Vec<String> = serde_json::from_value(json(&folder.join("texts.json"))).expect("texts");
    let expected = numbers(&folder.join("expected.f32"));
    let model = lease(&broker, &folder, Route::Lane);
    let rows = model.score_texts(&texts, &EmbedOptions::default()).expect("scored");
    let labels = model.description().expect("described").facts.labels.clone();
    assert_eq!((rows.dim() * texts.len(), labels.len()), (expected.len(), rows.dim()));
    for (found, wanted) in rows.values().iter().zip(&expected) {
        assert!((found - wanted).abs() <= MAX_SCORE_DIFF, "{found}, not {wanted}");
    }
    for (scores, row) in model.classify(&texts).expect("classified").iter().zip(rows.rows()) {
        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).expect("a label").0;
        assert_eq!(scores[0].label, labels[best]);
        assert!((scores.iter().map(|label| label.score).sum::<f32>() - 1.0).abs() < 1e-5);
    }
    let output = broker.run(&["classify", "--model", folder.to_str().unwrap(), "--json", &texts[0]], b"");
    assert_ok(&output);
    let row: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(row["labels"].as_array().expect("labels").len(), labels.len());
    broker.stop();
}

fn settings(options: &Value) -> GenerateSettings {
    let mut settings = GenerateSettings::default();
    for (key, value) in options.as_object().expect("options") {
        let count = || value.as_u64().expect("a count") as u32;
        let number = || value.as_f64().expect("a number") as f32;
        match key.as_str() {
            "max_input_tokens" => settings.max_input_tokens = Some(count()),
            "max_output_tokens" => settings.max_output_tokens = count(),
            "min_output_tokens" => settings.min_output_tokens = count(),
            "num_beams" => settings.num_beams = count(),
            "early_stopping" => settings.early_stopping = value.as_bool().expect("a switch"),
            "length_penalty" => settings.length_penalty = number(),
            "no_repeat_ngram_size" => settings.no_repeat_ngram_size = count(),
            "repetition_penalty" => settings.repetition_penalty = number(),
            other => panic!("the option {other} is not known here"),
        }
    }
    settings
}

#[test]
fn texts_are_those_of_transformers_whole_and_in_pieces() {
    let broker = Broker::start(&[]);
    for name in ["t5_gated", "t5_tied", "llama", "qwen3"] {
        let folder = stored("tiny_generators").join(name);
        let model = lease(&broker, &folder, Route::Lane);
        let expected = json(&folder.join("expected.json"));
        let cases = expected["cases"].as_array().expect("cases");
        let asked: Vec<_> = cases
            .iter()
            .map(|case| {
                let prompt = GeneratePrompt::Text(case["prompt"].as_str().expect("a prompt").to_owned());
                (prompt, settings(&case["options"]), case)
            })
            .collect();
        // All at once: what one gets does not depend on its company.
        let streams: Vec<_> = asked
            .iter()
            .map(|(prompt, settings, _)| {
                model.stream(prompt.clone(), settings, &CallOptions::default()).expect("it begins")
            })
            .collect();
        for (mut stream, (prompt, settings, case)) in streams.into_iter().zip(&asked) {
            let mut text = String::new();
            while let Some(piece) = stream.next_piece().expect("a piece") {
                text += &piece;
            }
            let answer = stream.finish().expect("an end");
            let wanted: Vec<u32> = serde_json::from_value(case["ids"].clone()).expect("ids");
            assert_eq!(answer.token_ids, wanted, "{name}: {prompt:?} {settings:?}");
            assert_eq!(Some(answer.text.as_str()), case["text"].as_str(), "{name}");
            assert_eq!(text, answer.text, "{name}: the pieces are the text");
            let alone = model.generate(prompt.clone(), settings, &CallOptions::default()).expect("written");
            assert_eq!(alone, answer, "{name}");
        }
        let error = model.embed(&["a"]).expect_err("it embedded");
        assert_eq!(refusal(error), Code::WrongTask);
    }
    broker.stop();
}

#[test]
fn the_program_summarizes_and_chats() {
    let broker = Broker::start(&[]);
    let t5 = stored("tiny_generators/t5_gated");
    let text = "The quick brown fox jumps over the lazy dog.";
    let by_library = lease(&broker, &t5, Route::Socket)
        .summarize(
            text,
            &SummaryOptions { max_output_tokens: 16, ..SummaryOptions::default() },
            &CallOptions::default(),
        )
        .expect("a summary");
    let arguments =
        ["summarize", "--model", t5.to_str().unwrap(), "--max-output-length", "16", "--json", "-"];
    let output = broker.run(&arguments, text.as_bytes());
    assert_ok(&output);
    let summary: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(summary["text"].as_str(), Some(by_library.text.as_str()));
    assert!(by_library.output_tokens <= 16);
    let llama = stored("tiny_generators/llama");
    let chat = lease(&broker, &llama, Route::Socket);
    assert!(chat.description().expect("described").facts.has_chat_template);
    let limited = GenerateSettings { max_output_tokens: 8, ..GenerateSettings::default() };
    let answer = chat.generate(user_message("hello"), &limited, &CallOptions::default()).expect("an answer");
    let arguments = ["generate", "--model", llama.to_str().unwrap(), "--max-output-length", "8", "hello"];
    let output = broker.run(&arguments, b"");
    assert_ok(&output);
    assert_eq!(String::from_utf8(output.stdout).expect("UTF-8"), answer.text + "\n");
    // Drawn tokens are those of the seed.
    let drawn = |seed| {
        let settings = GenerateSettings { do_sample: true, temperature: 1.5, seed, ..limited.clone() };
        chat.generate(user_message("hello"), &settings, &CallOptions::default()).expect("an answer").token_ids
    };
    assert_eq!(drawn(7), drawn(7));
    assert!((0..20).any(|seed| drawn(seed) != drawn(7)));
    // Settings out of range are refused by name.
    let error = chat
        .generate(
            user_message("x"),
            &GenerateSettings { temperature: -1.0, do_sample: true, ..limited },
            &CallOptions::default(),
        )
        .expect_err("accepted");
    assert!(error.to_string().contains("temperature"), "{error}");
    broker.stop();
}

#[test]
fn texts_outlive_the_engine_that_writes_them() {
    let broker = Broker::start(&[]);
    let model = lease(&broker, &stored("tiny_generators/llama"), Route::Socket);
    let prompt = GeneratePrompt::Text("the quick".into());
    let settings =
        GenerateSettings { max_output_tokens: 200, min_output_tokens: 200, ..GenerateSettings::default() };
    let wanted = model.generate(prompt.clone(), &settings, &CallOptions::default()).expect("written");
    assert_eq!(wanted.finish, FinishReason::Length);
    for _ in 0..5 {
        let mut stream = model.stream(prompt.clone(), &settings, &CallOptions::default()).expect("it begins");
        let mut text = stream.next_piece().expect("a piece").expect("the first");
        let engine = broker.engine_pid();
        // It may have ended by itself only with its broker.
        nix::sys::signal::kill(engine, nix::sys::signal::Signal::SIGKILL).expect("the engine can be killed");
        while let Some(piece) = stream.next_piece().expect("a piece") {
            text += &piece;
        }
        assert_eq!(text, wanted.text, "no piece is lost or doubled");
        assert_eq!(stream.finish().expect("an end"), wanted);
        eventually("another engine is up", || (broker.engine_pid() != engine).then_some(()));
    }
    // Whoever stops reading ends the generation.
    let mut stream = model.stream(prompt, &settings, &CallOptions::default()).expect("it begins");
    stream.next_piece().expect("a piece");
    drop(stream);
    broker.stop();
}

#[test]
fn prompts_and_dimensions_are_those_of_sentence_transformers() {
    let broker = Broker::start(&[]);
    let model = broker.model(Route::Lane);
    let query = EmbedOptions::default().prompt(Prompt::Text("query: ".into()));
    let prompted = model.embed_with(&["a cat"], &query).expect("embedded");
    let spelled = model.embed(&["query: a cat"]).expect("embedded");
    assert_eq!(prompted.values(), spelled.values());
    let short = model.embed_with(&["a cat"], &query.clone().dimensions(64)).expect("embedded");
    assert_eq!(short.dim(), 64);
    let norm: f32 = short.values().iter().map(|x| x * x).sum();
    assert!((norm - 1.0).abs() < 1e-5);
    let submitted = model.submit(&["a cat"], &query.dimensions(64)).expect("sent").wait().expect("embedded");
    assert_eq!(submitted.values(), short.values());
    let error = model
        .embed_with(&["a"], &EmbedOptions::default().prompt(Prompt::Named("no".into())))
        .expect_err("known");
    assert!(error.to_string().contains("no prompt named"), "{error}");
    assert!(model.embed_with(&["a"], &EmbedOptions::default().dimensions(385)).is_err());
    let output =
        broker.run(&["embed", "--prompt", "query: ", "--dimensions", "64", "--format", "json", "a cat"], b"");
    assert_ok(&output);
    let document: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(document["dimension"], 64);
    let output =
        broker.run(&["similar", "a cat", "--corpus", "-", "--json"], b"a dog\na cat\nthe stock market\n");
    assert_ok(&output);
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(found["results"][0]["text"], "a cat");
    assert_eq!(found["results"].as_array().expect("rows").len(), 3);
    broker.stop();
}

#[test]
fn the_configured_summarizer_brings_its_lengths() {
    let folder = format!("models.t5_summarizer.local_path={}", stored("tiny_generators/t5_gated").display());
    let broker = Broker::start(&["--set", &folder]);
    let tokens = |more: &[&str]| {
        let mut arguments = vec!["--set", &folder, "--set", "models.t5_summarizer.max_output_length=5"];
        arguments.extend(["summarize", "--json"]);
        arguments.extend(more);
        let output = broker.run(&arguments, b"The quick brown fox jumps over the lazy dog.");
        assert_ok(&output);
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")["output_tokens"].as_u64()
    };
    assert_eq!(tokens(&[]), Some(5), "as it is configured");
    assert_eq!(tokens(&["--max-output-length", "3"]), Some(3), "what is asked for goes before");
    broker.stop();
}

//! What generators write: the tokens of transformers, the same in any company, in pieces that make up the text; and bad input.

mod common;

use common::Tensor;
use engine::compile::Precision;
use engine::{
    ChatMessage, CompileError, CompileOptions, FinishReason, GenerateOptions, Generation, Generator,
    ModelError, Prompt, compile_folder,
};
use serde_json::{Value, json};
use shm_layout::image::{HeapImage, Task};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The stored checkpoints; `tests/parity/make_generators.py` made them.
const GENERATORS: [&str; 4] = ["t5_tied", "t5_gated", "llama", "qwen3"];

fn stored(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tiny_generators").join(name)
}

fn compile(folder: &Path, precision: Precision) -> Result<Vec<u8>, CompileError> {
    let options = CompileOptions { model_id: "test/model".into(), precision, ..CompileOptions::default() };
    let mut image = Vec::new();
    compile_folder(folder, &options, &mut image, &mut |_| {})?;
    Ok(image)
}

fn load(folder: &Path, precision: Precision) -> Generator {
    let image = compile(folder, precision).expect("compiles");
    Generator::load(Arc::new(HeapImage::new(&image))).expect("loads")
}

fn generator(name: &str) -> Generator {
    load(&stored(name), Precision::F32)
}

fn expected(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(stored(name).join("expected.json")).expect("read")).expect("JSON")
}

fn options(value: &Value) -> GenerateOptions {
    let number = |field: &str| value.get(field).and_then(Value::as_u64).map(|number| number as usize);
    let float = |field: &str| value.get(field).and_then(Value::as_f64).map(|number| number as f32);
    GenerateOptions {
        max_output_tokens: number("max_output_tokens").expect("always there"),
        min_output_tokens: number("min_output_tokens").unwrap_or(0),
        num_beams: number("num_beams").unwrap_or(1),
        early_stopping: value.get("early_stopping").and_then(Value::as_bool).unwrap_or(false),
        length_penalty: float("length_penalty").unwrap_or(1.0),
        no_repeat_ngram_size: number("no_repeat_ngram_size").unwrap_or(0),
        repetition_penalty: float("repetition_penalty").unwrap_or(1.0),
        ..GenerateOptions::default()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("id") as u32).collect()
}

fn chat(value: &Value) -> Vec<ChatMessage> {
    let text = |message: &Value, field: &str| message[field].as_str().expect("text").to_owned();
    let messages = value.as_array().expect("messages").iter();
    messages
        .map(|message| ChatMessage { role: text(message, "role"), content: text(message, "content") })
        .collect()
}

/// Steps until all are done; gives the pieces of text of each.
fn run(generator: &Generator, generations: &mut [Generation]) -> Vec<Vec<String>> {
    let mut pieces = vec![Vec::new(); generations.len()];
    while generations.iter().any(|generation| !generation.is_done()) {
        let mut batch: Vec<&mut Generation> = generations.iter_mut().collect();
        generator.step(&mut batch).expect("steps");
        for (pieces, generation) in pieces.iter_mut().zip(generations.iter_mut()) {
            pieces.push(generation.take_text());
        }
    }
    pieces
}

#[test]
fn tokens_and_texts_are_those_of_transformers() {
    for name in GENERATORS {
        let generator = generator(name);
        let expected = expected(name);
        for case in expected["cases"].as_array().expect("cases") {
            let prompt = case["prompt"].as_str().expect("prompt");
            let answer =
                generator.generate(&Prompt::Text(prompt), &options(&case["options"])).expect("generates");
            assert_eq!(answer.prompt_tokens, ids(&case["prompt_ids"]).len(), "{name}: {prompt:?}");
            assert_eq!(answer.token_ids, ids(&case["ids"]), "{name}: {prompt:?} {}", case["options"]);
            assert_eq!(answer.text, case["text"].as_str().expect("text"), "{name}: {prompt:?}");
        }
    }
}

#[test]
fn gguf_files_give_the_tokens_of_their_weights_dequantised() {
    for name in ["gguf_qwen3", "gguf_llama"] {
        let generator = generator(name);
        for case in expected(name)["cases"].as_array().expect("cases") {
            let prompt = case["prompt"].as_str().expect("prompt");
            let answer =
                generator.generate(&Prompt::Text(prompt), &options(&case["options"])).expect("generates");
            assert_eq!(answer.prompt_tokens, ids(&case["prompt_ids"]).len(), "{name}: {prompt:?}");
            assert_eq!(answer.token_ids, ids(&case["ids"]), "{name}: {prompt:?}");
            assert_eq!(answer.text, case["text"].as_str().expect("text"), "{name}: {prompt:?}");
        }
        let image = compile(&stored(name), Precision::Bf16).expect("compiles");
        let checked = shm_layout::image::CheckedImage::new(&image).expect("an image");
        let blocks = checked.tensors().filter(|tensor| tensor.dtype == shm_layout::image::DType::Blocks);
        assert!(blocks.count() >= 8, "{name}: blocks were not kept");
    }
    assert!(generator("gguf_qwen3").info().has_chat_template);
}

#[test]
fn spoiled_gguf_files_are_refused_by_name() {
    let copied = copy("gguf_qwen3");
    let path = copied.path().join("model.gguf");
    let good = std::fs::read(&path).expect("read");
    let error = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("write");
        compile(copied.path(), Precision::F32).expect_err("spoiled").to_string()
    };
    assert!(error(&good[..good.len() / 2]).contains("model.gguf"));
    assert!(error(b"GGUF").contains("model.gguf"));
    let replaced = |from: &str, to: &str| {
        let at = good.windows(from.len()).position(|window| window == from.as_bytes()).expect("there");
        let mut bytes = good.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        error(&bytes)
    };
    assert!(replaced("blk.1.attn_k.weight", "blk.1.attn_x.weight").contains("k_proj"));
    // A scale that is not a number: the last tensor's last block.
    let mut bytes = good.clone();
    let at = bytes.len() - 34;
    let text = String::from_utf8_lossy(&good);
    assert!(text.contains("general.architecture"));
    bytes[at..].chunks_exact_mut(34).for_each(|block| block[..2].copy_from_slice(&[0xff, 0x7f]));
    assert!(error(&bytes).contains("finite"));
    std::fs::write(copied.path().join("other.gguf"), &good).expect("write");
    assert!(error(&good).contains("more than one"));
}

#[test]
fn company_changes_no_answer_and_pieces_make_up_the_text() {
    let lower =
        ["t5_gated", "qwen3"].into_iter().flat_map(|name| [(name, Precision::Bf16), (name, Precision::Int8)]);
    for (name, precision) in GENERATORS.map(|name| (name, Precision::F32)).into_iter().chain(lower) {
        let generator = load(&stored(name), precision);
        let expected = expected(name);
        let cases: Vec<(String, GenerateOptions)> = expected["cases"]
            .as_array()
            .expect("cases")
            .iter()
            .enumerate()
            .filter(|(index, _)| index % 2 == 0)
            .map(|(index, case)| {
                let mut options = options(&case["options"]);
                options.do_sample = index % 3 == 0 && options.num_beams == 1;
                options.seed = index as u64;
                (case["prompt"].as_str().expect("prompt").to_owned(), options)
            })
            .collect();
        let mut together: Vec<Generation> = cases
            .iter()
            .map(|(prompt, options)| generator.begin(&Prompt::Text(prompt), options).expect("begins"))
            .collect();
        let pieces = run(&generator, &mut together);
        for (((prompt, options), generation), pieces) in cases.iter().zip(&together).zip(pieces) {
            let alone = generator.generate(&Prompt::Text(prompt), options).expect("generates");
            assert_eq!(
                generation.token_ids(),
                alone.token_ids,
                "{name} {precision:?}: {prompt:?} {options:?}"
            );
            assert_eq!(pieces.concat(), alone.text, "{name} {precision:?}: {prompt:?}");
            assert_eq!(generation.finish_reason(), Some(alone.finish_reason));
        }
    }
}

#[test]
fn chats_are_rendered_and_tokenized_as_by_transformers() {
    // Today's date stands where the expectation has the template's fixed one.
    for name in ["llama", "qwen3"] {
        let generator = generator(name);
        assert!(generator.info().has_chat_template && generator.info().task == Task::Chat);
        for case in expected(name)["chats"].as_array().expect("chats") {
            let messages = chat(&case["messages"]);
            let found = generator.render_chat(&messages).expect("renders");
            let wanted = case["rendered"].as_str().expect("text");
            let without_date = |text: &str| -> Vec<String> {
                text.lines().filter(|line| !line.starts_with("Today: ")).map(str::to_owned).collect()
            };
            assert_eq!(without_date(&found), without_date(wanted), "{name}");
            if name == "qwen3" {
                let options = GenerateOptions { max_output_tokens: 2, ..GenerateOptions::default() };
                let generation = generator.begin(&Prompt::Chat(&messages), &options).expect("begins");
                assert_eq!(generation.prompt_tokens(), ids(&case["ids"]).len());
            }
        }
    }
    let error = generator("t5_tied").begin(
        &Prompt::Chat(&[ChatMessage { role: "user".into(), content: "hi".into() }]),
        &GenerateOptions::default(),
    );
    assert!(matches!(error, Err(ModelError::Template { .. })), "{error:?}");
}

#[test]
fn drawing_depends_on_the_seed_alone() {
    let generator = generator("llama");
    let draw = |seed: u64| {
        let options =
            GenerateOptions { do_sample: true, seed, temperature: 1.5, ..GenerateOptions::default() };
        generator.generate(&Prompt::Text("Numbers like"), &options).expect("generates").token_ids
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let narrow = GenerateOptions { do_sample: true, top_k: 1, ..GenerateOptions::default() };
    let greedy = GenerateOptions::default();
    let answer =
        |options: &GenerateOptions| generator.generate(&Prompt::Text("a b"), options).expect("generates");
    assert_eq!(answer(&narrow), answer(&greedy));
}

#[test]
fn stop_strings_end_the_answer_also_across_tokens() {
    for name in ["llama", "t5_gated"] {
        let generator = generator(name);
        let prompt = Prompt::Text("Models of language read tokens");
        let options = GenerateOptions { max_output_tokens: 30, ..GenerateOptions::default() };
        let whole = generator.generate(&prompt, &options).expect("generates");
        // A run of the text that spans tokens: three characters from its middle.
        let middle: Vec<(usize, char)> = whole.text.char_indices().collect();
        let at = middle.len() / 2;
        let stop: String = middle[at..at + 3].iter().map(|(_, letter)| letter).collect();
        let first = whole.text.find(&stop).expect("it is in the text");
        let stopping = GenerateOptions { stop: vec!["not there".into(), stop.clone()], ..options };
        let mut generation = [generator.begin(&prompt, &stopping).expect("begins")];
        let pieces = run(&generator, &mut generation).remove(0);
        assert_eq!(pieces.concat(), whole.text[..first], "{name}: stop {stop:?}");
        assert_eq!(generation[0].finish_reason(), Some(FinishReason::Stop));
        assert_eq!(generation[0].text(), whole.text[..first]);
        let found = generation[0].token_ids();
        assert_eq!(found, &whole.token_ids[..found.len()]);
        assert!(found.len() < whole.token_ids.len());
    }
}

#[test]
fn long_prompts_are_computed_in_slices_and_cut_or_refused() {
    let chat = generator("qwen3");
    let long = "Models of language ".repeat(20);
    let options = GenerateOptions { max_output_tokens: 3, ..GenerateOptions::default() };
    let mut generation = chat.begin(&Prompt::Text(&long), &options).expect("begins");
    assert!(
        generation.prompt_tokens() > engine::generate::MAX_STEP_PROMPT_TOKENS,
        "{}",
        generation.prompt_tokens()
    );
    assert!(generation.kv_bytes() > 0);
    chat.step(&mut [&mut generation]).expect("steps");
    assert_eq!(generation.output_tokens(), 0);
    chat.step(&mut [&mut generation]).expect("steps");
    assert_eq!(generation.output_tokens(), 1);
    let error = chat.begin(&Prompt::Text(&long.repeat(20)), &options).expect_err("too long");
    assert!(matches!(error, ModelError::TokenCount { max_tokens: 511, .. }), "{error}");
    let short = GenerateOptions { max_input_tokens: Some(8), ..options.clone() };
    assert!(matches!(chat.begin(&Prompt::Text(&long), &short), Err(ModelError::TokenCount { .. })));
    // A text2text model reads the beginning, with its end token.
    let reader = generator("t5_tied");
    let cut = reader.begin(&Prompt::Text(&long), &short).expect("begins");
    assert_eq!(cut.prompt_tokens(), 8);
    let empty = reader.generate(&Prompt::Text(""), &options).expect("generates");
    assert_eq!(empty.prompt_tokens, 1);
    assert!(matches!(chat.begin(&Prompt::Text(""), &options), Err(ModelError::TokenCount { tokens: 0, .. })));
}

#[test]
fn bad_options_are_named() {
    let generator = generator("llama");
    let good = GenerateOptions::default();
    let bad = [
        ("max_output_tokens", GenerateOptions { max_output_tokens: 0, ..good.clone() }),
        ("min_output_tokens", GenerateOptions { min_output_tokens: 129, ..good.clone() }),
        ("num_beams", GenerateOptions { num_beams: 1000, ..good.clone() }),
        ("temperature", GenerateOptions { temperature: f32::NAN, ..good.clone() }),
        ("top_p", GenerateOptions { top_p: 0.0, ..good.clone() }),
        ("length_penalty", GenerateOptions { length_penalty: f32::INFINITY, ..good.clone() }),
        ("repetition_penalty", GenerateOptions { repetition_penalty: 0.0, ..good.clone() }),
        ("stop", GenerateOptions { stop: vec![String::new()], ..good.clone() }),
        ("do_sample", GenerateOptions { do_sample: true, num_beams: 2, ..good.clone() }),
    ];
    for (field, options) in bad {
        let error = generator.begin(&Prompt::Text("a"), &options).expect_err(field).to_string();
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn memory_of_keys_and_values_is_bounded() {
    let copied = copy("qwen3");
    edit_config(copied.path(), |config| {
        config["max_position_embeddings"] = json!(131_072);
    });
    let generator = load(copied.path(), Precision::F32);
    let options = GenerateOptions { max_output_tokens: 131_071, num_beams: 16, ..GenerateOptions::default() };
    let mut held = Vec::new();
    let error = loop {
        match generator.begin(&Prompt::Text("a"), &options) {
            Ok(generation) => held.push(generation),
            Err(error) => break error,
        }
        assert!(held.len() < 10, "no bound");
    };
    assert!(matches!(error, ModelError::KvMemory { .. }), "{error}");
    held.clear();
    generator.begin(&Prompt::Text("a"), &options).expect("there is room again");
}

#[test]
fn the_probe_passes_before_and_after_work() {
    for name in GENERATORS {
        let generator = generator(name);
        generator.probe().expect("first");
        generator.generate(&Prompt::Text("a"), &GenerateOptions::default()).expect("generates");
        generator.probe().expect("again");
    }
}

fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temp dir");
    for entry in std::fs::read_dir(stored(name)).expect("list") {
        let entry = entry.expect("entry");
        std::fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("copy");
    }
    folder
}

fn read_tensors(path: &Path) -> Vec<Tensor> {
    let bytes = std::fs::read(path).expect("read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec())).collect()
}

fn write_tensors(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).expect("view"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("serializes")).expect("write");
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    edit(&mut config);
    std::fs::write(path, config.to_string()).expect("write");
}

#[test]
fn configs_that_lie_are_refused_by_name() {
    let cases: [(&str, &str, Value); 13] = [
        ("llama", "num_hidden_layers", json!(1_000_000)),
        ("llama", "hidden_size", json!(u64::MAX)),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "head_dim", json!(7)),
        ("llama", "attention_bias", json!(true)),
        ("llama", "hidden_act", json!("gelu")),
        ("qwen3", "use_sliding_window", json!(true)),
        ("qwen3", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("qwen3", "rope_scaling", json!({"rope_type": "yarn", "factor": 4.0})),
        ("t5_tied", "d_kv", json!(0)),
        ("t5_tied", "feed_forward_proj", json!("gated-silu")),
        ("t5_tied", "relative_attention_num_buckets", json!(7)),
        ("t5_tied", "eos_token_id", json!(4_000_000)),
    ];
    for (name, field, value) in cases {
        let copied = copy(name);
        let _ = std::fs::remove_file(copied.path().join("generation_config.json"));
        edit_config(copied.path(), |config| {
            if field == "rope_scaling" {
                config["rope_parameters"] = Value::Null;
            }
            config[field] = value.clone();
        });
        let error = compile(copied.path(), Precision::F32).expect_err(field).to_string();
        assert!(error.contains(field), "{name}, {field} = {value}: {error}");
    }
    let copied = copy("t5_tied");
    std::fs::write(copied.path().join("generation_config.json"), r#"{"forced_bos_token_id": 3}"#)
        .expect("write");
    let error = compile(copied.path(), Precision::F32).expect_err("forced").to_string();
    assert!(error.contains("forced_bos_token_id"), "{error}");
}

#[test]
fn weights_that_are_missing_wrong_or_not_finite_are_refused_by_name() {
    let spoil = |edit: fn(&mut Vec<Tensor>)| {
        let copied = copy("qwen3");
        let path = copied.path().join("model.safetensors");
        let mut tensors = read_tensors(&path);
        edit(&mut tensors);
        write_tensors(&path, &tensors);
        compile(copied.path(), Precision::F32).expect_err("spoiled").to_string()
    };
    let error =
        spoil(|tensors| tensors.retain(|tensor| tensor.0 != "model.layers.1.self_attn.k_proj.weight"));
    assert!(error.contains("layers.1.self_attn.k_proj"), "{error}");
    let error = spoil(|tensors| {
        let norm = tensors.iter_mut().find(|tensor| tensor.0 == "model.norm.weight").expect("there");
        norm.2 = vec![4, 8];
    });
    assert!(error.contains("model.norm.weight") && error.contains("shape"), "{error}");
    let error = spoil(|tensors| {
        let down =
            tensors.iter_mut().find(|tensor| tensor.0.contains("layers.0.mlp.down_proj")).expect("there");
        down.3[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(error.contains("down_proj") && error.contains("finite"), "{error}");
    let error = spoil(|tensors| {
        let extra = tensors[0].clone();
        tensors.push(("model.layers.9.surprise".into(), extra.1, extra.2, extra.3));
    });
    assert!(error.contains("surprise"), "{error}");
}

#[test]
fn hostile_templates_end_and_are_named() {
    let messages = [ChatMessage { role: "user".into(), content: "hi".into() }];
    let render = |template: &str| {
        let copied = copy("qwen3");
        std::fs::write(copied.path().join("chat_template.jinja"), template).expect("write");
        match compile(copied.path(), Precision::F32) {
            Ok(image) => {
                let generator = Generator::load(Arc::new(HeapImage::new(&image))).expect("loads");
                generator.render_chat(&messages).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    };
    for (template, hint) in [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ""),
        ("{{ 'abcdefgh' * 1000000 }}", ""),
        ("{% for a in range(9000) %}{{ 'abcdefgh' * 1000 }}{% endfor %}", "longer"),
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "no user"),
        ("{% if %}", "syntax"),
        ("{% include 'etc/passwd' %}", ""),
    ] {
        let error = render(template).expect_err(template);
        assert!(error.contains("template") && error.contains(hint), "{template}: {error}");
    }
    assert_eq!(render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"), Ok("hi<|im_end|>".into()));
}

#[test]
fn bf16_agrees_on_first_tokens() {
    for name in GENERATORS {
        let expected = expected(name);
        let cases = expected["cases"].as_array().expect("cases");
        let generator = load(&stored(name), Precision::Bf16);
        let greedy: Vec<&Value> =
            cases.iter().filter(|case| case["options"].get("num_beams").is_none()).collect();
        let agree = greedy.iter().filter(|case| {
            let mut options = options(&case["options"]);
            options.max_output_tokens = options.min_output_tokens.max(1);
            let prompt = case["prompt"].as_str().expect("prompt");
            let answer = generator.generate(&Prompt::Text(prompt), &options).expect("generates");
            answer.token_ids[0] == ids(&case["ids"])[0]
        });
        let agree = agree.count();
        assert!(3 * agree >= 2 * greedy.len(), "{name}: {agree} of {}", greedy.len());
    }
}

#[test]
fn an_embedder_is_no_generator() {
    let (image, _) = common::compile(&common::stored("bert_mean")).expect("compiles");
    assert!(Generator::load(Arc::new(HeapImage::new(&image))).is_err());
    let image = compile(&stored("llama"), Precision::F32).expect("compiles");
    assert!(engine::Model::load(Arc::new(HeapImage::new(&image))).is_err());
}

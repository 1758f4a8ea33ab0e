//! Folders of tiny models with made-up weights: BERT in shape, no use as a model. Loaded in milliseconds, and another seed
//! gives other vectors. What is measured with real models needs another one.

use serde_json::{Map, Value, json};
use std::path::Path;

/// Width of the hidden state, and of the vectors.
pub const DIM: usize = 64;
const INTERMEDIATE: usize = 128;
const HEADS: usize = 4;
const LAYERS: usize = 1;
const POSITIONS: usize = 64;

/// Writes the folder of a model, or replaces what is in it.
///
/// # Panics
/// When it cannot be written.
pub fn write(folder: &Path, seed: u64) {
    write_padded(folder, seed, 0);
}

/// As `write`, with so many more rows in the word table, which makes the image larger and changes nothing else.
///
/// # Panics
/// When it cannot be written.
pub fn write_padded(folder: &Path, seed: u64, more_rows: usize) {
    let words = words();
    let vocabulary = words.len() + more_rows;
    std::fs::create_dir_all(folder.join("1_Pooling")).expect("a folder can be made");
    let put = |name: &str, value: Value| {
        let text = serde_json::to_vec_pretty(&value).expect("JSON can be written");
        std::fs::write(folder.join(name), text).expect("a file can be written");
    };
    put(
        "config.json",
        json!({
            "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
            "hidden_size": DIM, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS, "vocab_size": vocabulary, "max_position_embeddings": POSITIONS,
            "type_vocab_size": 2, "pad_token_id": 0, "layer_norm_eps": 1e-12,
            "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
            "position_embedding_type": "absolute",
        }),
    );
    put("tokenizer.json", tokenizer(&words));
    put(
        "modules.json",
        json!([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]),
    );
    put(
        "1_Pooling/config.json",
        json!({"word_embedding_dimension": DIM, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
               "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false}),
    );
    put("sentence_bert_config.json", json!({"max_seq_length": 32, "do_lower_case": false}));
    write_weights(&folder.join("model.safetensors"), seed, vocabulary);
}

fn words() -> Vec<String> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].map(str::to_owned);
    let characters = ('!'..='~').filter(|c| !c.is_ascii_uppercase());
    special.into_iter().chain(characters.flat_map(|c| [c.to_string(), format!("##{c}")])).collect()
}

/// A WordPiece tokenizer that knows the printable ASCII characters, alone and inside a word.
fn tokenizer(words: &[String]) -> Value {
    let vocabulary: Map<String, Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), id.into())).collect();
    let added: Vec<Value> = words
        .iter()
        .take(5)
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let ids = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                       "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, token("[SEP]")],
            "pair": [token("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, token("[SEP]"),
                     {"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}],
            "special_tokens": {"[CLS]": ids("[CLS]", 2), "[SEP]": ids("[SEP]", 3)},
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": 100, "vocab": vocabulary},
    })
}

fn tensors(vocabulary: usize) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("embeddings.word_embeddings.weight".to_owned(), vec![vocabulary, DIM]),
        ("embeddings.position_embeddings.weight".to_owned(), vec![POSITIONS, DIM]),
        ("embeddings.token_type_embeddings.weight".to_owned(), vec![2, DIM]),
    ];
    let norm = |all: &mut Vec<(String, Vec<usize>)>, name: &str| {
        all.push((format!("{name}.LayerNorm.weight"), vec![DIM]));
        all.push((format!("{name}.LayerNorm.bias"), vec![DIM]));
    };
    norm(&mut all, "embeddings");
    for layer in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let mut dense = |part: &str, out: usize, input: usize| {
            all.push((name(&format!("{part}.weight")), vec![out, input]));
            all.push((name(&format!("{part}.bias")), vec![out]));
        };
        for part in ["query", "key", "value"] {
            dense(&format!("attention.self.{part}"), DIM, DIM);
        }
        dense("attention.output.dense", DIM, DIM);
        dense("intermediate.dense", INTERMEDIATE, DIM);
        dense("output.dense", DIM, INTERMEDIATE);
        norm(&mut all, &name("attention.output"));
        norm(&mut all, &name("output"));
    }
    all
}

fn write_weights(path: &Path, seed: u64, vocabulary: usize) {
    let mut directory = Map::new();
    let mut bytes = Vec::new();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for (name, shape) in tensors(vocabulary) {
        let begin = bytes.len();
        let is_scale = name.ends_with("LayerNorm.weight");
        for _ in 0..shape.iter().product::<usize>() {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let number = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let number = if is_scale { 1.0 } else { number };
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, bytes.len()]});
        directory.insert(name, entry);
    }
    let mut head = serde_json::to_vec(&directory).expect("JSON can be written");
    head.resize(head.len().next_multiple_of(8), b' ');
    let mut file = (head.len() as u64).to_le_bytes().to_vec();
    file.extend(head);
    file.extend(bytes);
    // Replaced as a whole: a loader reads the old one or the new one.
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, file).expect("the weights can be written");
    std::fs::rename(&temporary, path).expect("the weights can be put in place");
}

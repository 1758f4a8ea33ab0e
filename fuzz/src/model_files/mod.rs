//! Files of a model folder that a stranger wrote: config.json, tokenizer.json, safetensors headers and shard indexes,
//! sentence-transformers' settings. The engine's own parsers, taken in as source files: linking the engine would build
//! candle under instrumentation, which takes longer than the fuzzing. The including crate has `config` and `json`, taken
//! in the same way, at its root.

#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/checkpoint.rs"]
mod checkpoint;
#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/error.rs"]
mod error;
#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/folder.rs"]
mod folder;
#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/gguf.rs"]
mod gguf;
#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/sentence.rs"]
mod sentence;
#[allow(dead_code, unused_imports)]
#[path = "../../../engine/src/compile/tokenizer_check.rs"]
mod tokenizer_check;

use crate::config::EncoderConfig;
use std::path::PathBuf;
use std::sync::LazyLock;

/// The folder that this process writes its model files to; in memory where the system has such a place.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let shm = PathBuf::from("/dev/shm");
    let base = if shm.is_dir() { shm } else { std::env::temp_dir() };
    let folder = base.join(format!("fuzz-scratch-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("1_Pooling")).expect("a place for files is there");
    folder
});

/// Removes what the runs of this process left behind.
pub fn clean_up() {
    let _ = std::fs::remove_dir_all(&*FOLDER);
}

fn with_file(name: &str, bytes: &[u8], check: impl FnOnce(&mut folder::ModelFolder)) {
    let path = FOLDER.join(name);
    std::fs::write(&path, bytes).expect("the folder can be written");
    let mut opened = folder::ModelFolder::open(&FOLDER, &[]).expect("the folder is there");
    check(&mut opened);
    drop(opened);
    let _ = std::fs::remove_file(path);
}

/// First byte chooses the file, the rest is its content.
pub fn run(data: &[u8]) {
    let Some((kind, bytes)) = data.split_first() else { return };
    match kind % 7 {
        0 => {
            if let Ok(config) = EncoderConfig::from_json(bytes) {
                assert!(config.head_dim() > 0 && config.max_tokens() > 0 && config.vocab_size > 0);
            }
        }
        1 => {
            if let Ok(cleaned) = tokenizer_check::clean(bytes, 1000) {
                // What was accepted is JSON, and accepted again.
                assert!(serde_json::from_slice::<serde_json::Value>(&cleaned).is_ok());
                assert!(tokenizer_check::clean(&cleaned, 1000).is_ok());
            }
        }
        2 => with_file("model.safetensors", bytes, |opened| {
            if let Ok(checkpoint) = checkpoint::Checkpoint::open(opened, "") {
                for tensor in checkpoint.tensors.values() {
                    assert!(tensor.offset <= checkpoint.files[tensor.file].len_bytes());
                }
            }
        }),
        3 => with_file("model.safetensors.index.json", bytes, |opened| {
            let _ = checkpoint::Checkpoint::open(opened, "");
        }),
        4 => with_file("modules.json", bytes, |opened| {
            let _ = sentence::SentenceSettings::read(opened);
        }),
        6 => {
            if let Ok(header) = gguf::parse(bytes, bytes.len() as u64) {
                for tensor in header.tensors.values() {
                    assert!(tensor.offset <= bytes.len() as u64);
                }
            }
        }
        _ => {
            let modules =
                br#"[{"path":"","type":"models.Transformer"},{"path":"1_Pooling","type":"models.Pooling"}]"#;
            std::fs::write(FOLDER.join("modules.json"), modules).expect("the folder can be written");
            with_file("1_Pooling/config.json", bytes, |opened| {
                let _ = sentence::SentenceSettings::read(opened);
            });
        }
    }
}

/// Inputs to start from: a good file of each kind, and the lies that are known to hurt other readers.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let mut add =
        |name: &str, kind: u8, bytes: &[u8]| seeds.push((name.to_owned(), [&[kind], bytes].concat()));
    let config = br#"{"model_type":"bert","architectures":["BertModel"],"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":64,"vocab_size":1000,"max_position_embeddings":64,"type_vocab_size":2,"hidden_act":"gelu","layer_norm_eps":1e-12,"pad_token_id":0}"#;
    add("config", 0, config);
    add("config-zero-heads", 0, &replaced(config, "\"num_attention_heads\":4", "\"num_attention_heads\":0"));
    add("config-huge", 0, &replaced(config, "\"hidden_size\":32", "\"hidden_size\":99999999999999999999"));
    add("config-twice", 0, &replaced(config, "\"vocab_size\":1000", "\"vocab_size\":1000,\"vocab_size\":7"));
    let tokenizer = br###"{"version":"1.0","truncation":null,"padding":{"strategy":{"Fixed":4000000000}},"added_tokens":[{"id":0,"content":"[PAD]","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},"pre_tokenizer":{"type":"BertPreTokenizer"},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"[CLS]","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"[CLS]":{"id":"[CLS]","ids":[1],"tokens":["[CLS]"]}}},"decoder":null,"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"[PAD]":0,"[CLS]":1,"[UNK]":2,"a":3,"##b":4}}}"###;
    add("tokenizer", 1, tokenizer);
    add(
        "tokenizer-regex",
        1,
        &replaced(
            tokenizer,
            "{\"type\":\"BertPreTokenizer\"}",
            r#"{"type":"Split","pattern":{"Regex":"^(a+)+$"},"behavior":"Isolated","invert":false}"#,
        ),
    );
    let bpe = br#"{"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":[["a","b"]]}}"#;
    add("tokenizer-bpe", 1, bpe);
    add("tokenizer-bpe-old-merges", 1, &replaced(bpe, "[\"a\",\"b\"]", "\"a b\""));
    add("tokenizer-long-merge", 1, &replaced(bpe, "[\"a\",\"b\"]", "[\"aaaaaaaaaaaa\",\"b\"]"));
    add(
        "tokenizer-unigram",
        1,
        br#"{"model":{"type":"Unigram","unk_id":0,"vocab":[["<unk>",0.0],["a",-1.5]]}}"#,
    );
    for (name, header, data) in [
        (
            "safetensors",
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#,
            24,
        ),
        (
            "safetensors-overlap",
            r#"{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],"data_offsets":[8,24]}}"#,
            24,
        ),
        (
            "safetensors-empty-max",
            r#"{"a":{"dtype":"F32","shape":[0,18446744073709551615,18446744073709551615],"data_offsets":[0,0]}}"#,
            0,
        ),
        (
            "safetensors-outside",
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}}"#,
            8,
        ),
    ] {
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![1; data]].concat();
        add(name, 2, &file);
    }
    add("safetensors-header-length", 2, &[0xff; 16]);
    add("index", 3, br#"{"metadata":{"total_size":1},"weight_map":{"a":"model-1.safetensors"}}"#);
    add("index-escape", 3, br#"{"weight_map":{"a":"../x.safetensors"}}"#);
    add("modules", 4, br#"[{"idx":0,"name":"0","path":"","type":"sentence_transformers.models.Transformer"},{"idx":1,"name":"1","path":"1_Pooling","type":"sentence_transformers.models.Pooling"},{"idx":2,"name":"2","path":"2_Normalize","type":"sentence_transformers.models.Normalize"}]"#);
    add("modules-escape", 4, br#"[{"path":"../..","type":"Transformer"},{"path":"/etc","type":"Pooling"}]"#);
    add("pooling", 5, br#"{"word_embedding_dimension":384,"pooling_mode_cls_token":false,"pooling_mode_mean_tokens":true,"pooling_mode_max_tokens":false,"pooling_mode_mean_sqrt_len_tokens":false}"#);
    add("pooling-none", 5, br#"{"word_embedding_dimension":-1}"#);
    let mut gguf = b"GGUF\x03\0\0\0".to_vec();
    gguf.extend(1u64.to_le_bytes());
    gguf.extend(1u64.to_le_bytes());
    for (text, rest) in
        [("general.alignment", &[4, 0, 0, 0, 32, 0, 0, 0][..]), ("output.weight", &[1, 0, 0, 0])]
    {
        gguf.extend((text.len() as u64).to_le_bytes());
        gguf.extend(text.as_bytes());
        gguf.extend(rest);
    }
    gguf.extend(32u64.to_le_bytes());
    gguf.extend([8, 0, 0, 0]);
    gguf.extend([0; 8]);
    gguf.resize(gguf.len().next_multiple_of(32) + 34, 0);
    add("gguf", 6, &gguf);
    seeds
}

fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    String::from_utf8_lossy(bytes).replacen(from, to, 1).into_bytes()
}

//! What a GGUF file's metadata says of model and tokenizer, as the files that a folder would have: config.json, tokenizer.json,
//! tokenizer_config.json. They are checked like those of a folder afterwards.

use super::error::CompileError;
use super::folder::SourceFile;
use super::generator::GeneratorFiles;
use super::gguf::{Header, Meta};
use crate::json::shorten;
use serde_json::{Value, json};
use std::collections::HashMap;

/// Tokens that a merge is looked for in: every split of each is tried, so they are bounded.
const MAX_MERGED_TOKEN_CHARS: usize = 128;
/// Most pairs that rotary positions are stretched by.
const MAX_ROPE_FACTORS: usize = 512;

const LLAMA3_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const QWEN2_SPLIT: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

/// Metadata of a file, by typed access.
struct Metadata<'a> {
    name: &'a str,
    header: &'a Header,
}

impl Metadata<'_> {
    fn bad(&self, reason: String) -> CompileError {
        CompileError::File { name: self.name.to_owned(), reason }
    }

    fn get(&self, key: &str) -> Option<&Meta> {
        self.header.metadata.get(key)
    }

    fn text(&self, key: &str) -> Result<&str, CompileError> {
        match self.get(key) {
            Some(Meta::Text(text)) => Ok(text),
            _ => Err(self.bad(format!("{key} is missing or no text"))),
        }
    }

    fn texts(&self, key: &str) -> Result<&[String], CompileError> {
        match self.get(key) {
            Some(Meta::Texts(list)) => Ok(list),
            _ => Err(self.bad(format!("{key} is missing or no list of texts"))),
        }
    }

    fn number(&self, key: &str) -> Option<Value> {
        match self.get(key)? {
            Meta::Integer(number) => u64::try_from(*number).ok().map(Value::from),
            Meta::Float(number) => Some(json!(number)),
            _ => None,
        }
    }

    fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Meta::Flag(flag) => Some(*flag),
            _ => None,
        }
    }
}

/// The small files of the model in a GGUF file; `beside` is a tokenizer.json in its folder, which is taken before the file's own.
pub(super) fn read(
    file: &SourceFile,
    header: &Header,
    beside: Option<Vec<u8>>,
) -> Result<GeneratorFiles, CompileError> {
    let metadata = Metadata { name: file.name(), header };
    let config = config(&metadata, file)?;
    let tokenizer = match beside {
        Some(bytes) => bytes,
        None => tokenizer(&metadata)?.to_string().into_bytes(),
    };
    let template = match metadata.get("tokenizer.chat_template") {
        Some(Meta::Text(template)) => Some(template.clone()),
        _ => None,
    };
    Ok(GeneratorFiles {
        config_json: config.to_string().into_bytes(),
        generation_config: None,
        tokenizer,
        tokenizer_config: Some(token_names(&metadata).to_string().into_bytes()),
        template,
    })
}

/// A config.json as transformers would have it.
fn config(metadata: &Metadata<'_>, file: &SourceFile) -> Result<Value, CompileError> {
    let kind = metadata.text("general.architecture")?;
    if !matches!(kind, "llama" | "qwen3") {
        let reason =
            format!("general.architecture {:?} is not supported; llama and qwen3 are", shorten(kind));
        return Err(metadata.bad(reason));
    }
    let key = |name: &str| format!("{kind}.{name}");
    let refused = [("expert_count", "experts"), ("attention.sliding_window", "a sliding window")];
    for (name, what) in refused {
        if metadata.number(&key(name)).is_some_and(|number| number.as_f64() != Some(0.0)) {
            return Err(metadata.bad(format!("{}: models with {what} are not supported", key(name))));
        }
    }
    if let Some(Meta::Text(scaling)) = metadata.get(&key("rope.scaling.type"))
        && scaling != "none"
    {
        let reason =
            format!("{} is {:?}; only none is supported", key("rope.scaling.type"), shorten(scaling));
        return Err(metadata.bad(reason));
    }
    let mut config = json!({"model_type": kind, "hidden_act": "silu", "rope_neighbours": kind == "llama"});
    let fields = [
        ("hidden_size", "embedding_length"),
        ("num_hidden_layers", "block_count"),
        ("intermediate_size", "feed_forward_length"),
        ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"),
        ("max_position_embeddings", "context_length"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
        ("rope_theta", "rope.freq_base"),
        ("head_dim", "attention.key_length"),
    ];
    for (field, name) in fields {
        if let Some(number) = metadata.number(&key(name)) {
            config[field] = number;
        }
    }
    let rotated = metadata.number(&key("rope.dimension_count"));
    let head_dim = config.get("head_dim").cloned().or_else(|| {
        let (width, heads) = (config["hidden_size"].as_u64()?, config["num_attention_heads"].as_u64()?);
        width.checked_div(heads).map(Value::from)
    });
    if let (Some(rotated), Some(head_dim)) = (rotated, head_dim)
        && rotated != head_dim
    {
        return Err(metadata.bad(format!("{} must be the whole head", key("rope.dimension_count"))));
    }
    config["vocab_size"] =
        match metadata.header.tensors.get("token_embd.weight").map(|tensor| &tensor.shape[..]) {
            Some([rows, _]) => json!(rows),
            _ => return Err(metadata.bad("has no matrix token_embd.weight".into())),
        };
    config["tie_word_embeddings"] = json!(!metadata.header.tensors.contains_key("output.weight"));
    let ends: Vec<Value> = ["eos_token_id", "eot_token_id", "eom_token_id"]
        .iter()
        .filter_map(|name| metadata.number(&format!("tokenizer.ggml.{name}")))
        .collect();
    config["eos_token_id"] = json!(ends);
    if let Some(factors) = rope_factors(metadata, file)? {
        config["rope_factors"] = json!(factors);
    }
    Ok(config)
}

/// What Llama 3's frequencies are divided by, which llama.cpp keeps as a tensor.
fn rope_factors(metadata: &Metadata<'_>, file: &SourceFile) -> Result<Option<Vec<f32>>, CompileError> {
    let Some(tensor) = metadata.header.tensors.get("rope_freqs.weight") else { return Ok(None) };
    let [count] = tensor.shape[..] else {
        return Err(metadata.bad("rope_freqs.weight is no list".into()));
    };
    if tensor.dtype != "F32" || count as usize > MAX_ROPE_FACTORS {
        return Err(metadata.bad(format!("rope_freqs.weight must be F32 and at most {MAX_ROPE_FACTORS}")));
    }
    let mut bytes = vec![0; 4 * count as usize];
    file.read_at(&mut bytes, tensor.offset)?;
    let factors: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect();
    if factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
        return Err(metadata.bad("rope_freqs.weight holds a value that is not above 0".into()));
    }
    Ok(Some(factors))
}

/// A tokenizer_config.json with the names of special tokens.
fn token_names(metadata: &Metadata<'_>) -> Value {
    let tokens = metadata.texts("tokenizer.ggml.tokens").unwrap_or_default();
    let mut names = json!({});
    for (name, key) in [
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ] {
        let id = metadata.number(&format!("tokenizer.ggml.{key}")).and_then(|id| id.as_u64());
        if let Some(token) = id.and_then(|id| tokens.get(id as usize)) {
            names[name] = json!(token);
        }
    }
    names
}

/// The tokenizer as a tokenizer.json.
fn tokenizer(metadata: &Metadata<'_>) -> Result<Value, CompileError> {
    let tokens = metadata.texts("tokenizer.ggml.tokens")?;
    let kinds: &[i64] = match metadata.get("tokenizer.ggml.token_type") {
        Some(Meta::Integers(kinds)) if kinds.len() == tokens.len() => kinds,
        None => &[],
        Some(_) => {
            return Err(metadata.bad("tokenizer.ggml.token_type is not one number for each token".into()));
        }
    };
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    if vocab.len() != tokens.len() {
        return Err(metadata.bad("tokenizer.ggml.tokens has a token twice".into()));
    }
    // 2 unknown, 3 control, 4 defined by users.
    let added: Vec<Value> = kinds
        .iter()
        .zip(tokens)
        .enumerate()
        .filter(|(_, (kind, _))| matches!(kind, 2..=4))
        .map(|(id, (kind, token))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind != 4})
        })
        .collect();
    let begins = metadata.number("tokenizer.ggml.bos_token_id").and_then(|id| id.as_u64());
    let kind = metadata.text("tokenizer.ggml.model")?;
    let adds_begin = metadata.flag("tokenizer.ggml.add_bos_token").unwrap_or(kind == "llama");
    let begin = begins.and_then(|id| tokens.get(id as usize).map(|token| (id, token))).filter(|_| adds_begin);
    let post = begin.map_or(Value::Null, |(id, token)| {
        let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = json!({"Sequence": {"id": "A", "type_id": 0}});
        json!({"type": "TemplateProcessing", "single": [special, text],
               "pair": [special, text, {"Sequence": {"id": "B", "type_id": 1}}],
               "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}}})
    });
    let (normalizer, pre, decoder, model) = match kind {
        "gpt2" => byte_level(metadata, vocab)?,
        "llama" => sentence_piece(metadata, tokens, vocab)?,
        other => {
            let reason = format!(
                "tokenizer.ggml.model {:?} is not supported; put a tokenizer.json beside the file",
                shorten(other)
            );
            return Err(metadata.bad(reason));
        }
    };
    Ok(
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
              "pre_tokenizer": pre, "post_processor": post, "decoder": decoder, "model": model}),
    )
}

/// Normalizer, pre-tokenizer, decoder and model.
type Parts = (Value, Value, Value, Value);

fn byte_level(metadata: &Metadata<'_>, vocab: serde_json::Map<String, Value>) -> Result<Parts, CompileError> {
    let pre = match metadata.get("tokenizer.ggml.pre") {
        Some(Meta::Text(pre)) => pre.as_str(),
        _ => "default",
    };
    let (split, normalizer) = match pre {
        "llama-bpe" | "llama3" | "llama-v3" => (Some(LLAMA3_SPLIT), Value::Null),
        "qwen2" => (Some(QWEN2_SPLIT), json!({"type": "NFC"})),
        "gpt-2" | "default" => (None, Value::Null),
        other => {
            let reason = format!(
                "tokenizer.ggml.pre {:?} is not supported; put a tokenizer.json beside the file",
                shorten(other)
            );
            return Err(metadata.bad(reason));
        }
    };
    let bytes = |uses_own: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": uses_own});
    let pre = match split {
        None => bytes(true),
        Some(split) => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": false}, bytes(false)]}),
    };
    let merges = metadata.texts("tokenizer.ggml.merges")?;
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        "ignore_merges": split == Some(LLAMA3_SPLIT), "vocab": vocab, "merges": merges});
    Ok((normalizer, pre, bytes(true), model))
}

/// SentencePiece's BPE: pieces with scores, of which merges are made as transformers does (`generate_merges`).
fn sentence_piece(
    metadata: &Metadata<'_>,
    tokens: &[String],
    vocab: serde_json::Map<String, Value>,
) -> Result<Parts, CompileError> {
    let scores: &[f32] = match metadata.get("tokenizer.ggml.scores") {
        Some(Meta::Floats(scores)) if scores.len() == tokens.len() => scores,
        _ => return Err(metadata.bad("tokenizer.ggml.scores is not one number for each token".into())),
    };
    let ids: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize, usize, usize)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if token.chars().count() > MAX_MERGED_TOKEN_CHARS {
            continue;
        }
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (ids.get(&token[..at]), ids.get(&token[at..])) {
                merges.push((
                    scores[id],
                    *left,
                    *right,
                    token[..at].chars().count(),
                    token[at..].chars().count(),
                ));
            }
        }
    }
    // Falling by score and lengths; equal ones stay in the order of their parts' ids.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.3.cmp(&a.3)).then(b.4.cmp(&a.4)));
    let merges: Vec<Value> =
        merges.iter().map(|(_, left, right, ..)| json!([tokens[*left], tokens[*right]])).collect();
    let unknown = metadata.number("tokenizer.ggml.unknown_token_id").and_then(|id| id.as_u64());
    let unknown = unknown.and_then(|id| tokens.get(id as usize));
    let model = json!({"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
        "merges": merges});
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = if metadata.flag("tokenizer.ggml.add_space_prefix") == Some(false) {
        space
    } else {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]})
    };
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    Ok((normalizer, Value::Null, decoder, model))
}

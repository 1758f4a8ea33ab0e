//! A model folder of any size with random weights: BERT in shape, no use as a model. For measuring what depends on size
//! alone. Written as a stream: no tensor is ever held whole.

use anyhow::Context;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Width of the hidden state.
const HIDDEN: usize = 1024;
/// Width of the feed-forward block.
const INTERMEDIATE: usize = 4096;
/// Attention heads.
const HEADS: usize = 16;
/// Rows of the word table, as in BERT; the tokenizer knows only some of them.
const VOCABULARY: usize = 30_522;
/// Longest text in tokens.
const POSITIONS: usize = 512;
/// Weights lie within this of zero, as freshly initialised ones do.
const WEIGHT_RANGE: f32 = 0.02;
/// Bytes of weights that are made before they are written.
const CHUNK_BYTES: usize = 1 << 20;

/// Name, shape and whether it is a layer norm's weight (all ones).
pub(crate) type Tensor = (String, Vec<usize>, bool);

fn tensors(layers: usize) -> Vec<Tensor> {
    let mut all: Vec<Tensor> = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let is_scale = name.ends_with("LayerNorm.weight");
        all.push((name, shape.to_vec(), is_scale));
    };
    let norm = |add: &mut dyn FnMut(String, &[usize]), name: &str| {
        add(format!("{name}.LayerNorm.weight"), &[HIDDEN]);
        add(format!("{name}.LayerNorm.bias"), &[HIDDEN]);
    };
    add("embeddings.word_embeddings.weight".into(), &[VOCABULARY, HIDDEN]);
    add("embeddings.position_embeddings.weight".into(), &[POSITIONS, HIDDEN]);
    add("embeddings.token_type_embeddings.weight".into(), &[2, HIDDEN]);
    norm(&mut add, "embeddings");
    for layer in 0..layers {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        for part in
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        {
            add(name(&format!("{part}.weight")), &[HIDDEN, HIDDEN]);
            add(name(&format!("{part}.bias")), &[HIDDEN]);
        }
        norm(&mut add, &name("attention.output"));
        add(name("intermediate.dense.weight"), &[INTERMEDIATE, HIDDEN]);
        add(name("intermediate.dense.bias"), &[INTERMEDIATE]);
        add(name("output.dense.weight"), &[HIDDEN, INTERMEDIATE]);
        add(name("output.dense.bias"), &[HIDDEN]);
        norm(&mut add, &name("output"));
    }
    all
}

fn tensor_bytes((_, shape, _): &Tensor) -> u64 {
    shape.iter().product::<usize>() as u64 * 4
}

/// Layers with which the weights have at least `bytes`.
fn layers_for(bytes: u64) -> usize {
    let size = |layers: usize| tensors(layers).iter().map(tensor_bytes).sum::<u64>();
    let (none, one) = (size(0), size(1));
    bytes.saturating_sub(none).div_ceil(one - none).max(1) as usize
}

/// Writes a model folder with at least `bytes` of f32 weights; gives how many it has.
///
/// # Errors
/// When the folder cannot be written.
pub(crate) fn write(folder: &Path, bytes: u64) -> anyhow::Result<u64> {
    let layers = layers_for(bytes);
    let put = |name: &str, value: Value| -> anyhow::Result<()> {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, serde_json::to_vec_pretty(&value)?).with_context(|| format!("writing {name}"))
    };
    put("config.json", config(layers))?;
    put("tokenizer.json", tokenizer())?;
    put(
        "modules.json",
        json!([
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]),
    )?;
    put(
        "1_Pooling/config.json",
        json!({"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true,
               "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false}),
    )?;
    put("sentence_bert_config.json", json!({"max_seq_length": 256, "do_lower_case": false}))?;
    write_weights(&folder.join("model.safetensors"), &tensors(layers))
}

fn config(layers: usize) -> Value {
    json!({
        "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2, "pad_token_id": 0, "layer_norm_eps": 1e-12,
        "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": WEIGHT_RANGE,
        "position_embedding_type": "absolute",
    })
}

/// A WordPiece tokenizer that knows the printable ASCII characters, alone and inside a word.
fn tokenizer() -> Value {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let characters = ('!'..='~').filter(|c| !c.is_ascii_uppercase());
    let words = special.iter().map(ToString::to_string);
    let words = words.chain(characters.flat_map(|c| [c.to_string(), format!("##{c}")]));
    let vocabulary: Map<String, Value> = words.enumerate().map(|(id, word)| (word, id.into())).collect();
    let added: Vec<Value> = special
        .iter()
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

/// Writes a safetensors file of these tensors with random values, the same each time; gives the bytes of weights.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_weights(path: &Path, tensors: &[Tensor]) -> anyhow::Result<u64> {
    let mut header = Map::new();
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor_bytes(tensor);
        let entry = json!({"dtype": "F32", "shape": tensor.1, "data_offsets": [start, end]});
        header.insert(tensor.0.clone(), entry);
    }
    let mut header = serde_json::to_vec(&Value::Object(header))?;
    // The format wants the data aligned; spaces after the JSON are allowed for that.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).context("making model.safetensors")?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    for tensor in tensors {
        let mut left = tensor_bytes(tensor) as usize;
        while left > 0 {
            let now = left.min(CHUNK_BYTES);
            chunk.clear();
            for _ in 0..now / 4 {
                let value = if tensor.2 { 1.0 } else { random.weight() };
                chunk.extend_from_slice(&value.to_le_bytes());
            }
            file.write_all(&chunk).context("writing model.safetensors")?;
            left -= now;
        }
    }
    file.flush().context("writing model.safetensors")?;
    Ok(end)
}

/// xorshift64*: fast, and the same weights on each machine.
struct Random(u64);

impl Random {
    fn weight(&mut self) -> f32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let bits = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40;
        (bits as f32 / (1u64 << 23) as f32 - 1.0) * WEIGHT_RANGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_as_long_as_its_header_says() {
        let folder = tempfile::tempdir().unwrap();
        let weights_bytes = write(folder.path(), 1).unwrap();
        let file = std::fs::read(folder.path().join("model.safetensors")).unwrap();
        let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(file.len() as u64, 8 + header_bytes + weights_bytes);
        let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + header_bytes as usize]).unwrap();
        assert_eq!(header.len(), tensors(1).len());
        let ends = header.values().map(|entry| entry["data_offsets"][1].as_u64().unwrap());
        assert_eq!(ends.max().unwrap(), weights_bytes);
    }

    #[test]
    fn two_gigabytes_take_as_many_layers_as_needed_and_no_more() {
        let size = |layers| tensors(layers).iter().map(tensor_bytes).sum::<u64>();
        let layers = layers_for(2_000_000_000);
        assert!(size(layers) >= 2_000_000_000 && size(layers - 1) < 2_000_000_000, "{layers} layers");
    }

    #[test]
    fn weights_are_spread_around_zero() {
        let mut random = Random(1);
        let weights: Vec<f32> = (0..10_000).map(|_| random.weight()).collect();
        assert!(weights.iter().all(|w| w.abs() <= WEIGHT_RANGE));
        let mean = weights.iter().sum::<f32>() / weights.len() as f32;
        assert!(mean.abs() < WEIGHT_RANGE / 20.0, "{mean}");
    }
}

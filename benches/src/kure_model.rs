//! A model folder shaped as nlpai-lab/KURE-v1 (XLM-RoBERTa large: 24 layers, 250 002 pieces, 8192 tokens, CLS pooling) with
//! random weights and a made-up Unigram tokenizer, the same each time. For what depends on size and shape alone.

use crate::big_model::{Tensor, write_weights};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::Path;

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 4096;
const HEADS: usize = 16;
const LAYERS: usize = 24;
const VOCABULARY: usize = 250_002;
/// Two more than tokens: positions are counted from the padding id.
const POSITIONS: usize = 8194;
const WORDS: &str = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they \
    which one you were her all she there would their we him been has when who will more no if out so said what up its about into \
    than them can only other new some could time these two may then do first any my now such like our over man me even most made \
    after also did many before must through back years where much your way well down should because each just those people how \
    quick brown fox jump over lazy dog The text answer question search document model restart broker worker short query s ed ing \
    er ly tion 敏捷 的 棕色 狐狸 13";
const SEED: u64 = 0x2545_f491_4f6c_dd1d;

fn tensors() -> Vec<Tensor> {
    let mut all: Vec<Tensor> = vec![
        ("embeddings.word_embeddings.weight".into(), vec![VOCABULARY, HIDDEN], false),
        ("embeddings.position_embeddings.weight".into(), vec![POSITIONS, HIDDEN], false),
        ("embeddings.token_type_embeddings.weight".into(), vec![1, HIDDEN], false),
    ];
    let norm = |all: &mut Vec<Tensor>, name: String| {
        all.push((format!("{name}.LayerNorm.weight"), vec![HIDDEN], true));
        all.push((format!("{name}.LayerNorm.bias"), vec![HIDDEN], false));
    };
    norm(&mut all, "embeddings".into());
    for layer in 0..LAYERS {
        let name = |part: &str| format!("encoder.layer.{layer}.{part}");
        let linear = |all: &mut Vec<Tensor>, part: &str, out: usize, input: usize| {
            all.push((name(&format!("{part}.weight")), vec![out, input], false));
            all.push((name(&format!("{part}.bias")), vec![out], false));
        };
        for part in
            ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
        {
            linear(&mut all, part, HIDDEN, HIDDEN);
        }
        norm(&mut all, name("attention.output"));
        linear(&mut all, "intermediate.dense", INTERMEDIATE, HIDDEN);
        linear(&mut all, "output.dense", HIDDEN, INTERMEDIATE);
        norm(&mut all, name("output"));
    }
    all
}

/// Writes the folder; gives the bytes of weights.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn write(folder: &Path) -> anyhow::Result<u64> {
    let put = |name: &str, value: &Value| -> anyhow::Result<()> {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&path, serde_json::to_vec(value)?).with_context(|| format!("writing {name}"))
    };
    put(
        "config.json",
        &json!({
            "architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "hidden_act": "gelu",
            "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS,
            "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5,
            "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02,
            "position_embedding_type": "absolute",
        }),
    )?;
    put("tokenizer.json", &tokenizer()?)?;
    put(
        "tokenizer_config.json",
        &json!({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "bos_token": "<s>",
            "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
            "mask_token": "<mask>"}),
    )?;
    let module = |idx: u32, path: &str, kind: &str| {
        json!({"idx": idx, "name": idx.to_string(), "path": path,
            "type": format!("sentence_transformers.models.{kind}")})
    };
    put(
        "modules.json",
        &json!([
            module(0, "", "Transformer"),
            module(1, "1_Pooling", "Pooling"),
            module(2, "2_Normalize", "Normalize")
        ]),
    )?;
    put(
        "1_Pooling/config.json",
        &json!({"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false,
            "pooling_mode_max_tokens": false, "pooling_mode_mean_sqrt_len_tokens": false}),
    )?;
    std::fs::create_dir_all(folder.join("2_Normalize"))?;
    put("sentence_bert_config.json", &json!({"max_seq_length": 8192, "do_lower_case": false}))?;
    write_weights(&folder.join("model.safetensors"), &tensors())
}

/// A tokenizer.json with as many parts as XLM-RoBERTa's: a character map, Metaspace, and a quarter of a million pieces of
/// Latin, Cyrillic, Korean and Chinese characters.
fn tokenizer() -> anyhow::Result<Value> {
    let added = |id: usize, content: &str, lstrip: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
            "normalized": false, "special": true})
    };
    let token = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let ids = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    let metaspace =
        || json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    Ok(json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added(0, "<s>", false), added(1, "<pad>", false), added(2, "</s>", false),
            added(3, "<unk>", false), added(VOCABULARY - 1, "<mask>", true)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": charsmap()?},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": metaspace(),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, token("</s>")],
            "pair": [token("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, token("</s>"), token("</s>"),
                     {"Sequence": {"id": "B", "type_id": 0}}, token("</s>")],
            "special_tokens": {"<s>": ids("<s>", 0), "</s>": ids("</s>", 2)},
        },
        "decoder": metaspace(),
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces(), "byte_fallback": false},
    }))
}

fn pieces() -> Vec<(String, f64)> {
    let mut all: Vec<(String, f64)> =
        ["<s>", "<pad>", "</s>", "<unk>"].iter().map(|piece| ((*piece).to_owned(), 0.0)).collect();
    let mut known: HashSet<String> = all.iter().map(|(piece, _)| piece.clone()).collect();
    known.insert("<mask>".to_owned());
    let mut add = |piece: String, all: &mut Vec<(String, f64)>| {
        if all.len() < VOCABULARY - 1 && known.insert(piece.clone()) {
            // Falls with the rank, as the logarithm of a word's frequency does.
            let score = -3.0 - (all.len() as f64).ln();
            all.push((piece, score));
        }
    };
    add("▁".to_owned(), &mut all);
    // What prose is made of, so that texts have as many tokens as with the real vocabulary.
    for word in WORDS.split_whitespace() {
        add(format!("▁{word}"), &mut all);
        add(word.to_owned(), &mut all);
    }
    let single = ('!'..='~').chain('а'..='я').chain('가'..='힣').chain('一'..='丿');
    single.for_each(|character| add(character.to_string(), &mut all));
    let onsets = [
        "b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "ch", "sh", "б", "к",
        "н", "т", "п",
    ];
    let rests =
        ["a", "e", "i", "o", "u", "an", "en", "er", "in", "on", "al", "is", "а", "о", "и", "ен", "ат"];
    let mut state = SEED;
    let mut below = |bound: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound
    };
    while all.len() < VOCABULARY - 1 {
        let mut piece = String::new();
        if below(3) > 0 {
            piece.push('▁');
        }
        match below(4) {
            0 => (0..2 + below(2)).for_each(|_| piece.extend(char::from_u32(0xAC00 + below(11_172) as u32))),
            1 => (0..2 + below(2)).for_each(|_| piece.extend(char::from_u32(0x4E00 + below(4_000) as u32))),
            _ => (0..1 + below(4)).for_each(|_| {
                piece.push_str(onsets[below(onsets.len())]);
                piece.push_str(rests[below(rests.len())]);
            }),
        }
        add(piece, &mut all);
    }
    all.push(("<mask>".to_owned(), 0.0));
    all
}

/// A character map in SentencePiece's format: blanks become spaces, full-width characters plain ones.
fn charsmap() -> anyhow::Result<String> {
    let blanks = ['\t', '\n', '\r', '\u{a0}', '\u{2003}', '\u{3000}'].map(|blank| (blank, ' '));
    let wide = (0xff01..=0xff5e_u32)
        .filter_map(|code| Some((char::from_u32(code)?, char::from_u32(code - 0xfee0)?)));
    let (mut keys, mut replacements) = (Vec::new(), Vec::new());
    for (from, to) in blanks.into_iter().chain(wide) {
        keys.push((from.to_string(), replacements.len() as u32));
        replacements.extend(to.to_string().into_bytes());
        replacements.push(0);
    }
    let keys = keys.iter().map(|(key, place)| (key.as_bytes(), *place)).collect();
    let trie = engine::unigram::build_trie(keys).context("the character map does not fit")?;
    let bytes = [&(trie.len() as u32).to_le_bytes()[..], &trie, &replacements].concat();
    Ok(base64(&bytes))
}

/// Base64 with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits =
            group.iter().chain([&0; 2]).take(3).fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
        for digit in 0..4 {
            let known = digit <= group.len();
            text.push(if known { char::from(DIGITS[bits >> (18 - 6 * digit) & 63]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_the_usual_one() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    #[test]
    fn the_tokenizer_is_of_the_real_ones_size_and_covered_by_tables() {
        let pieces = pieces();
        assert_eq!(
            (pieces.len(), pieces[0].0.as_str(), pieces[VOCABULARY - 1].0.as_str()),
            (VOCABULARY, "<s>", "<mask>")
        );
        let json = serde_json::to_vec(&tokenizer().unwrap()).unwrap();
        let tables = engine::unigram::compile(&json).expect("covered");
        assert!(tables.len() > 4 * VOCABULARY);
    }
}

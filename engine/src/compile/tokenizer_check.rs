//! Checks of a foreign tokenizer.json before the tokenizers crate sees it, and the cleaned form that goes into the image.
//!
//! The crate trusts its files: a BPE merge longer than any vocabulary key panics, a fixed padding of four billion aborts by
//! allocation, a nested regular expression never ends. So everything is bounded here first. Padding, truncation and decoder
//! are dropped: the engine pads nothing, cuts by the model's own length, and never decodes.

use crate::json::{UniqueMap, shorten};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::fmt;

/// Largest tokenizer.json, bytes. XLM-RoBERTa's has 17 MB.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 32 << 20;
/// Most vocabulary entries or merges.
const MAX_ENTRIES: usize = 600_000;
/// Most added tokens.
const MAX_ADDED_TOKENS: usize = 4096;
/// Longest token, bytes.
const MAX_TOKEN_BYTES: usize = 1024;
/// Longest word that WordPiece may match, characters.
const MAX_WORD_CHARS: u64 = 512;
/// Largest normalizer, pre-tokenizer or post-processor, bytes; a SentencePiece character map has about 300 KB.
const MAX_PART_BYTES: usize = 4 << 20;
/// Most JSON values in one of those parts.
const MAX_PART_NODES: usize = 2048;
/// Longest string in one of those parts, except a character map.
const MAX_PART_STRING_BYTES: usize = 64;
/// Largest number in one of those parts: ids and lengths.
const MAX_PART_NUMBER: f64 = 2_000_000.0;
/// Most that replacements of a normalizer may lengthen a text, as a factor.
const MAX_REPLACE_FACTOR: usize = 64;
/// Regular expressions that end on every text, in time linear in it; any other is refused. The long ones are byte-level BPE's: of
/// GPT-2, of Qwen2 and Qwen3, of Llama 3, each exactly as the published files have it. What they try again on a run of blanks
/// without a line's end is taken as a whole by their next branch, so no text makes them quadratic.
const KNOWN_REGEXES: [&str; 5] = [
    " {2,}",
    "\\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Kinds of parts that are known to end in time and memory linear in the text.
const KNOWN_PARTS: [&str; 28] = [
    "BertNormalizer",
    "BertPreTokenizer",
    "BertProcessing",
    "ByteFallback",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "Fuse",
    "Lowercase",
    "Metaspace",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Prepend",
    "Punctuation",
    "Replace",
    "RobertaProcessing",
    "Sequence",
    "Split",
    "Strip",
    "StripAccents",
    "TemplateProcessing",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];

#[derive(Deserialize)]
struct AddedToken {
    id: u64,
    content: String,
}

/// Checks `bytes` against a model of `vocab_size` ids and gives the cleaned tokenizer.json.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn clean(bytes: &[u8], vocab_size: usize) -> Result<Vec<u8>, String> {
    clean_parts(bytes, vocab_size, false)
}

/// As [`clean`], with the decoder, which generators turn ids into text with: checked like the other parts.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn clean_with_decoder(bytes: &[u8], vocab_size: usize) -> Result<Vec<u8>, String> {
    clean_parts(bytes, vocab_size, true)
}

fn clean_parts(bytes: &[u8], vocab_size: usize, keeps_decoder: bool) -> Result<Vec<u8>, String> {
    let parts: UniqueMap<&RawValue, 32> = serde_json::from_slice(bytes).map_err(text)?;
    let mut parts = parts.0;
    for (key, raw) in &parts {
        match key.as_str() {
            "decoder" if keeps_decoder => {
                check_part(raw, vocab_size).map_err(|reason| format!("{key}: {reason}"))?;
            }
            "version" | "truncation" | "padding" | "decoder" => {}
            "added_tokens" => check_added_tokens(raw)?,
            "normalizer" | "pre_tokenizer" | "post_processor" => {
                check_part(raw, vocab_size).map_err(|reason| format!("{key}: {reason}"))?;
            }
            "model" => check_model(raw, vocab_size).map_err(|reason| format!("model: {reason}"))?,
            other => return Err(format!("unknown key {:?}", shorten(other))),
        }
    }
    if !parts.contains_key("model") {
        return Err("has no model".into());
    }
    let null: &RawValue = serde_json::from_str("null").map_err(text)?;
    for dropped in ["truncation", "padding", "decoder"] {
        if dropped == "decoder" && keeps_decoder {
            continue;
        }
        parts.insert(dropped.to_owned(), null);
    }
    // The crate wants the version first.
    let version = parts.remove("version").map_or("\"1.0\"", RawValue::get);
    let mut out = format!("{{\"version\":{version}");
    for (key, raw) in parts {
        out.push_str(&format!(",\"{key}\":"));
        out.push_str(raw.get());
    }
    out.push('}');
    Ok(out.into_bytes())
}

fn text(error: serde_json::Error) -> String {
    shorten(&error.to_string())
}

fn check_added_tokens(raw: &RawValue) -> Result<(), String> {
    let tokens: Vec<AddedToken> = serde_json::from_str(raw.get()).map_err(text)?;
    if tokens.len() > MAX_ADDED_TOKENS {
        return Err(format!("{} added tokens, at most {MAX_ADDED_TOKENS} are read", tokens.len()));
    }
    for token in tokens {
        if token.content.is_empty() || token.content.len() > MAX_TOKEN_BYTES {
            return Err(format!("added token {} is empty or too long", token.id));
        }
        if token.id as f64 > MAX_PART_NUMBER {
            return Err(format!("added token {:?} has the absurd id {}", shorten(&token.content), token.id));
        }
    }
    Ok(())
}

/// Checks a normalizer, pre-tokenizer or post-processor: known kinds, bounded strings, numbers and replacements.
fn check_part(raw: &RawValue, vocab_size: usize) -> Result<(), String> {
    if raw.get().len() > MAX_PART_BYTES {
        return Err(format!("has {} bytes, at most {MAX_PART_BYTES} are read", raw.get().len()));
    }
    let value: Value = serde_json::from_str(raw.get()).map_err(text)?;
    let mut nodes = 0;
    let mut factor = 1;
    walk(&value, "", vocab_size, &mut nodes, &mut factor)
}

fn walk(
    value: &Value,
    key: &str,
    vocab_size: usize,
    nodes: &mut usize,
    factor: &mut usize,
) -> Result<(), String> {
    *nodes += 1;
    if *nodes > MAX_PART_NODES {
        return Err("has too many parts".into());
    }
    match value {
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(number) => match number.as_f64() {
            Some(number) if (0.0..=MAX_PART_NUMBER).contains(&number) => Ok(()),
            _ => Err(format!("number {number} is out of range")),
        },
        Value::String(_) if key == "precompiled_charsmap" => Ok(()),
        Value::String(string) if key == "Regex" && KNOWN_REGEXES.contains(&string.as_str()) => Ok(()),
        Value::String(string) if string.len() > MAX_PART_STRING_BYTES => Err(format!("{key:?} is too long")),
        Value::String(string) if key == "type" && !KNOWN_PARTS.contains(&string.as_str()) => {
            Err(format!("kind {:?} is not supported", shorten(string)))
        }
        Value::String(string) if key == "Regex" => Err(format!(
            "regular expression {:?} is not one that is known to end in bounded time; it is not run",
            shorten(string)
        )),
        Value::String(_) => Ok(()),
        Value::Array(items) if key == "ids" => {
            for item in items {
                if item.as_u64().is_none_or(|id| id >= vocab_size as u64) {
                    return Err(format!(
                        "id {} is not below the vocabulary's size {vocab_size}",
                        shorten(&item.to_string())
                    ));
                }
            }
            bounded(items.len(), nodes)
        }
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, key, vocab_size, nodes, factor)),
        Value::Object(map) => {
            let kind = map.get("type").and_then(Value::as_str);
            let added = match kind {
                Some("Replace") => map.get("content").and_then(Value::as_str).map_or(1, str::len),
                _ => 1,
            };
            *factor = factor.saturating_mul(added.max(1));
            if *factor > MAX_REPLACE_FACTOR {
                return Err("its replacements could lengthen a text without bound".into());
            }
            map.iter().try_for_each(|(key, item)| walk(item, key, vocab_size, nodes, factor))
        }
    }
}

fn bounded(added: usize, nodes: &mut usize) -> Result<(), String> {
    *nodes += added;
    if *nodes > MAX_PART_NODES { Err("has too many parts".into()) } else { Ok(()) }
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct WordPiece {
    vocab: Vocabulary,
    unk_token: String,
    #[serde(default)]
    max_input_chars_per_word: u64,
}

#[derive(Deserialize)]
struct WordLevel {
    vocab: Vocabulary,
    unk_token: String,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: Vocabulary,
    merges: Merges,
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
}

#[derive(Deserialize)]
struct Unigram {
    vocab: Pieces,
    unk_id: Option<u64>,
}

fn check_model(raw: &RawValue, vocab_size: usize) -> Result<(), String> {
    let kind: Kind = serde_json::from_str(raw.get()).map_err(text)?;
    let unknown_token = |vocab: &Vocabulary, token: &str| {
        if vocab.0.contains_key(token) {
            Ok(())
        } else {
            Err(format!("unk_token {:?} is not in the vocabulary", shorten(token)))
        }
    };
    match kind.kind.as_deref() {
        Some("WordPiece") => {
            let model: WordPiece = serde_json::from_str(raw.get()).map_err(text)?;
            model.vocab.check(vocab_size)?;
            // Greedy matching is quadratic in this length.
            if model.max_input_chars_per_word > MAX_WORD_CHARS {
                return Err(format!(
                    "max_input_chars_per_word is {}, at most {MAX_WORD_CHARS}",
                    model.max_input_chars_per_word
                ));
            }
            unknown_token(&model.vocab, &model.unk_token)
        }
        Some("WordLevel") => {
            let model: WordLevel = serde_json::from_str(raw.get()).map_err(text)?;
            model.vocab.check(vocab_size)?;
            unknown_token(&model.vocab, &model.unk_token)
        }
        Some("BPE") => {
            let model: Bpe = serde_json::from_str(raw.get()).map_err(text)?;
            model.vocab.check(vocab_size)?;
            if model.dropout.is_some_and(|dropout| dropout != 0.0) {
                return Err("dropout is set: one text would give different tokens each time".into());
            }
            let prefix = model.continuing_subword_prefix.as_deref().unwrap_or("");
            check_merges(&model.merges.0, &model.vocab, prefix)
        }
        Some("Unigram") => {
            let model: Unigram = serde_json::from_str(raw.get()).map_err(text)?;
            if model.vocab.0 == 0 || model.vocab.0 > vocab_size {
                return Err(format!(
                    "vocabulary has {} entries, config.json says {vocab_size}",
                    model.vocab.0
                ));
            }
            if model.unk_id.is_some_and(|id| id >= model.vocab.0 as u64) {
                return Err("unk_id is not in the vocabulary".into());
            }
            Ok(())
        }
        other => Err(format!(
            "kind {:?} is not supported; WordPiece, WordLevel, BPE and Unigram are",
            other.map(shorten)
        )),
    }
}

/// Both halves of each merge and the merged token must be in the vocabulary, and the second half must be long enough to
/// lose the prefix that merging takes off: the crate slices without looking.
fn check_merges(merges: &[(String, String)], vocab: &Vocabulary, prefix: &str) -> Result<(), String> {
    let mut merged = String::new();
    for (left, right) in merges {
        let rest = right.get(prefix.len()..);
        merged.clear();
        merged.push_str(left);
        merged.push_str(rest.unwrap_or_default());
        let known =
            vocab.0.contains_key(left) && vocab.0.contains_key(right) && vocab.0.contains_key(&merged);
        if rest.is_none() || !known {
            return Err(format!(
                "merge of {:?} and {:?} is not in the vocabulary",
                shorten(left),
                shorten(right)
            ));
        }
    }
    Ok(())
}

/// Token to id; bounded while it is read.
struct Vocabulary(HashMap<String, u32>);

impl Vocabulary {
    fn check(&self, vocab_size: usize) -> Result<(), String> {
        if self.0.is_empty() {
            return Err("vocabulary is empty".into());
        }
        let mut seen = vec![false; vocab_size];
        for (token, id) in &self.0 {
            match seen.get_mut(*id as usize) {
                None => {
                    return Err(format!(
                        "token {:?} has id {id}, config.json's vocab_size is {vocab_size}; the files do not belong together",
                        shorten(token)
                    ));
                }
                Some(true) => return Err(format!("two tokens have the id {id}")),
                Some(free) => *free = true,
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Vocabulary {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = UniqueMap::<u32, MAX_ENTRIES>::deserialize(deserializer)?.0;
        if let Some(token) = map.keys().find(|token| token.len() > MAX_TOKEN_BYTES) {
            return Err(D::Error::custom(format!("token {:?} is too long", shorten(token))));
        }
        Ok(Vocabulary(map.into_iter().collect()))
    }
}

/// A bounded list of merges, each `"a b"` or `["a", "b"]`.
struct Merges(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Merge {
            Line(String),
            Pair(String, String),
        }
        let merges = bounded_list::<Merge, _>(deserializer)?;
        let pairs = merges.into_iter().map(|merge| match merge {
            Merge::Pair(left, right) => Ok((left, right)),
            Merge::Line(line) => match line.split(' ').collect::<Vec<_>>()[..] {
                [left, right] => Ok((left.to_owned(), right.to_owned())),
                _ => Err(D::Error::custom(format!("merge {:?} is not two tokens", shorten(&line)))),
            },
        });
        Ok(Merges(pairs.collect::<Result<_, _>>()?))
    }
}

/// The number of a Unigram model's pieces, each checked.
struct Pieces(usize);

impl<'de> Deserialize<'de> for Pieces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pieces = bounded_list::<(String, f64), _>(deserializer)?;
        match pieces.iter().find(|(token, score)| token.len() > MAX_TOKEN_BYTES || !score.is_finite()) {
            Some((token, _)) => {
                Err(D::Error::custom(format!("piece {:?} is too long or has no score", shorten(token))))
            }
            None => Ok(Pieces(pieces.len())),
        }
    }
}

fn bounded_list<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    struct List<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
        type Value = Vec<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("a list")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Vec<T>, A::Error> {
            let mut list = Vec::new();
            while let Some(item) = access.next_element()? {
                if list.len() >= MAX_ENTRIES {
                    return Err(A::Error::custom(format!("more than {MAX_ENTRIES} entries")));
                }
                list.push(item);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_seq(List(std::marker::PhantomData))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn word_piece() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": {"strategy": {"Fixed": 4_000_000_000u64}},
            "added_tokens": [{"id": 0, "content": "[PAD]"}],
            "normalizer": {"type": "BertNormalizer", "lowercase": true}, "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": null, "decoder": {"type": "Anything"},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": 2}}
        })
    }

    fn check(value: &Value) -> Result<Value, String> {
        clean(value.to_string().as_bytes(), 3).map(|bytes| serde_json::from_slice(&bytes).expect("JSON"))
    }

    #[test]
    fn padding_truncation_and_decoder_are_dropped() {
        let cleaned = check(&word_piece()).expect("accepted");
        for key in ["padding", "truncation", "decoder"] {
            assert!(cleaned[key].is_null(), "{key} survived");
        }
        assert_eq!(cleaned["model"], word_piece()["model"]);
    }

    #[test]
    fn bombs_are_refused_by_name() {
        let cases: [(&str, Value, &str); 9] = [
            (
                "/pre_tokenizer",
                json!({"type": "Split", "pattern": {"Regex": "^(a+)+$"}, "behavior": "Isolated"}),
                "regular",
            ),
            ("/normalizer", json!({"type": "Surprise"}), "not supported"),
            (
                "/normalizer",
                json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b".repeat(65)}),
                "lengthen",
            ),
            (
                "/normalizer",
                json!({"type": "Sequence", "normalizers": [
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"},
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"}]}),
                "lengthen",
            ),
            (
                "/post_processor",
                json!({"type": "TemplateProcessing", "special_tokens": {"x": {"ids": [7]}}}),
                "not below",
            ),
            (
                "/post_processor",
                json!({"type": "TemplateProcessing", "single": vec![json!({}); 3000]}),
                "too many",
            ),
            ("/model/vocab/a", json!(3), "vocab_size"),
            ("/model/vocab/a", json!(1), "two tokens"),
            ("/model/unk_token", json!("nope"), "unk_token"),
        ];
        for (place, value, hint) in cases {
            let mut tokenizer = word_piece();
            *tokenizer.pointer_mut(place).expect("place") = value;
            let error = check(&tokenizer).expect_err(place);
            assert!(error.contains(hint), "{place}: {error}");
        }
    }

    #[test]
    fn merges_outside_the_vocabulary_are_refused() {
        let mut tokenizer = word_piece();
        tokenizer["model"] = json!({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]});
        check(&tokenizer).expect("good merge");
        tokenizer["model"]["merges"] = json!([["a", "b"]]);
        check(&tokenizer).expect("good merge as a pair");
        for merges in [
            json!(["a c"]),
            json!(["a abcdefghijk"]),
            json!(["ab ab"]),
            json!(["a"]),
            json!([["a", "b", "c"]]),
        ] {
            tokenizer["model"]["merges"] = merges.clone();
            assert!(check(&tokenizer).is_err(), "{merges} was accepted");
        }
        tokenizer["model"]["merges"] = json!(["a b"]);
        tokenizer["model"]["continuing_subword_prefix"] = json!("##");
        assert!(check(&tokenizer).is_err(), "a half shorter than the prefix was accepted");
    }

    #[test]
    fn a_repeated_vocabulary_key_is_refused() {
        let text = word_piece().to_string().replace("\"a\":2", "\"a\":2,\"a\":2");
        assert!(clean(text.as_bytes(), 3).expect_err("duplicate").contains("twice"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_changed_byte_never_panics(position in 0usize..600, byte in any::<u8>()) {
            let mut bytes = word_piece().to_string().into_bytes();
            let position = position % bytes.len();
            bytes[position] = byte;
            let _ = clean(&bytes, 3);
        }
    }
}

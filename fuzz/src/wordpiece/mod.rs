//! Texts that a stranger wrote, through the engine's WordPiece tables and through the tokenizers crate: ids and places must
//! be the same, whatever the settings, the vocabulary and the added tokens. The tables are taken in as source files, as
//! linking the engine would build candle under instrumentation.

#[allow(dead_code, unreachable_pub)]
#[path = "../../../engine/src/wordpiece/mod.rs"]
mod tables;

use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::HashMap;
use tables::WordPiece;
use tokenizers::{NormalizerWrapper, Tokenizer};

/// Bytes of an input that are settings; then come tokens, one a line, then [`SEPARATOR`] and the text.
const SETTINGS_BYTES: usize = 4;
/// No part of any UTF-8.
const SEPARATOR: u8 = 0xff;
/// Most tokens that an input may add to the vocabulary.
const MAX_TOKENS: usize = 64;
/// Tokens that every vocabulary has.
const TOKENS: &str = "[PAD] [UNK] [CLS] [SEP] [MASK] the un token ##ization ##s ##ing a b c é ж 中 i x ##a ##b ##c ##é ##ж ##中 ##i \
    ##x ##\u{307} \u{307} ! ? # ' - ##σ ##ς ss ##ss \u{1100} ##\u{1161} ##\u{11a8}";

/// Tokenizers of one file.
struct Pair {
    tables: WordPiece,
    library: Tokenizer,
    file: Value,
}

/// Tokenizers by what an input says of them, `None` where the tables do not cover it: building them takes longer than a
/// text.
type Known = HashMap<Vec<u8>, Option<Pair>>;

/// Most of them that are kept.
const MAX_KNOWN: usize = 256;

thread_local! {
    static KNOWN: RefCell<Known> = RefCell::default();
}

/// Settings from bits of the first bytes; the rest as [`SETTINGS_BYTES`] says.
pub fn run(data: &[u8]) {
    let Some((settings, rest)) = data.split_first_chunk::<SETTINGS_BYTES>() else { return };
    let (tokens, text) = match rest.iter().position(|byte| *byte == SEPARATOR) {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => (&[][..], rest),
    };
    KNOWN.with_borrow_mut(|known| {
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        let key = [&settings[..], tokens].concat();
        let pair = known.entry(key).or_insert_with(|| pair(*settings, &String::from_utf8_lossy(tokens)));
        if let Some(pair) = pair {
            compare(pair, &String::from_utf8_lossy(text));
        }
    });
}

/// What the tables do not cover is the library's; what the library refuses, the tables must not cover.
fn pair(settings: [u8; SETTINGS_BYTES], tokens: &str) -> Option<Pair> {
    let (file, lower_case) = file(settings, tokens);
    let bytes = file.to_string().into_bytes();
    let tables = WordPiece::from_json(&bytes, lower_case)?;
    let mut library = Tokenizer::from_bytes(&bytes).expect("covered, so the library reads it");
    let normalizer = &file["normalizer"];
    if lower_case && normalizer["lowercase"] == false {
        let both = json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, normalizer]});
        let both: NormalizerWrapper = serde_json::from_value(both).expect("a normalizer");
        library.with_normalizer(Some(both)).expect("covered, so the library takes it");
    }
    Some(Pair { tables, library, file })
}

fn compare(Pair { tables, library, file }: &Pair, text: &str) {
    let expected = library.encode(text, false).expect("the library tokenizes every text");
    let mut ids = Vec::new();
    tables.encode_into(text, &mut ids);
    assert_eq!(ids, expected.get_ids(), "ids of {text:?} by {file}");
    let spans: Vec<_> = tables.spans(text).into_iter().map(|span| (span.start, span.end)).collect();
    assert_eq!(spans, expected.get_offsets(), "places in {text:?} by {file}");
}

/// A tokenizer.json, and whether texts are lower-cased before all else.
fn file([normalizer, model, flags, added]: [u8; SETTINGS_BYTES], tokens: &str) -> (Value, bool) {
    let bit = |of: u8, index: u32| of >> index & 1 == 1;
    let strip_accents = match normalizer >> 4 & 3 {
        0 => Value::Null,
        other => (other == 1).into(),
    };
    let mut vocab = serde_json::Map::new();
    let further: Vec<&str> = tokens.lines().take(MAX_TOKENS).collect();
    for token in TOKENS.split_whitespace().chain(further.iter().copied()) {
        let id = vocab.len();
        vocab.entry(token).or_insert_with(|| id.into());
    }
    // Some of the input's tokens are added ones too, and one that the vocabulary may lack.
    let mut names = vec!["[MASK]", "[CLS]", "<x>"];
    names.extend(further.iter().take(usize::from(added & 7)).filter(|name| !name.is_empty()));
    names.sort_unstable();
    names.dedup();
    let added_tokens: Vec<Value> = names
        .iter()
        .zip(0_u32..)
        .map(|(name, index)| {
            let bit = |of: u32| bit(flags.rotate_left(index + 3 * of), of);
            json!({"id": index, "content": name, "single_word": bit(0), "lstrip": bit(1), "rstrip": bit(2),
                "normalized": bit(3), "special": bit(4)})
        })
        .collect();
    let prefix = ["##", "", "a", "é"][usize::from(model & 3)];
    let max_chars = [100, 0, 1, 5][usize::from(model >> 2 & 3)];
    let file = json!({
        "version": "1.0",
        "added_tokens": added_tokens,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": bit(normalizer, 0),
            "handle_chinese_chars": bit(normalizer, 1),
            "lowercase": bit(normalizer, 2),
            "strip_accents": strip_accents,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": prefix,
            "max_input_chars_per_word": max_chars,
            "vocab": vocab,
        },
    });
    (file, bit(normalizer, 3))
}

/// Inputs to begin with, by name.
#[allow(dead_code)]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |settings: [u8; SETTINGS_BYTES], tokens: &str, text: &str| {
        [&settings[..], tokens.as_bytes(), &[SEPARATOR], text.as_bytes()].concat()
    };
    let usual = 0b111;
    vec![
        ("plain", seed([usual, 0, 0, 0], "", "The tokenization's un-tokens!")),
        ("cased", seed([0b11, 0, 0, 0], "The", "The tokens, THE Tokens")),
        (
            "accents",
            seed([usual, 0, 0, 0], "", "Éé e\u{301} İi \u{344}\u{f73}\u{323}\u{1d165}\u{302e}x ΣΊΣΥΦΟΣ ßẞ"),
        ),
        ("lower-first", seed([0b1011 | 2 << 4, 0, 0, 0], "", "İ\u{307} ΑΣ Ǆ ÉЖ")),
        ("unclean", seed([0b100, 0, 0, 0], "", "a\u{1}b\0c\u{fffd}\tb\u{85}c\u{2028}a\u{200d}b")),
        ("chinese", seed([usual, 0, 0, 0], "文", "中文a中\u{3105}豈丽각가ー")),
        (
            "added",
            seed(
                [usual, 0, 0b1010_0110, 7],
                "two words\n#\nday",
                "a [MASK]  <x>[CLS] Day two words #day_ [MASK]é",
            ),
        ),
        ("long-tokens", seed([usual, 0, 0, 0], &format!("{0}\n##{0}", "ab".repeat(12)), &"ab".repeat(31))),
        ("no-prefix", seed([usual, 1, 0, 0], "abc\nbc", "abcabc bcab #")),
        ("short-words", seed([usual, 3 << 2, 0, 0], "", "abcab ééééé éééééé aaaaaa")),
    ]
}

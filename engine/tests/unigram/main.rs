//! The tables of `engine::unigram` against the tokenizers crate: the same ids for every text, and "not covered" for every
//! file that they do not do exactly as the crate does.

mod charsmap;

use engine::unigram::{Unigram, compile};
use proptest::prelude::*;
use serde_json::{Value, json};
use shm_layout::image::ImageBytes;
use std::sync::{Arc, LazyLock};
use tokenizers::Tokenizer;

#[derive(Debug)]
struct Bytes(Vec<u8>);

impl ImageBytes for Bytes {
    fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn open(tables: Vec<u8>) -> Option<Unigram> {
    // Somewhere in an image, not at its beginning and not aligned.
    let range = 5..5 + tables.len();
    let image = [&b"xxxxx"[..], &tables, b"yyy"].concat();
    Unigram::open(Arc::new(Bytes(image)), range)
}

struct Pair {
    tables: Unigram,
    library: Tokenizer,
}

impl Pair {
    fn new(file: &Value) -> Pair {
        let bytes = serde_json::to_vec(file).expect("JSON");
        let tables = open(compile(&bytes).expect("the file is covered")).expect("the tables are whole");
        Pair { tables, library: Tokenizer::from_bytes(&bytes).expect("the library reads the file") }
    }

    fn check(&self, text: &str) -> Vec<u32> {
        let expected = self.library.encode_fast(text, false).expect("the library tokenizes");
        let mut ids = Vec::new();
        self.tables.encode_into(text, &mut ids);
        let places = self.library.encode(text, false).expect("the library tokenizes");
        let spans: Vec<_> = self.tables.spans(text).into_iter().map(|span| (span.start, span.end)).collect();
        assert_eq!(
            spans,
            places.get_offsets(),
            "places of {text:?}, the library's: {:?}",
            places.get_tokens()
        );
        assert_eq!(ids, expected.get_ids(), "ids of {text:?}, the library's: {:?}", expected.get_tokens());
        ids
    }
}

/// Pieces with scores: characters of several scripts, words and parts of words, some with equal scores.
fn pieces() -> Vec<(String, f64)> {
    let mut all: Vec<(String, f64)> = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        .map(|(p, s)| (p.to_owned(), s))
        .to_vec();
    let mut add = |piece: &str, score: f64| {
        if all.iter().all(|(known, _)| known != piece) {
            all.push((piece.to_owned(), score));
        }
    };
    add("▁", -3.5);
    let words = "the of and to in is that for it as was with be by on not he his but at are this have from or had an \
        token ization embed ding inter national ing er ed s es un re able";
    for (rank, word) in words.split_whitespace().enumerate() {
        add(&format!("▁{word}"), -4.0 - rank as f64 * 0.125);
        add(word, -5.0 - rank as f64 * 0.125);
    }
    let letters =
        "abcdefghijklmnoprstuvwyzABCDEéüßøżабвгдежαβγδ中文字符测试日本語한국어가나다라,.!?-'\"()123▁ﷺ";
    for (rank, letter) in letters.chars().enumerate() {
        add(&letter.to_string(), -8.0 - (rank % 7) as f64 * 0.25);
        add(&format!("▁{letter}"), -9.0 - (rank % 5) as f64 * 0.25);
    }
    for (piece, score) in
        [("中文", -6.0), ("日本語", -6.5), ("한국", -7.0), ("▁▁", -7.5), ("ab", -16.0), ("xx", -60.0)]
    {
        add(piece, score);
    }
    add("<mask>", 0.0);
    all
}

fn added(content: &str, lstrip: bool, normalized: bool) -> Value {
    json!({"id": 0, "content": content, "single_word": false, "lstrip": lstrip, "rstrip": false,
        "normalized": normalized, "special": true})
}

/// A tokenizer.json as XLM-RoBERTa's.
fn file() -> Value {
    let template = |id: &str| json!({"SpecialToken": {"id": id, "type_id": 0}});
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [added("<s>", false, false), added("<pad>", false, false), added("</s>", false, false),
            added("<unk>", false, false), added("<mask>", true, false)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": charsmap::base64()},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": {"type": "TemplateProcessing",
            "single": [template("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, template("</s>")],
            "pair": [template("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": pieces(), "byte_fallback": false},
    })
}

/// Files that are covered, each different in one thing.
fn covered() -> Vec<Value> {
    let mut all = vec![file()];
    let mut vary = |place: &str, value: Value| {
        let mut file = file();
        *file.pointer_mut(place).expect("place") = value;
        all.push(file);
    };
    let map = || json!({"type": "Precompiled", "precompiled_charsmap": charsmap::base64()});
    vary("/normalizer", Value::Null);
    vary("/normalizer", map());
    // T5's.
    vary(
        "/normalizer",
        json!({"type": "Sequence", "normalizers": [map(), {"type": "Strip", "strip_left": false, "strip_right": true},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]}),
    );
    vary("/normalizer", json!({"type": "Strip", "strip_left": true, "strip_right": false}));
    let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
    vary("/pre_tokenizer", metaspace("never", true));
    vary("/pre_tokenizer", metaspace("always", false));
    vary("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}));
    // multilingual-e5's.
    vary(
        "/pre_tokenizer",
        json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always", true)]}),
    );
    vary("/added_tokens/4", added("<mask>", true, true));
    vary("/added_tokens/4", added("<new>", false, true));
    all
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| covered().iter().map(Pair::new).collect());

const SNIPPETS: &[&str] = &[
    "the",
    "The",
    "tokenization",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\u{3000}",
    "▁",
    "▁▁",
    "<s>",
    "<mask>",
    " <mask> ",
    "<unk>",
    "<new>",
    "é",
    "e\u{301}",
    "\u{301}",
    "中文字符",
    "日本語",
    "한국어",
    "\u{1112}\u{1161}\u{11ab}",
    "ﷺ",
    "ﬁ",
    "①",
    "Ａ",
    "xx",
    "q",
    "👨\u{200d}👩\u{200d}👧",
    "🇩🇪🇫🇷",
    "\u{600}1",
    "\u{200b}",
    "\0",
    "\u{7f}",
    "\u{fffd}",
    "żółć",
    "abab",
    "ab",
    "ʼn",
    "…",
    "½",
    "Ǆ",
    "\u{feff}",
    "\u{85}",
    "़",
    "क्षि",
    "ไทย",
    "<",
    "s>",
    "-",
    ".",
    "!?",
    "123",
    "9",
    "ſ",
    "İ",
    "K",
    "ß",
];

#[test]
fn snippets_alone_and_in_pairs_give_the_librarys_ids() {
    for pair in PAIRS.iter() {
        pair.check("");
        for first in SNIPPETS {
            pair.check(first);
            for second in SNIPPETS {
                pair.check(&format!("{first}{second}"));
                pair.check(&format!("the {first}a{second} of"));
            }
        }
    }
}

#[test]
fn every_character_gives_the_librarys_ids() {
    let pair = &PAIRS[0];
    for start in (1..0x30000_u32).step_by(64) {
        let text: String = (start..start + 64).filter_map(char::from_u32).flat_map(|c| [c, 'a']).collect();
        pair.check(&text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_gives_the_librarys_ids(
        parts in prop::collection::vec(prop_oneof![
            prop::sample::select(SNIPPETS).prop_map(str::to_owned),
            "\\PC{0,5}",
            any::<char>().prop_map(String::from),
            "[a-e ▁]{0,12}",
        ], 0..24),
    ) {
        let text = parts.concat();
        for pair in PAIRS.iter() {
            pair.check(&text);
        }
    }
}

#[test]
fn a_long_text_without_blanks_is_cut_as_the_library_cuts_it() {
    let pair = &PAIRS[0];
    let ids = pair.check(&"中文字符q測日本語ab".repeat(2000));
    assert!(ids.len() > 2000);
}

#[test]
fn special_tokens_around_a_text_are_the_files() {
    let tables = &PAIRS[0].tables;
    assert_eq!((tables.before(), tables.after()), (&(vec![0], vec![0]), &(vec![2], vec![0])));
    assert_eq!(tables.text_type_id(), 0);
}

#[test]
fn what_is_not_done_exactly_is_not_covered() {
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    let cases = [
        ("/model/type", json!("BPE")),
        ("/model/byte_fallback", json!(true)),
        ("/model/unk_id", Value::Null),
        ("/model/unk_id", json!(100_000)),
        ("/model/vocab/7", json!(["the", -1.0, 3])),
        ("/model/vocab/7", json!(["", -1.0])),
        ("/model/vocab/7", json!(["a\u{0}", -1.0])),
        ("/model/vocab/7", json!(["▁", -1.0])),
        ("/normalizer", json!({"type": "NFKC"})),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("/normalizer", json!({"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "})),
        ("/normalizer", json!({"type": "Replace", "pattern": {"String": "a"}, "content": "b"})),
        ("/pre_tokenizer", metaspace),
        ("/pre_tokenizer", json!({"type": "Whitespace"})),
        ("/pre_tokenizer", Value::Null),
        ("/added_tokens/4", added(" mask", false, false)),
        ("/version", json!("2.0")),
    ];
    for (place, value) in cases {
        let mut file = file();
        *file.pointer_mut(place).expect("place") = value.clone();
        assert!(compile(&serde_json::to_vec(&file).expect("JSON")).is_none(), "{place} = {value} is covered");
    }
}

#[test]
fn damaged_tables_are_refused_or_end() {
    let whole = compile(&serde_json::to_vec(&file()).expect("JSON")).expect("covered");
    for cut in [0, 7, 8, 40, 47, 48, 100, whole.len() - 1] {
        assert!(open(whole[..cut].to_vec()).is_none(), "{cut} bytes were accepted");
    }
    let text = "the 中文字符 tokenization ﷺ e\u{301} ①<mask>x";
    for at in (0..whole.len()).step_by(whole.len() / 1500) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x5a;
        if let Some(tables) = open(bytes) {
            tables.encode_into(text, &mut Vec::new());
        }
    }
}

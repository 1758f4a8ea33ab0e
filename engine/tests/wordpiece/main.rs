//! The tables of `engine::wordpiece` against the tokenizers crate: the same ids and the same places for every text, and
//! "not covered" for every file that they do not do exactly as the crate does.

mod generate;

use engine::wordpiece::WordPiece;
use generate::{Random, added, all_settings, bert_normalizer, characters, file, mixture, words};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tokenizers::{NormalizerWrapper, Tokenizer};

/// Both tokenizers of one file.
struct Pair {
    tables: WordPiece,
    library: Tokenizer,
}

impl Pair {
    fn new(file: &Value, lower_case: bool) -> Pair {
        Pair::from_bytes(&serde_json::to_vec(file).expect("JSON"), lower_case)
    }

    fn from_bytes(bytes: &[u8], lower_case: bool) -> Pair {
        let tables = WordPiece::from_json(bytes, lower_case).expect("the file is covered");
        let mut library = Tokenizer::from_bytes(bytes).expect("the library reads the file");
        library.with_padding(None);
        library.with_truncation(None).expect("no truncation");
        let normalizer = serde_json::to_value(library.get_normalizer()).expect("JSON");
        set_normalizer(&mut library, normalizer, lower_case);
        Pair { tables, library }
    }

    /// Takes the normalizer of `file`, which is else the file of this pair.
    fn renormalize(&mut self, file: &Value, lower_case: bool) {
        let bytes = serde_json::to_vec(file).expect("JSON");
        self.tables = WordPiece::from_json(&bytes, lower_case).expect("the file is covered");
        set_normalizer(&mut self.library, file["normalizer"].clone(), lower_case);
    }

    /// Compares ids and places; returns the ids.
    fn check(&self, text: &str) -> Vec<u32> {
        let expected = self.library.encode(text, false).expect("the library tokenizes");
        let mut ids = Vec::new();
        self.tables.encode_into(text, &mut ids);
        assert_eq!(
            ids,
            expected.get_ids(),
            "ids of {text:?}, the library's tokens: {:?}",
            expected.get_tokens()
        );
        let spans: Vec<_> = self.tables.spans(text).into_iter().map(|span| (span.start, span.end)).collect();
        assert_eq!(spans, expected.get_offsets(), "places of {text:?}");
        ids
    }
}

/// Gives the library a normalizer, and lower-casing before it where wanted and not there.
fn set_normalizer(library: &mut Tokenizer, normalizer: Value, lower_case: bool) {
    let normalizer = if lower_case && !normalizer.to_string().contains("\"lowercase\":true") {
        json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, normalizer]})
    } else {
        normalizer
    };
    let normalizer: NormalizerWrapper = serde_json::from_value(normalizer).expect("a normalizer");
    library.with_normalizer(Some(normalizer)).expect("is set");
}

#[test]
fn every_character_alike() {
    /// Behind the last assigned character but for tags, selectors and private ones.
    const TAIL: u32 = 0x4_0000;
    let settings = [
        (bert_normalizer(true, true, None, true), false),
        (bert_normalizer(true, true, Some(false), false), true),
        (bert_normalizer(false, false, Some(true), false), false),
    ];
    let json = file(characters(0x3_2000));
    let check = |(normalizer, lower_case): (Value, bool)| {
        let mut json = json.clone();
        json["normalizer"] = normalizer;
        let pair = Pair::new(&json, lower_case);
        let all: Vec<char> = (0..TAIL).filter_map(char::from_u32).collect();
        for chunk in all.chunks(64) {
            // Within a word, alone, and at a word's end.
            pair.check(
                &chunk.iter().flat_map(|c| ['x', *c, 'Y', ' ', *c, ' ', 'z', *c, ' ']).collect::<String>(),
            );
        }
        // These are all treated as one of three kinds, whatever the settings; one setting will do.
        let end = if lower_case { 0x11_0000 } else { TAIL };
        let tail: Vec<char> = (TAIL..end).filter_map(char::from_u32).collect();
        for chunk in tail.chunks(64) {
            pair.check(&chunk.iter().flat_map(|c| [*c, 'x']).collect::<String>());
        }
    };
    std::thread::scope(|scope| {
        for setting in settings {
            scope.spawn(|| check(setting));
        }
    });
}

#[test]
fn mixtures_alike_with_all_settings() {
    let mut random = Random(7);
    for tokens in [characters(0x3000), words()] {
        let mut json = file(tokens);
        let mut pair = Pair::new(&json, false);
        for (normalizer, lower_case) in all_settings() {
            json["normalizer"] = normalizer;
            pair.renormalize(&json, lower_case);
            for _ in 0..600 {
                let parts = 1 + random.below(12);
                pair.check(&mixture(&mut random, parts));
            }
        }
    }
}

/// Marks that remain after others are dropped change places by their classes: what comes out depends on all of them.
#[test]
fn marks_that_remain_are_ordered_alike() {
    const MARKS: &str = "\u{1d165}\u{1d166}\u{1d16d}\u{1d16e}\u{302e}\u{302f}\u{16ff0}\u{16ff1}\u{1d172}\u{300}\u{323}\
        \u{34f}\u{344}\u{f73}\u{f75}\u{f81}\u{f71}\u{94d}\u{e48}\u{1}\u{200d}\u{1cf7}\u{1b44}\u{1134d}\u{11c3f}a é中";
    const PARTS: &str = "e\u{301}\u{308}\u{f72}\u{f74}\u{f80}";
    let marks: Vec<char> = MARKS.chars().collect();
    let mut random = Random(11);
    let mut json = file(MARKS.chars().chain(PARTS.chars()).flat_map(|c| [c.to_string(), format!("##{c}")]));
    let mut pair = Pair::new(&json, false);
    for (normalizer, lower_case) in all_settings() {
        json["normalizer"] = normalizer;
        pair.renormalize(&json, lower_case);
        for _ in 0..300 {
            let len = 1 + random.below(8);
            pair.check(&(0..len).map(|_| marks[random.below(marks.len())]).collect::<String>());
        }
    }
}

#[test]
fn words_are_cut_alike() {
    let mut random = Random(3);
    let letters = ["a", "b", "é", "ж", "中", "𝔞"];
    for prefix in ["##", "", "@@", "a"] {
        for max_chars in [0, 1, 7, 100] {
            let mut tokens: Vec<String> = Vec::new();
            for _ in 0..400 {
                let most = if random.below(20) == 0 { 60 } else { 5 };
                let len = 1 + random.below(most);
                let part: String = (0..len).map(|_| random.pick(&letters)).collect();
                tokens.push(if random.below(2) == 0 { part } else { format!("{prefix}{part}") });
            }
            let mut json = file(tokens.clone());
            json["normalizer"] = bert_normalizer(true, false, Some(false), false);
            json["model"]["continuing_subword_prefix"] = prefix.into();
            json["model"]["max_input_chars_per_word"] = max_chars.into();
            let pair = Pair::new(&json, false);
            for _ in 0..500 {
                let mut text = String::new();
                for _ in 0..1 + random.below(5) {
                    match random.below(3) {
                        0 => text.push_str(tokens[random.below(tokens.len())].trim_start_matches('#')),
                        1 => (0..random.below(30)).for_each(|_| text.push_str(random.pick(&letters))),
                        _ => text.push_str(random.pick(&[" ", "##", "@@", "#", "a"])),
                    }
                }
                pair.check(&text);
            }
        }
    }
}

#[test]
fn long_words_are_unknown_alike() {
    let pair = Pair::new(&file(words()), false);
    for letter in ["a", "é", "ж", "\u{301}", "😀", "\u{1}"] {
        for count in [1, 49, 50, 51, 99, 100, 101, 102, 400, 70_000] {
            pair.check(&letter.repeat(count));
            pair.check(&format!("the {}, {}ing", letter.repeat(count), letter.repeat(count)));
        }
    }
}

#[test]
fn added_tokens_are_found_alike() {
    let mut random = Random(5);
    let names = [
        "[MASK]",
        "<t>",
        "<t>>",
        "Day",
        "two words",
        "éa",
        "x",
        "中",
        "ab",
        "abc",
        "[CLS]",
        "_y_",
        "#",
        "İ",
        "t>\t<",
    ];
    let mut covered = 0;
    for round in 0..120 {
        let mut json = file(words().into_iter().chain(["<t>".to_owned()]));
        let count = 1 + random.below(if round % 2 == 0 { 3 } else { names.len() });
        let mut tokens: Vec<Value> = Vec::new();
        for _ in 0..count {
            let name = random.pick(&names);
            if tokens.iter().all(|token| token["content"] != name) {
                let flags = std::array::from_fn(|_| random.below(3) == 0);
                tokens.push(added(name, flags, random.below(2) == 0));
            }
        }
        let tokens = Value::from(tokens);
        json["added_tokens"] = tokens.clone();
        let (normalizer, lower_case) = all_settings()[random.below(48)].clone();
        json["normalizer"] = normalizer;
        let bytes = serde_json::to_vec(&json).expect("JSON");
        if Tokenizer::from_bytes(&bytes).is_err() {
            // A name is nothing, normalised.
            assert!(WordPiece::from_json(&bytes, lower_case).is_none());
            continue;
        }
        // A name that is blank at its ends once normalised is not covered.
        if WordPiece::from_json(&bytes, lower_case).is_none() {
            assert!(tokens.to_string().contains("中"));
            continue;
        }
        covered += 1;
        let pair = Pair::from_bytes(&bytes, lower_case);
        for _ in 0..60 {
            let mut text = String::new();
            for _ in 0..1 + random.below(8) {
                text.push_str(random.pick(&names));
                text.push_str(random.pick(&[
                    "", "", " ", "  ", "\u{3000}", "a", "_", "é", "\u{301}", "the", ",", "\t", "\n\n",
                ]));
            }
            pair.check(&text);
        }
    }
    assert!(covered > 60, "{covered}");
}

#[test]
fn special_tokens_around_a_text() {
    let pair = Pair::new(&file(words()), false);
    for text in ["", "a", "the [MASK] two", "\u{1}"] {
        let mut ids = pair.tables.before().0.clone();
        pair.tables.encode_into(text, &mut ids);
        ids.extend(&pair.tables.after().0);
        assert_eq!(ids, pair.library.encode(text, true).expect("encodes").get_ids());
    }
    let mut json = file(words());
    json["post_processor"] = json!({"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]});
    let tables = WordPiece::from_json(json.to_string().as_bytes(), false).expect("covered");
    assert_eq!((tables.before(), tables.after()), (&(vec![2], vec![0]), &(vec![3], vec![0])));
    assert_eq!(tables.text_type_id(), 0);
    json["post_processor"] = Value::Null;
    let tables = WordPiece::from_json(json.to_string().as_bytes(), false).expect("covered");
    assert!(tables.before().0.is_empty() && tables.after().0.is_empty());
}

#[test]
fn what_is_not_covered_is_refused() {
    let change = |pointer: &str, value: Value| {
        let mut json = file(words());
        *json.pointer_mut(pointer).expect("the pointer is right") = value;
        WordPiece::from_json(json.to_string().as_bytes(), false).is_some()
    };
    let same = bert_normalizer(true, true, None, true);
    assert!(change("/normalizer", same.clone()));
    assert!(change("/normalizer", json!({"type": "Sequence", "normalizers": [{"type": "Lowercase"}, same]})));
    assert!(change("/padding", json!({"strategy": {"Fixed": 128}})));
    for (pointer, value) in [
        ("/version", json!("2.0")),
        ("/normalizer", Value::Null),
        ("/normalizer", json!({"type": "NFC"})),
        ("/normalizer", json!({"type": "Lowercase"})),
        ("/normalizer", json!({"type": "Sequence", "normalizers": [same, {"type": "Lowercase"}]})),
        ("/normalizer", json!({"type": "Sequence", "normalizers": [same, same]})),
        ("/pre_tokenizer", Value::Null),
        ("/pre_tokenizer", json!({"type": "Whitespace"})),
        ("/post_processor", json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true})),
        ("/post_processor/single/1", json!({"Sequence": {"id": "B", "type_id": 0}})),
        ("/post_processor/single/0", json!({"Sequence": {"id": "A", "type_id": 0}})),
        ("/post_processor/single/0", json!({"SpecialToken": {"id": "[X]", "type_id": 0}})),
        ("/post_processor/single", json!([{"SpecialToken": {"id": "[CLS]", "type_id": 0}}])),
        ("/model/type", json!("WordLevel")),
        ("/model/unk_token", json!("[NONE]")),
        ("/model/vocab", json!([["a", 0.0]])),
        ("/model/vocab", json!({"[UNK]": -1})),
        ("/added_tokens/0/content", json!("")),
        ("/added_tokens/0/content", json!(" x")),
        ("/added_tokens/0/content", json!("[CLS]")),
        ("/added_tokens", Value::Null),
        // The same, normalised: which of them matches is left to chance in the crate.
        (
            "/added_tokens",
            json!([
                added("Day", [false, false, false, true], false),
                added("day", [false, false, false, true], false)
            ]),
        ),
    ] {
        assert!(!change(pointer, value.clone()), "{pointer} = {value} was taken");
    }
    let text = file(words()).to_string();
    let spoiled = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        WordPiece::from_json(text.replacen(from, to, 1).as_bytes(), false).is_some()
    };
    assert!(!spoiled("\"version\"", "\"another\":1,\"version\""));
    assert!(!spoiled("\"vocab\":{", "\"vocab\":{\"the\":9,"), "a token is there twice");
    assert!(!spoiled("\"lowercase\"", "\"further\":1,\"lowercase\""));
    assert!(WordPiece::from_json(b"", false).is_none());
    let long = "a".repeat(257);
    assert!(WordPiece::from_json(file([long]).to_string().as_bytes(), false).is_none());
}

/// The stored checkpoints' tokenizers, and prose.
#[test]
fn stored_tokenizers_alike() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for name in ["bert_mean", "bert_cls_sharded_f16", "bert_max_sqrt_bf16"] {
        let bytes =
            std::fs::read(root.join("tests/parity/tiny").join(name).join("tokenizer.json")).expect("stored");
        check_prose(&root, &Pair::from_bytes(&bytes, name == "bert_mean"));
    }
    let unigram = std::fs::read(root.join("tests/parity/tiny/xlm_roberta/tokenizer.json")).expect("stored");
    assert!(WordPiece::from_json(&unigram, false).is_none());
}

fn check_prose(root: &Path, pair: &Pair) {
    let mut files = 0;
    for entry in std::fs::read_dir(root.join("demo/corpus")).expect("the corpus is in the tree") {
        let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("text");
        pair.check(&text);
        text.lines().for_each(|line| drop(pair.check(line)));
        files += 1;
    }
    assert!(files > 10);
}

/// Tokenizers of the models that this machine happens to have.
#[test]
fn cached_tokenizers_alike() {
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/modelbroker"));
    let Some(cache) = std::env::var_os("MODELBROKER_CACHE_DIR").map(PathBuf::from).or_else(home) else {
        return;
    };
    let list = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect()
    };
    let mut random = Random(13);
    for snapshot in list(&cache.join("models")).iter().flat_map(|model| list(&model.join("snapshots"))) {
        let Ok(bytes) = std::fs::read(snapshot.join("tokenizer.json")) else { continue };
        if WordPiece::from_json(&bytes, false).is_none() {
            continue;
        }
        let pair = Pair::from_bytes(&bytes, false);
        check_prose(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &pair);
        for _ in 0..20_000 {
            let parts = 1 + random.below(20);
            pair.check(&mixture(&mut random, parts));
        }
    }
}

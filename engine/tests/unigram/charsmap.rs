//! A character map in SentencePiece's format: made from what Unicode's compatibility forms make of characters, for tests that
//! have no model's file.

use base64::Engine;
use std::collections::BTreeMap;
use std::sync::LazyLock;
use unicode_normalization_alignments::UnicodeNormalization;

/// What becomes what: NFKC of single characters and of letters with an accent behind them, blanks to spaces, controls to
/// nothing; and a grapheme whose beginning alone is in the map.
fn entries() -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for character in (1..0x3_0000_u32).filter_map(char::from_u32) {
        let whole = character.to_string();
        let form: String = whole.nfkc().map(|(c, _)| c).collect();
        if form != whole {
            all.insert(whole.clone(), form);
        }
        if character.is_whitespace() {
            all.insert(whole, " ".to_owned());
        } else if character.is_control() || character == '\u{200b}' {
            all.insert(whole, String::new());
        }
    }
    for letter in "aeiouyAEIOUcnsz".chars() {
        for accent in "\u{300}\u{301}\u{302}\u{303}\u{308}\u{30c}".chars() {
            let pair: String = [letter, accent].iter().collect();
            let form: String = pair.nfkc().map(|(c, _)| c).collect();
            all.insert(pair, form);
        }
    }
    // The library takes the shortest entry that a grapheme begins with.
    all.insert("q".to_owned(), "k".to_owned());
    all.insert("q\u{301}".to_owned(), "never".to_owned());
    all
}

static MAP: LazyLock<String> = LazyLock::new(|| {
    let mut replacements = Vec::new();
    let entries = entries();
    let keys: Vec<(&[u8], u32)> = entries
        .iter()
        .map(|(key, form)| {
            let place = replacements.len() as u32;
            replacements.extend(form.as_bytes());
            replacements.push(0);
            (key.as_bytes(), place)
        })
        .collect();
    let trie = engine::unigram::build_trie(keys).expect("a trie");
    let bytes = [&(trie.len() as u32).to_le_bytes()[..], &trie, &replacements].concat();
    base64::engine::general_purpose::STANDARD.encode(bytes)
});

/// The map as it stands in a tokenizer.json.
pub(crate) fn base64() -> String {
    MAP.clone()
}

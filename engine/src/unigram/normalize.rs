//! What SentencePiece models do to a text before it is cut: the character map, blanks. The map's format is the tokenizers
//! crate's (`spm_precompiled`), and so is what is done with it, step for step. Cutting into tokens must not be here.

use super::trie::Trie;
use serde::{Deserialize, Serialize};
use unicode_segmentation::UnicodeSegmentation;

/// Longest grapheme that is looked up as a whole, bytes; as in the crate.
const MAX_GRAPHEME_BYTES: usize = 5;
/// Longest replacement in a character map, bytes. The longest of NFKC has 33.
pub(super) const MAX_REPLACEMENT_BYTES: usize = 64;

/// One step of normalisation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Step {
    /// The character map.
    Map,
    /// Blanks at the ends are taken off.
    Strip {
        /// At the beginning.
        left: bool,
        /// At the end.
        right: bool,
    },
    /// Two spaces and more become this.
    Spaces(String),
}

/// A character map where it lies.
#[derive(Debug, Clone, Copy)]
pub(super) struct CharMap<'a> {
    /// From a grapheme or character to a place in `replacements`.
    pub(super) trie: Trie<'a>,
    /// Replacements, each ended by a zero byte.
    pub(super) replacements: &'a [u8],
}

impl<'a> CharMap<'a> {
    /// What a grapheme or character becomes, if the map has it or a beginning of it: the shortest counts.
    fn get(self, part: &str) -> Option<&'a str> {
        let mut start = None;
        self.trie.prefixes(part.as_bytes(), |_, value| {
            start = Some(value as usize);
            false
        });
        let rest = self.replacements.get(start?..)?;
        let end = memchr::memchr(0, rest).unwrap_or(rest.len()).min(MAX_REPLACEMENT_BYTES);
        std::str::from_utf8(rest.get(..end)?).ok()
    }
}

/// Calls `part` with each part of `text` that the map is asked for, in order, and with what it becomes, if it does.
pub(super) fn each_part<'t>(text: &'t str, map: CharMap<'t>, mut part: impl FnMut(&'t str, Option<&'t str>)) {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let end = sure_end(bytes, at);
        let Some(piece) = text.get(at..end) else { return };
        if piece.len() == 1 {
            part(piece, map.get(piece));
        } else {
            for grapheme in piece.graphemes(true) {
                match map.get(grapheme).filter(|_| grapheme.len() <= MAX_GRAPHEME_BYTES) {
                    Some(replacement) => part(grapheme, Some(replacement)),
                    None => {
                        for (start, character) in grapheme.char_indices() {
                            let one = grapheme.get(start..start + character.len_utf8()).unwrap_or_default();
                            part(one, map.get(one));
                        }
                    }
                }
            }
        }
        at = end;
    }
}

/// The first place after `at` where a grapheme surely ends: between two ASCII characters that are no line break together.
fn sure_end(bytes: &[u8], at: usize) -> usize {
    let pairs = bytes.get(at..).unwrap_or_default().windows(2);
    let found = pairs.enumerate().find(|(_, pair)| pair.is_ascii() && *pair != b"\r\n");
    found.map_or(bytes.len(), |(index, _)| at + index + 1)
}

/// `text` after all steps.
pub(super) fn normalize(text: &str, steps: &[Step], map: CharMap<'_>) -> String {
    let mut now = String::with_capacity(text.len());
    let mut first = true;
    for step in steps {
        let before = if std::mem::take(&mut first) { text } else { &std::mem::take(&mut now) };
        match step {
            Step::Map => {
                each_part(before, map, |part, replacement| now.push_str(replacement.unwrap_or(part)))
            }
            Step::Strip { left, right } => {
                let kept = if *left { before.trim_start() } else { before };
                now.push_str(if *right { kept.trim_end() } else { kept });
            }
            Step::Spaces(content) => spaces(before, content, &mut now),
        }
    }
    if first {
        now.push_str(text);
    }
    now
}

/// Appends `text` with runs of two spaces and more as `content`.
fn spaces(text: &str, content: &str, out: &mut String) {
    let mut rest = text;
    while let Some(at) = rest.find("  ") {
        let (before, behind) = rest.split_at(at);
        out.push_str(before);
        out.push_str(content);
        rest = behind.trim_start_matches(' ');
    }
    out.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_spaces_are_replaced_and_single_ones_kept() {
        let after = |text: &str| {
            let mut out = String::new();
            spaces(text, "_", &mut out);
            out
        };
        for (text, expected) in [("", ""), (" ", " "), ("  ", "_"), ("a b", "a b"), ("a   b  c ", "a_b_c ")] {
            assert_eq!(after(text), expected, "{text:?}");
        }
    }

    #[test]
    fn graphemes_end_for_sure_only_between_ascii_characters() {
        let ends = |text: &str| {
            let mut all = vec![sure_end(text.as_bytes(), 0)];
            while let Some(last) = all.last().copied().filter(|last| *last < text.len()) {
                all.push(sure_end(text.as_bytes(), last));
            }
            all
        };
        assert_eq!(ends("ab"), [1, 2]);
        assert_eq!(ends("a\r\nb"), [1, 3, 4]);
        // An accent belongs to the letter before it, a number sign to what follows it.
        assert_eq!(ends("xe\u{301}\u{600}1b"), [1, 7, 8]);
    }
}

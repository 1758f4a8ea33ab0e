//! Added tokens, such as `[MASK]`: finding them in a text by the tokenizers crate's rules. Whether the text is normalised is
//! the caller's matter.

use daachorse::{DoubleArrayAhoCorasick, DoubleArrayAhoCorasickBuilder, MatchKind};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// An added token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    pub(crate) id: u32,
    /// Matches only where no word character stands beside it.
    pub(crate) single_word: bool,
    /// Takes the blanks before it.
    pub(crate) left_strip: bool,
    /// Takes the blanks behind it.
    pub(crate) right_strip: bool,
    /// Is matched in the normalised text.
    pub(crate) normalized: bool,
}

/// A set of added tokens, of which the longest at the leftmost place is matched first.
pub(crate) struct AddedTokens {
    tokens: Vec<AddedToken>,
    /// Finds them, with their places in `tokens`; `None` where there are none. The crate has the same.
    finder: Option<DoubleArrayAhoCorasick<u32>>,
    /// Up to three bytes that all of them begin with; empty if there are more.
    first_bytes: Vec<u8>,
}

impl AddedTokens {
    /// `None` when a token is empty, begins or ends with a blank, or is there twice.
    pub(crate) fn new(tokens: Vec<AddedToken>) -> Option<AddedTokens> {
        if tokens.iter().any(|token| token.content.is_empty() || token.content.trim() != token.content) {
            return None;
        }
        let mut contents: Vec<&str> = tokens.iter().map(|token| token.content.as_str()).collect();
        contents.sort_unstable();
        // Of two tokens that are the same normalised, the crate takes one by chance.
        if contents.windows(2).any(|pair| pair[0] == pair[1]) {
            return None;
        }
        let mut first_bytes: Vec<u8> =
            tokens.iter().filter_map(|token| token.content.bytes().next()).collect();
        first_bytes.sort_unstable();
        first_bytes.dedup();
        if first_bytes.len() > 3 {
            first_bytes.clear();
        }
        let finder = if tokens.is_empty() {
            None
        } else {
            let patterns = tokens.iter().zip(0_u32..).map(|(token, index)| (token.content.as_str(), index));
            let builder = DoubleArrayAhoCorasickBuilder::new().match_kind(MatchKind::LeftmostLongest);
            Some(builder.build_with_values(patterns).ok()?)
        };
        Some(AddedTokens { tokens, finder, first_bytes })
    }

    /// Calls `part` with each added token and each piece between them, in order; the pieces are not empty.
    pub(crate) fn split(&self, text: &str, mut part: impl FnMut(Range<usize>, Option<u32>)) {
        let mut done = 0;
        if let Some(finder) = &self.finder
            && let Some(first) = self.first_candidate(text.as_bytes())
        {
            for found in finder.leftmost_find_iter(text.get(first..).unwrap_or_default()) {
                let (start, end) = (first + found.start(), first + found.end());
                let Some(token) = self.tokens.get(found.value() as usize) else { continue };
                let (before, behind) = (text.get(..start), text.get(end..));
                let (before, behind) = (before.unwrap_or_default(), behind.unwrap_or_default());
                if token.single_word && (before.ends_with(is_word) || behind.starts_with(is_word)) {
                    continue;
                }
                // The previous token may have taken the blanks between the two.
                let start = if token.left_strip { before.trim_end().len().max(done) } else { start };
                let end =
                    if token.right_strip { end + (behind.len() - behind.trim_start().len()) } else { end };
                if done < start {
                    part(done..start, None);
                }
                part(start..end, Some(token.id));
                done = end;
            }
        }
        if done < text.len() {
            part(done..text.len(), None);
        }
    }

    /// Where the first token may be: most texts have none, which is seen without the finder.
    fn first_candidate(&self, text: &[u8]) -> Option<usize> {
        match self.first_bytes[..] {
            [one] => memchr::memchr(one, text),
            [one, two] => memchr::memchr2(one, two, text),
            [one, two, three] => memchr::memchr3(one, two, three, text),
            _ => Some(0),
        }
    }
}

/// `\w` of the regular expressions that the crate uses.
fn is_word(c: char) -> bool {
    regex_syntax::is_word_character(c)
}

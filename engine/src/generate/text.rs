//! Texts to token ids and back, by the tokenizers crate, contained: its panics become errors. Streaming of what is complete.

use crate::json::shorten;
use crate::model::{MAX_TEXT_BYTES, ModelError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::Tokenizer;

/// What decoding puts where bytes are no whole character yet.
const INCOMPLETE: char = '\u{fffd}';
/// Tokens that may wait for the rest of a character or of a run of bytes; more are broken text, which is handed out as it is.
const MAX_WAITING_TOKENS: usize = 64;

/// A generator's tokenizer.
pub(crate) struct Words {
    tokenizer: Tokenizer,
    before: Vec<u32>,
    after: Vec<u32>,
    /// Tokens that are single bytes: what a run of them says is known at its end only. Sorted; empty for byte-level tokenizers.
    bytes: Vec<u32>,
    vocab_size: usize,
}

impl Words {
    /// Loads a checked tokenizer.json.
    pub(crate) fn new(json: &[u8], vocab_size: usize) -> Result<Words, ModelError> {
        let mut tokenizer = contained(|| Tokenizer::from_bytes(json))?;
        tokenizer.with_padding(None);
        contained(|| tokenizer.with_truncation(None).map(|_| ()))?;
        let (before, after) = surroundings(&tokenizer)?;
        let mut bytes: Vec<u32> =
            (0..=255).filter_map(|byte: u8| tokenizer.token_to_id(&format!("<0x{byte:02X}>"))).collect();
        bytes.sort_unstable();
        let words = Words { tokenizer, before, after, bytes, vocab_size };
        words.check(words.before.iter().chain(&words.after))?;
        Ok(words)
    }

    fn check<'a>(&self, mut ids: impl Iterator<Item = &'a u32>) -> Result<(), ModelError> {
        match ids.find(|id| **id as usize >= self.vocab_size) {
            Some(id) => Err(ModelError::TokenId { index: 0, id: *id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    /// Ids of a text without special tokens around it; names of special tokens in it count as those tokens.
    pub(crate) fn bare(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        if text.len() > MAX_TEXT_BYTES {
            let len_bytes = text.len();
            return Err(ModelError::TextTooLong { index: 0, len_bytes, max_bytes: MAX_TEXT_BYTES });
        }
        let ids = contained(|| self.tokenizer.encode_fast(text, false))?.get_ids().to_vec();
        self.check(ids.iter())?;
        Ok(ids)
    }

    /// Ids of a text with the special tokens around it, and the text cut so that there are `max_tokens` at most.
    pub(crate) fn surrounded(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>, ModelError> {
        let bare = self.bare(text)?;
        let room = max_tokens.saturating_sub(self.before.len() + self.after.len());
        let mut ids = self.before.clone();
        ids.extend(bare.iter().take(room));
        ids.extend(&self.after);
        Ok(ids)
    }

    /// The text of ids, without special tokens.
    pub(crate) fn text(&self, ids: &[u32]) -> Result<String, ModelError> {
        contained(|| self.tokenizer.decode(ids, true))
    }
}

/// Learns from a sample which special tokens surround a text.
fn surroundings(tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>), ModelError> {
    const SAMPLE: &str = "a";
    let bare = contained(|| tokenizer.encode_fast(SAMPLE, false))?;
    let full = contained(|| tokenizer.encode_fast(SAMPLE, true))?;
    let (bare, full) = (bare.get_ids(), full.get_ids());
    let first = full.windows(bare.len().max(1)).position(|window| window == bare);
    match first {
        Some(first) if !bare.is_empty() => Ok((full[..first].to_vec(), full[first + bare.len()..].to_vec())),
        _ => Err(ModelError::Tokenizer {
            reason: "its post-processor does more than put special tokens around a text".into(),
        }),
    }
}

/// Runs code of the tokenizers crate; a panic in it is an error of the tokenizer.
fn contained<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ModelError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(ModelError::Tokenizer { reason: shorten(&error.to_string()) }),
        Err(_) => Err(ModelError::Tokenizer { reason: "it failed on this input".into() }),
    }
}

/// Text of a growing list of ids, handed out as soon as it can't change any more.
#[derive(Debug, Default)]
pub(super) struct Streamed {
    /// Everything that is known to stay, without what a stop string cut off.
    text: String,
    /// Bytes of it that were handed out.
    taken_bytes: usize,
    /// Bytes of it in which no stop string begins.
    searched_bytes: usize,
    /// Ids whose text is known, and from which of them on decoding begins anew.
    window_start: usize,
    known_ids: usize,
}

impl Streamed {
    /// Adds what new ids at the end of `ids` say; all that is left when they are the last ones.
    pub(super) fn advance(&mut self, words: &Words, ids: &[u32], is_last: bool) -> Result<(), ModelError> {
        if ids.len() == self.known_ids {
            return Ok(());
        }
        // Decoders look at neighbours only, so a few ids before the new ones are enough to know how these begin.
        let before = words.text(&ids[self.window_start..self.known_ids])?;
        let now = words.text(&ids[self.window_start..])?;
        let is_byte = ids.last().is_some_and(|id| words.bytes.binary_search(id).is_ok());
        let waits =
            (is_byte || now.ends_with(INCOMPLETE)) && ids.len() - self.known_ids <= MAX_WAITING_TOKENS;
        if waits && !is_last {
            return Ok(());
        }
        if let Some(new) = now.strip_prefix(before.as_str()) {
            self.text.push_str(new);
        }
        // A window must not begin with tokens that have no text: decoders treat a text's first piece in another way.
        if self.known_ids - self.window_start >= MAX_WAITING_TOKENS
            || !words.text(&ids[self.known_ids..])?.is_empty()
        {
            self.window_start = self.known_ids;
        }
        self.known_ids = ids.len();
        Ok(())
    }

    /// Cuts the text at the first stop string in it; whether there was one.
    pub(super) fn cut(&mut self, stops: &[String]) -> bool {
        let from = self.searched_bytes;
        let first = stops.iter().filter_map(|stop| self.text[from..].find(stop.as_str())).min();
        match first {
            // What was handed out held no stop string, nor the beginning of one.
            Some(at) => self.text.truncate(from + at),
            None => self.searched_bytes = self.text.len() - held_back(&self.text, stops),
        }
        first.is_some()
    }

    /// What is new since the last call and not the possible beginning of a stop string, unless it `is_last`.
    pub(super) fn take(&mut self, stops: &[String], is_last: bool) -> String {
        let rest = &self.text[self.taken_bytes..];
        let held = if is_last { 0 } else { held_back(rest, stops) };
        let new = rest[..rest.len() - held].to_owned();
        self.taken_bytes += new.len();
        new
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Replaces the text, which nobody was handed anything of.
    pub(super) fn replace(&mut self, text: String) {
        self.text = text;
    }
}

/// Bytes at the end of a text that may be the beginning of a stop string.
fn held_back(text: &str, stops: &[String]) -> usize {
    let begins = |len: usize| {
        text.is_char_boundary(text.len() - len)
            && stops.iter().any(|stop| stop.len() > len && stop.starts_with(&text[text.len() - len..]))
    };
    let longest = stops.iter().map(String::len).max().unwrap_or(1).saturating_sub(1);
    (1..=longest.min(text.len())).rev().find(|len| begins(*len)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_of_stop_strings_are_held_back() {
        let stops = ["</end>".to_owned(), "élan".to_owned()];
        for (text, held) in [("abc", 0), ("abc<", 1), ("abc</en", 4), ("abc</end", 5), ("x é", 2), ("<</", 2)]
        {
            assert_eq!(held_back(text, &stops), held, "{text:?}");
        }
        assert_eq!(held_back("abc", &[]), 0);
        let mut streamed = Streamed::default();
        streamed.text.push_str("say </en");
        assert_eq!(streamed.take(&stops, false), "say ");
        streamed.text.push_str("d> more");
        assert!(streamed.cut(&stops));
        assert_eq!(streamed.take(&stops, true), "");
        assert_eq!(streamed.text(), "say ");
    }
}

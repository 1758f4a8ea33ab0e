//! Texts to token ids: by our own tables where they cover the model's tokenizer, else by the tokenizers crate, contained:
//! its panics become errors. Special tokens around a text and cutting are ours.

use super::ModelError;
use crate::config::EncoderConfig;
use crate::unigram::Unigram;
use crate::wordpiece::{Fringe, PairFringes, WordPiece};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::{NormalizerWrapper, Tokenizer};

/// Longest text that is tokenized, bytes. Bounds the memory of one text's tokens to some 100 MB.
pub const MAX_TEXT_BYTES: usize = 1 << 20;
/// Bytes of prose that a token has at least, on average: what memory is set aside for.
const BYTES_PER_TOKEN: usize = 4;

/// A text as the model reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    ids: Vec<u32>,
    type_ids: Vec<u32>,
    total_tokens: usize,
}

impl EncodedText {
    /// Token ids with special tokens, cut to the model's length.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Token type ids, one per id.
    pub fn type_ids(&self) -> &[u32] {
        &self.type_ids
    }

    /// Drops all tokens behind the first `tokens`.
    pub(crate) fn cut(&mut self, tokens: usize) {
        self.ids.truncate(tokens);
        self.type_ids.truncate(tokens);
    }

    /// Tokens of the whole text with special tokens, before it was cut.
    pub fn total_tokens(&self) -> usize {
        self.total_tokens
    }

    /// Whether tokens were cut off.
    pub fn truncated(&self) -> bool {
        self.total_tokens > self.ids.len()
    }
}

/// What does the work.
enum Tokens {
    /// Tables, which hold the special tokens around a text too. The crate's tokenizer is never built: it takes some ten
    /// milliseconds and megabytes.
    Tables(Box<WordPiece>),
    /// Tables in the image, for Unigram.
    Unigram(Box<Unigram>),
    /// The tokenizers crate, for every tokenizer that the tables do not cover.
    Library(Box<Tokenizer>),
}

/// A loaded tokenizer with the model's special tokens and length.
pub(crate) struct TextEncoder {
    tokens: Tokens,
    before: Fringe,
    after: Fringe,
    text_type_id: u32,
    /// How two texts are put together, if the tokenizer can.
    pair: Option<PairFringes>,
    vocab_size: usize,
    max_seq_tokens: usize,
}

impl TextEncoder {
    /// Loads a checked tokenizer.json.
    pub(crate) fn new(
        json: &[u8],
        config: &EncoderConfig,
        max_seq_tokens: usize,
        lower_case: bool,
    ) -> Result<Self, ModelError> {
        let mut encoder = match WordPiece::from_json(json, lower_case) {
            Some(tables) => TextEncoder {
                before: tables.before().clone(),
                after: tables.after().clone(),
                text_type_id: tables.text_type_id(),
                pair: tables.pair().cloned(),
                tokens: Tokens::Tables(Box::new(tables)),
                vocab_size: config.vocab_size,
                max_seq_tokens,
            },
            None => {
                let library = library(json, lower_case)?;
                let (before, text_type_id, after) = surroundings(&library)?;
                let pair = pair_surroundings(&library)?;
                let tokens = Tokens::Library(Box::new(library));
                let vocab_size = config.vocab_size;
                TextEncoder { tokens, before, after, text_type_id, pair, vocab_size, max_seq_tokens }
            }
        };
        if config.type_count <= 1 {
            encoder.drop_type_ids();
        }
        encoder.check_special_tokens(config)?;
        Ok(encoder)
    }

    /// Takes up the tables that the image has beside its tokenizer.json.
    pub(crate) fn over_tables(
        tables: Unigram,
        config: &EncoderConfig,
        max_seq_tokens: usize,
        pair: Option<PairFringes>,
    ) -> Result<Self, ModelError> {
        let mut encoder = TextEncoder {
            before: tables.before().clone(),
            after: tables.after().clone(),
            text_type_id: tables.text_type_id(),
            pair,
            tokens: Tokens::Unigram(Box::new(tables)),
            vocab_size: config.vocab_size,
            max_seq_tokens,
        };
        if config.type_count <= 1 {
            encoder.drop_type_ids();
        }
        encoder.check_special_tokens(config)?;
        Ok(encoder)
    }

    /// A model that knows one type of tokens, or none, gives every token the first, as transformers does.
    fn drop_type_ids(&mut self) {
        self.text_type_id = 0;
        self.before.1.fill(0);
        self.after.1.fill(0);
        if let Some(pair) = &mut self.pair {
            pair.type_ids = [0; 2];
            [&mut pair.before, &mut pair.between, &mut pair.after]
                .into_iter()
                .for_each(|fringe| fringe.1.fill(0));
        }
    }

    /// Special tokens must leave room for a text, and be tokens and types that the model has.
    fn check_special_tokens(&self, config: &EncoderConfig) -> Result<(), ModelError> {
        let fail = |reason: String| ModelError::Tokenizer { reason };
        if self.special_tokens() >= self.max_seq_tokens {
            return Err(fail(format!(
                "{} special tokens leave no room in sequences of {} tokens",
                self.special_tokens(),
                self.max_seq_tokens
            )));
        }
        let pair = self.pair.iter().flat_map(PairFringes::special);
        let mut ids = self.before.0.iter().chain(&self.after.0).chain(pair.flat_map(|fringe| &fringe.0));
        if let Some(id) = ids.find(|id| **id as usize >= config.vocab_size) {
            return Err(fail(format!("special token id {id} is not below vocab_size {}", config.vocab_size)));
        }
        let pair = self.pair.iter().flat_map(PairFringes::special).flat_map(|fringe| &fringe.1);
        let texts = self.pair.iter().flat_map(|pair| &pair.type_ids);
        let mut kinds =
            self.before.1.iter().chain(&self.after.1).chain([&self.text_type_id]).chain(pair).chain(texts);
        if let Some(kind) = kinds.find(|kind| **kind as usize >= config.type_count.max(1)) {
            return Err(fail(format!(
                "token type id {kind} is not below type_vocab_size {}",
                config.type_count
            )));
        }
        Ok(())
    }

    fn special_tokens(&self) -> usize {
        self.before.0.len() + self.after.0.len()
    }

    /// Encodes the text with this index in its call.
    pub(crate) fn encode(&self, index: usize, text: &str) -> Result<EncodedText, ModelError> {
        check_text(index, text)?;
        let special_tokens = self.special_tokens();
        let mut ids = Vec::with_capacity(special_tokens + text.len() / BYTES_PER_TOKEN);
        ids.extend_from_slice(&self.before.0);
        match &self.tokens {
            Tokens::Tables(tables) => tables.encode_into(text, &mut ids),
            Tokens::Unigram(tables) => tables.encode_into(text, &mut ids),
            Tokens::Library(library) => {
                ids.extend_from_slice(contained(|| library.encode_fast(text, false))?.get_ids());
            }
        }
        let total_tokens = ids.len() + self.after.0.len();
        let room = self.max_seq_tokens - self.after.0.len();
        if ids.len() > room {
            ids.truncate(room);
            ids.shrink_to(self.max_seq_tokens);
        }
        let kept = ids.get(self.before.0.len()..).unwrap_or_default();
        let vocab_size = self.vocab_size;
        if let Some(id) = kept.iter().find(|id| **id as usize >= vocab_size) {
            return Err(ModelError::TokenId { index, id: *id, vocab_size });
        }
        let mut type_ids = Vec::with_capacity(special_tokens + kept.len());
        type_ids.extend_from_slice(&self.before.1);
        type_ids.resize(ids.len(), self.text_type_id);
        type_ids.extend_from_slice(&self.after.1);
        ids.extend_from_slice(&self.after.0);
        Ok(EncodedText { ids, type_ids, total_tokens })
    }

    /// Token ids of the text with this index in its call, without special tokens and without cutting.
    pub(crate) fn tokens(&self, index: usize, text: &str) -> Result<Vec<u32>, ModelError> {
        check_text(index, text)?;
        let ids = match &self.tokens {
            Tokens::Tables(tables) => {
                let mut ids = Vec::with_capacity(text.len() / BYTES_PER_TOKEN);
                tables.encode_into(text, &mut ids);
                ids
            }
            Tokens::Unigram(tables) => {
                let mut ids = Vec::with_capacity(text.len() / BYTES_PER_TOKEN);
                tables.encode_into(text, &mut ids);
                ids
            }
            Tokens::Library(library) => contained(|| library.encode_fast(text, false))?.get_ids().to_vec(),
        };
        let vocab_size = self.vocab_size;
        match ids.iter().find(|id| **id as usize >= vocab_size) {
            Some(id) => Err(ModelError::TokenId { index, id: *id, vocab_size }),
            None => Ok(ids),
        }
    }

    /// Two texts as one, of their tokens; cut to the model's length.
    pub(crate) fn pair(&self, first: &[u32], second: &[u32]) -> Result<EncodedText, ModelError> {
        let fail = |reason: &str| ModelError::Tokenizer { reason: reason.to_owned() };
        let pair = self.pair.as_ref().ok_or_else(|| fail("it has no form for pairs of texts"))?;
        let special: usize = pair.special().iter().map(|fringe| fringe.0.len()).sum();
        let room = self
            .max_seq_tokens
            .checked_sub(special)
            .filter(|room| *room > 0)
            .ok_or_else(|| fail("special tokens leave no room for pairs of texts"))?;
        let total_tokens = special + first.len() + second.len();
        let [first_len, second_len] = cut_pair(first.len(), second.len(), room);
        let (mut ids, mut type_ids) = (Vec::new(), Vec::new());
        let [first_type, second_type] = pair.type_ids;
        for (fringe, text, kind) in [
            (&pair.before, &first[..first_len], first_type),
            (&pair.between, &second[..second_len], second_type),
        ] {
            ids.extend_from_slice(&fringe.0);
            type_ids.extend_from_slice(&fringe.1);
            ids.extend_from_slice(text);
            type_ids.resize(ids.len(), kind);
        }
        ids.extend_from_slice(&pair.after.0);
        type_ids.extend_from_slice(&pair.after.1);
        Ok(EncodedText { ids, type_ids, total_tokens })
    }

    /// Byte ranges of all tokens of a text, in order, without special tokens and without cutting.
    pub(crate) fn spans(&self, text: &str) -> Result<Vec<Range<usize>>, ModelError> {
        check_text(0, text)?;
        let spans = match &self.tokens {
            Tokens::Tables(tables) => tables.spans(text),
            Tokens::Unigram(tables) => tables.spans(text),
            Tokens::Library(library) => {
                let encoding = contained(|| library.encode(text, false))?;
                encoding.get_offsets().iter().map(|(start, end)| *start..*end).collect()
            }
        };
        if spans.iter().any(|span| span.start > span.end || text.get(span.clone()).is_none()) {
            return Err(ModelError::Tokenizer {
                reason: "it gave a token that is no part of the text".into(),
            });
        }
        Ok(spans)
    }
}

/// The crate's tokenizer of a tokenizer.json.
fn library(json: &[u8], lower_case: bool) -> Result<Tokenizer, ModelError> {
    let mut tokenizer = contained(|| Tokenizer::from_bytes(json))?;
    tokenizer.with_padding(None);
    contained(|| tokenizer.with_truncation(None).map(|_| ()))?;
    if lower_case {
        lower_case_first(&mut tokenizer)?;
    }
    Ok(tokenizer)
}

/// Learns from a sample which special tokens surround a text, and its type id between them, so that cutting and
/// surrounding need no second pass.
fn surroundings(library: &Tokenizer) -> Result<(Fringe, u32, Fringe), ModelError> {
    const SAMPLE: &str = "a";
    let bare = contained(|| library.encode_fast(SAMPLE, false))?;
    let full = contained(|| library.encode_fast(SAMPLE, true))?;
    let special = full.get_special_tokens_mask();
    let first = special.iter().take_while(|flag| **flag == 1).count();
    let last = first + bare.len();
    let (ids, kinds) = (full.get_ids(), full.get_type_ids());
    let reason = "its post-processor does more than put special tokens around a text";
    if bare.is_empty() || ids.get(first..last) != Some(bare.get_ids()) {
        return Err(ModelError::Tokenizer { reason: reason.into() });
    }
    let before = (ids[..first].to_vec(), kinds[..first].to_vec());
    Ok((before, kinds[first], (ids[last..].to_vec(), kinds[last..].to_vec())))
}

/// As [`surroundings`], of two texts; `None` when the tokenizer does not take two.
fn pair_surroundings(library: &Tokenizer) -> Result<Option<PairFringes>, ModelError> {
    const SAMPLE: &str = "a";
    let bare = contained(|| library.encode_fast(SAMPLE, false))?;
    let Ok(full) = contained(|| library.encode_fast((SAMPLE, SAMPLE), true)) else { return Ok(None) };
    let (ids, kinds, special) = (full.get_ids(), full.get_type_ids(), full.get_special_tokens_mask());
    let len = bare.len();
    let first = special.iter().take_while(|flag| **flag == 1).count();
    let behind = special.get(first + len..).unwrap_or_default();
    let second = first + len + behind.iter().take_while(|flag| **flag == 1).count();
    let as_expected = len > 0
        && ids.get(first..first + len) == Some(bare.get_ids())
        && ids.get(second..second + len) == Some(bare.get_ids())
        && special[second + len..].iter().all(|flag| *flag == 1);
    if !as_expected {
        return Ok(None);
    }
    let fringe = |range: Range<usize>| (ids[range.clone()].to_vec(), kinds[range].to_vec());
    Ok(Some(PairFringes {
        before: fringe(0..first),
        between: fringe(first + len..second),
        after: fringe(second + len..ids.len()),
        type_ids: [kinds[first], kinds[second]],
    }))
}

/// Lengths to which two texts are cut so that both have room: transformers' `longest_first`, as the tokenizers crate does it. If
/// the shorter one is less than half of the room it stays whole, else each gets a half, and the longer one what is odd.
fn cut_pair(first: usize, second: usize, room: usize) -> [usize; 2] {
    if first + second <= room {
        return [first, second];
    }
    let shorter = first.min(second);
    let (short, long) = match room.checked_sub(shorter) {
        Some(rest) if rest >= shorter => (shorter, rest),
        _ => (room / 2, room / 2 + room % 2),
    };
    if first > second { [long, short] } else { [short, long] }
}

fn check_text(index: usize, text: &str) -> Result<(), ModelError> {
    match text.len() {
        len_bytes if len_bytes > MAX_TEXT_BYTES => {
            Err(ModelError::TextTooLong { index, len_bytes, max_bytes: MAX_TEXT_BYTES })
        }
        _ => Ok(()),
    }
}

/// Runs code of the tokenizers crate; a panic in it is an error of the tokenizer. The tokenizer holds no state that a panic
/// could leave half-changed but its word cache, which is a lock that then stays unused.
fn contained<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, ModelError> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(ModelError::Tokenizer { reason: crate::json::shorten(&error.to_string()) }),
        Err(_) => Err(ModelError::Tokenizer { reason: "it failed on this input".into() }),
    }
}

/// Lower-cases before any other normalisation, unless a normalizer does so already, as sentence-transformers does.
fn lower_case_first(tokenizer: &mut Tokenizer) -> Result<(), ModelError> {
    let fail = |error: serde_json::Error| ModelError::Tokenizer { reason: error.to_string() };
    let present = match tokenizer.get_normalizer() {
        Some(normalizer) => serde_json::to_value(normalizer).map_err(fail)?,
        None => serde_json::Value::Null,
    };
    let text = present.to_string();
    if text.contains("\"type\":\"Lowercase\"") || text.contains("\"lowercase\":true") {
        return Ok(());
    }
    let lower = serde_json::json!({"type": "Lowercase"});
    let both = match present {
        serde_json::Value::Null => lower,
        present => serde_json::json!({"type": "Sequence", "normalizers": [lower, present]}),
    };
    let both: NormalizerWrapper = serde_json::from_value(both).map_err(fail)?;
    contained(|| tokenizer.with_normalizer(Some(both)).map(|_| ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `truncate_encodings` of the tokenizers crate.
    fn of_the_crate(first: usize, second: usize, room: usize) -> [usize; 2] {
        use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};
        let encoding = |len: usize| {
            let mut encoding = tokenizers::Encoding::default();
            for _ in 0..len {
                let token = tokenizers::Token { id: 0, value: String::new(), offsets: (0, 0) };
                let tokens = tokenizers::Encoding::from_tokens(vec![token], 0);
                encoding.merge_with(tokens, false);
            }
            encoding
        };
        let params = TruncationParams { max_length: room, ..TruncationParams::default() };
        let (first, second) = truncate_encodings(encoding(first), Some(encoding(second)), &params).unwrap();
        [first.len(), second.unwrap().len()]
    }

    #[test]
    fn pairs_are_cut_as_the_crate_cuts_them() {
        for room in 1..12 {
            for (first, second) in (0..15).flat_map(|first| (0..15).map(move |second| (first, second))) {
                let wanted = of_the_crate(first, second, room);
                assert_eq!(cut_pair(first, second, room), wanted, "{first} and {second} in {room}");
            }
        }
    }
}

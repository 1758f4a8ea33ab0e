//! WordPiece over tables: text to token ids as BERT-family tokenizer.json files define it, many times faster than the
//! tokenizers crate and with the same result for every text. What the tables do not cover is refused at construction, so
//! that the caller takes the crate. No model, no file access, no `unsafe`, nothing kept between texts but what a
//! character becomes.
//!
//! A text goes through four steps, as in the crate: added tokens such as `[MASK]` are cut out (`added`); each piece
//! between them is normalised (`normalize`, `chars`), cut into words at blanks and punctuation, and each word is cut
//! into the longest vocabulary entries from left to right (`split`, `vocab`).

pub(crate) mod added;
mod chars;
pub(crate) mod file;
mod normalize;
mod split;
mod vocab;

use added::AddedTokens;
use chars::CharTable;
use normalize::Normalized;
use split::{Output, Spans};
use std::ops::Range;
use vocab::Vocab;

/// Special tokens on one side of a text: ids, and one type id for each.
pub type Fringe = (Vec<u32>, Vec<u32>);

/// Special tokens around two texts that are put together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PairFringes {
    /// Before the first text.
    pub before: Fringe,
    /// Between both.
    pub between: Fringe,
    /// Behind the second.
    pub after: Fringe,
    /// Token type ids of the texts' own tokens.
    pub type_ids: [u32; 2],
}

impl PairFringes {
    /// All special tokens.
    pub fn special(&self) -> [&Fringe; 3] {
        [&self.before, &self.between, &self.after]
    }
}

/// A tokenizer over tables. Shared by any number of threads.
pub struct WordPiece {
    chars: CharTable,
    vocab: Vocab,
    /// Matched in the text as it is.
    raw_tokens: AddedTokens,
    /// Matched in the normalised text.
    normalized_tokens: AddedTokens,
    before: Fringe,
    after: Fringe,
    text_type_id: u32,
    pair: Option<PairFringes>,
}

impl std::fmt::Debug for WordPiece {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("WordPiece").finish_non_exhaustive()
    }
}

impl WordPiece {
    /// Builds the tables of a tokenizer.json, about two milliseconds for 30 000 entries. `lower_case`: lower-case texts
    /// before any other normalisation, unless the file does so already, as sentence-transformers' `do_lower_case`.
    ///
    /// `None` when the file has anything that the tables do not cover: another model than WordPiece, another normalizer
    /// than BertNormalizer with at most a Lowercase before it, another pre-tokenizer than BertPreTokenizer, another
    /// post-processor than one that puts special tokens around a text, added tokens that begin or end with blanks, fields
    /// unknown here; or when it is malformed. Padding, truncation and the decoder are ignored.
    pub fn from_json(json: &[u8], lower_case: bool) -> Option<WordPiece> {
        let parts = file::read(json, lower_case)?;
        let chars = CharTable::new(parts.rules);
        let (raw, mut normalized): (Vec<_>, Vec<_>) =
            parts.added_tokens.into_iter().partition(|token| !token.normalized);
        for token in &mut normalized {
            token.content = chars.normalize_all(&token.content);
        }
        Some(WordPiece {
            chars,
            vocab: parts.vocab,
            raw_tokens: AddedTokens::new(raw)?,
            normalized_tokens: AddedTokens::new(normalized)?,
            before: parts.before,
            after: parts.after,
            text_type_id: parts.text_type_id,
            pair: parts.pair,
        })
    }

    /// Special tokens before a text.
    pub fn before(&self) -> &Fringe {
        &self.before
    }

    /// Special tokens after a text.
    pub fn after(&self) -> &Fringe {
        &self.after
    }

    /// Token type id of the text's own tokens.
    pub fn text_type_id(&self) -> u32 {
        self.text_type_id
    }

    /// Special tokens around two texts, if the file says how two are put together.
    pub fn pair(&self) -> Option<&PairFringes> {
        self.pair.as_ref()
    }

    /// Appends the token ids of `text`, without special tokens around it and without cutting.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        self.run(text, ids);
    }

    /// Byte ranges in `text` of all its tokens, in order. A token of an unknown word covers the word; one of several tokens
    /// that one character became covers that character.
    pub fn spans(&self, text: &str) -> Vec<Range<usize>> {
        let mut spans = Spans::default();
        self.run(text, &mut spans);
        spans.found
    }

    fn run<O: Output>(&self, text: &str, output: &mut O) {
        let mut buffer = Normalized::<O::Sources>::with_capacity(text.len());
        self.raw_tokens.split(text, |range, id| match id {
            Some(id) => output.added(id, range),
            None => self.piece(&text[range.clone()], range.start, &mut buffer, output),
        });
    }

    /// Tokenizes a piece of a text that begins at byte `start` of it and holds no added token that is matched unnormalised.
    fn piece<O: Output>(
        &self,
        piece: &str,
        start: usize,
        buffer: &mut Normalized<O::Sources>,
        output: &mut O,
    ) {
        buffer.clear();
        self.chars.normalize(piece, start, buffer);
        let text = buffer.padded();
        self.normalized_tokens.split(text.get(), |range, id| match id {
            Some(id) => output.token(id, range),
            None => split::words(&self.chars, &self.vocab, &text, range, output),
        });
        output.end_piece(buffer.sources());
    }
}

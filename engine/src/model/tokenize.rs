//! Texts to token ids: the tokenizers crate, contained. Panics become errors; padding and truncation are ours.

use super::ModelError;
use crate::config::EncoderConfig;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use tokenizers::{Encoding, NormalizerWrapper, Tokenizer};

/// Longest text that is tokenized, bytes. Bounds the memory of one text's tokens to some 100 MB.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

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

    /// Tokens of the whole text with special tokens, before it was cut.
    pub fn total_tokens(&self) -> usize {
        self.total_tokens
    }

    /// Whether tokens were cut off.
    pub fn truncated(&self) -> bool {
        self.total_tokens > self.ids.len()
    }
}

/// Special tokens on one side of a text: ids and type ids.
type Fringe = (Vec<u32>, Vec<u32>);

/// A loaded tokenizer with the model's special tokens and length.
pub(crate) struct TextEncoder {
    tokenizer: Tokenizer,
    before: Fringe,
    after: Fringe,
    text_type_id: u32,
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
        let mut tokenizer = contained(|| Tokenizer::from_bytes(json))?;
        tokenizer.with_padding(None);
        contained(|| tokenizer.with_truncation(None).map(|_| ()))?;
        if lower_case {
            lower_case_first(&mut tokenizer)?;
        }
        let mut encoder = TextEncoder {
            tokenizer,
            before: Fringe::default(),
            after: Fringe::default(),
            text_type_id: 0,
            vocab_size: config.vocab_size,
            max_seq_tokens,
        };
        encoder.find_special_tokens(config)?;
        Ok(encoder)
    }

    /// Learns from a sample which special tokens surround a text, so that cutting and surrounding need no second pass.
    fn find_special_tokens(&mut self, config: &EncoderConfig) -> Result<(), ModelError> {
        const SAMPLE: &str = "a";
        let fail = |reason: String| ModelError::Tokenizer { reason };
        let bare = self.run(SAMPLE, false)?;
        let full = self.run(SAMPLE, true)?;
        let special = full.get_special_tokens_mask();
        let first = special.iter().take_while(|flag| **flag == 1).count();
        let last = first + bare.len();
        if bare.is_empty() || full.get_ids().get(first..last) != Some(bare.get_ids()) {
            return Err(fail("its post-processor does more than put special tokens around a text".into()));
        }
        let (ids, kinds) = (full.get_ids(), full.get_type_ids());
        self.before = (ids[..first].to_vec(), kinds[..first].to_vec());
        self.after = (ids[last..].to_vec(), kinds[last..].to_vec());
        self.text_type_id = kinds[first];
        if self.special_tokens() >= self.max_seq_tokens {
            return Err(fail(format!(
                "{} special tokens leave no room in sequences of {} tokens",
                self.special_tokens(),
                self.max_seq_tokens
            )));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= config.vocab_size) {
            return Err(fail(format!("special token id {id} is not below vocab_size {}", config.vocab_size)));
        }
        if let Some(kind) = kinds.iter().find(|kind| **kind as usize >= config.type_count) {
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

    fn run(&self, text: &str, special: bool) -> Result<Encoding, ModelError> {
        contained(|| self.tokenizer.encode_fast(text, special))
    }

    /// Encodes the text with this index in its call.
    pub(crate) fn encode(&self, index: usize, text: &str) -> Result<EncodedText, ModelError> {
        check_text(index, text)?;
        let encoding = self.run(text, false)?;
        let tokens = encoding.get_ids();
        let kept = &tokens[..tokens.len().min(self.max_seq_tokens - self.special_tokens())];
        let vocab_size = self.vocab_size;
        if let Some(id) = kept.iter().find(|id| **id as usize >= vocab_size) {
            return Err(ModelError::TokenId { index, id: *id, vocab_size });
        }
        let kinds = std::iter::repeat_n(self.text_type_id, kept.len());
        Ok(EncodedText {
            ids: [&self.before.0, kept, &self.after.0].concat(),
            type_ids: self
                .before
                .1
                .iter()
                .copied()
                .chain(kinds)
                .chain(self.after.1.iter().copied())
                .collect(),
            total_tokens: tokens.len() + self.special_tokens(),
        })
    }

    /// Byte ranges of all tokens of a text, in order, without special tokens and without cutting.
    pub(crate) fn spans(&self, text: &str) -> Result<Vec<Range<usize>>, ModelError> {
        check_text(0, text)?;
        let encoding = contained(|| self.tokenizer.encode(text, false))?;
        let mut spans = Vec::with_capacity(encoding.len());
        for (start, end) in encoding.get_offsets() {
            if start > end || text.get(*start..*end).is_none() {
                return Err(ModelError::Tokenizer {
                    reason: "it gave a token that is no part of the text".into(),
                });
            }
            spans.push(*start..*end);
        }
        Ok(spans)
    }
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

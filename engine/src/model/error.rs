//! Why a model can't be loaded or a text not be computed.

use crate::config::ConfigError;
use shm_layout::image::ImageError;

/// Why loading an image or computing with it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// The image's structure is wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image's config.json is wrong.
    #[error("image: {0}; compile the model again")]
    Config(#[from] ConfigError),
    /// Parts of the image contradict each other.
    #[error("image: {what}; it is corrupt, compile the model again")]
    Inconsistent {
        /// What contradicts.
        what: String,
    },
    /// The tokenizer can't be loaded or failed on a text.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// A text is longer than any text may be.
    #[error("text {index} has {len_bytes} bytes, at most {max_bytes} are taken; split it")]
    TextTooLong {
        /// Index of the text in the call.
        index: usize,
        /// Its length, bytes.
        len_bytes: usize,
        /// The bound, bytes.
        max_bytes: usize,
    },
    /// A token id is not one of the model's.
    #[error("text {index} has token id {id}, the model has ids below {vocab_size}")]
    TokenId {
        /// Index of the text in the call.
        index: usize,
        /// The id.
        id: u32,
        /// Number of ids.
        vocab_size: usize,
    },
    /// A text has no tokens or more than the model takes.
    #[error("text {index} has {tokens} tokens, the model takes 1 to {max_tokens}")]
    TokenCount {
        /// Index of the text in the call.
        index: usize,
        /// Its tokens.
        tokens: usize,
        /// The model's bound.
        max_tokens: usize,
    },
    /// A kernel refused its arguments: a bug, or an image that changed under us.
    #[error("computing failed: {reason}")]
    Compute {
        /// What it said.
        reason: String,
    },
    /// A result is not a usable vector; it is never handed out.
    #[error("the vector of text {index} is {what}; the answer was discarded")]
    BadVector {
        /// Index of the text in the call.
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The probe text's vector is not what it was before.
    #[error("the probe gives another vector than before: this process's memory can't be trusted, restart it")]
    Probe,
    /// An option of a generation is out of range.
    #[error("option {field} is {value}, allowed is {allowed}")]
    Option {
        /// Its name.
        field: &'static str,
        /// What was asked for.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// A chat template failed, or there is none.
    #[error("chat template: {reason}")]
    Template {
        /// What it said.
        reason: String,
    },
    /// There is no room for an answer's keys and values.
    #[error(
        "keys and values need {needed_bytes} bytes, {used_bytes} of {max_bytes} are in use; wait until other answers are done, \
         or ask for fewer tokens or beams"
    )]
    KvMemory {
        /// Bytes that this answer needs.
        needed_bytes: u64,
        /// Bytes that others have.
        used_bytes: u64,
        /// The bound, bytes.
        max_bytes: u64,
    },
}

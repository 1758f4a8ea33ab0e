//! Blocks to chunks that a model takes whole. Pure but for [`chunk_document`], which asks the model for tokens.
//!
//! ```text
//! Document ─ plan ─► texts, cut into pieces ─ model.token_spans ─► tokens ─ pack ─► chunks ─ count again ─► done
//!                                                                    ▲                          │ too long
//!                                                                    └──── smaller target ◄─────┘
//! ```
//! Invariants, held by property tests: every token of the document is in at least one chunk; no chunk counts
//! more tokens than the model takes; cuts are at token and character boundaries; a table's chunk holds nothing
//! but that table, begins with its caption and header row, and is cut between rows (within one only when it
//! alone is too long); following chunks of one run of text share the overlap asked for.

mod count;
mod pack;
mod plan;
mod window;

use std::sync::Arc;

pub(crate) use count::batches;
pub use count::chunk_document;
pub(crate) use plan::context_line;

use crate::document::Source;
use crate::limits::{CHUNKS_MAX, TARGET_TOKENS_MIN};
use crate::model::{ModelFailure, TextModel};

/// Changes when the same document would give other chunks: part of what decides whether a document is unchanged.
pub(crate) const CHUNKER_VERSION: u32 = 1;

/// How a document is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkOptions {
    /// Tokens that a chunk should have at most, its heading path included; lowered to what the model takes.
    pub target_tokens: usize,
    /// Tokens that a chunk repeats of the one before it in the same run of text; at most a third of the target.
    /// Up to eight more are taken to begin at a word.
    pub overlap_tokens: usize,
}

impl Default for ChunkOptions {
    fn default() -> Self {
        Self { target_tokens: 200, overlap_tokens: 32 }
    }
}

/// Why a document can't be cut.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The option is under [`TARGET_TOKENS_MIN`].
    #[error("a chunk of {target_tokens} tokens is too small: ask for at least {TARGET_TOKENS_MIN}")]
    TargetTooSmall {
        /// What was asked for.
        target_tokens: usize,
    },
    /// The option is over a third of the target.
    #[error(
        "an overlap of {overlap_tokens} tokens is too large for chunks of {target_tokens}: ask for at most a third"
    )]
    OverlapTooLarge {
        /// What was asked for.
        overlap_tokens: usize,
        /// The target it is too large for.
        target_tokens: usize,
    },
    /// The model's longest input leaves no room.
    #[error(
        "the model takes only {max_tokens} tokens, {special_tokens} of them special: too few for a chunk"
    )]
    ModelTooSmall {
        /// The model's longest input.
        max_tokens: usize,
        /// Of which special.
        special_tokens: usize,
    },
    /// More than [`CHUNKS_MAX`] chunks.
    #[error(
        "the document gives more than {CHUNKS_MAX} chunks (limit CHUNKS_MAX): split it, or ask for larger chunks"
    )]
    TooManyChunks,
    /// The tokenizer counts far more tokens for joined pieces than for the pieces.
    #[error("a chunk still counts {tokens} tokens of {limit} allowed after packing it smaller several times")]
    CannotFit {
        /// The longest chunk.
        tokens: usize,
        /// What the model takes.
        limit: usize,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelFailure),
}

impl ChunkOptions {
    /// Checks the options by themselves.
    pub fn check(&self) -> Result<(), ChunkError> {
        if self.target_tokens < TARGET_TOKENS_MIN {
            return Err(ChunkError::TargetTooSmall { target_tokens: self.target_tokens });
        }
        if self.overlap_tokens > self.target_tokens / 3 {
            return Err(ChunkError::OverlapTooLarge {
                overlap_tokens: self.overlap_tokens,
                target_tokens: self.target_tokens,
            });
        }
        Ok(())
    }

    /// The budget with this model.
    pub(crate) fn budget(&self, model: &dyn TextModel) -> Result<Budget, ChunkError> {
        self.check()?;
        let (max_tokens, special_tokens) = (model.max_tokens(), model.special_tokens());
        let limit = max_tokens.saturating_sub(special_tokens);
        if limit < TARGET_TOKENS_MIN {
            return Err(ChunkError::ModelTooSmall { max_tokens, special_tokens });
        }
        Ok(Budget { target: self.target_tokens.min(limit), overlap: self.overlap_tokens, wide: limit, limit })
    }
}

/// What a chunk may have, in tokens, special tokens already taken off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Budget {
    /// What it should have at most.
    pub(crate) target: usize,
    /// What it repeats.
    pub(crate) overlap: usize,
    /// What a chunk of a table with a wide header may have, so that rows have room.
    pub(crate) wide: usize,
    /// What the model takes.
    pub(crate) limit: usize,
}

/// What a chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChunkKind {
    /// Headings, paragraphs, list items, code.
    Text,
    /// Rows of one table.
    Table,
}

/// A piece of a document, embedded as one vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// What it holds.
    pub kind: ChunkKind,
    /// The headings it stands under, outermost first.
    pub heading_path: Arc<[String]>,
    /// Title and headings as one line, put before the body for embedding; cut at its front when it is long.
    pub context: String,
    /// The text itself: what a search shows.
    pub body: String,
    /// Tokens of the embedded text as the model counts them, special tokens excluded.
    pub tokens: usize,
    /// Where it came from, by whole blocks and table rows, when the format tells.
    pub source: Option<Source>,
}

impl Chunk {
    /// The text that is embedded: context and body.
    pub fn embedding_text(&self) -> String {
        if self.context.is_empty() { self.body.clone() } else { format!("{}\n{}", self.context, self.body) }
    }
}

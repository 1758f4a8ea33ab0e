//! What an image says of its model, for those who manage models and do not compute: read from header and sections alone.

use super::ModelError;
use crate::compile::{Prompts, prompts};
use crate::config::{labels, problem_type};
use shm_layout::image::{CheckedImage, Family, SectionKind, Task};

/// What a model is and what its users must know; all of it bounded ([`crate::compile::MAX_PROMPTS`],
/// [`crate::compile::MAX_PROMPT_BYTES`], [`crate::config::MAX_LABELS`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    /// What the model is for.
    pub task: Task,
    /// Model family.
    pub family: Family,
    /// Prompts by name, sorted by it. Whoever asks puts one before the text; the engine does not.
    pub prompts: Vec<(String, String)>,
    /// Name of the prompt that is meant when none is asked for.
    pub default_prompt: Option<String>,
    /// Names of a classifier's labels, in the order of its scores; empty for others. At most 80 characters each.
    pub labels: Vec<String>,
    /// `problem_type` of a classifier's config.json, which says what activation its scores are meant for, if it says.
    pub problem_type: Option<String>,
    /// Longest sequence in tokens, special tokens included.
    pub max_seq_tokens: u32,
    /// Length of an output vector, or number of labels.
    pub output_dim: u32,
    /// Whether the image has a chat template.
    pub has_chat_template: bool,
}

/// Reads what an image says of its model, of any task.
///
/// # Errors
/// [`ModelError`] when its config.json or its prompts can't be read.
pub fn describe(image: &CheckedImage<'_>) -> Result<ImageFacts, ModelError> {
    let header = image.header().values();
    let (prompts, default_prompt): Prompts = match image.section(SectionKind::SentenceTransformersConfig) {
        Some(json) => prompts(json).map_err(|what| ModelError::Inconsistent { what })?,
        None => Prompts::default(),
    };
    let config = image.section(SectionKind::Config).unwrap_or_default();
    let (labels, problem_type) = match header.task {
        Task::Classify => (labels(config)?, problem_type(config)?),
        _ => (Vec::new(), None),
    };
    Ok(ImageFacts {
        task: header.task,
        family: header.family,
        prompts,
        default_prompt,
        labels,
        problem_type,
        max_seq_tokens: header.max_seq_tokens,
        output_dim: header.output_dim,
        has_chat_template: image.section(SectionKind::ChatTemplate).is_some(),
    })
}

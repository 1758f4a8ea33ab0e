//! The pipeline's model as the SDK gives it: the one place where both meet. No logic of either side.

use crate::model::{FailureKind, ModelFailure, TextModel};
use std::ops::Range;
use std::sync::Arc;
use worker_sdk::{EmbedOptions, Model, ModelDescription, Priority, SdkError};

/// A leased model as a [`TextModel`]: indexing goes as bulk work, a query as interactive.
#[derive(Debug, Clone)]
pub struct SdkModel {
    model: Model,
    description: Arc<ModelDescription>,
}

impl SdkModel {
    /// Wraps a lease; asks what model it is.
    ///
    /// # Errors
    /// [`SdkError`] when the lease's model cannot be had.
    pub fn new(model: Model) -> Result<SdkModel, SdkError> {
        let description = model.description()?;
        Ok(SdkModel { model, description })
    }

    fn vectors(&self, texts: &[&str], priority: Priority) -> Result<Vec<Vec<f32>>, ModelFailure> {
        let options = EmbedOptions::default().priority(priority);
        let embeddings = self.model.embed_with(texts, &options).map_err(failure)?;
        if embeddings.fingerprint() != self.description.fingerprint {
            return Err(ModelFailure::unavailable("the model was replaced by another one; run again"));
        }
        Ok(embeddings.to_vecs())
    }
}

fn failure(error: SdkError) -> ModelFailure {
    let kind = match &error {
        SdkError::Input(_) => FailureKind::Refused,
        SdkError::Fault { .. } => FailureKind::BadAnswer,
        _ => FailureKind::Unavailable,
    };
    ModelFailure { kind, message: error.to_string(), source: Some(Box::new(error)) }
}

impl TextModel for SdkModel {
    fn model_id(&self) -> &str {
        &self.description.model_id
    }

    fn fingerprint(&self) -> String {
        format!("{:016x}", self.description.fingerprint)
    }

    fn dimension(&self) -> usize {
        self.description.output_dim as usize
    }

    fn max_tokens(&self) -> usize {
        self.description.max_seq_tokens as usize
    }

    fn token_spans(&self, texts: &[&str]) -> Result<Vec<Vec<Range<usize>>>, ModelFailure> {
        self.model.token_spans(texts).map_err(failure)
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ModelFailure> {
        self.vectors(texts, Priority::Bulk)
    }

    fn embed_query(&self, text: &str) -> Result<Vec<f32>, ModelFailure> {
        let mut vectors = self.vectors(&[text], Priority::Interactive)?;
        vectors.pop().ok_or_else(|| ModelFailure::bad_answer("the model returned no vector for the query"))
    }
}

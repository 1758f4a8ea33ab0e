//! What a provider's handler sees of a job, and what it answers with. No connection, no threads.

use shm_layout::code::Code;
use shm_layout::payload::{
    EmbeddingRows, PayloadError, decode_texts, embeddings_len_bytes, encode_embeddings,
};
use shm_layout::wire::{Operation, Priority, Provide, ProviderJob};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Why a job is not done, as its caller is told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ProviderError {
    code: Code,
    message: String,
}

impl ProviderError {
    /// The job could not be done, for a reason of this provider's own: `PROVIDER_FAILED`.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> ProviderError {
        ProviderError { code: Code::ProviderFailed, message: message.into() }
    }

    /// The input is not what this model takes: `BAD_PAYLOAD`. Say what it takes.
    #[must_use]
    pub fn bad_input(message: impl Into<String>) -> ProviderError {
        ProviderError { code: Code::BadPayload, message: message.into() }
    }

    /// Too much at once; the caller's SDK tries again after a moment: `OVERLOADED`.
    #[must_use]
    pub fn overloaded(message: impl Into<String>) -> ProviderError {
        ProviderError { code: Code::Overloaded, message: message.into() }
    }

    /// The job was given up while it was being computed: `CANCELLED`.
    #[must_use]
    pub fn cancelled() -> ProviderError {
        ProviderError { code: Code::Cancelled, message: "cancelled".into() }
    }

    /// The code that the caller gets.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }

    /// The message that the caller gets.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(super) fn with_code(code: Code, message: impl Into<String>) -> ProviderError {
        ProviderError { code, message: message.into() }
    }
}

impl From<PayloadError> for ProviderError {
    fn from(error: PayloadError) -> ProviderError {
        ProviderError { code: error.code(), message: error.to_string() }
    }
}

/// A job as a handler sees it.
#[derive(Debug)]
pub struct ProvidedJob {
    pub(super) frame: ProviderJob,
    pub(super) offer: Arc<Provide>,
    pub(super) cancelled: Arc<AtomicBool>,
}

impl ProvidedJob {
    /// What is asked: one of the operations that were offered.
    #[must_use]
    pub fn operation(&self) -> Operation {
        self.frame.operation
    }

    /// What the caller sent. Nobody has looked into it: check before use.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.frame.payload
    }

    /// Somebody waits, or throughput matters.
    #[must_use]
    pub fn priority(&self) -> Priority {
        self.frame.priority
    }

    /// Times that a provider died with this job.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.frame.attempts
    }

    /// Whether nobody wants the answer any more. Long computations look at it now and then.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The time until the caller gives up; `None`: it does not.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        let deadline_ns = self.frame.deadline_ns;
        (deadline_ns != 0)
            .then(|| Duration::from_nanos(deadline_ns.saturating_sub(shm_os::process::monotonic_ns())))
    }

    /// The texts of an `Embed` or `Tokenize` job.
    ///
    /// # Errors
    /// [`ProviderError`] when the payload holds no texts; passed on to the caller it names what is wrong.
    pub fn texts(&self) -> Result<Vec<&str>, ProviderError> {
        Ok(decode_texts(&self.frame.payload)?)
    }

    /// The answer to an `Embed` job: one vector for each text, each of as many numbers as were offered.
    ///
    /// # Errors
    /// [`ProviderError`] when there are not that many, or a number is not finite.
    pub fn embeddings<V: AsRef<[f32]>>(&self, vectors: &[V]) -> Result<Vec<u8>, ProviderError> {
        let (dim, count) = (self.offer.output_dim as usize, self.texts()?.len());
        if vectors.len() != count {
            let message = format!("the provider made {} vectors of {count} texts", vectors.len());
            return Err(ProviderError::failed(message));
        }
        if embeddings_len_bytes(count, dim) > self.offer.max_output_bytes as usize {
            let message = format!("{count} vectors do not fit an answer: send fewer texts in one job");
            return Err(ProviderError::with_code(Code::TooLarge, message));
        }
        let mut values = Vec::with_capacity(count * dim);
        for vector in vectors {
            let vector = vector.as_ref();
            if vector.len() != dim || !vector.iter().all(|number| number.is_finite()) {
                let message = format!(
                    "the provider made a vector of {} numbers instead of {dim}, or one that is not finite",
                    vector.len()
                );
                return Err(ProviderError::failed(message));
            }
            values.extend_from_slice(vector);
        }
        let fingerprint = self.offer.fingerprint;
        Ok(encode_embeddings(&EmbeddingRows { dim, fingerprint, cached: vec![false; count], values }))
    }
}

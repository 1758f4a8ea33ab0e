//! What the host needs of whatever computes: two small traits, so that everything else here is written and tested
//! without a model. No lane, no queue and no schedule is known here.

use shm_layout::code::Code;
use shm_layout::image::Task;
use shm_layout::wire::{BackingKind, FinishReason, GenerateRequest};
use std::ops::Range;
use std::os::fd::OwnedFd;

/// What the host must know of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelFacts {
    /// What the model is for.
    pub task: Task,
    /// Numbers in a vector, or scores of a text; at least 1.
    pub dim: usize,
    /// Longest input in tokens, special tokens counted; longer texts are cut.
    pub max_seq_tokens: usize,
    /// Names weights, tokenizer, pooling and precision; stands in every answer.
    pub fingerprint: u64,
    /// Names all that a vector depends on but its text: weights, tokenizer, pooling, precision, and what computes. The same
    /// after a restart; with equal identities vectors are equal bit for bit.
    pub identity: [u8; 32],
}

/// Why something was not computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ComputeError {
    /// What the client is told.
    pub code: Code,
    /// What the client is told in words: no path, no address, nothing of other clients.
    pub message: String,
}

impl ComputeError {
    /// An error with a code and a message.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> ComputeError {
        ComputeError { code, message: message.into() }
    }
}

/// Vectors, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Vectors {
    /// Numbers in a vector.
    pub dim: usize,
    /// `texts × dim` numbers.
    pub values: Vec<f32>,
}

/// A text that is being generated. Dropping it gives its memory back.
pub trait Generating: Send {
    /// Whether nothing more comes.
    fn is_done(&self) -> bool;

    /// What was written since the last call, whole characters; may be empty although more is known already.
    fn take_text(&mut self) -> String;

    /// The whole text so far.
    fn text(&self) -> String;

    /// The tokens so far.
    fn token_ids(&self) -> &[u32];

    /// Why it ended; `None` while it goes on.
    fn finish(&self) -> Option<FinishReason>;

    /// Tokens of the prompt, as far as the model reads it.
    fn prompt_tokens(&self) -> usize;

    /// Tokens that were generated, the one that ended it counted.
    fn output_tokens(&self) -> usize;
}

/// A loaded model. It may panic: the host catches it and asks [`Compute::probe`] before it goes on.
pub trait Compute: Send + Sync + 'static {
    /// A text made ready: its token ids.
    type Prepared;

    /// A text that is being generated.
    type Run: Generating;

    /// What the model is; the same at every call.
    fn facts(&self) -> ModelFacts;

    /// Tokenizes texts for [`Compute::forward`]; one result a text, in order.
    ///
    /// # Errors
    /// [`ComputeError`] for all of them.
    fn prepare(&self, texts: &[&str]) -> Result<Vec<Self::Prepared>, ComputeError>;

    /// As [`Compute::prepare`] for pairs of `query` and each of `texts`. Only of models that classify.
    ///
    /// # Errors
    /// [`ComputeError`] for all of them.
    fn prepare_pairs(&self, query: &str, texts: &[&str]) -> Result<Vec<Self::Prepared>, ComputeError>;

    /// Begins to generate. Only of models that write.
    ///
    /// # Errors
    /// [`ComputeError`]: settings out of range, a prompt that cannot be used, no memory for it.
    fn begin(&self, request: &GenerateRequest) -> Result<Self::Run, ComputeError>;

    /// Goes on with each by a step, a token or a part of its prompt. What one of them becomes must not depend on its company.
    ///
    /// # Errors
    /// [`ComputeError`] for all of them.
    fn step(&self, runs: &mut [&mut Self::Run]) -> Result<(), ComputeError>;

    /// Tokens of a prepared text, special tokens counted.
    fn tokens(prepared: &Self::Prepared) -> usize;

    /// Computes one vector a text. A text's vector must not depend on its company.
    ///
    /// # Errors
    /// [`ComputeError`] for all of them.
    fn forward(&self, prepared: &[&Self::Prepared]) -> Result<Vectors, ComputeError>;

    /// As [`Compute::forward`], but `breaks` is called now and then on threads that compute, where other texts may be computed
    /// inside of [`Compute::on_this_thread`]. A model that has no breaks never calls it.
    ///
    /// # Errors
    /// As [`Compute::forward`].
    fn forward_with_breaks(
        &self,
        prepared: &[&Self::Prepared],
        breaks: &(dyn Fn() + Sync),
    ) -> Result<Vectors, ComputeError> {
        let _ = breaks;
        self.forward(prepared)
    }

    /// Runs `work`, in which this model computes on the calling thread alone and waits for no other computation.
    fn on_this_thread<R>(&self, work: impl FnOnce() -> R) -> R {
        work()
    }

    /// Byte ranges of a text's tokens, without special tokens and without truncation.
    ///
    /// # Errors
    /// [`ComputeError`].
    fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>, ComputeError>;

    /// Computes something known and compares; asked after a failure, before anything else is computed.
    ///
    /// # Errors
    /// [`ComputeError`] when the model no longer computes what it should.
    fn probe(&self) -> Result<(), ComputeError>;

    /// Whether [`Compute::probe`] should be asked as soon as nobody waits for an answer, though nothing failed: a model that
    /// left its first probe out of loading.
    fn wants_probe(&self) -> bool {
        false
    }
}

/// An image as the broker hands it over; nothing of it is checked yet.
#[derive(Debug)]
pub struct ReceivedImage {
    /// Its read-only descriptor.
    pub fd: OwnedFd,
    /// What the broker says its size is.
    pub len_bytes: u64,
    /// What the broker says it lies in.
    pub backing: BackingKind,
}

/// Makes models of images.
pub trait Loader: Send + Sync + 'static {
    /// The model.
    type Model: Compute;

    /// Checks, maps and loads an image. Milliseconds: nothing is copied.
    ///
    /// # Errors
    /// [`ComputeError`] with the code that a client is told.
    fn load(&self, image: ReceivedImage) -> Result<Self::Model, ComputeError>;
}

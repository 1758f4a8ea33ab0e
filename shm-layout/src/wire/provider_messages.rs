//! What the messages say about models that a client's process provides. Plain data; the order of fields is the encoding:
//! append, never reorder.

use super::messages::{Operation, Priority};
use super::{Decode, Encode};

/// What ids of provided models begin with. No other model's id does, so that nobody can step into the place of a model
/// that others trust.
pub const PROVIDED_PREFIX: &str = "custom/";
/// Set in the generation of a provided model, and in no other: it has no image, no lane and no cache.
pub const PROVIDED_GENERATION: u64 = 1 << 63;

/// Whether a generation is one of a provided model.
#[must_use]
pub const fn is_provided(generation: u64) -> bool {
    generation & PROVIDED_GENERATION != 0
}

/// Offers to compute a model. Several sessions may offer the same one; they share the work.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Provide {
    /// `custom/` and letters, digits, `.`, `_`, `-` or `/`; at most [`crate::limits::MAX_PROVIDED_ID_BYTES`].
    pub model_id: String,
    /// What kind of model it is, in a word, for status pages; at most [`crate::limits::MAX_PROVIDED_KIND_BYTES`].
    pub kind: String,
    /// What it does, for status pages; at most [`crate::limits::MAX_PROVIDED_TEXT_BYTES`].
    pub description: String,
    /// What goes into a call, in words; bounded as `description`.
    pub input_kind: String,
    /// What comes out of a call, in words; bounded as `description`.
    pub output_kind: String,
    /// Names what computes: providers of one id must agree in it, and another value is another model.
    pub fingerprint: u64,
    /// What it can be asked: `Call`, `Embed` (also asked for as `EmbedFresh`) and `Tokenize`; each once, at least one.
    pub operations: Vec<Operation>,
    /// Numbers in a vector where `Embed` is among the operations, else 0.
    pub output_dim: u32,
    /// Longest input in tokens; 0 = it does not count in tokens.
    pub max_seq_tokens: u32,
    /// Jobs that this provider takes at once, 1 to [`crate::limits::MAX_PROVIDER_IN_FLIGHT`].
    pub max_in_flight: u32,
    /// Largest payload of a job, in bytes, 1 to [`crate::limits::MAX_PAYLOAD_BYTES`].
    pub max_input_bytes: u32,
    /// Largest payload of an answer, in bytes, 1 to [`crate::limits::MAX_PAYLOAD_BYTES`].
    pub max_output_bytes: u32,
    /// Longest time for one job, in ms, 1 to [`crate::limits::MAX_PROVIDER_JOB_MS`]. Beyond, the job fails and the
    /// provider is at fault.
    pub job_timeout_ms: u32,
}

/// A job for a provider; answered by [`super::ClientMessage::ProviderAnswer`] with its relay id as `job_id`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProviderJob {
    /// Names the job between broker and provider.
    pub relay_id: u64,
    /// The provided model that it is for.
    pub generation: u64,
    /// What is asked; one of those that were offered.
    pub operation: Operation,
    /// How it is ranked.
    pub priority: Priority,
    /// `CLOCK_MONOTONIC` in ns after which nobody wants the answer; 0 = none.
    pub deadline_ns: u64,
    /// Times that a provider died with it.
    pub attempts: u32,
    /// The client's payload; the broker has not looked into it.
    pub payload: Vec<u8>,
}

/// State of one provided model.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProvidedReport {
    /// Its id.
    pub model_id: String,
    /// Its generation; 0 while it was never offered.
    pub generation: u64,
    /// As offered.
    pub kind: String,
    /// As offered.
    pub description: String,
    /// As offered.
    pub input_kind: String,
    /// As offered.
    pub output_kind: String,
    /// As offered.
    pub operations: Vec<Operation>,
    /// As offered.
    pub output_dim: u32,
    /// As offered.
    pub fingerprint: u64,
    /// Those that offer it now.
    pub providers: Vec<ProviderReport>,
    /// Leases held now.
    pub leases: u32,
    /// Processes that hold them.
    pub lease_pids: Vec<u32>,
    /// Jobs that wait for a provider.
    pub queued_jobs: u32,
    /// Since when nobody offers it, in µs; 0 = somebody does.
    pub absent_us: u64,
    /// Counters.
    pub totals: ProvidedTotals,
    /// The last thing that a provider of it did wrong.
    pub last_fault: Option<String>,
    /// Processes that the broker keeps running for it.
    pub children: Vec<ProviderChildReport>,
}

/// One provider of a model.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProviderReport {
    /// Its session.
    pub session_id: u64,
    /// Its process.
    pub pid: u32,
    /// Jobs that it has.
    pub in_flight: u32,
    /// Jobs that it takes at once.
    pub max_in_flight: u32,
    /// Things it did wrong; at the limit it is dropped.
    pub faults: u32,
    /// It takes no more jobs, and leaves.
    pub withdrawn: bool,
}

/// A provider's process that the broker started.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProviderChildReport {
    /// Process; 0 while it is being replaced.
    pub pid: u32,
    /// Times it was started.
    pub starts: u64,
    /// How the last one ended, or why it could not be started.
    pub last_exit: Option<String>,
}

/// Counters of a provided model, in this broker's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct ProvidedTotals {
    /// Jobs that a provider answered.
    pub jobs: u64,
    /// Of these, with an error.
    pub errors: u64,
    /// Jobs given to another provider because theirs died.
    pub retries: u64,
    /// Jobs that took longer than their provider allows.
    pub timeouts: u64,
    /// Time that answered jobs waited for a provider, in µs, in all.
    pub queue_us: u64,
    /// Time that providers had answered jobs, in µs, in all.
    pub execution_us: u64,
}

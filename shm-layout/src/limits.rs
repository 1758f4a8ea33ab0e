//! Bounds that both sides of a process boundary hold to; `docs/limits.md` names each with the error it gives.
//! Bounds that only one process knows (its queues, its timeouts) live with that process.

/// Largest body of a control frame, in bytes. A job frame may carry one payload of [`MAX_PAYLOAD_BYTES`].
pub const MAX_FRAME_BODY_BYTES: usize = MAX_PAYLOAD_BYTES + 4096;
/// Largest input or output of one job, in bytes: the largest slot class of a lane's arena.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;
/// Most texts in one job.
pub const MAX_TEXTS_PER_JOB: usize = 256;
/// Longest single text, in bytes. Longer ones are refused: a model reads a few thousand tokens at most.
pub const MAX_TEXT_BYTES: usize = 512 * 1024;
/// Longest model name or path, in bytes.
pub const MAX_MODEL_NAME_BYTES: usize = 1024;
/// Longest name a client gives itself, in bytes.
pub const MAX_CLIENT_NAME_BYTES: usize = 128;
/// Longest message inside an error frame, in bytes; longer ones are cut.
pub const MAX_MESSAGE_BYTES: usize = 8192;
/// Most descriptors that may accompany one frame.
pub const MAX_FRAME_DESCRIPTORS: usize = 4;
/// Times a job may have been running when its engine died before it is answered with `JOB_CRASHED_ENGINE`.
pub const MAX_JOB_ATTEMPTS: u32 = 8;
/// After so many attempts a job is run alone, so that it cannot take innocent ones down with it.
pub const ISOLATE_AFTER_ATTEMPTS: u32 = 2;
/// Most labels of a classifier.
pub const MAX_LABELS: usize = 4096;
/// Longest label, name of a prompt, or role in a conversation, in bytes.
pub const MAX_LABEL_BYTES: usize = 128;
/// Most prompts that come with a model.
pub const MAX_PROMPTS: usize = 256;
/// Longest prompt that is put before texts, in bytes.
pub const MAX_PROMPT_BYTES: usize = 4096;
/// Longest that a model's labels and prompts may be together, in bytes.
pub const MAX_FACTS_BYTES: usize = 512 * 1024;
/// Most messages of a conversation.
pub const MAX_CHAT_MESSAGES: usize = 1024;
/// Most stop strings of a generation.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 256;
/// Longest id of a provided model, in bytes.
pub const MAX_PROVIDED_ID_BYTES: usize = 128;
/// Longest word for what kind of model a provider offers, in bytes.
pub const MAX_PROVIDED_KIND_BYTES: usize = 64;
/// Longest description that a provider gives of its model, its input or its output, in bytes.
pub const MAX_PROVIDED_TEXT_BYTES: usize = 512;
/// Most jobs that one provider may take at once.
pub const MAX_PROVIDER_IN_FLIGHT: u32 = 256;
/// Longest time that a provider may allow itself for one job, in ms.
pub const MAX_PROVIDER_JOB_MS: u32 = 600_000;

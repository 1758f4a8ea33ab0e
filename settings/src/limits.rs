//! Bounds on what a configuration may hold. No code.

/// Largest configuration file, bytes. Beyond: refused unread.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most configured models, the two of the defaults counted. Beyond: refused.
pub const MAX_MODELS: usize = 64;
/// Longest id of a configured model, bytes. Beyond: refused.
pub const MAX_ID_BYTES: usize = 64;
/// Longest key, bytes. Beyond: refused, and no near one is looked for.
pub const MAX_KEY_BYTES: usize = 256;
/// Longest name or path, bytes. Beyond: refused.
pub const MAX_TEXT_BYTES: usize = 1024;
/// Deepest nesting of tables in the file. Beyond: refused.
pub const MAX_TABLE_DEPTH: usize = 16;
/// Most problems that are collected and shown; the rest is counted.
pub const MAX_PROBLEMS: usize = 64;
/// Most characters of a bad value that a message shows.
pub const MAX_SHOWN_CHARS: usize = 80;
/// Longest time that a setting may name, seconds: ten years.
pub const MAX_SECONDS: u64 = 315_360_000;
/// Most bytes that a setting may name: a pebibyte.
pub const MAX_BYTES: u64 = 1 << 50;
/// Least memory budget, bytes: below it no model fits.
pub const MIN_BUDGET_BYTES: u64 = 1 << 20;
/// Most compute threads.
pub const MAX_THREADS: u64 = 1024;
/// Most vectors in one cache; the bound of the shared-memory layout.
pub const MAX_CACHE_ENTRIES: u64 = 1 << 20;
/// Most models that may be loaded at once.
pub const MAX_SHARED_MODELS: u64 = 64;
/// Longest vector, numbers.
pub const MAX_DIMENSION: u64 = 1 << 16;
/// Most texts in a batch; the bound of a job.
pub const MAX_BATCH: u64 = 256;
/// Longest input or output of a model, tokens.
pub const MAX_LENGTH_TOKENS: u64 = 1 << 17;
/// Most beams of a beam search.
pub const MAX_BEAMS: u64 = 16;
/// Highest number of a GPU.
pub const MAX_DEVICE: u16 = 255;

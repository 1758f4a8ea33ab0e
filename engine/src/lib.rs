//! Computes: compiles model folders into images and runs encoder models over their pages. Knows no socket.
//!
//! - [`compile`] turns a model folder, which nobody vouches for, into an image: it checks everything and writes through an
//!   [`compile::ImageSink`], so that a file and a memory object are the same to it. Run it in a process that may be killed.
//! - [`model`] loads an image where it lies (no weight is copied) and turns texts into vectors.
//! - [`generate`] loads an image of a generator and turns prompts into texts.
//! - [`verify_image`] checks an image's content hash.
//! - [`set_threads`] sizes the one thread pool that all models of the process compute on.
//!
//! `unsafe` lives in `kernel` alone: reading weights as floats, and calls into code for the CPU found at run time.
#![deny(unsafe_code)]

mod blocks;
pub mod compile;
pub mod config;
pub mod generate;
mod json;
mod kernel;
pub mod model;
mod packing;
mod threads;
pub mod unigram;
mod verify;
pub mod wordpiece;

pub use compile::{CompileError, CompileOptions, CompileProgress, CompileSummary, ImageSink, compile_folder};
pub use generate::{
    ChatMessage, FinishReason, GenerateOptions, Generated, Generation, Generator, GeneratorInfo, Prompt,
};
pub use kernel::{CPU_PATH_VARIABLE, has_native_bf16};
pub use model::{Embeddings, EncodedText, ImageFacts, Model, ModelError, ModelInfo, describe};
pub use threads::{ThreadsError, on_this_thread, set_threads, threads};
pub use verify::{VerifyError, verify_image};

//! The loader process: finds a model, compiles it into an image or takes the image from the cache, and publishes it to
//! the broker. It reads foreign files, so the broker runs it as a child that it can limit and kill; nothing here serves.
//!
//! ```text
//! reference ── model-source ──► folder ── key ──► cached image? ── no ──► engine::compile ──► image file
//!                                                     │ yes                                     │
//!                                                     └──────────► checked ◄────────────────────┘  (a file: see `stamp`)
//!                                                                    │
//!                                           sealed memfd (copy) / the file itself / POSIX shm (copy)
//! ```
#![forbid(unsafe_code)]

mod error;
mod facts;
mod key;
mod load;
mod precision;
mod process;
mod stamp;
mod verify;

pub use error::LoadError;
pub use facts::facts_of_bytes;
pub use load::{LoadRequest, LoadedImage, load_image};
pub use precision::{PrecisionChoice, split_precision};
pub use process::run;
pub use verify::{CachedImage, verify_cached_images};

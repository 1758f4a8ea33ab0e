//! What a worker links: sessions, leases, embedding calls, attach. Thin unless the feature `local` is on.

#![forbid(unsafe_code)]

#[cfg(feature = "local")]
mod attach;
mod client;
mod connect;
mod embeddings;
mod error;
mod fork_cell;
mod job;
mod model;
mod seat;
mod session;
mod settings;
mod split;
mod start;
mod time;

#[cfg(feature = "local")]
pub use attach::AttachedModel;
pub use client::{Client, ClientBuilder};
pub use embeddings::Embeddings;
pub use error::SdkError;
pub use job::Job;
pub use model::Model;
pub use settings::{
    EmbedOptions, LOG_FILE_NAME, ModelRequest, PROGRAM_VARIABLE, Route, SOCKET_FILE_NAME, SOCKET_VARIABLE,
    START_VARIABLE, StartBroker,
};
pub use shm_layout::code::Code;
pub use shm_layout::payload::PayloadError;
pub use shm_layout::wire::{LoadProgress, ModelDescription, Priority, StatusReport, Welcome};
pub use shm_os::socket::AllowedPeer;

//! The control plane: images, leases, sessions, lanes, limits, supervision. Computes nothing, parses no foreign file, and
//! is not in the path of a job that travels in a lane.
//!
//! | module | what lives there |
//! |---|---|
//! | `config` | settings and every bound |
//! | `core` | every decision, as one state machine without I/O: events in, actions out |
//! | `io` | sockets, child processes and descriptors around it: one thread, one poller |
//! | `reloaded` | what a configuration that is read again can change |
//! | `server` | start and end: folder, lock, socket, signals |
//!
//! What must not be here: model folders, tokenizers, kernels, HTTP, unsafe code, a second
//! thread but the one that waits for a configuration to be read again.
#![forbid(unsafe_code)]

mod config;
mod core;
mod error;
mod io;
mod reloaded;
mod server;

pub use config::{
    BrokerConfig, DEFAULT_CACHE_ENTRIES, DEFAULT_CACHE_TTL, DEFAULT_MAX_SHARED_MODELS, DEFAULT_UNLOAD_AFTER,
    DeviceChoice, Limits, ModelKind, ModelSettings, ProviderCommand, UnknownDevice, UnknownKind,
};
pub use error::BrokerError;
pub use reloaded::{LiveSettings, ReadAgain, Reloaded};
pub use server::run;

//! The broker with real sockets and real processes: itself, a scripted engine and a scripted loader
//! (`tests/support/child.rs`).

mod client;
mod engines;
mod jobs;
mod lifecycle;
mod loads;
mod process;
mod sessions;

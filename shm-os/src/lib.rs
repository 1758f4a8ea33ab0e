//! The operating system's side of sharing: memory objects, mappings, seals, doorbells, descriptor passing,
//! credentials, processes. What lies *inside* a region (layouts, rings, indices) must not be known here.
//!
//! Beside `shm-layout` this is the only crate for unsafe system work; everything it exports is safe to call, and
//! each `unsafe` block names the invariant that it stands on. Linux is the platform; only the POSIX
//! shared-memory backing is portable in principle.

#[cfg(not(target_os = "linux"))]
compile_error!(
    "shm-os needs Linux: sealed memfds, pidfds, epoll and /proc have no portable counterpart here"
);

pub mod cache_mapping;
pub mod doorbell;
mod error;
pub mod fork;
pub mod framed;
pub mod futex;
pub mod image_backing;
pub mod lane_mapping;
pub mod mapping;
pub mod memfd;
pub mod poller;
pub mod private_files;
pub mod process;
pub mod run_dir;
pub mod sigbus;
pub mod smaps;
pub mod socket;

pub use doorbell::Doorbell;
pub use error::OsError;
pub use fork::{current_pid_cached, fork_generation};
pub use mapping::{ReadOnlyMapping, SharedMapping, live_mappings};
pub use poller::{Interest, PollEvent, Poller};

//! The control plane: images, leases, sessions, lanes, limits, supervision. Computes nothing and parses no foreign file.
#![forbid(unsafe_code)]

mod config;
mod core;

pub use config::{BrokerConfig, Limits};

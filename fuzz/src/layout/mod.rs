//! Entry points over `shm-layout`: each takes any bytes, uses them as a peer would write them, and panics when a promise
//! of that crate does not hold. Also the seeds of each target.

pub mod frames;
pub mod image;
pub mod lane_client;
pub mod lane_engine;
mod lane_support;
pub mod payload;
mod reader;
pub mod saved;

/// A target's name, its entry point, and the inputs it starts from.
pub struct Target {
    /// Name of the target and of its corpus folder.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Named inputs to start from.
    pub seeds: fn() -> Vec<(String, Vec<u8>)>,
}

/// Every target of this module.
#[must_use]
pub fn targets() -> Vec<Target> {
    vec![
        Target { name: "image", run: image::run, seeds: image::seeds },
        Target { name: "frames", run: frames::run, seeds: frames::seeds },
        Target { name: "lane_engine", run: lane_engine::run, seeds: lane_engine::seeds },
        Target { name: "lane_client", run: lane_client::run, seeds: lane_client::seeds },
        Target { name: "payload", run: payload::run, seeds: payload::seeds },
        Target { name: "saved", run: saved::run, seeds: saved::seeds },
    ]
}

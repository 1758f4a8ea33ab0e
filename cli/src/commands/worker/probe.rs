//! Worker processes that get the model in one of three ways, use it once, and stay while the parent reads their memory
//! from /proc. What the figures mean is the parent's affair.

use super::{read_plan, say, wait_for_end_of_stdin};
use crate::failure::{Exit, Failure};
use serde::{Deserialize, Serialize};
use shm_layout::image::{HeapImage, ImageBytes};
use shm_os::image_backing::{BackingKind, map_published};
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use worker_sdk::{Client, EmbedOptions, StartBroker};

/// What a worker is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProbePlan {
    /// Texts of its one request.
    pub(crate) texts: Vec<String>,
    /// The compiled image that a private worker reads; others get theirs from the broker.
    pub(crate) image: Option<PathBuf>,
}

/// What a worker found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProbeReport {
    /// Its process.
    pub(crate) pid: u32,
    /// From nothing to a model that is ready for texts: connect and lease (thin), map as well (attached), or read the
    /// weights into memory of its own (private).
    pub(crate) ready_us: u64,
    /// The first request.
    pub(crate) first_embed_us: u64,
    /// Where a private worker holds its weights: address and length in bytes.
    pub(crate) own_weights: Option<(u64, u64)>,
    /// The first vector, so that the ways can be compared.
    pub(crate) first_vector: Vec<f32>,
}

/// Connects and leases; the engine computes.
pub(crate) fn thin(socket: Option<PathBuf>, model: &str) -> Result<(), Failure> {
    let plan: ProbePlan = read_plan()?;
    let begun = Instant::now();
    let client = connect(socket)?;
    let model = client.model(&crate::commands::model_name(model))?;
    let ready = begun.elapsed();
    let begun = Instant::now();
    let vectors = model.embed_with(&plan.texts, &EmbedOptions::default().bypass_cache(true))?;
    report(ready, begun.elapsed(), vectors.values(), vectors.dim(), None)
}

/// Maps the shared image and computes in this process.
pub(crate) fn attached(socket: Option<PathBuf>, model: &str) -> Result<(), Failure> {
    let plan: ProbePlan = read_plan()?;
    let begun = Instant::now();
    let client = connect(socket)?;
    let attached = client.model(&crate::commands::model_name(model))?.attach()?;
    let ready = begun.elapsed();
    let begun = Instant::now();
    let vectors = attached.embed_with(&plan.texts, &EmbedOptions::default().bypass_cache(true))?;
    report(ready, begun.elapsed(), vectors.values(), vectors.dim(), None)
}

/// Loads the weights into memory of its own, as every process does that shares nothing.
pub(crate) fn private() -> Result<(), Failure> {
    let plan: ProbePlan = read_plan()?;
    let path =
        plan.image.ok_or_else(|| Failure::new(Exit::Usage, "a private worker needs the path of an image"))?;
    let begun = Instant::now();
    let image = Arc::new(read_image(&path)?);
    let own_weights = (image.as_bytes().as_ptr() as u64, image.as_bytes().len() as u64);
    let failed = |error: engine::ModelError| Failure::new(Exit::Model, error.to_string());
    let model = engine::Model::load(image).map_err(failed)?;
    model.warm().map_err(failed)?;
    let ready = begun.elapsed();
    let begun = Instant::now();
    let texts: Vec<&str> = plan.texts.iter().map(String::as_str).collect();
    let vectors = model.embed(&texts).map_err(failed)?;
    report(ready, begun.elapsed(), &vectors.values, vectors.dim, Some(own_weights))
}

fn connect(socket: Option<PathBuf>) -> Result<Client, Failure> {
    Ok(crate::commands::client(socket, "worker", Some(StartBroker::Never)).connect()?)
}

/// The image's bytes on the heap.
fn read_image(path: &Path) -> Result<HeapImage, Failure> {
    let file = File::open(path)
        .map_err(|e| Failure::new(Exit::Failed, format!("opening the image {}: {e}", path.display())))?;
    let mapping = map_published(file.as_fd(), BackingKind::ImageFile, file.metadata()?.len())
        .map_err(|e| Failure::new(Exit::Model, e.to_string()))?;
    Ok(HeapImage::new(mapping.as_bytes()))
}

/// Says what was measured; returns, and so lets go of the model, when the parent has seen enough.
fn report(
    ready: Duration,
    first_embed: Duration,
    values: &[f32],
    dim: usize,
    own_weights: Option<(u64, u64)>,
) -> Result<(), Failure> {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    say(&ProbeReport {
        pid: std::process::id(),
        ready_us: micros(ready),
        first_embed_us: micros(first_embed),
        own_weights,
        first_vector: values.get(..dim).unwrap_or_default().to_vec(),
    })?;
    wait_for_end_of_stdin();
    Ok(())
}

//! A model that computes in this process, on an image that is mapped here. Where the image comes from is the callers' affair.

use crate::embeddings::Embeddings;
use crate::error::SdkError;
use shm_layout::image::ImageBytes;
use shm_layout::wire::TaskFacts;
use shm_os::ReadOnlyMapping;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Texts computed between two looks at the caller's list; bounds what tokenization holds at once.
const TEXTS_AT_ONCE: usize = 256;

/// The fork generation in which this process first computed. The engine's threads belong to it: they do not survive a
/// fork, and work handed to threads that are gone is never done.
static COMPUTES_IN: AtomicU64 = AtomicU64::new(0);

/// Refuses where computing can never end: in a child of a process that had computed.
pub(crate) fn check_process() -> Result<(), SdkError> {
    match COMPUTES_IN.load(Ordering::Relaxed) {
        0 => Ok(()),
        of if of == shm_os::fork_generation() => Ok(()),
        _ => Err(SdkError::Local(
            "the process that forked this one had computed already, and its compute threads are not here: \
             attach after the fork only, or use embed()"
                .into(),
        )),
    }
}

/// The mapping neither moves nor changes: what its backing promises was checked when it was mapped.
#[derive(Debug)]
struct MappedImage(ReadOnlyMapping);

impl ImageBytes for MappedImage {
    fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// A model on a mapped image.
#[derive(Debug)]
pub(crate) struct Computer {
    engine: engine::Model,
    image: Arc<MappedImage>,
    facts: TaskFacts,
    /// The process that may compute with it.
    generation: u64,
}

impl Computer {
    /// Takes up the model in a mapped image; nothing is copied.
    pub(crate) fn new(mapping: ReadOnlyMapping) -> Result<Computer, SdkError> {
        let image = Arc::new(MappedImage(mapping));
        let shared: Arc<dyn ImageBytes> = Arc::<MappedImage>::clone(&image);
        let engine =
            engine::Model::load(shared).map_err(|error| SdkError::Local(error.to_string().into()))?;
        let facts =
            model_loader::facts_of_bytes(image.as_bytes()).map_err(|what| SdkError::Local(what.into()))?;
        Ok(Computer { engine, image, facts, generation: shm_os::fork_generation() })
    }

    pub(crate) fn info(&self) -> &engine::ModelInfo {
        self.engine.info()
    }

    /// What the model is for.
    pub(crate) fn facts(&self) -> &TaskFacts {
        &self.facts
    }

    pub(crate) fn image_bytes(&self) -> usize {
        self.image.0.len_bytes()
    }

    /// False in a forked child.
    pub(crate) fn belongs_to_this_process(&self) -> bool {
        self.generation == shm_os::fork_generation()
    }

    /// Checks that every byte of the image is what its compiler wrote.
    pub(crate) fn verify(&self) -> Result<(), SdkError> {
        engine::verify_image(self.image.as_bytes()).map_err(|error| SdkError::Local(error.to_string().into()))
    }

    pub(crate) fn warm(&self) -> Result<(), SdkError> {
        self.compute(|engine| engine.warm())
    }

    pub(crate) fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Embeddings, SdkError> {
        let info = self.engine.info();
        let mut all = Embeddings::with_capacity(info.output_dim, info.fingerprint, texts.len());
        for some in texts.chunks(TEXTS_AT_ONCE) {
            let some: Vec<&str> = some.iter().map(AsRef::as_ref).collect();
            let rows = self.compute(|engine| engine.embed(&some))?;
            let cached = vec![false; some.len()];
            all.append(Embeddings::from_parts(rows.dim, info.fingerprint, cached, rows.values));
        }
        Ok(all)
    }

    pub(crate) fn token_spans<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<Range<usize>>>, SdkError> {
        self.compute(|engine| texts.iter().map(|text| engine.token_spans(text.as_ref())).collect())
    }

    fn compute<R>(
        &self,
        work: impl FnOnce(&engine::Model) -> Result<R, engine::ModelError>,
    ) -> Result<R, SdkError> {
        if !self.belongs_to_this_process() {
            return Err(SdkError::Forked);
        }
        COMPUTES_IN.store(self.generation, Ordering::Relaxed);
        let outcome = work(&self.engine).map_err(|error| SdkError::Local(error.to_string().into()));
        if self.image.0.is_poisoned() {
            // Zeros were read in place of weights.
            return Err(SdkError::Local(
                "the model's image file was cut while it was in use: attach again".into(),
            ));
        }
        outcome
    }
}

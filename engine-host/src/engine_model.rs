//! The crate `engine` behind the host's traits: maps an image and computes on its pages.

use crate::compute::{Compute, ComputeError, Loader, ModelFacts, ReceivedImage, Vectors};
use engine::{EncodedText, Model, ModelError};
use shm_layout::cache::saved_identity;
use shm_layout::code::Code;
use shm_layout::image::ImageBytes;
use shm_layout::wire;
use shm_os::ReadOnlyMapping;
use shm_os::image_backing::{BackingKind, map_published};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Length of an image from which on its first probe waits until the first answer is out.
const LATE_PROBE_BYTES: u64 = 512 << 20;

/// Loads images with the crate `engine`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct EngineLoader;

/// A mapped image. The mapping neither moves nor changes: its backing was checked when it was mapped.
#[derive(Debug)]
struct MappedImage(ReadOnlyMapping);

impl ImageBytes for MappedImage {
    fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// A model on its mapped image.
#[derive(Debug)]
pub(crate) struct EngineModel {
    model: Model,
    image: Arc<MappedImage>,
    /// Whether it was probed: what later probes are compared with is there.
    probed: AtomicBool,
}

impl EngineModel {
    /// An error when the file under the image was cut while it was computed on: zeros were read then.
    fn check_image(&self) -> Result<(), ComputeError> {
        if self.image.0.is_poisoned() {
            return Err(ComputeError::new(
                Code::ModelUnavailable,
                "the model's image file was cut while it was in use",
            ));
        }
        Ok(())
    }
}

impl Loader for EngineLoader {
    type Model = EngineModel;

    fn load(&self, image: ReceivedImage) -> Result<EngineModel, ComputeError> {
        let kind = match image.backing {
            wire::BackingKind::SealedMemfd => BackingKind::SealedMemfd,
            wire::BackingKind::ImageFile => BackingKind::ImageFile,
            wire::BackingKind::PosixShm => BackingKind::PosixShm,
        };
        let mapping = map_published(image.fd.as_fd(), kind, image.len_bytes).map_err(|error| {
            tracing::warn!(%error, "an image cannot be mapped");
            ComputeError::new(Code::ModelLoadError, format!("the engine cannot map the image: {error}"))
        })?;
        mapping.exclude_from_dumps();
        let image = Arc::new(MappedImage(mapping));
        let model = Model::load(Arc::clone(&image) as Arc<dyn ImageBytes>).map_err(|error| {
            ComputeError::new(Code::ModelInvalid, format!("the engine cannot use the image: {error}"))
        })?;
        let loaded = EngineModel { model, image, probed: AtomicBool::new(false) };
        if loaded.model.info().image_bytes < LATE_PROBE_BYTES {
            // Builds the tokenizer, shows that the model computes, and is what later probes are compared with.
            loaded.probe()?;
        } else {
            // Reading all weights takes as long as the first answer: that comes first, and is checked as every one is.
            loaded.model.warm().map_err(|error| ComputeError::new(Code::ModelInvalid, error.to_string()))?;
        }
        Ok(loaded)
    }
}

impl Compute for EngineModel {
    type Prepared = EncodedText;

    fn facts(&self) -> ModelFacts {
        let info = self.model.info();
        ModelFacts {
            dim: info.output_dim,
            max_seq_tokens: info.max_seq_tokens,
            fingerprint: info.fingerprint,
            // Another version of this program may compute other last bits.
            identity: saved_identity(&[
                &info.content_hash,
                info.cpu_path.as_bytes(),
                env!("CARGO_PKG_VERSION").as_bytes(),
            ]),
        }
    }

    fn prepare(&self, texts: &[&str]) -> Result<Vec<EncodedText>, ComputeError> {
        self.model.encode(texts).map_err(|error| refusal(&error))
    }

    fn tokens(prepared: &EncodedText) -> usize {
        prepared.ids().len()
    }

    fn forward(&self, prepared: &[&EncodedText]) -> Result<Vectors, ComputeError> {
        self.forward_with_breaks(prepared, &|| {})
    }

    fn on_this_thread<R>(&self, work: impl FnOnce() -> R) -> R {
        engine::on_this_thread(work)
    }

    fn forward_with_breaks(
        &self,
        prepared: &[&EncodedText],
        breaks: &(dyn Fn() + Sync),
    ) -> Result<Vectors, ComputeError> {
        let embeddings = self.model.forward_with_breaks(prepared, breaks).map_err(|error| refusal(&error))?;
        self.check_image()?;
        Ok(Vectors { dim: embeddings.dim, values: embeddings.values })
    }

    fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>, ComputeError> {
        self.model.token_spans(text).map_err(|error| refusal(&error))
    }

    fn wants_probe(&self) -> bool {
        !self.probed.load(Ordering::Relaxed)
    }

    fn probe(&self) -> Result<(), ComputeError> {
        self.model.probe().map_err(|error| ComputeError::new(Code::ModelInvalid, error.to_string()))?;
        self.check_image()?;
        self.probed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// What a client is told. Not the engine's own words: its text numbers count in the batch, where other clients' texts
/// stand too.
fn refusal(error: &ModelError) -> ComputeError {
    let (code, message) = match error {
        ModelError::TextTooLong { .. } => {
            (Code::TooLarge, "a text is over the limit; split it into passages")
        }
        ModelError::BadVector { .. } => {
            (Code::BadResult, "a vector failed the engine's checks (finite, of norm one) and is withheld")
        }
        ModelError::Tokenizer { .. } => (Code::Internal, "the model's tokenizer failed on a text"),
        ModelError::TokenId { .. } | ModelError::TokenCount { .. } => {
            (Code::Internal, "the model's tokenizer gave tokens that the model does not have")
        }
        _ => (Code::Internal, "the model failed on this input"),
    };
    tracing::warn!(%code, "a batch was refused by the model");
    ComputeError::new(code, message)
}

//! The crate `engine` behind the host's traits: maps an image and computes on its pages, whether it holds a model that reads
//! texts or one that writes them.

use crate::compute::{Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors};
use engine::{ChatMessage, FinishReason, GenerateOptions, Generation, Generator, Prompt};
use engine::{EncodedText, Model, ModelError};
use shm_layout::cache::saved_identity;
use shm_layout::code::Code;
use shm_layout::image::{CheckedImage, ImageBytes, Task};
use shm_layout::wire::{self, GeneratePrompt, GenerateRequest, GenerateSettings};
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

/// What computes.
enum Kind {
    /// Texts to vectors or scores.
    Reader(Box<Model>),
    /// Texts to texts.
    Writer(Box<Generator>),
}

/// A model on its mapped image.
pub(crate) struct EngineModel {
    kind: Kind,
    image: Arc<MappedImage>,
    /// Whether it was probed: what later probes are compared with is there.
    probed: AtomicBool,
}

impl std::fmt::Debug for EngineModel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("EngineModel").field("facts", &self.facts()).finish_non_exhaustive()
    }
}

fn wrong_task() -> ComputeError {
    ComputeError::new(Code::WrongTask, "the model is not for this")
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

    fn reader(&self) -> Result<&Model, ComputeError> {
        match &self.kind {
            Kind::Reader(model) => Ok(model),
            Kind::Writer(_) => Err(wrong_task()),
        }
    }

    fn writer(&self) -> Result<&Generator, ComputeError> {
        match &self.kind {
            Kind::Writer(model) => Ok(model),
            Kind::Reader(_) => Err(wrong_task()),
        }
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
        let bytes = || Arc::clone(&image) as Arc<dyn ImageBytes>;
        let unusable = |error: &dyn std::fmt::Display| {
            ComputeError::new(Code::ModelInvalid, format!("the engine cannot use the image: {error}"))
        };
        let task =
            CheckedImage::new(image.as_bytes()).map_err(|error| unusable(&error))?.header().values().task;
        let kind = match task {
            Task::Embed | Task::Classify => {
                Kind::Reader(Box::new(Model::load(bytes()).map_err(|error| unusable(&error))?))
            }
            Task::TextToText | Task::Chat => {
                Kind::Writer(Box::new(Generator::load(bytes()).map_err(|error| unusable(&error))?))
            }
        };
        let loaded = EngineModel { kind, image, probed: AtomicBool::new(false) };
        match &loaded.kind {
            // Reading all weights takes as long as the first answer: that comes first, and is checked as every one is.
            Kind::Reader(model) if model.info().image_bytes >= LATE_PROBE_BYTES => {
                model.warm().map_err(|error| ComputeError::new(Code::ModelInvalid, error.to_string()))?;
            }
            // Builds the tokenizer, shows that the model computes, and is what later probes are compared with.
            _ => loaded.probe()?,
        }
        Ok(loaded)
    }
}

impl Generating for Generation {
    fn is_done(&self) -> bool {
        self.is_done()
    }

    fn take_text(&mut self) -> String {
        self.take_text()
    }

    fn text(&self) -> String {
        self.text()
    }

    fn token_ids(&self) -> &[u32] {
        self.token_ids()
    }

    fn finish(&self) -> Option<wire::FinishReason> {
        self.finish_reason().map(|reason| match reason {
            FinishReason::Stop => wire::FinishReason::Stop,
            FinishReason::Length => wire::FinishReason::Length,
        })
    }

    fn prompt_tokens(&self) -> usize {
        self.prompt_tokens()
    }

    fn output_tokens(&self) -> usize {
        self.output_tokens()
    }
}

fn options(settings: &GenerateSettings) -> GenerateOptions {
    GenerateOptions {
        max_input_tokens: settings.max_input_tokens.map(|tokens| tokens as usize),
        max_output_tokens: settings.max_output_tokens as usize,
        min_output_tokens: settings.min_output_tokens as usize,
        num_beams: settings.num_beams as usize,
        early_stopping: settings.early_stopping,
        length_penalty: settings.length_penalty,
        no_repeat_ngram_size: settings.no_repeat_ngram_size as usize,
        repetition_penalty: settings.repetition_penalty,
        do_sample: settings.do_sample,
        temperature: settings.temperature,
        top_k: settings.top_k as usize,
        top_p: settings.top_p,
        seed: settings.seed,
        stop: settings.stop.clone(),
    }
}

impl Compute for EngineModel {
    type Prepared = EncodedText;
    type Run = Generation;

    fn prepare_pairs(&self, query: &str, texts: &[&str]) -> Result<Vec<EncodedText>, ComputeError> {
        self.reader()?.encode_pairs(query, texts).map_err(|error| refusal(&error))
    }

    fn begin(&self, request: &GenerateRequest) -> Result<Generation, ComputeError> {
        let options = options(&request.settings);
        let begun = match &request.prompt {
            GeneratePrompt::Text(text) => self.writer()?.begin(&Prompt::Text(text), &options),
            GeneratePrompt::Chat(messages) => {
                let message = |message: &wire::ChatMessage| ChatMessage {
                    role: message.role.clone(),
                    content: message.content.clone(),
                };
                let messages: Vec<ChatMessage> = messages.iter().map(message).collect();
                self.writer()?.begin(&Prompt::Chat(&messages), &options)
            }
        };
        // One client's affair alone: its own words say what to change.
        begun.map_err(|error| refusal_to_one(&error))
    }

    fn step(&self, runs: &mut [&mut Generation]) -> Result<(), ComputeError> {
        self.writer()?.step(runs).map_err(|error| refusal(&error))?;
        self.check_image()
    }

    fn facts(&self) -> ModelFacts {
        let (task, dim, max_seq_tokens, fingerprint, content_hash, cpu_path) = match &self.kind {
            Kind::Reader(model) => {
                let info = model.info();
                let dims = (info.task, info.output_dim, info.max_seq_tokens);
                (dims.0, dims.1, dims.2, info.fingerprint, info.content_hash, info.cpu_path)
            }
            Kind::Writer(model) => {
                let info = model.info();
                // It gives no vectors; one number is the least that a vector may have.
                (info.task, 1, info.max_input_tokens, info.fingerprint, info.content_hash, info.cpu_path)
            }
        };
        ModelFacts {
            task,
            dim,
            max_seq_tokens,
            fingerprint,
            // Another version of this program may compute other last bits.
            identity: saved_identity(&[
                &content_hash,
                cpu_path.as_bytes(),
                env!("CARGO_PKG_VERSION").as_bytes(),
            ]),
        }
    }

    fn prepare(&self, texts: &[&str]) -> Result<Vec<EncodedText>, ComputeError> {
        self.reader()?.encode(texts).map_err(|error| refusal(&error))
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
        let embeddings =
            self.reader()?.forward_with_breaks(prepared, breaks).map_err(|error| refusal(&error))?;
        self.check_image()?;
        Ok(Vectors { dim: embeddings.dim, values: embeddings.values })
    }

    fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>, ComputeError> {
        self.reader()?.token_spans(text).map_err(|error| refusal(&error))
    }

    fn wants_probe(&self) -> bool {
        !self.probed.load(Ordering::Relaxed)
    }

    fn probe(&self) -> Result<(), ComputeError> {
        let probed = match &self.kind {
            Kind::Reader(model) => model.probe(),
            Kind::Writer(model) => model.probe(),
        };
        probed.map_err(|error| ComputeError::new(Code::ModelInvalid, error.to_string()))?;
        self.check_image()?;
        self.probed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// What the one client is told that asked for a text.
fn refusal_to_one(error: &ModelError) -> ComputeError {
    let code = match error {
        ModelError::Option { .. } | ModelError::Template { .. } | ModelError::TokenCount { .. } => {
            Code::BadPayload
        }
        ModelError::KvMemory { .. } => Code::Overloaded,
        other => return refusal(other),
    };
    ComputeError::new(code, error.to_string())
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

//! A model at work: loads an image where it lies and turns texts into vectors. Batching policy and result checks live here.
//!
//! Texts of a batch are packed one behind the other, without padding, so mixed lengths cost nothing and need no sorting.

mod describe;
mod error;
mod network;
mod ops;
mod tokenize;

pub use describe::{ImageFacts, describe};
pub use error::ModelError;
pub use tokenize::{EncodedText, MAX_TEXT_BYTES};

pub(crate) use tokenize::TextEncoder;

use crate::config::EncoderConfig;
use crate::kernel::{Breaks, Lookup, path_name, release_all_scratch};
use crate::packing::Precision;
use crate::threads::pool;
use crate::unigram::Unigram;
use crate::wordpiece::file::pair_fringes_of;
use network::{Network, Packed};
use shm_layout::image::{
    CheckedImage, Family, ImageBytes, ImageError, Pooling, SectionKind, TENSOR_ALIGN_BYTES, Task,
};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Most tokens that are computed at once, longer single texts apart. Bounds the memory of activations; more gains nothing.
pub const MAX_BATCH_TOKENS: usize = 2048;
/// Tokens from which on a batch is computed on all threads; below it waking them costs more than they save.
const MIN_PARALLEL_TOKENS: usize = 8;
/// Length of an image from which on any batch is computed on all threads.
const MIN_PARALLEL_BYTES: u64 = 512 << 20;
/// Tokens of the probe: each weight is used by any one, and more would only take longer at every load.
const PROBE_TOKENS: usize = 8;
/// Texts from which on tokenization is spread over all threads.
const MIN_PARALLEL_TEXTS: usize = 8;
/// How far the norm of a normalised vector may be from one.
const NORM_TOLERANCE: f32 = 1e-3;
/// The probe's text: some words, some numbers, more than one script.
const PROBE_TEXT: &str = "The quick brown fox jumps over 13 lazy dogs; 敏捷的棕色狐狸.";

/// What a loaded model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The id it was compiled under.
    pub id: String,
    /// Model family.
    pub family: Family,
    /// What the model is for: vectors of texts, or scores of texts and pairs of texts.
    pub task: Task,
    /// Width of the hidden state.
    pub hidden_dim: usize,
    /// Number of encoder layers.
    pub layer_count: usize,
    /// Length of an output vector; number of labels of a classifier.
    pub output_dim: usize,
    /// Longest sequence in tokens, special tokens included; longer texts are cut.
    pub max_seq_tokens: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Pooling modes.
    pub pooling: Pooling,
    /// Whether vectors have norm one.
    pub normalize: bool,
    /// Precision of the matrices.
    pub precision: Precision,
    /// Length of the image, bytes.
    pub image_bytes: u64,
    /// BLAKE3 content hash of the image.
    pub content_hash: [u8; 32],
    /// Name of the CPU path that computes.
    pub cpu_path: &'static str,
    /// Names weights, tokenizer, pooling and precision; with equal [`ModelInfo::cpu_path`] as well, vectors are equal
    /// bit for bit.
    pub fingerprint: u64,
}

impl ModelInfo {
    /// The fingerprint as 16 hexadecimal digits.
    pub fn fingerprint_hex(&self) -> String {
        format!("{:016x}", self.fingerprint)
    }
}

/// Vectors of several texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// Length of one vector.
    pub dim: usize,
    /// All vectors one behind the other, in the order of the texts.
    pub values: Vec<f32>,
}

impl Embeddings {
    /// The vectors.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f32]> {
        self.values.chunks_exact(self.dim)
    }
}

/// A model, ready to compute. Shared by any number of threads; its weights stay in the image.
pub struct Model {
    image: Arc<dyn ImageBytes>,
    info: ModelInfo,
    network: Network,
    lower_case: bool,
    text_encoder: OnceLock<Result<TextEncoder, ModelError>>,
    probe: OnceLock<Vec<f32>>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Model").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Model {
    /// Loads an image: checks its structure and finds its weights, copying none; well under a millisecond for any size. The
    /// tokenizer is built at the first text, or by [`Model::warm`].
    ///
    /// Whether the content is what the compiler wrote is not checked here; see [`crate::verify_image`].
    ///
    /// # Errors
    /// [`ModelError`] when the image is malformed or contradicts itself.
    pub fn load(image: Arc<dyn ImageBytes>) -> Result<Model, ModelError> {
        let bytes = image.as_bytes();
        if !(bytes.as_ptr() as usize).is_multiple_of(TENSOR_ALIGN_BYTES as usize) {
            return Err(ImageError::Misaligned.into());
        }
        let checked = CheckedImage::new(bytes)?;
        let inconsistent = |what: &str| ModelError::Inconsistent { what: what.to_owned() };
        let section = |kind: SectionKind, name: &str| {
            checked
                .section(kind)
                .ok_or_else(|| ModelError::Inconsistent { what: format!("section {name} is missing") })
        };
        let mut config = EncoderConfig::from_json(section(SectionKind::Config, "config.json")?)?;
        section(SectionKind::Tokenizer, "tokenizer.json")?;
        let id = std::str::from_utf8(section(SectionKind::ModelId, "model id")?)
            .map_err(|_| inconsistent("the model id is not UTF-8"))?
            .to_owned();
        let header = checked.header().values();
        if header.task == Task::Embed {
            // The encoder of a classifier may be embedded with.
            config.classifier = None;
        }
        let agrees = config.family == header.family
            && config.hidden_dim == header.hidden_dim as usize
            && config.layer_count == header.layer_count as usize
            && config.vocab_size == header.vocab_size as usize
            && header.task == config.task()
            && (header.task == Task::Embed || !header.normalize)
            && header.max_seq_tokens as usize <= config.max_tokens();
        if !agrees {
            return Err(inconsistent("the header contradicts config.json"));
        }
        let info = ModelInfo {
            id,
            family: header.family,
            task: header.task,
            hidden_dim: config.hidden_dim,
            layer_count: config.layer_count,
            output_dim: header.output_dim as usize,
            max_seq_tokens: header.max_seq_tokens as usize,
            vocab_size: config.vocab_size,
            pooling: header.pooling,
            normalize: header.normalize,
            image_bytes: header.total_bytes,
            content_hash: header.content_hash,
            precision: header.precision,
            cpu_path: path_name(),
            fingerprint: header.fingerprint(),
        };
        let network = Network::new(&image, &checked, config)?;
        let lower_case = header.lower_case;
        drop(checked);
        Ok(Model { image, info, network, lower_case, text_encoder: OnceLock::new(), probe: OnceLock::new() })
    }

    /// What the model is.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Builds the tokenizer now, some milliseconds, instead of at the first text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when it can't be built.
    pub fn warm(&self) -> Result<(), ModelError> {
        self.text_encoder().map(|_| ())
    }

    fn text_encoder(&self) -> Result<&TextEncoder, ModelError> {
        let build = || {
            let checked = CheckedImage::new(self.image.as_bytes())?;
            let missing = || ModelError::Inconsistent { what: "section tokenizer.json is missing".into() };
            let json = checked.section(SectionKind::Tokenizer).ok_or_else(missing)?;
            // Tables that cannot be read are as good as none: the library reads the file that they were made from.
            if let Some(range) = checked.section(SectionKind::TokenizerTables).and_then(|t| self.place(t))
                && let Some(tables) = Unigram::open(Arc::clone(&self.image), range)
            {
                // The tables do not say how two texts are put together; to find it the whole file is read.
                let pair = (self.info.task == Task::Classify).then(|| pair_fringes_of(json)).flatten();
                return TextEncoder::over_tables(tables, self.network.config(), self.info.max_seq_tokens, pair);
            }
            TextEncoder::new(json, self.network.config(), self.info.max_seq_tokens, self.lower_case)
        };
        self.text_encoder.get_or_init(build).as_ref().map_err(ModelError::clone)
    }

    /// Where a section lies in the image.
    fn place(&self, section: &[u8]) -> Option<Range<usize>> {
        let start = (section.as_ptr() as usize).checked_sub(self.image.as_bytes().as_ptr() as usize)?;
        Some(start..start.checked_add(section.len())?)
    }

    /// Tokenizes texts, each cut to the model's length. Texts may hold special tokens' names; they count as those tokens.
    ///
    /// # Errors
    /// [`ModelError`] naming the first text that is too long (over [`MAX_TEXT_BYTES`]) or that gives a token id that the
    /// model does not have.
    pub fn encode(&self, texts: &[&str]) -> Result<Vec<EncodedText>, ModelError> {
        use rayon::prelude::*;
        let encoder = self.text_encoder()?;
        pool().run(texts.len() >= MIN_PARALLEL_TEXTS, |threads| {
            if threads > 1 {
                texts.par_iter().enumerate().map(|(index, text)| encoder.encode(index, text)).collect()
            } else {
                texts.iter().enumerate().map(|(index, text)| encoder.encode(index, text)).collect()
            }
        })
    }

    /// Tokenizes pairs of the query and each text, as the model's tokenizer puts two texts together. A pair that is too long is cut
    /// as transformers does with `truncation=True` (`longest_first`): the longer of the two first, then both to about a half.
    ///
    /// # Errors
    /// As [`Model::encode`], where text 0 is the query and text `n` is `texts[n - 1]`; [`ModelError::Tokenizer`] when the tokenizer
    /// has no form for pairs.
    pub fn encode_pairs(&self, query: &str, texts: &[&str]) -> Result<Vec<EncodedText>, ModelError> {
        use rayon::prelude::*;
        let encoder = self.text_encoder()?;
        let first = encoder.tokens(0, query)?;
        let pair = |(index, text): (usize, &&str)| {
            encoder.tokens(index + 1, text).and_then(|second| encoder.pair(&first, &second))
        };
        pool().run(texts.len() >= MIN_PARALLEL_TEXTS, |threads| {
            if threads > 1 {
                texts.par_iter().enumerate().map(pair).collect()
            } else {
                texts.iter().enumerate().map(pair).collect()
            }
        })
    }

    /// Byte ranges in `text` of all its tokens, in order, without special tokens and without cutting. For splitting documents
    /// by the model's own tokens. At most [`MAX_TEXT_BYTES`] ranges, as texts are bounded.
    ///
    /// # Errors
    /// [`ModelError`] when the text is too long or the tokenizer fails.
    pub fn token_spans(&self, text: &str) -> Result<Vec<Range<usize>>, ModelError> {
        self.text_encoder()?.spans(text)
    }

    /// Computes the vectors of encoded texts, in their order; of a classifier the logits of texts or pairs, a number for each label, to
    /// which no activation was applied. A vector is the same bit for bit in any batch.
    ///
    /// # Errors
    /// [`ModelError`] when a text was encoded by another model, or a result is not a finite vector (of norm one, where the
    /// model normalises): such a result is never returned.
    pub fn forward(&self, batch: &[&EncodedText]) -> Result<Embeddings, ModelError> {
        self.forward_with_breaks(batch, &|| {})
    }

    /// As [`Model::forward`]. Threads that compute call `breaks` some times in a millisecond, each for itself, and go on when it
    /// returns: something urgent can be computed there, inside of [`crate::on_this_thread`], without waiting for the batch.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn forward_with_breaks(
        &self,
        batch: &[&EncodedText],
        breaks: &(dyn Fn() + Sync),
    ) -> Result<Embeddings, ModelError> {
        for (index, text) in batch.iter().enumerate() {
            self.check_encoded(index, text)?;
        }
        let mut values = Vec::with_capacity(batch.len() * self.info.output_dim);
        let mut rest = batch;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(sub_batch(rest));
            values.extend(self.forward_packed(now, breaks)?);
            rest = later;
        }
        self.check_vectors(&values)?;
        Ok(Embeddings { dim: self.info.output_dim, values })
    }

    /// Tokenizes and computes: the vectors of `texts`, in their order.
    ///
    /// # Errors
    /// As [`Model::encode`] and [`Model::forward`].
    pub fn embed(&self, texts: &[&str]) -> Result<Embeddings, ModelError> {
        let encoded = self.encode(texts)?;
        self.forward(&encoded.iter().collect::<Vec<_>>())
    }

    /// Computes a known text and compares with the first time. Run it after a failed or oversized job: silently wrong results
    /// begin there.
    ///
    /// # Errors
    /// [`ModelError::Probe`] when the vector differs, or any other error of computing.
    pub fn probe(&self) -> Result<(), ModelError> {
        let mut text = self.encode(&[PROBE_TEXT])?;
        text.iter_mut().for_each(|text| text.cut(PROBE_TOKENS));
        let now = self.forward(&text.iter().collect::<Vec<_>>())?.values;
        let first = self.probe.get_or_init(|| now.clone());
        let same = first.iter().map(|value| value.to_bits()).eq(now.iter().map(|value| value.to_bits()));
        if same { Ok(()) } else { Err(ModelError::Probe) }
    }

    /// Gives back the memory that all models of this process keep for activations, some megabytes; the next batch allocates it
    /// again.
    pub fn release_scratch(&self) {
        pool().run_alone(true, release_all_scratch);
    }

    fn check_encoded(&self, index: usize, text: &EncodedText) -> Result<(), ModelError> {
        let (tokens, max_tokens) = (text.ids().len(), self.info.max_seq_tokens);
        if tokens == 0 || tokens > max_tokens {
            return Err(ModelError::TokenCount { index, tokens, max_tokens });
        }
        match text.ids().iter().find(|id| **id as usize >= self.info.vocab_size) {
            Some(id) => Err(ModelError::TokenId { index, id: *id, vocab_size: self.info.vocab_size }),
            None => Ok(()),
        }
    }

    fn check_vectors(&self, values: &[f32]) -> Result<(), ModelError> {
        for (index, vector) in values.chunks_exact(self.info.output_dim).enumerate() {
            if !vector.iter().all(|value| value.is_finite()) {
                return Err(ModelError::BadVector { index, what: "not finite" });
            }
            let norm = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
            if self.info.normalize && (norm - 1.0).abs() > NORM_TOLERANCE {
                return Err(ModelError::BadVector { index, what: "not of norm one" });
            }
        }
        Ok(())
    }

    fn forward_packed(&self, texts: &[&EncodedText], breaks: Breaks<'_>) -> Result<Vec<f32>, ModelError> {
        let mut packed = Packed { tokens: Vec::new(), sequences: Vec::with_capacity(texts.len()) };
        for text in texts {
            let start = packed.tokens.len();
            let positions = self.network.positions(text.ids());
            let rows = text.ids().iter().zip(text.type_ids()).zip(positions);
            packed.tokens.extend(rows.map(|((word, kind), position)| Lookup {
                word: *word,
                kind: *kind,
                position,
            }));
            packed.sequences.push(start..packed.tokens.len());
        }
        // Of a large model all threads together read the weights faster, however few the tokens.
        let many = packed.tokens.len() >= MIN_PARALLEL_TOKENS || self.info.image_bytes >= MIN_PARALLEL_BYTES;
        let pooling = (self.info.pooling, self.info.normalize);
        pool().run_alone(many, |threads| self.network.forward(&packed, threads, pooling, breaks))
    }
}

/// How many of the first texts fit into [`MAX_BATCH_TOKENS`], at least one.
fn sub_batch(texts: &[&EncodedText]) -> usize {
    let mut tokens = 0;
    let fitting = texts.iter().take_while(|text| {
        tokens += text.ids().len();
        tokens <= MAX_BATCH_TOKENS
    });
    fitting.count().max(1)
}

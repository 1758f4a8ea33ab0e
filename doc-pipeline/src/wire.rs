//! The JSON lines of indexing, stable: what a subprocess prints, what the supervisor reports and sums up.

use std::path::PathBuf;

use crate::pipeline::{IndexOutcome, PipelineError};

/// The line that a subprocess prints on stdout when it is done with its document, and the line of one document in
/// a report:
///
/// ```json
/// {"path":"/kb/a.md","outcome":"indexed","chunks":3,"tokens":412}
/// {"path":"/kb/a.md","outcome":"replaced","chunks":3,"tokens":412,"previous_chunks":2}
/// {"path":"/kb/a.md","outcome":"unchanged","chunks":3,"tokens":412}
/// {"path":"/kb/b.md","outcome":"failed","code":"decode","message":"invalid UTF-8 at byte 17 …"}
/// ```
///
/// The supervisor's lines have `"elapsed_ms"` as well.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DocumentReport {
    /// The document.
    pub path: PathBuf,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Wall time of its subprocess; only in the supervisor's lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elapsed_ms: Option<u64>,
}

/// What became of a document.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// The store has this content with these options already.
    Unchanged {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// New in the store.
    Indexed {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// It took the place of an older version.
    Replaced {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
        /// Chunks of the older version.
        previous_chunks: u64,
    },
    /// Not stored; what the store had of it is untouched.
    Failed {
        /// The kind of failure.
        code: FailureCode,
        /// Cause and fix, for people.
        message: String,
    },
}

/// Why a document was not indexed. New codes may come; the names of these stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The file can't be read, is no regular file or is too large.
    Read,
    /// The extension is not known.
    UnknownFormat,
    /// The bytes are not text.
    Decode,
    /// The text can't be parsed, or passes a limit.
    Parse,
    /// The document can't be cut into chunks.
    Chunk,
    /// The model can't be had, or failed.
    Model,
    /// The store failed.
    Store,
    /// The subprocess can't be started, or its state be seen.
    Spawn,
    /// The subprocess took longer than its time limit and was killed.
    TimedOut,
    /// The subprocess died of a signal.
    Killed,
    /// The subprocess ended without a line that says what it did.
    NoAnswer,
    /// The run was cancelled before the document was done.
    Cancelled,
    /// A code that this version does not know.
    #[serde(other)]
    Other,
}

impl DocumentReport {
    /// The report of a document that was, or was not, indexed in this process.
    pub fn new(path: PathBuf, result: &Result<IndexOutcome, PipelineError>) -> Self {
        let outcome = match result {
            Ok(IndexOutcome::Unchanged { chunks, tokens }) => {
                Outcome::Unchanged { chunks: *chunks, tokens: *tokens }
            }
            Ok(IndexOutcome::Indexed { chunks, tokens }) => {
                Outcome::Indexed { chunks: *chunks, tokens: *tokens }
            }
            Ok(IndexOutcome::Replaced { chunks, tokens, previous_chunks }) => {
                Outcome::Replaced { chunks: *chunks, tokens: *tokens, previous_chunks: *previous_chunks }
            }
            Err(error) => Outcome::Failed { code: error.code(), message: error.to_string() },
        };
        Self { path, outcome, elapsed_ms: None }
    }

    /// The report as one line of JSON, without the line break.
    pub fn to_line(&self) -> String {
        // A path that is not UTF-8 has no JSON form; such documents are refused, so their report has it lossily.
        serde_json::to_string(self).unwrap_or_else(|_| {
            let path = PathBuf::from(self.path.to_string_lossy().into_owned());
            serde_json::to_string(&Self { path, ..self.clone() }).unwrap_or_default()
        })
    }

    /// Reads a line that a subprocess printed.
    pub fn from_line(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok()
    }
}

/// A whole run:
///
/// ```json
/// {"documents":4,"indexed":2,"replaced":0,"unchanged":1,"failed":1,"chunks":9,"tokens":1311,"elapsed_ms":840,
///  "failures":[{"path":"/kb/b.md","code":"decode","message":"…"}]}
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Summary {
    /// Documents in all.
    pub documents: u64,
    /// New ones.
    pub indexed: u64,
    /// Changed ones.
    pub replaced: u64,
    /// Unchanged ones.
    pub unchanged: u64,
    /// Failed ones.
    pub failed: u64,
    /// Chunks of all but the failed.
    pub chunks: u64,
    /// Tokens of these chunks.
    pub tokens: u64,
    /// Wall time of the run.
    pub elapsed_ms: u64,
    /// Which failed, and why, by path.
    pub failures: Vec<Failure>,
}

/// A document that was not indexed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Failure {
    /// The document.
    pub path: PathBuf,
    /// The kind of failure.
    pub code: FailureCode,
    /// Cause and fix, for people.
    pub message: String,
}

impl Summary {
    /// Adds one document.
    pub fn add(&mut self, report: &DocumentReport) {
        self.documents += 1;
        let (count, (chunks, tokens)) = match &report.outcome {
            Outcome::Unchanged { chunks, tokens } => (&mut self.unchanged, (*chunks, *tokens)),
            Outcome::Indexed { chunks, tokens } => (&mut self.indexed, (*chunks, *tokens)),
            Outcome::Replaced { chunks, tokens, .. } => (&mut self.replaced, (*chunks, *tokens)),
            Outcome::Failed { code, message } => {
                let failure = Failure { path: report.path.clone(), code: *code, message: message.clone() };
                let at = self.failures.partition_point(|other| other.path <= failure.path);
                self.failures.insert(at, failure);
                (&mut self.failed, (0, 0))
            }
        };
        *count += 1;
        self.chunks = self.chunks.saturating_add(chunks);
        self.tokens = self.tokens.saturating_add(tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_stable() {
        let report = DocumentReport {
            path: "/kb/a.md".into(),
            outcome: Outcome::Replaced { chunks: 3, tokens: 412, previous_chunks: 2 },
            elapsed_ms: None,
        };
        let line = r#"{"path":"/kb/a.md","outcome":"replaced","chunks":3,"tokens":412,"previous_chunks":2}"#;
        assert_eq!(report.to_line(), line);
        assert_eq!(DocumentReport::from_line(line), Some(report));
        let failed = r#"{"path":"b","outcome":"failed","code":"timed_out","message":"m","elapsed_ms":7}"#;
        let report = DocumentReport::from_line(failed).expect("known");
        assert_eq!(report.to_line(), failed);
        let unknown = failed.replace("timed_out", "of_a_later_version");
        let report = DocumentReport::from_line(&unknown).expect("read all the same");
        assert!(matches!(report.outcome, Outcome::Failed { code: FailureCode::Other, .. }));
        assert_eq!(DocumentReport::from_line("garbage"), None);
    }
}

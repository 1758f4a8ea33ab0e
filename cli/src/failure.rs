//! How a command fails: a message for people, an error body for programs, and one exit code. What the SDK's failures map to is
//! its own table; what others map to is here.

use broker::BrokerError;
use doc_pipeline::search::SearchError;
use doc_pipeline::{PipelineError, StoreError};
use shm_layout::code::Code;
use std::process::ExitCode;
use std::time::Duration;
use worker_sdk::{About, ErrorBody, ErrorCode, SdkError, row_of_code, row_of_error};

/// Exit codes; documented in `docs/operations.md`. 2 is clap's, for arguments that cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Something failed that none of the others names.
    Failed = 1,
    /// Arguments or settings that cannot be used.
    Usage = 2,
    /// No broker runs, or it went away, or one cannot be started.
    NoBroker = 3,
    /// The model cannot be had.
    Model = 4,
    /// The input is refused.
    Input = 5,
    /// Overloaded, or not done in time: the same call may succeed later.
    Busy = 6,
    /// Part of the work is done, part failed; the output says which.
    Partly = 7,
    /// A check that was asked for found something wrong.
    CheckFailed = 8,
    /// A broker runs already.
    AlreadyRunning = 9,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ends with an exit code other than 0.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: Option<String>,
    body: Option<ErrorBody>,
}

impl Failure {
    /// A failure that is told on stderr.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: Some(message.into()), body: None }
    }

    /// A failure that the command's own output has told already.
    pub(crate) fn told(exit: Exit) -> Failure {
        Failure { exit, message: None, body: None }
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    pub(crate) fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }

    /// The error body as a line of JSON; `None` when the command's own output has told it.
    pub(crate) fn to_json(&self) -> Option<String> {
        let message = self.message.clone()?;
        let body = self.body.clone().unwrap_or_else(|| {
            let (code, reason) = self.exit.body();
            ErrorBody {
                code,
                message,
                reason,
                retryable: self.exit == Exit::Busy,
                retry_after: Duration::ZERO,
            }
        });
        Some(body.to_json())
    }
}

impl Exit {
    /// The exit code of a number of the SDK's map.
    fn of_number(number: u8) -> Exit {
        use Exit::{AlreadyRunning, Busy, CheckFailed, Failed, Input, Model, NoBroker, Partly, Usage};
        let all = [Failed, Usage, NoBroker, Model, Input, Busy, Partly, CheckFailed, AlreadyRunning];
        all.into_iter().find(|exit| *exit as u8 == number).unwrap_or(Failed)
    }

    /// What an error body says of a failure that is not the SDK's.
    fn body(self) -> (ErrorCode, &'static str) {
        match self {
            Exit::Failed => (ErrorCode::EmbeddingError, "FAILED"),
            Exit::Usage => (ErrorCode::GenerateEmbeddingsError, "BAD_ARGUMENT"),
            Exit::NoBroker => (ErrorCode::ModelUnavailable, "NO_BROKER"),
            Exit::Model => (ErrorCode::ModelLoadError, "MODEL_LOAD_ERROR"),
            Exit::Input => (ErrorCode::GenerateEmbeddingsError, "BAD_INPUT"),
            Exit::Busy => (ErrorCode::ModelUnavailable, "OVERLOADED"),
            Exit::Partly => (ErrorCode::EmbeddingError, "PARTLY_DONE"),
            Exit::CheckFailed => (ErrorCode::EmbeddingError, "CHECK_FAILED"),
            Exit::AlreadyRunning => (ErrorCode::ModelUnavailable, "ALREADY_RUNNING"),
        }
    }
}

impl From<SdkError> for Failure {
    fn from(error: SdkError) -> Failure {
        let exit = Exit::of_number(row_of_error(&error).exit_code);
        Failure { body: Some(ErrorBody::of(&error, About::Any)), ..Failure::new(exit, error.to_string()) }
    }
}

impl From<BrokerError> for Failure {
    fn from(error: BrokerError) -> Failure {
        let exit = match &error {
            BrokerError::AlreadyRunning { .. } => Exit::AlreadyRunning,
            _ => Exit::Failed,
        };
        Failure::new(exit, error.to_string())
    }
}

impl From<settings::Problems> for Failure {
    fn from(problems: settings::Problems) -> Failure {
        let body = ErrorBody {
            code: row_of_code(Code::ConfigInvalid).code,
            message: problems.to_string(),
            reason: Code::ConfigInvalid.name(),
            retryable: false,
            retry_after: Duration::ZERO,
        };
        Failure { body: Some(body), ..Failure::new(Exit::Usage, problems.to_string()) }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Failure {
        Failure::new(Exit::Failed, error.to_string())
    }
}

impl From<PipelineError> for Failure {
    fn from(error: PipelineError) -> Failure {
        Failure::new(Exit::Failed, error.to_string())
    }
}

impl From<SearchError> for Failure {
    fn from(error: SearchError) -> Failure {
        let exit = match &error {
            SearchError::EmptyQuery | SearchError::QueryTooLong { .. } => Exit::Input,
            _ => Exit::Failed,
        };
        Failure::new(exit, error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Failure {
        Failure::new(Exit::Failed, error.to_string())
    }
}

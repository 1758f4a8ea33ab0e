//! How a command fails: a message for people and one exit code. The only place that maps errors to exit codes.

use broker::BrokerError;
use doc_pipeline::search::SearchError;
use doc_pipeline::{PipelineError, StoreError};
use shm_layout::code::Code;
use std::process::ExitCode;
use worker_sdk::SdkError;

/// Exit codes; documented in `docs/operations.md`. 2 is clap's, for arguments that cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Something failed that none of the others names.
    Failed = 1,
    /// Arguments that contradict each other.
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
}

impl Failure {
    /// A failure that is told on stderr.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: Some(message.into()) }
    }

    /// A failure that the command's own output has told already.
    pub(crate) fn told(exit: Exit) -> Failure {
        Failure { exit, message: None }
    }

    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    pub(crate) fn message(&self) -> Option<&str> {
        self.message.as_deref()
    }
}

/// The exit code of a protocol code.
pub(crate) fn exit_of_code(code: Code) -> Exit {
    match code {
        Code::ModelNotFound
        | Code::ModelInvalid
        | Code::ModelUnsupported
        | Code::ModelLoadError
        | Code::ModelUnavailable
        | Code::ProviderFailed
        | Code::DiskFull => Exit::Model,
        Code::EmptyInput | Code::TooLarge | Code::InvalidUtf8 | Code::BadPayload | Code::OutputTooSmall => {
            Exit::Input
        }
        Code::Overloaded
        | Code::DeadlineExceeded
        | Code::LoadTimeout
        | Code::TooMany
        | Code::ProviderTimeout
        | Code::ShuttingDown => Exit::Busy,
        _ => Exit::Failed,
    }
}

fn exit_of_sdk(error: &SdkError) -> Exit {
    match error {
        SdkError::NoBroker { .. }
        | SdkError::StartFailed { .. }
        | SdkError::Connect(_)
        | SdkError::Disconnected { .. } => Exit::NoBroker,
        SdkError::WouldBlock => Exit::Busy,
        SdkError::Argument(_) => Exit::Usage,
        other => other.protocol_code().map_or(Exit::Failed, exit_of_code),
    }
}

impl From<SdkError> for Failure {
    fn from(error: SdkError) -> Failure {
        Failure::new(exit_of_sdk(&error), error.to_string())
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

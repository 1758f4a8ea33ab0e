//! What can go wrong in the SDK: one error type that says what happened, what to do about it, and whether trying again
//! can help. Exit codes and HTTP statuses are made from it elsewhere.

use shm_layout::code::Code;
use shm_layout::payload::PayloadError;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Why a call failed. Cheap to clone: one failure may be told to many waiting callers.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SdkError {
    /// No broker listens at the socket, and none was or may be started.
    #[error("no broker is running at {}: {reason}", socket.display())]
    NoBroker {
        /// Where one was looked for.
        socket: PathBuf,
        /// Why none was started, and what to do.
        reason: String,
    },
    /// A broker was started and did not come up.
    #[error("the broker {} did not start: {reason}{}", program.display(), indent(log_tail))]
    StartFailed {
        /// The program that was run.
        program: PathBuf,
        /// How it ended.
        reason: String,
        /// The last lines of its log; may be empty.
        log_tail: String,
    },
    /// The socket cannot be used: bad path, wrong owner, a broker that takes no connections.
    #[error("connecting to the broker failed: {0}")]
    Connect(String),
    /// The broker went away and did not come back in time.
    #[error(
        "the broker went away ({reason}) and was not back within {waited:?}: start it with `modelbroker serve`"
    )]
    Disconnected {
        /// How it was noticed.
        reason: String,
        /// How long was waited for another one.
        waited: Duration,
    },
    /// The broker or an engine refused or failed the request; the message says why and what to do.
    #[error("{code}: {message}")]
    Refused {
        /// Why, as a code.
        code: Code,
        /// Why, in words.
        message: String,
        /// When a new attempt makes sense; zero where no attempt by itself does.
        retry_after: Duration,
    },
    /// The call's timeout ran out; its job has been cancelled.
    #[error("no answer within {0:?}: allow more time (`EmbedOptions::timeout`) or send less at a time")]
    DeadlineExceeded(Duration),
    /// The job was cancelled by its owner.
    #[error("the job was cancelled")]
    Cancelled,
    /// Everything is in use just now; `try_submit` does not wait. The caller still has its texts.
    #[error("all places for jobs in flight are taken: wait for an answer, or call `submit`, which waits")]
    WouldBlock,
    /// The texts are not acceptable; names the text and the limit.
    #[error(transparent)]
    Input(#[from] PayloadError),
    /// A name or option given is not acceptable.
    #[error("{0}")]
    Argument(String),
    /// The peer broke the protocol, repeatedly.
    #[error("{peer} broke the protocol: {what}; use one version of modelbroker for all programs")]
    Fault {
        /// Who: `the broker`, `the engine` or `the provider`.
        peer: &'static str,
        /// What it did.
        what: String,
    },
    /// The model was replaced by another one under the same name while a list was being computed, again and again.
    #[error("the model {model} kept changing while the list was computed: try again when its reload is done")]
    ModelChanged {
        /// The model.
        model: String,
    },
    /// A job made before a fork was used in the child.
    #[error(
        "this job belongs to the process that forked: submit it again here; clients and models go on working"
    )]
    Forked,
    /// The operating system refused something.
    #[error("{0}")]
    Os(String),
    /// Sharing is switched off for this program, and it cannot load models itself.
    #[error(
        "sharing is switched off for this program ({reason}), and it was built without the feature `local`, so it cannot load \
         models itself: switch sharing on, or build it with `local`"
    )]
    SharingOff {
        /// What switched it off.
        reason: String,
    },
    /// The shared model could not be had, and loading it in this process failed as well.
    #[error("{shared}; loading the model in this process failed as well: {private}")]
    BothFailed {
        /// Why the shared one could not be had.
        shared: Arc<SdkError>,
        /// Why the private one could not be loaded.
        private: Arc<str>,
    },
    /// Computing in this process failed.
    #[error("computing in this process failed: {0}")]
    Local(Arc<str>),
}

fn indent(log_tail: &str) -> String {
    log_tail.lines().map(|line| format!("\n    {line}")).collect()
}

impl SdkError {
    /// A stable upper-case name, for logs and JSON output. Refusals carry the name of their [`Code`].
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            SdkError::NoBroker { .. } => "NO_BROKER",
            SdkError::StartFailed { .. } => "START_FAILED",
            SdkError::Connect(_) => "CONNECT_FAILED",
            SdkError::Disconnected { .. } => "DISCONNECTED",
            SdkError::WouldBlock => "WOULD_BLOCK",
            SdkError::Argument(_) => "BAD_ARGUMENT",
            SdkError::Fault { .. } => "PEER_FAULT",
            SdkError::ModelChanged { .. } => "MODEL_CHANGED",
            SdkError::Forked => "FORKED",
            SdkError::Os(_) => "OS_ERROR",
            SdkError::Local(_) => "LOCAL_COMPUTE",
            SdkError::SharingOff { .. } => "SHARING_OFF",
            SdkError::BothFailed { shared, .. } => shared.code(),
            SdkError::Refused { .. }
            | SdkError::DeadlineExceeded(_)
            | SdkError::Cancelled
            | SdkError::Input(_) => self.protocol_code().map_or("INTERNAL", Code::name),
        }
    }

    /// The protocol's code for this failure, where it has one.
    #[must_use]
    pub fn protocol_code(&self) -> Option<Code> {
        match self {
            SdkError::Refused { code, .. } => Some(*code),
            SdkError::DeadlineExceeded(_) => Some(Code::DeadlineExceeded),
            SdkError::Cancelled => Some(Code::Cancelled),
            SdkError::Input(error) => Some(error.code()),
            SdkError::BothFailed { shared, .. } => shared.protocol_code(),
            _ => None,
        }
    }

    /// Whether the same call may succeed later without anything being changed by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            SdkError::Disconnected { .. }
            | SdkError::DeadlineExceeded(_)
            | SdkError::WouldBlock
            | SdkError::ModelChanged { .. } => true,
            SdkError::Refused { code, retry_after, .. } => {
                !retry_after.is_zero()
                    || matches!(
                        code,
                        Code::Overloaded
                            | Code::ShuttingDown
                            | Code::ModelUnavailable
                            | Code::LoadTimeout
                            | Code::TooMany
                    )
            }
            SdkError::BothFailed { shared, .. } => shared.is_retryable(),
            _ => false,
        }
    }

    /// Whether a broker that goes away and comes back explains this: then the SDK reconnects by itself.
    pub(crate) fn is_broker_absence(&self) -> bool {
        match self {
            SdkError::NoBroker { .. }
            | SdkError::Disconnected { .. }
            | SdkError::StartFailed { .. }
            | SdkError::Connect(_) => true,
            SdkError::Refused { code, .. } => matches!(code, Code::ShuttingDown),
            _ => false,
        }
    }

    pub(crate) fn hung_up(reason: impl Into<String>) -> SdkError {
        SdkError::Disconnected { reason: reason.into(), waited: Duration::ZERO }
    }

    pub(crate) fn refused(refusal: shm_layout::wire::Refusal) -> SdkError {
        SdkError::Refused {
            code: refusal.code,
            message: refusal.message,
            retry_after: Duration::from_millis(u64::from(refusal.retry_after_ms)),
        }
    }

    pub(crate) fn os(error: impl std::fmt::Display) -> SdkError {
        SdkError::Os(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_retries() {
        let refused = |code| SdkError::Refused { code, message: "m".into(), retry_after: Duration::ZERO };
        assert_eq!(refused(Code::ModelNotFound).code(), "MODEL_NOT_FOUND");
        assert!(!refused(Code::ModelNotFound).is_retryable());
        assert!(refused(Code::Overloaded).is_retryable());
        assert_eq!(SdkError::DeadlineExceeded(Duration::ZERO).code(), "DEADLINE_EXCEEDED");
        assert_eq!(SdkError::Input(PayloadError::TooManyTexts { count: 9 }).code(), "TOO_LARGE");
        assert!(SdkError::hung_up("x").is_broker_absence());
    }

    #[test]
    fn a_failed_start_shows_the_log() {
        let error = SdkError::StartFailed {
            program: "/x/modelbroker".into(),
            reason: "exit status: 1".into(),
            log_tail: "one\ntwo".into(),
        };
        assert_eq!(
            error.to_string(),
            "the broker /x/modelbroker did not start: exit status: 1\n    one\n    two"
        );
    }
}

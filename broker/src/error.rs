//! Why a broker does not start, or could not go on. What a client is told is a `Code`, not one of these.

use shm_os::OsError;
use shm_os::run_dir::RunDirError;
use shm_os::socket::SocketError;
use std::path::PathBuf;

/// Why [`crate::run`] returned without having been asked to.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Another broker holds the lock: it serves this socket.
    #[error(
        "a broker is running already{}; use it, stop it with `modelbroker stop`, or choose another socket",
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    AlreadyRunning {
        /// Its process, if its lock file says so.
        pid: Option<u32>,
    },
    /// A path in the configuration names no file in a folder.
    #[error("{path:?} is no usable path for the broker's socket or lock: name a file in a private folder")]
    BadPath {
        /// The path.
        path: PathBuf,
    },
    /// A child's command is empty.
    #[error("the command for starting the {child} is empty: name a program")]
    NoCommand {
        /// `engine` or `loader`.
        child: &'static str,
    },
    /// A process that is to provide a model is not described as it must be.
    #[error("the provider of {model_id:?} cannot be started: {why}")]
    BadProvider {
        /// The model.
        model_id: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The run folder or the lock file cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The socket cannot be bound.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

//! Where the demo happens: a folder and a broker of its own, both gone with their handle, however the demo ends.

use crate::commands::worker::interrupt::Interrupt;
use crate::failure::{Exit, Failure};
use shm_os::process::{ChildLimits, SpawnedChild, spawn_limited};
use shm_os::{Interest, Poller};
use std::fs::OpenOptions;
use std::io::{PipeReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use worker_sdk::{Client, StartBroker};

/// Longest path of a temporary folder that leaves room for the socket's name in a socket address (108 bytes).
const MAX_TEMP_PATH_BYTES: usize = 60;
/// Number that the pipe for the readiness message has in the broker.
const READY_FD: i32 = 3;
/// How long a broker may take to accept connections.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long it may take to finish work when it is told to leave, and to be gone afterwards.
const DRAIN: Duration = Duration::from_secs(5);
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an interruption is looked for.
const SLICE: Duration = Duration::from_millis(50);
/// What of the broker's log is shown when it does not start.
const LOG_TAIL_LINES: usize = 8;
const SIGTERM: i32 = signal_hook::consts::SIGTERM;

/// The private folder.
#[derive(Debug)]
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn create() -> Result<Folder, Failure> {
        let usual = std::env::temp_dir();
        let base = if usual.as_os_str().len() <= MAX_TEMP_PATH_BYTES { usual } else { PathBuf::from("/tmp") };
        let folder = tempfile::Builder::new().prefix("modelbroker-demo-").tempdir_in(&base).map_err(|e| {
            let why = format!("a folder for the demo cannot be made in {}: {e}; set TMPDIR", base.display());
            Failure::new(Exit::Failed, why)
        })?;
        Ok(Folder(folder))
    }

    pub(crate) fn corpus(&self) -> PathBuf {
        self.0.path().join("corpus")
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.0.path().join("store.db")
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("run").join(worker_sdk::SOCKET_FILE_NAME)
    }

    fn log(&self) -> PathBuf {
        self.0.path().join(worker_sdk::LOG_FILE_NAME)
    }
}

/// The broker.
#[derive(Debug)]
pub(crate) struct DemoBroker {
    child: SpawnedChild,
    socket: PathBuf,
    gone: bool,
}

impl DemoBroker {
    /// Starts a broker with its socket in `folder` and waits until it accepts connections.
    pub(crate) fn start(folder: &Folder, model: &str, interrupt: &Interrupt) -> Result<DemoBroker, Failure> {
        let socket = folder.socket();
        let (ready, ready_writer) = std::io::pipe()?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--socket").arg(&socket).args(["serve", "--inspectable", "--model", model]);
        command.args(["--ready-fd", &READY_FD.to_string()]).arg("--log-file").arg(folder.log());
        // Its children log to stderr.
        let log = OpenOptions::new().create(true).append(true).open(folder.log())?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let limits = ChildLimits {
            parent_death_signal: true,
            new_session: true,
            inherit_fds: vec![(OwnedFd::from(ready_writer), READY_FD)],
            ..ChildLimits::default()
        };
        let child = spawn_limited(command, limits).map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        let broker = DemoBroker { child, socket, gone: false };
        if wait_ready(ready, interrupt)? {
            return Ok(broker);
        }
        let log = std::fs::read_to_string(folder.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n    ");
        Err(Failure::new(Exit::NoBroker, format!("the demo's broker did not start:\n    {tail}")))
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A client of this broker.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        let socket = Some(self.socket.clone());
        Ok(crate::commands::client(socket, "demo", Some(StartBroker::Never)).connect()?)
    }

    /// Tells the broker to leave and waits until it has left.
    pub(crate) fn stop(mut self) -> Result<(), Failure> {
        self.client()?.shutdown(DRAIN)?;
        if !self.wait_gone(EXIT_TIMEOUT) {
            return Err(Failure::new(
                Exit::Failed,
                "the broker did not leave when it was told to; it was killed",
            ));
        }
        Ok(())
    }

    fn wait_gone(&mut self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        while !self.gone && Instant::now() < end {
            self.gone = matches!(self.child.wait_nonblocking(), Ok(Some(_)));
            if !self.gone {
                let mut events = Vec::new();
                if let Ok(poller) = Poller::new() {
                    let _ = poller.add(self.child.pidfd(), 0, Interest::READABLE);
                    let _ = poller.wait(&mut events, Some(SLICE));
                }
            }
        }
        self.gone
    }
}

impl Drop for DemoBroker {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        // Politely first: so its engine and its files go with it.
        let _ = self.child.signal(SIGTERM);
        if !self.wait_gone(EXIT_TIMEOUT) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Whether the broker said that it is ready; false when it ended, or took too long.
fn wait_ready(mut ready: PipeReader, interrupt: &Interrupt) -> Result<bool, Failure> {
    let failed = |e: shm_os::OsError| Failure::new(Exit::Failed, e.to_string());
    let poller = Poller::new().map_err(failed)?;
    poller.add(&ready, 0, Interest::READABLE).map_err(failed)?;
    let (end, mut events) = (Instant::now() + START_TIMEOUT, Vec::new());
    while Instant::now() < end {
        interrupted(interrupt)?;
        if poller.wait(&mut events, Some(SLICE)).map_err(failed)? > 0 {
            return Ok(ready.read(&mut [0; 16])? > 0);
        }
    }
    Ok(false)
}

/// An error when the user wants the demo to end.
pub(crate) fn interrupted(interrupt: &Interrupt) -> Result<(), Failure> {
    if interrupt.is_set() { Err(Failure::new(Exit::Failed, "interrupted")) } else { Ok(()) }
}

//! Starting a broker: which program, how it is told apart from one that is running already, and how its failure is
//! reported. Connecting to it is `connect`'s affair.

use crate::error::SdkError;
use crate::session::Watch;
use crate::settings::{LOG_FILE_NAME, PROGRAM_VARIABLE, Settings};
use crate::time::{Deadline, SLICE};
use shm_os::process::{ChildLimits, SpawnedChild, spawn_limited};
use shm_os::{Interest, Poller, run_dir};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, TryLockError};
use std::time::Duration;

/// File name of the program that contains the broker.
const PROGRAM_NAME: &str = "modelbroker";
/// Number that the pipe for the readiness message has in the broker.
const READY_FD: i32 = 3;
/// Exit code of a broker that found another one running (`docs/operations.md`).
const ALREADY_RUNNING_EXIT: i32 = 9;
/// What of a log is shown when the start failed.
const LOG_TAIL_LINES: usize = 12;
const LOG_TAIL_BYTES: u64 = 8 * 1024;

/// Brokers that this process started: they are its children, and once they have ended somebody must ask for them.
static STARTED: Mutex<Vec<SpawnedChild>> = Mutex::new(Vec::new());

/// Which program to start: the option, else the environment, else beside this program, else on the `PATH`.
fn find_program(settings: &Settings) -> Result<PathBuf, Vec<String>> {
    if let Some(program) = &settings.program {
        return Ok(program.clone());
    }
    if let Some(program) = std::env::var_os(PROGRAM_VARIABLE).filter(|value| !value.is_empty()) {
        return Ok(program.into());
    }
    let mut looked = vec![format!("{PROGRAM_VARIABLE} is not set")];
    if let Some(folder) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
        let sibling = folder.join(PROGRAM_NAME);
        if sibling.is_file() {
            return Ok(sibling);
        }
        looked.push(format!("not in {}", folder.display()));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    match std::env::split_paths(&path)
        .map(|folder| folder.join(PROGRAM_NAME))
        .find(|program| program.is_file())
    {
        Some(program) => Ok(program),
        None => {
            looked.push("not on the PATH".into());
            Err(looked)
        }
    }
}

/// What became of a broker that was started.
#[derive(Debug)]
pub(crate) enum Started {
    /// It accepts connections.
    Serves,
    /// It ended without serving: it is broken, or another one was faster.
    Ended {
        /// The process that ended.
        pid: u32,
        /// What to report when no other one serves either.
        error: SdkError,
        /// It ended because another one was running.
        lost_race: bool,
    },
}

/// Starts a broker and waits until it serves or ends.
pub(crate) fn start_broker(
    settings: &Settings,
    deadline: Deadline,
    watch: Watch<'_>,
) -> Result<Started, SdkError> {
    let program = find_program(settings).map_err(|looked| SdkError::NoBroker {
        socket: settings.socket.clone(),
        reason: format!(
            "the program {PROGRAM_NAME} to start one with was not found ({}): install it, set {PROGRAM_VARIABLE}, or \
             run `{PROGRAM_NAME} serve`",
            looked.join(", ")
        ),
    })?;
    let folder = settings.socket.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    run_dir::ensure_private_dir(folder).map_err(|error| SdkError::Connect(error.to_string()))?;
    let log_path = folder.join(LOG_FILE_NAME);
    let (mut ready, mut child) = spawn(settings, &program, &log_path)?;
    tracing::info!(program = %program.display(), pid = child.pid(), "started a broker");
    let failed = |reason: String| SdkError::StartFailed {
        program: program.clone(),
        reason,
        log_tail: log_tail(&log_path),
    };
    let outcome = match wait_ready(&mut ready, deadline, watch) {
        Ok(true) => Ok(Started::Serves),
        // The pipe closes as the process ends; its status follows at once, if it ends at all.
        Ok(false) => {
            let (reason, code) = wait_status(&mut child, deadline);
            let lost_race = code == Some(ALREADY_RUNNING_EXIT);
            Ok(Started::Ended { pid: child.pid(), error: failed(reason), lost_race })
        }
        Err(SdkError::DeadlineExceeded(allowed)) => Err(failed(format!("not ready within {allowed:?}"))),
        Err(error) => Err(error),
    };
    keep(child);
    outcome
}

/// Whether a process other than `ended` seems to be the broker of this socket, or about to become it: the lock file names
/// a process that runs. A stale file and a reused number can make this wrong, so it only says that waiting is worth it.
pub(crate) fn broker_lives(socket: &Path, ended: Option<u32>) -> bool {
    let mut lock_path = socket.to_owned().into_os_string();
    lock_path.push(".lock");
    match run_dir::LockFile::holder_pid(Path::new(&lock_path)) {
        Some(holder) if Some(holder) != ended => i32::try_from(holder).is_ok_and(runs),
        _ => false,
    }
}

/// Whether a process exists and has not ended; one that nobody has waited for yet has ended all the same.
fn runs(pid: i32) -> bool {
    let Ok(pidfd) = shm_os::process::pidfd_open(pid) else { return false };
    let Ok(poller) = Poller::new() else { return true };
    let mut events = Vec::new();
    poller.add(&pidfd, 0, Interest::READABLE).is_err()
        || !matches!(poller.wait(&mut events, Some(Duration::ZERO)), Ok(1..))
}

fn spawn(
    settings: &Settings,
    program: &Path,
    log_path: &Path,
) -> Result<(std::io::PipeReader, SpawnedChild), SdkError> {
    let (ready, ready_writer) = std::io::pipe().map_err(SdkError::os)?;
    let log =
        OpenOptions::new().create(true).append(true).mode(0o600).open(log_path).map_err(|error| {
            SdkError::Os(format!("opening the broker's log {}: {error}", log_path.display()))
        })?;
    // It is started in the root folder, so that it keeps no other busy: no path may be relative there.
    let absolute = |path: &Path| std::path::absolute(path).map_err(SdkError::os);
    let program_path = if program.components().count() > 1 { absolute(program)? } else { program.to_owned() };
    let mut command = Command::new(program_path);
    command
        .arg("serve")
        .arg("--socket")
        .arg(absolute(&settings.socket)?)
        .args(["--started-by-client", "--ready-fd", &READY_FD.to_string()])
        .args(["--idle-exit", &settings.broker_idle_exit.as_secs().max(1).to_string()])
        .arg("--log-file")
        .arg(absolute(log_path)?)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .current_dir("/");
    let limits = ChildLimits {
        new_session: true,
        inherit_fds: vec![(OwnedFd::from(ready_writer), READY_FD)],
        ..ChildLimits::default()
    };
    let child = spawn_limited(command, limits).map_err(|error| SdkError::StartFailed {
        program: program.to_owned(),
        reason: error.to_string(),
        log_tail: String::new(),
    })?;
    Ok((ready, child))
}

/// Whether the broker wrote its readiness message; false when it closed the pipe without.
fn wait_ready(
    ready: &mut std::io::PipeReader,
    deadline: Deadline,
    watch: Watch<'_>,
) -> Result<bool, SdkError> {
    let poller = Poller::new().map_err(SdkError::os)?;
    poller.add(&*ready, 0, Interest::READABLE).map_err(SdkError::os)?;
    let mut events = Vec::new();
    loop {
        if poller.wait(&mut events, Some(deadline.left_within(SLICE))).map_err(SdkError::os)? > 0 {
            return match ready.read(&mut [0; 64]) {
                Ok(count) => Ok(count > 0),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Err(SdkError::os(error)),
            };
        }
        if deadline.has_passed() {
            return Err(SdkError::DeadlineExceeded(deadline.allowed));
        }
        watch(None);
    }
}

/// How a broker ended, in words and as its exit code where it has one.
fn wait_status(child: &mut SpawnedChild, deadline: Deadline) -> (String, Option<i32>) {
    let mut events = Vec::new();
    if let Ok(poller) = Poller::new()
        && poller.add(child.pidfd(), 0, Interest::READABLE).is_ok()
    {
        let _ = poller.wait(&mut events, Some(deadline.left_within(SLICE)));
    }
    match child.wait_nonblocking() {
        Ok(Some(status)) => (status.to_string(), status.code()),
        Ok(None) => ("it closed its readiness pipe without serving".into(), None),
        Err(error) => (error.to_string(), None),
    }
}

fn log_tail(path: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}

/// Remembers a child, and asks for those that have ended, so that they leave the process table. Where the list is in
/// use (or was, in another thread, when this process was forked) the child is left to init instead.
fn keep(child: SpawnedChild) {
    let mut started = match STARTED.try_lock() {
        Ok(started) => started,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return,
    };
    started.retain_mut(|child| matches!(child.wait_nonblocking(), Ok(None)));
    started.push(child);
}

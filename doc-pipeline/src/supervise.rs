//! One subprocess per document, so many at once: started, bounded, killed as a group, its line read. What a
//! subprocess does is the caller's command; nothing is indexed here.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use crate::limits::{
    CHILD_PIPE_DRAIN, CHILD_STDERR_BYTES_MAX, CHILD_STDOUT_BYTES_MAX, DOCUMENT_TIME_LIMIT, JOBS_MAX,
};
use crate::wire::{DocumentReport, FailureCode, Outcome, Summary};

/// Environment variable that tells a subprocess its supervisor's process id; see [`die_with_supervisor`].
pub const SUPERVISOR_PID_ENV: &str = "MODELBROKER_SUPERVISOR_PID";

/// How documents are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuperviseOptions {
    /// Subprocesses at once, 1 to [`JOBS_MAX`]; what is outside is brought inside.
    pub jobs: usize,
    /// Wall time that one document may take before its process group is killed.
    pub time_limit: Duration,
}

impl Default for SuperviseOptions {
    fn default() -> Self {
        Self { jobs: 1, time_limit: DOCUMENT_TIME_LIMIT }
    }
}

/// Stops a run from another thread: running subprocesses are killed as groups, no further one is started.
#[derive(Debug, Clone, Default)]
pub struct CancelToken {
    state: Arc<Mutex<CancelState>>,
}

#[derive(Debug, Default)]
struct CancelState {
    cancelled: bool,
    next: u64,
    waiting: HashMap<u64, Sender<Event>>,
}

enum Event {
    Exited(nix::Result<()>),
    Cancelled,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The guarded values are consistent between statements: a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CancelToken {
    /// A token that is not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. Takes a lock: not for use inside a signal handler.
    pub fn cancel(&self) {
        let mut state = lock(&self.state);
        state.cancelled = true;
        for sender in state.waiting.values() {
            let _ = sender.send(Event::Cancelled);
        }
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }

    fn watch(&self, sender: Sender<Event>) -> Watch<'_> {
        let mut state = lock(&self.state);
        if state.cancelled {
            let _ = sender.send(Event::Cancelled);
        }
        let id = state.next;
        state.next += 1;
        state.waiting.insert(id, sender);
        Watch { token: self, id }
    }
}

struct Watch<'a> {
    token: &'a CancelToken,
    id: u64,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        lock(&self.token.state).waiting.remove(&self.id);
    }
}

/// Runs `command(document)` for each document, `options.jobs` at a time. One that fails does not stop the others.
/// `on_report` gets each document's report as soon as it is done, one at a time, in order of completion.
///
/// The subprocess gets no stdin, prints one [`DocumentReport`] line on stdout and leads a process group of its own.
/// A line that says "failed", an exit status other than 0, no line at all: each is a failed document.
pub fn run<C, R>(
    documents: &[PathBuf],
    options: &SuperviseOptions,
    cancel: &CancelToken,
    command: C,
    on_report: R,
) -> Summary
where
    C: Fn(&Path) -> Command + Sync,
    R: FnMut(&DocumentReport) + Send,
{
    let started = Instant::now();
    let jobs = options.jobs.clamp(1, JOBS_MAX).min(documents.len());
    let next = AtomicUsize::new(0);
    let sink = Mutex::new((Summary::default(), on_report));
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(document) = documents.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    let outcome = run_one(document, options.time_limit, cancel, &command);
                    let elapsed_ms = Some(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX));
                    let report = DocumentReport { path: document.clone(), outcome, elapsed_ms };
                    let mut sink = lock(&sink);
                    let (summary, on_report) = &mut *sink;
                    summary.add(&report);
                    on_report(&report);
                }
            });
        }
    });
    let (mut summary, _) = sink.into_inner().unwrap_or_else(PoisonError::into_inner);
    summary.elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    summary
}

fn failed(code: FailureCode, message: impl Into<String>) -> Outcome {
    Outcome::Failed { code, message: message.into() }
}

fn run_one(
    document: &Path,
    time_limit: Duration,
    cancel: &CancelToken,
    command: &impl Fn(&Path) -> Command,
) -> Outcome {
    if cancel.is_cancelled() {
        return failed(FailureCode::Cancelled, "the run was cancelled before this document was begun");
    }
    let mut command = command(document);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env(SUPERVISOR_PID_ENV, std::process::id().to_string())
        .process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let program = command.get_program().to_string_lossy().into_owned();
            return failed(FailureCode::Spawn, format!("can't start {program}: {error}"));
        }
    };
    let stdout = child.stdout.take().map(|pipe| keep_first(pipe, CHILD_STDOUT_BYTES_MAX));
    let stderr = child.stderr.take().map(|pipe| keep_last(pipe, CHILD_STDERR_BYTES_MAX));
    let ended = wait_and_reap(&mut child, time_limit, cancel);
    let drained = Instant::now() + CHILD_PIPE_DRAIN;
    let collect = |pipe: Option<Receiver<Vec<u8>>>| {
        let left = drained.saturating_duration_since(Instant::now());
        pipe.and_then(|pipe| pipe.recv_timeout(left).ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    let stderr = String::from_utf8_lossy(&stderr).trim().to_owned();
    let with_stderr = |message: String| {
        if stderr.is_empty() { message } else { format!("{message}; its last words: {stderr}") }
    };
    match ended {
        Ended::TimedOut => failed(
            FailureCode::TimedOut,
            with_stderr(format!("took longer than {} s and was killed", time_limit.as_secs_f32())),
        ),
        Ended::Cancelled => {
            failed(FailureCode::Cancelled, "the run was cancelled while this document was indexed")
        }
        Ended::Unknown(error) => {
            failed(FailureCode::Spawn, format!("can't wait for the subprocess: {error}"))
        }
        Ended::Exited(status) => {
            let line = String::from_utf8_lossy(&stdout);
            let line =
                line.lines().rev().find(|line| !line.trim().is_empty()).and_then(DocumentReport::from_line);
            outcome_of(status, line.map(|report| report.outcome), with_stderr)
        }
    }
}

/// The outcome by exit status and line: only both together make a success.
fn outcome_of(
    status: ExitStatus,
    line: Option<Outcome>,
    with_stderr: impl FnOnce(String) -> String,
) -> Outcome {
    match (status.signal(), status.code(), line) {
        (_, _, Some(outcome @ Outcome::Failed { .. })) | (None, Some(0), Some(outcome)) => outcome,
        (Some(signal), _, _) => {
            let name = Signal::try_from(signal).map_or("an unknown signal", Signal::as_str);
            failed(FailureCode::Killed, with_stderr(format!("the subprocess died of {name} ({signal})")))
        }
        (None, code, _) => {
            let code = code.map_or("an unknown status".to_owned(), |code| format!("status {code}"));
            let message = format!("the subprocess ended with {code} and did not report the document as done");
            failed(FailureCode::NoAnswer, with_stderr(message))
        }
    }
}

enum Ended {
    Exited(ExitStatus),
    TimedOut,
    Cancelled,
    Unknown(std::io::Error),
}

/// Waits for the child to end, kills its group at the limit or on cancellation and in any case before it is
/// reaped. Until then the child is a zombie, which holds its process id: the kill can't hit a stranger.
fn wait_and_reap(child: &mut Child, time_limit: Duration, cancel: &CancelToken) -> Ended {
    let Ok(pid) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return Ended::Unknown(std::io::Error::other("process id out of range"));
    };
    let (sender, events) = channel();
    let _watch = cancel.watch(sender.clone());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let exited = loop {
                match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                    Err(nix::errno::Errno::EINTR) => {}
                    result => break result.map(drop),
                }
            };
            let _ = sender.send(Event::Exited(exited));
        });
        let first = events.recv_timeout(time_limit);
        // Whatever the child left running goes with it; nothing left is not an error.
        let _ = killpg(pid, Signal::SIGKILL);
        match first {
            Ok(Event::Exited(Err(error))) => Ended::Unknown(error.into()),
            Ok(Event::Exited(Ok(()))) => match child.wait() {
                Ok(status) => Ended::Exited(status),
                Err(error) => Ended::Unknown(error),
            },
            Ok(Event::Cancelled) => reap_as(child, Ended::Cancelled),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                reap_as(child, Ended::TimedOut)
            }
        }
    })
}

fn reap_as(child: &mut Child, ended: Ended) -> Ended {
    match child.wait() {
        Ok(_) => ended,
        Err(error) => Ended::Unknown(error),
    }
}

/// Reads a pipe to its end in a thread, so that the child never blocks on it; sends the first bytes. The thread
/// outlives the call when a process that left the group keeps the pipe open: its output is not waited for.
fn keep_first(mut pipe: impl Read + Send + 'static, bytes_max: usize) -> Receiver<Vec<u8>> {
    read_in_thread(move |buffer, kept: &mut Vec<u8>| {
        let read = pipe.read(buffer)?;
        let room = bytes_max.saturating_sub(kept.len());
        kept.extend_from_slice(&buffer[..read.min(room)]);
        Ok(read)
    })
}

/// Like [`keep_first`], for the last bytes.
fn keep_last(mut pipe: impl Read + Send + 'static, bytes_max: usize) -> Receiver<Vec<u8>> {
    read_in_thread(move |buffer, kept: &mut Vec<u8>| {
        let read = pipe.read(buffer)?;
        kept.extend_from_slice(&buffer[..read]);
        let excess = kept.len().saturating_sub(bytes_max);
        kept.drain(..excess);
        Ok(read)
    })
}

fn read_in_thread(
    mut step: impl FnMut(&mut [u8], &mut Vec<u8>) -> std::io::Result<usize> + Send + 'static,
) -> Receiver<Vec<u8>> {
    const BUFFER_BYTES: usize = 8 << 10;
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut kept = Vec::new();
        loop {
            match step(&mut buffer, &mut kept) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let _ = sender.send(kept);
    });
    receiver
}

/// For the subprocess, first of all: from now on it is killed when its supervisor dies, however that dies. `false`
/// when the supervisor, named by [`SUPERVISOR_PID_ENV`], is dead already: then leave. Without that variable, or
/// on a system that can't do it, nothing is done and `true` returned.
pub fn die_with_supervisor() -> bool {
    let Some(supervisor) = std::env::var(SUPERVISOR_PID_ENV).ok().and_then(|pid| pid.parse::<i32>().ok())
    else {
        return true;
    };
    #[cfg(target_os = "linux")]
    if nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
        return true;
    }
    // Checked after the request: a supervisor that died in between is seen here.
    nix::unistd::getppid().as_raw() == supervisor
}

/// For the subprocess: bounds its private memory (heap and private mappings; shared ones don't count), so that a
/// document that makes a parser explode ends its own process and nothing else: an allocation beyond it aborts.
/// [`crate::limits::DOCUMENT_MEMORY_BYTES_MAX`] is the bound that fits the other limits.
pub fn bound_memory(bytes_max: u64) -> std::io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    let bound = bytes_max.min(hard);
    Ok(setrlimit(Resource::RLIMIT_DATA, bound, bound)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script);
        command
    }

    fn code(outcome: &Outcome) -> Option<FailureCode> {
        match outcome {
            Outcome::Failed { code, .. } => Some(*code),
            _ => None,
        }
    }

    fn run_script(script: &str, time_limit: Duration) -> Outcome {
        run_one(Path::new("a.md"), time_limit, &CancelToken::new(), &|_| shell(script))
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn others_go_on_when_some_fail() {
        let documents: Vec<PathBuf> = ["good", "bad", "dead", "mute", "exit"].map(PathBuf::from).to_vec();
        let mut seen = 0;
        let options = SuperviseOptions { jobs: 3, time_limit: LONG };
        let summary = run(
            &documents,
            &options,
            &CancelToken::new(),
            |path| {
                shell(match path.to_str() {
                    Some("good") => {
                        r#"echo noise; echo '{"path":"good","outcome":"indexed","chunks":2,"tokens":9}'"#
                    }
                    Some("bad") => {
                        r#"echo '{"path":"bad","outcome":"failed","code":"decode","message":"m"}'; exit 1"#
                    }
                    Some("dead") => "echo dying >&2; kill -9 $$",
                    Some("exit") => {
                        r#"echo '{"path":"e","outcome":"indexed","chunks":2,"tokens":9}'; exit 3"#
                    }
                    _ => "exit 0",
                })
            },
            |_| seen += 1,
        );
        assert_eq!((seen, summary.documents, summary.indexed, summary.failed), (5, 5, 1, 4));
        assert_eq!((summary.chunks, summary.tokens), (2, 9));
        let failures: Vec<_> = summary.failures.iter().map(|f| (f.path.to_str(), f.code)).collect();
        assert_eq!(
            failures,
            [
                (Some("bad"), FailureCode::Decode),
                (Some("dead"), FailureCode::Killed),
                (Some("exit"), FailureCode::NoAnswer),
                (Some("mute"), FailureCode::NoAnswer)
            ]
        );
        assert!(summary.failures[1].message.contains("dying"), "{}", summary.failures[1].message);
    }

    #[test]
    fn the_time_limit_kills_the_whole_group() {
        let folder = tempfile::tempdir().expect("temp dir");
        let pid_file = folder.path().join("pid");
        // The grandchild holds the pipes open: only killing the group ends it, and the wait for its output.
        let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
        let outcome = run_script(&script, Duration::from_millis(300));
        assert_eq!(code(&outcome), Some(FailureCode::TimedOut));
        if let Ok(pid) = std::fs::read_to_string(&pid_file) {
            let stat = format!("/proc/{}/stat", pid.trim());
            let lives = || {
                std::fs::read_to_string(&stat)
                    .is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
            };
            // The signal is sent; its delivery may take a moment.
            let deadline = Instant::now() + LONG;
            while lives() {
                assert!(Instant::now() < deadline, "grandchild lives");
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn leftovers_of_a_finished_child_are_killed() {
        let started = Instant::now();
        let line = r#"{"path":"a","outcome":"unchanged","chunks":1,"tokens":1}"#;
        let outcome = run_script(&format!("sleep 1000 & echo '{line}'"), LONG);
        assert_eq!(outcome, Outcome::Unchanged { chunks: 1, tokens: 1 });
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn floods_are_bounded_and_do_not_block() {
        let line = r#"{"path":"a","outcome":"failed","code":"model","message":"m"}"#;
        let outcome = run_script(&format!("echo '{line}'; head -c 3000000 /dev/zero >&2; exit 1"), LONG);
        assert_eq!(code(&outcome), Some(FailureCode::Model));
        let outcome = run_script("head -c 3000000 /dev/zero | tr '\\0' x; exit 7", LONG);
        assert_eq!(code(&outcome), Some(FailureCode::NoAnswer));
    }

    #[test]
    fn cancelling_kills_what_runs_and_starts_nothing_more() {
        let cancel = CancelToken::new();
        let documents: Vec<PathBuf> = (0..4).map(|n| PathBuf::from(n.to_string())).collect();
        let options = SuperviseOptions { jobs: 2, time_limit: LONG };
        let (started_sender, started) = channel();
        let summary = std::thread::scope(|scope| {
            let token = cancel.clone();
            scope.spawn(move || {
                started.recv().expect("one starts");
                token.cancel();
            });
            let make = |_: &Path| {
                let _ = started_sender.send(());
                shell("sleep 1000")
            };
            run(&documents, &options, &cancel, make, |_| {})
        });
        assert_eq!(summary.failed, 4);
        assert!(summary.failures.iter().all(|failure| failure.code == FailureCode::Cancelled));
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let outcome =
            run_one(Path::new("a"), LONG, &CancelToken::new(), &|_| Command::new("/nonexistent/program"));
        assert!(
            matches!(outcome, Outcome::Failed { code: FailureCode::Spawn, ref message } if message.contains("program"))
        );
    }
}

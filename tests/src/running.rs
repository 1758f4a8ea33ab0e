//! A broker of a test's own: on a socket in a folder of its own, stopped when the test ends, however it ends.

use crate::program::modelbroker;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shm_layout::wire::ModelReport;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use worker_sdk::{Client, Model, ModelRequest, Route, StartBroker, StatusReport};

/// What the broker's stderr goes to: its children log there.
const CHILDREN_LOG: &str = "test-children.log";

/// How long anything may take before a test calls it stuck.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A folder for one test's socket, logs and stores; private, and short enough for a socket path.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn run_folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("mb")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .tempdir_in("/tmp")
        .expect("a folder can be made in /tmp")
}

/// Waits until `condition` gives a value; asks again after a moment. For state that no event announces.
///
/// # Panics
/// When it takes longer than [`PATIENCE`].
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < until, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A broker process that serves on a socket of its own.
#[derive(Debug)]
pub struct Broker {
    child: Child,
    folder: TempDir,
}

impl Broker {
    /// Starts a broker and waits until it accepts connections.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start(arguments: &[&str]) -> Broker {
        Broker::start_in(run_folder(), arguments)
    }

    /// Starts a broker on the socket in `folder`.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn start_in(folder: TempDir, arguments: &[&str]) -> Broker {
        let log = folder.path().join("broker.log");
        // Tests that ask for a text twice want it computed twice, unless they say otherwise.
        let cache: &[&str] =
            if arguments.contains(&"--cache-entries") { &[] } else { &["--cache-entries", "0"] };
        let mut child = Command::new(modelbroker())
            .arg("--socket")
            .arg(folder.path().join("b.sock"))
            .args(["serve", "--ready-fd", "1", "--log-file"])
            .arg(&log)
            .args(cache)
            .args(arguments)
            // No configuration file but what a test names.
            .env("XDG_CONFIG_HOME", folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(folder.path().join(CHILDREN_LOG)).expect("a file can be made"))
            .spawn()
            .expect("the broker can be started");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("stdout is piped");
        BufReader::new(stdout).read_line(&mut line).expect("the broker's stdout can be read");
        let log = std::fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(line, "ready\n", "the broker did not come up:\n{log}");
        Broker { child, folder }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("b.sock")
    }

    /// The test's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// What it has logged, and then what its children have.
    #[must_use]
    pub fn log(&self) -> String {
        let read = |name| std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        read("broker.log") + &read(CHILDREN_LOG)
    }

    /// A client of it, which starts no other.
    ///
    /// # Panics
    /// When it cannot connect.
    #[must_use]
    pub fn client(&self) -> Client {
        let builder = Client::builder().socket(self.socket()).start_broker(StartBroker::Never);
        builder.connect().expect("a client can connect")
    }

    /// A lease on the default model by a client of its own.
    ///
    /// # Panics
    /// When it cannot be had.
    #[must_use]
    pub fn model(&self, route: Route) -> Model {
        let request = ModelRequest::new("").route(route);
        self.client().model_with(request).expect("the default model can be leased")
    }

    /// Its state.
    ///
    /// # Panics
    /// When it does not answer.
    #[must_use]
    pub fn status(&self) -> StatusReport {
        self.client().status().expect("the broker answers")
    }

    /// The models that were loaded, or tried; not those that are only configured.
    ///
    /// # Panics
    /// When the broker does not answer.
    #[must_use]
    pub fn asked_models(&self) -> Vec<ModelReport> {
        let asked = |model: &ModelReport| model.loads > 0 || model.error.is_some();
        self.status().models.into_iter().filter(asked).collect()
    }

    /// The engine's process; waits while it is being replaced.
    #[must_use]
    pub fn engine_pid(&self) -> Pid {
        eventually("an engine is up", || self.status().engines.first().map(|e| e.pid).filter(|pid| *pid != 0))
            .try_into()
            .map(Pid::from_raw)
            .expect("a process id")
    }

    /// Runs `modelbroker` against it with `input` on stdin.
    ///
    /// # Panics
    /// When the program cannot be run.
    #[must_use]
    pub fn run(&self, arguments: &[&str], input: &[u8]) -> Output {
        run_program(Some(&self.socket()), arguments, input)
    }

    /// Asks it to leave, as a service manager does, and checks that nothing stays: no process, no socket, no lock. Gives
    /// what it logged.
    ///
    /// # Panics
    /// When something stays, or it does not leave.
    pub fn stop(mut self) -> String {
        let engine = self.engine_pid();
        kill(self.pid(), Signal::SIGTERM).expect("the broker is alive");
        let status = self.wait();
        assert!(status.success(), "the broker ended with {status}:\n{}", self.log());
        eventually("the engine is gone", || kill(engine, None).is_err().then_some(()));
        let left: Vec<_> = std::fs::read_dir(self.folder.path())
            .expect("the folder is there")
            .flatten()
            .map(|entry| entry.file_name())
            .filter(|name| name != "broker.log" && !name.to_string_lossy().starts_with("test-"))
            .collect();
        assert!(left.is_empty(), "left in the run folder: {left:?}");
        self.log()
    }

    /// Kills it on the spot and waits until it is gone; gives its folder back, with what a killed broker leaves.
    ///
    /// # Panics
    /// When it cannot be killed.
    #[must_use]
    pub fn kill_at_once(mut self) -> TempDir {
        kill(self.pid(), Signal::SIGKILL).expect("the broker is alive");
        self.wait();
        std::mem::replace(&mut self.folder, run_folder())
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        eventually("the broker ends", || self.child.try_wait().expect("a child can be waited for"))
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- broker's log ---\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `modelbroker` with `input` on stdin.
///
/// # Panics
/// When the program cannot be run.
#[must_use]
pub fn run_program(socket: Option<&Path>, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = Command::new(modelbroker());
    if let Some(socket) = socket {
        command.arg("--socket").arg(socket);
    }
    let mut child = command
        .args(arguments)
        .env("MODELBROKER_BIN", modelbroker())
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("modelbroker can be run");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let input = input.to_vec();
    // Fed from a thread: a program that writes before it has read everything must not block both sides.
    let feeder = std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("modelbroker ends");
    let _ = feeder.join();
    output
}

/// Asserts that a program did what it was asked to, showing what it said where it did not.
///
/// # Panics
/// When it ended with another exit code than 0.
pub fn assert_ok(output: &Output) {
    assert!(
        output.status.success(),
        "ended with {}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

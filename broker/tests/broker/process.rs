//! A broker process in a folder of its own, ended with the test.

use crate::client::Client;
use shm_layout::wire::{BrokerMessage, ClientMessage, StatusReport};
use shm_os::process::{pidfd_open, pidfd_send_signal};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longer than anything takes; reached only by a failing test.
pub(crate) const LONG: Duration = Duration::from_secs(60);
const POLL_PAUSE: Duration = Duration::from_millis(1);
pub(crate) const CHILD: &str = env!("CARGO_BIN_EXE_broker-test-child");
pub(crate) const SIGKILL: i32 = 9;
pub(crate) const SIGTERM: i32 = 15;

/// A running broker.
pub(crate) struct Broker {
    pub(crate) folder: PathBuf,
    _temp: Option<tempfile::TempDir>,
    child: Child,
    stdout: BufReader<ChildStdout>,
}

/// The command of a broker in this folder.
pub(crate) fn serve(folder: &Path, settings: &[&str]) -> Command {
    let mut command = Command::new(CHILD);
    command.arg("serve").arg(folder).args(settings).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

pub(crate) fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

impl Broker {
    /// A broker in a new folder, ready.
    pub(crate) fn start(settings: &[&str]) -> Broker {
        let temp = temp();
        let mut broker = Broker::start_in(temp.path(), settings);
        broker._temp = Some(temp);
        broker
    }

    /// A broker in this folder, ready.
    pub(crate) fn start_in(folder: &Path, settings: &[&str]) -> Broker {
        let mut broker = Broker::spawn(serve(folder, settings), folder);
        assert_eq!(broker.line(), "ready");
        broker
    }

    pub(crate) fn spawn(mut command: Command, folder: &Path) -> Broker {
        let mut child = command.spawn().expect("the test's child starts");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        Broker { folder: folder.to_path_buf(), _temp: None, child, stdout }
    }

    /// The next line that it prints.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("run/socket")
    }

    /// A client with its session open.
    pub(crate) fn client(&self) -> Client {
        Client::open(&self.socket())
    }

    pub(crate) fn signal(&self, number: i32) {
        signal(self.child.id(), number);
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut rest = Vec::new();
        // Ends with the process: it alone holds the other end.
        self.stdout.read_to_end(&mut rest).expect("its output");
        self.child.wait().expect("its end")
    }

    /// What lies in its run folder.
    pub(crate) fn run_folder(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.join("run")).expect("the run folder");
        entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// The loads that were begun, as `NAME PID`.
    pub(crate) fn loads(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.folder.join("loads")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }

    /// How the next engine behaves.
    pub(crate) fn set_engine(&self, mode: &str) {
        std::fs::write(self.folder.join("engine"), mode).expect("a mode");
    }

    /// Lets loads that wait finish.
    pub(crate) fn go(&self) {
        std::fs::write(self.folder.join("go"), "").expect("a mark");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn signal(pid: u32, number: i32) {
    if let Ok(pidfd) = pidfd_open(pid as i32) {
        let _ = pidfd_send_signal(pidfd.as_fd(), number);
    }
}

/// Waits for the end of any process.
pub(crate) fn ended(pid: u32) {
    let Ok(pidfd) = pidfd_open(pid as i32) else { return };
    let poller = shm_os::Poller::new().expect("a poller");
    poller.add(&pidfd, 0, shm_os::Interest::READABLE).expect("watched");
    assert_eq!(poller.wait(&mut Vec::new(), Some(LONG)).expect("waited"), 1, "process {pid} lives on");
}

/// Asks for reports until one is as wanted; asking is what time passes with.
pub(crate) fn until(client: &mut Client, what: &str, wanted: impl Fn(&StatusReport) -> bool) -> StatusReport {
    let started = Instant::now();
    loop {
        let request = client.ask(ClientMessage::Status);
        let BrokerMessage::Status(report) = client.reply(request) else { panic!("no report") };
        if wanted(&report) {
            return report;
        }
        assert!(started.elapsed() < LONG, "never: {what}; last report {report:?}");
        // Only to leave the processors to those that are waited for.
        std::thread::sleep(POLL_PAUSE);
    }
}

//! Storms: load with every answer checked while engines, clients and brokers are killed. Nothing may be lost, repeated or
//! wrong, and nothing may stay held.
//!
//! `MODELBROKER_STORM_SECONDS=30` makes each storm as long as that (5 s by default); `MODELBROKER_STORM_MODEL` runs it on
//! another model than the tiny one of this repository, such as `all-MiniLM-L6-v2`.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tests::census::{Census, children_of, shared_memory_names};
use tests::program::{modelbroker, workspace};
use tests::running::{Broker, eventually, run_folder};
use worker_sdk::{Client, StartBroker};

/// Time between two kills.
const KILL_EVERY: Duration = Duration::from_millis(300);

fn storm_seconds() -> u64 {
    std::env::var("MODELBROKER_STORM_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(5)
}

fn model() -> String {
    std::env::var("MODELBROKER_STORM_MODEL")
        .unwrap_or_else(|_| workspace().join("tests/parity/tiny/bert_mean").to_string_lossy().into_owned())
}

/// Where compiled images of the tiny model go; other models go where they always do.
fn cache_dir() -> Option<PathBuf> {
    let tiny = std::env::var_os("MODELBROKER_STORM_MODEL").is_none();
    tiny.then(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("storm-cache"))
}

fn start_broker() -> Broker {
    let mut arguments = vec!["--inspectable".to_owned(), "--model".into(), model()];
    if let Some(cache_dir) = cache_dir() {
        arguments.extend(["--cache-dir".into(), cache_dir.to_string_lossy().into_owned()]);
    }
    Broker::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// A load that runs while a test does its worst.
struct Load {
    child: Child,
    output: PathBuf,
}

impl Load {
    fn start(socket: &Path, folder: &Path, route: &str, seconds: u64, extra: &[&str]) -> Load {
        let output = folder.join(format!("test-load-{}.json", extra.concat().replace(['/', '-'], "")));
        let mut command = Command::new(modelbroker());
        if let Some(cache_dir) = cache_dir() {
            // For brokers that the load's clients start.
            command.env("MODELBROKER_CACHE_DIR", cache_dir);
        }
        let child = command
            .arg("--socket")
            .arg(socket)
            .args(["load", "--json", "--tokens", "10", "--model", &model(), "--route", route])
            .args(["--duration", &seconds.to_string()])
            .args(extra)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&output).expect("a file for the report"))
            .spawn()
            .expect("the load can be started");
        Load { child, output }
    }

    /// Waits until its clients run.
    fn await_clients(&mut self, count: usize) {
        eventually("the load's clients run", || {
            assert!(self.is_running(), "the load ended before its clients ran");
            (self.clients().len() == count).then_some(())
        });
    }

    /// Its clients' processes. A broker that it started is its child as well.
    fn clients(&self) -> Vec<u32> {
        let is_client = |pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|argument| argument == b"worker")
        };
        children_of(self.child.id()).into_iter().filter(is_client).collect()
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Its report, and its exit code.
    fn finish(mut self) -> (Value, Option<i32>) {
        let status = eventually("the load ends", || self.child.try_wait().expect("a child can be asked"));
        let text = std::fs::read_to_string(&self.output).expect("the report can be read");
        let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {status}: {text:?}"));
        (report, status.code())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that was asked was answered, once, rightly.
fn assert_flawless((report, code): &(Value, Option<i32>)) {
    for name in ["lost", "wrong", "duplicated", "errors", "clients_killed", "clients_failed"] {
        assert_eq!(report[name], 0, "{name}: {report:#}");
    }
    assert_eq!(report["submitted"], report["completed"], "{report:#}");
    assert!(report["completed"].as_u64() > Some(0) && report["verified"] == true, "{report:#}");
    assert_eq!(*code, Some(0), "{report:#}");
}

fn kill_pid(pid: u32) {
    // Gone already is what was wanted.
    let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
}

/// Calls `strike` every [`KILL_EVERY`] while `load` runs; gives how often.
fn while_running(load: &mut Load, mut strike: impl FnMut()) -> u32 {
    let (begun, mut strikes) = (Instant::now(), 0);
    while load.is_running() {
        if begun.elapsed() >= KILL_EVERY * (strikes + 1) {
            strike();
            strikes += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    strikes
}

fn engines_are_killed(route: &str) {
    let broker = start_broker();
    let watcher = broker.client();
    watcher.model("").expect("the model can be had");
    let before =
        eventually("the broker is at rest", || Census::take(&broker, &watcher).filter(|c| c.leases == 0));
    let extra = ["--verify", "--clients", "2", "--threads", "3", "--bulk", "0.34", "--bulk-batch", "8"];
    let mut load = Load::start(&broker.socket(), broker.folder(), route, storm_seconds(), &extra);
    load.await_clients(2);
    let mut killed = Vec::new();
    while_running(&mut load, || {
        let status = watcher.status().expect("the broker answers");
        if let Some(pid) = status.engines.iter().map(|engine| engine.pid).find(|pid| *pid != 0) {
            kill_pid(pid);
            killed.push(pid);
        }
    });
    let outcome = load.finish();
    killed.dedup();
    println!("{route}: {} engines killed, {}", killed.len(), outcome.0["completed"]);
    assert_flawless(&outcome);
    // A client notices nothing of an engine's death: its lane is the same.
    assert_eq!(outcome.0["reconnects"], 0, "{:#}", outcome.0);
    assert!(killed.len() as u64 >= storm_seconds(), "only {} engines were killed", killed.len());
    before.await_again(&broker, &watcher);
    assert_eq!(broker.status().engines[0].restarts, killed.len() as u64);
    drop(watcher);
    broker.stop();
    assert_eq!(shared_memory_names(), [""; 0]);
}

#[test]
fn engines_are_killed_under_load_through_lanes() {
    engines_are_killed("lane");
}

#[test]
fn engines_are_killed_under_load_through_the_socket() {
    engines_are_killed("socket");
}

fn clients_are_killed(route: &str) {
    let broker = start_broker();
    let watcher = broker.client();
    watcher.model("").expect("the model can be had");
    let before =
        eventually("the broker is at rest", || Census::take(&broker, &watcher).filter(|c| c.leases == 0));
    let extra = ["--verify", "--clients", "1", "--threads", "2"];
    let mut load = Load::start(&broker.socket(), broker.folder(), route, storm_seconds(), &extra);
    load.await_clients(1);
    let (mut victims, mut killed) = (None, 0);
    while_running(&mut load, || {
        // Others come and are killed, at whatever they are doing: connecting, leasing, sending, waiting.
        let extra = ["--clients", "3", "--threads", "2", "--batch", "4"];
        let victim =
            victims.get_or_insert_with(|| Load::start(&broker.socket(), broker.folder(), route, 600, &extra));
        for pid in victim.clients().into_iter().take(1 + killed % 3) {
            kill_pid(pid);
            killed += 1;
        }
        if !victim.is_running() {
            victims = None;
        }
    });
    if let Some(mut victim) = victims.take() {
        victim.await_or_kill_clients();
    }
    let outcome = load.finish();
    println!("{route}: {killed} clients killed, {}", outcome.0["completed"]);
    assert_flawless(&outcome);
    assert!(killed > 5, "only {killed} clients were killed");
    before.await_again(&broker, &watcher);
    assert_eq!(watcher.status().expect("the broker answers").faults, 0);
    drop(watcher);
    broker.stop();
    assert_eq!(shared_memory_names(), [""; 0]);
}

impl Load {
    /// Kills the clients until the load ends, and looks at what it says of that.
    fn await_or_kill_clients(&mut self) {
        eventually("the load with killed clients ends", || {
            self.clients().into_iter().for_each(kill_pid);
            self.child.try_wait().expect("a child can be asked")
        });
        let report = std::fs::read_to_string(&self.output).expect("the report can be read");
        let report: Value = serde_json::from_str(&report).expect("the report is whole");
        assert_eq!((&report["clients_killed"], &report["lost"]), (&3.into(), &0.into()), "{report:#}");
    }
}

#[test]
fn clients_are_killed_beside_others_on_lanes() {
    clients_are_killed("lane");
}

#[test]
fn clients_are_killed_beside_others_on_the_socket() {
    clients_are_killed("socket");
}

/// Whoever is first starts the next broker: the clients themselves.
fn brokers_are_killed(route: &str) {
    let folder = run_folder();
    let socket = folder.path().join("b.sock");
    let extra = ["--verify", "--clients", "2", "--threads", "2", "--timeout", "60"];
    let mut load = Load::start(&socket, folder.path(), route, storm_seconds().max(6), &extra);
    load.await_clients(2);
    let watcher = || {
        let client = Client::builder().socket(&socket).start_broker(StartBroker::Never);
        client.connect().and_then(|client| client.status())
    };
    let begun = Instant::now();
    let mut killed = Vec::new();
    // Not up to the end: what comes back must have time to answer what waits.
    while load.is_running() && begun.elapsed().as_secs() + 2 < storm_seconds().max(6) {
        // Only a broker that serves clients at work is worth killing.
        let status = watcher().ok().filter(|status| status.sessions.iter().any(|session| session.leases > 0));
        if let Some(status) = status {
            kill_pid(status.broker_pid);
            killed.push(status.broker_pid);
        }
        std::thread::sleep(KILL_EVERY * 3);
    }
    let outcome = load.finish();
    killed.dedup();
    println!("{route}: {} brokers killed, {}", killed.len(), outcome.0["completed"]);
    assert_flawless(&outcome);
    assert!(killed.len() >= 2 && outcome.0["reconnects"].as_u64() >= Some(2), "{killed:?} {:#}", outcome.0);
    // One broker is left, started by a client; told to leave it leaves nothing.
    let last = Client::builder()
        .socket(&socket)
        .start_broker(StartBroker::Never)
        .connect()
        .expect("a broker is there");
    last.shutdown(Duration::from_secs(5)).expect("it leaves");
    eventually("socket and lock are gone", || {
        let left = std::fs::read_dir(folder.path()).expect("the folder is there").flatten();
        let mut left = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("b.sock"));
        left.next().is_none().then_some(())
    });
    assert_eq!(shared_memory_names(), [""; 0]);
}

#[test]
fn brokers_are_killed_with_clients_waiting_on_lanes() {
    brokers_are_killed("lane");
}

#[test]
fn brokers_are_killed_with_clients_waiting_on_the_socket() {
    brokers_are_killed("socket");
}

//! Engines as processes that are killed: whatever the instant, the next one answers each job exactly once.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::double::{Double, DoubleLoader};
use common::{Broker, Client};
use engine_host::{HostOptions, run_with};
use shm_layout::code::Code;
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::wire::{FromEngine, Operation, Priority};
use shm_os::socket;
use std::io::{BufRead, BufReader, Lines};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Set for the child: it is to run an engine on its standard input. `open`: its gate is open.
const CHILD: &str = "ENGINE_HOST_TEST_CHILD";

/// Not a test: what a child of the tests runs.
#[test]
fn engine_child() {
    let Ok(gate) = std::env::var(CHILD) else { return };
    let link = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let model = Double { says_passes: true, ..Double::default() };
    if gate == "open" {
        model.gate.open();
    }
    let outcome = run_with(link, DoubleLoader { model }, HostOptions::default());
    std::process::exit(i32::from(outcome.is_err()));
}

struct Engine {
    child: Child,
    broker: Broker,
    output: Lines<BufReader<ChildStdout>>,
}

impl Engine {
    /// Starts an engine, gives it model 1 and the lanes.
    fn start(gate: &str, clients: &[&Client]) -> Engine {
        let (ours, theirs) = socket::socketpair().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["engine_child", "--exact", "--nocapture"])
            .env(CHILD, gate)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut broker = Broker::new(ours);
        broker.expect(|message| matches!(message, FromEngine::Ready { .. }));
        broker.load(1);
        for client in clients {
            broker.add_lane(client, 1);
        }
        Engine { child, broker, output }
    }

    /// Waits until a pass with this text begins.
    fn wait_for_pass(&mut self, text: &str) {
        let begins = |line: &str| {
            line.split_once("pass ").is_some_and(|(_, texts)| texts.split('|').any(|other| other == text))
        };
        assert!(self.output.by_ref().any(|line| begins(&line.unwrap())), "the engine ended first");
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        // Reaped: from here on it writes nothing into any lane.
        self.child.wait().unwrap();
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

#[test]
fn killed_in_the_middle_of_a_batch() {
    let (mut a, mut b) = (Client::new(1), Client::new(2));
    // In the ring before there is an engine, taken and being computed, taken and queued, and in the ring at its death.
    let mut tickets_b = vec![b.embed(Priority::Bulk, &["early", "bird"])];
    let ticket = a.embed(Priority::Interactive, &["GATE"]);
    let mut engine = Engine::start("closed", &[&a, &b]);
    engine.broker.job(5, 0, Operation::Embed, &["relayed"]);
    engine.wait_for_pass("GATE");
    for _ in 0..50 {
        tickets_b.push(b.embed(Priority::Interactive, &["x", "y"]));
    }
    engine.kill();
    let mut engine = Engine::start("open", &[&a, &b]);
    engine.broker.job(5, 1, Operation::Embed, &["relayed"]);
    assert_eq!(a.code(ticket), Code::Ok);
    for ticket in tickets_b {
        assert_eq!(b.code(ticket), Code::Ok);
    }
    assert_eq!(engine.broker.answer(5).0, Code::Ok);
    for client in [&mut a, &mut b] {
        client.wait_for_all();
        client.check_vectors();
    }
    engine.kill();
}

#[test]
fn killed_with_answers_that_nobody_has_reaped() {
    let mut client = Client::new(1);
    let engine = Engine::start("open", &[&client]);
    let first: Vec<_> = (0..20).map(|_| client.embed(Priority::Bulk, &["a", "b"])).collect();
    // Nothing is reaped: this only sleeps until the first answers are there.
    while let Some(tail) = client.lane.prepare_wait() {
        client.lane.memory().wait_completion(tail, Duration::from_millis(50)).unwrap();
    }
    engine.kill();
    let engine = Engine::start("open", &[&client]);
    let last = client.embed(Priority::Interactive, &["c"]);
    for ticket in first.into_iter().chain([last]) {
        assert_eq!(client.code(ticket), Code::Ok);
    }
    client.wait_for_all();
    client.check_vectors();
    engine.kill();
}

#[test]
fn a_text_that_kills_engines_is_given_up_and_takes_nobody_along() {
    let (mut bad, mut good) = (Client::new(1), Client::new(2));
    let ticket = bad.embed(Priority::Interactive, &["ABORT"]);
    let beside = bad.embed(Priority::Interactive, &["beside"]);
    let others: Vec<_> = (0..30).map(|_| good.embed(Priority::Interactive, &["fine"])).collect();
    let mut deaths = 0;
    let mut engine = Engine::start("open", &[&bad, &good]);
    while !bad.answers.contains_key(&ticket) {
        bad.wait(Duration::from_millis(2));
        if engine.has_ended() {
            deaths += 1;
            assert!(deaths <= MAX_JOB_ATTEMPTS, "it is tried again and again");
            engine = Engine::start("open", &[&bad, &good]);
        }
    }
    assert_eq!(deaths, MAX_JOB_ATTEMPTS);
    assert_eq!(bad.code(ticket), Code::JobCrashedEngine);
    assert_eq!(bad.code(beside), Code::Ok);
    for ticket in others {
        assert_eq!(good.code(ticket), Code::Ok);
    }
    bad.wait_for_all();
    good.wait_for_all();
    good.check_vectors();
    engine.kill();
}

#[test]
fn a_storm_of_kills_loses_and_doubles_nothing() {
    let mut clients: Vec<Client> = (1..=3).map(Client::new).collect();
    let mut engine = Engine::start("open", &clients.iter().collect::<Vec<_>>());
    let (mut submitted, mut answered, mut kills) = (0usize, 0usize, 0usize);
    const JOBS: usize = 900;
    while answered < JOBS {
        for client in &mut clients {
            while submitted < JOBS && client.lane.in_flight() < 40 {
                let texts: Vec<String> = (0..1 + submitted % 5).map(|i| format!("{submitted} {i}")).collect();
                let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
                let priority =
                    if submitted.is_multiple_of(3) { Priority::Bulk } else { Priority::Interactive };
                let _ = client.embed(priority, &texts);
                submitted += 1;
            }
            answered += client.wait(Duration::from_millis(1));
        }
        // At whatever it is doing by then.
        if answered > 60 * (kills + 1) && kills < 12 {
            kills += 1;
            engine.kill();
            engine = Engine::start("open", &clients.iter().collect::<Vec<_>>());
        }
    }
    assert!(kills >= 8, "{kills}");
    for client in &mut clients {
        client.wait_for_all();
        assert!(client.answers.values().all(|(code, _)| *code == Code::Ok));
        client.check_vectors();
    }
    engine.kill();
}

//! Start and end: one broker at a time, nothing left behind, accepted work finished.

use crate::client::Client;
use crate::process::{Broker, SIGKILL, SIGTERM, ended, serve, temp, until};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, ClientMessage};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

#[test]
fn a_second_broker_is_told_of_the_first() {
    let broker = Broker::start(&[]);
    let mut second = Broker::spawn(serve(&broker.folder, &[]), &broker.folder);
    let said = second.line();
    assert!(said.contains("running already") && said.contains(&broker.pid().to_string()), "{said}");
    assert_eq!(second.wait().code(), Some(3));
    broker.client().pings();
}

#[test]
fn of_many_racing_starters_one_serves() {
    let temp = temp();
    let mut starters: Vec<Broker> =
        (0..6).map(|_| Broker::spawn(serve(temp.path(), &[]), temp.path())).collect();
    let said: Vec<String> = starters.iter_mut().map(Broker::line).collect();
    assert_eq!(said.iter().filter(|line| *line == "ready").count(), 1, "{said:?}");
    Client::open(&temp.path().join("run/socket")).pings();
}

#[test]
fn a_killed_broker_leaves_nothing_that_hinders_the_next() {
    let temp = temp();
    let mut broker = Broker::start_in(temp.path(), &[]);
    let mut client = broker.client();
    let engine = until(&mut client, "engine", |r| r.engines[0].threads > 0).engines[0].pid;
    client.lane();
    broker.signal(SIGKILL);
    broker.wait();
    ended(engine);
    assert!(broker.socket().exists(), "a killed process removes nothing");
    let mut next = Broker::start_in(temp.path(), &[]);
    let meta = std::fs::metadata(next.socket()).unwrap();
    assert_eq!(meta.mode() & 0o777, 0o600);
    next.client().lane();
    next.signal(SIGTERM);
    assert!(next.wait().success());
    assert_eq!(next.run_folder(), Vec::<String>::new());
}

#[test]
fn unusable_places_are_named_with_the_way_out() {
    let temp = temp();
    let long = format!("socket=/tmp/{}/socket", "x".repeat(120));
    let mut broker = Broker::spawn(serve(temp.path(), &[&long]), temp.path());
    let said = broker.line();
    assert!(said.contains("choose a shorter one"), "{said}");
    let run = temp.path().join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut broker = Broker::spawn(serve(temp.path(), &[]), temp.path());
    let said = broker.line();
    assert!(said.contains("chmod 700"), "{said}");
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::create_dir(run.join("socket")).unwrap();
    let mut broker = Broker::spawn(serve(temp.path(), &[]), temp.path());
    let said = broker.line();
    assert!(said.contains("is not a socket"), "{said}");
}

#[test]
fn sigterm_finishes_what_was_accepted() {
    let mut broker = Broker::start(&[]);
    let mut client = broker.client();
    let (lease, _) = client.lane();
    let (held, _) = client.submit(lease, "hold");
    let engine = until(&mut client, "job in engine", |r| r.engines[0].totals.queued_jobs == 1).engines[0].pid;
    broker.signal(SIGTERM);
    assert_eq!(client.reply(0), BrokerMessage::ShuttingDown);
    assert_eq!(client.answer(held).payload, b"released");
    assert_eq!(client.until_closed(), []);
    assert!(broker.wait().success());
    ended(engine);
    assert_eq!(broker.run_folder(), Vec::<String>::new());
}

#[test]
fn nothing_new_is_taken_while_leaving() {
    let broker = Broker::start(&[]);
    broker.set_engine("ignores-drain");
    let mut client = broker.client();
    let engine = client.status().engines[0].pid;
    crate::process::signal(engine, SIGKILL);
    let lease = client.lease();
    client.submit(lease, "hold");
    let asked = client.ask(ClientMessage::Shutdown { drain_ms: 60_000 });
    assert_eq!(client.reply(asked), BrokerMessage::ShuttingDown);
    let (submitted, _) = client.submit(lease, "echo x");
    assert_eq!(client.refusal(submitted).code, Code::ShuttingDown);
    let acquired = client.asks_for("m", false, false, 1000);
    assert_eq!(client.refusal(acquired).code, Code::ShuttingDown);
    Client::connect(&broker.socket()).is_refused_and_closed(Code::ShuttingDown);
}

#[test]
fn a_second_signal_or_the_time_limit_ends_the_wait() {
    for (settings, signals) in [(["drain_ms=60000"], 2), (["drain_ms=30"], 1)] {
        let temp = temp();
        std::fs::write(temp.path().join("engine"), "ignores-drain").unwrap();
        let mut broker = Broker::start_in(temp.path(), &settings);
        let mut client = broker.client();
        let lease = client.lease();
        let (held, _) = client.submit(lease, "hold");
        until(&mut client, "job in engine", |r| r.engines[0].totals.queued_jobs == 1);
        broker.signal(SIGTERM);
        assert_eq!(client.reply(0), BrokerMessage::ShuttingDown);
        if signals == 2 {
            broker.signal(SIGTERM);
        }
        assert_eq!(client.answer(held).status, Code::ShuttingDown);
        assert!(broker.wait().success());
        assert_eq!(broker.run_folder(), Vec::<String>::new());
    }
}

#[test]
fn it_leaves_when_nobody_needs_it() {
    let mut broker = Broker::start(&["idle_exit_ms=300"]);
    let mut client = broker.client();
    client.lane();
    drop(client);
    assert!(broker.wait().success());
    assert_eq!(broker.run_folder(), Vec::<String>::new());
}

#[test]
fn an_idle_broker_sleeps() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    client.lane();
    client.pings();
    let wakeups = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", broker.pid())).unwrap();
        status.lines().filter(|l| l.contains("ctxt_switches")).map(str::to_owned).collect::<Vec<_>>()
    };
    // It may still be on its way to sleep after the last answer.
    let mut before = wakeups();
    loop {
        std::thread::sleep(std::time::Duration::from_millis(150));
        let now = wakeups();
        if now == before {
            break;
        }
        before = now;
    }
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", broker.pid())).unwrap();
    assert!(stat.contains(") S "), "{stat}");
}

//! Engines that die, hang or lie: the next one takes over, and no client is told.

use crate::client::Client;
use crate::process::{Broker, SIGKILL, ended, signal, temp, until};
use shm_layout::code::Code;
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::wire::BrokerMessage;
use std::collections::BTreeSet;

/// Kills the engine and waits until another serves.
fn kill_engine(client: &mut Client) {
    let before = until(client, "an engine", |r| r.engines[0].threads > 0).engines[0].clone();
    signal(before.pid, SIGKILL);
    until(client, "a new engine", |r| {
        r.engines[0].incarnation > before.incarnation && r.engines[0].threads > 0
    });
}

#[test]
fn twenty_kills_lose_no_job_and_answer_none_twice() {
    let broker = Broker::start(&["max_session_jobs=500"]);
    let mut client = broker.client();
    let lease = client.lease();
    let mut expected = Vec::new();
    for round in 0..20 {
        for n in 0..3 {
            expected.push((client.submit(lease, "unstarted").0, b"released".to_vec()));
            let text = format!("{round}-{n}");
            expected.push((client.submit(lease, &format!("echo {text}")).0, text.into_bytes()));
        }
        kill_engine(&mut client);
    }
    expected.push((client.submit(lease, "release").0, Vec::new()));
    let mut answered = BTreeSet::new();
    for (request, payload) in expected {
        let answer = client.answer(request);
        assert_eq!((answer.status, answer.payload), (Code::Ok, payload));
        assert!(answered.insert(answer.job_id), "answered twice");
    }
    assert_eq!(client.status().engines[0].restarts, 20);
    client.pings();
    drop(broker);
    assert_eq!(client.until_closed(), [], "answers left over");
}

#[test]
fn lanes_are_taken_over() {
    let broker = Broker::start(&[]);
    let mut clients: Vec<Client> = (0..5).map(|_| broker.client()).collect();
    let mut lanes: Vec<(u64, u64)> = clients.iter_mut().map(Client::lane).collect();
    let listed =
        |lanes: &[(u64, u64)]| lanes.iter().map(|(_, l)| l.to_string()).collect::<Vec<_>>().join(",");
    for _ in 0..3 {
        kill_engine(&mut clients[0]);
        let lease = lanes[0].0;
        assert_eq!(clients[0].runs(lease, "lanes"), listed(&lanes));
    }
    clients.pop();
    lanes.pop();
    until(&mut clients[0], "lane let go", |r| r.engines[0].lanes == 4);
    let lease = lanes[0].0;
    assert_eq!(clients[0].runs(lease, "lanes"), listed(&lanes));
}

#[test]
fn a_job_that_kills_engines_is_given_up_and_the_others_are_not() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let lease = client.lease();
    let (bad, _) = client.submit(lease, "crash");
    let (good, _) = client.submit(lease, "echo x");
    let answer = client.answer(bad);
    assert_eq!(answer.status, Code::JobCrashedEngine);
    assert_eq!(client.answer(good).status, Code::Ok);
    assert_eq!(client.runs(lease, "crash-until 3"), "3");
    let (garbage, _) = client.submit(lease, "garbage");
    assert_eq!(client.answer(garbage).status, Code::JobCrashedEngine);
    let report = client.status();
    assert_eq!(report.engines[0].restarts, u64::from(2 * MAX_JOB_ATTEMPTS + 3));
    assert_eq!(report.faults, 0);
}

#[test]
fn an_engine_that_cannot_start_is_told_to_those_who_wait() {
    let temp = temp();
    std::fs::write(temp.path().join("engine"), "dies-at-start").unwrap();
    let broker = Broker::start_in(temp.path(), &[]);
    let mut client = broker.client();
    let request = client.asks_for("m", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::ModelUnavailable);
    assert!(refusal.retry_after_ms > 0 && refusal.message.contains("status 9"), "{}", refusal.message);
    let request = client.asks_for("m", false, true, 60_000);
    client.granted(request);
    broker.set_engine("");
    client.lane();
}

#[test]
fn an_engine_that_closes_its_link_and_stays_is_replaced() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let lease = client.lease();
    let before = until(&mut client, "an engine", |r| r.engines[0].threads > 0).engines[0].clone();
    client.submit(lease, "lingers");
    until(&mut client, "a new engine", |r| r.engines[0].incarnation > before.incarnation);
    ended(before.pid);
}

#[test]
fn a_missing_engine_program_is_named() {
    let broker = Broker::start(&["engine_program=/nonexistent/engine"]);
    let mut client = broker.client();
    let request = client.asks_for("m", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::ModelUnavailable);
    assert!(refusal.message.contains("/nonexistent/engine"), "{}", refusal.message);
}

#[test]
fn an_engine_that_never_reports_itself_is_replaced() {
    let temp = temp();
    std::fs::write(temp.path().join("engine"), "never-ready").unwrap();
    let broker = Broker::start_in(temp.path(), &["engine_start_ms=100"]);
    let mut client = broker.client();
    let request = client.asks_for("m", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::ModelUnavailable);
    assert!(refusal.message.contains("did not report itself"), "{}", refusal.message);
    broker.set_engine("");
    // On a busy machine even a good one may take longer than that; it is tried again for each who asks.
    loop {
        let request = client.asks_for("m", true, false, 60_000);
        match client.reply(request) {
            BrokerMessage::Leased(_) => return,
            BrokerMessage::Refused(refusal) => assert_eq!(refusal.code, Code::ModelUnavailable),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_model_that_the_engine_refuses_is_refused_to_clients() {
    let temp = temp();
    std::fs::write(temp.path().join("engine"), "refuses-models").unwrap();
    let broker = Broker::start_in(temp.path(), &[]);
    let mut client = broker.client();
    let request = client.asks_for("m", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!((refusal.code, refusal.message.as_str()), (Code::ModelUnsupported, "refused by the test"));
    // A silent engine is no reason to wait longer than was asked for.
    broker.set_engine("silent-on-models");
    kill_engine(&mut client);
    let request = client.asks_for("m2", true, false, 30);
    assert_eq!(client.refusal(request).code, Code::LoadTimeout);
}

#[test]
fn a_client_that_breaks_its_lane_is_closed_alone() {
    let broker = Broker::start(&[]);
    let (mut good, mut bad) = (broker.client(), broker.client());
    let (lease, _) = good.lane();
    let (_, lane) = bad.lane();
    good.runs(lease, &format!("fault {lane}"));
    let message = bad.is_refused_and_closed(Code::BadFrame);
    assert!(message.contains("tail beyond capacity"), "{message}");
    assert_eq!(good.status().faults, 1);
}

#[test]
fn an_engine_ends_with_its_broker() {
    let mut broker = Broker::start(&[]);
    let mut client = broker.client();
    let engine = until(&mut client, "engine", |r| r.engines[0].pid > 0).engines[0].pid;
    broker.signal(SIGKILL);
    broker.wait();
    ended(engine);
}

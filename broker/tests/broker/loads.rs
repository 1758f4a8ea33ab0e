//! Loads: one for all who ask, failures told by name, none held against the model.

use crate::process::{Broker, ended};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, ClientMessage, ModelState};
use std::os::fd::AsFd;
use std::sync::Barrier;

#[test]
fn one_load_for_all_who_ask_at_once() {
    const CLIENTS: usize = 20;
    let broker = Broker::start(&[]);
    let all_asked = Barrier::new(CLIENTS + 1);
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = broker.client();
                    let request = client.asks_for("waits:org/m", true, true, 60_000);
                    client.pings();
                    all_asked.wait();
                    let (leased, fds) = client.granted(request);
                    let lane = shm_os::lane_mapping::LaneMapping::map(fds[0].as_fd());
                    assert!(lane.is_ok(), "{lane:?}");
                    assert!(!client.progress.is_empty(), "a waiting client is told how far it is");
                    (leased.model.model_id, leased.model.generation, fds.len())
                })
            })
            .collect();
        all_asked.wait();
        broker.go();
        for client in asked {
            assert_eq!(client.join().unwrap(), ("org/m".to_owned(), 1, 4));
        }
    });
    assert_eq!(broker.loads().len(), 1);
}

#[test]
fn who_waits_too_long_is_told_and_the_load_goes_on() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let request = client.asks_for("waits:m", true, false, 20);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::LoadTimeout);
    assert_eq!(client.status().models[0].state, ModelState::Loading);
    broker.go();
    let request = client.asks_for("waits:m", true, false, 60_000);
    client.granted(request);
    assert_eq!(broker.loads().len(), 1);
}

#[test]
fn each_failure_of_a_loader_has_its_name() {
    let broker = Broker::start(&["loader_address_space_bytes=1000000000"]);
    let mut client = broker.client();
    for (model, code, says) in [
        ("crash", Code::ModelLoadError, "SIGABRT"),
        ("quits", Code::ModelLoadError, "status 17"),
        ("missing", Code::ModelNotFound, "MODEL_CACHE_DIR"),
        ("garbage", Code::ModelLoadError, "nonsense"),
        ("unsealed", Code::ModelLoadError, "seals"),
        ("lying", Code::ModelLoadError, "no usable image"),
        ("corrupt", Code::ModelLoadError, "magic"),
        ("bare", Code::ModelLoadError, "descriptor"),
        ("eats-memory", Code::ModelLoadError, "SIGABRT"),
    ] {
        let request = client.asks_for(model, true, false, 60_000);
        let refusal = client.refusal(request);
        assert_eq!(refusal.code, code, "{model}: {}", refusal.message);
        assert!(refusal.message.contains(says), "{model}: {}", refusal.message);
    }
    client.lane();
    let report = client.status();
    assert_eq!(
        report.models.iter().filter(|m| m.state == ModelState::Failed && m.error.is_some()).count(),
        9
    );
    for load in broker.loads() {
        let pid = load.split_once(' ').unwrap().1.parse().unwrap();
        ended(pid);
    }
}

#[test]
fn a_load_that_spins_is_killed() {
    let broker = Broker::start(&["loader_cpu_seconds=1"]);
    let mut client = broker.client();
    let request = client.asks_for("spins", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::ModelLoadError);
    assert!(refusal.message.contains("processor time"), "{}", refusal.message);
}

#[test]
fn a_load_that_takes_too_long_is_killed() {
    let broker = Broker::start(&["load_timeout_ms=50"]);
    let mut client = broker.client();
    let request = client.asks_for("never", true, false, 60_000);
    let refusal = client.refusal(request);
    assert_eq!(refusal.code, Code::ModelLoadError);
    assert!(refusal.message.contains("longer than"), "{}", refusal.message);
    ended(broker.loads()[0].split_once(' ').unwrap().1.parse().unwrap());
}

#[test]
fn a_crashed_loader_is_no_verdict_on_the_model() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let request = client.asks_for("crash-once:m", true, false, 60_000);
    assert_eq!(client.refusal(request).code, Code::ModelLoadError);
    let request = client.asks_for("crash-once:m", true, false, 60_000);
    client.granted(request);
    assert_eq!(broker.loads().len(), 2);
}

#[test]
fn names_of_one_model_share_its_image() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let requests = ["a:org/m", "b:org/m", "org/m"].map(|name| client.asks_for(name, false, true, 60_000));
    for request in requests {
        assert_eq!(client.granted(request).0.model.model_id, "org/m");
    }
    let request = client.asks_for("org/m", false, true, 0);
    assert_eq!(client.granted(request).0.model.generation, 1);
    assert_eq!(client.status().models.len(), 1);
}

#[test]
fn the_default_model_is_for_those_who_name_none() {
    let broker = Broker::start(&[]);
    let mut client = broker.client();
    let request = client.asks_for("", true, false, 60_000);
    let (leased, _) = client.granted(request);
    assert_eq!(leased.model.model_id, "default-model");
    assert_eq!((leased.model.output_dim, leased.model.max_seq_tokens), (384, 256));
    let request = client.ask(ClientMessage::Release { lease_id: leased.lease_id });
    assert_eq!(client.reply(request), BrokerMessage::Released);
    let request = client.ask(ClientMessage::Release { lease_id: leased.lease_id });
    assert_eq!(client.refusal(request).code, Code::Stale);
}

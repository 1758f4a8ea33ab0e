//! The broker goes away and comes back: callers see a delay within their time, and a clear error beyond it.

use crate::peer::{Behaviour, Peer, assert_right, block_on, client, eventually, place, texts};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};
use worker_sdk::{Client, Code, EmbedOptions, ModelRequest, Route, SdkError, StartBroker};

const ROUTES: [Route; 2] = [Route::Lane, Route::Socket];

#[test]
fn jobs_in_flight_survive_the_brokers_death() {
    for route in ROUTES {
        let (_folder, socket) = place();
        let peer = Peer::start(&socket);
        peer.behaviour.hold.store(true, SeqCst);
        let client = client(&socket);
        let model = client.model_with(ModelRequest::new("m").route(route)).unwrap();
        let blocked: Vec<_> = (0..4)
            .map(|n| {
                let model = model.clone();
                std::thread::spawn(move || {
                    let texts = texts(100 + n);
                    assert_right(&texts, &model.embed(&texts).unwrap());
                })
            })
            .collect();
        let awaited: Vec<_> =
            (0..20).map(|_| model.submit(&["later"], &EmbedOptions::default()).unwrap()).collect();
        let future = model.submit(&["a future"], &EmbedOptions::default()).unwrap();
        let future = std::thread::spawn(move || assert_right(&["a future"], &block_on(future).unwrap()));
        // Unanswered work is with the first broker; the second answers all of it.
        assert_eq!(peer.behaviour.jobs.load(SeqCst), 0);
        peer.kill();
        let second = Peer::start(&socket);
        blocked.into_iter().for_each(|thread| thread.join().unwrap());
        future.join().unwrap();
        awaited.into_iter().for_each(|job| assert_right(&["later"], &job.wait().unwrap()));
        assert_eq!(client.reconnects(), 1, "one thread reconnects for all");
        assert_eq!(model.reconnects(), 1);
        assert_eq!(second.behaviour.sessions.load(SeqCst), 1);
    }
}

#[test]
fn a_broker_that_dies_again_and_again_loses_nothing() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let client = client(&socket);
    let models = ROUTES.map(|route| client.model_with(ModelRequest::new("m").route(route)).unwrap());
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    std::thread::scope(|scope| {
        for model in &models {
            for thread in 0..3 {
                let done = Arc::clone(&done);
                scope.spawn(move || {
                    let mut round = 0;
                    while !done.load(SeqCst) {
                        let texts = [format!("{thread} {round}"), "x".into()];
                        assert_right(&texts, &model.embed(&texts).unwrap());
                        round += 1;
                    }
                });
            }
        }
        let mut peer = Some(peer);
        for _ in 0..10 {
            let running = peer.take().unwrap();
            let before = running.behaviour.jobs.load(SeqCst);
            eventually("some work", || running.behaviour.jobs.load(SeqCst) > before + 20);
            running.kill();
            peer = Some(Peer::start(&socket));
        }
        let last = peer.unwrap();
        eventually("some work", || last.behaviour.jobs.load(SeqCst) > 20);
        done.store(true, SeqCst);
        // The peer must outlive the callers.
        scope.spawn(move || {
            eventually("all callers leaving", || last.behaviour.open_sessions.load(SeqCst) <= 1);
            std::thread::sleep(Duration::from_millis(200));
            drop(last);
        });
    });
    assert!(client.reconnects() >= 10);
}

#[test]
fn a_connection_that_is_closed_mid_submit_is_made_anew() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model_with(ModelRequest::new("m").route(Route::Socket)).unwrap();
    peer.behaviour.drop_on_submit.store(3, SeqCst);
    assert_right(&["a"], &model.embed(&["a"]).unwrap());
    assert_eq!(peer.behaviour.sessions.load(SeqCst), 4);
}

#[test]
fn an_idle_client_notices_at_its_next_call() {
    for route in ROUTES {
        let (_folder, socket) = place();
        let peer = Peer::start(&socket);
        let model = peer.client().model_with(ModelRequest::new("m").route(route)).unwrap();
        assert_right(&["a"], &model.embed(&["a"]).unwrap());
        peer.kill();
        let peer = Peer::start(&socket);
        assert_right(&["b"], &model.embed(&["b"]).unwrap());
        assert_eq!(peer.behaviour.jobs.load(SeqCst), 1);
    }
}

#[test]
fn patience_and_deadlines_end_an_outage() {
    for route in ROUTES {
        let (_folder, socket) = place();
        let peer = Peer::start(&socket);
        let client = Client::builder()
            .socket(&socket)
            .start_broker(StartBroker::Never)
            .patience(Duration::from_millis(150))
            .connect()
            .unwrap();
        let model = client.model_with(ModelRequest::new("m").route(route)).unwrap();
        peer.kill();
        let started = Instant::now();
        let error = model.embed(&["a"]).unwrap_err();
        assert!(matches!(error, SdkError::Disconnected { .. }) && error.is_retryable(), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(150));
        let options = EmbedOptions::default().timeout(Duration::from_millis(50));
        assert!(matches!(model.embed_with(&["a"], &options), Err(SdkError::DeadlineExceeded(_))));
        // And once it is there again, so is the model.
        let _peer = Peer::start(&socket);
        assert_right(&["b"], &model.embed(&["b"]).unwrap());
    }
}

#[test]
fn a_model_that_the_new_broker_refuses_fails_at_once() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model("m").unwrap();
    peer.kill();
    let behaviour = Arc::new(Behaviour::default());
    behaviour.refuse_lease.store(Code::ModelNotFound as u32, SeqCst);
    let peer = Peer::start_with(&socket, behaviour);
    assert_eq!(model.embed(&["a"]).unwrap_err().code(), "MODEL_NOT_FOUND");
    peer.behaviour.refuse_lease.store(0, SeqCst);
    assert_right(&["a"], &model.embed(&["a"]).unwrap());
}

#[test]
fn one_result_never_mixes_two_models() {
    for route in ROUTES {
        let (_folder, socket) = place();
        let peer = Peer::start(&socket);
        let model = peer.client().model_with(ModelRequest::new("m").route(route)).unwrap();
        let texts = texts(1500);
        let job = model.submit(&texts, &EmbedOptions::default()).unwrap();
        eventually("some work", || peer.behaviour.jobs.load(SeqCst) > 2);
        peer.kill();
        let behaviour = Arc::new(Behaviour::default());
        behaviour.fingerprint.store(0xbeef, SeqCst);
        let _peer = Peer::start_with(&socket, behaviour);
        let rows = job.wait().unwrap();
        assert_right(&texts, &rows);
        let rows = model.embed(&texts).unwrap();
        assert_eq!(rows.fingerprint(), 0xbeef);
        assert_right(&texts, &rows);
    }
}

#[test]
fn a_fingerprint_that_changes_within_a_list_begins_it_anew() {
    for route in ROUTES {
        let (_folder, socket) = place();
        let peer = Peer::start(&socket);
        let model = peer.client().model_with(ModelRequest::new("m").route(route)).unwrap();
        let texts = texts(3000);
        let behaviour = Arc::clone(&peer.behaviour);
        let switch = std::thread::spawn(move || {
            eventually("some work", || behaviour.jobs.load(SeqCst) > 5);
            behaviour.fingerprint.store(0xbeef, SeqCst);
        });
        assert_right(&texts, &model.embed(&texts).unwrap());
        switch.join().unwrap();
        assert_right(&texts, &block_on(model.submit(&texts, &EmbedOptions::default()).unwrap()).unwrap());
    }
}

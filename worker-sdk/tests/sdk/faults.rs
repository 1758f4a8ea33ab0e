//! An engine or broker that breaks the protocol: noticed, kept from doing harm, and got around.

use crate::peer::{Peer, assert_right, block_on, place, texts};
use std::sync::atomic::Ordering::SeqCst;
use worker_sdk::{Code, EmbedOptions, ModelRequest, Route, SdkError};

#[test]
fn a_lane_that_the_engine_breaks_is_replaced() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model("m").unwrap();
    let texts = texts(1000);
    peer.behaviour.runaway.store(1, SeqCst);
    assert_right(&texts, &model.embed(&texts).unwrap());
    peer.behaviour.duplicate.store(1, SeqCst);
    assert_right(&texts, &block_on(model.submit(&texts, &EmbedOptions::default()).unwrap()).unwrap());
    assert_eq!(model.reconnects(), 2);
    assert_eq!(peer.behaviour.sessions.load(SeqCst), 1, "the session goes on");
    assert_eq!(peer.behaviour.releases.load(SeqCst), 2, "broken lanes are given back");
}

#[test]
fn an_unreadable_answer_is_asked_for_again() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for route in [Route::Lane, Route::Socket] {
        let model = peer.client().model_with(ModelRequest::new("m").route(route)).unwrap();
        peer.behaviour.wrong_dim.store(2, SeqCst);
        assert_right(&["a"], &model.embed(&["a"]).unwrap());
        peer.behaviour.wrong_dim.store(2, SeqCst);
        assert_right(&["a"], &block_on(model.submit(&["a"], &EmbedOptions::default()).unwrap()).unwrap());
    }
}

#[test]
fn an_engine_that_never_keeps_to_the_protocol_is_an_error() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    for route in [Route::Lane, Route::Socket] {
        let model = peer.client().model_with(ModelRequest::new("m").route(route)).unwrap();
        peer.behaviour.wrong_dim.store(u32::MAX, SeqCst);
        let error = model.embed(&["a"]).unwrap_err();
        assert!(matches!(error, SdkError::Fault { peer: "the engine", .. }), "{error}");
        peer.behaviour.wrong_dim.store(0, SeqCst);
        if route == Route::Lane {
            peer.behaviour.runaway.store(u32::MAX, SeqCst);
            let error = model.embed(&["a"]).unwrap_err();
            assert_eq!(error.code(), "PEER_FAULT");
            peer.behaviour.runaway.store(0, SeqCst);
        }
        assert_right(&["b"], &model.embed(&["b"]).unwrap());
    }
}

#[test]
fn a_lease_that_went_stale_is_taken_up_anew() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model_with(ModelRequest::new("m").route(Route::Socket)).unwrap();
    peer.behaviour.fail_with.store(Code::Stale as u32, SeqCst);
    let behaviour = std::sync::Arc::clone(&peer.behaviour);
    let healer = std::thread::spawn(move || {
        crate::peer::eventually("two attempts", || behaviour.jobs.load(SeqCst) >= 2);
        behaviour.fail_with.store(0, SeqCst);
    });
    assert_right(&["a"], &model.embed(&["a"]).unwrap());
    healer.join().unwrap();
}

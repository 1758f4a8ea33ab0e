//! Descriptors, mappings and threads are the same before and after.

use crate::peer::{Peer, assert_right, block_on, eventually, place, texts};
use std::sync::atomic::Ordering::SeqCst;
use worker_sdk::{EmbedOptions, ModelRequest, Route};

fn count(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

pub(crate) fn nothing_is_left_when_the_last_handle_is_gone() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let fds = || count("/proc/self/fd");
    let threads = || count("/proc/self/task");
    let before = (fds(), shm_os::live_mappings(), threads());
    for round in 0..20 {
        let client = peer.client();
        for route in [Route::Lane, Route::Socket] {
            let model = client.model_with(ModelRequest::new("m").route(route)).unwrap();
            let texts = texts(100);
            assert_right(&texts, &model.embed(&texts).unwrap());
            block_on(model.submit(&texts, &EmbedOptions::default()).unwrap()).unwrap();
            peer.behaviour.hold.store(true, SeqCst);
            drop(model.submit(&["dropped in flight"], &EmbedOptions::default()).unwrap());
            let _left = model.submit(&["left in flight"], &EmbedOptions::default()).unwrap();
            if round % 2 == 0 {
                drop(model);
            }
            peer.behaviour.hold.store(false, SeqCst);
        }
    }
    // The peer lives in this process too: its side of each session and lane must go as well.
    eventually("the end of all sessions", || peer.behaviour.open_sessions.load(SeqCst) == 0);
    eventually("the same count of everything", || (fds(), shm_os::live_mappings(), threads()) == before);
    assert_eq!(peer.behaviour.leases.load(SeqCst), 40);
}

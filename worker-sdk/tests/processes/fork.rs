//! A process that forks after connecting: parent and child both go on, on sessions of their own.

use crate::peer::{Peer, assert_right, block_on, eventually, place};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;
use worker_sdk::{EmbedOptions, Model, ModelRequest, Route, SdkError};

/// Runs `work` in a forked child; the child's exit status tells how it went.
fn in_child(work: impl FnOnce()) -> Pid {
    // SAFETY: the child uses the allocator, which glibc keeps usable across forks, and the SDK, whose use after a fork is
    // what is tested here; it leaves by `exit` and returns to none of the parent's frames.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            std::process::exit(i32::from(outcome.is_err()));
        }
    }
}

/// Fails unless the child ends well; a child that hangs is killed by its alarm.
fn join(child: Pid) {
    assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn a_child_gets_a_session_of_its_own() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let client = peer.client();
    let models: Vec<Model> = [Route::Lane, Route::Socket]
        .map(|route| client.model_with(ModelRequest::new("m").route(route)).unwrap())
        .into();
    let mappings = shm_os::live_mappings();
    let job = models[0].submit(&["the parent's"], &EmbedOptions::default()).unwrap();
    let releases = peer.behaviour.releases.load(SeqCst);
    let child = in_child(|| {
        nix::unistd::alarm::set(60);
        let fds = open_fds();
        assert!(matches!(job.wait(), Err(SdkError::Forked)));
        for model in &models {
            assert_right(&["a", "b"], &model.embed(&["a", "b"]).unwrap());
            assert_right(&["c"], &block_on(model.submit(&["c"], &EmbedOptions::default()).unwrap()).unwrap());
            assert_eq!(model.description().unwrap().model_id, "m");
        }
        // The parent's descriptors went as the child's own came: socket, poller, doorbell.
        assert!(open_fds() <= fds, "{} descriptors, {fds} before", open_fds());
        assert_eq!(client.status().unwrap().version, "9.9.9");
    });
    join(child);
    // The child's leases went with its session; the parent's are untouched.
    eventually("the child's end", || peer.behaviour.open_sessions.load(SeqCst) == 1);
    assert_eq!(peer.behaviour.sessions.load(SeqCst), 2);
    assert_eq!(peer.behaviour.releases.load(SeqCst), releases);
    // The peer's side of the child's lane is mapped in this process too.
    eventually("the end of the child's lane", || shm_os::live_mappings() == mappings);
    assert_right(&["parent"], &models[0].embed(&["parent"]).unwrap());
    // A child that lets go of what it inherited says nothing to the broker in its parent's name.
    let keep = models.clone();
    let child = in_child(|| {
        drop(keep);
        drop(models);
        drop(client);
    });
    join(child);
    eventually("the parent's end", || peer.behaviour.open_sessions.load(SeqCst) == 0);
    assert_eq!(peer.behaviour.sessions.load(SeqCst), 2);
    assert_eq!(peer.behaviour.releases.load(SeqCst), releases + 2);
}

/// Threads are inside of every call when the fork happens, so every lock of the SDK is held at some of the forks.
pub(crate) fn forks_at_any_instant_harm_neither_side() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let client = peer.client();
    let models: Vec<Model> = [Route::Lane, Route::Socket]
        .map(|route| client.model_with(ModelRequest::new("m").route(route)).unwrap())
        .into();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let model = models[thread % 2].clone();
            let (client, done) = (&client, &done);
            scope.spawn(move || {
                let mut round = 0_u32;
                while !done.load(SeqCst) {
                    let text = [format!("{thread} {round}")];
                    match round % 4 {
                        0 => client.ping().unwrap(),
                        1 => {
                            let job = model.submit(&text, &EmbedOptions::default()).unwrap();
                            assert_right(&text, &block_on(job).unwrap());
                        }
                        2 => drop(model.submit(&text, &EmbedOptions::default()).unwrap()),
                        _ => assert_right(&text, &model.embed(&text).unwrap()),
                    }
                    round += 1;
                }
            });
        }
        for _ in 0..60 {
            let child = in_child(|| {
                nix::unistd::alarm::set(60);
                for model in &models {
                    assert_right(&["child"], &model.embed(&["child"]).unwrap());
                    let job = model.submit(&["future"], &EmbedOptions::default()).unwrap();
                    assert_right(&["future"], &block_on(job).unwrap());
                }
                client.ping().unwrap();
            });
            join(child);
        }
        done.store(true, SeqCst);
    });
    assert_eq!(client.reconnects(), 0, "the parent's session was never disturbed");
    assert_eq!(models.iter().map(Model::reconnects).sum::<u64>(), 0);
}

pub(crate) fn a_grandchild_works_too() {
    let (_folder, socket) = place();
    let peer = Peer::start(&socket);
    let model = peer.client().model("m").unwrap();
    fn descend(model: &Model, depth: u32) {
        let child = in_child(|| {
            nix::unistd::alarm::set(60);
            // Every other generation does not use what it inherited.
            if depth.is_multiple_of(2) {
                assert_right(&["deep"], &model.embed(&["deep"]).unwrap());
            }
            if depth > 0 {
                descend(model, depth - 1);
            }
            let timeout = EmbedOptions::default().timeout(Duration::from_secs(30));
            assert_right(&["after"], &model.embed_with(&["after"], &timeout).unwrap());
        });
        join(child);
    }
    descend(&model, 4);
    assert_right(&["parent"], &model.embed(&["parent"]).unwrap());
    assert_eq!(model.reconnects(), 0);
}

//! Clients that start a broker, alone, together, and in vain.

use crate::peer::{assert_right, eventually, place};
use crate::serve::{BRIEF_FILE, FAIL_FILE, LATE_FILE};
use std::path::Path;
use std::time::Duration;
use worker_sdk::{Client, ClientBuilder, SdkError, StartBroker};

fn builder(socket: &Path) -> ClientBuilder {
    Client::builder()
        .socket(socket)
        .start_broker(StartBroker::IfNeeded)
        .broker_program(std::env::current_exe().unwrap())
        .broker_idle_exit(Duration::from_secs(60))
}

pub(crate) fn a_broker_is_started_when_none_runs() {
    let (_folder, socket) = place();
    let client = builder(&socket).connect().unwrap();
    let broker = client.broker().unwrap();
    assert_ne!(broker.broker_pid, std::process::id());
    assert_right(&["a"], &client.model("").unwrap().embed(&["a"]).unwrap());
    // It is in a session of its own: a terminal's signals do not reach it.
    let session =
        nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(broker.broker_pid.cast_signed()))).unwrap();
    assert_eq!(session.as_raw().cast_unsigned(), broker.broker_pid);
    client.shutdown(Duration::ZERO).unwrap();
}

pub(crate) fn racing_starters_get_one_broker() {
    let (_folder, socket) = place();
    let pids: Vec<u32> = std::thread::scope(|scope| {
        let starters: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| builder(&socket).connect().unwrap().broker().unwrap().broker_pid))
            .collect();
        starters.into_iter().map(|starter| starter.join().unwrap()).collect()
    });
    assert!(pids.iter().all(|pid| *pid == pids[0]), "{pids:?}");
    builder(&socket).start_broker(StartBroker::Never).connect().unwrap().shutdown(Duration::ZERO).unwrap();
}

pub(crate) fn a_failed_start_shows_the_log() {
    let (_folder, socket) = place();
    shm_os::run_dir::ensure_private_dir(socket.parent().unwrap()).unwrap();
    std::fs::write(socket.with_file_name(FAIL_FILE), "the reason why").unwrap();
    let error = builder(&socket).connect().unwrap_err();
    assert!(matches!(error, SdkError::StartFailed { .. }), "{error}");
    assert!(error.to_string().contains("the reason why") && error.to_string().contains('3'), "{error}");
    let error = builder(&socket).broker_program("/nonexistent/modelbroker").connect().unwrap_err();
    assert!(error.to_string().contains("/nonexistent/modelbroker"), "{error}");
    let error = builder(&socket).start_broker(StartBroker::Never).connect().unwrap_err();
    assert_eq!(error.code(), "NO_BROKER");
}

pub(crate) fn a_broker_that_is_dead_before_it_is_connected_to_is_started_again() {
    for (file, others) in [(BRIEF_FILE, 1), (LATE_FILE, 1), (BRIEF_FILE, 4)] {
        let (_folder, socket) = place();
        shm_os::run_dir::ensure_private_dir(socket.parent().unwrap()).unwrap();
        std::fs::write(socket.with_file_name(file), "").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..others {
                scope.spawn(|| builder(&socket).connect().unwrap().ping().unwrap());
            }
        });
        let last = builder(&socket).start_broker(StartBroker::Never).connect().unwrap();
        last.shutdown(Duration::ZERO).unwrap();
    }
}

pub(crate) fn a_killed_broker_is_started_again() {
    let (_folder, socket) = place();
    let client = builder(&socket).connect().unwrap();
    let model = client.model("m").unwrap();
    let first = client.broker().unwrap();
    for round in 0..3 {
        let pid = client.broker().unwrap().broker_pid;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid.cast_signed()),
            nix::sys::signal::Signal::SIGKILL,
        )
        .unwrap();
        let texts = [format!("round {round}")];
        assert_right(&texts, &model.embed(&texts).unwrap());
        eventually("another broker", || client.broker().is_ok_and(|broker| broker.broker_pid != pid));
    }
    let last = client.broker().unwrap();
    assert_ne!(last.boot_id, first.boot_id);
    assert_eq!((client.reconnects(), model.reconnects()), (3, 3));
    client.shutdown(Duration::ZERO).unwrap();
}

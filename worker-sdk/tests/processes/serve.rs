//! This program as a broker that clients can start.

use crate::peer::Peer;
use shm_os::run_dir::{LockFile, ensure_private_dir};
use std::io::Write;
use std::path::{Path, PathBuf};

/// How a test makes the broker fail: this file in the run folder, with the message to fail with.
pub(crate) const FAIL_FILE: &str = "fail";

/// This file makes one start die right after it said that it is ready.
pub(crate) const BRIEF_FILE: &str = "brief";
/// This file makes one start find another broker running, which is gone by then.
pub(crate) const LATE_FILE: &str = "late";
/// As `modelbroker serve`.
const ALREADY_RUNNING_EXIT: i32 = 9;

pub(crate) fn run(arguments: &[String]) {
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name).expect("option is given");
        arguments[at + 1].clone()
    };
    let socket = PathBuf::from(value("--socket"));
    assert!(value("--idle-exit").parse::<u64>().unwrap() > 0);
    assert!(Path::new(&value("--log-file")).parent() == socket.parent());
    let ready_fd: i32 = value("--ready-fd").parse().unwrap();
    let folder = socket.parent().unwrap();
    ensure_private_dir(folder).unwrap();
    if let Ok(message) = std::fs::read_to_string(folder.join(FAIL_FILE)) {
        eprintln!("{message}");
        std::process::exit(3);
    }
    if std::fs::remove_file(folder.join(LATE_FILE)).is_ok() {
        eprintln!("already running");
        std::process::exit(ALREADY_RUNNING_EXIT);
    }
    let lock_path = folder.join("broker.sock.lock");
    let Some(_lock) = LockFile::try_lock(&lock_path).unwrap() else {
        eprintln!("already running");
        std::process::exit(ALREADY_RUNNING_EXIT);
    };
    let died_early = std::fs::remove_file(folder.join(BRIEF_FILE)).is_ok();
    let peer = (!died_early).then(|| Peer::start(&socket));
    // Written through /proc, so that no descriptor must be conjured from a number.
    let mut ready =
        std::fs::OpenOptions::new().write(true).open(format!("/proc/self/fd/{ready_fd}")).unwrap();
    ready.write_all(b"READY=1\n").unwrap();
    drop(ready);
    match peer {
        Some(peer) => peer.wait(),
        // As killed: the lock file stays.
        None => std::process::abort(),
    }
}

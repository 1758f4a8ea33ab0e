//! `worker`: one process that `load` or `demo` started; its plan comes on stdin, its results go to stdout. What the
//! plans say is with those who make them.

pub(super) mod interrupt;
pub(super) mod probe;
pub(super) mod process;

use crate::args::{WorkerArgs, WorkerRole};
use crate::failure::{Exit, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{BufRead, Read, Write};
use std::path::PathBuf;

/// Longest plan or result, in bytes of one JSON line.
pub(super) const MAX_LINE_BYTES: u64 = 16 << 20;

/// Does what the role says.
pub(super) fn run(socket: Option<PathBuf>, args: &WorkerArgs) -> Result<(), Failure> {
    match args.role {
        WorkerRole::Load => super::load::client::run(socket),
        WorkerRole::Thin => probe::thin(socket, &args.model),
        WorkerRole::Attached => probe::attached(socket, &args.model),
        WorkerRole::Private => probe::private(),
    }
}

/// One line of stdin as a value.
pub(super) fn read_plan<T: DeserializeOwned>() -> Result<T, Failure> {
    let mut line = String::new();
    std::io::stdin().lock().by_ref().take(MAX_LINE_BYTES).read_line(&mut line)?;
    serde_json::from_str(&line).map_err(|e| {
        Failure::new(
            Exit::Usage,
            format!("the plan on stdin is not understood: {e}; `load` and `demo` write it"),
        )
    })
}

/// One value as a line of stdout, sent at once.
pub(super) fn say(value: &impl Serialize) -> Result<(), Failure> {
    let line = serde_json::to_string(value).map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// Returns when the other end of stdin is closed.
pub(super) fn wait_for_end_of_stdin() {
    let mut stdin = std::io::stdin().lock();
    let mut buffer = [0; 256];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

//! The parent's side of a subprocess of this program: started, talked to in lines, and gone with its handle. What the
//! lines say is the caller's.

use crate::failure::{Exit, Failure};
use serde::Serialize;
use shm_os::process::{ChildLimits, SpawnedChild, spawn_limited};
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;

/// What a subprocess did; `usize` is the number that it was started under.
#[derive(Debug)]
pub(crate) enum Said {
    /// A line, without its end.
    Line(String),
    /// Its stdout is closed: it ended, or will not say anything more.
    End,
}

/// A subprocess. It cannot outlive this handle: dropping kills it, and so does the death of this process.
#[derive(Debug)]
pub(crate) struct WorkerProcess {
    child: SpawnedChild,
    stdin: Option<ChildStdin>,
    reaped: bool,
}

impl WorkerProcess {
    /// Starts `modelbroker --socket SOCKET worker ROLE [--model MODEL]`. Its lines are sent to `said` under `number`.
    /// Call from a thread that stays: the subprocess dies with it.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub(crate) fn start(
        socket: &Path,
        role: &str,
        model: &str,
        number: usize,
        said: Sender<(usize, Said)>,
    ) -> Result<WorkerProcess, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("--socket").arg(socket).arg("worker").arg(role);
        if !model.is_empty() {
            command.arg("--model").arg(OsStr::new(model));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A session of its own: Ctrl-C reaches the parent, which tells it to stop.
        let limits = ChildLimits { parent_death_signal: true, new_session: true, ..ChildLimits::default() };
        let mut child =
            spawn_limited(command, limits).map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        let (stdin, stdout) = (child.child_mut().stdin.take(), child.child_mut().stdout.take());
        let process = WorkerProcess { child, stdin, reaped: false };
        let Some(stdout) = stdout else {
            return Err(Failure::new(Exit::Failed, "a worker process was started without a stdout"));
        };
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout);
            loop {
                let mut line = String::new();
                match lines.by_ref().take(super::MAX_LINE_BYTES).read_line(&mut line) {
                    Ok(count) if count > 0 => {
                        let line = line.trim_end_matches('\n').to_owned();
                        if said.send((number, Said::Line(line))).is_err() {
                            return;
                        }
                    }
                    _ => {
                        let _ = said.send((number, Said::End));
                        return;
                    }
                }
            }
        });
        Ok(process)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Sends a line. A subprocess that is gone already shows by its end, not here.
    ///
    /// # Errors
    /// When the value has no JSON form, or one that is too long.
    pub(crate) fn tell(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        if line.len() as u64 >= super::MAX_LINE_BYTES {
            let message = "the texts of one client process are too long: ask for fewer threads or tokens";
            return Err(Failure::new(Exit::Usage, message));
        }
        if let Some(stdin) = &mut self.stdin {
            let _ = writeln!(stdin, "{line}");
            let _ = stdin.flush();
        }
        Ok(())
    }

    /// Closes its stdin: it stops early, or ends if that is all it waits for.
    pub(crate) fn hang_up(&mut self) {
        self.stdin = None;
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the system does not say.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus, Failure> {
        self.hang_up();
        let status = self.child.wait().map_err(|e| Failure::new(Exit::Failed, e.to_string()))?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if !self.reaped {
            // Gone already is as good.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

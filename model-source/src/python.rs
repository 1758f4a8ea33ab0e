//! Runs a Python interpreter with bounded time and bounded output. Knows nothing of models or of pip's arguments.

use crate::error::printable;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// The end of a child's output that is kept, in bytes.
const MAX_OUTPUT_BYTES: usize = 16 << 10;
/// How often the child is looked at.
const POLL: Duration = Duration::from_millis(20);
/// How long output is waited for after the child has ended: a grandchild may still hold the pipe.
const OUTPUT_GRACE: Duration = Duration::from_secs(2);

/// How a run failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PythonError {
    #[error("there is no {0}: install Python 3, or set MODELBROKER_PYTHON")]
    NotFound(String),
    #[error("{program} cannot be started: {reason}")]
    NotStarted { program: String, reason: String },
    #[error("{program} did not end within {limit_s} s and was stopped")]
    TimedOut { program: String, limit_s: u64 },
    #[error("{program} failed ({status}): {output}")]
    Failed { program: String, status: ExitStatus, output: String },
}

/// A child that is killed and reaped if its owner returns early.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It has ended already in the usual case; then both calls do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `python` with `args` in `dir` (Python looks for modules there first, so it must hold none) and gives the end of
/// its output, both streams as one. The child stays in our process group, so that who kills the group gets it too.
pub(crate) fn run(
    python: &Path,
    args: &[&OsStr],
    dir: &Path,
    env: &[(&str, &OsStr)],
    limit: Duration,
    mut on_tick: impl FnMut(),
) -> Result<String, PythonError> {
    let program = python.display().to_string();
    let not_started = |error: io::Error| match error.kind() {
        // A missing working folder gives the same kind, but ours was just made.
        io::ErrorKind::NotFound => PythonError::NotFound(program.clone()),
        _ => PythonError::NotStarted { program: program.clone(), reason: error.to_string() },
    };
    let (reader, writer) = io::pipe().map_err(not_started)?;
    let spawned = {
        let mut command = Command::new(python);
        command
            .args(args)
            .envs(env.iter().copied())
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(writer.try_clone().map_err(not_started)?)
            .stderr(writer);
        // `command` holds our copies of the pipe's writing end; it is dropped here, or the reader would never see the end.
        command.spawn().map_err(not_started)?
    };
    let mut child = Guard(spawned);
    let (sender, output) = mpsc::sync_channel(1);
    std::thread::spawn(move || sender.send(read_end(reader)));

    let began = Instant::now();
    let status = loop {
        match child.0.try_wait().map_err(not_started)? {
            Some(status) => break status,
            None if began.elapsed() >= limit => {
                return Err(PythonError::TimedOut { program, limit_s: limit.as_secs() });
            }
            None => std::thread::sleep(POLL),
        }
        on_tick();
    };
    let output = output.recv_timeout(OUTPUT_GRACE).unwrap_or_default();
    if status.success() {
        Ok(output)
    } else {
        let lines: Vec<&str> = output.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = lines.get(lines.len().saturating_sub(3)..).unwrap_or_default().join(" / ");
        Err(PythonError::Failed { program, status, output: printable(&last, 500) })
    }
}

/// Reads to the end and keeps the last [`MAX_OUTPUT_BYTES`].
fn read_end(mut reader: impl Read) -> String {
    let mut kept: Vec<u8> = Vec::new();
    let mut chunk = [0_u8; 4096];
    loop {
        match reader.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => {
                kept.extend_from_slice(chunk.get(..count).unwrap_or_default());
                if kept.len() > 2 * MAX_OUTPUT_BYTES {
                    kept.drain(..kept.len() - MAX_OUTPUT_BYTES);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let start = kept.len().saturating_sub(MAX_OUTPUT_BYTES);
    String::from_utf8_lossy(kept.get(start..).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, limit: Duration) -> Result<String, PythonError> {
        run(Path::new("sh"), &["-c".as_ref(), script.as_ref()], Path::new("/"), &[], limit, || {})
    }

    #[test]
    fn gives_output_and_failure() {
        let minute = Duration::from_secs(60);
        assert_eq!(sh("echo a; echo b >&2", minute).unwrap(), "a\nb\n");
        let error = sh("echo cause; exit 3", minute).unwrap_err();
        assert!(matches!(&error, PythonError::Failed { output, .. } if output == "cause"), "{error}");
        let missing = run(Path::new("/no/python"), &[], Path::new("/"), &[], minute, || {});
        assert!(matches!(missing, Err(PythonError::NotFound(_))));
    }

    #[test]
    fn output_is_bounded_and_its_end_kept() {
        let text = sh("yes | head -c 300000; echo end", Duration::from_secs(60)).unwrap();
        assert!(text.len() <= MAX_OUTPUT_BYTES && text.ends_with("end\n"));
    }

    #[test]
    fn a_child_that_hangs_is_stopped() {
        let result = sh("exec sleep 600", Duration::from_millis(50));
        assert!(matches!(result, Err(PythonError::TimedOut { .. })));
    }
}

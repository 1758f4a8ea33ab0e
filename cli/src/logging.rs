//! Where log lines go and which of them: stderr or a file, plain or JSON.

use crate::failure::{Exit, Failure};
use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

/// Environment variable that chooses log lines, in `tracing`'s filter syntax: `info`, `broker=debug,warn`, ...
pub(crate) const LOG_VARIABLE: &str = "MODELBROKER_LOG";

/// Sends log lines of this process to `file`, or to stderr.
///
/// # Errors
/// When the filter or the file is not usable.
pub(crate) fn init(default_filter: &str, file: Option<&Path>, json: bool) -> Result<(), Failure> {
    let filter = std::env::var(LOG_VARIABLE).ok().filter(|f| !f.is_empty());
    let filter = EnvFilter::try_new(filter.as_deref().unwrap_or(default_filter)).map_err(|e| {
        Failure::new(Exit::Usage, format!("{LOG_VARIABLE} is not a log filter: {e}; try `info`"))
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(true);
    // A second initialisation in one process would be a bug of ours; it must not end the program.
    let _ = match (file, json) {
        (Some(path), json) => {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(|e| {
                Failure::new(Exit::Failed, format!("the log file {} cannot be opened: {e}", path.display()))
            })?;
            let builder = builder.with_ansi(false).with_writer(Mutex::new(file));
            if json { builder.json().try_init() } else { builder.try_init() }
        }
        (None, true) => builder.with_writer(std::io::stderr).json().try_init(),
        (None, false) => {
            builder.with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr).try_init()
        }
    };
    Ok(())
}

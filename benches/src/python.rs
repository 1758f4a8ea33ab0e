//! sentence-transformers as a peer: a Python that has it, found or named, and scripts run by it. What is measured with
//! them is the benches' affair.

use crate::worker::Worker;
use anyhow::{Context, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which Python to use.
#[derive(Debug, clap::Args)]
// Those who flatten it have a group of that name.
#[group(skip)]
pub(crate) struct Arguments {
    /// A Python that has sentence-transformers; see benches/peers/install.sh [default: that script's environment, else
    /// the peer is left out]
    #[arg(long)]
    python: Option<PathBuf>,
}

impl Arguments {
    /// The Python to use; `None` when none was named and the usual one is not there.
    ///
    /// # Errors
    /// When the one that was named has no sentence-transformers.
    pub(crate) fn find(&self) -> anyhow::Result<Option<PathBuf>> {
        let usual = peers().join(".venv/bin/python");
        let python = match &self.python {
            // A relative path must not depend on where the script runs.
            Some(python) if python.components().count() > 1 => std::path::absolute(python)?,
            Some(python) => python.clone(),
            None if usual.exists() => usual,
            None => return Ok(None),
        };
        let output = Command::new(&python)
            .args(["-c", "import importlib.metadata as m; m.version('sentence-transformers')"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("running {}", python.display()))?;
        ensure!(
            output.success(),
            "{} has no sentence-transformers: run benches/peers/install.sh, or name another with --python",
            python.display()
        );
        Ok(Some(python))
    }
}

/// The folder of the peers' scripts.
fn peers() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("peers")
}

/// Versions of what the peer consists of, in one line.
///
/// # Errors
/// When Python cannot be run.
pub(crate) fn versions(python: &Path) -> anyhow::Result<String> {
    let output =
        Command::new(python).arg(peers().join("versions.py")).output().context("asking for versions")?;
    ensure!(output.status.success(), "asking for versions: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Starts a peer's script.
///
/// # Errors
/// When the process cannot be started.
pub(crate) fn start(
    python: &Path,
    script: &str,
    arguments: &[&str],
    threads: usize,
) -> anyhow::Result<Worker> {
    let mut command = Command::new(python);
    command.arg(peers().join(script)).args(arguments);
    // Warnings of libraries are of no use here, and nothing may be fetched while it is measured.
    command.env("HF_HUB_OFFLINE", "1").env("TOKENIZERS_PARALLELISM", "true").env("PYTHONWARNINGS", "ignore");
    command.env("OMP_NUM_THREADS", threads.to_string()).stderr(Stdio::null());
    Worker::spawn(command)
}

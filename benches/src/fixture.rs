//! What the benches of the whole system stand on: the built program, a broker of their own in a temporary folder, and the
//! model. Nothing is measured here.

use anyhow::{Context, bail, ensure};
use engine::compile::Precision;
use shm_os::process::{ChildLimits, SpawnedChild, spawn_limited};
use shm_os::{Interest, Poller};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use worker_sdk::{Client, EmbedOptions, ModelRequest, StartBroker};

/// The model that everything is measured with, unless said otherwise.
pub(crate) const SMALL_MODEL: &str = "sentence-transformers/all-MiniLM-L6-v2";
/// How long a broker may take to accept connections.
const SERVES_WITHIN: Duration = Duration::from_secs(60);
/// How long a model may take to be compiled and loaded.
const LOADED_WITHIN: Duration = Duration::from_secs(900);
/// Files of the temporary folder that the broker, and its engines and loaders, write their log lines to.
const BROKER_LOG: &str = "broker.log";
const CHILDREN_LOG: &str = "children.log";
/// Number of the readiness pipe in the broker.
const READY_FD: i32 = 3;

/// The program `modelbroker`, built now if it is not up to date. `MODELBROKER_BIN` names another one.
///
/// # Errors
/// When it cannot be built and is not there.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    if let Some(program) = std::env::var_os("MODELBROKER_BIN").filter(|value| !value.is_empty()) {
        return Ok(program.into());
    }
    let own = std::env::current_exe().context("asking for this program's path")?;
    let beside = own.parent().context("this program lies nowhere")?.join("modelbroker");
    // Under `cargo run` cargo says where it is; it builds into the folder that this program was built into.
    if let Some(cargo) = std::env::var_os("CARGO") {
        let target = beside.parent().and_then(Path::parent).context("not a target folder")?;
        let mut build = Command::new(cargo);
        build
            .args(["build", "--quiet", "--package", "cli", "--bin", "modelbroker", "--target-dir"])
            .arg(target);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        build.current_dir(env!("CARGO_MANIFEST_DIR")).stdout(Stdio::null());
        ensure!(
            build.status().context("running cargo")?.success(),
            "the program modelbroker cannot be built"
        );
    }
    ensure!(
        beside.is_file(),
        "{} is not there: build it with `cargo build --release -p cli`, or set MODELBROKER_BIN",
        beside.display()
    );
    Ok(beside)
}

/// The small model's folder, fetched if it is not there.
///
/// # Errors
/// Lists where it was looked for.
pub(crate) fn small_model_folder() -> anyhow::Result<PathBuf> {
    let options = model_source::SourceOptions::from_env()?;
    let reference = model_source::ModelRef::parse(SMALL_MODEL)?;
    Ok(model_source::resolve(&reference, &options, &mut model_source::NoProgress)?.folder)
}

/// A precision by its name, for the command line.
///
/// # Errors
/// Lists the names that there are.
pub(crate) fn precision(name: &str) -> Result<Precision, String> {
    let found = Precision::ALL.into_iter().find(|precision| precision.name() == name);
    found.ok_or_else(|| format!("none of {}", Precision::ALL.map(Precision::name).join(", ")))
}

/// How many texts at once are embedded in all benches.
pub(crate) fn bulk_options() -> EmbedOptions {
    EmbedOptions::bulk()
}

/// How a text that somebody waits for is embedded in all benches.
pub(crate) fn single_options() -> EmbedOptions {
    EmbedOptions::default()
}

/// A broker of the bench's own, with a socket and a cache in a temporary folder; killed when dropped.
#[derive(Debug)]
pub(crate) struct Broker {
    child: SpawnedChild,
    program: PathBuf,
    socket: PathBuf,
    folder: tempfile::TempDir,
}

impl Broker {
    /// Starts a broker with so many compute threads and waits until it serves. Without a cache: benches ask for the same
    /// texts again and again, and what they measure is computing.
    pub(crate) fn start(threads: usize) -> anyhow::Result<Broker> {
        Broker::start_with(threads, &["--cache-entries", "0"], &[])
    }

    /// As [`Broker::start`], with the cache that a broker has where nothing else is said.
    pub(crate) fn start_with_cache(threads: usize) -> anyhow::Result<Broker> {
        Broker::start_with(threads, &[], &[])
    }

    /// As [`Broker::start`], with other environment variables for it and its engines.
    pub(crate) fn start_in(threads: usize, variables: &[(&str, &str)]) -> anyhow::Result<Broker> {
        Broker::start_with(threads, &["--cache-entries", "0"], variables)
    }

    fn start_with(threads: usize, arguments: &[&str], variables: &[(&str, &str)]) -> anyhow::Result<Broker> {
        Broker::start_at(Broker::new_folder()?, threads, arguments, variables)
    }

    /// A folder for a broker's socket, cache and logs.
    pub(crate) fn new_folder() -> anyhow::Result<tempfile::TempDir> {
        tempfile::Builder::new().prefix("bench-").tempdir().context("making a folder")
    }

    /// As [`Broker::start`], in a folder that was another broker's, with its cache of compiled images.
    pub(crate) fn start_again(folder: tempfile::TempDir, threads: usize) -> anyhow::Result<Broker> {
        Broker::start_at(folder, threads, &["--cache-entries", "0"], &[])
    }

    /// Stops it and waits until it and its children are gone; gives its folder back.
    ///
    /// # Errors
    /// When it does not end.
    pub(crate) fn stop(mut self) -> anyhow::Result<tempfile::TempDir> {
        let folder = std::mem::replace(&mut self.folder, Broker::new_folder()?);
        drop(self);
        Ok(folder)
    }

    fn start_at(
        folder: tempfile::TempDir,
        threads: usize,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> anyhow::Result<Broker> {
        let socket = folder.path().join("run").join("broker.sock");
        let (mut ready, ready_writer) = std::io::pipe()?;
        let program = program()?;
        let mut command = Command::new(&program);
        command
            .envs(variables.iter().copied())
            .arg("serve")
            .arg("--socket")
            .arg(&socket)
            .arg("--cache-dir")
            .arg(folder.path().join("cache"))
            .args(["--threads", &threads.to_string()])
            .args(arguments)
            .args(["--ready-fd", &READY_FD.to_string()])
            .arg("--log-file")
            .arg(folder.path().join(BROKER_LOG))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Its engines and loaders say there what goes wrong.
            .stderr(
                std::fs::File::create(folder.path().join(CHILDREN_LOG))
                    .context("making a file for the log")?,
            );
        let limits = ChildLimits {
            parent_death_signal: true,
            inherit_fds: vec![(OwnedFd::from(ready_writer), READY_FD)],
            ..ChildLimits::default()
        };
        let child = spawn_limited(command, limits).context("starting a broker")?;
        let broker = Broker { child, program, socket, folder };
        let poller = Poller::new()?;
        poller.add(&ready, 0, Interest::READABLE)?;
        let mut events = Vec::new();
        let until = Instant::now() + SERVES_WITHIN;
        while poller.wait(&mut events, Some(until.saturating_duration_since(Instant::now())))? == 0 {
            ensure!(
                Instant::now() < until,
                "the broker does not serve after {SERVES_WITHIN:?}:\n{}",
                broker.log()
            );
        }
        ensure!(ready.read(&mut [0; 64])? > 0, "the broker ended before it served:\n{}", broker.log());
        Ok(broker)
    }

    /// What it and its engines have logged.
    pub(crate) fn log(&self) -> String {
        let of = |name| std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        of(BROKER_LOG) + &of(CHILDREN_LOG)
    }

    /// The program that it runs.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A folder that is removed with the broker.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A client with a connection of its own.
    pub(crate) fn connect(&self) -> anyhow::Result<Client> {
        connect(&self.socket)
    }

    /// Loads a model and keeps it loaded as long as the returned lease lives.
    pub(crate) fn load(&self, model: &str) -> anyhow::Result<worker_sdk::Model> {
        let model = self.connect()?.model_with(ModelRequest::new(model).wait(LOADED_WITHIN));
        model.with_context(|| format!("loading a model; the broker's log:\n{}", self.log()))
    }

    /// The processes of broker and engines.
    pub(crate) fn processes(&self) -> anyhow::Result<Vec<u32>> {
        let status = self.connect()?.status()?;
        let mut all = vec![status.broker_pid];
        all.extend(status.engines.iter().map(|engine| engine.pid).filter(|pid| *pid != 0));
        if all.len() < 2 {
            bail!("the broker has no engine:\n{}", self.log());
        }
        Ok(all)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Asked first, so that its engines end with it; killed if it does not listen.
        let asked = self.connect().and_then(|client| Ok(client.shutdown(Duration::from_secs(1))?));
        if asked.is_err() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// A client with a connection of its own to the broker at `socket`; none is started.
///
/// # Errors
/// When none is there.
pub(crate) fn connect(socket: &Path) -> anyhow::Result<Client> {
    Ok(Client::builder().socket(socket).start_broker(StartBroker::Never).name("bench").connect()?)
}

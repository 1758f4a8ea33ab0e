//! Worker processes: this program started again, doing what a user's worker does first, saying how long it took, and
//! staying until it is told to go. What is made of it is the benches' affair.

use crate::clients16::Done;
use crate::fixture;
use anyhow::{Context, bail};
use clap::ValueEnum;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use shm_layout::image::HeapImage;
use shm_os::image_backing::{BackingKind, map_published};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

/// What a worker does before it says that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Nothing: what starting a process costs by itself.
    Nothing,
    /// Connects and leases, with a lane.
    Thin,
    /// Connects, leases, and maps the image to compute itself.
    Attached,
    /// Reads the compiled image that is given as the model into memory of its own, as every process does that shares
    /// nothing.
    Private,
}

impl Mode {
    /// Its name on the command line and in JSON.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Mode::Nothing => "nothing",
            Mode::Thin => "thin",
            Mode::Attached => "attached",
            Mode::Private => "private",
        }
    }
}

/// Arguments of a worker process.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What to do.
    #[arg(long, value_enum)]
    mode: Mode,
    /// The broker's socket.
    #[arg(long)]
    socket: PathBuf,
    /// The model.
    #[arg(long)]
    model: String,
    /// Embed so many texts before being ready.
    #[arg(long, default_value_t = 0)]
    embed: usize,
    /// Embed the texts of this file, a JSON list, all at once, and say how that went.
    #[arg(long, value_name = "FILE", conflicts_with = "embed")]
    list: Option<PathBuf>,
    /// Compute threads of an attached worker [default: the cores that may be used]
    #[arg(long)]
    threads: Option<usize>,
}

/// How long a worker took, in µs, each step by itself.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Steps {
    /// Connecting.
    pub(crate) connect_us: f64,
    /// Lease and lane.
    pub(crate) lease_us: f64,
    /// A lease with the image, mapped and checked; 0 for a thin worker.
    pub(crate) map_us: f64,
}

impl Steps {
    /// All steps.
    pub(crate) fn total_us(self) -> f64 {
        self.connect_us + self.lease_us + self.map_us
    }
}

/// A worker that is ready, with what it holds.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    /// Lease and lane.
    pub(crate) model: Option<worker_sdk::Model>,
    /// The mapped image.
    pub(crate) attached: Option<worker_sdk::AttachedModel>,
    /// The model on weights of its own.
    pub(crate) private: Option<engine::Model>,
}

/// Does what a fresh worker does, with a connection of its own.
///
/// # Errors
/// When the broker refuses.
pub(crate) fn get_ready(mode: Mode, socket: &Path, model: &str) -> anyhow::Result<(Steps, Ready)> {
    let mut steps = Steps::default();
    let mut ready = Ready::default();
    if mode == Mode::Nothing {
        return Ok((steps, ready));
    }
    let start = Instant::now();
    if mode == Mode::Private {
        ready.private = Some(private_model(Path::new(model))?);
        steps.map_us = start.elapsed().as_nanos() as f64 / 1e3;
        return Ok((steps, ready));
    }
    let client = fixture::connect(socket)?;
    let connected = Instant::now();
    let model = client.model(model)?;
    let leased = Instant::now();
    steps.connect_us = (connected - start).as_nanos() as f64 / 1e3;
    steps.lease_us = (leased - connected).as_nanos() as f64 / 1e3;
    if mode == Mode::Attached {
        ready.attached = Some(model.attach()?);
        steps.map_us = leased.elapsed().as_nanos() as f64 / 1e3;
    }
    ready.model = Some(model);
    Ok((steps, ready))
}

/// A model on a copy of its image in this process's own memory.
fn private_model(image: &Path) -> anyhow::Result<engine::Model> {
    let file = File::open(image).with_context(|| format!("opening {}", image.display()))?;
    let mapping = map_published(file.as_fd(), BackingKind::ImageFile, file.metadata()?.len())?;
    Ok(engine::Model::load(Arc::new(HeapImage::new(mapping.as_bytes())))?)
}

/// The worker process. `since_main` is when `main` began.
///
/// # Errors
/// When anything fails.
pub(crate) fn run(arguments: &Arguments, since_main: Instant) -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if let Some(threads) = arguments.threads {
        engine::set_threads(threads)?;
    }
    let (steps, ready) = get_ready(arguments.mode, &arguments.socket, &arguments.model)?;
    let since_main_us = since_main.elapsed().as_nanos() as f64 / 1e3;
    if let Some(file) = &arguments.list {
        let done = embed_list(file, &ready, since_main_us / 1e6)?;
        println!("{}", serde_json::to_string(&done)?);
        let _ = std::io::stdin().read(&mut [0])?;
        return Ok(());
    }
    let options = worker_sdk::EmbedOptions::default().bypass_cache(true);
    for number in 0..arguments.embed {
        let text = [format!("text {number} of a worker that is measured")];
        match (&ready.attached, &ready.model, &ready.private) {
            (Some(attached), ..) => drop(attached.embed_with(&text, &options)?),
            (None, Some(model), _) => drop(model.embed_with(&text, &options)?),
            (None, None, Some(private)) => drop(private.embed(&[&text[0]])?),
            (None, None, None) => bail!("a worker that does nothing cannot embed"),
        };
    }
    println!("{}", serde_json::to_string(&Said { steps, since_main_us })?);
    // Stays until it is told to go, with everything that it holds.
    let _ = std::io::stdin().read(&mut [0])?;
    drop(ready);
    Ok(())
}

/// Embeds all texts of a file at once.
fn embed_list(file: &Path, ready: &Ready, ready_s: f64) -> anyhow::Result<Done> {
    let text = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    let texts: Vec<String> =
        serde_json::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
    let start = Instant::now();
    let vectors = match (&ready.attached, &ready.model) {
        (Some(attached), _) => attached.embed(&texts)?,
        (None, Some(model)) => model.embed_with(&texts, &fixture::bulk_options())?,
        (None, None) => bail!("a worker that does nothing cannot embed"),
    };
    let first = vectors.get(0).context("no vector")?.to_vec();
    Ok(Done { ready_s, embed_s: start.elapsed().as_secs_f64(), first })
}

/// What a worker says once it is ready.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Said {
    /// Each step.
    pub(crate) steps: Steps,
    /// From the beginning of `main`.
    pub(crate) since_main_us: f64,
}

/// A worker process as its starter sees it; ends when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    child: Child,
    stay: Option<ChildStdin>,
    said: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a worker.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn start(mode: Mode, socket: &Path, model: &str, embed: usize) -> anyhow::Result<Worker> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["worker", "--mode", mode.name(), "--model", model, "--embed", &embed.to_string()]);
        command.arg("--socket").arg(socket);
        Worker::spawn(command)
    }

    /// Starts a worker that embeds the texts of a file.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn start_list(
        mode: Mode,
        socket: &Path,
        model: &str,
        list: &Path,
        threads: usize,
    ) -> anyhow::Result<Worker> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["worker", "--mode", mode.name(), "--model", model, "--threads", &threads.to_string()]);
        command.arg("--socket").arg(socket).arg("--list").arg(list);
        Worker::spawn(command)
    }

    /// Starts any program that says when it is ready and stays until its standard input ends.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn spawn(mut command: Command) -> anyhow::Result<Worker> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("starting a worker")?;
        let (Some(stay), Some(said)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("a worker without pipes");
        };
        Ok(Worker { child, stay: Some(stay), said: BufReader::new(said) })
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it says.
    ///
    /// # Errors
    /// When it ended instead.
    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.said.read_line(&mut line).context("listening to a worker")? == 0 {
            bail!("a worker ended before it was ready: {}", self.child.wait()?);
        }
        Ok(line)
    }

    /// Waits until it is ready.
    ///
    /// # Errors
    /// When it ended instead.
    pub(crate) fn ready(&mut self) -> anyhow::Result<Said> {
        Ok(serde_json::from_str(&self.line()?)?)
    }

    /// What to write orders to.
    pub(crate) fn orders(&mut self) -> anyhow::Result<&mut ChildStdin> {
        self.stay.as_mut().context("the worker was told to go")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stay.take());
        let _ = self.child.wait();
    }
}

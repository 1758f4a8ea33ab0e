//! The engine process: drains the lanes of its clients, schedules their jobs, computes them, answers into the lanes.
//! How a model computes is not known here (crate `engine` does), nor how a client or a socket of a client looks.
//!
//! | module | what it does |
//! |---|---|
//! | `worker` | the two threads: waiting, looking at lanes; why an idle engine has one thread hop |
//! | `link`, `commands` | frames from and to the broker; what the broker says, done |
//! | `lane` | the engine's end of a lane, its bell |
//! | `accept`, `job` | what is asked becomes a job or a refusal; a job's texts and results |
//! | `schedule` | which texts are computed next: pure, simulated in its tests |
//! | `cache` | what is looked up before it is computed, and sent to the broker afterwards |
//! | `persist` | saved vectors: read when a model comes, written now and then and at the end, on a thread of its own |
//! | `generate` | text that is being written: a queue of its own, a token for each in turn |
//! | `batch`, `execute` | one batch: computed with its failures contained; its jobs answered or put back |
//! | [`Compute`], [`Loader`] | what is needed of whatever computes |
//!
//! # One answer a job
//! A job is a value that is moved: from its lane into the queue, from there into a batch, and from there back or into its
//! answer, which consumes it. Until the answer is posted the job also stays in its lane's cell (or with the broker, when
//! it came over the socket), so an engine that dies takes none with it: the next one adopts the lane and runs what was
//! not answered. Answers are posted by the thread that computed them.
//!
//! # Failures
//! A panic or an error of the model fails a batch, not the engine. When several jobs shared the batch each runs again
//! alone, so that only the one to blame gets the error. Before anything else is computed the model must pass its probe; if
//! it does not, the engine ends with [`HostError::ModelBroken`] and the broker replaces it. A client that breaks its
//! lane's protocol loses that lane; nobody else notices.

#![forbid(unsafe_code)]

mod accept;
mod batch;
mod breaks;
mod cache;
mod commands;
mod compute;
#[cfg(test)]
mod double;
mod engine_model;
mod execute;
mod generate;
mod host;
mod job;
mod lane;
mod link;
mod measured;
mod persist;
mod schedule;
mod worker;

pub use compute::{Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors};

use host::Host;
use persist::Keeper;
use shm_layout::wire::FromEngine;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Longest wait for the broker to take the last answers after a drain.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How an engine runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostOptions {
    /// Compute threads; 0 = as many as this process may use cores.
    pub threads: usize,
    /// Leave this process readable for debuggers and core dumps. Off by default: documents are private.
    pub dumpable: bool,
    /// Folder in which caches are kept over restarts, made when needed; `None` = they are not.
    pub vectors_dir: Option<PathBuf>,
}

impl HostOptions {
    fn threads(&self) -> usize {
        match self.threads {
            0 => shm_os::process::cores_allowed(),
            threads => threads,
        }
    }
}

/// Why an engine ended other than by a drain. Jobs that were not answered are in their lanes or with the broker.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The broker closed its end or is dead; an engine does not outlive it.
    #[error("the broker is gone")]
    BrokerGone,
    /// What came over the link cannot be understood.
    #[error("the link to the broker failed: {0}; broker and engine must be of one version")]
    Link(String),
    /// A message broke the protocol of the link.
    #[error("the broker broke the protocol of the link: {0}; broker and engine must be of one version")]
    Protocol(&'static str),
    /// A model failed its probe after a failure: what it computes cannot be trusted any more.
    #[error("the model no longer computes what it should: {reason}")]
    ModelBroken {
        /// What the probe found.
        reason: String,
    },
    /// A thread of the host itself panicked: a fault of this program.
    #[error("a thread of the engine panicked; this is a bug, please report it")]
    Panicked,
    /// The compute threads could not be set up.
    #[error("compute threads: {0}")]
    Threads(String),
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] shm_os::OsError),
}

impl HostError {
    fn waker(error: shm_os::doorbell::DoorbellError) -> HostError {
        match error {
            shm_os::doorbell::DoorbellError::Os(error) => HostError::Os(error),
            shm_os::doorbell::DoorbellError::NotAnEventfd => {
                HostError::Protocol("a bell of our own is no bell")
            }
        }
    }
}

impl From<link::LinkError> for HostError {
    fn from(error: link::LinkError) -> HostError {
        match error {
            link::LinkError::Closed | link::LinkError::Framed(shm_os::framed::FramedError::Closed) => {
                HostError::BrokerGone
            }
            link::LinkError::Framed(error) => HostError::Link(error.to_string()),
            link::LinkError::Os(error) => HostError::Os(error),
        }
    }
}

/// Runs an engine on `link`, with crate `engine` computing, until the broker drains it (`Ok`) or is gone.
///
/// After an error a thread of the engine may still be computing: end the process then.
///
/// # Errors
/// [`HostError`]; the broker starts another engine.
pub fn run(link: OwnedFd, options: HostOptions) -> Result<(), HostError> {
    engine::set_threads(options.threads()).map_err(|error| HostError::Threads(error.to_string()))?;
    run_with(link, engine_model::EngineLoader, options)
}

/// As [`run`], with models that `loader` makes.
///
/// # Errors
/// [`HostError`]; the broker starts another engine.
pub fn run_with<L: Loader>(link: OwnedFd, loader: L, options: HostOptions) -> Result<(), HostError> {
    if !options.dumpable {
        shm_os::process::set_not_dumpable()?;
    }
    let mut host = Host::new(link, loader)?;
    if let Some(folder) = options.vectors_dir.clone() {
        host.keeper = Keeper::start(folder, Arc::clone(&host.link))
            .inspect_err(|error| tracing::warn!(%error, "no thread for saving vectors; they are not saved"))
            .ok();
    }
    let host = Arc::new(host);
    host.link.send(&FromEngine::Ready { threads: u32::try_from(options.threads()).unwrap_or(u32::MAX) });
    for (name, generates) in [("engine-a", false), ("engine-b", false), ("engine-text", true)] {
        let host = Arc::clone(&host);
        std::thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                // Its state may be half changed: nothing goes on after that.
                if catch_unwind(AssertUnwindSafe(|| if generates { host.generate() } else { host.work() }))
                    .is_err()
                {
                    host.stop(Err(HostError::Panicked));
                }
            })
            .map_err(|error| HostError::Threads(error.to_string()))?;
    }
    let outcome = host.wait_for_end();
    if outcome.is_ok() && !host.link.finish(LAST_WORDS)? {
        tracing::warn!("the broker did not take the last answers");
    }
    // Only after an orderly end: what a broken model computed is not kept.
    if let (Ok(()), Some(keeper)) = (&outcome, &host.keeper) {
        keeper.finish();
    }
    outcome
}

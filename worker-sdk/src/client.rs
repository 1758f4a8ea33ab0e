//! The way in: a client of the user's broker. What it connects with is `connect`'s, what models do is `model`'s.

use crate::connect::Core;
use crate::error::SdkError;
use crate::fork_cell::ForkCell;
use crate::model::Model;
use crate::session::Reply;
use crate::settings::{ModelRequest, Settings, StartBroker, cut};
use crate::sharing::Fallback;
use crate::time::Deadline;
use shm_layout::wire::{ClientMessage, ConfigurationReloaded, StatusReport, Welcome};
use shm_os::socket::AllowedPeer;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time beyond the drain after which a broker that was told to leave is not waited for any more.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// A connection to the user's broker. Clones share it; it closes with the last clone and the last model made from it.
///
/// In a forked child it goes on working, with a connection of the child's own, made on first use.
#[derive(Clone, Debug)]
pub struct Client {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    settings: Arc<Settings>,
    cores: ForkCell<Core>,
}

/// How to connect; see [`Client::builder`].
#[derive(Debug, Clone)]
#[must_use = "nothing happens before connect()"]
pub struct ClientBuilder {
    settings: Settings,
}

impl Client {
    /// Connects with the defaults: the socket from `MODELBROKER_SOCKET`, else the user's own; a broker is started when
    /// none runs, unless `MODELBROKER_START` is `never`.
    ///
    /// # Errors
    /// [`SdkError`] when no broker runs and none can be started, or the one that runs cannot be talked to. A broker of
    /// another version shows only with the first request: its greeting is not waited for here.
    pub fn connect() -> Result<Client, SdkError> {
        Client::builder().connect()
    }

    /// For other settings than the defaults.
    pub fn builder() -> ClientBuilder {
        ClientBuilder { settings: Settings::from_environment() }
    }

    pub(crate) fn core(&self) -> Arc<Core> {
        let handle = &*self.handle;
        handle.cores.get_or_make(|| Arc::new(Core::new(Arc::clone(&handle.settings))))
    }

    /// Leases a model by id, alias or folder; `""` is the broker's default model. It is loaded if nobody has yet.
    ///
    /// # Errors
    /// [`SdkError::Refused`] when the model cannot be had; the message says where it was looked for and what to do.
    pub fn model(&self, name: &str) -> Result<Model, SdkError> {
        self.model_with(ModelRequest::new(name))
    }

    /// As [`Client::model`], with a limit of time, a progress callback or another route.
    ///
    /// # Errors
    /// As [`Client::model`].
    pub fn model_with(&self, request: ModelRequest) -> Result<Model, SdkError> {
        Model::lease(self, request)
    }

    /// The state of everything that the broker runs.
    ///
    /// # Errors
    /// [`SdkError`] when the broker is not there or does not answer in time. None is started for the question.
    pub fn status(&self) -> Result<StatusReport, SdkError> {
        let core = self.core();
        let deadline = Deadline::after(Some(core.settings.patience()));
        match core.ask(&ClientMessage::Status, StartBroker::Never, deadline)?.1 {
            Reply::Status(report) => Ok(*report),
            other => Err(unexpected(&other)),
        }
    }

    /// The broker's greeting: version, process, session and incarnation.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn broker(&self) -> Result<Welcome, SdkError> {
        let core = self.core();
        let deadline = Deadline::after(Some(core.settings.patience()));
        core.session(StartBroker::Never, deadline, &mut |_| {})?.wait_welcome(deadline)
    }

    /// Asks whether the broker is there and answers.
    ///
    /// # Errors
    /// As [`Client::status`].
    pub fn ping(&self) -> Result<(), SdkError> {
        let core = self.core();
        let deadline = Deadline::after(Some(core.settings.patience()));
        match core.ask(&ClientMessage::Ping, StartBroker::Never, deadline)?.1 {
            Reply::Pong => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells the broker to leave, for all its clients, and waits until it has closed this connection. Accepted jobs may
    /// finish for at most `drain`.
    ///
    /// # Errors
    /// [`SdkError::NoBroker`] when none runs, [`SdkError::DeadlineExceeded`] when it is still there afterwards.
    pub fn shutdown(&self, drain: Duration) -> Result<(), SdkError> {
        let core = self.core();
        let deadline = Deadline::after(Some(drain.saturating_add(SHUTDOWN_GRACE)));
        let drain_ms = u32::try_from(drain.as_millis()).unwrap_or(u32::MAX);
        let session = core.session(StartBroker::Never, deadline, &mut |_| {})?;
        match session.request(&ClientMessage::Shutdown { drain_ms }, deadline, &mut |_| {}) {
            Ok(Reply::ShuttingDown) | Err(SdkError::Disconnected { .. }) => {}
            Ok(other) => return Err(unexpected(&other)),
            Err(error) => return Err(error),
        }
        if session.wait_hang_up(deadline) {
            Ok(())
        } else {
            Err(SdkError::DeadlineExceeded(deadline.allowed))
        }
    }

    /// Asks the broker to read its configuration again, as SIGHUP does; says what changed and what cannot change while it
    /// runs. Starts no broker.
    ///
    /// # Errors
    /// [`SdkError::Refused`] with [`Code::ConfigInvalid`](crate::Code::ConfigInvalid) when the new configuration cannot be
    /// used: then nothing changes. As [`Client::status`] otherwise.
    pub fn reload_configuration(&self) -> Result<ConfigurationReloaded, SdkError> {
        let core = self.core();
        let deadline = Deadline::after(Some(core.settings.patience()));
        match core.ask(&ClientMessage::ReloadConfiguration, StartBroker::Never, deadline)?.1 {
            Reply::ConfigurationReloaded(what) => Ok(what),
            other => Err(unexpected(&other)),
        }
    }

    /// Times that the connection was made anew.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.core().reconnects()
    }

    /// The broker's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.handle.settings.socket
    }
}

/// Refuses a fallback that this build cannot do.
pub(crate) fn check_local(fallback: Fallback) -> Result<(), SdkError> {
    if fallback == Fallback::Local && !cfg!(feature = "local") {
        return Err(SdkError::Argument(
            "Fallback::Local needs worker-sdk's feature `local`: build the program with it, or choose Fallback::Error".into(),
        ));
    }
    Ok(())
}

pub(crate) fn unexpected(reply: &Reply) -> SdkError {
    SdkError::Fault {
        peer: "the broker",
        what: format!("an answer that does not fit the question: {reply:?}"),
    }
}

impl ClientBuilder {
    /// The broker's socket, instead of `MODELBROKER_SOCKET` or the user's own.
    pub fn socket(mut self, path: impl Into<PathBuf>) -> ClientBuilder {
        self.settings.socket = path.into();
        self
    }

    /// What the program calls itself on status pages (its file name); cut at 128 bytes.
    pub fn name(mut self, name: impl Into<String>) -> ClientBuilder {
        self.settings.name = cut(name.into());
        self
    }

    /// Whether a broker may be started when none runs, instead of what `MODELBROKER_START` says.
    pub fn start_broker(mut self, start: StartBroker) -> ClientBuilder {
        self.settings.start = start;
        self
    }

    /// The program to start a broker with, instead of `MODELBROKER_BIN`, a `modelbroker` beside this program, or one on
    /// the `PATH`.
    pub fn broker_program(mut self, program: impl Into<PathBuf>) -> ClientBuilder {
        self.settings.program = Some(program.into());
        self
    }

    /// How long one attempt to connect may take, the start of a broker included (15 s).
    pub fn connect_timeout(mut self, timeout: Duration) -> ClientBuilder {
        self.settings.connect_timeout = timeout;
        self
    }

    /// How long calls without a timeout of their own wait for a broker that went away, or for room in one that is
    /// overloaded (30 s). Calls with a timeout wait as long as that says.
    pub fn patience(mut self, patience: Duration) -> ClientBuilder {
        self.settings.chosen_patience = Some(patience);
        self
    }

    /// What happens when the shared model cannot be had, instead of what `MODELBROKER_FALLBACK` says
    /// ([`Fallback::Error`]). With [`Fallback::Local`] connecting succeeds also where no broker is, and calls wait 3 s for
    /// one that went away unless [`ClientBuilder::patience`] says otherwise, whatever their own timeouts.
    pub fn fallback(mut self, fallback: Fallback) -> ClientBuilder {
        self.settings.fallback = fallback;
        self
    }

    /// Whether this program uses the shared models at all, instead of what `MODELBROKER_SHARING_ENABLED` (or
    /// `CORE_MODEL_MANAGER_SHARING_ENABLED`) says. Switched off, models are loaded in this process (feature `local`) and no
    /// broker is looked for.
    pub fn sharing(mut self, enabled: bool) -> ClientBuilder {
        self.settings.sharing.enabled = enabled;
        self
    }

    /// Which share of programs uses the shared models, 0 to 100 (more counts as 100), instead of what
    /// `MODELBROKER_SHARING_ROLLOUT_PERCENT` (or `CORE_MODEL_MANAGER_SHARING_ROLLOUT_PERCENT`) says. Whether this one is among
    /// them depends on its name alone: see [`crate::rollout_bucket`].
    pub fn rollout_percent(mut self, percent: u8) -> ClientBuilder {
        self.settings.sharing.rollout_percent = percent.min(100);
        self
    }

    /// Where models that are loaded in this process ([`Fallback::Local`]) and their compiled images are cached, instead of
    /// what `MODELBROKER_CACHE_DIR` says. The broker's own folder is best: then nothing is compiled twice.
    pub fn cache_dir(mut self, folder: impl Into<PathBuf>) -> ClientBuilder {
        self.settings.cache_dir = Some(folder.into());
        self
    }

    /// How long a broker started by this client stays when it has no client at all (30 minutes).
    pub fn broker_idle_exit(mut self, idle: Duration) -> ClientBuilder {
        self.settings.broker_idle_exit = idle;
        self
    }

    /// Whose broker may answer; this user's (the default), another one's, or anybody's.
    pub fn broker_user(mut self, peer: AllowedPeer) -> ClientBuilder {
        self.settings.peer = peer;
        self
    }

    /// Connects.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect(self) -> Result<Client, SdkError> {
        if let Some(problem) = self.settings.problems.first() {
            return Err(problem.clone());
        }
        let fallback = self.settings.fallback;
        check_local(fallback)?;
        let shares = self.settings.shares();
        let handle = Handle { settings: Arc::new(self.settings), cores: ForkCell::new() };
        let client = Client { handle: Arc::new(handle) };
        let core = client.core();
        if !shares {
            let reason = core.settings.why_not();
            if !cfg!(feature = "local") {
                return Err(SdkError::SharingOff { reason });
            }
            tracing::info!(%reason, "sharing is off for this program: models are loaded in it");
            return Ok(client);
        }
        match core.session(core.settings.start, Deadline::after(None), &mut |_| {}) {
            Ok(_) => {}
            Err(error) if fallback == Fallback::Local && error.is_broker_absence() => {
                tracing::warn!(code = error.code(), reason = %error, "no broker: models are loaded in this process");
            }
            Err(error) => return Err(error),
        }
        Ok(client)
    }
}

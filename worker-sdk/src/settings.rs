//! What a caller may choose: connection, models, single calls. Reading the environment is here; acting on it is not.

use crate::error::SdkError;
use crate::prompt::Prompt;
use crate::sharing::{Fallback, Sharing};
use shm_layout::limits::{MAX_CLIENT_NAME_BYTES, MAX_MODEL_NAME_BYTES};
use shm_layout::wire::{LoadProgress, Operation, Priority};
use shm_os::socket::AllowedPeer;
use std::path::PathBuf;
use std::time::Duration;

/// Environment variable that names the broker's socket.
pub const SOCKET_VARIABLE: &str = "MODELBROKER_SOCKET";
/// Environment variable that names the program to start a broker with.
pub const PROGRAM_VARIABLE: &str = "MODELBROKER_BIN";
/// Environment variable that forbids starting a broker when it is `never`.
pub const START_VARIABLE: &str = "MODELBROKER_START";
/// File name of the socket in the run folder.
pub const SOCKET_FILE_NAME: &str = "broker.sock";
/// File name of a started broker's log, beside the socket.
pub const LOG_FILE_NAME: &str = "broker.log";

/// How long one attempt to connect, or to start a broker and connect to it, may take.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a call without a timeout of its own waits for a broker that went away.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);
/// The same for a client that can go on with a private model.
const FALLBACK_PATIENCE: Duration = Duration::from_secs(3);
/// How long a model may take to load, downloads included.
const DEFAULT_MODEL_WAIT: Duration = Duration::from_secs(600);
/// How long a started broker stays without any client.
const DEFAULT_BROKER_IDLE_EXIT: Duration = Duration::from_secs(1800);

/// Whether a broker may be started when none runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartBroker {
    /// Start one when none runs; one for each socket, however many ask at once.
    #[default]
    IfNeeded,
    /// Never start one; connecting fails when none runs.
    Never,
}

/// How jobs reach the engine. Both routes give the same answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Route {
    /// Through shared memory, without the broker in between.
    #[default]
    Lane,
    /// As frames on the broker's socket: for places where memory cannot be shared, and for comparison.
    Socket,
}

#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) socket: PathBuf,
    pub(crate) name: String,
    pub(crate) start: StartBroker,
    pub(crate) program: Option<PathBuf>,
    pub(crate) connect_timeout: Duration,
    /// What [`Settings::patience`] gives where the caller has said nothing.
    pub(crate) chosen_patience: Option<Duration>,
    /// What happens when the shared model cannot be had.
    pub(crate) fallback: Fallback,
    pub(crate) sharing: Sharing,
    /// Where models that are loaded in this process are cached; as the environment says where it is `None`.
    pub(crate) cache_dir: Option<PathBuf>,
    /// What is wrong with the environment; told when connecting, unless the caller sets what it was about.
    pub(crate) problems: Vec<SdkError>,
    pub(crate) broker_idle_exit: Duration,
    pub(crate) peer: AllowedPeer,
}

impl Settings {
    /// From the environment and the defaults.
    pub(crate) fn from_environment() -> Settings {
        let socket = match std::env::var_os(SOCKET_VARIABLE).filter(|value| !value.is_empty()) {
            Some(socket) => PathBuf::from(socket),
            None => shm_os::run_dir::default_run_dir().join(SOCKET_FILE_NAME),
        };
        let forbidden = std::env::var_os(START_VARIABLE).is_some_and(|value| value == "never");
        let program = std::env::current_exe().ok();
        let name = program.as_deref().and_then(|p| p.file_name()).map(|n| n.to_string_lossy().into_owned());
        let mut problems = Vec::new();
        let mut settings = Settings {
            socket,
            name: cut(name.unwrap_or_else(|| "worker".into())),
            start: if forbidden { StartBroker::Never } else { StartBroker::IfNeeded },
            program: None,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            chosen_patience: None,
            fallback: Fallback::from_environment().unwrap_or_else(|problem| {
                problems.push(problem);
                Fallback::default()
            }),
            sharing: Sharing::from_environment().unwrap_or_else(|problem| {
                problems.push(problem);
                Sharing::default()
            }),
            cache_dir: None,
            problems: Vec::new(),
            broker_idle_exit: DEFAULT_BROKER_IDLE_EXIT,
            peer: AllowedPeer::SameUser,
        };
        settings.problems = problems;
        settings
    }

    /// How long calls wait for a broker that went away. Shorter where they can go on without one.
    pub(crate) fn patience(&self) -> Duration {
        let usual = match self.fallback {
            Fallback::Error => DEFAULT_PATIENCE,
            Fallback::Local => FALLBACK_PATIENCE,
        };
        self.chosen_patience.unwrap_or(usual)
    }

    /// Whether this program uses the shared models.
    pub(crate) fn shares(&self) -> bool {
        self.sharing.includes(&self.name)
    }

    /// Why it does not.
    pub(crate) fn why_not(&self) -> String {
        if self.sharing.enabled {
            format!(
                "the roll-out is at {} %, and {:?} is number {} of 100",
                self.sharing.rollout_percent,
                self.name,
                crate::sharing::rollout_bucket(&self.name)
            )
        } else {
            "sharing.enabled is false".into()
        }
    }
}

/// Cuts a name at the limit, at a character's edge.
pub(crate) fn cut(mut name: String) -> String {
    let mut end = name.len().min(MAX_CLIENT_NAME_BYTES);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name.truncate(end);
    name
}

/// Which model, and how it is used. `ModelRequest::new("")` is the broker's default model.
pub struct ModelRequest {
    pub(crate) name: String,
    pub(crate) wait: Duration,
    pub(crate) route: Route,
    pub(crate) fallback: Option<Fallback>,
    pub(crate) progress: Option<Box<dyn FnMut(LoadProgress) + Send>>,
}

impl ModelRequest {
    /// A model by id, alias or folder; empty = the broker's default model. A folder that exists goes before an id of the
    /// same spelling, and is found from this program's working folder.
    #[must_use]
    pub fn new(name: impl Into<String>) -> ModelRequest {
        ModelRequest {
            name: name.into(),
            wait: DEFAULT_MODEL_WAIT,
            route: Route::Lane,
            fallback: None,
            progress: None,
        }
    }

    /// Longest wait for the model to be loaded (10 minutes; downloads count).
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> ModelRequest {
        self.wait = wait;
        self
    }

    /// How jobs reach the engine ([`Route::Lane`]).
    #[must_use]
    pub fn route(mut self, route: Route) -> ModelRequest {
        self.route = route;
        self
    }

    /// What happens when the shared model cannot be had, instead of what the client says
    /// ([`crate::ClientBuilder::fallback`]).
    #[must_use]
    pub fn fallback(mut self, fallback: Fallback) -> ModelRequest {
        self.fallback = Some(fallback);
        self
    }

    /// Called on the asking thread while the model is being loaded. Not called when it is loaded already.
    #[must_use]
    pub fn progress(mut self, progress: impl FnMut(LoadProgress) + Send + 'static) -> ModelRequest {
        self.progress = Some(Box::new(progress));
        self
    }

    /// The name as the broker understands it, whose working folder is another one.
    pub(crate) fn resolved_name(&self) -> String {
        let is_folder = |name: &str| {
            let path = std::path::Path::new(name);
            !name.is_empty() && path.is_relative() && path.is_dir()
        };
        // A precision may follow the folder's name: `models/mine:int8`.
        let folder = match self.name.rsplit_once(':') {
            _ if is_folder(&self.name) => &self.name,
            Some((folder, _)) if is_folder(folder) => folder,
            _ => return self.name.clone(),
        };
        match std::path::absolute(folder).map(|path| path.into_os_string().into_string()) {
            Ok(Ok(absolute)) => absolute + &self.name[folder.len()..],
            _ => self.name.clone(),
        }
    }

    pub(crate) fn check(&self) -> Result<(), SdkError> {
        if self.name.len() > MAX_MODEL_NAME_BYTES {
            let len = self.name.len();
            return Err(SdkError::Argument(format!(
                "the model name has {len} bytes; the limit is {MAX_MODEL_NAME_BYTES}: use an id, an alias or a shorter path"
            )));
        }
        Ok(())
    }
}

impl From<&str> for ModelRequest {
    fn from(name: &str) -> ModelRequest {
        ModelRequest::new(name)
    }
}

impl std::fmt::Debug for ModelRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelRequest")
            .field("name", &self.name)
            .field("wait", &self.wait)
            .field("route", &self.route)
            .finish_non_exhaustive()
    }
}

/// How one call is to be treated.
#[derive(Debug, Clone, Default)]
pub struct EmbedOptions {
    /// Somebody waits (the default), or throughput matters.
    pub priority: Priority,
    /// Counted from the call. When it runs out the caller gets [`SdkError::DeadlineExceeded`] and the job is
    /// cancelled. `None`: as long as the broker lives, and the client's patience when it goes away.
    pub timeout: Option<Duration>,
    /// Compute every text, whatever the cache holds, and keep nothing in it: for measuring, or for texts that no other
    /// program of this user is to learn of.
    pub bypass_cache: bool,
    /// What is put before each text.
    pub prompt: Prompt,
    /// How many numbers of each vector are wanted, from the first; `None` = all. See [`crate::Embeddings::shortened`].
    pub dimensions: Option<usize>,
}

impl EmbedOptions {
    /// Throughput before the single answer; gives way to interactive work.
    #[must_use]
    pub fn bulk() -> EmbedOptions {
        EmbedOptions::default().priority(Priority::Bulk)
    }

    /// Sets the timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> EmbedOptions {
        self.timeout = Some(timeout);
        self
    }

    /// Sets whether the cache is left aside.
    #[must_use]
    pub fn bypass_cache(mut self, bypass: bool) -> EmbedOptions {
        self.bypass_cache = bypass;
        self
    }

    /// Sets what is put before each text.
    #[must_use]
    pub fn prompt(mut self, prompt: Prompt) -> EmbedOptions {
        self.prompt = prompt;
        self
    }

    /// Sets how many numbers of each vector are wanted.
    #[must_use]
    pub fn dimensions(mut self, dimensions: usize) -> EmbedOptions {
        self.dimensions = Some(dimensions);
        self
    }

    /// What a job of this call asks for.
    pub(crate) fn operation(&self) -> Operation {
        if self.bypass_cache { Operation::EmbedFresh } else { Operation::Embed }
    }

    /// Sets the priority.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> EmbedOptions {
        self.priority = priority;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_at_a_character() {
        let name = cut("ä".repeat(MAX_CLIENT_NAME_BYTES));
        assert_eq!(name.len(), MAX_CLIENT_NAME_BYTES);
        assert!(cut(format!("a{}", "ä".repeat(100))).len() <= MAX_CLIENT_NAME_BYTES);
        assert!(ModelRequest::new("x".repeat(MAX_MODEL_NAME_BYTES + 1)).check().is_err());
    }

    #[test]
    fn folders_are_named_from_the_root() {
        // Tests run in the package's folder.
        let resolved = ModelRequest::new("src").resolved_name();
        assert!(resolved.starts_with('/') && resolved.ends_with("/src"), "{resolved}");
        assert_eq!(ModelRequest::new("all-MiniLM-L6-v2").resolved_name(), "all-MiniLM-L6-v2");
        assert_eq!(ModelRequest::new("").resolved_name(), "");
    }
}

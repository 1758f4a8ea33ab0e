//! What a broker is told at its start, and every bound it holds to. No I/O: folders and sockets are touched in
//! `run_folder` and `server`.

use crate::reloaded::ReadAgain;
use shm_os::image_backing::BackingChoice;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// Vectors that a model's cache holds where nothing else is said.
pub const DEFAULT_CACHE_ENTRIES: usize = 10_000;
/// How long a vector is kept where nothing else is said.
pub const DEFAULT_CACHE_TTL: Duration = Duration::from_secs(3600);

/// How long a model without lease or job stays loaded where nothing else is said.
pub const DEFAULT_UNLOAD_AFTER: Duration = Duration::from_secs(1800);
/// Models loaded at once where nothing else is said.
pub const DEFAULT_MAX_SHARED_MODELS: usize = 5;

/// What a configured model is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ModelKind {
    /// Texts to vectors.
    Embedding,
    /// Query and texts to scores.
    Reranker,
    /// Texts to class scores.
    Classifier,
    /// Text to text (T5).
    Text2Text,
    /// A conversation to its continuation.
    Chat,
    /// Served by a provider of its own.
    Custom,
}

impl ModelKind {
    /// Each kind.
    pub const ALL: [ModelKind; 6] = [
        ModelKind::Embedding,
        ModelKind::Reranker,
        ModelKind::Classifier,
        ModelKind::Text2Text,
        ModelKind::Chat,
        ModelKind::Custom,
    ];

    /// The name in settings and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ModelKind::Embedding => "embedding",
            ModelKind::Reranker => "reranker",
            ModelKind::Classifier => "classifier",
            ModelKind::Text2Text => "text2text",
            ModelKind::Chat => "chat",
            ModelKind::Custom => "custom",
        }
    }
}

/// The text names no kind of model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no kind of model: use embedding, reranker, classifier, text2text, chat or custom")]
pub struct UnknownKind(
    /// What was given, cut to a readable length.
    pub String,
);

impl std::str::FromStr for ModelKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<ModelKind, UnknownKind> {
        let unknown = || UnknownKind(text.chars().take(32).collect());
        ModelKind::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(unknown)
    }
}

/// Where a model is wished to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DeviceChoice {
    /// Whatever the engine finds best.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device; `None` = the first.
    Cuda(Option<u16>),
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(None) => f.write_str("cuda"),
            DeviceChoice::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

/// The text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device: use auto, cpu, cuda or cuda:N")]
pub struct UnknownDevice(
    /// What was given, cut to a readable length.
    pub String,
);

impl std::str::FromStr for DeviceChoice {
    type Err = UnknownDevice;

    fn from_str(text: &str) -> Result<DeviceChoice, UnknownDevice> {
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(None)),
            other => other
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(|index| DeviceChoice::Cuda(Some(index)))
                .ok_or_else(|| UnknownDevice(text.chars().take(32).collect())),
        }
    }
}

/// A model that clients ask for by an id of the configuration. Plain data; [`ModelSettings::new`] fills in the defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSettings {
    /// What clients call it.
    pub id: String,
    /// What the loader is given: a name, alias or folder, with a precision behind a colon where one is wished.
    pub source: String,
    /// What it is for.
    pub kind: ModelKind,
    /// Loaded at start and kept: neither idleness nor the bound on models unloads it.
    pub preload: bool,
    /// How long it stays loaded without lease or job; zero = for ever; `None` = [`BrokerConfig::unload_after`].
    pub unload_after: Option<Duration>,
    /// Whether processes share it; if not, the broker refuses it and each process loads it for itself.
    pub shared: bool,
    /// Where it is wished to compute.
    pub device: DeviceChoice,
    /// Whether its vectors are kept, where caches are on at all.
    pub cache: bool,
}

impl ModelSettings {
    /// A shared model of this id and source, loaded on first use, with the defaults for everything else.
    #[must_use]
    pub fn new(id: impl Into<String>, source: impl Into<String>, kind: ModelKind) -> ModelSettings {
        ModelSettings {
            id: id.into(),
            source: source.into(),
            kind,
            preload: false,
            unload_after: None,
            shared: true,
            device: DeviceChoice::Auto,
            cache: true,
        }
    }
}

/// How a broker is set up. Plain data; [`BrokerConfig::new`] fills in the defaults.
pub struct BrokerConfig {
    /// Where clients connect. Its folder must exist or be creatable, be this user's, and have mode 0700.
    pub socket_path: PathBuf,
    /// Locked for the broker's life; holds its process id. The lock, not the file, says whether a broker runs.
    pub lock_path: PathBuf,
    /// Model given to clients that name none.
    pub default_model: String,
    /// What loaded images lie in.
    pub backing: BackingChoice,
    /// Where loaders keep compiled images. The broker itself never looks into it.
    pub cache_dir: PathBuf,
    /// Program and leading arguments of an engine; `--link-fd 3` is appended.
    pub engine_command: Vec<OsString>,
    /// Program and leading arguments of a loader; `--link-fd 3 --model NAME --backing KIND --cache-dir DIR` is appended.
    pub loader_command: Vec<OsString>,
    /// Bounds.
    pub limits: Limits,
    /// Leave when no session existed for so long; `None` = stay.
    pub idle_exit: Option<Duration>,
    /// Let processes of other users in: the socket gets mode 0666 and its folder may be readable by others.
    pub allow_other_users: bool,
    /// Vectors that the cache of each loaded model holds at most; 0 = no cache.
    pub cache_entries: usize,
    /// How long a vector is kept; zero = for ever.
    pub cache_ttl: Duration,
    /// Engines keep caches over restarts (their command says where): none is ended without time to save.
    pub cache_persist: bool,
    /// Processes that are kept running to provide models.
    pub providers: Vec<ProviderCommand>,
    /// Models that clients ask for by an id. Every other name goes to the loader as it is.
    pub models: Vec<ModelSettings>,
    /// Names or ids loaded at start and kept, beside the models that are configured so.
    pub preload: Vec<String>,
    /// How long a model without lease or job stays loaded; zero = for ever.
    pub unload_after: Duration,
    /// Models loaded at once: before another is loaded the least recently used idle one is let go; 0 = no such bound.
    pub max_shared_models: usize,
    /// Bytes that images and caches may take in all; `None` = as much as the system and the control group have.
    pub memory_budget_bytes: Option<u64>,
    /// Whether loads, unloads and their like are logged.
    pub log_model_usage: bool,
    /// Whether memory that grows short is told as an alert.
    pub memory_monitoring: bool,
    /// Called once, when the socket accepts connections.
    pub on_ready: Option<Box<dyn FnOnce() + Send>>,
    /// Reads the configuration again, for SIGHUP and for clients that ask for it; `None`: they are told that it cannot be.
    pub on_reload: Option<ReadAgain>,
}

impl BrokerConfig {
    /// A configuration with default limits, backings by the images' sizes, no idle exit, and only this user let in. The
    /// lock file lies beside the socket, with `.lock` appended to its name.
    #[must_use]
    pub fn new(
        socket_path: PathBuf,
        cache_dir: PathBuf,
        default_model: String,
        engine_command: Vec<OsString>,
        loader_command: Vec<OsString>,
    ) -> BrokerConfig {
        let mut lock_path = socket_path.clone().into_os_string();
        lock_path.push(".lock");
        BrokerConfig {
            socket_path,
            lock_path: PathBuf::from(lock_path),
            default_model,
            backing: BackingChoice::Auto,
            cache_dir,
            engine_command,
            loader_command,
            limits: Limits::default(),
            idle_exit: None,
            allow_other_users: false,
            cache_entries: DEFAULT_CACHE_ENTRIES,
            cache_ttl: DEFAULT_CACHE_TTL,
            cache_persist: false,
            providers: Vec::new(),
            models: Vec::new(),
            preload: Vec::new(),
            unload_after: DEFAULT_UNLOAD_AFTER,
            max_shared_models: DEFAULT_MAX_SHARED_MODELS,
            memory_budget_bytes: None,
            log_model_usage: true,
            memory_monitoring: true,
            on_ready: None,
            on_reload: None,
        }
    }
}

impl std::fmt::Debug for BrokerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BrokerConfig")
            .field("socket_path", &self.socket_path)
            .field("lock_path", &self.lock_path)
            .field("default_model", &self.default_model)
            .field("backing", &self.backing)
            .field("cache_dir", &self.cache_dir)
            .field("engine_command", &self.engine_command)
            .field("loader_command", &self.loader_command)
            .field("limits", &self.limits)
            .field("idle_exit", &self.idle_exit)
            .field("allow_other_users", &self.allow_other_users)
            .field("cache_entries", &self.cache_entries)
            .field("cache_ttl", &self.cache_ttl)
            .field("cache_persist", &self.cache_persist)
            .field("providers", &self.providers)
            .field("models", &self.models)
            .field("preload", &self.preload)
            .field("unload_after", &self.unload_after)
            .field("max_shared_models", &self.max_shared_models)
            .field("memory_budget_bytes", &self.memory_budget_bytes)
            .field("log_model_usage", &self.log_model_usage)
            .field("memory_monitoring", &self.memory_monitoring)
            .finish_non_exhaustive()
    }
}

/// A process that is started with the broker and started anew when it ends; it finds the broker's socket in
/// `MODELBROKER_SOCKET` and is to provide the model named here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderCommand {
    /// The model, `custom/...`.
    pub model_id: String,
    /// The program.
    pub program: OsString,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// Every bound of the broker, with the code that a client sees at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at once. Beyond: `TOO_MANY`, connection closed.
    pub max_sessions: usize,
    /// Leases of one session, waiting requests counted. Beyond: `TOO_MANY`.
    pub max_leases_per_session: usize,
    /// Lanes in all, those an engine has not let go of counted. Beyond: `TOO_MANY`.
    pub max_lanes: usize,
    /// Lanes of one session. Beyond: `TOO_MANY`.
    pub max_lanes_per_session: usize,
    /// Jobs of one session in flight on the socket. Beyond: `OVERLOADED`.
    pub max_session_jobs: usize,
    /// Payload bytes of one session in flight on the socket. Beyond: `OVERLOADED`.
    pub max_session_job_bytes: usize,
    /// Jobs of all sessions in flight on the socket. Beyond: `OVERLOADED`.
    pub max_jobs: usize,
    /// Payload bytes of all sessions in flight on the socket. Beyond: `OVERLOADED`.
    pub max_job_bytes: usize,
    /// Bytes queued for a client that does not read them. Beyond, nothing more is read from it, and it is dropped when
    /// it takes nothing for [`Limits::outgoing_stall`].
    pub outgoing_queue_bytes: usize,
    /// How long a client over [`Limits::outgoing_queue_bytes`] may take nothing. Beyond: dropped.
    pub outgoing_stall: Duration,
    /// How long a begun frame may stay incomplete. Beyond: `BAD_FRAME`, connection closed.
    pub half_frame_timeout: Duration,
    /// How long a connection may stay without `Hello`. Beyond: `BAD_STATE`, connection closed.
    pub hello_timeout: Duration,
    /// How long a refused connection may take to read why.
    pub close_linger: Duration,
    /// Frames of one client that are handled before the next client's turn.
    pub frames_per_turn: usize,
    /// Models known at once, loaded or failed. Beyond: `TOO_MANY`.
    pub max_models: usize,
    /// Names (ids, aliases, folders) known at once. Beyond: `TOO_MANY`.
    pub max_model_names: usize,
    /// Loaders at work at once; further loads wait in line.
    pub max_loads_at_once: usize,
    /// How long one load may take, downloads counted. Beyond: the loader is killed, `MODEL_LOAD_ERROR`.
    pub load_timeout: Duration,
    /// Shortest time between two looks at the system's memory while something is loaded.
    pub memory_check_interval: Duration,
    /// Memory in bytes that a load leaves to others. Beyond: idle models are let go of, then `OUT_OF_MEMORY`.
    pub memory_reserve_bytes: u64,
    /// Address space of a loader, in bytes. Beyond: its allocations fail, `MODEL_LOAD_ERROR`.
    pub loader_address_space_bytes: u64,
    /// Processor time of a loader, in seconds. Beyond: killed by SIGXCPU, `MODEL_LOAD_ERROR`.
    pub loader_cpu_seconds: u64,
    /// Wait before a model is tried again after its second failure in a row; doubles with each further one. The first
    /// failure costs no wait.
    pub load_retry_base: Duration,
    /// Longest wait before a failed model is tried again.
    pub load_retry_cap: Duration,
    /// Shortest time between two progress frames of one stage of a load.
    pub progress_interval: Duration,
    /// Deaths of an engine in a row, without any work done in between, after which restarts are delayed. More than
    /// [`shm_layout::limits::MAX_JOB_ATTEMPTS`], so that a job that kills engines is found without any delay.
    pub engine_free_restarts: u32,
    /// First delay of an engine's restart; doubles with each further death.
    pub engine_backoff_base: Duration,
    /// Longest delay of an engine's restart.
    pub engine_backoff_cap: Duration,
    /// An engine that was up for so long counts as one that worked (jobs in lanes are not seen by the broker).
    pub engine_healthy_after: Duration,
    /// How long an engine may take to report itself. Beyond: killed and replaced.
    pub engine_start_timeout: Duration,
    /// Starts in a row that failed, after which those who wait get `MODEL_UNAVAILABLE`.
    pub engine_failed_starts: u32,
    /// How long a status report waits for the engine's counters before it goes out with the last known ones.
    pub status_wait: Duration,
    /// How long accepted work may take to finish after SIGTERM. Beyond: `SHUTTING_DOWN`.
    pub drain_timeout: Duration,
    /// How long the last answers may take to reach their clients when the broker leaves.
    pub exit_flush: Duration,
    /// Processes that the broker keeps running to provide models. Beyond: it does not start.
    pub max_provider_processes: usize,
    /// Provided models known at once. Beyond: `TOO_MANY`.
    pub max_provided: usize,
    /// Offers of all sessions at once. Beyond: `TOO_MANY`.
    pub max_providers: usize,
    /// Models that one session offers. Beyond: `TOO_MANY`.
    pub max_provides_per_session: usize,
    /// Things that a provider may do wrong before it is dropped.
    pub provider_faults: u32,
    /// How long a process that was dropped as a faulty provider may not provide anything. Before: `PROVIDER_FAILED`.
    pub provider_ban: Duration,
    /// How long jobs, and requests for leases, wait for a model that nobody provides just now. Beyond: `MODEL_UNAVAILABLE`, or
    /// `MODEL_NOT_FOUND` where nobody ever has.
    pub provider_return: Duration,
    /// A provider's process that was up for so long, or answered anything, is started anew at once when it ends.
    pub provider_healthy_after: Duration,
    /// First delay of the restart of a provider's process that ended early; doubles with each further one.
    pub provider_backoff_base: Duration,
    /// Longest delay of the restart of a provider's process.
    pub provider_backoff_cap: Duration,
}

const MIB: usize = 1 << 20;

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_sessions: 1024,
            max_leases_per_session: 64,
            max_lanes: 1024,
            max_lanes_per_session: 64,
            max_session_jobs: 64,
            max_session_job_bytes: 16 * MIB,
            max_jobs: 1024,
            max_job_bytes: 128 * MIB,
            outgoing_queue_bytes: 4 * MIB,
            outgoing_stall: Duration::from_secs(5),
            half_frame_timeout: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            close_linger: Duration::from_secs(1),
            frames_per_turn: 64,
            max_models: 64,
            max_model_names: 1024,
            max_loads_at_once: 2,
            load_timeout: Duration::from_secs(30 * 60),
            memory_check_interval: Duration::from_millis(100),
            memory_reserve_bytes: 64 << 20,
            loader_address_space_bytes: 64 << 30,
            loader_cpu_seconds: 20 * 60,
            load_retry_base: Duration::from_millis(250),
            load_retry_cap: Duration::from_secs(10),
            progress_interval: Duration::from_millis(50),
            engine_free_restarts: 10,
            engine_backoff_base: Duration::from_millis(10),
            engine_backoff_cap: Duration::from_secs(1),
            engine_healthy_after: Duration::from_millis(100),
            engine_start_timeout: Duration::from_secs(30),
            engine_failed_starts: 3,
            status_wait: Duration::from_millis(100),
            drain_timeout: Duration::from_secs(30),
            exit_flush: Duration::from_secs(1),
            max_provider_processes: 32,
            max_provided: 64,
            max_providers: 128,
            max_provides_per_session: 8,
            provider_faults: 3,
            provider_ban: Duration::from_secs(30),
            provider_return: Duration::from_secs(15),
            provider_healthy_after: Duration::from_secs(1),
            provider_backoff_base: Duration::from_millis(100),
            provider_backoff_cap: Duration::from_secs(10),
        }
    }
}

const _: () =
    assert!(10 > shm_layout::limits::MAX_JOB_ATTEMPTS, "engine_free_restarts must outlast a job's attempts");

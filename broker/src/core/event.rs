//! What happens to the broker and what it does about it, as data: the only language between the decisions in `core` and
//! the I/O around them.

use crate::reloaded::Reloaded;
use shm_layout::code::Code;
use shm_layout::wire::{
    BackingKind, BrokerMessage, CacheDescription, CacheInsertKey, ClientMessage, FromEngine, LoadProgress,
    TaskFacts, ToEngine,
};
use std::ffi::OsString;
use std::time::Duration;

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChildExit {
    /// It left with this status.
    Status(i32),
    /// A signal ended it.
    Signal(i32),
}

impl std::fmt::Display for ChildExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ChildExit::Status(status) => write!(f, "exited with status {status}"),
            ChildExit::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "was killed by {name}"),
                None => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL (out of memory, or by hand)",
        11 => "SIGSEGV",
        15 => "SIGTERM",
        24 => "SIGXCPU (over its limit of processor time)",
        25 => "SIGXFSZ (over its limit of file size)",
        31 => "SIGSYS",
        _ => return None,
    })
}

/// What the broker knows of an image once it has checked it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ImageFacts {
    /// Canonical id of the model.
    pub(crate) model_id: String,
    /// Numbers in a vector.
    pub(crate) output_dim: u32,
    /// Longest input in tokens.
    pub(crate) max_seq_tokens: u32,
    /// Size of the image.
    pub(crate) image_bytes: u64,
    /// Names weights, tokenizer, pooling and precision.
    pub(crate) fingerprint: u64,
    /// Content hash of the image.
    pub(crate) content_hash: [u8; 32],
    /// What it lies in.
    pub(crate) backing: BackingKind,
    /// What the model is for.
    pub(crate) facts: TaskFacts,
    /// Precision of its matrices, as it stands in names.
    pub(crate) precision: &'static str,
}

/// One thing that happened. Ids are the broker's own; an event about something that is gone is ignored.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    /// A connection was accepted.
    Connected { session: u64, pid: u32, uid: u32 },
    /// A client's frame was decoded.
    Client { session: u64, request_id: u64, message: ClientMessage },
    /// A client broke the rules of the connection (bytes that are no frame, descriptors, a half frame for too long).
    ClientFault { session: u64, code: Code, message: String },
    /// A client's socket hung up, its process ended, or it was given up.
    ClientGone { session: u64 },
    /// A generation's cache exists now; `None`: it could not be made, and the generation is served without.
    CacheMade { generation: u64, cache: Option<CacheDescription> },
    /// A lane's region and doorbell exist now, or could not be made.
    LaneMade { lane_id: u64, outcome: Result<(), String> },
    /// A loader could not be started.
    LoaderNotStarted { load_id: u64, message: String },
    /// A loader reports how far it is.
    LoaderProgress { load_id: u64, progress: LoadProgress },
    /// A loader handed over an image; it was checked. The image is held under the load's id.
    LoaderImage { load_id: u64, facts: ImageFacts },
    /// A loader gave up, handed over something that is no image, or spoke nonsense.
    LoaderFailed { load_id: u64, code: Code, message: String },
    /// A loader's process ended and was reaped; nothing more comes from it.
    LoaderExited { load_id: u64, exit: ChildExit },
    /// The engine's process exists.
    EngineStarted { incarnation: u64, pid: u32 },
    /// The engine's process could not be made.
    EngineNotStarted { incarnation: u64, message: String },
    /// The engine says something.
    Engine { incarnation: u64, message: FromEngine },
    /// The engine lives but cannot be spoken to any more, for the reason given.
    EngineLinkLost { incarnation: u64, reason: String },
    /// The engine's process ended and was reaped: it writes into no lane any more.
    EngineExited { incarnation: u64, exit: ChildExit },
    /// A provider's process exists; `child` is its place in the configuration.
    ProviderStarted { child: usize, pid: u32 },
    /// A provider's process could not be made.
    ProviderNotStarted { child: usize, message: String },
    /// A provider's process ended and was reaped.
    ProviderExited { child: usize, exit: ChildExit },
    /// What memory the system and the control group have left, as far as it can be read, and how much the vectors of each
    /// generation's cache take.
    Memory { available_bytes: Option<u64>, caches: Vec<(u64, u64)> },
    /// SIGTERM or SIGINT arrived.
    StopSignal,
    /// SIGHUP arrived.
    ReloadSignal,
    /// The configuration was read again, or cannot be used, for the reason given.
    ConfigurationRead(Box<Result<Reloaded, String>>),
    /// Nothing but time has passed.
    Tick,
}

/// A descriptor that goes with a frame, by the name of what it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// A lane's region, then its doorbell.
    Lane(u64),
    /// The image of a generation.
    Image(u64),
    /// The cache region of a generation.
    Cache(u64),
}

/// One thing to do. The order in which they are given is the order in which they are done.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// Queue a frame for a client.
    Send { session: u64, request_id: u64, message: BrokerMessage, attachments: Vec<Attachment> },
    /// End a connection once what is queued is written; no event about it follows.
    Close { session: u64 },
    /// Make a lane's region and doorbell; answered by [`Event::LaneMade`].
    MakeLane { lane_id: u64 },
    /// Close the broker's descriptors of a lane.
    CloseLane { lane_id: u64 },
    /// Start a loader.
    StartLoader { load_id: u64, model: String },
    /// Kill a loader and forget it; no event about it follows.
    KillLoader { load_id: u64 },
    /// The image that a load handed over is this generation's from now on.
    KeepImage { load_id: u64, generation: u64 },
    /// The image that a load handed over is not needed.
    DiscardImage { load_id: u64 },
    /// Close the image of a generation, and its cache.
    CloseImage { generation: u64 },
    /// Make the cache of a generation; answered by [`Event::CacheMade`].
    MakeCache { generation: u64, dim: u32, fingerprint: u64 },
    /// Tell the readers of a generation's cache that another one has taken its place.
    SupersedeCache { generation: u64, by: u64 },
    /// Keep vectors in the cache of a generation, as far as they are vectors of it.
    FillCache { generation: u64, bulk: bool, keys: Vec<CacheInsertKey>, values: Vec<u8> },
    /// Start an engine; answered by [`Event::EngineStarted`] or [`Event::EngineNotStarted`].
    StartEngine { incarnation: u64 },
    /// Kill the engine; answered by [`Event::EngineExited`] once it is reaped.
    KillEngine { incarnation: u64 },
    /// Queue a frame for the engine.
    ToEngine { message: ToEngine, attachments: Vec<Attachment> },
    /// Start a provider's process, by its place in the configuration; answered by [`Event::ProviderStarted`] or
    /// [`Event::ProviderNotStarted`].
    StartProvider { child: usize },
    /// Kill a provider's process; answered by [`Event::ProviderExited`] once it is reaped.
    KillProvider { child: usize },
    /// Read the configuration again; answered by [`Event::ConfigurationRead`].
    ReadConfiguration,
    /// From now on load and make caches so.
    Reconfigure { loader_command: Vec<OsString>, cache_entries: usize, cache_ttl: Duration },
    /// Look how much memory is left; answered by [`Event::Memory`].
    LookAtMemory,
    /// Write out what is queued, then leave.
    Exit,
}

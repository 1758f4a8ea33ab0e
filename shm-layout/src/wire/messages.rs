//! The messages: client and broker, broker and engine, broker and loader. Plain data; meaning is given where each is
//! handled, bounds are in [`crate::limits`]. The order of variants and fields is the encoding: append, never reorder.

use super::backing_kind::BackingKind;
use super::cache_messages::{CacheDescription, CacheInsertKey, CacheTotals};
use super::config_messages::ConfigurationReloaded;
use super::model_messages::{EngineMetrics, ModelCommand, ModelOutcome, Superseded};
use super::provider_messages::{Provide, ProviderJob};
use super::status_messages::{EngineTotals, StatusReport};
use super::task_messages::{Partial, TaskFacts};
use crate::code::Code;
use bincode::{Decode, Encode};

/// What a job asks for. The numbers stand in lane cells and in job frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[repr(u16)]
pub enum Operation {
    /// Texts to vectors; the answer is an embeddings payload.
    Embed = 1,
    /// Texts to the byte offsets of their tokens; the answer is a token-spans payload.
    Tokenize = 2,
    /// As `Embed`, but computed whatever the cache holds, and not kept in it.
    EmbedFresh = 3,
    /// Bytes to bytes, as a provided model understands them; no model of an engine does.
    Call = 4,
    /// The first text with each of the others to scores; the answer is an embeddings payload with one row for each of the
    /// others.
    Rank = 5,
    /// Texts to scores; the answer is an embeddings payload with one row for each text.
    Classify = 6,
    /// A [`super::GenerateRequest`] to a [`super::GenerateAnswer`]; as a frame only.
    Generate = 7,
}

impl Operation {
    /// The operation of a number that a peer wrote.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Operation> {
        match number {
            1 => Some(Operation::Embed),
            2 => Some(Operation::Tokenize),
            3 => Some(Operation::EmbedFresh),
            4 => Some(Operation::Call),
            5 => Some(Operation::Rank),
            6 => Some(Operation::Classify),
            7 => Some(Operation::Generate),
            _ => None,
        }
    }
}

/// Who waits: a person, or a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Encode, Decode)]
#[repr(u16)]
pub enum Priority {
    /// Somebody waits for the answer; goes before bulk.
    #[default]
    Interactive = 0,
    /// Throughput matters, not the single answer.
    Bulk = 1,
}

impl Priority {
    /// The priority of a number that a peer wrote.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Priority> {
        match number {
            0 => Some(Priority::Interactive),
            1 => Some(Priority::Bulk),
            _ => None,
        }
    }
}

/// First message of a session.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// [`super::PROTOCOL_MAJOR`] of the client.
    pub protocol_major: u16,
    /// [`super::PROTOCOL_MINOR`] of the client.
    pub protocol_minor: u16,
    /// [`crate::lane::LAYOUT_HASH`] of the client; 0 = it will use no shared memory.
    pub layout_hash: u64,
    /// What the client calls itself, for status pages; at most [`crate::limits::MAX_CLIENT_NAME_BYTES`].
    pub client_name: String,
}

/// Asks for a lease on a model; loads the model when nobody has yet.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Acquire {
    /// Model id, alias or folder; empty = the broker's default model.
    pub model: String,
    /// Give a lane to the engine that serves the model (descriptors: region, doorbell).
    pub want_lane: bool,
    /// Give the image itself (descriptor: image), for computing in the client's own process.
    pub want_image: bool,
    /// Longest wait for a load, in ms.
    pub wait_ms: u32,
}

/// One job as a frame; the same job as in a lane.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct JobFrame {
    /// The session's lease on the model that is meant.
    pub lease_id: u64,
    /// Chosen by the client, unique in its session; the answer repeats it.
    pub job_id: u64,
    /// What is asked.
    pub operation: Operation,
    /// How it is ranked.
    pub priority: Priority,
    /// `CLOCK_MONOTONIC` in ns after which nobody wants the answer; 0 = none.
    pub deadline_ns: u64,
    /// The operation's payload, as [`crate::payload`] lays it out.
    pub payload: Vec<u8>,
}

/// The answer to a [`JobFrame`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AnswerFrame {
    /// The job's id.
    pub job_id: u64,
    /// [`Code::Ok`] or why not.
    pub status: Code,
    /// The operation's payload when `status` is Ok, else a message in UTF-8.
    pub payload: Vec<u8>,
    /// Time in the engine's queue, in µs.
    pub queue_us: u32,
    /// Time computing, in µs.
    pub execution_us: u32,
}

/// From a client to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ClientMessage {
    /// Opens the session.
    Hello(Hello),
    /// Asks for a lease.
    Acquire(Acquire),
    /// Gives a lease back, with its lane.
    Release {
        /// The lease.
        lease_id: u64,
    },
    /// Sends a job without shared memory.
    Submit(JobFrame),
    /// Nobody wants the answer of this job any more; it is still answered once.
    Cancel {
        /// The job.
        job_id: u64,
    },
    /// Asks for a [`StatusReport`].
    Status,
    /// Asks the broker to leave.
    Shutdown {
        /// Finish the jobs that were accepted, for at most so long, in ms; 0 = at once.
        drain_ms: u32,
    },
    /// Answered by [`BrokerMessage::Pong`].
    Ping,
    /// Offers to compute a model; answered by [`BrokerMessage::Provided`].
    Provide(Provide),
    /// The answer of a [`BrokerMessage::ProviderJob`]; its `job_id` is the relay id, its times are not looked at.
    ProviderAnswer(AnswerFrame),
    /// Takes no further jobs of a model that this session provides; those it has are still answered. Answered by
    /// [`BrokerMessage::Withdrawn`].
    Withdraw {
        /// The model.
        model_id: String,
    },
    /// Wants something done with a model.
    Model(ModelCommand),
    /// Asks the broker to read its configuration again.
    ReloadConfiguration,
}

/// From the broker to a client.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub enum BrokerMessage {
    /// The session is open.
    Welcome(Welcome),
    /// The request with this frame's id is refused or failed.
    Refused(Refusal),
    /// A lease. Descriptors, in this order: lane region and doorbell if a lane was asked for, image if it was asked for,
    /// cache region if there is one.
    Leased(Leased),
    /// The lease is given back.
    Released,
    /// How far a load is that the client waits for; carries the id of its `Acquire`.
    Progress(LoadProgress),
    /// A job's answer.
    Answer(AnswerFrame),
    /// The state of everything.
    Status(StatusReport),
    /// The broker leaves; no new work is taken.
    ShuttingDown,
    /// Answer to a ping.
    Pong,
    /// The session provides the model from now on.
    Provided {
        /// Under which jobs name it.
        generation: u64,
    },
    /// A job for this provider.
    ProviderJob(ProviderJob),
    /// Nobody wants the answer of this job any more; it is still to be answered once.
    ProviderCancel {
        /// The job.
        relay_id: u64,
    },
    /// No further jobs of the model come to this session.
    Withdrawn,
    /// A piece of a text that is being generated.
    Partial(Partial),
    /// What became of a [`ClientMessage::Model`].
    Model(ModelOutcome),
    /// Unasked: the generation of one of the session's leases was replaced.
    Superseded(Superseded),
    /// The configuration was read again. One that cannot be used is refused with `CONFIG_INVALID` and changes nothing.
    ConfigurationReloaded(ConfigurationReloaded),
}

/// Answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The broker's protocol version.
    pub protocol_major: u16,
    /// The broker's minor version.
    pub protocol_minor: u16,
    /// The session, unique in this broker's life.
    pub session_id: u64,
    /// This broker's incarnation: random, another after each start.
    pub boot_id: u64,
    /// The broker's process.
    pub broker_pid: u32,
    /// The broker's version, `x.y.z`.
    pub version: String,
}

/// A request that was not granted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Refusal {
    /// Why, as a code.
    pub code: Code,
    /// Why, and what to do about it.
    pub message: String,
    /// When a new attempt makes sense, in ms; 0 = not by itself.
    pub retry_after_ms: u32,
}

/// What a model is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ModelDescription {
    /// Canonical id.
    pub model_id: String,
    /// Incarnation of this model in this broker; another load is another generation.
    pub generation: u64,
    /// Numbers in a vector.
    pub output_dim: u32,
    /// Longest input in tokens, special tokens counted; longer texts are truncated.
    pub max_seq_tokens: u32,
    /// Size of the image.
    pub image_bytes: u64,
    /// Names weights, tokenizer, pooling and precision.
    pub fingerprint: u64,
    /// Content hash of the image (BLAKE3).
    pub content_hash: [u8; 32],
    /// What the image lies in: `memfd`, `file` or `posix-shm`.
    pub backing: BackingKind,
    /// What it is for.
    pub facts: TaskFacts,
}

/// A granted lease.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Leased {
    /// The lease, unique in this broker's life.
    pub lease_id: u64,
    /// The model.
    pub model: ModelDescription,
    /// The lane's id and size when one was asked for.
    pub lane: Option<LaneDescription>,
    /// Whether the image's descriptor is attached.
    pub image: bool,
    /// The generation's cache, if it has one.
    pub cache: Option<CacheDescription>,
}

/// A lane as its client is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct LaneDescription {
    /// The lane, unique in this broker's life.
    pub lane_id: u64,
    /// Size of the region in bytes.
    pub region_bytes: u64,
}

/// How far a load is.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct LoadProgress {
    /// What is going on: `download`, `compile`, `load`, `verify`.
    pub stage: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 = unknown.
    pub total_bytes: u64,
}

/// From the broker to an engine.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ToEngine {
    /// Serve this image. Descriptors: the image, read-only; the cache region, read-only, if there is one.
    LoadModel {
        /// Generation under which jobs name it.
        generation: u64,
        /// Size of the image.
        image_bytes: u64,
        /// What it lies in.
        backing: BackingKind,
        /// The generation's cache, if it has one.
        cache: Option<CacheDescription>,
    },
    /// Let go of this model; answered by [`FromEngine::ModelUnloaded`].
    UnloadModel {
        /// Its generation.
        generation: u64,
    },
    /// Serve this lane, taking over what is in it. Descriptors: region, doorbell.
    AddLane {
        /// The lane.
        lane_id: u64,
        /// The model its jobs are for.
        generation: u64,
    },
    /// The client is gone: drop what is queued, let go of the region; answered by [`FromEngine::LaneDropped`].
    DropLane {
        /// The lane.
        lane_id: u64,
    },
    /// A job that came over the socket.
    Job {
        /// Names the job between broker and engine.
        relay_id: u64,
        /// The session it came from, for fairness.
        session_id: u64,
        /// The model it is for.
        generation: u64,
        /// Times it was running when an engine died.
        attempts: u32,
        /// The job; its `lease_id` and `job_id` mean nothing here.
        job: JobFrame,
    },
    /// Nobody wants the answer of this job any more.
    CancelJob {
        /// The job.
        relay_id: u64,
    },
    /// Answer what was accepted, take nothing new, then exit with status 0.
    Drain,
    /// Asks for [`FromEngine::Totals`].
    Totals,
    /// Compute something known; answered by [`FromEngine::Probed`].
    Probe {
        /// The model.
        generation: u64,
    },
}

/// From an engine to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FromEngine {
    /// The process is up.
    Ready {
        /// Compute threads.
        threads: u32,
    },
    /// The model is served.
    ModelReady {
        /// Its generation.
        generation: u64,
    },
    /// The model cannot be served by this engine.
    ModelFailed {
        /// Its generation.
        generation: u64,
        /// Why, as a code.
        code: Code,
        /// Why, in words.
        message: String,
    },
    /// No page of this generation is mapped here any more.
    ModelUnloaded {
        /// Its generation.
        generation: u64,
    },
    /// The client broke the lane's protocol; the lane is no longer served.
    LaneFault {
        /// The lane.
        lane_id: u64,
        /// What it did.
        message: String,
    },
    /// The region of this lane is no longer mapped here.
    LaneDropped {
        /// The lane.
        lane_id: u64,
    },
    /// The job begins to be computed; if the engine dies now, the job may be why.
    JobStarted {
        /// The job.
        relay_id: u64,
    },
    /// The answer of a job that came over the socket; its `job_id` is the relay id.
    Answer(AnswerFrame),
    /// Counters.
    Totals(EngineTotals),
    /// Vectors that were computed, for the generation's cache.
    CacheInsert {
        /// The generation.
        generation: u64,
        /// Whether bulk work asked for them: then they displace no living entry.
        bulk: bool,
        /// One for each vector.
        keys: Vec<CacheInsertKey>,
        /// The numbers, f32 little-endian, vector after vector.
        values: Vec<u8>,
    },
    /// Counters of a generation's cache; sent before `Totals`.
    CacheTotals {
        /// The generation.
        generation: u64,
        /// The counters.
        totals: CacheTotals,
    },
    /// A piece of the text of a job that came over the socket; its `job_id` is the relay id.
    Partial(Partial),
    /// A probe's end.
    Probed {
        /// The model.
        generation: u64,
        /// [`Code::Ok`] when it computed what it should, else why not.
        code: Code,
        /// Why not, in words.
        message: String,
        /// Time that it computed, in µs.
        probe_us: u64,
    },
    /// What was measured; sent before `Totals`.
    Metrics(EngineMetrics),
}

/// From a loader to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FromLoader {
    /// How far it is.
    Progress(LoadProgress),
    /// Done. Descriptor: the image, read-only; the loader holds no writable mapping of it any more.
    Loaded {
        /// Canonical id.
        model_id: String,
        /// Size of the image.
        image_bytes: u64,
        /// What it lies in.
        backing: BackingKind,
        /// What the model is for.
        facts: TaskFacts,
    },
    /// It could not be done.
    Failed {
        /// Why, as a code.
        code: Code,
        /// Why, and what to do about it.
        message: String,
    },
}

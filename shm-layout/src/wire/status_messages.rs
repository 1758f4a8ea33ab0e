//! The report on everything, as it is sent. What it says of a model's life and what was measured lies in `model_messages`. Plain
//! data; the order of variants and fields is the encoding: append, never reorder.

use super::cache_messages::CacheReport;
use super::messages::ModelDescription;
use super::model_messages::{Alert, Metrics, ModelDetail};
use super::provider_messages::ProvidedReport;
use super::{Decode, Encode};

/// State of one model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum ModelState {
    /// A loader is at work.
    Loading,
    /// Served.
    Ready,
    /// The last load failed; the next request tries again.
    Failed,
    /// Not loaded; the next request loads it.
    Unloaded,
}

/// One model in a [`StatusReport`].
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct ModelReport {
    /// Canonical id.
    pub model_id: String,
    /// State.
    pub state: ModelState,
    /// Its description once it has been loaded.
    pub description: Option<ModelDescription>,
    /// Duration of the load in µs, from request to ready.
    pub load_us: u64,
    /// Leases held now.
    pub leases: u32,
    /// Processes that hold them.
    pub lease_pids: Vec<u32>,
    /// Times it was loaded in this broker's life.
    pub loads: u32,
    /// Time since the last lease was granted or released, in µs.
    pub idle_us: u64,
    /// Why the last load failed.
    pub error: Option<String>,
    /// State of its vector cache, where it has one.
    pub cache: Option<CacheReport>,
    /// Everything else.
    pub detail: ModelDetail,
}

/// One engine in a [`StatusReport`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct EngineReport {
    /// Process; 0 while it is being replaced.
    pub pid: u32,
    /// Incarnation: 1 for the first.
    pub incarnation: u64,
    /// Times it was replaced.
    pub restarts: u64,
    /// Lanes it serves.
    pub lanes: u32,
    /// Compute threads.
    pub threads: u32,
    /// Totals of this incarnation.
    pub totals: EngineTotals,
}

/// Counters of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct EngineTotals {
    /// Jobs answered.
    pub jobs: u64,
    /// Texts computed.
    pub texts: u64,
    /// Tokens computed, special tokens counted.
    pub tokens: u64,
    /// Jobs answered with an error.
    pub errors: u64,
    /// Jobs waiting now.
    pub queued_jobs: u32,
}

/// One session in a [`StatusReport`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SessionReport {
    /// The session.
    pub session_id: u64,
    /// Its process.
    pub pid: u32,
    /// What it calls itself.
    pub client_name: String,
    /// Leases it holds.
    pub leases: u32,
    /// Lanes it has.
    pub lanes: u32,
    /// Jobs in flight on the socket.
    pub socket_jobs: u32,
    /// Time since it connected, in µs.
    pub age_us: u64,
}

/// The state of everything.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct StatusReport {
    /// The broker's version.
    pub version: String,
    /// Its process.
    pub broker_pid: u32,
    /// Its incarnation.
    pub boot_id: u64,
    /// Time since it started, in µs.
    pub uptime_us: u64,
    /// Model given to clients that name none.
    pub default_model: String,
    /// Models.
    pub models: Vec<ModelReport>,
    /// Engines.
    pub engines: Vec<EngineReport>,
    /// Sessions, the asking one included.
    pub sessions: Vec<SessionReport>,
    /// Sessions ended by a fault of their client, in this broker's life.
    pub faults: u64,
    /// Open descriptors of the broker, for leak checks.
    pub open_descriptors: u32,
    /// Models that clients' processes provide.
    pub provided: Vec<ProvidedReport>,
    /// What was measured.
    pub metrics: Box<Metrics>,
    /// What has got worse.
    pub alerts: Vec<Alert>,
}

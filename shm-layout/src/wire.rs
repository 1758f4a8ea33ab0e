//! Frames on the control socket and on the links between the broker and its children: the head of a frame, the one
//! codec for bodies, and the messages. No sockets: whoever moves the bytes lives in `shm-os` and above.
//!
//! A frame is a head of [`HEAD_BYTES`] bytes and a body. Descriptors that belong to a frame travel with its first byte.

mod backing_kind;
mod cache_messages;
mod codec;
mod config_messages;
mod head;
mod messages;
mod model_messages;
mod provider_messages;
mod status_messages;
mod task_messages;

pub use bincode::{Decode, Encode};

pub use backing_kind::{BackingKind, UnknownBacking};
pub use cache_messages::{CacheDescription, CacheInsertKey, CacheReport, CacheTotals};
pub use codec::{CodecError, FrameBuffer, decode_body, encode_body, encode_frame};
pub use config_messages::ConfigurationReloaded;
pub use head::{FrameHead, HEAD_BYTES, HEAD_FIELDS, HeadError, MAGIC, PROTOCOL_MAJOR, PROTOCOL_MINOR};
pub use messages::*;
pub use model_messages::*;
pub use provider_messages::{
    PROVIDED_GENERATION, PROVIDED_PREFIX, Provide, ProvidedReport, ProvidedTotals, ProviderChildReport,
    ProviderJob, ProviderReport, is_provided,
};
pub use status_messages::{EngineReport, EngineTotals, ModelReport, ModelState, SessionReport, StatusReport};
pub use task_messages::*;

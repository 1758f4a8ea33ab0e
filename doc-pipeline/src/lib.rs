//! Documents to chunks to a searchable SQLite store. Home of the crate's map and re-exports; no logic.
//!
//! ```text
//! walk ─► read ─► decode ─► parse::{markdown,text,html,csv} ─► document
//!                                                                 │
//!  store ◄─ pipeline ◄─ embed (TextModel) ◄─ chunk ◄──────────────┘
//!    └─► search (BM25 + cosine, reciprocal rank fusion)
//!  supervise: one subprocess per document, `wire` is what it prints
//! ```
//!
//! Invariants: a document's text, vectors and full-text rows are written in one transaction; no chunk that is
//! embedded is longer than the model takes; a table is never mixed with other text in a chunk. Absences: no
//! tokenizer, no model and no network in this crate: all of that is behind [`TextModel`].
#![forbid(unsafe_code)]

pub mod chunk;
pub mod decode;
pub mod document;
pub mod limits;
pub mod model;
pub mod parse;
pub mod pipeline;
pub mod read;
mod schema;
pub mod sdk_model;
pub mod search;
pub mod store;
pub mod supervise;
pub mod walk;
pub mod wire;

pub use chunk::{Chunk, ChunkKind, ChunkOptions};
pub use document::{Block, BlockKind, Document, Format, Source, Table, TableRow};
pub use model::{FailureKind, ModelFailure, TextModel};
pub use pipeline::{IndexOptions, IndexOutcome, PipelineError, index_document, search_store};
pub use search::{Hit, SearchOptions};
pub use store::{ModelIdentity, Store, StoreError};

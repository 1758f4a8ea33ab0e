//! One document from its file into the store, and one query from its text to results. Starts no process.

use std::path::{Path, PathBuf};

use crate::chunk::{CHUNKER_VERSION, Chunk, ChunkError, ChunkOptions, batches, chunk_document};
use crate::decode::{DecodeError, decode};
use crate::document::Format;
use crate::limits::{EMBED_BATCH_BYTES, EMBED_BATCH_TEXTS, REREAD_ATTEMPTS_MAX};
use crate::model::{ModelFailure, TextModel, check_vector};
use crate::parse::{ParseError, parse};
use crate::read::{Content, ReadError, canonical, read};
use crate::search::{Hit, SearchError, SearchOptions, check_query};
use crate::store::{Hash, ModelIdentity, NewDocument, Store, StoreError, Stored};
use crate::wire::FailureCode;

/// Changes when the same file would give another document.
const PARSER_VERSION: u32 = 1;

/// How documents are indexed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexOptions {
    /// How they are cut.
    pub chunk: ChunkOptions,
}

impl IndexOptions {
    /// Hash of all that decides what is stored for a file, but for the file: options, model, this crate's parsers.
    pub fn hash(&self, model: &dyn TextModel) -> Hash {
        let described = format!(
            "parser {PARSER_VERSION} chunker {CHUNKER_VERSION} target {} overlap {} max {} special {} model {}",
            self.chunk.target_tokens,
            self.chunk.overlap_tokens,
            model.max_tokens(),
            model.special_tokens(),
            model.fingerprint(),
        );
        *blake3::hash(described.as_bytes()).as_bytes()
    }
}

/// What indexing a document did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexOutcome {
    /// The store has this content with these options already: nothing was computed.
    Unchanged {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// New in the store.
    Indexed {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
    },
    /// It took the place of an older version.
    Replaced {
        /// Its chunks.
        chunks: u64,
        /// Their tokens.
        tokens: u64,
        /// Chunks of the older version.
        previous_chunks: u64,
    },
}

/// Why a document was not indexed. What the store had of it is untouched.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The file can't be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The extension is not known.
    #[error("{}: unknown document format; known extensions are {}", path.display(), Format::EXTENSIONS.join(", "))]
    UnknownFormat {
        /// The document.
        path: PathBuf,
    },
    /// The bytes are not text.
    #[error("{}: {source}", path.display())]
    Decode {
        /// The document.
        path: PathBuf,
        /// Where and why.
        source: DecodeError,
    },
    /// The text can't be parsed.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The document.
        path: PathBuf,
        /// Where and why.
        source: ParseError,
    },
    /// The document can't be cut.
    #[error("{}: {source}", path.display())]
    Chunk {
        /// The document.
        path: PathBuf,
        /// Why.
        source: ChunkError,
    },
    /// The model failed.
    #[error("{}: the model failed: {source}", path.display())]
    Model {
        /// The document.
        path: PathBuf,
        /// Why.
        source: ModelFailure,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file changed each time before it was stored.
    #[error("{} changed {REREAD_ATTEMPTS_MAX} times while it was indexed: index it when its writer is done", path.display())]
    KeepsChanging {
        /// The document.
        path: PathBuf,
    },
}

impl PipelineError {
    /// The code for reports.
    pub fn code(&self) -> FailureCode {
        match self {
            Self::Read(_) | Self::KeepsChanging { .. } => FailureCode::Read,
            Self::UnknownFormat { .. } => FailureCode::UnknownFormat,
            Self::Decode { .. } => FailureCode::Decode,
            Self::Parse { .. } => FailureCode::Parse,
            Self::Chunk { source: ChunkError::Model(_), .. } | Self::Model { .. } => FailureCode::Model,
            Self::Chunk { .. } => FailureCode::Chunk,
            Self::Store(_) => FailureCode::Store,
        }
    }
}

/// Indexes one document: read, skip when unchanged, parse, cut, embed, store in one transaction.
///
/// The store's model is checked before anything is computed.
pub fn index_document(
    path: &Path,
    store: &mut Store,
    model: &dyn TextModel,
    options: &IndexOptions,
) -> Result<IndexOutcome, PipelineError> {
    let format =
        Format::of_path(path).ok_or_else(|| PipelineError::UnknownFormat { path: path.to_owned() })?;
    store.require_model(&ModelIdentity::of(model))?;
    let options_hash = options.hash(model);
    let (full, key) = canonical(path)?;
    for _ in 0..REREAD_ATTEMPTS_MAX {
        let content = read(&full)?;
        let content_hash = *blake3::hash(&content.bytes).as_bytes();
        if let Some(known) = store.document(&key)?
            && (known.content_hash, known.options_hash) == (content_hash, options_hash)
        {
            return Ok(IndexOutcome::Unchanged { chunks: known.chunks, tokens: known.tokens });
        }
        let prepared = prepare(&full, format, &content, model, &options.chunk)?;
        let document = NewDocument {
            path: &key,
            title: &prepared.title,
            size_bytes: content.bytes.len() as u64,
            content_hash,
            options_hash,
            chunks: &prepared.chunks,
            vectors: &prepared.vectors,
        };
        let chunks = prepared.chunks.len() as u64;
        let tokens = prepared.chunks.iter().map(|chunk| chunk.tokens as u64).sum();
        match store.replace(&document, || content.stamp.is_current(&full))? {
            Stored::Inserted => return Ok(IndexOutcome::Indexed { chunks, tokens }),
            Stored::Replaced { previous_chunks } => {
                return Ok(IndexOutcome::Replaced { chunks, tokens, previous_chunks });
            }
            Stored::AlreadyThere => return Ok(IndexOutcome::Unchanged { chunks, tokens }),
            Stored::Stale => tracing::debug!(path = key, "changed while it was indexed, read again"),
        }
    }
    Err(PipelineError::KeepsChanging { path: full })
}

struct Prepared {
    title: String,
    chunks: Vec<Chunk>,
    vectors: Vec<Vec<f32>>,
}

fn prepare(
    path: &Path,
    format: Format,
    content: &Content,
    model: &dyn TextModel,
    options: &ChunkOptions,
) -> Result<Prepared, PipelineError> {
    let text =
        decode(&content.bytes).map_err(|source| PipelineError::Decode { path: path.to_owned(), source })?;
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let document = parse(format, &text, stem)
        .map_err(|source| PipelineError::Parse { path: path.to_owned(), source })?;
    let chunks = chunk_document(&document, model, options)
        .map_err(|source| PipelineError::Chunk { path: path.to_owned(), source })?;
    let vectors =
        embed(&chunks, model).map_err(|source| PipelineError::Model { path: path.to_owned(), source })?;
    Ok(Prepared { title: document.title, chunks, vectors })
}

/// Embeds chunks in batches and checks each vector.
fn embed(chunks: &[Chunk], model: &dyn TextModel) -> Result<Vec<Vec<f32>>, ModelFailure> {
    let dimension = model.dimension();
    let mut out = Vec::with_capacity(chunks.len());
    for group in chunks.chunks(EMBED_BATCH_TEXTS) {
        let owned: Vec<String> = group.iter().map(Chunk::embedding_text).collect();
        let texts: Vec<&str> = owned.iter().map(String::as_str).collect();
        for batch in batches(&texts, EMBED_BATCH_TEXTS, EMBED_BATCH_BYTES) {
            let vectors = model.embed(batch)?;
            if vectors.len() != batch.len() {
                return Err(ModelFailure::bad_answer(format!(
                    "the model returned {} vectors for {} texts",
                    vectors.len(),
                    batch.len()
                )));
            }
            for vector in vectors {
                check_vector(&vector, dimension)?;
                out.push(vector);
            }
        }
    }
    Ok(out)
}

/// Searches a store with a query's words and vector. Refused when the store is of another model.
pub fn search_store(
    store: &mut Store,
    model: &dyn TextModel,
    query: &str,
    options: &SearchOptions,
) -> Result<Vec<Hit>, SearchError> {
    check_query(query, options)?;
    store.require_model(&ModelIdentity::of(model))?;
    let vector = model.embed_query(query)?;
    store.search(query, &vector, options)
}

//! The store: one SQLite file with documents, chunks, vectors and full-text index. Ranking lives in `search`.
//!
//! Several processes write into one store: each document is one `BEGIN IMMEDIATE` transaction, short because
//! everything was computed before. Readers never wait (write-ahead log).

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Row, Transaction, TransactionBehavior, params};

use crate::chunk::{Chunk, context_line};
use crate::limits::{DIMENSION_MAX, STORE_BUSY_TIMEOUT, VECTORS_PER_BLOCK};
use crate::model::TextModel;
use crate::schema;

/// Length of a BLAKE3 hash.
pub type Hash = [u8; 32];

/// Mode of a store's file when it is made: documents are private until their owner says otherwise.
const STORE_MODE: u32 = 0o600;
const META_MODEL_ID: &str = "model_id";
const META_FINGERPRINT: &str = "model_fingerprint";
const META_DIMENSION: &str = "dimension";
const META_NEXT_CHUNK: &str = "next_chunk_id";

/// Why a store can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such file, and it was not to be made.
    #[error("there is no store at {}: run `index` first, or check the path", path.display())]
    NotFound {
        /// The path asked for.
        path: PathBuf,
    },
    /// The file can't be opened or made.
    #[error("can't open the store {}: {source}", path.display())]
    Open {
        /// The path asked for.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A SQLite file of another application, or no SQLite file at all.
    #[error(
        "the file is not a modelbroker store (application id {application_id:#x}): choose another path for --store"
    )]
    Foreign {
        /// The application id found; 0 when it is no SQLite file.
        application_id: i32,
    },
    /// A store of another version of this program.
    #[error(
        "the store has schema version {version}, this program knows {}: update the program, or index into a new store",
        schema::SCHEMA_VERSION
    )]
    Version {
        /// The version found.
        version: i32,
    },
    /// A store made with another model.
    #[error(
        "the store was made with model {stored}, but the model in use is {asked}: \
         use that model, or index into a new store"
    )]
    ModelMismatch {
        /// The store's model.
        stored: ModelIdentity,
        /// The model in use.
        asked: ModelIdentity,
    },
    /// A model that no store takes.
    #[error("a store can't hold vectors of {dimension} numbers: from 1 to {DIMENSION_MAX} are allowed")]
    BadModel {
        /// The model's dimension.
        dimension: usize,
    },
    /// Chunks and vectors do not belong together.
    #[error("{chunks} chunks came with {vectors} vectors, or with vectors of a wrong length")]
    BadVectors {
        /// Number of chunks.
        chunks: usize,
        /// Number of vectors.
        vectors: usize,
    },
    /// Another process held the store for too long.
    #[error("the store stayed locked by another process for {} s: see who uses it, then try again", STORE_BUSY_TIMEOUT.as_secs())]
    Busy,
    /// The disk is full. Nothing of the document was stored.
    #[error("the disk is full: free some space and index again; what was stored before is whole")]
    DiskFull,
    /// The file system has no shared memory for the write-ahead log.
    #[error(
        "the store can't use a write-ahead log here (journal mode {mode}): put it on a local file system"
    )]
    NoWal {
        /// The mode that SQLite fell back to.
        mode: String,
    },
    /// The file is damaged.
    #[error("the store is damaged ({what}): restore it from a copy, or delete it and index again")]
    Damaged {
        /// What does not fit.
        what: String,
    },
    /// Anything else that SQLite says.
    #[error("the store failed: {0}")]
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        match error.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Self::Busy,
            Some(ErrorCode::DiskFull) => Self::DiskFull,
            Some(ErrorCode::NotADatabase) => Self::Foreign { application_id: 0 },
            Some(ErrorCode::DatabaseCorrupt) => Self::Damaged { what: error.to_string() },
            _ => Self::Sqlite(error),
        }
    }
}

/// Which model a store's vectors are of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ModelIdentity {
    /// The model's id.
    pub model_id: String,
    /// The model's fingerprint in hex.
    pub fingerprint: String,
    /// Length of its vectors.
    pub dimension: usize,
}

impl ModelIdentity {
    /// The identity of `model`.
    pub fn of(model: &dyn TextModel) -> Self {
        Self {
            model_id: model.model_id().to_owned(),
            fingerprint: model.fingerprint(),
            dimension: model.dimension(),
        }
    }
}

impl std::fmt::Display for ModelIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN_CHARS: usize = 12;
        let short: String = self.fingerprint.chars().take(SHOWN_CHARS).collect();
        write!(f, "{} ({} numbers, fingerprint {short})", self.model_id, self.dimension)
    }
}

/// A document as the store knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDocument {
    /// Its canonical path.
    pub path: String,
    /// Its title.
    pub title: String,
    /// Size of the file that was indexed.
    pub size_bytes: u64,
    /// BLAKE3 of that file.
    pub content_hash: Hash,
    /// Hash of the options it was indexed with.
    pub options_hash: Hash,
    /// Its chunks.
    pub chunks: u64,
    /// Tokens of its chunks, overlap and repeated parts counted each time.
    pub tokens: u64,
}

/// A document ready to be stored.
#[derive(Debug)]
pub struct NewDocument<'a> {
    /// Its canonical path: the key.
    pub path: &'a str,
    /// Its title.
    pub title: &'a str,
    /// Size of the file.
    pub size_bytes: u64,
    /// BLAKE3 of the file.
    pub content_hash: Hash,
    /// Hash of the options.
    pub options_hash: Hash,
    /// Its chunks.
    pub chunks: &'a [Chunk],
    /// One vector for each chunk.
    pub vectors: &'a [Vec<f32>],
}

/// What [`Store::replace`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The document is new.
    Inserted,
    /// It took the place of an older version.
    Replaced {
        /// Chunks of the older version.
        previous_chunks: u64,
    },
    /// Another process stored the same content with the same options meanwhile.
    AlreadyThere,
    /// The file has changed since it was read: nothing was stored.
    Stale,
}

/// Sums over a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StoreStats {
    /// Number of documents.
    pub documents: u64,
    /// Number of chunks.
    pub chunks: u64,
    /// Tokens of all chunks.
    pub tokens: u64,
    /// Bytes of the documents' files.
    pub document_bytes: u64,
}

/// An open store. One connection: for one thread at a time; open another for another thread.
#[derive(Debug)]
pub struct Store {
    pub(crate) connection: Connection,
    identity: ModelIdentity,
}

impl Store {
    /// Opens the store at `path` for `model`, made when there is none. Refused when it is someone else's file, of
    /// another version or of another model.
    pub fn open_or_create(path: &Path, model: &ModelIdentity) -> Result<Self, StoreError> {
        if model.dimension == 0 || model.dimension > DIMENSION_MAX {
            return Err(StoreError::BadModel { dimension: model.dimension });
        }
        // SQLite would make the file readable for all; the log files take over the mode of the file.
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(STORE_MODE).open(path);
        match made {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(StoreError::Open { path: path.to_owned(), source: error });
            }
            _ => {}
        }
        let store = Self::open(path, Some(model))?;
        store.require_model(model)?;
        Ok(store)
    }

    /// Opens the store at `path`, which must exist. [`identity`](Self::identity) says which model it is of.
    pub fn open_existing(path: &Path) -> Result<Self, StoreError> {
        Self::open(path, None)
    }

    fn open(path: &Path, model: Option<&ModelIdentity>) -> Result<Self, StoreError> {
        match std::fs::metadata(path) {
            Ok(found) if found.is_file() => {}
            Ok(_) => {
                let source = std::io::Error::other("not a regular file");
                return Err(StoreError::Open { path: path.to_owned(), source });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound { path: path.to_owned() });
            }
            Err(source) => return Err(StoreError::Open { path: path.to_owned(), source }),
        }
        let mut connection = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        connection.busy_timeout(STORE_BUSY_TIMEOUT)?;
        // Looked at before anything is set: a foreign file must stay as it is.
        let is_store = schema::is_store(&connection)?;
        match (is_store, model) {
            (false, None) => return Err(StoreError::Foreign { application_id: 0 }),
            (false, Some(model)) => {
                schema::configure(&connection)?;
                schema::create(&mut connection, |transaction| write_identity(transaction, model))?;
            }
            (true, _) => schema::configure(&connection)?,
        }
        let identity = read_identity(&connection)?;
        Ok(Self { connection, identity })
    }

    /// The model that the vectors are of.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// An error when the store was made with another model.
    pub fn require_model(&self, model: &ModelIdentity) -> Result<(), StoreError> {
        if &self.identity == model {
            return Ok(());
        }
        Err(StoreError::ModelMismatch { stored: self.identity.clone(), asked: model.clone() })
    }

    /// The document at a canonical path.
    pub fn document(&self, path: &str) -> Result<Option<StoredDocument>, StoreError> {
        let mut statement = self.connection.prepare_cached(&format!("{SELECT_DOCUMENT} WHERE path = ?1"))?;
        Ok(statement.query_row([path], stored_document).optional()?)
    }

    /// All documents by path.
    pub fn documents(&self) -> Result<Vec<StoredDocument>, StoreError> {
        let mut statement = self.connection.prepare(&format!("{SELECT_DOCUMENT} ORDER BY path"))?;
        let rows = statement.query_map([], stored_document)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Sums over all documents.
    pub fn stats(&self) -> Result<StoreStats, StoreError> {
        Ok(self.connection.query_row(
            "SELECT count(*), total(chunk_count), total(token_count), total(size_bytes) FROM documents",
            [],
            |row| {
                Ok(StoreStats {
                    documents: row.get(0)?,
                    chunks: row.get::<_, f64>(1)? as u64,
                    tokens: row.get::<_, f64>(2)? as u64,
                    document_bytes: row.get::<_, f64>(3)? as u64,
                })
            },
        )?)
    }

    /// Stores a document in place of its older version, all in one transaction: whoever dies when, either the old
    /// or the new version is there, whole. `is_current` is asked once the store is locked whether the file is
    /// still what was read: of two writers of one document the one with the newer file wins.
    pub fn replace(
        &mut self,
        document: &NewDocument<'_>,
        is_current: impl FnOnce() -> bool,
    ) -> Result<Stored, StoreError> {
        let dimension = self.identity.dimension;
        if document.chunks.len() != document.vectors.len()
            || document.vectors.iter().any(|vector| vector.len() != dimension)
        {
            return Err(StoreError::BadVectors {
                chunks: document.chunks.len(),
                vectors: document.vectors.len(),
            });
        }
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        // Dropped without commit, the transaction is rolled back.
        if !is_current() {
            return Ok(Stored::Stale);
        }
        let previous = transaction
            .query_row(
                "SELECT content_hash, options_hash FROM documents WHERE path = ?1",
                [document.path],
                |row| Ok((row.get::<_, Hash>(0)?, row.get::<_, Hash>(1)?)),
            )
            .optional()?;
        if previous == Some((document.content_hash, document.options_hash)) {
            return Ok(Stored::AlreadyThere);
        }
        let previous_chunks = delete(&transaction, document.path)?;
        insert(&transaction, document)?;
        transaction.commit()?;
        Ok(match previous_chunks {
            Some(previous_chunks) => Stored::Replaced { previous_chunks },
            None => Stored::Inserted,
        })
    }

    /// Removes a document by its canonical path; whether it was there.
    pub fn remove(&mut self, path: &str) -> Result<bool, StoreError> {
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let was_there = delete(&transaction, path)?.is_some();
        transaction.commit()?;
        Ok(was_there)
    }

    /// Checks the whole store: SQLite's own check, the full-text index, and that chunks, vectors and documents
    /// belong together.
    pub fn check(&self) -> Result<(), StoreError> {
        let damaged = |what: String| Err(StoreError::Damaged { what });
        let verdict: String = self.connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return damaged(verdict);
        }
        self.connection.execute("INSERT INTO chunk_text (chunk_text) VALUES ('integrity-check')", [])?;
        let count = |sql: &str| self.connection.query_row(sql, [], |row| row.get::<_, i64>(0));
        let chunks = count("SELECT count(*) FROM chunks")?;
        for (what, sql) in [
            ("documents", "SELECT CAST(total(chunk_count) AS INTEGER) FROM documents"),
            ("vectors", "SELECT CAST(total(vector_count) AS INTEGER) FROM vectors"),
            ("full-text rows", "SELECT count(*) FROM chunk_text"),
            (
                "chunks of their documents",
                "SELECT count(*) FROM chunks c JOIN documents d ON d.id = c.document_id \
                 WHERE c.id >= d.first_chunk_id AND c.id < d.first_chunk_id + d.chunk_count",
            ),
        ] {
            let found = count(sql)?;
            if found != chunks {
                return damaged(format!("{chunks} chunks, but {found} in {what}"));
            }
        }
        let row_bytes = self.identity.dimension * size_of::<f32>();
        let odd = self.connection.query_row(
            "SELECT count(*) FROM vectors WHERE length(data) <> vector_count * ?1",
            [row_bytes as i64],
            |row| row.get::<_, i64>(0),
        )?;
        if odd > 0 { damaged(format!("{odd} vector blocks of a wrong length")) } else { Ok(()) }
    }
}

const SELECT_DOCUMENT: &str =
    "SELECT path, title, size_bytes, content_hash, options_hash, chunk_count, token_count FROM documents";

fn stored_document(row: &Row<'_>) -> Result<StoredDocument, rusqlite::Error> {
    Ok(StoredDocument {
        path: row.get(0)?,
        title: row.get(1)?,
        size_bytes: row.get(2)?,
        content_hash: row.get(3)?,
        options_hash: row.get(4)?,
        chunks: row.get(5)?,
        tokens: row.get(6)?,
    })
}

fn write_identity(transaction: &Transaction<'_>, model: &ModelIdentity) -> Result<(), StoreError> {
    schema::set_meta(transaction, META_MODEL_ID, &model.model_id)?;
    schema::set_meta(transaction, META_FINGERPRINT, &model.fingerprint)?;
    schema::set_meta(transaction, META_DIMENSION, &model.dimension.to_string())?;
    schema::set_meta(transaction, META_NEXT_CHUNK, "1")
}

fn required_meta(connection: &Connection, key: &str) -> Result<String, StoreError> {
    schema::meta(connection, key)?.ok_or_else(|| StoreError::Damaged { what: format!("no {key} in meta") })
}

fn required_number<T: std::str::FromStr>(connection: &Connection, key: &str) -> Result<T, StoreError> {
    required_meta(connection, key)?
        .parse()
        .map_err(|_| StoreError::Damaged { what: format!("{key} in meta is not a number") })
}

fn read_identity(connection: &Connection) -> Result<ModelIdentity, StoreError> {
    let dimension = required_number(connection, META_DIMENSION)?;
    if dimension == 0 || dimension > DIMENSION_MAX {
        return Err(StoreError::Damaged { what: format!("dimension {dimension} in meta") });
    }
    Ok(ModelIdentity {
        model_id: required_meta(connection, META_MODEL_ID)?,
        fingerprint: required_meta(connection, META_FINGERPRINT)?,
        dimension,
    })
}

/// Removes a document with all that belongs to it; the number of its chunks when it was there.
fn delete(transaction: &Transaction<'_>, path: &str) -> Result<Option<u64>, StoreError> {
    let found = transaction
        .query_row("SELECT id, first_chunk_id, chunk_count FROM documents WHERE path = ?1", [path], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
        })
        .optional()?;
    let Some((id, first, count)) = found else {
        return Ok(None);
    };
    let end = first.saturating_add(count);
    transaction.execute("DELETE FROM chunk_text WHERE rowid >= ?1 AND rowid < ?2", (first, end))?;
    transaction
        .execute("DELETE FROM vectors WHERE first_chunk_id >= ?1 AND first_chunk_id < ?2", (first, end))?;
    transaction.execute("DELETE FROM chunks WHERE id >= ?1 AND id < ?2", (first, end))?;
    transaction.execute("DELETE FROM documents WHERE id = ?1", [id])?;
    Ok(Some(u64::try_from(count).unwrap_or(0)))
}

fn insert(transaction: &Transaction<'_>, document: &NewDocument<'_>) -> Result<(), StoreError> {
    let first: i64 = required_number(transaction, META_NEXT_CHUNK)?;
    let count = document.chunks.len() as i64;
    let next = first
        .checked_add(count)
        .filter(|_| first > 0)
        .ok_or_else(|| StoreError::Damaged { what: format!("{META_NEXT_CHUNK} is {first}") })?;
    schema::set_meta(transaction, META_NEXT_CHUNK, &next.to_string())?;
    let tokens: u64 = document.chunks.iter().map(|chunk| chunk.tokens as u64).sum();
    transaction.execute(
        "INSERT INTO documents (path, title, size_bytes, content_hash, options_hash, first_chunk_id, chunk_count, \
         token_count) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            document.path,
            document.title,
            document.size_bytes,
            document.content_hash,
            document.options_hash,
            first,
            count,
            tokens
        ],
    )?;
    let document_id = transaction.last_insert_rowid();

    let mut chunk_row = transaction.prepare_cached(
        "INSERT INTO chunks (id, document_id, kind, heading_path, body, tokens, first_line, last_line, start_byte, \
         end_byte) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?;
    let mut text_row =
        transaction.prepare_cached("INSERT INTO chunk_text (rowid, headings, body) VALUES (?1, ?2, ?3)")?;
    for (id, chunk) in (first..).zip(document.chunks) {
        let heading_path = serde_json::Value::from(chunk.heading_path.to_vec()).to_string();
        let source = chunk.source;
        chunk_row.execute(params![
            id,
            document_id,
            kind_name(chunk.kind),
            heading_path,
            chunk.body,
            chunk.tokens as u64,
            source.map(|source| source.first_line),
            source.map(|source| source.last_line),
            source.map(|source| source.start_byte),
            source.map(|source| source.end_byte),
        ])?;
        text_row.execute(params![id, context_line(document.title, &chunk.heading_path), chunk.body])?;
    }
    let mut block_row = transaction
        .prepare_cached("INSERT INTO vectors (first_chunk_id, vector_count, data) VALUES (?1, ?2, ?3)")?;
    for (at, block) in document.vectors.chunks(VECTORS_PER_BLOCK).enumerate() {
        let data: Vec<u8> = block.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
        block_row.execute(params![first + (at * VECTORS_PER_BLOCK) as i64, block.len() as i64, data])?;
    }
    Ok(())
}

/// A chunk's kind as the store writes it.
pub(crate) fn kind_name(kind: crate::ChunkKind) -> &'static str {
    match kind {
        crate::ChunkKind::Text => "text",
        crate::ChunkKind::Table => "table",
    }
}

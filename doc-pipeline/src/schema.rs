//! The store's tables and the checks on an opened file. No rows are written or read here but those of `meta`.

use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior};

use crate::limits::{STORE_BUSY_TIMEOUT, STORE_OPEN_ATTEMPTS_MAX, STORE_OPEN_PAUSE};
use crate::store::StoreError;

/// `application_id` of a store: "mbdp".
pub(crate) const APPLICATION_ID: i32 = 0x6d62_6470;
/// `user_version` of a store. A newer one is refused; there is no older one.
pub(crate) const SCHEMA_VERSION: i32 = 1;

/// The tables.
///
/// A document's chunks have consecutive ids from `first_chunk_id`, never used again, so that its rows in `vectors`
/// and `chunk_text` are found by range. `vectors` holds blocks of consecutive vectors, little-endian f32, in the
/// order that the flat scan reads them.
const SCHEMA: &str = "
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE documents (
    id             INTEGER PRIMARY KEY,
    path           TEXT NOT NULL UNIQUE,
    title          TEXT NOT NULL,
    size_bytes     INTEGER NOT NULL,
    content_hash   BLOB NOT NULL,
    options_hash   BLOB NOT NULL,
    first_chunk_id INTEGER NOT NULL,
    chunk_count    INTEGER NOT NULL,
    token_count    INTEGER NOT NULL
) STRICT;

CREATE TABLE chunks (
    id           INTEGER PRIMARY KEY,
    document_id  INTEGER NOT NULL REFERENCES documents (id),
    kind         TEXT NOT NULL,
    heading_path TEXT NOT NULL,
    body         TEXT NOT NULL,
    tokens       INTEGER NOT NULL,
    first_line   INTEGER,
    last_line    INTEGER,
    start_byte   INTEGER,
    end_byte     INTEGER
) STRICT;

CREATE TABLE vectors (
    first_chunk_id INTEGER PRIMARY KEY,
    vector_count   INTEGER NOT NULL,
    data           BLOB NOT NULL
) STRICT;

CREATE VIRTUAL TABLE chunk_text USING fts5 (
    headings, body,
    content = '', contentless_delete = 1,
    tokenize = 'porter unicode61 remove_diacritics 2'
);
";

/// Bytes of a page of a new store: the flat scan takes 30 ms of CPU time for 100,000 vectors of 384 numbers, with
/// SQLite's 4 KiB about 50, with 32 KiB again 30.
const PAGE_BYTES: u32 = 16 << 10;

/// Sets up a connection and the journal mode. Several processes may do so at once with a fresh file: SQLite then
/// answers "busy" without waiting, so it is tried again, a bounded number of times.
pub(crate) fn configure(connection: &Connection) -> Result<(), StoreError> {
    connection.busy_timeout(STORE_BUSY_TIMEOUT)?;
    // Holds for a file without pages only.
    connection.pragma_update(None, "page_size", PAGE_BYTES)?;
    let mut attempts = 0;
    loop {
        let mode = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get::<_, String>(0));
        attempts += 1;
        match mode {
            Ok(mode) if mode == "wal" => break,
            Ok(mode) => return Err(StoreError::NoWal { mode }),
            Err(error) if is_busy(&error) && attempts < STORE_OPEN_ATTEMPTS_MAX => {
                std::thread::sleep(STORE_OPEN_PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
    // FULL: a commit is on the disk before it is acknowledged, so that neither SIGKILL nor a power cut takes it back.
    connection.execute_batch(
        "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF; PRAGMA cache_size = -16384;",
    )?;
    Ok(())
}

pub(crate) fn is_busy(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(error.sqlite_error_code(), Some(DatabaseBusy | DatabaseLocked))
}

/// Whether the file is a store: `Ok(false)` for one without any table, an error for someone else's or a newer one.
pub(crate) fn is_store(connection: &Connection) -> Result<bool, StoreError> {
    // All is read at one state of the file: with another process making the store between two reads, the file
    // would have tables but no application id yet, as only a foreign one has.
    let _one_state = match connection.is_autocommit() {
        true => Some(connection.unchecked_transaction()?),
        false => None,
    };
    let pragma = |name: &str| connection.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i32>(0));
    let tables: i64 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let (application_id, version) = (pragma("application_id")?, pragma("user_version")?);
    if application_id == APPLICATION_ID {
        return if version == SCHEMA_VERSION { Ok(true) } else { Err(StoreError::Version { version }) };
    }
    if application_id == 0 && version == 0 && tables == 0 {
        return Ok(false);
    }
    Err(StoreError::Foreign { application_id })
}

/// Makes the tables in an empty file, unless another process did so just now.
pub(crate) fn create(
    connection: &mut Connection,
    write_meta: impl FnOnce(&Transaction<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    if !is_store(&transaction)? {
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", SCHEMA_VERSION)?;
        write_meta(&transaction)?;
    }
    transaction.commit()?;
    Ok(())
}

/// A value of `meta`.
pub(crate) fn meta(connection: &Connection, key: &str) -> Result<Option<String>, StoreError> {
    Ok(connection.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0)).optional()?)
}

/// Sets a value of `meta`.
pub(crate) fn set_meta(connection: &Connection, key: &str, value: &str) -> Result<(), StoreError> {
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)", (key, value))?;
    Ok(())
}

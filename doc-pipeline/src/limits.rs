//! Every bound of this crate, in one place. No logic here; the error that a bound gives is named beside it.

use std::time::Duration;

/// Largest document file in bytes (64 MiB). Over it: `ReadError::TooLarge`.
pub const FILE_BYTES_MAX: u64 = 64 << 20;
/// Most blocks (headings, paragraphs, list items, tables…) in one document. Over it: `ParseError::Limit`.
pub const BLOCKS_MAX: usize = 200_000;
/// Deepest nesting of elements in a document. Over it: `ParseError::Limit`.
pub const NESTING_MAX: usize = 256;
/// Most HTML tags that may be open at once before the text is parsed at all; more than [`NESTING_MAX`], because some
/// of them may be closed by others. Over it: `ParseError::Limit`.
pub const HTML_OPEN_TAGS_MAX: usize = 4 * NESTING_MAX;
/// Most columns of a table. Over it: `ParseError::Limit`.
pub const TABLE_COLUMNS_MAX: usize = 1_024;
/// Most rows of a table. Over it: `ParseError::Limit`.
pub const TABLE_ROWS_MAX: usize = 1_000_000;
/// Most table cells in one document, cells made by colspan and rowspan included. Over it: `ParseError::Limit`.
pub const TABLE_CELLS_MAX: usize = 4 << 20;
/// Longest text of a spanning cell that is repeated in the cells it covers; a longer one is kept once.
pub const SPAN_TEXT_BYTES_MAX: usize = 256;
/// Longest heading kept in a heading path, in bytes; a longer one is cut there and kept whole in the text.
pub const CRUMB_BYTES_MAX: usize = 256;
/// Longest title in bytes; a longer one is cut.
pub const TITLE_BYTES_MAX: usize = 256;
/// Longest caption in bytes: a longer paragraph is not taken for one.
pub const CAPTION_BYTES_MAX: usize = 400;
/// Bytes of a CSV file that are looked at to find its delimiter.
pub const CSV_SNIFF_BYTES: usize = 64 << 10;
/// Records of a CSV file that are looked at to find its delimiter.
pub const CSV_SNIFF_RECORDS: usize = 64;

/// Longest text handed to the tokenizer at once, in bytes; a longer one is cut between words.
pub const TOKENIZE_PIECE_BYTES: usize = 4 << 10;
/// Most texts in one tokenize request.
pub const TOKENIZE_BATCH_TEXTS: usize = 256;
/// Most bytes in one tokenize request (a single piece is always allowed).
pub const TOKENIZE_BATCH_BYTES: usize = 256 << 10;
/// Longest body of a chunk in bytes, however few tokens it has.
pub const CHUNK_BYTES_MAX: usize = 24 << 10;
/// Most chunks of one document. Over it: `ChunkError::TooManyChunks`.
pub const CHUNKS_MAX: usize = 200_000;
/// Smallest target of a chunk in tokens. Under it: `ChunkError::TargetTooSmall`.
pub const TARGET_TOKENS_MIN: usize = 16;
/// Times that a document is packed again with a smaller target, when joined pieces count more tokens than apart.
pub const REPACK_ATTEMPTS_MAX: usize = 8;
/// Texts in one embed request.
pub const EMBED_BATCH_TEXTS: usize = 64;
/// Most bytes in one embed request (a single text is always allowed).
pub const EMBED_BATCH_BYTES: usize = 256 << 10;

/// Largest vector length that a store takes. Over it: `StoreError::BadModel`.
pub const DIMENSION_MAX: usize = 16_384;
/// Vectors in one block of the store: the unit of the flat scan.
pub const VECTORS_PER_BLOCK: usize = 128;
/// How long a writer waits for its turn in the store. Over it: `StoreError::Busy`.
pub const STORE_BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// Times that opening a store is tried while another process switches it to its journal mode.
pub const STORE_OPEN_ATTEMPTS_MAX: u32 = 200;
/// Pause between two such tries.
pub const STORE_OPEN_PAUSE: Duration = Duration::from_millis(10);
/// Longest search text in bytes. Over it: `SearchError::QueryTooLong`.
pub const QUERY_BYTES_MAX: usize = 64 << 10;
/// Most words of a query that go into the full-text search; later ones count for the vector only.
pub const QUERY_TERMS_MAX: usize = 64;
/// Most results of a search. Over it: `SearchError::TooManyResults`.
pub const RESULTS_MAX: usize = 10_000;
/// Longest snippet in a result, in bytes; a longer chunk is cut there and ends with an ellipsis.
pub const SNIPPET_BYTES_MAX: usize = 4_000;

/// Times that a file that changes while it is indexed is read again. Over it: `PipelineError::KeepsChanging`.
pub const REREAD_ATTEMPTS_MAX: usize = 3;

/// Most documents that one walk finds. Over it: `WalkError::TooManyFiles`.
pub const WALK_FILES_MAX: usize = 1_000_000;
/// Deepest folder that a walk enters. Over it: a problem in the result, and the walk goes on elsewhere.
pub const WALK_DEPTH_MAX: usize = 64;

/// Most subprocesses at once.
pub const JOBS_MAX: usize = 256;
/// Default time limit of one document's subprocess.
pub const DOCUMENT_TIME_LIMIT: Duration = Duration::from_secs(600);
/// Private memory that one document's subprocess may have (2 GiB); see `supervise::bound_memory`.
pub const DOCUMENT_MEMORY_BYTES_MAX: u64 = 2 << 30;
/// Bytes of a subprocess's stdout that are kept; the rest is read and dropped.
pub const CHILD_STDOUT_BYTES_MAX: usize = 64 << 10;
/// Bytes at the end of a subprocess's stderr that are kept.
pub const CHILD_STDERR_BYTES_MAX: usize = 8 << 10;
/// How long the supervisor waits for the pipes of a dead subprocess to close, when something it started lives on.
pub const CHILD_PIPE_DRAIN: Duration = Duration::from_secs(2);

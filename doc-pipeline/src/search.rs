//! Hybrid search: exact cosine by a flat scan, BM25 by FTS5, joined by reciprocal rank fusion. Reads only.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use rusqlite::{Connection, TransactionBehavior};

use crate::chunk::ChunkKind;
use crate::limits::{QUERY_BYTES_MAX, QUERY_TERMS_MAX, RESULTS_MAX, SNIPPET_BYTES_MAX};
use crate::model::{ModelFailure, check_vector};
use crate::store::{Store, StoreError};

/// The constant of reciprocal rank fusion: how slowly a place in a list loses its worth.
const FUSION_K: f64 = 60.0;
/// Candidates that each list gives, as a multiple of the results asked for, and at least so many.
const CANDIDATES_FACTOR: usize = 10;
const CANDIDATES_MIN: usize = 100;
/// Weight of a term in the headings against one in the body.
const HEADINGS_WEIGHT: f64 = 2.0;
/// Accumulators of a dot product: independent, so that the compiler makes vector code of them.
const LANES: usize = 16;

/// What a search is to return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchOptions {
    /// Number of results, 1 to [`RESULTS_MAX`].
    pub results: usize,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self { results: 5 }
    }
}

/// Why a search gives no answer.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// Nothing but white space.
    #[error("the query is empty: say what to search for")]
    EmptyQuery,
    /// Over [`QUERY_BYTES_MAX`].
    #[error("the query has {bytes} bytes, at most {QUERY_BYTES_MAX} are allowed (limit QUERY_BYTES_MAX)")]
    QueryTooLong {
        /// Its length.
        bytes: usize,
    },
    /// Zero, or over [`RESULTS_MAX`].
    #[error("{results} results were asked for: from 1 to {RESULTS_MAX} are allowed (limit RESULTS_MAX)")]
    TooManyResults {
        /// How many were asked for.
        results: usize,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelFailure),
}

impl From<rusqlite::Error> for SearchError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

/// One result. Its JSON is stable.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Hit {
    /// Place in the list, from 1.
    pub rank: u32,
    /// Reciprocal rank fusion of the two lists: 2/61 is the best there is.
    pub score: f64,
    /// Cosine of query and chunk, -1 to 1.
    pub cosine: f32,
    /// Place by cosine, from 1; absent when not among the candidates.
    pub cosine_rank: Option<u32>,
    /// Place by BM25, from 1; absent when no word of the query is in the chunk, or it is not among the candidates.
    pub bm25_rank: Option<u32>,
    /// Canonical path of the document.
    pub document: String,
    /// Title of the document.
    pub title: String,
    /// Headings that the chunk stands under, outermost first.
    pub heading_path: Vec<String>,
    /// Text or table.
    pub kind: ChunkKind,
    /// The chunk's text, cut at [`SNIPPET_BYTES_MAX`]; a table's begins with its caption and header row.
    pub snippet: String,
    /// Id of the chunk in the store.
    pub chunk_id: i64,
    /// First and last line in the document, from 1, when the format tells.
    pub lines: Option<(u32, u32)>,
    /// Byte range in the document's text, when the format tells.
    pub bytes: Option<(u64, u64)>,
}

/// Checks what can be checked without model and store.
pub(crate) fn check_query(query: &str, options: &SearchOptions) -> Result<(), SearchError> {
    if query.trim().is_empty() {
        return Err(SearchError::EmptyQuery);
    }
    if query.len() > QUERY_BYTES_MAX {
        return Err(SearchError::QueryTooLong { bytes: query.len() });
    }
    if options.results == 0 || options.results > RESULTS_MAX {
        return Err(SearchError::TooManyResults { results: options.results });
    }
    Ok(())
}

impl Store {
    /// The chunks that fit best to a query's words and vector. The vector is a unit vector of the store's model.
    pub fn search(
        &mut self,
        query: &str,
        vector: &[f32],
        options: &SearchOptions,
    ) -> Result<Vec<Hit>, SearchError> {
        check_query(query, options)?;
        check_vector(vector, self.identity().dimension)?;
        let candidates = options.results.saturating_mul(CANDIDATES_FACTOR).max(CANDIDATES_MIN);
        // One transaction: all reads see the same state, whatever is written meanwhile.
        let read = self.connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
        let by_words = bm25(&read, query, candidates)?;
        let scan = scan(&read, vector, candidates, &by_words)?;
        let ranked = fuse(&by_words, &scan, options.results);
        let mut hits = Vec::with_capacity(ranked.len());
        for (place, fused) in ranked.into_iter().enumerate() {
            hits.push(load(&read, place, fused)?);
        }
        Ok(hits)
    }
}

/// A query's words as an FTS5 expression: each word a quoted phrase, any of them may match. Quoting takes the
/// meaning of FTS5's operators away. `None` when there is no word.
fn match_expression(query: &str) -> Option<String> {
    let mut words: Vec<String> = Vec::new();
    for word in query.split(|c: char| c.is_whitespace() || c == '"' || c.is_control()) {
        if words.len() >= QUERY_TERMS_MAX {
            break;
        }
        let word = word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase();
        if !word.is_empty() && !words.contains(&word) {
            words.push(word);
        }
    }
    (!words.is_empty())
        .then(|| words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(" OR "))
}

/// Chunk ids by BM25, best first.
fn bm25(read: &Connection, query: &str, candidates: usize) -> Result<Vec<i64>, StoreError> {
    let Some(expression) = match_expression(query) else {
        return Ok(Vec::new());
    };
    let mut statement = read.prepare_cached(
        "SELECT rowid FROM chunk_text WHERE chunk_text MATCH ?1 ORDER BY bm25(chunk_text, ?2, 1.0), rowid LIMIT ?3",
    )?;
    let rows = statement.query_map((expression, HEADINGS_WEIGHT, candidates as i64), |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What the flat scan found.
struct Scan {
    /// Best chunks by cosine, best first.
    best: Vec<(i64, f32)>,
    /// Cosines of the chunks that the words found.
    of_words: HashMap<i64, f32>,
}

/// Compares the query with every vector of the store.
fn scan(read: &Connection, vector: &[f32], candidates: usize, by_words: &[i64]) -> Result<Scan, StoreError> {
    let mut wanted: Vec<i64> = by_words.to_vec();
    wanted.sort_unstable();
    let mut wanted = wanted.into_iter().peekable();
    let mut of_words = HashMap::with_capacity(by_words.len());
    let mut heap: BinaryHeap<Worst> = BinaryHeap::with_capacity(candidates + 1);
    let row_bytes = std::mem::size_of_val(vector);

    // Blocks come in the order of their ids, so one pass serves the wanted ids as well.
    let mut statement = read
        .prepare_cached("SELECT first_chunk_id, vector_count, data FROM vectors ORDER BY first_chunk_id")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let (first, count) = (row.get::<_, i64>(0)?, row.get::<_, i64>(1)?);
        let data = row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?;
        if usize::try_from(count).ok().and_then(|count| count.checked_mul(row_bytes)) != Some(data.len()) {
            return Err(StoreError::Damaged {
                what: format!("vector block {first} has {} bytes", data.len()),
            });
        }
        for (id, bytes) in (first..).zip(data.chunks_exact(row_bytes)) {
            let cosine = dot(vector, bytes);
            while wanted.next_if(|wanted| *wanted < id).is_some() {}
            if wanted.next_if_eq(&id).is_some() {
                of_words.insert(id, cosine);
            }
            let entry = Worst { cosine, id };
            if heap.len() < candidates {
                heap.push(entry);
            } else if let Some(mut worst) = heap.peek_mut()
                && entry < *worst
            {
                *worst = entry;
            }
        }
    }
    let best = heap.into_sorted_vec().into_iter().map(|entry| (entry.id, entry.cosine)).collect();
    Ok(Scan { best, of_words })
}

/// Dot product of a vector with one stored as little-endian f32; as many numbers as the shorter has.
fn dot(vector: &[f32], stored: &[u8]) -> f32 {
    let (numbers, _) = stored.as_chunks::<4>();
    let (left, left_rest) = vector.as_chunks::<LANES>();
    let (right, right_rest) = numbers.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (a, b) in left.iter().zip(right) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * f32::from_le_bytes(b[lane]);
        }
    }
    let rest: f32 = left_rest.iter().zip(right_rest).map(|(a, b)| a * f32::from_le_bytes(*b)).sum();
    sums.iter().sum::<f32>() + rest
}

/// A candidate, ordered so that the worst is the greatest: lower cosine, then higher id.
struct Worst {
    cosine: f32,
    id: i64,
}

impl Ord for Worst {
    fn cmp(&self, other: &Self) -> Ordering {
        other.cosine.total_cmp(&self.cosine).then(self.id.cmp(&other.id))
    }
}

impl PartialOrd for Worst {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Worst {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Worst {}

/// A chunk with its places in both lists.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Fused {
    id: i64,
    score: f64,
    cosine: f32,
    cosine_rank: Option<u32>,
    bm25_rank: Option<u32>,
}

/// Joins the two lists by reciprocal rank; equal scores by cosine, then by id.
fn fuse(by_words: &[i64], scan: &Scan, results: usize) -> Vec<Fused> {
    let mut fused: HashMap<i64, Fused> = HashMap::with_capacity(by_words.len() + scan.best.len());
    let worth = |rank: u32| 1.0 / (FUSION_K + f64::from(rank));
    for (rank, (id, cosine)) in (1_u32..).zip(&scan.best) {
        let entry =
            Fused { id: *id, score: worth(rank), cosine: *cosine, cosine_rank: Some(rank), bm25_rank: None };
        fused.insert(*id, entry);
    }
    for (rank, id) in (1_u32..).zip(by_words) {
        let cosine = scan.of_words.get(id).copied().unwrap_or(0.0);
        let entry = fused.entry(*id).or_insert(Fused {
            id: *id,
            score: 0.0,
            cosine,
            cosine_rank: None,
            bm25_rank: None,
        });
        entry.score += worth(rank);
        entry.bm25_rank = Some(rank);
    }
    let mut fused: Vec<Fused> = fused.into_values().collect();
    fused.sort_unstable_by(|a, b| {
        b.score.total_cmp(&a.score).then(b.cosine.total_cmp(&a.cosine)).then(a.id.cmp(&b.id))
    });
    fused.truncate(results);
    fused
}

fn load(read: &Connection, place: usize, fused: Fused) -> Result<Hit, StoreError> {
    let mut statement = read.prepare_cached(
        "SELECT d.path, d.title, c.heading_path, c.kind, c.body, c.first_line, c.last_line, c.start_byte, c.end_byte \
         FROM chunks c JOIN documents d ON d.id = c.document_id WHERE c.id = ?1",
    )?;
    let damaged = |what: &str| StoreError::Damaged { what: format!("chunk {}: {what}", fused.id) };
    statement
        .query_row([fused.id], |row| {
            let heading_path: String = row.get(2)?;
            let kind: String = row.get(3)?;
            let body: String = row.get(4)?;
            Ok((
                heading_path,
                kind,
                Hit {
                    rank: u32::try_from(place + 1).unwrap_or(u32::MAX),
                    score: fused.score,
                    cosine: fused.cosine,
                    cosine_rank: fused.cosine_rank,
                    bm25_rank: fused.bm25_rank,
                    document: row.get(0)?,
                    title: row.get(1)?,
                    heading_path: Vec::new(),
                    kind: ChunkKind::Text,
                    snippet: snippet(&body),
                    chunk_id: fused.id,
                    lines: row.get::<_, Option<u32>>(5)?.zip(row.get(6)?),
                    bytes: row.get::<_, Option<u64>>(7)?.zip(row.get(8)?),
                },
            ))
        })
        .map_err(|error| match error {
            rusqlite::Error::QueryReturnedNoRows => damaged("has a vector but no text"),
            error => error.into(),
        })
        .and_then(|(heading_path, kind, mut hit)| {
            hit.heading_path = serde_json::from_str(&heading_path).map_err(|_| damaged("heading path"))?;
            hit.kind = match kind.as_str() {
                "text" => ChunkKind::Text,
                "table" => ChunkKind::Table,
                _ => return Err(damaged("kind")),
            };
            Ok(hit)
        })
}

fn snippet(body: &str) -> String {
    let cut = crate::document::cut(body, SNIPPET_BYTES_MAX);
    if cut.len() < body.len() { format!("{cut}…") } else { body.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_become_quoted_phrases() {
        assert_eq!(
            match_expression("What's the (X-200) AND x-200?").as_deref(),
            Some("\"what's\" OR \"the\" OR \"x-200\" OR \"and\"")
        );
        assert_eq!(match_expression(" \"* - ( ").as_deref(), None);
    }

    #[test]
    fn being_in_both_lists_wins() {
        let scan =
            Scan { best: vec![(1, 0.9), (2, 0.8), (3, 0.7)], of_words: HashMap::from([(2, 0.8), (9, 0.1)]) };
        let fused = fuse(&[2, 9], &scan, 10);
        assert_eq!(fused.iter().map(|hit| hit.id).collect::<Vec<_>>(), [2, 1, 9, 3]);
        assert_eq!((fused[0].cosine_rank, fused[0].bm25_rank), (Some(2), Some(1)));
        assert!((fused[0].score - (1.0 / 62.0 + 1.0 / 61.0)).abs() < 1e-12);
        assert!((fused[2].cosine - 0.1).abs() < 1e-6);
    }

    proptest! {
        #[test]
        fn dot_is_the_plain_sum(pairs in proptest::collection::vec((-1.0_f32..1.0, -1.0_f32..1.0), 0..70)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
            let bytes: Vec<u8> = b.iter().flat_map(|x| x.to_le_bytes()).collect();
            let plain: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            prop_assert!((f64::from(dot(&a, &bytes)) - plain).abs() < 1e-4);
        }

        #[test]
        fn any_query_is_a_valid_expression(query in "[a-z\"*()^:{}+\\-. \u{0}\u{e9}']{0,60}|\\PC*") {
            let connection = Connection::open_in_memory().expect("in memory");
            connection.execute_batch("CREATE VIRTUAL TABLE chunk_text USING fts5 (headings, body)").expect("fts5");
            prop_assert!(bm25(&connection, &query, 10).is_ok(), "{:?}", match_expression(&query));
        }
    }
}

//! What `load` and its client processes tell each other: one JSON line each way. Neither sends nor measures.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Largest difference of one number of a vector from its reference: a job may be computed in another batch than its
/// reference was, which may change rounding but nothing more.
pub(crate) const TOLERANCE: f32 = 1e-5;

/// What one client process is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Model id.
    pub(crate) model: String,
    /// Jobs as frames on the socket instead of through a lane.
    pub(crate) socket_route: bool,
    pub(crate) duration_ms: u64,
    pub(crate) timeout_ms: u64,
    /// Texts may be answered from the cache.
    pub(crate) cached: bool,
    /// One for each thread.
    pub(crate) threads: Vec<ThreadPlan>,
    /// Against what answers are checked.
    pub(crate) reference: Option<Reference>,
}

/// What one thread sends: texts of its own, in turn. So two requests in flight never begin with the same text, nor do two
/// of one thread that follow one another: an answer that goes astray is a wrong answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ThreadPlan {
    pub(crate) bulk: bool,
    /// Texts in one request.
    pub(crate) batch: usize,
    /// Its texts, each with its row in the reference.
    pub(crate) texts: Vec<(usize, String)>,
}

/// Vectors computed first, one by one: a file of `f32` (little-endian), one row of `dim` numbers for each text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Reference {
    pub(crate) path: PathBuf,
    pub(crate) dim: usize,
    pub(crate) fingerprint: u64,
}

/// What a client process says: first [`ClientLine::Ready`], then, told to go, [`ClientLine::Done`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ClientLine {
    Ready,
    Done(ClientResult),
}

/// How one client process fared.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ClientResult {
    pub(crate) pid: u32,
    /// Requests begun.
    pub(crate) submitted: u64,
    /// Requests that neither gave an answer nor failed until long after their timeout.
    pub(crate) lost: u64,
    /// Requests whose answer is not that of their texts.
    pub(crate) wrong: u64,
    /// Requests whose answer is that of the same thread's request before: an answer given twice.
    pub(crate) duplicated: u64,
    /// Requests that failed, by code.
    pub(crate) errors: BTreeMap<String, u64>,
    /// Largest difference from the reference among right answers.
    pub(crate) max_abs_diff: f32,
    /// From the word to go to the end of the last request.
    pub(crate) elapsed_us: u64,
    /// Times that the lease was taken up anew.
    pub(crate) reconnects: u64,
    pub(crate) interactive: Class,
    pub(crate) bulk: Class,
}

/// Requests of one priority.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Class {
    /// Requests answered, wrongly or not.
    pub(crate) completed: u64,
    /// Texts in them.
    pub(crate) texts: u64,
    /// How long they took: pairs of a time in µs and how many took it.
    pub(crate) latency_us: Vec<(u64, u64)>,
}

impl ClientResult {
    pub(crate) fn completed(&self) -> u64 {
        self.interactive.completed + self.bulk.completed
    }

    pub(crate) fn error_count(&self) -> u64 {
        self.errors.values().sum()
    }
}

/// Deals texts to `threads` threads, of which the share `bulk` sends bulk requests, spread evenly.
pub(crate) fn deal(
    threads: usize,
    bulk: f64,
    batch: usize,
    bulk_batch: usize,
    texts: &[String],
) -> Vec<ThreadPlan> {
    (0..threads)
        .map(|number| {
            let before = (number as f64 * bulk).floor();
            let is_bulk = ((number + 1) as f64 * bulk).floor() > before;
            ThreadPlan {
                bulk: is_bulk,
                batch: if is_bulk { bulk_batch } else { batch },
                texts: texts.iter().cloned().enumerate().skip(number).step_by(threads).collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_never_share_a_text_and_the_mix_is_as_asked() {
        for (threads, bulk, bulks) in [(1, 0.0, 0), (1, 1.0, 1), (4, 0.25, 1), (4, 0.5, 2), (10, 0.3, 3)] {
            let texts: Vec<String> = (0..64).map(|number| number.to_string()).collect();
            let dealt = deal(threads, bulk, 1, 32, &texts);
            assert_eq!(dealt.len(), threads);
            assert_eq!(dealt.iter().filter(|t| t.bulk).count(), bulks, "{threads} {bulk}");
            let all: BTreeMap<usize, String> = dealt.iter().flat_map(|t| t.texts.clone()).collect();
            assert!(all.len() == 64 && all.iter().all(|(row, text)| *text == row.to_string()));
            assert!(dealt.iter().all(|t| t.texts.len() >= 4 && t.batch == if t.bulk { 32 } else { 1 }));
        }
    }
}

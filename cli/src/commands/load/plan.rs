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
    /// Interactive requests of a thread in a second; one after the other when not said.
    pub(crate) rate: Option<f64>,
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
    /// Its texts, each with its row in the reference; none when it makes new ones.
    pub(crate) texts: Vec<(usize, String)>,
    /// It makes a new text for each that it sends.
    pub(crate) fresh: Option<Fresh>,
}

/// Texts that a thread makes itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fresh {
    /// Of its own, so that no other thread makes the same.
    pub(crate) seed: u64,
    pub(crate) tokens: usize,
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
    /// Texts computed before the end: those of requests that ended after it by the share of their time before it.
    pub(crate) texts_in_time: f64,
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

/// Deals texts to `threads` threads, of which the share `bulk` sends bulk requests, spread evenly. Bulk requests are of
/// `bulk_texts` (rows after those of `texts`) if there are any.
pub(crate) fn deal(
    threads: usize,
    bulk: f64,
    batch: usize,
    bulk_batch: usize,
    texts: &[String],
    bulk_texts: &[String],
) -> Vec<ThreadPlan> {
    (0..threads)
        .map(|number| {
            let before = (number as f64 * bulk).floor();
            let is_bulk = ((number + 1) as f64 * bulk).floor() > before;
            let (texts, before) = match is_bulk && !bulk_texts.is_empty() {
                true => (bulk_texts, texts.len()),
                false => (texts, 0),
            };
            let own = texts.iter().enumerate().skip(number).step_by(threads);
            ThreadPlan {
                bulk: is_bulk,
                batch: if is_bulk { bulk_batch } else { batch },
                texts: own.map(|(row, text)| (before + row, text.clone())).collect(),
                fresh: None,
            }
        })
        .collect()
}

/// Lets threads make a new text for each that they send.
pub(crate) fn make_fresh(threads: &mut [ThreadPlan], seed: u64, tokens: usize, bulk_tokens: usize) {
    for (number, thread) in threads.iter_mut().enumerate() {
        let seed = fresh_seed(seed, number as u64);
        thread.fresh = Some(Fresh { seed, tokens: if thread.bulk { bulk_tokens } else { tokens } });
        thread.texts = Vec::new();
    }
}

/// Far from each other for all threads of all seeds: a generator's next states are its seed plus small multiples.
fn fresh_seed(seed: u64, thread: u64) -> u64 {
    super::texts::mixed(super::texts::mixed(seed).wrapping_add(thread))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_never_share_a_text_and_the_mix_is_as_asked() {
        for (threads, bulk, bulks) in [(1, 0.0, 0), (1, 1.0, 1), (4, 0.25, 1), (4, 0.5, 2), (10, 0.3, 3)] {
            let texts: Vec<String> = (0..64).map(|number| number.to_string()).collect();
            let dealt = deal(threads, bulk, 1, 32, &texts, &[]);
            assert_eq!(dealt.len(), threads);
            assert_eq!(dealt.iter().filter(|t| t.bulk).count(), bulks, "{threads} {bulk}");
            let all: BTreeMap<usize, String> = dealt.iter().flat_map(|t| t.texts.clone()).collect();
            assert!(all.len() == 64 && all.iter().all(|(row, text)| *text == row.to_string()));
            assert!(dealt.iter().all(|t| t.texts.len() >= 4 && t.batch == if t.bulk { 32 } else { 1 }));
        }
    }

    #[test]
    fn bulk_texts_have_rows_of_their_own() {
        let texts: Vec<String> = (0..8).map(|number| number.to_string()).collect();
        let bulk_texts: Vec<String> = (8..16).map(|number| number.to_string()).collect();
        let dealt = deal(2, 0.5, 1, 2, &texts, &bulk_texts);
        for thread in dealt {
            assert_eq!(thread.texts.len(), 4);
            assert!(
                thread.texts.iter().all(|(row, text)| *text == row.to_string() && (*row >= 8) == thread.bulk)
            );
        }
    }

    #[test]
    fn threads_that_make_texts_have_seeds_of_their_own() {
        let texts: Vec<String> = (0..64).map(|number| number.to_string()).collect();
        let fresh = |seed| {
            let mut dealt = deal(4, 0.5, 1, 2, &texts, &[]);
            make_fresh(&mut dealt, seed, 16, 128);
            assert!(dealt.iter().all(|t| t.texts.is_empty()));
            let of = |t: &ThreadPlan| (t.bulk, t.fresh.expect("fresh"));
            dealt.iter().map(of).collect::<Vec<_>>()
        };
        let (first, second) = (fresh(1), fresh(2));
        assert!(first.iter().all(|(bulk, fresh)| fresh.tokens == if *bulk { 128 } else { 16 }));
        let seeds: std::collections::HashSet<u64> =
            first.iter().chain(&second).map(|(_, f)| f.seed).collect();
        assert_eq!(seeds.len(), 8);
    }
}

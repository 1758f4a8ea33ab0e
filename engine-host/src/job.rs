//! A job inside the engine: its texts as a private copy, what has been computed of it, and where its answer goes.
//! Nothing here computes, posts or waits.

use crate::batch::Output;
use crate::cache::{Cache, Vector};
use crate::compute::{ComputeError, ModelFacts};
use crate::lane::{Lane, Permit};
use crate::schedule::{Ask, Client, JobKey};
use shm_layout::cache::CacheKey;
use shm_layout::code::Code;
use shm_layout::lane::CheckedJob;
use shm_layout::payload::{EmbeddingRows, PayloadError, decode_texts, encode_embeddings, encode_token_spans};
use shm_layout::wire::{Operation, Priority};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of text that are taken for one token when cost is estimated.
const BYTES_PER_TOKEN: usize = 4;
/// Tokens that every text has: the special ones.
const SPECIAL_TOKENS: usize = 2;
/// Bytes of text whose tokenization costs as much as one token's way through a model.
const TOKENIZED_BYTES_PER_COST: usize = 256;

/// The texts of a job: one copy, checked.
#[derive(Debug)]
pub(crate) struct Texts {
    all: String,
    ends: Vec<usize>,
}

impl Texts {
    /// Checks a payload; `bytes` must be a private copy.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Texts, PayloadError> {
        let texts = decode_texts(bytes)?;
        let mut end = 0;
        let ends = texts
            .iter()
            .map(|text| {
                end += text.len();
                end
            })
            .collect();
        Ok(Texts { all: texts.concat(), ends })
    }

    /// Takes the first one away.
    pub(crate) fn split_first(mut self) -> (String, Texts) {
        let rest = self.all.split_off(self.ends.first().copied().unwrap_or_default());
        let first_bytes = self.all.len();
        let ends = self.ends.into_iter().skip(1).map(|end| end - first_bytes).collect();
        (self.all, Texts { all: rest, ends })
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// One of them.
    pub(crate) fn get(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.all[start..self.ends[index]]
    }

    /// Estimated cost of each, in units of about one token's way through the model; at least 1. Estimated, because
    /// tokens are counted only when the text's turn comes; the measured time per unit makes up for what is off.
    pub(crate) fn costs(
        &self,
        operation: Operation,
        query_bytes: usize,
        max_seq_tokens: usize,
    ) -> Arc<[u32]> {
        (0..self.len())
            .map(|index| {
                let len_bytes = query_bytes + self.get(index).len();
                let model = match operation {
                    Operation::Embed | Operation::Rank | Operation::Classify => {
                        (SPECIAL_TOKENS + len_bytes.div_ceil(BYTES_PER_TOKEN)).min(max_seq_tokens.max(1))
                    }
                    Operation::Tokenize | Operation::EmbedFresh | Operation::Call | Operation::Generate => 1,
                };
                // A text has at most MAX_TEXT_BYTES, so this fits.
                (model + len_bytes / TOKENIZED_BYTES_PER_COST) as u32
            })
            .collect()
    }
}

/// Where an answer goes.
#[derive(Debug)]
pub(crate) enum Origin {
    /// Into a lane.
    Lane {
        /// The lane; stays mapped until its last job is done.
        lane: Arc<Lane>,
        /// The lane's own view of the job: consumed by its one answer.
        job: CheckedJob,
    },
    /// To the broker, which relays it.
    Relay {
        /// The broker's name of the job.
        relay_id: u64,
        /// Set when nobody wants the answer any more.
        cancelled: Arc<AtomicBool>,
    },
}

/// Results so far.
#[derive(Debug)]
enum Gathered {
    /// Numbers, and for each vector whether it came from the cache.
    Rows(Vec<f32>, Vec<bool>),
    Spans(Vec<Vec<Range<usize>>>),
}

/// A job that was accepted. Owned by one place at a time, and consumed by its answer.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) key: JobKey,
    pub(crate) client: Client,
    pub(crate) origin: Origin,
    pub(crate) operation: Operation,
    pub(crate) priority: Priority,
    pub(crate) generation: u64,
    pub(crate) deadline_ns: u64,
    /// What each text is compared with.
    pub(crate) query: Option<String>,
    pub(crate) texts: Texts,
    /// Whether it must share no batch.
    pub(crate) isolated: bool,
    /// When it was taken, `CLOCK_MONOTONIC`.
    pub(crate) taken_ns: u64,
    /// When its first batch began.
    pub(crate) begun_ns: Option<u64>,
    /// Time in batches so far.
    pub(crate) execution_us: u64,
    /// What its texts are found by in the cache; empty when it is not to be used.
    pub(crate) keys: Vec<CacheKey>,
    /// For each text its vector, where the cache had it; as long as `keys`.
    pub(crate) known: Vec<Option<Vector>>,
    is_fresh: bool,
    costs: Arc<[u32]>,
    done_texts: usize,
    gathered: Gathered,
    _permit: Permit,
}

/// What the route says about a new job.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) client: Client,
    pub(crate) origin: Origin,
    /// Not `EmbedFresh`: that is `Embed` with `is_fresh`.
    pub(crate) operation: Operation,
    /// Compute it whatever the cache holds, and do not keep it.
    pub(crate) is_fresh: bool,
    pub(crate) priority: Priority,
    pub(crate) generation: u64,
    pub(crate) deadline_ns: u64,
    pub(crate) isolated: bool,
    pub(crate) taken_ns: u64,
    pub(crate) query: Option<String>,
    pub(crate) texts: Texts,
    pub(crate) permit: Permit,
}

impl Job {
    /// Takes a job on; the key is given when it is queued.
    pub(crate) fn new(arrival: Arrival, facts: &ModelFacts) -> Job {
        let query_bytes = arrival.query.as_ref().map_or(0, String::len);
        let costs = arrival.texts.costs(arrival.operation, query_bytes, facts.max_seq_tokens);
        let gathered = match arrival.operation {
            Operation::Tokenize => Gathered::Spans(Vec::new()),
            _ => Gathered::Rows(Vec::new(), Vec::new()),
        };
        Job {
            key: 0,
            client: arrival.client,
            origin: arrival.origin,
            operation: arrival.operation,
            priority: arrival.priority,
            generation: arrival.generation,
            deadline_ns: arrival.deadline_ns,
            query: arrival.query,
            texts: arrival.texts,
            isolated: arrival.isolated,
            taken_ns: arrival.taken_ns,
            begun_ns: None,
            execution_us: 0,
            keys: Vec::new(),
            known: Vec::new(),
            is_fresh: arrival.is_fresh,
            costs,
            done_texts: 0,
            gathered,
            _permit: arrival.permit,
        }
    }

    /// What the schedule must know; covers the texts that are not computed yet.
    pub(crate) fn ask(&self) -> Ask {
        Ask {
            key: self.key,
            client: self.client,
            priority: self.priority,
            generation: self.generation,
            deadline_ns: self.deadline_ns,
            isolated: self.isolated,
            costs: Arc::clone(&self.costs),
            next_text: self.done_texts,
        }
    }

    /// Whether nobody wants the answer any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        match &self.origin {
            Origin::Lane { lane, job } => lane.is_cancelled(job),
            Origin::Relay { cancelled, .. } => cancelled.load(Ordering::Relaxed),
        }
    }

    /// Whether there is nobody left who could be answered.
    pub(crate) fn is_abandoned(&self) -> bool {
        matches!(&self.origin, Origin::Lane { lane, .. } if lane.has_departed())
    }

    /// Whether its deadline is over.
    pub(crate) fn is_expired(&self, now_ns: u64) -> bool {
        self.deadline_ns != 0 && now_ns >= self.deadline_ns
    }

    /// Looks every text up; when all are found the job is complete, and nothing is to be computed.
    pub(crate) fn look_up(&mut self, cache: &Cache) -> Result<(), ComputeError> {
        if self.operation != Operation::Embed || self.is_fresh {
            return Ok(());
        }
        self.keys = (0..self.texts.len()).map(|text| CacheKey::of_text(self.texts.get(text))).collect();
        self.known = self.keys.iter().map(|key| cache.find(*key)).collect();
        if !self.known.iter().all(Option::is_some) {
            return Ok(());
        }
        let texts = self.known.len();
        cache.count(texts, 0, 0);
        let values = self.known.drain(..).flatten().flat_map(|row| row.to_vec()).collect();
        self.gather(Output::Rows { values, cached: vec![true; texts] }, texts)
    }

    /// Looks those texts of `range` up again that were not found when the job came: another job may have had them since.
    pub(crate) fn look_again(&mut self, cache: &Cache, range: &Range<usize>) {
        for text in range.clone() {
            if let (Some(none @ None), Some(key)) = (self.known.get_mut(text), self.keys.get(text)) {
                *none = cache.find(*key);
            }
        }
    }

    /// Adds the results of the next texts.
    pub(crate) fn gather(&mut self, output: Output, texts: usize) -> Result<(), ComputeError> {
        match (&mut self.gathered, output) {
            (Gathered::Rows(all, flags), Output::Rows { values, cached }) => {
                all.extend_from_slice(&values);
                flags.extend(cached);
            }
            (Gathered::Spans(all), Output::Spans(more)) => all.extend(more),
            _ => {
                return Err(ComputeError::new(
                    Code::Internal,
                    "the engine mixed up the results of two operations",
                ));
            }
        }
        self.done_texts += texts;
        Ok(())
    }

    /// Whether every text is computed.
    pub(crate) fn is_complete(&self) -> bool {
        self.done_texts == self.texts.len()
    }

    /// The answer's payload.
    pub(crate) fn encode(&mut self, facts: &ModelFacts) -> Vec<u8> {
        match &mut self.gathered {
            Gathered::Rows(values, cached) => encode_embeddings(&EmbeddingRows {
                dim: facts.dim,
                fingerprint: facts.fingerprint,
                cached: std::mem::take(cached),
                values: std::mem::take(values),
            }),
            Gathered::Spans(spans) => encode_token_spans(spans),
        }
    }

    /// Time between being taken and being computed, and time in batches, in µs.
    pub(crate) fn times_us(&self, now_ns: u64) -> (u32, u32) {
        let queue_us = self.begun_ns.unwrap_or(now_ns).saturating_sub(self.taken_ns) / 1000;
        let clamped = |us| u32::try_from(us).unwrap_or(u32::MAX);
        (clamped(queue_us), clamped(self.execution_us))
    }
}

/// The words that go with codes given out here. Short, and free of paths and of other clients' affairs.
pub(crate) fn message_of(code: Code) -> &'static str {
    match code {
        Code::DeadlineExceeded => "the deadline passed before the job was computed",
        Code::Cancelled => "the job was cancelled",
        Code::ModelUnavailable => {
            "the model of this lane or job is not loaded in the engine; acquire it again"
        }
        Code::JobCrashedEngine => "an engine died each time this job was running; it is not tried again",
        Code::Overloaded => {
            "the inputs of this client's unanswered jobs are over the limit; wait for answers first"
        }
        Code::ShuttingDown => "the engine is on its way out",
        Code::UnsupportedOperation => "this version does not know the operation, or not on this route",
        Code::WrongTask => {
            "the model is not for this: embedding models embed, rerankers and classifiers rank and classify, and text is \
             written by text-to-text and chat models; name another model"
        }
        Code::OutputTooSmall => "the answer does not fit into the room given for it; send fewer texts a job",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::payload::encode_texts;

    #[test]
    fn texts_are_cut_where_they_were() {
        let given = ["", "a", "grüße", "", "\u{1f600}\u{1f600}"];
        let texts = Texts::decode(&encode_texts(&given).unwrap()).unwrap();
        assert_eq!(texts.len(), given.len());
        assert_eq!((0..texts.len()).map(|i| texts.get(i)).collect::<Vec<_>>(), given);
        assert!(Texts::decode(b"nonsense").is_err());
        let (first, rest) = Texts::decode(&encode_texts(&given[1..]).unwrap()).unwrap().split_first();
        assert_eq!(first, "a");
        assert_eq!((0..rest.len()).map(|i| rest.get(i)).collect::<Vec<_>>(), given[2..]);
    }

    #[test]
    fn costs_are_bounded_by_the_model_and_count_tokenization() {
        let long = "x".repeat(400_000);
        let texts = Texts::decode(&encode_texts(&["", "sixteen bytes ab", &long]).unwrap()).unwrap();
        let embed = texts.costs(Operation::Embed, 0, 256);
        assert_eq!(embed[..2], [2, 6]);
        assert!(embed[2] > 256 && embed[2] < 256 + 2000);
        assert_eq!(texts.costs(Operation::Tokenize, 0, 256)[..2], [1, 1]);
    }
}

//! Computes one batch: from texts to checked vectors and token spans, with every failure contained. Knows no lane, no
//! queue, no clock.

use crate::cache::{Fresh, Vector};
use crate::compute::{Compute, ComputeError, ModelFacts};
use crate::job::Texts;
use shm_layout::cache::CacheKey;
use shm_layout::code::Code;
use shm_layout::wire::Operation;
use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Most tokens in one forward pass, unless a single text has more: bounds the activations in memory. The schedule's
/// budget is an estimate; this is counted.
pub(crate) const MAX_FORWARD_TOKENS: usize = 4096;

/// Texts of one job that are computed now.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    pub(crate) operation: Operation,
    /// What each text is compared with.
    pub(crate) query: Option<&'a str>,
    pub(crate) texts: &'a Texts,
    pub(crate) range: Range<usize>,
    /// What the job's texts are found by; empty = each is computed, and nothing is kept.
    pub(crate) keys: &'a [CacheKey],
    /// The job's vectors that need no computing; empty, or as long as `keys`.
    pub(crate) known: &'a [Option<Vector>],
}

/// What became of a part.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Output {
    /// One vector a text.
    Rows {
        /// Their numbers.
        values: Vec<f32>,
        /// For each whether it came from the cache.
        cached: Vec<bool>,
    },
    /// One list of spans a text.
    Spans(Vec<Vec<Range<usize>>>),
}

/// A computed batch.
#[derive(Debug)]
pub(crate) struct Computed {
    /// One a part, in order. An error here is that part's own and says nothing about the others.
    pub(crate) parts: Vec<Result<Output, ComputeError>>,
    /// Tokens that went through the model.
    pub(crate) tokens: u64,
    /// Texts that went through it, or were tokenized.
    pub(crate) texts: usize,
    /// Texts whose vectors were known.
    pub(crate) found: usize,
    /// Texts that took part in another's computation: the same text, in this batch.
    pub(crate) shared: usize,
    /// What was computed and may be kept; every number is finite.
    pub(crate) fresh: Vec<Fresh>,
}

/// Where a text's vector comes from.
enum Source<'a> {
    Known(&'a [f32]),
    /// The place among the texts that are computed.
    Computed(usize),
}

/// What of a batch must go through the model: each text once, however many ask for it.
#[derive(Default)]
struct Plan<'a> {
    /// What goes through the model: texts, or pairs with a query.
    texts: Vec<(Option<&'a str>, &'a str)>,
    keys: Vec<Option<CacheKey>>,
    sources: Vec<Source<'a>>,
    found: usize,
    shared: usize,
}

impl<'a> Plan<'a> {
    fn of(parts: &'a [Part<'a>]) -> Plan<'a> {
        let mut plan = Plan::default();
        let mut places: HashMap<CacheKey, usize> = HashMap::new();
        for part in parts.iter().filter(|part| part.operation != Operation::Tokenize) {
            for text in part.range.clone() {
                if let Some(Some(vector)) = part.known.get(text) {
                    plan.found += 1;
                    plan.sources.push(Source::Known(vector));
                    continue;
                }
                let key = part.keys.get(text).copied();
                if let Some(place) = key.and_then(|key| places.get(&key)) {
                    plan.shared += 1;
                    plan.sources.push(Source::Computed(*place));
                    continue;
                }
                let place = plan.texts.len();
                plan.texts.push((part.query, part.texts.get(text)));
                plan.keys.push(key);
                plan.sources.push(Source::Computed(place));
                key.map(|key| places.insert(key, place));
            }
        }
        plan
    }
}

/// The batch as a whole failed; which of its jobs is to blame is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BatchError {
    /// The model panicked.
    #[error("the computation panicked")]
    Panicked,
    /// The model refused.
    #[error(transparent)]
    Failed(#[from] ComputeError),
}

impl BatchError {
    /// What a client is told whose job was alone in the batch.
    pub(crate) fn to_compute_error(&self) -> ComputeError {
        match self {
            BatchError::Panicked => {
                ComputeError::new(Code::Internal, "the computation of this input failed inside the engine")
            }
            BatchError::Failed(error) => error.clone(),
        }
    }
}

/// Computes the parts. `breaks` is called in between by threads that compute.
pub(crate) fn compute<C: Compute>(
    model: &C,
    facts: &ModelFacts,
    parts: &[Part<'_>],
    breaks: &(dyn Fn() + Sync),
) -> Result<Computed, BatchError> {
    // A model has no state that a panic can leave half changed: `probe` is asked before it is used again.
    catch_unwind(AssertUnwindSafe(|| compute_uncaught(model, facts, parts, breaks)))
        .map_err(|_| BatchError::Panicked)?
}

/// Whether the model still computes what it should.
pub(crate) fn probe<C: Compute>(model: &C) -> Result<(), ComputeError> {
    catch_unwind(AssertUnwindSafe(|| model.probe()))
        .unwrap_or_else(|_| Err(ComputeError::new(Code::Internal, "the probe panicked")))
}

fn compute_uncaught<C: Compute>(
    model: &C,
    facts: &ModelFacts,
    parts: &[Part<'_>],
    breaks: &(dyn Fn() + Sync),
) -> Result<Computed, BatchError> {
    let plan = Plan::of(parts);
    let (values, tokens) = forward_all(model, facts, &plan.texts, breaks)?;
    let row = |place: usize| &values[place * facts.dim..(place + 1) * facts.dim];
    let is_finite = |row: &[f32]| row.iter().all(|value| value.is_finite());
    let fresh = plan.keys.iter().enumerate().filter_map(|(place, key)| {
        let row = row(place);
        is_finite(row).then_some(((*key)?, Vector::from(row)))
    });
    let fresh = fresh.collect();
    let mut sources = plan.sources.iter();
    let tokenized: usize =
        parts.iter().filter(|part| part.operation == Operation::Tokenize).map(|part| part.range.len()).sum();
    let parts = parts
        .iter()
        .map(|part| match part.operation {
            Operation::Tokenize => {
                let spans = part.range.clone().map(|text| model.token_spans(part.texts.get(text)));
                spans.collect::<Result<_, _>>().map(Output::Spans)
            }
            _ => {
                let mut values = Vec::with_capacity(part.range.len() * facts.dim);
                let mut cached = Vec::with_capacity(part.range.len());
                for source in sources.by_ref().take(part.range.len()) {
                    let (row, is_known) = match source {
                        Source::Known(row) => (*row, true),
                        Source::Computed(place) => (row(*place), false),
                    };
                    values.extend_from_slice(row);
                    cached.push(is_known);
                }
                if is_finite(&values) {
                    Ok(Output::Rows { values, cached })
                } else {
                    Err(ComputeError::new(Code::BadResult, "a vector holds a number that is not finite"))
                }
            }
        })
        .collect();
    let (found, shared) = (plan.found, plan.shared);
    let texts = plan.texts.len() + tokenized;
    Ok(Computed { parts, tokens, texts, found, shared, fresh })
}

/// Vectors of all texts, and the tokens they have.
fn forward_all<C: Compute>(
    model: &C,
    facts: &ModelFacts,
    texts: &[(Option<&str>, &str)],
    breaks: &(dyn Fn() + Sync),
) -> Result<(Vec<f32>, u64), ComputeError> {
    if texts.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let contradiction = || {
        ComputeError::new(Code::Internal, "the model gave another number of results than it was asked for")
    };
    let mut prepared = Vec::with_capacity(texts.len());
    for alike in texts.chunk_by(|a, b| a.0 == b.0) {
        let texts: Vec<&str> = alike.iter().map(|(_, text)| *text).collect();
        prepared.extend(match alike[0].0 {
            None => model.prepare(&texts)?,
            Some(query) => model.prepare_pairs(query, &texts)?,
        });
    }
    if prepared.len() != texts.len() {
        return Err(contradiction());
    }
    let mut values = Vec::with_capacity(texts.len() * facts.dim);
    let (mut from, mut total) = (0, 0);
    while from < prepared.len() {
        let (mut to, mut tokens) = (from, 0);
        while to < prepared.len() {
            let more = C::tokens(&prepared[to]);
            if to > from && tokens + more > MAX_FORWARD_TOKENS {
                break;
            }
            tokens += more;
            to += 1;
        }
        let pass: Vec<&C::Prepared> = prepared[from..to].iter().collect();
        let vectors = model.forward_with_breaks(&pass, breaks)?;
        if vectors.dim != facts.dim || vectors.values.len() != pass.len() * facts.dim {
            return Err(contradiction());
        }
        values.extend_from_slice(&vectors.values);
        total += tokens as u64;
        from = to;
    }
    Ok((values, total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::double::{Double, vector_of};
    use shm_layout::image::Task;

    fn part<'a>(operation: Operation, texts: &'a Texts, range: Range<usize>) -> Part<'a> {
        Part { operation, query: None, texts, range, keys: &[], known: &[] }
    }

    fn texts(texts: &[&str]) -> Texts {
        Texts::decode(&shm_layout::payload::encode_texts(texts).unwrap()).unwrap()
    }

    #[test]
    fn parts_get_what_they_would_get_alone() {
        let model = Double::default();
        let facts = model.facts();
        let (a, b) = (texts(&["one", "two words", ""]), texts(&["grüße an alle", "x"]));
        let long = texts(&["w ".repeat(3 * MAX_FORWARD_TOKENS).as_str()]);
        let parts = [
            part(Operation::Embed, &a, 1..3),
            part(Operation::Tokenize, &b, 0..2),
            part(Operation::Embed, &long, 0..1),
            part(Operation::Embed, &b, 0..1),
        ];
        let together = compute(&model, &facts, &parts, &|| {}).unwrap();
        let mut tokens = 0;
        for (index, part) in parts.into_iter().enumerate() {
            let alone = compute(&model, &facts, &[part], &|| {}).unwrap();
            assert_eq!(alone.parts[0], together.parts[index]);
            tokens += alone.tokens;
        }
        assert_eq!(together.tokens, tokens);
        let expected = b.get(0).split(' ').count();
        assert!(matches!(&together.parts[1], Ok(Output::Spans(spans)) if spans[0].len() == expected));
    }

    #[test]
    fn pairs_are_computed_beside_texts() {
        let model = Double { task: Task::Classify, ..Double::default() };
        let (a, b) = (texts(&["one", "two"]), texts(&["one"]));
        let parts = [
            Part { query: Some("q"), ..part(Operation::Rank, &a, 0..2) },
            part(Operation::Classify, &b, 0..1),
            Part { query: Some("r"), ..part(Operation::Rank, &a, 1..2) },
        ];
        let computed = compute(&model, &model.facts(), &parts, &|| {}).unwrap();
        let rows = |part: usize| match &computed.parts[part] {
            Ok(Output::Rows { values, .. }) => values.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(rows(0), [vector_of("q\u{1}one"), vector_of("q\u{1}two")].concat());
        assert_eq!((rows(1), rows(2)), (vector_of("one").to_vec(), vector_of("r\u{1}two").to_vec()));
        assert!(computed.fresh.is_empty());
    }

    #[test]
    fn failures_stay_inside() {
        let model = Double::default();
        let facts = model.facts();
        let bad = texts(&["fine", "NAN"]);
        let parts = [part(Operation::Embed, &bad, 0..1), part(Operation::Embed, &bad, 1..2)];
        let computed = compute(&model, &facts, &parts, &|| {}).unwrap();
        assert!(computed.parts[0].is_ok());
        assert_eq!(computed.parts[1].as_ref().unwrap_err().code, Code::BadResult);
        let panics = texts(&["PANIC"]);
        let outcome = compute(&model, &facts, &[part(Operation::Embed, &panics, 0..1)], &|| {});
        assert_eq!(outcome.unwrap_err(), BatchError::Panicked);
        let refuses = texts(&["REFUSE"]);
        let outcome = compute(&model, &facts, &[part(Operation::Embed, &refuses, 0..1)], &|| {});
        assert!(matches!(outcome, Err(BatchError::Failed(_))));
        assert_eq!(probe(&model), Ok(()));
    }
}

//! The door: what is asked of the engine becomes a job or a refusal with its code. Pure; both routes pass here.

use crate::compute::ModelFacts;
use crate::job::{Arrival, Job, Origin, Texts, message_of};
use crate::lane::Permit;
use crate::schedule::Client;
use shm_layout::code::Code;
use shm_layout::limits::{ISOLATE_AFTER_ATTEMPTS, MAX_JOB_ATTEMPTS};
use shm_layout::payload::embeddings_len_bytes;
use shm_layout::wire::{Operation, Priority, task_does};
use std::borrow::Cow;

/// What somebody asks for; nothing of it but its shape is checked.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) client: Client,
    pub(crate) origin: Origin,
    /// `None`: a number that this version does not know.
    pub(crate) operation: Option<Operation>,
    pub(crate) priority: Priority,
    pub(crate) generation: u64,
    pub(crate) deadline_ns: u64,
    /// Times it was running when an engine died.
    pub(crate) attempts: u32,
    pub(crate) output_capacity_bytes: usize,
    /// A private copy of the payload; `None`: the client holds too much already.
    pub(crate) input: Option<(Vec<u8>, Permit)>,
}

/// An offer that is not taken on, with what its sender is told.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) origin: Origin,
    pub(crate) code: Code,
    pub(crate) message: Cow<'static, str>,
}

impl Refused {
    /// A refusal whose words follow from its code.
    pub(crate) fn new(origin: Origin, code: Code) -> Refused {
        Refused { origin, code, message: Cow::Borrowed(message_of(code)) }
    }
}

/// Checks an offer against the model that it is for; `facts` is `None` when that is not loaded.
pub(crate) fn check(offer: Offer, facts: Option<&ModelFacts>, now_ns: u64) -> Result<Job, Refused> {
    let refuse = |origin, code| Err(Refused::new(origin, code));
    if offer.attempts >= MAX_JOB_ATTEMPTS {
        return refuse(offer.origin, Code::JobCrashedEngine);
    }
    let Some((bytes, permit)) = offer.input else { return refuse(offer.origin, Code::Overloaded) };
    let Some(operation) = offer.operation else { return refuse(offer.origin, Code::UnsupportedOperation) };
    let (operation, is_fresh) = match operation {
        Operation::EmbedFresh => (Operation::Embed, true),
        // Only provided models know it.
        Operation::Call => return refuse(offer.origin, Code::UnsupportedOperation),
        other => (other, false),
    };
    if offer.deadline_ns != 0 && now_ns >= offer.deadline_ns {
        return refuse(offer.origin, Code::DeadlineExceeded);
    }
    let Some(facts) = facts else { return refuse(offer.origin, Code::ModelUnavailable) };
    if operation == Operation::Generate {
        // Such jobs come over the socket, and have a queue of their own.
        return refuse(offer.origin, Code::UnsupportedOperation);
    }
    if !task_does(facts.task, operation) {
        return refuse(offer.origin, Code::WrongTask);
    }
    let texts = match Texts::decode(&bytes) {
        Ok(texts) => texts,
        Err(error) => {
            let (code, message) = (error.code(), Cow::Owned(error.to_string()));
            return Err(Refused { origin: offer.origin, code, message });
        }
    };
    let (query, texts) = match operation {
        Operation::Rank if texts.len() < 2 => return refuse(offer.origin, Code::EmptyInput),
        Operation::Rank => {
            let (query, texts) = texts.split_first();
            (Some(query), texts)
        }
        _ => (None, texts),
    };
    // Known before it is computed.
    if operation != Operation::Tokenize
        && embeddings_len_bytes(texts.len(), facts.dim) > offer.output_capacity_bytes
    {
        return refuse(offer.origin, Code::OutputTooSmall);
    }
    let job = Job::new(
        Arrival {
            client: offer.client,
            origin: offer.origin,
            operation,
            is_fresh,
            priority: offer.priority,
            generation: offer.generation,
            deadline_ns: offer.deadline_ns,
            isolated: offer.attempts >= ISOLATE_AFTER_ATTEMPTS,
            taken_ns: now_ns,
            query,
            texts,
            permit,
        },
        facts,
    );
    if job.is_cancelled() { refuse(job.origin, Code::Cancelled) } else { Ok(job) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::image::Task;
    use shm_layout::payload::encode_texts;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    const FACTS: ModelFacts =
        ModelFacts { task: Task::Embed, dim: 4, max_seq_tokens: 32, fingerprint: 9, identity: [9; 32] };

    fn offer(bytes: Vec<u8>) -> Offer {
        let held = Arc::new(AtomicUsize::new(0));
        let permit = Permit::acquire(&held, bytes.len(), usize::MAX).unwrap();
        Offer {
            client: Client::Session(1),
            origin: Origin::Relay { relay_id: 1, cancelled: Arc::new(AtomicBool::new(false)) },
            operation: Some(Operation::Embed),
            priority: Priority::Bulk,
            generation: 1,
            deadline_ns: 0,
            attempts: 0,
            output_capacity_bytes: 1 << 20,
            input: Some((bytes, permit)),
        }
    }

    fn good() -> Offer {
        offer(encode_texts(&["a", "b"]).unwrap())
    }

    fn code(offer: Offer) -> Code {
        let refused = check(offer, Some(&FACTS), 100).unwrap_err();
        assert!(!refused.message.is_empty());
        refused.code
    }

    #[test]
    fn each_reason_has_its_code() {
        assert!(check(good(), Some(&FACTS), 100).is_ok());
        assert_eq!(check(good(), None, 100).unwrap_err().code, Code::ModelUnavailable);
        assert_eq!(code(offer(vec![1, 2, 3])), Code::BadPayload);
        assert_eq!(code(offer(vec![0; 8])), Code::EmptyInput);
        assert_eq!(code(Offer { operation: None, ..good() }), Code::UnsupportedOperation);
        assert_eq!(
            code(Offer { operation: Some(Operation::Generate), ..good() }),
            Code::UnsupportedOperation
        );
        assert_eq!(code(Offer { operation: Some(Operation::Rank), ..good() }), Code::WrongTask);
        let ranks = ModelFacts { task: Task::Classify, ..FACTS };
        let rank = |texts: &[&str]| {
            let offer = Offer { operation: Some(Operation::Rank), ..offer(encode_texts(texts).unwrap()) };
            check(offer, Some(&ranks), 100)
        };
        assert_eq!(check(good(), Some(&ranks), 100).unwrap_err().code, Code::WrongTask);
        assert_eq!(rank(&["query"]).unwrap_err().code, Code::EmptyInput);
        let job = rank(&["query", "text"]).unwrap();
        assert_eq!((job.query.as_deref(), job.texts.len(), job.texts.get(0)), (Some("query"), 1, "text"));
        assert_eq!(code(Offer { deadline_ns: 100, ..good() }), Code::DeadlineExceeded);
        assert!(check(Offer { deadline_ns: 101, ..good() }, Some(&FACTS), 100).is_ok());
        assert_eq!(code(Offer { attempts: MAX_JOB_ATTEMPTS, ..good() }), Code::JobCrashedEngine);
        assert_eq!(code(Offer { output_capacity_bytes: 8, ..good() }), Code::OutputTooSmall);
        assert_eq!(code(Offer { input: None, ..good() }), Code::Overloaded);
        let cancelled = Origin::Relay { relay_id: 1, cancelled: Arc::new(AtomicBool::new(true)) };
        assert_eq!(code(Offer { origin: cancelled, ..good() }), Code::Cancelled);
    }

    #[test]
    fn suspects_are_isolated() {
        for (attempts, isolated) in [(0, false), (1, false), (2, true), (7, true)] {
            let job = check(Offer { attempts, ..good() }, Some(&FACTS), 100).unwrap();
            assert_eq!(job.isolated, isolated);
        }
    }

    #[test]
    fn permits_bound_and_return() {
        let held = Arc::new(AtomicUsize::new(0));
        let first = Permit::acquire(&held, 6, 10).unwrap();
        assert!(Permit::acquire(&held, 5, 10).is_none());
        assert!(Permit::acquire(&held, usize::MAX, 10).is_none());
        drop(first);
        assert!(Permit::acquire(&held, 10, 10).is_some());
    }
}

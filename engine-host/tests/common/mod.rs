//! What the tests share: the broker's and the clients' side of an engine that computes with the double.
#![allow(dead_code, reason = "each test target uses its part")]

#[path = "../../src/double.rs"]
pub(crate) mod double;

use double::{Double, DoubleLoader};
use engine_host::{HostError, HostOptions, run_with};
use shm_layout::cache::{CacheGeometry, CacheWriter};
use shm_layout::code::Code;
use shm_layout::lane::{ClientLane, Geometry, JobRequest, SubmitError, Ticket};
use shm_layout::payload::{decode_embeddings, encode_texts};
use shm_layout::wire::{BackingKind, CacheDescription, FromEngine, JobFrame, Operation, Priority, ToEngine};
use shm_os::cache_mapping::CacheWriteMapping;
use shm_os::framed::FramedStream;
use shm_os::lane_mapping::LaneMapping;
use shm_os::{Doorbell, socket};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Nothing here takes so long, unless it never comes.
pub(crate) const LONG: Duration = Duration::from_secs(30);

/// The broker's end of a link.
pub(crate) struct Broker {
    pub(crate) stream: FramedStream,
    inbox: Vec<FromEngine>,
}

impl Broker {
    pub(crate) fn new(link: OwnedFd) -> Broker {
        Broker { stream: FramedStream::new(link).unwrap(), inbox: Vec::new() }
    }

    pub(crate) fn send(&mut self, message: &ToEngine, fds: Vec<OwnedFd>) {
        self.stream.send(0, message, fds, LONG).unwrap();
    }

    /// The next message that `is` accepts; others wait for their turn.
    pub(crate) fn expect(&mut self, mut is: impl FnMut(&FromEngine) -> bool) -> FromEngine {
        if let Some(at) = self.inbox.iter().position(&mut is) {
            return self.inbox.remove(at);
        }
        loop {
            let (_, message) = self.stream.receive(LONG).unwrap().expect("the engine says nothing");
            if is(&message) {
                return message;
            }
            self.inbox.push(message);
        }
    }

    /// Whether such a message has come, after everything that the engine sent up to now was read.
    pub(crate) fn has(&mut self, is: impl FnMut(&FromEngine) -> bool) -> bool {
        self.send(&ToEngine::Totals, vec![]);
        self.expect(|message| matches!(message, FromEngine::Totals(_)));
        self.inbox.iter().any(is)
    }

    pub(crate) fn load(&mut self, generation: u64) {
        self.load_sized(generation, 1);
        self.expect(|message| *message == FromEngine::ModelReady { generation });
    }

    pub(crate) fn load_sized(&mut self, generation: u64, image_bytes: u64) {
        let image = std::fs::File::open("/dev/null").unwrap().into();
        let backing = BackingKind::SealedMemfd;
        self.send(&ToEngine::LoadModel { generation, image_bytes, backing, cache: None }, vec![image]);
    }

    pub(crate) fn add_lane(&mut self, client: &Client, generation: u64) {
        let fds = vec![client.region.try_clone().unwrap(), client.bell.as_fd().try_clone_to_owned().unwrap()];
        let message = ToEngine::AddLane { lane_id: client.lane_id, generation };
        // An engine may have died of what an earlier lane holds.
        let _ = self.stream.send(0, &message, fds, LONG);
    }

    pub(crate) fn drop_lane(&mut self, lane_id: u64) {
        self.send(&ToEngine::DropLane { lane_id }, vec![]);
    }

    pub(crate) fn job(&mut self, relay_id: u64, attempts: u32, operation: Operation, texts: &[&str]) {
        let payload = encode_texts(texts).unwrap();
        let job = JobFrame {
            lease_id: 0,
            job_id: 0,
            operation,
            priority: Priority::Interactive,
            deadline_ns: 0,
            payload,
        };
        self.send(&ToEngine::Job { relay_id, session_id: 1, generation: 1, attempts, job }, vec![]);
    }

    pub(crate) fn answer(&mut self, relay_id: u64) -> (Code, Vec<u8>) {
        let is = |m: &FromEngine| matches!(m, FromEngine::Answer(answer) if answer.job_id == relay_id);
        match self.expect(is) {
            FromEngine::Answer(answer) => (answer.status, answer.payload),
            other => panic!("{other:?}"),
        }
    }
}

/// A client's end of a lane.
pub(crate) struct Client {
    pub(crate) lane_id: u64,
    pub(crate) lane: ClientLane<LaneMapping>,
    pub(crate) region: OwnedFd,
    pub(crate) bell: Doorbell,
    asked: HashMap<Ticket, Vec<String>>,
    pub(crate) answers: HashMap<Ticket, (Code, Vec<u8>)>,
}

impl Client {
    pub(crate) fn new(lane_id: u64) -> Client {
        let (region, mapping) = LaneMapping::create(lane_id).unwrap();
        Client {
            lane_id,
            lane: ClientLane::new(mapping, Geometry::V1).unwrap(),
            region,
            bell: Doorbell::new().unwrap(),
            asked: HashMap::new(),
            answers: HashMap::new(),
        }
    }

    pub(crate) fn raw(&mut self, request: &JobRequest<'_>) -> Result<Ticket, SubmitError> {
        let ticket = self.lane.submit(request)?;
        if self.lane.needs_doorbell() {
            self.bell.ring().unwrap();
        }
        Ok(ticket)
    }

    pub(crate) fn try_submit(
        &mut self,
        operation: Operation,
        priority: Priority,
        deadline_ns: u64,
        texts: &[&str],
    ) -> Result<Ticket, SubmitError> {
        let payload = encode_texts(texts).unwrap();
        let ticket = self.raw(&JobRequest {
            operation,
            priority,
            deadline_ns,
            input: &[&payload],
            output_capacity_bytes: 4096,
        })?;
        self.asked.insert(ticket, texts.iter().map(|text| (*text).to_owned()).collect());
        Ok(ticket)
    }

    pub(crate) fn embed(&mut self, priority: Priority, texts: &[&str]) -> Ticket {
        self.try_submit(Operation::Embed, priority, 0, texts).unwrap()
    }

    /// Takes what is there; panics when a job is answered twice.
    pub(crate) fn reap(&mut self) -> usize {
        let answers = &mut self.answers;
        self.lane
            .reap(usize::MAX, |completion, output| {
                let before = answers.insert(completion.ticket, (completion.status, output.to_vec()));
                assert!(before.is_none(), "answered twice: {completion:?}");
            })
            .unwrap()
    }

    /// Sleeps until something is answered, or for `slice`.
    pub(crate) fn wait(&mut self, slice: Duration) -> usize {
        if let Some(tail) = self.lane.prepare_wait() {
            self.lane.memory().wait_completion(tail, slice).unwrap();
        }
        self.reap()
    }

    pub(crate) fn answer(&mut self, ticket: Ticket) -> (Code, Vec<u8>) {
        let until = Instant::now() + LONG;
        while !self.answers.contains_key(&ticket) {
            assert!(Instant::now() < until, "no answer to {ticket:?}");
            self.wait(Duration::from_millis(50));
        }
        self.answers[&ticket].clone()
    }

    pub(crate) fn code(&mut self, ticket: Ticket) -> Code {
        self.answer(ticket).0
    }

    pub(crate) fn wait_for_all(&mut self) {
        let until = Instant::now() + LONG;
        while self.lane.in_flight() > 0 {
            assert!(Instant::now() < until, "{} jobs without an answer", self.lane.in_flight());
            self.wait(Duration::from_millis(50));
        }
    }

    /// Every job that was answered with Ok got what the double computes for its texts.
    pub(crate) fn check_vectors(&self) {
        for (ticket, (code, payload)) in &self.answers {
            if *code == Code::Ok
                && let Some(texts) = self.asked.get(ticket)
            {
                check_rows(payload, texts);
            }
        }
    }
}

pub(crate) fn check_rows<T: AsRef<str>>(payload: &[u8], texts: &[T]) {
    let rows = decode_embeddings(payload, texts.len()).unwrap();
    assert_eq!((rows.dim, rows.fingerprint), (double::DIM, double::FINGERPRINT));
    for (row, text) in rows.values.chunks(double::DIM).zip(texts) {
        assert_eq!(row, double::vector_of(text.as_ref()), "{:?}", text.as_ref());
    }
}

/// An engine on a thread of this process, with model 1 loaded.
pub(crate) struct Rig {
    pub(crate) broker: Broker,
    pub(crate) model: Double,
    engine: JoinHandle<Result<(), HostError>>,
}

impl Rig {
    pub(crate) fn start() -> Rig {
        Rig::start_keeping(None)
    }

    /// As [`Rig::start`], keeping vectors in a folder.
    pub(crate) fn start_keeping(vectors_dir: Option<PathBuf>) -> Rig {
        let model = Double::default();
        let (ours, theirs) = socket::socketpair().unwrap();
        let loader = DoubleLoader { model: model.clone() };
        let options = HostOptions { threads: 2, dumpable: true, vectors_dir };
        let engine = std::thread::spawn(move || run_with(theirs, loader, options));
        let mut broker = Broker::new(ours);
        broker.expect(|message| *message == FromEngine::Ready { threads: 2 });
        broker.load(1);
        Rig { broker, model, engine }
    }

    pub(crate) fn client(&mut self, lane_id: u64) -> Client {
        let client = Client::new(lane_id);
        self.broker.add_lane(&client, 1);
        client
    }

    /// The engine's own end.
    pub(crate) fn outcome(self) -> Result<(), HostError> {
        self.engine.join().unwrap()
    }

    /// Closes the link and gives the engine's end.
    pub(crate) fn hang_up(self) -> Result<(), HostError> {
        drop(self.broker);
        self.engine.join().unwrap()
    }
}

/// The model that has a cache; the rig's own has none.
pub(crate) const CACHED: u64 = 2;

/// A cache as the broker makes it, and the message that hands it over.
pub(crate) fn cache(fingerprint: u64) -> (CacheWriter<CacheWriteMapping>, ToEngine, Vec<OwnedFd>) {
    let geometry = CacheGeometry::for_entries(100, double::DIM).unwrap();
    let (mapping, fd) = CacheWriteMapping::create(geometry.region_bytes()).unwrap();
    let writer = CacheWriter::create(mapping, geometry, 100, fingerprint).unwrap();
    let cache = Some(CacheDescription { region_bytes: geometry.region_bytes() as u64 });
    let load =
        ToEngine::LoadModel { generation: CACHED, image_bytes: 1, backing: BackingKind::SealedMemfd, cache };
    let image = std::fs::File::open("/dev/null").unwrap().into();
    (writer, load, vec![image, fd])
}

//! A broker and its engine inside the test process: a real peer that keeps to the protocol and computes a deterministic
//! embedding, and that can be told to misbehave. Nothing of the SDK's insides is used here.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use shm_layout::code::Code;
use shm_layout::image::Task;
use shm_layout::lane::{CONTROL_FIELDS, EngineLane, Geometry, LaneMemory, REGION_BYTES};
use shm_layout::payload::{EmbeddingRows, decode_texts, encode_embeddings, encode_token_spans};
use shm_layout::table::offset_of;
use shm_layout::wire::*;
use shm_os::framed::{Fill, FramedStream};
use shm_os::lane_mapping::LaneMapping;
use shm_os::socket::{Listener, bind_listener};
use shm_os::{Doorbell, Interest, Poller};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub(crate) const DIM: usize = 6;
pub(crate) const FINGERPRINT: u64 = 0xfeed;

/// The embedding that the peer computes.
pub(crate) fn vector(text: &str, fingerprint: u64) -> Vec<f32> {
    let mut hash = fingerprint ^ 0xcbf2_9ce4_8422_2325;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    (0..DIM).map(|i| ((hash >> (8 * i)) & 0xff) as f32 / 256.0).collect()
}

/// Fails unless each row is the vector of its text.
pub(crate) fn assert_right<T: AsRef<str>>(texts: &[T], rows: &worker_sdk::Embeddings) {
    assert_eq!(rows.len(), texts.len());
    for (text, row) in texts.iter().zip(rows) {
        assert_eq!(row, vector(text.as_ref(), rows.fingerprint()));
    }
}

/// A compiled model, read-only.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) fd: OwnedFd,
    pub(crate) description: ModelDescription,
}

/// How the peer is to behave; may be changed while it runs.
#[derive(Debug)]
pub(crate) struct Behaviour {
    /// Jobs are taken and not answered.
    pub(crate) hold: AtomicBool,
    /// So many jobs are answered with `Overloaded` first.
    pub(crate) overload: AtomicU32,
    /// So many answers are unreadable: of another dimension.
    pub(crate) wrong_dim: AtomicU32,
    /// So many lanes are broken by the engine: its index runs ahead.
    pub(crate) runaway: AtomicU32,
    /// So many lanes are broken by the engine: an answer is posted twice.
    pub(crate) duplicate: AtomicU32,
    /// Every job fails with this code; 0 = none.
    pub(crate) fail_with: AtomicU32,
    /// Leases are granted only when this is clear; progress is reported meanwhile.
    pub(crate) loading: AtomicBool,
    /// Leases are refused with this code; 0 = granted.
    pub(crate) refuse_lease: AtomicU32,
    pub(crate) fingerprint: AtomicU64,
    /// Protocol major number told.
    pub(crate) major: AtomicU32,
    /// Connections are closed as soon as a job is seen; counts down.
    pub(crate) drop_on_submit: AtomicU32,
    /// What leases of an image carry.
    pub(crate) image: Mutex<Option<Image>>,
    pub(crate) jobs: AtomicU64,
    pub(crate) cancels: AtomicU64,
    pub(crate) leases: AtomicU64,
    pub(crate) releases: AtomicU64,
    pub(crate) sessions: AtomicU64,
    pub(crate) open_sessions: AtomicU64,
    pub(crate) deadlines_seen: AtomicU64,
}

impl Default for Behaviour {
    fn default() -> Behaviour {
        Behaviour {
            hold: AtomicBool::default(),
            overload: AtomicU32::default(),
            wrong_dim: AtomicU32::default(),
            runaway: AtomicU32::default(),
            duplicate: AtomicU32::default(),
            fail_with: AtomicU32::default(),
            loading: AtomicBool::default(),
            refuse_lease: AtomicU32::default(),
            fingerprint: AtomicU64::new(FINGERPRINT),
            major: AtomicU32::new(u32::from(PROTOCOL_MAJOR)),
            drop_on_submit: AtomicU32::default(),
            image: Mutex::default(),
            jobs: AtomicU64::default(),
            cancels: AtomicU64::default(),
            leases: AtomicU64::default(),
            releases: AtomicU64::default(),
            sessions: AtomicU64::default(),
            open_sessions: AtomicU64::default(),
            deadlines_seen: AtomicU64::default(),
        }
    }
}

fn take_one(counter: &AtomicU32) -> bool {
    counter.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok()
}

impl Behaviour {
    /// The answer to one job.
    fn answer(&self, operation: Option<Operation>, deadline_ns: u64, input: &[u8]) -> (Code, Vec<u8>) {
        self.jobs.fetch_add(1, SeqCst);
        if deadline_ns != 0 {
            self.deadlines_seen.fetch_add(1, SeqCst);
        }
        if take_one(&self.overload) {
            return (Code::Overloaded, b"the queue is full".to_vec());
        }
        if let Some(code) = Code::from_number(self.fail_with.load(SeqCst)).filter(|code| *code != Code::Ok) {
            return (code, b"told to fail".to_vec());
        }
        let texts = match decode_texts(input) {
            Ok(texts) => texts,
            Err(error) => return (error.code(), error.to_string().into_bytes()),
        };
        match operation {
            Some(Operation::Embed | Operation::EmbedFresh) => {
                let fingerprint = self.fingerprint.load(SeqCst);
                let mut rows = EmbeddingRows {
                    dim: DIM,
                    fingerprint,
                    cached: texts.iter().map(|text| text.starts_with("cached")).collect(),
                    values: texts.iter().flat_map(|text| vector(text, fingerprint)).collect(),
                };
                if take_one(&self.wrong_dim) {
                    rows.dim = DIM / 2;
                    rows.values.truncate(texts.len() * rows.dim);
                }
                (Code::Ok, encode_embeddings(&rows))
            }
            Some(Operation::Tokenize) => {
                // A token is a word; a text of z's has more tokens than bytes, as odd scripts can.
                let spans: Vec<Vec<_>> = texts
                    .iter()
                    .map(|text| {
                        let mut at = 0;
                        let words = text.split(' ').map(|word| {
                            let span = at..at + word.len();
                            at += word.len() + 1;
                            span
                        });
                        let words: Vec<_> = words.filter(|span| !span.is_empty()).collect();
                        if text.starts_with('z') {
                            (0..3 * text.len() + 999).map(|_| 0..1).collect()
                        } else {
                            words
                        }
                    })
                    .collect();
                (Code::Ok, encode_token_spans(&spans))
            }
            _ => (Code::UnsupportedOperation, Vec::new()),
        }
    }
}

/// A running peer; dropping it is its death.
pub(crate) struct Peer {
    pub(crate) behaviour: Arc<Behaviour>,
    stop: Arc<AtomicBool>,
    bell: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
    pub(crate) socket: PathBuf,
}

/// A folder of the test's own and the socket's path in it.
pub(crate) fn place() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("run").join("broker.sock");
    (folder, socket)
}

impl Peer {
    pub(crate) fn start(socket: &Path) -> Peer {
        Peer::start_with(socket, Arc::default())
    }

    pub(crate) fn start_with(socket: &Path, behaviour: Arc<Behaviour>) -> Peer {
        let listener = bind_listener(socket).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (stop, bell) = (Arc::new(AtomicBool::new(false)), Arc::new(Doorbell::new().unwrap()));
        let broker = Broker {
            listener,
            bell: Arc::clone(&bell),
            stop: Arc::clone(&stop),
            behaviour: Arc::clone(&behaviour),
            poller: Poller::new().unwrap(),
            connections: HashMap::new(),
            boot_id: shm_os::process::monotonic_ns(),
            next: 10,
        };
        let thread = Some(std::thread::spawn(move || broker.run()));
        Peer { behaviour, stop, bell, thread, socket: socket.to_owned() }
    }

    /// Dies: all connections and lanes are gone when this returns.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    pub(crate) fn wait(mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    fn end(&mut self) {
        self.stop.store(true, SeqCst);
        self.bell.ring().unwrap();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    pub(crate) fn client(&self) -> worker_sdk::Client {
        client(&self.socket)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

pub(crate) fn client(socket: &Path) -> worker_sdk::Client {
    worker_sdk::Client::builder()
        .socket(socket)
        .start_broker(worker_sdk::StartBroker::Never)
        .name("test")
        .connect()
        .unwrap()
}

struct LaneThread {
    stop: Arc<AtomicBool>,
    bell: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for LaneThread {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        self.bell.ring().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Connection {
    stream: FramedStream,
    lanes: HashMap<u64, LaneThread>,
    waiting_leases: Vec<(u64, Acquire)>,
    held: Vec<JobFrame>,
}

struct Broker {
    listener: Listener,
    bell: Arc<Doorbell>,
    stop: Arc<AtomicBool>,
    behaviour: Arc<Behaviour>,
    poller: Poller,
    connections: HashMap<u64, Connection>,
    boot_id: u64,
    next: u64,
}

impl Broker {
    fn run(mut self) {
        self.poller.add(&self.listener, 0, Interest::READABLE).unwrap();
        self.poller.add(&*self.bell, 1, Interest::DOORBELL).unwrap();
        let mut events = Vec::new();
        while !self.stop.load(SeqCst) {
            let busy = self.connections.values().any(|c| !c.held.is_empty() || !c.waiting_leases.is_empty());
            let timeout = busy.then_some(Duration::from_millis(2));
            self.poller.wait(&mut events, timeout).unwrap();
            for event in events.clone() {
                match event.token {
                    0 => {
                        while let Some(connection) = self.listener.accept().unwrap() {
                            let stream = FramedStream::new(connection.into()).unwrap();
                            self.next += 1;
                            self.poller.add(stream.as_fd(), self.next, Interest::READABLE).unwrap();
                            let connection = Connection {
                                stream,
                                lanes: HashMap::new(),
                                waiting_leases: vec![],
                                held: vec![],
                            };
                            self.connections.insert(self.next, connection);
                            self.behaviour.sessions.fetch_add(1, SeqCst);
                            self.behaviour.open_sessions.fetch_add(1, SeqCst);
                        }
                    }
                    1 => {}
                    token => self.serve(token),
                }
            }
            if busy {
                let tokens: Vec<u64> = self.connections.keys().copied().collect();
                tokens.into_iter().for_each(|token| self.tick(token));
            }
        }
    }

    fn serve(&mut self, token: u64) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        let filled = connection.stream.fill();
        let mut keep = matches!(filled, Ok(Fill::Open));
        while let Ok(Some((head, body))) = connection.stream.next_frame() {
            let message: ClientMessage = decode_body(&body).unwrap();
            keep &= self.handle(&mut connection, head.request_id, message);
        }
        if keep {
            self.connections.insert(token, connection);
        } else {
            self.poller.remove(connection.stream.as_fd()).unwrap();
            self.behaviour.open_sessions.fetch_sub(1, SeqCst);
        }
    }

    fn tick(&mut self, token: u64) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        for (id, acquire) in std::mem::take(&mut connection.waiting_leases) {
            self.lease(&mut connection, id, acquire);
        }
        if !self.behaviour.hold.load(SeqCst) {
            for job in std::mem::take(&mut connection.held) {
                self.submit(&mut connection, job);
            }
        }
        self.connections.insert(token, connection);
    }

    fn handle(&mut self, connection: &mut Connection, id: u64, message: ClientMessage) -> bool {
        let long = Duration::from_secs(20);
        let stream = &mut connection.stream;
        match message {
            // This peer knows nothing of providers.
            ClientMessage::Provide(_) | ClientMessage::ProviderAnswer(_) | ClientMessage::Withdraw { .. } => {
                false
            }
            ClientMessage::Hello(hello) => {
                assert_eq!(hello.layout_hash, shm_layout::lane::LAYOUT_HASH);
                let welcome = Welcome {
                    protocol_major: self.behaviour.major.load(SeqCst) as u16,
                    protocol_minor: PROTOCOL_MINOR,
                    session_id: id,
                    boot_id: self.boot_id,
                    broker_pid: std::process::id(),
                    version: "9.9.9".into(),
                };
                stream.send(id, &BrokerMessage::Welcome(welcome), vec![], long).is_ok()
            }
            ClientMessage::Acquire(acquire) => {
                self.lease(connection, id, acquire);
                true
            }
            ClientMessage::Release { lease_id } => {
                connection.lanes.remove(&lease_id);
                self.behaviour.releases.fetch_add(1, SeqCst);
                stream.send(id, &BrokerMessage::Released, vec![], long).is_ok()
            }
            ClientMessage::Submit(job) => {
                if take_one(&self.behaviour.drop_on_submit) {
                    return false;
                }
                self.submit(connection, job);
                true
            }
            ClientMessage::Cancel { job_id } => {
                self.behaviour.cancels.fetch_add(1, SeqCst);
                if let Some(at) = connection.held.iter().position(|job| job.job_id == job_id) {
                    connection.held.remove(at);
                    let answer = AnswerFrame {
                        job_id,
                        status: Code::Cancelled,
                        payload: vec![],
                        queue_us: 0,
                        execution_us: 0,
                    };
                    return stream.send(0, &BrokerMessage::Answer(answer), vec![], long).is_ok();
                }
                true
            }
            ClientMessage::Status => {
                let report = StatusReport {
                    version: "9.9.9".into(),
                    broker_pid: std::process::id(),
                    boot_id: self.boot_id,
                    uptime_us: 1,
                    default_model: "test".into(),
                    models: vec![],
                    engines: vec![],
                    sessions: vec![],
                    faults: 0,
                    provided: vec![],
                    open_descriptors: 0,
                    metrics: Default::default(),
                    alerts: vec![],
                };
                stream.send(id, &BrokerMessage::Status(report), vec![], long).is_ok()
            }
            ClientMessage::Shutdown { .. } => {
                let _ = stream.send(id, &BrokerMessage::ShuttingDown, vec![], long);
                self.stop.store(true, SeqCst);
                true
            }
            ClientMessage::ReloadConfiguration => {
                let answer = BrokerMessage::ConfigurationReloaded(Default::default());
                stream.send(id, &answer, vec![], long).is_ok()
            }
            ClientMessage::Ping => stream.send(id, &BrokerMessage::Pong, vec![], long).is_ok(),
            ClientMessage::Model(_) => {
                let message = "this peer knows no orders".to_owned();
                let refusal = Refusal { code: Code::UnsupportedOperation, message, retry_after_ms: 0 };
                stream.send(id, &BrokerMessage::Refused(refusal), vec![], long).is_ok()
            }
        }
    }

    fn lease(&mut self, connection: &mut Connection, id: u64, acquire: Acquire) {
        let long = Duration::from_secs(20);
        if let Some(code) =
            Code::from_number(self.behaviour.refuse_lease.load(SeqCst)).filter(|c| *c != Code::Ok)
        {
            let message = format!("{} is not to be had", acquire.model);
            let refusal = BrokerMessage::Refused(Refusal { code, message, retry_after_ms: 0 });
            return connection.stream.send(id, &refusal, vec![], long).unwrap();
        }
        if self.behaviour.loading.load(SeqCst) {
            let progress = LoadProgress { stage: "load".into(), done_bytes: 1, total_bytes: 2 };
            let _ = connection.stream.send(id, &BrokerMessage::Progress(progress), vec![], long);
            return connection.waiting_leases.push((id, acquire));
        }
        self.next += 1;
        let lease_id = self.next;
        self.behaviour.leases.fetch_add(1, SeqCst);
        let mut fds = vec![];
        let mut lane = None;
        if acquire.want_lane {
            let (region, mapping) = LaneMapping::create(lease_id).unwrap();
            let doorbell = Doorbell::new().unwrap();
            fds.push(region);
            fds.push(doorbell.as_fd().try_clone_to_owned().unwrap());
            lane = Some(LaneDescription { lane_id: lease_id, region_bytes: REGION_BYTES });
            connection.lanes.insert(lease_id, serve_lane(mapping, doorbell, Arc::clone(&self.behaviour)));
        }
        let model = ModelDescription {
            model_id: if acquire.model.is_empty() { "test".into() } else { acquire.model },
            generation: 1,
            output_dim: DIM as u32,
            max_seq_tokens: 256,
            image_bytes: 1,
            fingerprint: self.behaviour.fingerprint.load(SeqCst),
            content_hash: [0; 32],
            backing: BackingKind::SealedMemfd,
            facts: TaskFacts::of(Task::Embed),
        };
        let image = self.behaviour.image.lock().unwrap();
        let image = image.as_ref().filter(|_| acquire.want_image);
        let model = image.map_or(model, |image| image.description.clone());
        fds.extend(image.map(|image| image.fd.try_clone().unwrap()));
        let leased = Leased { lease_id, model, lane, image: image.is_some(), cache: None };
        let _ = connection.stream.send(id, &BrokerMessage::Leased(leased), fds, long);
    }

    fn submit(&self, connection: &mut Connection, job: JobFrame) {
        if self.behaviour.hold.load(SeqCst) {
            return connection.held.push(job);
        }
        let (status, payload) = self.behaviour.answer(Some(job.operation), job.deadline_ns, &job.payload);
        let answer = AnswerFrame { job_id: job.job_id, status, payload, queue_us: 1, execution_us: 2 };
        let long = Duration::from_secs(20);
        let _ = connection.stream.send(0, &BrokerMessage::Answer(answer), vec![], long);
    }
}

fn serve_lane(mapping: LaneMapping, doorbell: Doorbell, behaviour: Arc<Behaviour>) -> LaneThread {
    let (stop, bell) = (Arc::new(AtomicBool::new(false)), Arc::new(Doorbell::new().unwrap()));
    let (stopped, woken) = (Arc::clone(&stop), Arc::clone(&bell));
    let thread = std::thread::spawn(move || {
        let poller = Poller::new().unwrap();
        poller.add(&doorbell, 0, Interest::DOORBELL).unwrap();
        poller.add(&*woken, 1, Interest::DOORBELL).unwrap();
        let (mut lane, _) = EngineLane::adopt(mapping, Geometry::V1).unwrap();
        let (mut jobs, mut events, mut input) = (Vec::new(), Vec::new(), Vec::new());
        while !stopped.load(SeqCst) {
            let more = lane.drain(16, &mut jobs).unwrap();
            if behaviour.hold.load(SeqCst) {
                jobs.retain(|job| {
                    if lane.is_cancelled(job) {
                        behaviour.cancels.fetch_add(1, SeqCst);
                    }
                    true
                });
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            for job in jobs.drain(..) {
                if lane.is_cancelled(&job) {
                    lane.complete(job, Code::Cancelled, b"", 0, 0).unwrap();
                    continue;
                }
                lane.read_input(&job, &mut input);
                let (status, output) = behaviour.answer(job.operation, job.deadline_ns, &input);
                if take_one(&behaviour.runaway) {
                    bump_tail(lane.memory(), 100_000);
                    return;
                }
                lane.complete(job, status, &output, 1, 2).unwrap();
                if take_one(&behaviour.duplicate) {
                    bump_tail(lane.memory(), 1);
                    return;
                }
            }
            if lane.needs_wake() {
                lane.memory().wake_client().unwrap();
            }
            if !more && lane.arm().unwrap() {
                poller.wait(&mut events, None).unwrap();
            }
        }
    });
    LaneThread { stop, bell, thread: Some(thread) }
}

/// Moves the completion tail as no correct engine does, and wakes the client to see it.
fn bump_tail(memory: &LaneMapping, by: u32) {
    let at = offset_of(CONTROL_FIELDS, "completion_tail");
    let tail = memory.load_u32(at, SeqCst);
    memory.store_u32(at, tail.wrapping_add(by), SeqCst);
    memory.wake_client().unwrap();
}

/// Polls until a condition holds; for effects that another thread has in its own time.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < until, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs a future to its end on this thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

/// Deterministic texts of many lengths.
pub(crate) fn texts(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("text {i} {}", "x".repeat(i * 37 % 300))).collect()
}

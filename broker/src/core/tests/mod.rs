//! A world around a core, without processes: it does what the core says, and remembers what clients were told.

mod lifecycle;
mod devices;
mod provided;
mod random;
mod reconfigure;
mod scripted;

use super::*;
use shm_layout::image::Task;
use shm_layout::lane::LAYOUT_HASH;
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::wire::TaskFacts;
use shm_layout::wire::{
    Acquire, AnswerFrame, BackingKind, CacheDescription, ClientMessage, FromEngine, Hello, JobFrame,
    Operation, PROTOCOL_MAJOR, Priority, Provide, ProviderJob, StatusReport,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const UID: u32 = 7;
const MS: u64 = 1_000_000;

/// Models stay for ever, as many as there are.
fn no_bounds() -> Policy {
    Policy {
        unload_after: Duration::ZERO,
        max_shared_models: 0,
        memory_budget_bytes: None,
        log_model_usage: true,
    }
}

fn config_with(limits: Limits, policy: Policy) -> CoreConfig {
    CoreConfig {
        default_model: "default".into(),
        limits,
        policy,
        models: Vec::new(),
        preload: Vec::new(),
        idle_exit: None,
        memory_monitoring: true,
        allow_other_users: false,
        caches: true,
        engine_saves: false,
        provider_models: Vec::new(),
        own_uid: UID,
        boot_id: 1,
        broker_pid: 1,
    }
}

fn facts(model_id: &str) -> ImageFacts {
    ImageFacts {
        model_id: model_id.into(),
        output_dim: 4,
        max_seq_tokens: 8,
        image_bytes: 4096,
        fingerprint: 1,
        content_hash: [1; 32],
        backing: BackingKind::SealedMemfd,
        facts: TaskFacts::of(Task::Embed),
        precision: "f32",
    }
}

fn hello() -> ClientMessage {
    ClientMessage::Hello(Hello {
        protocol_major: PROTOCOL_MAJOR,
        protocol_minor: 0,
        layout_hash: LAYOUT_HASH,
        client_name: "test".into(),
    })
}

fn acquire(model: &str, want_lane: bool, wait_ms: u32) -> ClientMessage {
    ClientMessage::Acquire(Acquire { model: model.into(), want_lane, want_image: !want_lane, wait_ms })
}

pub(super) fn offer(model_id: &str) -> Provide {
    Provide {
        model_id: model_id.into(),
        kind: "test".into(),
        description: "bytes to bytes".into(),
        input_kind: "bytes".into(),
        output_kind: "bytes".into(),
        fingerprint: 1,
        operations: vec![Operation::Call],
        output_dim: 0,
        max_seq_tokens: 0,
        max_in_flight: 2,
        max_input_bytes: 100,
        max_output_bytes: 100,
        job_timeout_ms: 1000,
    }
}

fn job(lease_id: u64, job_id: u64, deadline_ns: u64) -> ClientMessage {
    ClientMessage::Submit(JobFrame {
        lease_id,
        job_id,
        operation: Operation::Embed,
        priority: Priority::Bulk,
        deadline_ns,
        payload: vec![1; 10],
    })
}

/// What surrounds a core: it does what actions say, and remembers what clients were told.
struct World {
    core: Core,
    now_ns: u64,
    events: VecDeque<Event>,
    /// Frames each client was sent, by request id.
    told: BTreeMap<u64, Vec<(u64, BrokerMessage)>>,
    open: BTreeSet<u64>,
    lanes: BTreeSet<u64>,
    lanes_fail: bool,
    loaders: BTreeMap<u64, String>,
    loads: usize,
    offered: BTreeSet<u64>,
    images: BTreeSet<u64>,
    caches: BTreeSet<u64>,
    caches_fail: bool,
    /// Vectors that were put into caches: generation, bulk, how many.
    filled: Vec<(u64, bool, usize)>,
    /// Incarnation and inbox of the living engine.
    engine: Option<(u64, VecDeque<ToEngine>)>,
    engine_starts: bool,
    engines: usize,
    /// Processes of providers that run.
    processes: BTreeSet<usize>,
    /// Jobs that providers have and have not answered.
    given: BTreeMap<u64, VecDeque<ProviderJob>>,
    exited: bool,
    /// The configuration is being read.
    reading: bool,
    /// What caches were last told to hold.
    cache_entries: Option<usize>,
    available_bytes: Option<u64>,
    cached: Vec<(u64, u64)>,
    last_session: u64,
    last_request: u64,
}

impl World {
    fn new(limits: Limits) -> World {
        World::with(limits, no_bounds())
    }

    fn with(limits: Limits, policy: Policy) -> World {
        World::with_models(limits, policy, Vec::new(), Vec::new())
    }

    fn with_models(
        limits: Limits,
        policy: Policy,
        models: Vec<ModelSettings>,
        preload: Vec<String>,
    ) -> World {
        let config = CoreConfig { models, preload, ..config_with(limits, policy) };
        let mut world = World {
            core: Core::new(config, 0),
            now_ns: 1,
            events: VecDeque::new(),
            told: BTreeMap::new(),
            open: BTreeSet::new(),
            lanes: BTreeSet::new(),
            lanes_fail: false,
            loaders: BTreeMap::new(),
            loads: 0,
            offered: BTreeSet::new(),
            images: BTreeSet::new(),
            caches: BTreeSet::new(),
            caches_fail: false,
            filled: Vec::new(),
            engine: None,
            engine_starts: true,
            engines: 0,
            processes: BTreeSet::new(),
            given: BTreeMap::new(),
            exited: false,
            reading: false,
            cache_entries: None,
            available_bytes: None,
            cached: Vec::new(),
            last_session: 0,
            last_request: 0,
        };
        world.happens(Event::Tick);
        world
    }

    fn happens(&mut self, event: Event) {
        self.events.push_back(event);
        while let Some(event) = self.events.pop_front() {
            let actions = self.core.handle(self.now_ns, event);
            for action in actions {
                self.perform(action);
            }
        }
    }

    fn perform(&mut self, action: Action) {
        assert!(!self.exited, "acted after its exit: {action:?}");
        match action {
            Action::Send { session, request_id, message, attachments } => {
                for attachment in attachments {
                    match attachment {
                        Attachment::Lane(lane_id) => assert!(self.lanes.contains(&lane_id)),
                        Attachment::Image(generation) => assert!(self.images.contains(&generation)),
                        Attachment::Cache(generation) => assert!(self.caches.contains(&generation)),
                    }
                }
                if let BrokerMessage::ProviderJob(job) = &message {
                    self.given.entry(session).or_default().push_back(job.clone());
                }
                if self.open.contains(&session) {
                    self.told.entry(session).or_default().push((request_id, message));
                }
            }
            Action::Close { session } => assert!(self.open.remove(&session), "closed twice"),
            Action::MakeLane { lane_id } => {
                let outcome = if self.lanes_fail { Err("full".into()) } else { Ok(()) };
                if outcome.is_ok() {
                    self.lanes.insert(lane_id);
                }
                self.events.push_back(Event::LaneMade { lane_id, outcome });
            }
            Action::CloseLane { lane_id } => {
                self.lanes.remove(&lane_id);
            }
            Action::StartLoader { load_id, model } => {
                assert!(!self.loaders.values().any(|m| *m == model), "two loads of {model}");
                self.loads += 1;
                self.loaders.insert(load_id, model);
            }
            Action::KillLoader { load_id } => {
                self.loaders.remove(&load_id);
                self.offered.remove(&load_id);
            }
            Action::KeepImage { load_id, generation } => {
                assert!(self.offered.remove(&load_id));
                self.images.insert(generation);
            }
            Action::DiscardImage { load_id } => {
                self.offered.remove(&load_id);
            }
            Action::CloseImage { generation } => {
                assert!(self.images.remove(&generation));
                self.caches.remove(&generation);
            }
            Action::MakeCache { generation, .. } => {
                assert!(self.images.contains(&generation));
                let made = !self.caches_fail;
                if made {
                    self.caches.insert(generation);
                }
                let cache = made.then_some(CacheDescription { region_bytes: 4096 });
                self.events.push_back(Event::CacheMade { generation, cache });
            }
            Action::SupersedeCache { generation, by } => assert!(by > generation, "replaced by an older one"),
            Action::FillCache { generation, bulk, keys, .. } => {
                assert!(self.caches.contains(&generation), "filled a cache that is gone");
                self.filled.push((generation, bulk, keys.len()));
            }
            Action::StartEngine { incarnation } => {
                assert!(self.engine.is_none(), "two engines");
                if self.engine_starts {
                    self.engines += 1;
                    self.engine = Some((incarnation, VecDeque::new()));
                    self.events.push_back(Event::EngineStarted { incarnation, pid: 100 });
                } else {
                    self.events
                        .push_back(Event::EngineNotStarted { incarnation, message: "no such file".into() });
                }
            }
            Action::KillEngine { .. } => self.kill_engine(ChildExit::Signal(9)),
            Action::ToEngine { message, attachments } => {
                let named = |a: &Attachment| match a {
                    Attachment::Lane(id) => self.lanes.contains(id),
                    Attachment::Image(generation) => self.images.contains(generation),
                    Attachment::Cache(generation) => self.caches.contains(generation),
                };
                assert!(attachments.iter().all(named), "{message:?} without its descriptors");
                if let Some((_, inbox)) = &mut self.engine {
                    inbox.push_back(message);
                }
            }
            Action::StartProvider { child } => {
                self.processes.insert(child);
            }
            Action::KillProvider { child } => {
                self.processes.remove(&child);
                let exit = ChildExit::Signal(9);
                self.events.push_back(Event::ProviderExited { child, exit });
            }
            Action::ReadConfiguration => {
                assert!(!self.reading, "two readings at once");
                self.reading = true;
            }
            Action::Reconfigure { cache_entries, .. } => self.cache_entries = Some(cache_entries),
            Action::LookAtMemory => {
                let event =
                    Event::Memory { available_bytes: self.available_bytes, caches: self.cached.clone() };
                self.events.push_back(event);
            }
            Action::Exit => self.exited = true,
        }
    }

    fn kill_engine(&mut self, exit: ChildExit) {
        if let Some((incarnation, _)) = self.engine.take() {
            self.events.push_back(Event::EngineExited { incarnation, exit });
        }
    }

    fn engine_dies(&mut self) {
        self.kill_engine(ChildExit::Signal(9));
        self.happens(Event::Tick);
    }

    fn engine_says(&mut self, message: FromEngine) {
        if let Some((incarnation, _)) = self.engine {
            self.happens(Event::Engine { incarnation, message });
        }
    }

    /// The engine takes one message and answers it as a good engine does; `start_only` leaves a job unanswered.
    fn engine_takes_one(&mut self, start_only: bool) -> bool {
        let Some(message) = self.engine.as_mut().and_then(|(_, inbox)| inbox.pop_front()) else {
            return false;
        };
        match message {
            ToEngine::LoadModel { generation, .. } => self.engine_says(FromEngine::ModelReady { generation }),
            ToEngine::UnloadModel { generation } => {
                self.engine_says(FromEngine::ModelUnloaded { generation })
            }
            ToEngine::DropLane { lane_id } => self.engine_says(FromEngine::LaneDropped { lane_id }),
            ToEngine::Job { relay_id, .. } => {
                self.engine_says(FromEngine::JobStarted { relay_id });
                if !start_only {
                    self.engine_says(FromEngine::Answer(answer(relay_id)));
                }
            }
            ToEngine::Drain => {
                self.kill_engine(ChildExit::Status(0));
                self.happens(Event::Tick);
            }
            ToEngine::Totals => self.engine_says(FromEngine::Totals(Default::default())),
            ToEngine::Probe { generation } => {
                let (code, message) = (Code::Ok, String::new());
                self.engine_says(FromEngine::Probed { generation, code, message, probe_us: 7 });
            }
            ToEngine::AddLane { .. } | ToEngine::CancelJob { .. } => {}
        }
        true
    }

    fn engine_works(&mut self) {
        self.engine_says(FromEngine::Ready { threads: 2 });
        while self.engine_takes_one(false) {}
    }

    fn connect(&mut self) -> u64 {
        self.last_session += 1;
        let session = self.last_session;
        self.open.insert(session);
        self.happens(Event::Connected { session, pid: 1000, uid: UID });
        self.asks(session, hello());
        session
    }

    fn asks(&mut self, session: u64, message: ClientMessage) -> u64 {
        self.last_request += 1;
        let request_id = self.last_request;
        if self.open.contains(&session) {
            self.happens(Event::Client { session, request_id, message });
        }
        request_id
    }

    fn leaves(&mut self, session: u64) {
        if self.open.remove(&session) {
            self.happens(Event::ClientGone { session });
        }
    }

    fn loader_finishes(&mut self, model_id: &str) {
        let Some((load_id, _)) = self.loaders.pop_first() else { return };
        self.offered.insert(load_id);
        self.happens(Event::LoaderImage { load_id, facts: facts(model_id) });
        self.offered.remove(&load_id);
        self.happens(Event::LoaderExited { load_id, exit: ChildExit::Status(0) });
    }

    fn loader_dies(&mut self) {
        let Some((load_id, _)) = self.loaders.pop_first() else { return };
        self.happens(Event::LoaderExited { load_id, exit: ChildExit::Signal(9) });
    }

    fn answers(&self, session: u64, request_id: u64) -> Vec<&BrokerMessage> {
        let told = self.told.get(&session).into_iter().flatten();
        told.filter(|(id, m)| *id == request_id && !matches!(m, BrokerMessage::Progress(_)))
            .map(|(_, m)| m)
            .collect()
    }

    fn refusal(&self, session: u64, request_id: u64) -> &Refusal {
        match self.answers(session, request_id)[..] {
            [BrokerMessage::Refused(refusal)] => refusal,
            ref other => panic!("no refusal but {other:?}"),
        }
    }

    fn answer(&self, session: u64, request_id: u64) -> &AnswerFrame {
        match self.answers(session, request_id)[..] {
            [BrokerMessage::Answer(answer)] => answer,
            ref other => panic!("no answer but {other:?}"),
        }
    }

    fn lease(&self, session: u64, request_id: u64) -> u64 {
        match self.answers(session, request_id)[..] {
            [BrokerMessage::Leased(leased)] => leased.lease_id,
            ref other => panic!("no lease but {other:?}"),
        }
    }

    fn status(&mut self) -> StatusReport {
        let session = self.connect();
        let request = self.asks(session, ClientMessage::Status);
        self.engine_works();
        let report = match self.answers(session, request)[..] {
            [BrokerMessage::Status(report)] => report.clone(),
            ref other => panic!("no report but {other:?}"),
        };
        self.leaves(session);
        report
    }

    /// A session with a lease on a served model.
    fn leased(&mut self, want_lane: bool) -> (u64, u64) {
        let session = self.connect();
        let request = self.asks(session, acquire("m", want_lane, 1000));
        self.loader_finishes("m");
        self.engine_works();
        let lease = self.lease(session, request);
        (session, lease)
    }
}

fn answer(relay_id: u64) -> AnswerFrame {
    AnswerFrame { job_id: relay_id, status: Code::Ok, payload: vec![9], queue_us: 1, execution_us: 1 }
}

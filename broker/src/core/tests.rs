//! Tests of the decisions, without processes: scripted ones, and a random world of clients, loaders and an engine that
//! live and die at any moment.

use super::*;
use proptest::prelude::*;
use shm_layout::lane::LAYOUT_HASH;
use shm_layout::limits::MAX_JOB_ATTEMPTS;
use shm_layout::wire::{
    Acquire, AnswerFrame, BackingKind, ClientMessage, FromEngine, Hello, JobFrame, Operation, PROTOCOL_MAJOR,
    Priority, StatusReport,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const UID: u32 = 7;
const MS: u64 = 1_000_000;

fn core_with(limits: Limits) -> Core {
    let config = CoreConfig {
        default_model: "default".into(),
        limits,
        idle_exit: None,
        allow_other_users: false,
        own_uid: UID,
        boot_id: 1,
        broker_pid: 1,
    };
    Core::new(config, 0)
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
    /// Incarnation and inbox of the living engine.
    engine: Option<(u64, VecDeque<ToEngine>)>,
    engine_starts: bool,
    engines: usize,
    exited: bool,
    last_session: u64,
    last_request: u64,
}

impl World {
    fn new(limits: Limits) -> World {
        let mut world = World {
            core: core_with(limits),
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
            engine: None,
            engine_starts: true,
            engines: 0,
            exited: false,
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
                    }
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
            Action::CloseImage { generation } => assert!(self.images.remove(&generation)),
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
                };
                assert!(attachments.iter().all(named), "{message:?} without its descriptors");
                if let Some((_, inbox)) = &mut self.engine {
                    inbox.push_back(message);
                }
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

#[test]
fn one_load_for_all_who_ask() {
    let mut world = World::new(Limits::default());
    let asked: Vec<(u64, u64)> = (0..30)
        .map(|_| {
            let session = world.connect();
            (session, world.asks(session, acquire("m", true, 1000)))
        })
        .collect();
    assert_eq!((world.loads, world.loaders.len()), (1, 1));
    world.loader_finishes("m");
    world.engine_works();
    for (session, request) in asked {
        world.lease(session, request);
    }
    let late = world.connect();
    let request = world.asks(late, acquire("", true, 0));
    assert_eq!(world.refusal(late, request).code, Code::LoadTimeout, "the default is another model");
    let request = world.asks(late, acquire("m", true, 0));
    world.lease(late, request);
    let report = world.status();
    assert_eq!((report.models[0].leases, report.models[0].loads), (31, 1));
}

#[test]
fn who_does_not_want_to_wait_longer_is_told_so_and_the_load_goes_on() {
    let mut world = World::new(Limits::default());
    let (a, b) = (world.connect(), world.connect());
    let (short, long) = (world.asks(a, acquire("m", true, 5)), world.asks(b, acquire("m", true, 500)));
    assert_eq!(world.core.next_timer_ns(), Some(world.now_ns + 5 * MS));
    world.now_ns += 6 * MS;
    world.happens(Event::Tick);
    assert_eq!(world.refusal(a, short).code, Code::LoadTimeout);
    assert!(world.answers(b, long).is_empty());
    world.loader_finishes("m");
    world.engine_works();
    world.lease(b, long);
    assert_eq!(world.loads, 1);
}

#[test]
fn a_killed_loader_is_named_and_the_next_request_loads_again() {
    let mut world = World::new(Limits::default());
    let session = world.connect();
    let first = world.asks(session, acquire("m", true, 1000));
    world.loader_dies();
    let refusal = world.refusal(session, first);
    assert_eq!(refusal.code, Code::ModelLoadError);
    assert!(refusal.message.contains("SIGKILL"), "{}", refusal.message);
    let second = world.asks(session, acquire("m", true, 1000));
    world.loader_finishes("m");
    world.engine_works();
    world.lease(session, second);
}

#[test]
fn jobs_wait_for_the_next_engine_and_are_answered_once() {
    let mut world = World::new(Limits::default());
    let (session, lease) = world.leased(false);
    let request = world.asks(session, job(lease, 1, 0));
    for death in 1..MAX_JOB_ATTEMPTS {
        world.engine_says(FromEngine::Ready { threads: 1 });
        while world.engine_takes_one(true) {}
        world.engine_dies();
        assert_eq!(world.engines, 1 + death as usize);
        assert!(world.answers(session, request).is_empty());
    }
    world.engine_works();
    assert_eq!(world.answer(session, request).status, Code::Ok);
}

#[test]
fn a_job_that_kills_every_engine_is_given_up() {
    let mut world = World::new(Limits::default());
    let (session, lease) = world.leased(false);
    let (bad, good) = (world.asks(session, job(lease, 1, 0)), 2);
    for _ in 0..MAX_JOB_ATTEMPTS {
        world.engine_says(FromEngine::Ready { threads: 1 });
        while world.engine_takes_one(true) {}
        world.engine_dies();
    }
    assert_eq!(world.answer(session, bad).status, Code::JobCrashedEngine);
    let good = world.asks(session, job(lease, good, 0));
    world.engine_works();
    assert_eq!(world.answer(session, good).status, Code::Ok);
}

#[test]
fn lanes_are_handed_to_each_new_engine() {
    let mut world = World::new(Limits::default());
    let (session, lease) = world.leased(true);
    world.engine_dies();
    world.engine_says(FromEngine::Ready { threads: 1 });
    assert!(matches!(world.engine.as_ref().unwrap().1[0], ToEngine::LoadModel { .. }));
    world.engine_takes_one(false);
    assert!(matches!(world.engine.as_ref().unwrap().1[0], ToEngine::AddLane { lane_id: 1, generation: 1 }));
    world.engine_works();
    let request = world.asks(session, ClientMessage::Release { lease_id: lease });
    assert!(matches!(world.answers(session, request)[..], [BrokerMessage::Released]));
    assert!(world.lanes.is_empty());
    assert_eq!(world.core.lanes.len(), 1, "the engine still maps it");
    world.engine_works();
    assert_eq!(world.core.lanes.len(), 0);
}

#[test]
fn an_engine_that_cannot_start_is_reported_and_tried_again_for_the_next_who_asks() {
    let mut world = World::new(Limits::default());
    world.engine_starts = false;
    world.engine_dies();
    assert!(world.core.engine.is_broken(world.core.limits()));
    assert_eq!(world.core.next_timer_ns(), None, "nobody needs it: nothing is timed");
    let session = world.connect();
    let request = world.asks(session, acquire("m", true, 1000));
    world.loader_finishes("m");
    let refusal = world.refusal(session, request);
    assert_eq!(refusal.code, Code::ModelUnavailable);
    assert!(refusal.retry_after_ms > 0 && refusal.message.contains("no such file"));
    world.engine_starts = true;
    let request = world.asks(session, acquire("m", true, 1000));
    world.engine_works();
    world.lease(session, request);
}

#[test]
fn a_model_that_the_engine_refuses_fails_for_those_who_wait() {
    let mut world = World::new(Limits::default());
    let session = world.connect();
    let request = world.asks(session, acquire("m", true, 1000));
    world.engine_says(FromEngine::Ready { threads: 1 });
    world.loader_finishes("m");
    let message = "wrong CPU".to_owned();
    world.engine_says(FromEngine::ModelFailed { generation: 1, code: Code::ModelUnsupported, message });
    assert_eq!(world.refusal(session, request).code, Code::ModelUnsupported);
    assert!(world.images.is_empty(), "nobody holds it");
}

#[test]
fn two_names_of_one_model_share_a_generation() {
    let mut world = World::new(Limits::default());
    let session = world.connect();
    let requests =
        [world.asks(session, acquire("a", true, 1000)), world.asks(session, acquire("b", true, 1000))];
    assert_eq!(world.loads, 2);
    world.loader_finishes("org/m");
    world.loader_finishes("org/m");
    world.engine_works();
    for request in requests {
        world.lease(session, request);
    }
    assert_eq!(world.images.len(), 1);
}

#[test]
fn limits_refuse_by_name() {
    let limits = Limits {
        max_sessions: 2,
        max_leases_per_session: 3,
        max_lanes_per_session: 1,
        max_session_jobs: 1,
        ..Limits::default()
    };
    let mut world = World::new(limits);
    let (session, lease) = world.leased(true);
    let again = world.asks(session, acquire("m", true, 0));
    assert!(world.refusal(session, again).message.contains("1 lanes"));
    world.asks(session, job(lease, 1, 0));
    let same = world.asks(session, job(lease, 1, 0));
    assert_eq!(world.refusal(session, same).code, Code::BadState);
    let over = world.asks(session, job(lease, 2, 0));
    assert_eq!(world.refusal(session, over).code, Code::Overloaded);
    assert!(world.refusal(session, over).retry_after_ms > 0);
    let stale = world.asks(session, job(lease + 1, 3, 0));
    assert_eq!(world.refusal(session, stale).code, Code::Stale);
    let late = world.asks(session, job(lease, 4, 1));
    assert_eq!(world.refusal(session, late).code, Code::DeadlineExceeded);
    for _ in 0..2 {
        world.asks(session, acquire("m", false, 0));
    }
    let many = world.asks(session, acquire("m", false, 0));
    assert_eq!(world.refusal(session, many).code, Code::TooMany);
    world.connect();
    let third = world.connect();
    assert_eq!(world.refusal(third, 0).code, Code::TooMany);
    assert!(!world.open.contains(&third));
}

#[test]
fn names_that_would_be_options_are_refused() {
    let mut world = World::new(Limits::default());
    let session = world.connect();
    for name in ["--cache-dir=/", "a\0b", "a\nb"] {
        let request = world.asks(session, acquire(name, true, 1000));
        assert_eq!(world.refusal(session, request).code, Code::ModelNotFound);
    }
    assert_eq!(world.loads, 0);
}

#[test]
fn other_users_and_other_versions_are_refused() {
    let mut world = World::new(Limits::default());
    world.open.extend([100, 101, 102]);
    world.happens(Event::Connected { session: 100, pid: 1, uid: UID + 1 });
    assert_eq!(world.refusal(100, 0).code, Code::PermissionDenied);
    let hello = |major, layout_hash| {
        ClientMessage::Hello(Hello {
            protocol_major: major,
            protocol_minor: 0,
            layout_hash,
            client_name: String::new(),
        })
    };
    for (session, message, code) in [
        (101, hello(PROTOCOL_MAJOR + 1, 0), Code::ProtocolVersion),
        (102, hello(PROTOCOL_MAJOR, LAYOUT_HASH ^ 1), Code::LayoutMismatch),
    ] {
        world.happens(Event::Connected { session, pid: 1, uid: UID });
        let request = world.asks(session, message);
        assert_eq!(world.refusal(session, request).code, code);
        assert!(!world.open.contains(&session));
    }
    assert_eq!(world.status().faults, 0, "an old client is no faulty one");
}

#[test]
fn a_guest_may_use_the_broker_but_not_end_it() {
    let mut world = World::new(Limits::default());
    world.core.config.allow_other_users = true;
    world.open.insert(100);
    world.happens(Event::Connected { session: 100, pid: 1, uid: UID + 1 });
    world.asks(100, hello());
    let request = world.asks(100, ClientMessage::Shutdown { drain_ms: 0 });
    assert_eq!(world.refusal(100, request).code, Code::PermissionDenied);
    let owner = world.connect();
    world.asks(owner, ClientMessage::Shutdown { drain_ms: 0 });
    assert!(world.exited);
}

#[test]
fn no_hello_in_time_is_a_fault() {
    let mut world = World::new(Limits::default());
    world.open.insert(100);
    world.happens(Event::Connected { session: 100, pid: 1, uid: UID });
    world.now_ns = world.core.next_timer_ns().unwrap();
    world.happens(Event::Tick);
    assert!(!world.open.contains(&100));
    assert_eq!(world.status().faults, 1);
}

#[test]
fn draining_finishes_what_was_accepted_and_takes_nothing_new() {
    let mut world = World::new(Limits::default());
    let (session, lease) = world.leased(true);
    let accepted = world.asks(session, job(lease, 1, 0));
    let waiting = world.asks(session, acquire("other", true, 1000));
    world.happens(Event::StopSignal);
    assert_eq!(world.refusal(session, waiting).code, Code::ShuttingDown);
    assert!(world.loaders.is_empty());
    let (submitted, asked) =
        (world.asks(session, job(lease, 2, 0)), world.asks(session, acquire("m", true, 0)));
    assert_eq!(world.refusal(session, submitted).code, Code::ShuttingDown);
    assert_eq!(world.refusal(session, asked).code, Code::ShuttingDown);
    world.engine_dies();
    assert!(!world.exited, "the accepted job survives even an engine that dies now");
    world.engine_works();
    assert_eq!(world.answer(session, accepted).status, Code::Ok);
    assert!(world.exited);
}

#[test]
fn a_second_signal_or_the_end_of_time_leaves_at_once() {
    for second_signal in [true, false] {
        let mut world = World::new(Limits::default());
        let (session, lease) = world.leased(true);
        let accepted = world.asks(session, job(lease, 1, 0));
        world.happens(Event::StopSignal);
        assert!(!world.exited);
        if second_signal {
            world.happens(Event::StopSignal);
        } else {
            world.now_ns = world.core.next_timer_ns().unwrap();
            world.happens(Event::Tick);
        }
        assert_eq!(world.answer(session, accepted).status, Code::ShuttingDown);
        assert!(world.exited);
    }
}

#[test]
fn it_leaves_when_idle_for_long_enough_and_nothing_else_is_timed() {
    let mut world = World::new(Limits::default());
    world.core.config.idle_exit = Some(Duration::from_secs(1));
    world.engine_works();
    let session = world.connect();
    assert_eq!(world.core.next_timer_ns(), None);
    world.now_ns += 5000 * MS;
    world.leaves(session);
    assert_eq!(world.core.next_timer_ns(), Some(world.now_ns + 1000 * MS));
    world.now_ns += 1000 * MS;
    world.happens(Event::Tick);
    assert!(world.exited);
}

#[test]
fn a_lane_fault_ends_that_session_alone() {
    let mut world = World::new(Limits::default());
    let (a, _) = world.leased(true);
    let b = world.connect();
    let request = world.asks(b, acquire("m", true, 0));
    world.lease(b, request);
    world.engine_says(FromEngine::LaneFault { lane_id: 1, message: "tail beyond capacity".into() });
    assert!(!world.open.contains(&a) && world.open.contains(&b));
    assert_eq!(world.lanes.len(), 1);
    assert_eq!(world.status().faults, 1);
}

/// One step of the random world.
#[derive(Debug, Clone)]
enum Step {
    Connect,
    Leave(usize),
    Acquire(usize, u8, bool, u32),
    Release(usize, usize),
    Submit(usize, usize, u64),
    Cancel(usize, u64),
    Status(usize),
    Fault(usize),
    EngineReady,
    EngineTakes(bool),
    EngineDies,
    EngineRefuses(u64),
    LaneFault(u64),
    LoaderFinishes(u8),
    LoaderDies,
    Time(u64),
    EngineStarts(bool),
    LanesFail(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Connect),
        1 => (0usize..8).prop_map(Step::Leave),
        6 => (0usize..8, 0u8..4, any::<bool>(), prop_oneof![Just(0u32), Just(3), Just(1000)])
            .prop_map(|(s, m, lane, wait)| Step::Acquire(s, m, lane, wait)),
        2 => (0usize..8, 0usize..4).prop_map(|(s, l)| Step::Release(s, l)),
        10 => (0usize..8, 0usize..4, 0u64..3).prop_map(|(s, l, d)| Step::Submit(s, l, d)),
        2 => (0usize..8, 0u64..40).prop_map(|(s, j)| Step::Cancel(s, j)),
        1 => (0usize..8).prop_map(Step::Status),
        1 => (0usize..8).prop_map(Step::Fault),
        6 => Just(Step::EngineReady),
        16 => any::<bool>().prop_map(Step::EngineTakes),
        3 => Just(Step::EngineDies),
        1 => (1u64..4).prop_map(Step::EngineRefuses),
        1 => (1u64..6).prop_map(Step::LaneFault),
        6 => (0u8..3).prop_map(Step::LoaderFinishes),
        2 => Just(Step::LoaderDies),
        4 => (1u64..20_000).prop_map(Step::Time),
        1 => any::<bool>().prop_map(Step::EngineStarts),
        1 => any::<bool>().prop_map(Step::LanesFail),
    ];
    prop::collection::vec(step, 0..250)
}

/// The requests of a session that are owed exactly one answer, and its leases as its client knows them.
#[derive(Default)]
struct Ledger {
    owed: BTreeMap<u64, Vec<u64>>,
    next_job: u64,
}

impl World {
    fn pick(&self, index: usize) -> Option<u64> {
        self.open.iter().nth(index % self.open.len().max(1)).copied()
    }

    fn leases_of(&self, session: u64) -> Vec<u64> {
        self.told
            .get(&session)
            .into_iter()
            .flatten()
            .filter_map(|(_, m)| match m {
                BrokerMessage::Leased(leased) => Some(leased.lease_id),
                _ => None,
            })
            .collect()
    }

    fn step(&mut self, step: Step, ledger: &mut Ledger) {
        match step {
            Step::Connect => {
                self.connect();
            }
            Step::Leave(s) => {
                if let Some(session) = self.pick(s) {
                    self.leaves(session);
                }
            }
            Step::Acquire(s, model, lane, wait) => {
                let Some(session) = self.pick(s) else { return };
                let request = self.asks(session, acquire(["", "a", "b", "c"][model as usize], lane, wait));
                ledger.owed.entry(session).or_default().push(request);
            }
            Step::Release(s, l) => {
                let Some(session) = self.pick(s) else { return };
                let lease_id = self.leases_of(session).get(l).copied().unwrap_or(999);
                let request = self.asks(session, ClientMessage::Release { lease_id });
                ledger.owed.entry(session).or_default().push(request);
            }
            Step::Submit(s, l, deadline) => {
                let Some(session) = self.pick(s) else { return };
                let lease_id = self.leases_of(session).get(l).copied().unwrap_or(999);
                ledger.next_job += 1;
                let deadline_ns = if deadline == 0 { 0 } else { self.now_ns + deadline * 10 * MS };
                let request = self.asks(session, job(lease_id, ledger.next_job % 40, deadline_ns));
                ledger.owed.entry(session).or_default().push(request);
            }
            Step::Cancel(s, job_id) => {
                if let Some(session) = self.pick(s) {
                    self.asks(session, ClientMessage::Cancel { job_id });
                }
            }
            Step::Status(s) => {
                let Some(session) = self.pick(s) else { return };
                let request = self.asks(session, ClientMessage::Status);
                ledger.owed.entry(session).or_default().push(request);
            }
            Step::Fault(s) => {
                if let Some(session) = self.pick(s) {
                    self.happens(Event::ClientFault { session, code: Code::BadFrame, message: "x".into() });
                }
            }
            Step::EngineReady => self.engine_says(FromEngine::Ready { threads: 1 }),
            Step::EngineTakes(start_only) => {
                self.engine_takes_one(start_only);
            }
            Step::EngineDies => self.engine_dies(),
            Step::EngineRefuses(generation) => {
                let message = "x".to_owned();
                self.engine_says(FromEngine::ModelFailed { generation, code: Code::ModelInvalid, message });
            }
            Step::LaneFault(lane_id) => {
                self.engine_says(FromEngine::LaneFault { lane_id, message: "x".into() })
            }
            Step::LoaderFinishes(id) => self.loader_finishes(["default", "x", "y"][id as usize]),
            Step::LoaderDies => self.loader_dies(),
            Step::Time(us) => {
                self.now_ns += us * 1000;
                self.happens(Event::Tick);
            }
            Step::EngineStarts(starts) => self.engine_starts = starts,
            Step::LanesFail(fail) => self.lanes_fail = fail,
        }
    }

    /// From now on everything works: all that is owed comes.
    fn settles(&mut self) {
        self.engine_starts = true;
        self.lanes_fail = false;
        // An engine that left jobs unanswered is replaced, so that they come again.
        self.engine_dies();
        for _ in 0..200 {
            while !self.loaders.is_empty() {
                self.loader_finishes("default");
            }
            self.engine_works();
            match self.core.next_timer_ns() {
                Some(due) => self.now_ns = self.now_ns.max(due),
                None => return,
            }
            self.happens(Event::Tick);
        }
        panic!("it never comes to rest; the next timer is {:?}", self.core.next_timer_ns());
    }

    fn check_answers(&self, ledger: &Ledger, settled: bool) -> Result<(), TestCaseError> {
        for (session, requests) in &ledger.owed {
            for request in requests {
                let count = self.answers(*session, *request).len();
                prop_assert!(count <= 1, "request {request} has {count} answers");
                if settled && self.open.contains(session) {
                    prop_assert_eq!(count, 1, "request {} has no answer", request);
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #[test]
    fn every_request_is_answered_once_and_nothing_is_kept(steps in steps(), drains in any::<bool>()) {
        let limits = Limits {
            max_sessions: 6,
            max_leases_per_session: 4,
            max_lanes: 5,
            max_lanes_per_session: 3,
            max_session_jobs: 6,
            max_jobs: 10,
            engine_free_restarts: 9,
            ..Limits::default()
        };
        let mut world = World::new(limits);
        let mut ledger = Ledger::default();
        for step in steps {
            world.step(step, &mut ledger);
            prop_assert!(world.lanes.len() <= 5);
        }
        world.check_answers(&ledger, false)?;
        if drains {
            world.happens(Event::StopSignal);
        }
        world.settles();
        world.check_answers(&ledger, true)?;
        if drains {
            prop_assert!(world.exited);
            return Ok(());
        }
        for session in world.open.clone() {
            world.leaves(session);
        }
        world.settles();
        let core = &world.core;
        prop_assert_eq!((core.leases.len(), core.lanes.len(), core.relay.len(), core.sessions.len()), (0, 0, 0, 0));
        prop_assert!(world.lanes.is_empty() && world.offered.is_empty() && world.loaders.is_empty());
        let current = core.models.images.keys().all(|generation| core.models.is_current(*generation));
        prop_assert!(current, "an image that nobody can get is kept");
        prop_assert_eq!(world.images.len(), core.models.images.len());
        prop_assert_eq!(core.next_timer_ns(), None);
    }
}

//! The life of models in given situations: idleness, room, memory, orders, reloads. Time is what the test says it is.

use super::*;
use crate::config::{ModelKind, ModelSettings};
use shm_layout::wire::{
    LoadProgress, ModelCommand, ModelOutcome, ModelReport, ModelState, Superseded, UnloadMode,
};

const SECOND: u64 = 1000 * MS;

fn policy() -> Policy {
    Policy {
        unload_after: Duration::from_secs(30),
        max_shared_models: 2,
        memory_budget_bytes: None,
        log_model_usage: true,
    }
}

fn load(model: &str) -> ClientMessage {
    ClientMessage::Model(ModelCommand::Load { model: model.into(), wait_ms: 1000 })
}

fn reload(model: &str) -> ClientMessage {
    ClientMessage::Model(ModelCommand::Reload { model: model.into(), wait_ms: 1000 })
}

fn unload(model: &str, mode: UnloadMode) -> ClientMessage {
    ClientMessage::Model(ModelCommand::Unload { model: model.into(), mode })
}

fn health(model: &str) -> ClientMessage {
    ClientMessage::Model(ModelCommand::Health { model: model.into(), wait_ms: 1000 })
}

impl World {
    fn outcome(&self, session: u64, request_id: u64) -> &ModelOutcome {
        match self.answers(session, request_id)[..] {
            [BrokerMessage::Model(outcome)] => outcome,
            ref other => panic!("no outcome but {other:?}"),
        }
    }

    fn passes(&mut self, ns: u64) {
        self.now_ns += ns;
        self.happens(Event::Tick);
        self.engine_works();
    }

    /// A session with a lease on a model, loaded if need be.
    fn holds(&mut self, model: &str) -> (u64, u64) {
        let session = self.connect();
        let request = self.asks(session, acquire(model, false, 1000));
        self.loader_finishes(model);
        self.engine_works();
        (session, self.lease(session, request))
    }

    fn report_of(&mut self, model: &str) -> ModelReport {
        let report = self.status();
        let found =
            report.models.iter().find(|m| m.model_id == model || m.detail.ids.iter().any(|id| id == model));
        found.unwrap_or_else(|| panic!("no {model} in {:?}", report.models)).clone()
    }

    fn state_of(&mut self, model: &str) -> ModelState {
        self.report_of(model).state
    }

    fn progress(&mut self, done_bytes: u64, total_bytes: u64) {
        let load_id = *self.loaders.keys().next().expect("a loader is at work");
        let progress = LoadProgress { stage: "copy".into(), done_bytes, total_bytes };
        self.happens(Event::LoaderProgress { load_id, progress });
    }
}

#[test]
fn a_model_that_nobody_uses_leaves_after_its_time_and_not_before() {
    let mut world = World::with(Limits::default(), policy());
    let (session, _) = world.holds("m");
    world.passes(1000 * SECOND);
    assert_eq!(world.state_of("m"), ModelState::Ready, "a lease keeps it");
    assert_eq!(world.core.next_timer_ns(), None, "and nothing is timed");
    world.leaves(session);
    assert_eq!(world.core.next_timer_ns(), Some(world.now_ns + 30 * SECOND));
    world.passes(30 * SECOND - 1);
    assert_eq!((world.images.len(), world.caches.len()), (1, 1));
    world.passes(1);
    assert!(world.images.is_empty() && world.caches.is_empty());
    assert_eq!(world.state_of("m"), ModelState::Unloaded);
    assert_eq!(world.core.next_timer_ns(), None);
    // The next request loads it again.
    let (_, _) = world.holds("m");
    let report = world.report_of("m");
    assert_eq!((report.loads, report.detail.unloads, report.detail.evictions), (2, 1, 0));
}

#[test]
fn jobs_keep_a_model_whose_lease_is_gone() {
    let mut world = World::with(Limits::default(), policy());
    let (session, lease) = world.holds("m");
    let request = world.asks(session, job(lease, 1, 0));
    while world.engine_takes_one(true) {}
    world.asks(session, ClientMessage::Release { lease_id: lease });
    world.now_ns += 1000 * SECOND;
    world.happens(Event::Tick);
    assert_eq!(world.images.len(), 1);
    world.engine_says(FromEngine::Answer(answer(1)));
    assert_eq!(world.answer(session, request).status, Code::Ok);
    assert!(world.images.is_empty(), "the answer was the last that kept it");
}

#[test]
fn a_jump_of_the_clock_unloads_what_is_idle_and_nothing_else() {
    let mut world = World::with(Limits::default(), policy());
    let (idle, _) = world.holds("a");
    world.leaves(idle);
    world.holds("b");
    world.passes(u64::MAX / 2);
    assert_eq!((world.state_of("a"), world.state_of("b")), (ModelState::Unloaded, ModelState::Ready));
    world.holds("a");
}

#[test]
fn a_lease_that_comes_as_the_time_is_over_loads_anew_and_one_before_keeps() {
    for early in [true, false] {
        let mut world = World::with(Limits::default(), policy());
        let (session, lease) = world.holds("m");
        world.asks(session, ClientMessage::Release { lease_id: lease });
        world.now_ns += if early { 30 * SECOND - 1 } else { 30 * SECOND };
        // No tick in between: the request itself is the event that finds the time over, or not.
        let request = world.asks(session, acquire("m", false, 1000));
        if !early {
            assert_eq!(
                world.images.len(),
                1,
                "asked for in time: the request came before the look at the clock"
            );
        }
        world.lease(session, request);
        assert_eq!(world.loads, 1);
    }
}

#[test]
fn the_least_recently_used_idle_model_makes_room() {
    let mut world = World::with(Limits::default(), policy());
    let (a, _) = world.holds("a");
    world.now_ns += SECOND;
    let (b, _) = world.holds("b");
    world.leaves(b);
    world.now_ns += SECOND;
    world.leaves(a);
    world.holds("c");
    assert_eq!(
        (world.state_of("a"), world.state_of("b"), world.state_of("c")),
        (ModelState::Ready, ModelState::Unloaded, ModelState::Ready),
        "a was let go of last"
    );
    assert_eq!(world.report_of("b").detail.evictions, 1);
}

#[test]
fn who_finds_no_room_waits_in_line_and_is_told_who_holds_it() {
    let mut world = World::with(Limits::default(), policy());
    let (a, lease_a) = world.holds("a");
    world.holds("b");
    let session = world.connect();
    let hasty = world.asks(session, acquire("c", false, 0));
    let refusal = world.refusal(session, hasty);
    assert_eq!(refusal.code, Code::ModelUnavailable);
    assert!(refusal.message.contains("2 models are loaded, the limit"), "{}", refusal.message);
    assert!(refusal.message.contains("a (held by processes 1000)"), "{}", refusal.message);
    assert!(refusal.retry_after_ms > 0);
    let patient = world.asks(session, acquire("c", false, 5000));
    assert_eq!(world.loads, 2, "it waits");
    world.asks(a, ClientMessage::Release { lease_id: lease_a });
    assert_eq!(world.loads, 3, "a left to make room");
    world.loader_finishes("c");
    world.engine_works();
    world.lease(session, patient);
    assert_eq!(world.state_of("a"), ModelState::Unloaded);
    // Whoever gave up leaves nothing in line.
    let late = world.asks(session, acquire("d", false, 5));
    world.passes(6 * MS);
    assert_eq!(world.refusal(session, late).code, Code::ModelUnavailable);
    assert_eq!(world.state_of("d"), ModelState::Unloaded);
}

#[test]
fn configured_models_are_found_by_their_ids_and_preloaded_ones_stay() {
    let mut kept = ModelSettings::new("embedding", "org/m", ModelKind::Embedding);
    kept.preload = true;
    let mut short = ModelSettings::new("rerank", "org/r", ModelKind::Reranker);
    short.unload_after = Some(Duration::from_secs(1));
    let mut private = ModelSettings::new("own", "org/p", ModelKind::Chat);
    private.shared = false;
    let models = vec![kept, short, private, ModelSettings::new("again", "org/m", ModelKind::Embedding)];
    let mut world = World::with_models(Limits::default(), policy(), models, vec![]);
    assert_eq!(world.loaders.values().collect::<Vec<_>>(), ["org/m"], "loaded without being asked for");
    world.loader_finishes("org/m");
    world.engine_works();
    let session = world.connect();
    for name in ["embedding", "org/m", "again"] {
        let request = world.asks(session, acquire(name, false, 0));
        world.lease(session, request);
    }
    let request = world.asks(session, acquire("rerank", false, 1000));
    assert_eq!(world.loaders.values().collect::<Vec<_>>(), ["org/r"], "its source is what is loaded");
    world.loader_finishes("org/r");
    world.engine_works();
    world.lease(session, request);
    let request = world.asks(session, acquire("own", false, 1000));
    assert!(world.refusal(session, request).message.contains("not shared"));
    world.leaves(session);
    world.passes(SECOND);
    assert_eq!(world.state_of("rerank"), ModelState::Unloaded, "its own time is shorter");
    world.passes(1000 * SECOND);
    let report = world.report_of("embedding");
    assert_eq!(
        (report.state, report.detail.pinned, report.detail.ids),
        (ModelState::Ready, true, vec!["embedding".to_owned(), "again".to_owned()])
    );
    assert_eq!(report.detail.kind.as_deref(), Some("embedding"));
    // By order it leaves all the same.
    let session = world.connect();
    let request = world.asks(session, unload("embedding", UnloadMode::IfIdle));
    world.engine_works();
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { freed_bytes: 4096, .. }));
}

#[test]
fn a_model_that_is_to_be_kept_is_tried_again_but_not_for_ever() {
    let mut world = World::with_models(Limits::default(), policy(), vec![], vec!["m".into()]);
    world.engine_works();
    let mut tries = 0;
    while !world.loaders.is_empty() {
        tries += 1;
        world.loader_dies();
        if let Some(due) = world.core.next_timer_ns().filter(|_| world.loaders.is_empty()) {
            world.now_ns = due;
            world.happens(Event::Tick);
        }
    }
    assert_eq!(tries, 5);
    assert_eq!(world.core.next_timer_ns(), None);
    world.now_ns += 100 * SECOND;
    world.holds("m");
}

#[test]
fn unloading_is_refused_while_somebody_holds_it_and_names_them() {
    let mut world = World::with(Limits::default(), policy());
    let (holder, _) = world.holds("m");
    let session = world.connect();
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    let refusal = world.refusal(session, request);
    assert_eq!(refusal.code, Code::ModelInUse);
    assert!(refusal.message.contains("processes 1000"), "{}", refusal.message);
    let request = world.asks(session, unload("m", UnloadMode::WhenIdle));
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { pending: true, .. }));
    assert_eq!(world.images.len(), 1);
    world.leaves(holder);
    assert!(world.images.is_empty(), "the last lease was what kept it");
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    assert!(matches!(
        world.outcome(session, request),
        ModelOutcome::Unloaded { freed_bytes: 0, pending: false, .. }
    ));
    let request = world.asks(session, unload("never heard of", UnloadMode::IfIdle));
    assert_eq!(world.refusal(session, request).code, Code::ModelNotFound);
}

#[test]
fn an_unload_is_answered_when_the_engine_has_let_go_and_not_before() {
    let mut world = World::with(Limits::default(), policy());
    let (session, lease) = world.holds("m");
    world.asks(session, ClientMessage::Release { lease_id: lease });
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    assert!(world.answers(session, request).is_empty());
    assert!(world.images.is_empty(), "the broker's own is closed");
    world.engine_works();
    assert!(matches!(
        world.outcome(session, request),
        ModelOutcome::Unloaded { freed_bytes: 4096, pending: false, .. }
    ));
    // The same when the engine dies of it.
    let (other, lease) = world.holds("m");
    world.asks(other, ClientMessage::Release { lease_id: lease });
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    world.engine_dies();
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { freed_bytes: 4096, .. }));
}

#[test]
fn by_force_holders_keep_their_generation_and_others_load_anew() {
    let mut world = World::with(Limits::default(), policy());
    let (holder, lease) = world.holds("m");
    let session = world.connect();
    let request = world.asks(session, unload("m", UnloadMode::Force));
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { pending: true, .. }));
    let (_, _) = world.holds("m");
    assert_eq!((world.loads, world.images.len()), (2, 2));
    let request = world.asks(holder, job(lease, 1, 0));
    world.engine_works();
    assert_eq!(world.answer(holder, request).status, Code::Ok, "the old one serves who holds it");
    world.leaves(holder);
    assert_eq!(world.images.len(), 1);
}

#[test]
fn a_load_by_order_is_answered_once_it_is_served() {
    let mut world = World::with(Limits::default(), policy());
    let session = world.connect();
    let requests = [world.asks(session, load("m")), world.asks(session, load("m"))];
    assert_eq!(world.loads, 1);
    world.loader_finishes("m");
    assert!(world.answers(session, requests[0]).is_empty(), "the engine does not serve it yet");
    world.engine_works();
    for request in requests {
        assert!(matches!(world.outcome(session, request), ModelOutcome::Loaded { was_loaded: false, .. }));
    }
    let request = world.asks(session, load("m"));
    assert!(matches!(world.outcome(session, request), ModelOutcome::Loaded { was_loaded: true, .. }));
    let failing = world.asks(session, load("bad"));
    world.loader_dies();
    assert_eq!(world.refusal(session, failing).code, Code::ModelLoadError);
    assert_eq!(world.core.sessions.get(session).unwrap().waiting, 0);
}

#[test]
fn an_unload_stops_a_load_that_nobody_waits_for() {
    let mut world = World::with(Limits::default(), policy());
    let session = world.connect();
    let gave_up = world.asks(session, acquire("m", false, 0));
    assert_eq!(world.refusal(session, gave_up).code, Code::LoadTimeout);
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { .. }));
    assert!(world.loaders.is_empty());
    let waits = world.asks(session, acquire("m", false, 1000));
    let request = world.asks(session, unload("m", UnloadMode::IfIdle));
    assert_eq!(world.refusal(session, request).code, Code::ModelInUse);
    let request = world.asks(session, unload("m", UnloadMode::Force));
    assert!(matches!(world.outcome(session, request), ModelOutcome::Unloaded { .. }));
    assert_eq!(world.refusal(session, waits).code, Code::Cancelled);
}

#[test]
fn a_reload_switches_once_the_new_generation_is_served() {
    let mut world = World::with(Limits::default(), policy());
    let (holder, lease) = world.holds("m");
    let session = world.connect();
    let request = world.asks(session, reload("m"));
    let report = world.report_of("m");
    assert_eq!((report.state, report.detail.reloading), (ModelState::Ready, true));
    world.loader_finishes("m");
    assert_eq!(world.images.len(), 2);
    // Until the engine serves the new one, new leases get the old one.
    let early = world.asks(session, acquire("m", false, 0));
    let generation = |world: &World, request| match world.answers(session, request)[..] {
        [BrokerMessage::Leased(leased)] => leased.model.generation,
        ref other => panic!("no lease but {other:?}"),
    };
    assert_eq!(generation(&world, early), 1);
    world.engine_works();
    assert!(matches!(world.outcome(session, request), ModelOutcome::Reloaded { replaced: 1, .. }));
    let late = world.asks(session, acquire("m", false, 0));
    assert_eq!(generation(&world, late), 2);
    let told = BrokerMessage::Superseded(Superseded { lease_id: lease, generation: 2 });
    assert!(world.told[&holder].iter().any(|(id, message)| *id == 0 && *message == told));
    let request = world.asks(holder, job(lease, 1, 0));
    world.engine_works();
    assert_eq!(world.answer(holder, request).status, Code::Ok, "the old one serves who holds it");
    world.leaves(holder);
    assert_eq!(world.images.len(), 2, "the early lease holds the old one still");
    world.leaves(session);
    assert_eq!(world.images.len(), 1);
    assert_eq!(world.report_of("m").detail.reloads, 1);
}

#[test]
fn a_reload_that_fails_changes_nothing_and_says_why() {
    let mut world = World::with(Limits::default(), policy());
    let (holder, lease) = world.holds("m");
    let session = world.connect();
    let killed = world.asks(session, reload("m"));
    world.loader_dies();
    assert_eq!(world.refusal(session, killed).code, Code::ModelLoadError);
    let another = world.asks(session, reload("m"));
    world.loader_finishes("other");
    let refusal = world.refusal(session, another);
    assert_eq!(refusal.code, Code::ModelInvalid);
    assert!(refusal.message.contains("other"), "{}", refusal.message);
    let refused = world.asks(session, reload("m"));
    world.loader_finishes("m");
    let message = "not this one".to_owned();
    world.engine_says(FromEngine::ModelFailed { generation: 2, code: Code::ModelInvalid, message });
    assert_eq!(world.refusal(session, refused).code, Code::ModelInvalid);
    assert_eq!(world.images.len(), 1);
    let request = world.asks(holder, job(lease, 1, 0));
    world.engine_works();
    assert_eq!(world.answer(holder, request).status, Code::Ok);
    let report = world.report_of("m");
    assert_eq!((report.state, report.detail.failures), (ModelState::Ready, 3));
    assert_eq!(report.detail.last_error.unwrap().code, Code::ModelInvalid);
}

#[test]
fn a_reload_survives_the_engines_death() {
    let mut world = World::with(Limits::default(), policy());
    world.holds("m");
    let session = world.connect();
    let request = world.asks(session, reload("m"));
    world.loader_finishes("m");
    world.engine_dies();
    world.engine_works();
    assert!(matches!(world.outcome(session, request), ModelOutcome::Reloaded { .. }));
}

#[test]
fn health_is_what_the_engine_says_and_one_probe_answers_all() {
    let mut world = World::with(Limits::default(), policy());
    let (session, _) = world.holds("m");
    let unknown = world.asks(session, health("x"));
    assert_eq!(world.refusal(session, unknown).code, Code::ModelUnavailable);
    let requests = [world.asks(session, health("m")), world.asks(session, health("m"))];
    let inbox = &world.engine.as_ref().unwrap().1;
    assert_eq!(inbox.iter().filter(|m| matches!(m, ToEngine::Probe { .. })).count(), 1);
    world.engine_works();
    for request in requests {
        assert!(matches!(
            world.outcome(session, request),
            ModelOutcome::Healthy { probe_us: 7, engine_pid: 100, .. }
        ));
    }
    let sick = world.asks(session, health("m"));
    let message = "cosine 0.2".to_owned();
    world.engine_says(FromEngine::Probed { generation: 1, code: Code::BadResult, message, probe_us: 1 });
    assert_eq!(world.refusal(session, sick).code, Code::BadResult);
    let lost = world.asks(session, health("m"));
    world.engine_dies();
    assert_eq!(world.refusal(session, lost).code, Code::ModelUnavailable);
    let late = world.asks(session, health("m"));
    world.now_ns += 2 * SECOND;
    world.happens(Event::Tick);
    assert_eq!(world.refusal(session, late).code, Code::DeadlineExceeded);
}

#[test]
fn only_the_owner_unloads_and_reloads() {
    let mut world = World::with(Limits::default(), policy());
    world.core.config.allow_other_users = true;
    world.open.insert(50);
    world.happens(Event::Connected { session: 50, pid: 9, uid: UID + 1 });
    world.asks(50, hello());
    for order in [unload("m", UnloadMode::IfIdle), reload("m")] {
        let request = world.asks(50, order);
        assert_eq!(world.refusal(50, request).code, Code::PermissionDenied);
    }
}

#[test]
fn a_budget_gives_up_caches_first_then_idle_models_then_refuses() {
    let tight = Policy { memory_budget_bytes: Some(10_000), max_shared_models: 0, ..policy() };
    let mut world = World::with(Limits::default(), tight);
    let (idle, _) = world.holds("a");
    world.leaves(idle);
    world.holds("b");
    // Each image has 4096 bytes; the idle one's cache has 1000.
    world.cached = vec![(1, 1000)];
    let session = world.connect();
    let small = world.asks(session, acquire("c", false, 1000));
    world.progress(0, 1500);
    assert_eq!(world.images.len(), 2, "the cache was enough");
    assert!(world.caches.contains(&1), "and is there again, empty");
    world.cached.clear();
    world.loader_finishes("c");
    world.engine_works();
    world.lease(session, small);
    assert_eq!(world.state_of("a"), ModelState::Ready);
    world.engine_works();
    let large = world.asks(session, acquire("d", false, 1000));
    world.progress(0, 1600);
    world.engine_works();
    assert_eq!(world.state_of("a"), ModelState::Unloaded, "then the idle model left");
    world.progress(0, 9000);
    let refusal = world.refusal(session, large).clone();
    assert_eq!(refusal.code, Code::OutOfMemory);
    assert!(
        refusal.message.contains("9000 bytes are needed and 1808 bytes of the budget"),
        "{}",
        refusal.message
    );
    assert!(refusal.retry_after_ms > 0);
    assert!(world.loaders.is_empty());
    assert_eq!((world.state_of("b"), world.state_of("c")), (ModelState::Ready, ModelState::Ready));
}

#[test]
fn what_the_system_has_left_is_watched_while_an_image_grows() {
    let limits = Limits { memory_reserve_bytes: 1000, ..Limits::default() };
    let mut world = World::with(limits, policy());
    world.available_bytes = Some(10_000);
    let session = world.connect();
    let fits = world.asks(session, acquire("a", false, 1000));
    world.progress(0, 9000);
    world.now_ns += 200 * MS;
    world.available_bytes = Some(5000);
    world.progress(5000, 9000);
    world.loader_finishes("a");
    world.engine_works();
    world.lease(session, fits);
    let fails = world.asks(session, acquire("b", false, 1000));
    world.available_bytes = Some(9_000);
    world.progress(0, 8000);
    assert!(world.answers(session, fails).is_empty());
    world.available_bytes = Some(3_000);
    world.progress(1000, 8000);
    assert!(world.answers(session, fails).is_empty(), "looked at a moment ago");
    world.now_ns += 100 * MS;
    world.progress(1000, 8000);
    assert_eq!(world.refusal(session, fails).code, Code::OutOfMemory);
    // A reload that does not fit leaves the old one.
    world.now_ns += SECOND;
    let request = world.asks(session, reload("a"));
    world.progress(0, 8000);
    assert_eq!(world.refusal(session, request).code, Code::OutOfMemory);
    assert_eq!(world.state_of("a"), ModelState::Ready);
}

#[test]
fn metrics_count_what_happened() {
    let mut world = World::with(Limits::default(), policy());
    let (session, lease) = world.holds("m");
    world.holds("m");
    let request = world.asks(session, acquire("-x", false, 0));
    assert_eq!(world.refusal(session, request).code, Code::ModelNotFound);
    world.asks(session, job(lease, 1, 0));
    let report = world.status();
    let metrics = report.metrics;
    assert_eq!((metrics.loads, metrics.load.total(), metrics.access.total()), (1, 1, 2));
    assert_eq!((metrics.sessions.now, metrics.sessions.peak, metrics.leases.now), (3, 3, 2));
    assert_eq!(metrics.jobs.peak, 1);
    assert_eq!(metrics.memory.saved_bytes, 4096, "two hold one");
    assert!(metrics.errors.iter().any(|e| e.code == Code::ModelNotFound && e.count == 1));
    assert!(report.alerts.is_empty());
    for _ in 0..3 {
        world.now_ns += 2 * SECOND;
        world.engine_dies();
    }
    world.engine_works();
    assert_eq!(
        world.status().alerts.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(),
        ["engine_restarts"]
    );
}

//! Decisions in given situations, one a test.

use super::*;
use shm_layout::wire::{CacheInsertKey, CacheTotals};

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
fn an_engine_that_saves_is_drained_though_no_work_is_left() {
    for idle in [false, true] {
        let mut world = World::new(Limits::default());
        world.core.config.engine_saves = true;
        world.core.config.idle_exit = idle.then_some(Duration::from_secs(1));
        world.engine_works();
        if idle {
            world.now_ns = world.core.next_timer_ns().unwrap();
            world.happens(Event::Tick);
        } else {
            world.happens(Event::StopSignal);
        }
        assert!(!world.exited);
        assert_eq!(world.engine.as_ref().unwrap().1, [ToEngine::Drain]);
        assert!(world.engine_takes_one(false));
        assert!(world.exited && world.engines == 1);
    }
}

#[test]
fn an_engine_that_saves_gets_no_more_time_than_work_does() {
    for way in 0..4 {
        let mut world = World::new(Limits::default());
        world.core.config.engine_saves = true;
        if way < 3 {
            world.engine_works();
        }
        world.happens(Event::StopSignal);
        match way {
            0 => world.happens(Event::StopSignal),
            1 => {
                world.now_ns = world.core.next_timer_ns().unwrap();
                world.happens(Event::Tick);
            }
            2 => world.engine_dies(),
            // It never was up, so there is nothing to wait for.
            _ => {}
        }
        assert!(world.exited && world.engines == 1, "way {way}");
    }
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

fn insert(generation: u64, vectors: usize, numbers: usize) -> FromEngine {
    let keys = vec![CacheInsertKey { low: 1, high: 2, left_ms: 0 }; vectors];
    FromEngine::CacheInsert { generation, bulk: true, keys, values: vec![0; 4 * numbers] }
}

#[test]
fn caches_are_filled_by_what_engines_say_and_go_with_their_generation() {
    let mut world = World::new(Limits::default());
    let (session, _) = world.leased(true);
    assert!(world.caches.contains(&1));
    let told = world.told[&session].iter().find_map(|(_, message)| match message {
        BrokerMessage::Leased(leased) => Some(leased.cache),
        _ => None,
    });
    assert_eq!(told, Some(Some(CacheDescription { region_bytes: 4096 })));
    world.engine_says(insert(1, 3, 12));
    // Lengths that are not the model's, and generations that never were.
    for lie in [insert(1, 3, 11), insert(1, 0, 4), insert(1, 1, 8), insert(2, 1, 4), insert(u64::MAX, 1, 4)] {
        world.engine_says(lie);
    }
    assert_eq!(world.filled, [(1, true, 3)]);
    // The next engine gets it too; the counters are the dead one's no more.
    let totals = CacheTotals { engine_hits: 5, ..CacheTotals::default() };
    world.engine_says(FromEngine::CacheTotals { generation: 1, totals });
    assert_eq!(world.status().models[0].cache.unwrap().totals.engine_hits, 5);
    world.engine_dies();
    world.engine_says(FromEngine::Ready { threads: 1 });
    assert!(matches!(
        world.engine.as_ref().unwrap().1[0],
        ToEngine::LoadModel { cache: Some(CacheDescription { region_bytes: 4096 }), .. }
    ));
    assert_eq!(world.status().models[0].cache.unwrap().totals, CacheTotals::default());
}

#[test]
fn a_model_whose_cache_cannot_be_made_is_served_without() {
    let mut world = World::new(Limits::default());
    world.caches_fail = true;
    let (session, _) = world.leased(true);
    assert!(
        world.told[&session].iter().any(|(_, message)| {
            matches!(message, BrokerMessage::Leased(leased) if leased.cache.is_none())
        })
    );
    world.engine_says(insert(1, 1, 4));
    assert!(world.filled.is_empty());
    assert_eq!(world.status().models[0].cache, None);
}

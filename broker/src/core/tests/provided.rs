//! Models that clients' processes provide, in given situations and in random ones.

use super::*;
use proptest::prelude::*;
use std::time::Duration;

const ID: &str = "custom/x";

fn call(lease_id: u64, job_id: u64, priority: Priority, deadline_ns: u64) -> ClientMessage {
    let payload = vec![job_id as u8; 10];
    let operation = Operation::Call;
    ClientMessage::Submit(JobFrame { lease_id, job_id, operation, priority, deadline_ns, payload })
}

impl World {
    /// A session of a process of its own.
    fn connect_as(&mut self, pid: u32) -> u64 {
        self.last_session += 1;
        let session = self.last_session;
        self.open.insert(session);
        self.happens(Event::Connected { session, pid, uid: UID });
        self.asks(session, hello());
        session
    }

    fn provider_of(&mut self, pid: u32, offer: Provide) -> u64 {
        let session = self.connect_as(pid);
        let request = self.asks(session, ClientMessage::Provide(offer));
        assert!(matches!(self.answers(session, request)[..], [BrokerMessage::Provided { .. }]));
        session
    }

    fn provider(&mut self, pid: u32) -> u64 {
        self.provider_of(pid, offer(ID))
    }

    fn client_of(&mut self, model: &str) -> (u64, u64) {
        let session = self.connect();
        let message = Acquire { model: model.into(), want_lane: true, want_image: false, wait_ms: 1000 };
        let request = self.asks(session, ClientMessage::Acquire(message));
        let lease = self.lease(session, request);
        (session, lease)
    }

    fn calls(&mut self, session: u64, lease: u64, job_id: u64) -> u64 {
        self.asks(session, call(lease, job_id, Priority::Interactive, 0))
    }

    fn reply(&mut self, provider: u64, relay_id: u64, status: Code, payload: Vec<u8>) {
        let frame = AnswerFrame { job_id: relay_id, status, payload, queue_us: 0, execution_us: 0 };
        self.asks(provider, ClientMessage::ProviderAnswer(frame));
    }

    /// A provider answers its oldest job with the job's own payload.
    fn provider_answers_one(&mut self, provider: u64) -> bool {
        let Some(job) = self.given.get_mut(&provider).and_then(VecDeque::pop_front) else { return false };
        self.reply(provider, job.relay_id, Code::Ok, job.payload);
        true
    }

    fn provider_dies(&mut self, provider: u64) {
        self.given.remove(&provider);
        self.leaves(provider);
    }

    fn given_to(&self, provider: u64) -> usize {
        self.given.get(&provider).map_or(0, VecDeque::len)
    }

    fn later(&mut self, by: Duration) {
        self.now_ns += nanos(by);
        self.happens(Event::Tick);
    }
}

#[test]
fn calls_go_to_the_provider_and_back_without_a_lane() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let [BrokerMessage::Leased(leased)] = world.told[&session]
        .iter()
        .filter(|(_, m)| matches!(m, BrokerMessage::Leased(_)))
        .map(|(_, m)| m)
        .collect::<Vec<_>>()[..]
    else {
        panic!()
    };
    assert!(leased.lane.is_none() && shm_layout::wire::is_provided(leased.model.generation));
    let request = world.calls(session, lease, 7);
    assert!(world.provider_answers_one(provider));
    let answer = world.answer(session, request);
    assert_eq!((answer.job_id, answer.status, &answer.payload[..]), (7, Code::Ok, &[7u8; 10][..]));
    assert!(world.loaders.is_empty(), "nothing is loaded for it");
    let report = world.status().provided.remove(0);
    assert_eq!((report.totals.jobs, report.leases, report.providers[0].pid), (1, 1, 1));
}

#[test]
fn what_was_not_offered_is_refused() {
    let mut world = World::new(Limits::default());
    let _provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let request = world.asks(session, job(lease, 1, 0));
    assert_eq!(world.refusal(session, request).code, Code::UnsupportedOperation);
    let ClientMessage::Submit(mut big) = call(lease, 2, Priority::Bulk, 0) else { panic!() };
    big.payload = vec![0; 101];
    let request = world.asks(session, ClientMessage::Submit(big));
    assert_eq!(world.refusal(session, request).code, Code::TooLarge);
    let wish = Acquire { model: ID.into(), want_lane: false, want_image: true, wait_ms: 0 };
    let request = world.asks(session, ClientMessage::Acquire(wish));
    assert_eq!(world.refusal(session, request).code, Code::UnsupportedOperation);
    for (bad, code) in [
        (Provide { model_id: "default".into(), ..offer(ID) }, Code::ModelInvalid),
        (Provide { fingerprint: 2, ..offer(ID) }, Code::ModelInvalid),
    ] {
        let other = world.connect_as(9);
        let request = world.asks(other, ClientMessage::Provide(bad));
        assert_eq!(world.refusal(other, request).code, code);
    }
}

#[test]
fn only_the_brokers_own_user_provides() {
    let mut world = World::new(Limits::default());
    world.core.config.allow_other_users = true;
    world.last_session += 1;
    let session = world.last_session;
    world.open.insert(session);
    world.happens(Event::Connected { session, pid: 5, uid: UID + 1 });
    world.asks(session, hello());
    let request = world.asks(session, ClientMessage::Provide(offer(ID)));
    assert_eq!(world.refusal(session, request).code, Code::PermissionDenied);
}

#[test]
fn a_lease_waits_for_a_provider_for_a_bounded_time() {
    let limits = Limits { provider_return: Duration::from_millis(500), ..Limits::default() };
    let mut world = World::new(limits);
    let session = world.connect();
    let wish = |wait_ms| Acquire { model: ID.into(), want_lane: true, want_image: false, wait_ms };
    let early = world.asks(session, ClientMessage::Acquire(wish(100_000)));
    assert!(world.answers(session, early).is_empty());
    world.later(Duration::from_millis(501));
    assert_eq!(world.refusal(session, early).code, Code::ModelNotFound);
    let waits = world.asks(session, ClientMessage::Acquire(wish(400)));
    let provider = world.provider(1);
    world.lease(session, waits);
    world.provider_dies(provider);
    let again = world.asks(session, ClientMessage::Acquire(wish(400)));
    world.later(Duration::from_millis(401));
    assert_eq!(world.refusal(session, again).code, Code::ModelUnavailable);
}

#[test]
fn jobs_of_a_dead_provider_go_to_another_and_wait_for_a_return() {
    let mut world = World::new(Limits::default());
    let (a, b) = (world.provider(1), world.provider(2));
    let (session, lease) = world.client_of(ID);
    let requests: Vec<u64> = (1..=6).map(|n| world.calls(session, lease, n)).collect();
    assert_eq!((world.given_to(a), world.given_to(b)), (2, 2), "each has as many as it takes");
    world.provider_dies(a);
    while world.provider_answers_one(b) {}
    for request in &requests {
        assert_eq!(world.answer(session, *request).status, Code::Ok);
    }
    let last = world.calls(session, lease, 9);
    world.provider_dies(b);
    assert!(world.answers(session, last).is_empty());
    let c = world.provider(3);
    world.provider_answers_one(c);
    assert_eq!(world.answer(session, last).status, Code::Ok);
    let report = world.status().provided.remove(0);
    assert_eq!((report.totals.jobs, report.totals.retries), (7, 3));
}

#[test]
fn nobody_waits_for_ever_for_a_provider_that_does_not_return() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let patient = world.calls(session, lease, 1);
    let deadline_ns = world.now_ns + 5 * MS;
    let hasty = world.asks(session, call(lease, 2, Priority::Bulk, deadline_ns));
    world.provider_dies(provider);
    world.later(Duration::from_millis(6));
    assert_eq!(world.answer(session, hasty).status, Code::DeadlineExceeded);
    world.later(world.core.config.limits.provider_return);
    assert_eq!(world.answer(session, patient).status, Code::ModelUnavailable);
    // The lease holds: a provider that comes late serves it.
    let provider = world.provider(2);
    let late = world.calls(session, lease, 3);
    world.provider_answers_one(provider);
    assert_eq!(world.answer(session, late).status, Code::Ok);
}

#[test]
fn a_job_that_kills_providers_is_tried_alone_and_then_given_up() {
    let mut world = World::new(Limits::default());
    let first = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let bad = world.calls(session, lease, 1);
    let good = world.calls(session, lease, 2);
    world.provider_dies(first);
    let mut deaths = 1;
    while world.answers(session, bad).is_empty() {
        let provider = world.provider(10 + deaths);
        let has_bad = |world: &World| world.given[&provider].iter().any(|job| job.payload[0] == 1);
        while world.given_to(provider) > 0 && !has_bad(&world) {
            world.provider_answers_one(provider);
        }
        if deaths >= 2 {
            assert!(!has_bad(&world) || world.given_to(provider) == 1, "it is alone");
        }
        world.provider_dies(provider);
        deaths += 1;
    }
    assert_eq!(deaths, MAX_JOB_ATTEMPTS);
    assert_eq!(world.answer(session, bad).status, Code::ProviderFailed);
    let last = world.provider(99);
    while world.provider_answers_one(last) {}
    assert_eq!(world.answer(session, good).status, Code::Ok);
}

#[test]
fn silence_fails_the_job_and_adds_up_to_the_end_of_the_provider() {
    let mut world = World::new(Limits::default());
    let silent = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let request = world.calls(session, lease, 1);
    world.later(Duration::from_millis(1001));
    assert_eq!(world.answer(session, request).status, Code::ProviderTimeout);
    assert!(world.told[&silent].iter().any(|(_, m)| matches!(m, BrokerMessage::ProviderCancel { .. })));
    assert!(world.open.contains(&silent));
    world.later(Duration::from_millis(1001));
    world.later(Duration::from_millis(1001));
    assert!(!world.open.contains(&silent), "it never let go of the job");
    assert_eq!(world.core.relay.len(), 0);
    // The same process is not taken back at once.
    let back = world.connect_as(1);
    let request = world.asks(back, ClientMessage::Provide(offer(ID)));
    let refusal = world.refusal(back, request);
    assert!(refusal.code == Code::ProviderFailed && refusal.retry_after_ms > 0);
}

#[test]
fn a_late_answer_after_a_timeout_is_no_further_fault_and_frees_the_place() {
    let mut world = World::new(Limits::default());
    let slow = world.provider_of(1, Provide { max_in_flight: 1, ..offer(ID) });
    let (session, lease) = world.client_of(ID);
    world.calls(session, lease, 1);
    let next = world.calls(session, lease, 2);
    world.later(Duration::from_millis(1001));
    assert_eq!(world.given_to(slow), 1, "its place is taken until it lets go");
    world.provider_answers_one(slow);
    world.provider_answers_one(slow);
    assert_eq!(world.answer(session, next).status, Code::Ok);
    assert_eq!(world.status().provided[0].providers[0].faults, 1);
}

#[test]
fn answers_twice_unknown_too_big_and_from_nobody_are_faults_of_their_sender() {
    let mut world = World::new(Limits::default());
    let (honest, liar) = (world.provider(1), world.provider(2));
    let (session, lease) = world.client_of(ID);
    let requests: Vec<u64> = (1..=4).map(|n| world.calls(session, lease, n)).collect();
    let stolen = world.given[&honest][0].relay_id;
    world.reply(liar, stolen, Code::Ok, vec![6; 6]);
    world.reply(liar, 12345, Code::Ok, vec![]);
    assert!(world.answers(session, requests[0]).is_empty(), "nobody answers another's job");
    let own = world.given[&liar][0].relay_id;
    world.reply(liar, own, Code::Ok, vec![0; 101]);
    assert!(!world.open.contains(&liar));
    let told = |world: &World| {
        requests.iter().filter(|r| matches!(world.answers(session, **r)[..], [BrokerMessage::Answer(a)] if a.status == Code::ProviderFailed)).count()
    };
    assert_eq!(told(&world), 1, "only the job that was answered wrongly fails");
    while world.provider_answers_one(honest) {}
    assert!(requests.iter().all(|r| world.answers(session, *r).len() == 1));
    assert_eq!(told(&world), 1);
    world.reply(session, 1, Code::Ok, vec![]);
    assert!(!world.open.contains(&session), "a client that answers is thrown out");
}

#[test]
fn codes_that_are_not_a_providers_to_give_do_not_get_through() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    for (n, (said, heard)) in [
        (Code::Stale, Code::ProviderFailed),
        (Code::ShuttingDown, Code::ProviderFailed),
        (Code::BadPayload, Code::BadPayload),
    ]
    .into_iter()
    .enumerate()
    {
        let request = world.calls(session, lease, n as u64);
        let relay_id = world.given.get_mut(&provider).unwrap().pop_front().unwrap().relay_id;
        world.reply(provider, relay_id, said, b"why".to_vec());
        let answer = world.answer(session, request);
        assert_eq!((answer.status, &answer.payload[..]), (heard, &b"why"[..]));
    }
}

#[test]
fn cancelled_jobs_are_answered_at_once_and_their_client_may_leave() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let request = world.calls(session, lease, 1);
    world.asks(session, ClientMessage::Cancel { job_id: 1 });
    assert_eq!(world.answer(session, request).status, Code::Cancelled);
    world.calls(session, lease, 2);
    world.leaves(session);
    assert_eq!(world.core.relay.len(), 2, "the provider still has both");
    while world.provider_answers_one(provider) {}
    assert_eq!(world.core.relay.len(), 0);
    assert_eq!(world.status().provided[0].providers[0].faults, 0);
}

#[test]
fn interactive_goes_first_and_bulk_is_not_starved() {
    let mut world = World::new(Limits::default());
    let provider = world.provider_of(1, Provide { max_in_flight: 1, ..offer(ID) });
    let (session, lease) = world.client_of(ID);
    let bulk = world.asks(session, call(lease, 50, Priority::Bulk, 0));
    let other = world.asks(session, call(lease, 51, Priority::Bulk, 0));
    (0..20).for_each(|n| {
        world.calls(session, lease, n);
    });
    world.provider_answers_one(provider);
    assert_eq!(world.answer(session, bulk).status, Code::Ok);
    for _ in 0..9 {
        assert!(world.answers(session, other).is_empty());
        world.provider_answers_one(provider);
    }
    assert_eq!(world.answer(session, other).status, Code::Ok, "its turn came after eight others");
}

#[test]
fn another_model_under_the_id_makes_leases_stale() {
    let mut world = World::new(Limits::default());
    let old = world.provider(1);
    let (session, lease) = world.client_of(ID);
    world.provider_dies(old);
    let waiting = world.calls(session, lease, 1);
    let new = world.provider_of(2, Provide { fingerprint: 2, ..offer(ID) });
    assert_eq!(world.answer(session, waiting).status, Code::Stale);
    let request = world.calls(session, lease, 2);
    assert_eq!(world.refusal(session, request).code, Code::Stale);
    assert_eq!(world.given_to(new), 0);
    world.asks(session, ClientMessage::Release { lease_id: lease });
    assert_eq!(world.core.providers.models.len(), 1, "the old one is forgotten");
}

#[test]
fn withdrawing_ends_new_jobs_and_not_old_ones() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let before = world.calls(session, lease, 1);
    let request = world.asks(provider, ClientMessage::Withdraw { model_id: ID.into() });
    assert!(matches!(world.answers(provider, request)[..], [BrokerMessage::Withdrawn]));
    let after = world.calls(session, lease, 2);
    while world.provider_answers_one(provider) {}
    assert_eq!(world.answer(session, before).status, Code::Ok);
    assert!(world.answers(session, after).is_empty());
    world.leaves(provider);
    let next = world.provider(2);
    world.provider_answers_one(next);
    assert_eq!(world.answer(session, after).status, Code::Ok);
}

#[test]
fn an_engine_that_cannot_start_is_no_affair_of_providers() {
    let mut world = World::new(Limits::default());
    let provider = world.provider(1);
    let (session, lease) = world.client_of(ID);
    let request = world.calls(session, lease, 1);
    world.engine_starts = false;
    world.engine_dies();
    assert!(world.core.engine.is_broken(world.core.limits()));
    assert!(world.answers(session, request).is_empty());
    world.provider_answers_one(provider);
    assert_eq!(world.answer(session, request).status, Code::Ok);
}

#[test]
fn providers_alone_do_not_keep_a_broker_that_is_to_leave_when_idle() {
    let mut world = World::new(Limits::default());
    world.core.config.idle_exit = Some(Duration::from_secs(1));
    let (provider, session) = (world.provider(1), world.connect());
    world.later(Duration::from_secs(2));
    assert!(!world.exited);
    world.leaves(session);
    world.later(Duration::from_secs(2));
    assert!(world.exited && world.open.contains(&provider));
}

#[test]
fn processes_are_started_again_and_a_faulty_one_is_replaced() {
    let mut world = World::new(Limits::default());
    world.core.provider_children = super::super::provider_children::ProviderChildren::new(&[ID.to_owned()]);
    world.happens(Event::Tick);
    assert_eq!(world.processes.len(), 1);
    world.happens(Event::ProviderStarted { child: 0, pid: 77 });
    let provider = world.provider(77);
    for _ in 0..3 {
        world.reply(provider, 999, Code::Ok, vec![]);
    }
    assert!(!world.open.contains(&provider) && world.processes.is_empty());
    let report = world.status().provided.remove(0);
    assert_eq!(report.children[0].pid, 0);
    assert!(report.children[0].last_exit.as_ref().unwrap().contains("SIGKILL"));
    world.later(Duration::from_millis(100));
    assert_eq!(world.processes.len(), 1);
    let session = world.connect();
    let wish = Acquire { model: ID.into(), want_lane: true, want_image: false, wait_ms: 60_000 };
    let request = world.asks(session, ClientMessage::Acquire(wish));
    world.later(Duration::from_secs(50));
    assert!(world.answers(session, request).is_empty(), "one that is to come may take its time");
    world.provider(78);
    world.lease(session, request);
}

/// One step of the random world.
#[derive(Debug, Clone)]
enum Step {
    Connect,
    Leave(usize),
    Provide(usize, bool, bool),
    Withdraw(usize),
    Acquire(usize, bool),
    Call(usize, usize, bool, u64),
    Cancel(usize, u64),
    Answer(usize),
    Nonsense(usize, u64),
    Dies(usize),
    Time(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Connect),
        1 => (0usize..8).prop_map(Step::Leave),
        4 => (0usize..8, any::<bool>(), prop::bool::weighted(0.2)).prop_map(|(s, x, o)| Step::Provide(s, x, o)),
        1 => (0usize..8).prop_map(Step::Withdraw),
        5 => (0usize..8, any::<bool>()).prop_map(|(s, x)| Step::Acquire(s, x)),
        14 => (0usize..8, 0usize..3, any::<bool>(), 0u64..3).prop_map(|(s, l, b, d)| Step::Call(s, l, b, d)),
        2 => (0usize..8, 0u64..30).prop_map(|(s, j)| Step::Cancel(s, j)),
        14 => (0usize..8).prop_map(Step::Answer),
        1 => (0usize..8, 0u64..50).prop_map(|(s, r)| Step::Nonsense(s, r)),
        2 => (0usize..8).prop_map(Step::Dies),
        3 => (1u64..900_000).prop_map(Step::Time),
    ];
    prop::collection::vec(step, 0..200)
}

fn any_of(sessions: impl Iterator<Item = u64>, index: usize) -> Option<u64> {
    let sessions: Vec<u64> = sessions.collect();
    (!sessions.is_empty()).then(|| sessions[index % sessions.len()])
}

proptest! {
    #[test]
    fn every_call_is_answered_once_whatever_providers_do(steps in steps(), drains in any::<bool>()) {
        let limits = Limits { max_session_jobs: 8, max_jobs: 20, ..Limits::default() };
        let mut world = World::new(limits);
        world.engine_works();
        let mut owed: Vec<(u64, u64)> = Vec::new();
        let mut next_job = 0;
        for step in steps {
            match step {
                Step::Connect => {
                    let pid = 1000 + world.last_session as u32;
                    world.connect_as(pid);
                }
                Step::Leave(s) => {
                    if let Some(session) = any_of(world.open.iter().copied(), s) {
                        world.provider_dies(session);
                    }
                }
                Step::Provide(s, x, other) => {
                    let Some(session) = any_of(world.open.iter().copied(), s) else { continue };
                    let id = if x { "custom/x" } else { "custom/y" };
                    let offered = Provide { fingerprint: 1 + u64::from(other), ..offer(id) };
                    owed.push((session, world.asks(session, ClientMessage::Provide(offered))));
                }
                Step::Withdraw(s) => {
                    let Some(session) = any_of(world.open.iter().copied(), s) else { continue };
                    let message = ClientMessage::Withdraw { model_id: "custom/x".into() };
                    owed.push((session, world.asks(session, message)));
                }
                Step::Acquire(s, x) => {
                    let Some(session) = any_of(world.open.iter().copied(), s) else { continue };
                    let model = if x { "custom/x" } else { "custom/y" };
                    let wish = Acquire { model: model.into(), want_lane: true, want_image: false, wait_ms: 700 };
                    owed.push((session, world.asks(session, ClientMessage::Acquire(wish))));
                }
                Step::Call(s, l, bulk, deadline) => {
                    let Some(session) = any_of(world.open.iter().copied(), s) else { continue };
                    let lease = world.core.leases.of_session(session).get(l).copied().unwrap_or(999);
                    next_job += 1;
                    let priority = if bulk { Priority::Bulk } else { Priority::Interactive };
                    let deadline_ns = if deadline == 0 { 0 } else { world.now_ns + deadline * 300 * MS };
                    let message = call(lease, next_job % 30, priority, deadline_ns);
                    owed.push((session, world.asks(session, message)));
                }
                Step::Cancel(s, job_id) => {
                    if let Some(session) = any_of(world.open.iter().copied(), s) {
                        world.asks(session, ClientMessage::Cancel { job_id });
                    }
                }
                Step::Answer(s) => {
                    if let Some(session) = any_of(world.given.keys().copied(), s) {
                        world.provider_answers_one(session);
                    }
                }
                Step::Nonsense(s, relay_id) => {
                    if let Some(session) = any_of(world.core.providers.sessions.keys().copied(), s) {
                        world.reply(session, relay_id, Code::Ok, vec![1]);
                    }
                }
                Step::Dies(s) => {
                    if let Some(session) = any_of(world.core.providers.sessions.keys().copied(), s) {
                        world.provider_dies(session);
                    }
                }
                Step::Time(us) => world.later(Duration::from_micros(us)),
            }
            for ((_, session), place) in &world.core.providers.places {
                prop_assert!(place.in_flight <= place.max_in_flight && world.open.contains(session));
            }
        }
        if drains {
            world.happens(Event::StopSignal);
        }
        // Providers that are there answer; what nobody answers ends with its time.
        for _ in 0..200 {
            let providers: Vec<u64> = world.given.keys().copied().collect();
            for provider in providers {
                while world.provider_answers_one(provider) {}
            }
            world.engine_works();
            match world.core.next_timer_ns() {
                Some(due) => world.now_ns = world.now_ns.max(due),
                None => break,
            }
            world.happens(Event::Tick);
        }
        prop_assert_eq!(world.exited, drains);
        for (session, request) in owed {
            let count = world.answers(session, request).len();
            prop_assert!(count <= 1, "request {} has {} answers", request, count);
            prop_assert!(count == 1 || !world.open.contains(&session), "request {} has no answer", request);
        }
        if !drains {
            for session in world.open.clone() {
                world.leaves(session);
            }
            for _ in 0..20 {
                let Some(due) = world.core.next_timer_ns() else { break };
                world.now_ns = world.now_ns.max(due);
                world.happens(Event::Tick);
            }
            let core = &world.core;
            prop_assert_eq!((core.leases.len(), core.relay.len(), core.sessions.len()), (0, 0, 0));
            let providers = &core.providers;
            prop_assert!(providers.models.is_empty() && providers.places.is_empty() && providers.sessions.is_empty());
            prop_assert_eq!(core.next_timer_ns(), None);
        }
    }
}

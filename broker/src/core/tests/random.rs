//! Clients, loaders and an engine that live and die at any moment: every request is answered once, and nothing is kept.

use super::*;
use proptest::prelude::*;
use shm_layout::wire::{LoadProgress, ModelCommand, UnloadMode};

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
    Order(usize, u8, u8),
    LoaderSays(u64, u64),
    MemoryLeft(Option<u64>),
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
        8 => (0usize..8, 0u8..4, 0u8..7).prop_map(|(s, m, order)| Step::Order(s, m, order)),
        2 => (0u64..20_000, 0u64..20_000).prop_map(|(done, total)| Step::LoaderSays(done, total)),
        1 => prop::option::of(0u64..20_000).prop_map(Step::MemoryLeft),
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
            Step::Order(s, model, order) => {
                let Some(session) = self.pick(s) else { return };
                let model = ["", "a", "b", "c"][model as usize].to_owned();
                let command = match order {
                    0 => ModelCommand::Load { model, wait_ms: 3 },
                    1 => ModelCommand::Load { model, wait_ms: 5000 },
                    2 => ModelCommand::Reload { model, wait_ms: 5000 },
                    3 => ModelCommand::Health { model, wait_ms: 5000 },
                    4 => ModelCommand::Unload { model, mode: UnloadMode::IfIdle },
                    5 => ModelCommand::Unload { model, mode: UnloadMode::WhenIdle },
                    _ => ModelCommand::Unload { model, mode: UnloadMode::Force },
                };
                let request = self.asks(session, ClientMessage::Model(command));
                ledger.owed.entry(session).or_default().push(request);
            }
            Step::LoaderSays(done_bytes, total_bytes) => {
                let Some(load_id) = self.loaders.keys().next().copied() else { return };
                let progress = LoadProgress { stage: "copy".into(), done_bytes, total_bytes };
                self.happens(Event::LoaderProgress { load_id, progress });
            }
            Step::MemoryLeft(bytes) => {
                self.available_bytes = bytes;
                self.cached = self.caches.iter().map(|generation| (*generation, 100)).collect();
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
    fn every_request_is_answered_once_and_nothing_is_kept(
        steps in steps(),
        drains in any::<bool>(),
        unload_after_ms in prop_oneof![Just(0u64), Just(20)],
        max_shared_models in 0usize..3,
        memory_budget_bytes in prop::option::of(4096u64..16_384),
        preloads in any::<bool>(),
    ) {
        let limits = Limits {
            max_sessions: 6,
            max_leases_per_session: 4,
            max_lanes: 5,
            max_lanes_per_session: 3,
            max_session_jobs: 6,
            max_jobs: 10,
            engine_free_restarts: 9,
            memory_reserve_bytes: 100,
            ..Limits::default()
        };
        let unload_after = Duration::from_millis(unload_after_ms);
        let policy = Policy { unload_after, max_shared_models, memory_budget_bytes, log_model_usage: true };
        let preload = if preloads { vec!["a".to_owned()] } else { vec![] };
        let mut world = World::with_models(limits, policy, vec![], preload);
        let mut ledger = Ledger::default();
        for step in steps {
            world.step(step, &mut ledger);
            prop_assert!(world.lanes.len() <= 5);
            let core = &world.core;
            prop_assert!(max_shared_models == 0 || core.models.occupied() <= max_shared_models.max(1));
            for (_, lease) in core.leases.iter() {
                prop_assert!(world.images.contains(&lease.generation), "a leased generation left");
            }
            for (id, entry) in &core.models.entries {
                prop_assert!(entry.reload.is_none() || entry.generation().is_some(), "model {id} reloads nothing");
            }
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
        prop_assert!(core.going.is_empty() && core.unload_orders.is_empty());
        prop_assert!(core.models.entries.values().all(|e| !e.is_waited_for() && !e.is_reloading()));
        prop_assert!(unload_after_ms == 0 || preloads || world.images.is_empty(), "idle models stay");
        let current = core.models.images.keys().all(|generation| core.models.is_current(*generation));
        prop_assert!(current, "an image that nobody can get is kept");
        prop_assert_eq!(world.images.len(), core.models.images.len());
        prop_assert_eq!(core.next_timer_ns(), None);
    }
}

//! The schedule, simulated: random jobs, clients that leave, batches that take time; and the rules one by one.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, HashSet};

fn ask(key: JobKey, client: Client, priority: Priority, costs: &[u32]) -> Ask {
    Ask {
        key,
        client,
        priority,
        generation: 1,
        deadline_ns: 0,
        isolated: false,
        costs: costs.into(),
        next_text: 0,
    }
}

fn batch(schedule: &mut Schedule) -> Option<Batch> {
    schedule.next_batch(0, |_| false).0
}

/// Runs all batches at `us_per_cost`, in virtual time; gives them with their end times in µs.
fn run_dry(schedule: &mut Schedule, us_per_cost: f64) -> Vec<(Batch, u64)> {
    let (mut now_us, mut batches) = (0, Vec::new());
    while let (Some(batch), _) = schedule.next_batch(now_us * 1000, |_| false) {
        let elapsed_us = (batch.cost as f64 * us_per_cost) as u64;
        now_us += elapsed_us;
        schedule.batch_done(&batch, elapsed_us);
        batches.push((batch, now_us));
    }
    batches
}

#[test]
fn an_idle_schedule_gives_a_lone_text_at_once() {
    let mut schedule = Schedule::default();
    assert_eq!(batch(&mut schedule), None);
    schedule.push(ask(1, Client::Lane(1), Priority::Interactive, &[400]), 0);
    let batch = batch(&mut schedule).unwrap();
    assert_eq!(batch.slices, [Slice { key: 1, texts: 0..1 }]);
    assert_eq!(schedule.queued_jobs(), 0);
}

#[test]
fn interactive_goes_first_and_makes_batches_of_bulk_shorter() {
    let mut schedule = Schedule::default();
    schedule.push(ask(1, Client::Lane(1), Priority::Bulk, &[16; 256]), 0);
    schedule.push(ask(2, Client::Lane(2), Priority::Interactive, &[16]), 0);
    assert_eq!(batch(&mut schedule).unwrap().slices[0].key, 2);
    let slice = batch(&mut schedule).unwrap();
    assert_eq!(slice.slices[0].key, 1);
    assert!(slice.cost as f64 * FIRST_RATE_US <= SHARED_TARGET_US);
    // Long after the last interactive job, batches are large again.
    let later_ns = 10 * INTERACTIVE_MEMORY_NS;
    let large = schedule.next_batch(later_ns, |_| false).0.unwrap();
    assert!(large.cost > 3 * slice.cost);
    assert_eq!(large.slices[0].texts.start, slice.slices[0].texts.end);
}

#[test]
fn a_break_is_for_interactive_work_that_need_not_be_alone() {
    let mut schedule = Schedule::default();
    let suspect = |key| Ask { isolated: true, ..ask(key, Client::Lane(key), Priority::Interactive, &[16]) };
    schedule.push(ask(1, Client::Lane(1), Priority::Bulk, &[16; 8]), 0);
    schedule.push(suspect(2), 0);
    assert_eq!(schedule.next_urgent(0, |_| false), (None, Vec::new()));
    schedule.push(ask(3, Client::Lane(3), Priority::Interactive, &[16]), 0);
    schedule.push(ask(4, Client::Lane(4), Priority::Interactive, &[16]), 0);
    let (urgent, unwanted) = schedule.next_urgent(0, |key| key == 4);
    assert_eq!(urgent.unwrap().slices, [Slice { key: 3, texts: 0..1 }]);
    assert_eq!(unwanted, [(4, Unwanted::Cancelled)]);
    assert_eq!(schedule.queued_jobs(), 2);
    // When the compute is free both have their turn.
    assert_eq!(batch(&mut schedule).unwrap().slices[0].key, 2);
    assert_eq!(batch(&mut schedule).unwrap().slices[0].key, 1);
}

#[test]
fn bulk_has_its_first_turn_soon() {
    // An engine that is killed again and again starts with nothing earned each time.
    let mut schedule = Schedule::default();
    schedule.push(ask(0, Client::Lane(1), Priority::Bulk, &[8; 256]), 0);
    let mut now_us = 0;
    for key in 1..2000 {
        schedule.push(ask(key, Client::Lane(2), Priority::Interactive, &[20; 4]), now_us * 1000);
        let batch = schedule.next_batch(now_us * 1000, |_| false).0.unwrap();
        if batch.priority == Priority::Bulk {
            break;
        }
        let elapsed_us = batch.cost * 60;
        now_us += elapsed_us;
        schedule.batch_done(&batch, elapsed_us);
    }
    let enough_us = CREDIT_TARGET_US * 100.0 / BULK_SHARE_PERCENT;
    assert!((now_us as f64) < 1.2 * enough_us, "{now_us}");
}

#[test]
fn bulk_keeps_its_share_under_endless_interactive_work() {
    let mut schedule = Schedule::default();
    schedule.push(ask(0, Client::Lane(1), Priority::Bulk, &[8; 256]), 0);
    let (mut now_us, mut bulk_us) = (0u64, 0u64);
    for key in 1..2000 {
        schedule.push(ask(key, Client::Lane(2), Priority::Interactive, &[20; 4]), now_us * 1000);
        let batch = schedule.next_batch(now_us * 1000, |_| false).0.unwrap();
        let elapsed_us = batch.cost * 60;
        now_us += elapsed_us;
        if batch.priority == Priority::Bulk {
            bulk_us += elapsed_us;
        }
        schedule.batch_done(&batch, elapsed_us);
        if schedule.bulk.ring.is_empty() {
            break;
        }
    }
    assert!(schedule.bulk.ring.is_empty(), "the bulk job starved");
    let share = bulk_us as f64 / now_us as f64;
    assert!((0.05..0.15).contains(&share), "bulk had {share} of the time");
}

#[test]
fn a_client_with_many_jobs_delays_another_by_its_quantum_only() {
    let mut schedule = Schedule::default();
    for key in 0..100 {
        schedule.push(ask(key, Client::Lane(1), Priority::Bulk, &[32; 16]), 0);
    }
    schedule.push(ask(1000, Client::Session(2), Priority::Bulk, &[32; 2]), 0);
    let batches = run_dry(&mut schedule, 60.0);
    let at = batches.iter().position(|(batch, _)| batch.slices.iter().any(|s| s.key == 1000));
    assert_eq!(at, Some(0));
}

#[test]
fn equal_clients_advance_together_whatever_their_text_lengths() {
    let mut schedule = Schedule::default();
    for key in 0..200 {
        schedule.push(ask(key, Client::Lane(1), Priority::Bulk, &[512; 4]), 0);
        schedule.push(ask(1000 + key, Client::Lane(2), Priority::Bulk, &[8; 16]), 0);
    }
    let mut costs = BTreeMap::new();
    for _ in 0..400 {
        let batch = batch(&mut schedule).unwrap();
        for slice in &batch.slices {
            let (client, cost) = if slice.key < 1000 { (1, 512) } else { (2, 8) };
            *costs.entry(client).or_insert(0) += cost * slice.texts.len();
        }
        if costs.get(&2).is_some_and(|cost| *cost > 20_000) {
            break;
        }
    }
    let (a, b) = (costs[&1] as f64, costs[&2] as f64);
    assert!((0.8..1.25).contains(&(a / b)), "{a} against {b}");
}

#[test]
fn a_suspect_shares_no_batch() {
    let mut schedule = Schedule::default();
    for key in 0..6 {
        let mut ask = ask(key, Client::Lane(key % 3), Priority::Bulk, &[16; 40]);
        ask.isolated = key == 2 || key == 3;
        schedule.push(ask, 0);
    }
    for (batch, _) in run_dry(&mut schedule, 60.0) {
        if batch.slices.iter().any(|slice| slice.key == 2 || slice.key == 3) {
            assert_eq!(batch.slices.len(), 1, "{batch:?}");
        }
    }
}

#[test]
fn a_batch_is_of_one_model_and_no_model_waits_for_ever() {
    let mut schedule = Schedule::default();
    for key in 0..40 {
        let mut ask = ask(key, Client::Lane(key % 4), Priority::Bulk, &[64; 8]);
        ask.generation = key % 4 / 2;
        schedule.push(ask, 0);
    }
    let batches = run_dry(&mut schedule, 60.0);
    let mut seen: Vec<u64> = batches.iter().map(|(batch, _)| batch.generation).collect();
    for (batch, _) in &batches {
        assert!(batch.slices.iter().all(|slice| slice.key % 4 / 2 == batch.generation));
    }
    seen.truncate(4);
    assert!(seen.contains(&0) && seen.contains(&1), "{seen:?}");
}

#[test]
fn the_budget_follows_the_measured_speed() {
    let mut schedule = Schedule::default();
    schedule.push(ask(1, Client::Lane(1), Priority::Bulk, &[16; 40_000]), 0);
    let (mut slow, mut fast) = (0, 0);
    // Mostly overhead: no reason to compute less at a time.
    for _ in 0..10 {
        let (generation, priority) = (1, Priority::Bulk);
        let tiny = Batch { generation, priority, slices: Vec::new(), cost: 3, on_credit: false };
        schedule.batch_done(&tiny, 5_000);
    }
    assert!(batch(&mut schedule).unwrap().cost as f64 >= 0.9 * ALONE_TARGET_US / FIRST_RATE_US);
    for _ in 0..30 {
        let batch = batch(&mut schedule).unwrap();
        schedule.batch_done(&batch, batch.cost * 600);
        slow = batch.cost;
    }
    for _ in 0..40 {
        let batch = batch(&mut schedule).unwrap();
        schedule.batch_done(&batch, batch.cost * 100);
        fast = batch.cost;
    }
    assert!((240..=270).contains(&slow), "{slow}");
    assert!((1400..=1600).contains(&fast), "{fast}");
}

#[test]
fn what_nobody_wants_is_dropped_before_compute_and_gone_clients_leave_nothing() {
    let mut schedule = Schedule::default();
    let mut expired = ask(1, Client::Lane(1), Priority::Interactive, &[8]);
    expired.deadline_ns = 5;
    schedule.push(expired, 0);
    schedule.push(ask(2, Client::Lane(1), Priority::Interactive, &[8]), 0);
    schedule.push(ask(3, Client::Lane(1), Priority::Interactive, &[8]), 0);
    schedule.push(ask(4, Client::Lane(2), Priority::Interactive, &[8]), 0);
    assert_eq!(schedule.remove_client(Client::Lane(2)), [4]);
    let (batch, unwanted) = schedule.next_batch(5, |key| key == 2);
    assert_eq!(batch.unwrap().slices, [Slice { key: 3, texts: 0..1 }]);
    assert_eq!(unwanted, [(1, Unwanted::Expired), (2, Unwanted::Cancelled)]);
    schedule.push(ask(5, Client::Lane(3), Priority::Bulk, &[8]), 0);
    assert!(schedule.remove(Client::Lane(3), Priority::Bulk, 5));
    assert!(!schedule.remove(Client::Lane(3), Priority::Bulk, 5));
    assert_eq!(schedule.queued_jobs(), 0);
    assert_eq!(schedule.next_batch(5, |_| false), (None, Vec::new()));
}

#[derive(Debug, Clone)]
enum Step {
    Push { client: u64, bulk: bool, generation: u64, isolated: bool, deadline: bool, costs: Vec<u32> },
    Compute { us_per_cost: u32 },
    FailBatch,
    Cancel(u64),
    DropClient(u64),
    DropGeneration(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let push = (0u64..5, any::<bool>(), 0u64..2, prop::bool::weighted(0.1), prop::bool::weighted(0.1))
        .prop_flat_map(|(client, bulk, generation, isolated, deadline)| {
            prop::collection::vec(1u32..700, 1..40).prop_map(move |costs| Step::Push {
                client,
                bulk,
                generation,
                isolated,
                deadline,
                costs,
            })
        });
    prop_oneof![
        5 => push,
        5 => (1u32..200).prop_map(|us_per_cost| Step::Compute { us_per_cost }),
        1 => Just(Step::FailBatch),
        1 => (0u64..60).prop_map(Step::Cancel),
        1 => (0u64..5).prop_map(Step::DropClient),
        1 => (0u64..2).prop_map(Step::DropGeneration),
    ]
}

/// A job as the model of the test sees it.
#[derive(Debug)]
struct Expected {
    ask: Ask,
    done: usize,
    answers: usize,
    gone: bool,
}

#[derive(Default)]
struct World {
    schedule: Schedule,
    jobs: BTreeMap<JobKey, Expected>,
    cancelled: HashSet<JobKey>,
    now_us: u64,
}

impl World {
    fn compute(&mut self, us_per_cost: u32, fail: bool) -> bool {
        let cancelled = self.cancelled.clone();
        let waits_interactive = self.schedule.interactive.queues.values().any(|q| !q.jobs.is_empty());
        let (batch, unwanted) = self.schedule.next_batch(self.now_us * 1000, |key| cancelled.contains(&key));
        for (key, why) in &unwanted {
            let job = self.jobs.get_mut(key).unwrap();
            assert!(!job.gone);
            match why {
                Unwanted::Cancelled => assert!(cancelled.contains(key)),
                Unwanted::Expired => assert!(job.ask.deadline_ns <= self.now_us * 1000),
            }
            job.answers += 1;
        }
        let Some(batch) = batch else { return false };
        let mut cost = 0;
        for slice in &batch.slices {
            let job = self.jobs.get_mut(&slice.key).unwrap();
            assert!(!job.gone && job.answers == 0);
            assert_eq!((job.ask.generation, job.ask.priority), (batch.generation, batch.priority));
            assert!(!job.ask.isolated || batch.slices.len() == 1);
            assert_eq!(slice.texts.start, job.done, "texts are computed in order, each once");
            assert!(slice.texts.end > slice.texts.start);
            cost += job.ask.costs[slice.texts.clone()].iter().map(|c| u64::from(*c)).sum::<u64>();
        }
        assert_eq!(cost, batch.cost);
        assert!(cost <= MAX_BATCH_COST || batch.slices.len() == 1);
        assert!(!batch.on_credit || batch.priority == Priority::Bulk);
        // A batch of bulk goes before interactive work on credit only.
        if batch.priority == Priority::Bulk && waits_interactive && !batch.on_credit {
            assert!(!unwanted.is_empty());
        }
        let elapsed_us = cost * u64::from(us_per_cost);
        self.now_us += elapsed_us;
        self.schedule.batch_done(&batch, elapsed_us);
        for slice in &batch.slices {
            let job = self.jobs.get_mut(&slice.key).unwrap();
            if fail {
                let ask = &mut job.ask;
                self.schedule.remove(ask.client, ask.priority, ask.key);
                (ask.isolated, ask.next_text) = (true, slice.texts.start);
                self.schedule.push_front(ask.clone(), self.now_us * 1000);
                continue;
            }
            job.done = slice.texts.end;
            if job.done == job.ask.costs.len() {
                job.answers += 1;
            }
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_job_is_answered_exactly_once(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::default();
        for step in steps {
            match step {
                Step::Push { client, bulk, generation, isolated, deadline, costs } => {
                    let key = world.jobs.len() as u64;
                    let ask = Ask {
                        key,
                        client: Client::Lane(client),
                        priority: if bulk { Priority::Bulk } else { Priority::Interactive },
                        generation,
                        deadline_ns: if deadline { world.now_us * 1000 + 1_000_000 } else { 0 },
                        isolated,
                        costs: costs.into(),
                        next_text: 0,
                    };
                    world.jobs.insert(key, Expected { ask: ask.clone(), done: 0, answers: 0, gone: false });
                    world.schedule.push(ask, world.now_us * 1000);
                }
                Step::Compute { us_per_cost } => { world.compute(us_per_cost, false); }
                Step::FailBatch => { world.compute(10, true); }
                Step::Cancel(key) => { world.cancelled.insert(key); }
                Step::DropClient(client) => {
                    for key in world.schedule.remove_client(Client::Lane(client)) {
                        let job = world.jobs.get_mut(&key).unwrap();
                        prop_assert_eq!(job.ask.client, Client::Lane(client));
                        prop_assert!(!std::mem::replace(&mut job.gone, true));
                    }
                }
                Step::DropGeneration(generation) => {
                    for key in world.schedule.remove_generation(generation) {
                        let job = world.jobs.get_mut(&key).unwrap();
                        prop_assert_eq!(job.ask.generation, generation);
                        prop_assert!(!std::mem::replace(&mut job.gone, true));
                    }
                }
            }
            let waiting = world.jobs.values().filter(|job| job.answers == 0 && !job.gone).count();
            prop_assert_eq!(world.schedule.queued_jobs(), waiting);
        }
        // Work is never left behind while the compute is free, and never lasts for ever.
        let mut batches = 0;
        while world.compute(10, false) {
            batches += 1;
            prop_assert!(batches < 100_000);
        }
        for (key, job) in &world.jobs {
            prop_assert_eq!(job.answers, usize::from(!job.gone), "job {}", key);
        }
        prop_assert!(world.schedule.interactive.ring.is_empty() && world.schedule.bulk.ring.is_empty());
        prop_assert!(world.schedule.interactive.queues.is_empty() && world.schedule.bulk.queues.is_empty());
    }
}

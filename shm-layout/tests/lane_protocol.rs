//! Both ends of a lane on the heap: the protocol's contract, an engine that dies after any of its writes, and a client
//! that writes garbage. Runs under Miri as well; the tests that Miri is too slow for say so.

use shm_layout::code::Code;
use shm_layout::lane::{
    CheckedJob, ClientLane, EngineLane, Geometry, HeapLaneMemory, JobRequest, LaneFault, LaneMemory,
    SlotClass, SubmitError, Ticket, initialize,
};
use shm_layout::wire::{Operation, Priority};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const SMALL: Geometry = Geometry::new(
    4,
    [
        SlotClass { slot_bytes: 16, count: 6 },
        SlotClass { slot_bytes: 32, count: 2 },
        SlotClass { slot_bytes: 64, count: 2 },
        SlotClass { slot_bytes: 128, count: 1 },
        SlotClass { slot_bytes: 256, count: 1 },
    ],
);

fn region() -> Arc<HeapLaneMemory> {
    let memory = Arc::new(HeapLaneMemory::new(SMALL.region_bytes()));
    initialize(&memory, &SMALL, 1);
    memory
}

fn request<'a>(input: &'a [&'a [u8]]) -> JobRequest<'a> {
    JobRequest {
        operation: Operation::Embed,
        priority: Priority::Interactive,
        deadline_ns: 5,
        input,
        output_capacity_bytes: 16,
    }
}

/// The answer that the engine of these tests gives: recognisable for each input.
fn answer_to(input: &[u8]) -> Vec<u8> {
    input.iter().map(|b| b ^ 0x5a).collect()
}

fn answer<M: LaneMemory>(engine: &mut EngineLane<M>, job: CheckedJob) -> Result<(), LaneFault> {
    let mut input = Vec::new();
    engine.begin(&job);
    engine.read_input(&job, &mut input);
    engine.complete(job, Code::Ok, &answer_to(&input), 1, 2)
}

#[test]
fn jobs_are_answered_in_any_order_and_cells_come_back() {
    let memory = region();
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    let (mut engine, recovered) = EngineLane::adopt(memory, SMALL).unwrap();
    assert!(recovered.is_empty());
    for round in 0..50u8 {
        let inputs: Vec<[u8; 3]> = (0..3).map(|i| [round, i, 7]).collect();
        let tickets: Vec<Ticket> = inputs
            .iter()
            .map(|input| client.submit(&request(&[&input[..1], &input[1..]])).unwrap())
            .collect();
        let mut jobs = Vec::new();
        assert!(!engine.drain(16, &mut jobs).unwrap());
        assert_eq!(jobs.len(), 3);
        assert_eq!(
            (jobs[0].operation, jobs[0].deadline_ns, jobs[0].attempts),
            (Some(Operation::Embed), 5, 0)
        );
        jobs.rotate_left(round as usize % 3);
        for job in jobs {
            answer(&mut engine, job).unwrap();
        }
        let mut answers = HashMap::new();
        client.reap(16, |c, output| assert!(answers.insert(c.ticket, output.to_vec()).is_none())).unwrap();
        for (ticket, input) in tickets.iter().zip(&inputs) {
            assert_eq!(answers[ticket], answer_to(input));
            assert!(!client.is_in_flight(*ticket));
        }
        assert_eq!(client.in_flight(), 0);
    }
}

#[test]
fn refusals_leave_everything_as_it_was() {
    let memory = region();
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    let long = [0; 257];
    assert_eq!(client.submit(&request(&[&long])), Err(SubmitError::TooLarge(257)));
    let ten = [1; 10];
    for _ in 0..4 {
        client.submit(&request(&[&ten])).unwrap();
    }
    assert_eq!(client.submit(&request(&[&ten])), Err(SubmitError::JobsFull(4)));
    let (mut engine, _) = EngineLane::adopt(memory, SMALL).unwrap();
    let mut jobs = Vec::new();
    engine.drain(1, &mut jobs).unwrap();
    answer(&mut engine, jobs.remove(0)).unwrap();
    assert_eq!(client.reap(16, |_, _| ()).unwrap(), 1);
    // The one slot of 256 bytes goes to the input; none of that size is left for the output.
    let big = [0; 200];
    let refused = JobRequest { output_capacity_bytes: 200, ..request(&[]) };
    assert_eq!(client.submit(&JobRequest { input: &[&big], ..refused }), Err(SubmitError::ArenaFull(200)));
    client.submit(&request(&[&big])).unwrap();
}

#[test]
fn long_answers_are_refused_and_long_messages_cut() {
    let memory = region();
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    let (mut engine, _) = EngineLane::adopt(memory, SMALL).unwrap();
    client.submit(&request(&[b"a"])).unwrap();
    client.submit(&request(&[b"b"])).unwrap();
    let mut jobs = Vec::new();
    engine.drain(16, &mut jobs).unwrap();
    engine.complete(jobs.remove(0), Code::Ok, &[7; 17], 0, 0).unwrap();
    engine.complete(jobs.remove(0), Code::Internal, &[b'm'; 99], 0, 0).unwrap();
    let mut seen = Vec::new();
    client.reap(16, |c, output| seen.push((c.status, output.to_vec().len()))).unwrap();
    assert_eq!(seen, [(Code::OutputTooSmall, 0), (Code::Internal, 16)]);
}

#[test]
fn sleepers_are_woken_once() {
    let memory = region();
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    let (mut engine, _) = EngineLane::adopt(memory, SMALL).unwrap();
    client.submit(&request(&[b"a"])).unwrap();
    assert!(client.needs_doorbell(), "a lane is armed from birth");
    assert!(!client.needs_doorbell());
    assert!(!engine.arm().unwrap(), "a job waits: no sleep");
    assert!(client.prepare_wait().is_some());
    let mut jobs = Vec::new();
    engine.drain(16, &mut jobs).unwrap();
    assert!(engine.arm().unwrap());
    let job = jobs.remove(0);
    assert!(!engine.is_cancelled(&job));
    let mut ticket = None;
    answer(&mut engine, job).unwrap();
    assert!(engine.needs_wake());
    assert!(!engine.needs_wake());
    assert!(client.prepare_wait().is_none(), "something to reap: no sleep");
    client.reap(16, |c, _| ticket = Some(c.ticket)).unwrap();
    client.cancel(ticket.unwrap());
    let again = client.submit(&request(&[b"b"])).unwrap();
    assert!(client.needs_doorbell());
    engine.drain(16, &mut jobs).unwrap();
    assert!(!engine.is_cancelled(&jobs[0]), "a cancel of an earlier job of the cell means nothing");
    client.cancel(again);
    assert!(engine.is_cancelled(&jobs[0]));
    answer(&mut engine, jobs.remove(0)).unwrap();
}

#[test]
fn attempts_survive_the_engine_that_counted_them() {
    let memory = region();
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    client.submit(&request(&[b"a"])).unwrap();
    let (mut engine, _) = EngineLane::adopt(memory.clone(), SMALL).unwrap();
    let mut jobs = Vec::new();
    engine.drain(16, &mut jobs).unwrap();
    engine.begin(&jobs[0]);
    for attempts in 1..4 {
        let (engine, recovered) = EngineLane::adopt(memory.clone(), SMALL).unwrap();
        assert_eq!((recovered.len(), recovered[0].attempts), (1, attempts));
        engine.begin(&recovered[0]);
        for job in recovered {
            std::mem::drop(job);
        }
    }
    for job in jobs {
        std::mem::drop(job);
    }
}

/// Memory whose owner dies after a number of writes: what it writes later never happens.
#[derive(Clone)]
struct Mortal {
    inner: Arc<HeapLaneMemory>,
    writes_left: Arc<AtomicUsize>,
}

impl Mortal {
    fn alive(&self) -> bool {
        self.writes_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
    }
    fn dead(&self) -> bool {
        self.writes_left.load(Ordering::Relaxed) == 0
    }
}

impl LaneMemory for Mortal {
    fn len_bytes(&self) -> usize {
        self.inner.len_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.inner.load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        if self.alive() {
            self.inner.store_u32(offset, value, order);
        }
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        if self.alive() {
            self.inner.swap_u32(offset, value, order)
        } else {
            self.inner.load_u32(offset, order)
        }
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.inner.load_u64(offset, order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        if self.alive() {
            self.inner.store_u64(offset, value, order);
        }
    }
    fn fence(&self, order: Ordering) {
        self.inner.fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.inner.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        if self.alive() {
            self.inner.write(offset, from);
        }
    }
}

/// A client and the engines that serve it one after the other; checks that each job is answered once and rightly.
struct Storm {
    memory: Arc<HeapLaneMemory>,
    client: ClientLane<Arc<HeapLaneMemory>>,
    engine: EngineLane<Mortal>,
    writes_left: Arc<AtomicUsize>,
    held: Vec<CheckedJob>,
    expected: HashMap<Ticket, Vec<u8>>,
    submitted: u32,
    answered: u32,
}

impl Storm {
    fn new(life: usize) -> Storm {
        let memory = region();
        let client = ClientLane::new(memory.clone(), SMALL).unwrap();
        let writes_left = Arc::new(AtomicUsize::new(life));
        let mortal = Mortal { inner: memory.clone(), writes_left: writes_left.clone() };
        let (engine, _) = EngineLane::adopt(mortal, SMALL).unwrap();
        Storm {
            memory,
            client,
            engine,
            writes_left,
            held: vec![],
            expected: HashMap::new(),
            submitted: 0,
            answered: 0,
        }
    }

    fn submit(&mut self) {
        let input = self.submitted.to_le_bytes();
        if let Ok(ticket) = self.client.submit(&request(&[&input])) {
            assert!(self.expected.insert(ticket, answer_to(&input)).is_none());
            self.submitted += 1;
        }
    }

    fn reap(&mut self) {
        let (expected, answered) = (&mut self.expected, &mut self.answered);
        self.client
            .reap(16, |completion, output| {
                let right = expected.remove(&completion.ticket).expect("answered twice, or never asked");
                assert_eq!((completion.status, output.to_vec()), (Code::Ok, right));
                *answered += 1;
            })
            .unwrap();
    }

    fn engine_step(&mut self, finish: usize) {
        self.engine.drain(2, &mut self.held).unwrap();
        for _ in 0..finish.min(self.held.len()) {
            let job = self.held.swap_remove(finish % self.held.len());
            answer(&mut self.engine, job).unwrap();
        }
    }

    fn bury_engine(&mut self, next_life: usize) {
        self.writes_left = Arc::new(AtomicUsize::new(next_life));
        let mortal = Mortal { inner: self.memory.clone(), writes_left: self.writes_left.clone() };
        let (engine, recovered) = EngineLane::adopt(mortal, SMALL).unwrap();
        self.engine = engine;
        self.held = recovered;
    }

    fn engine_is_dead(&self) -> bool {
        self.writes_left.load(Ordering::Relaxed) == 0
    }

    fn finish(mut self) {
        self.bury_engine(usize::MAX);
        while self.client.in_flight() > 0 {
            self.engine_step(1);
            self.reap();
        }
        assert!(self.expected.is_empty());
        assert_eq!(self.answered, self.submitted);
    }
}

#[test]
fn an_engine_may_die_after_any_of_its_writes() {
    let lives = if cfg!(miri) { 24 } else { 200 };
    for life in 1..lives {
        for reap_late in [false, true] {
            let mut storm = Storm::new(life);
            let mut step = 0;
            while !storm.engine_is_dead() && step < 400 {
                storm.submit();
                storm.engine_step(step % 3);
                if !reap_late && !storm.engine_is_dead() {
                    storm.reap();
                }
                step += 1;
                if reap_late && step % 4 == 0 && !storm.engine_is_dead() {
                    storm.reap();
                }
            }
            storm.finish();
        }
    }
}

#[cfg(not(miri))]
mod random {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Submit,
        Reap,
        Engine(usize),
        Die(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Submit),
            2 => Just(Step::Reap),
            4 => (0usize..4).prop_map(Step::Engine),
            1 => (1usize..60).prop_map(Step::Die),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn random_lives_lose_and_double_nothing(life in 1usize..40, steps in prop::collection::vec(step(), 1..200)) {
            let mut storm = Storm::new(life);
            for step in steps {
                match step {
                    Step::Submit => storm.submit(),
                    Step::Reap => storm.reap(),
                    // A dead engine does nothing until it is buried; its successor lives for so many writes.
                    Step::Engine(_) if storm.engine.memory().dead() => storm.bury_engine(30),
                    Step::Engine(finish) => storm.engine_step(finish),
                    Step::Die(next_life) => storm.bury_engine(next_life),
                }
            }
            storm.finish();
        }

        #[test]
        fn garbage_from_a_client_is_a_fault_or_a_job_and_never_more(
            writes in prop::collection::vec((0usize..SMALL.region_bytes(), any::<u8>()), 0..600),
            tail in prop_oneof![Just(1u32), 0u32..6, any::<u32>()],
            aimed in prop::collection::vec((0usize..1024 / 4, any::<u32>()), 0..4),
        ) {
            let memory = region();
            for (offset, byte) in writes {
                memory.write(offset, &[byte]);
            }
            for (word, value) in aimed {
                memory.store_u32(word * 4, value, Ordering::Relaxed);
            }
            memory.store_u32(256, tail, Ordering::Relaxed);
            if let Ok((mut engine, mut jobs)) = EngineLane::adopt(memory, SMALL) {
                let _ = engine.drain(16, &mut jobs);
                let mut input = Vec::new();
                for job in jobs {
                    engine.read_input(&job, &mut input);
                    prop_assert!(input.len() <= 256);
                    let _ = engine.complete(job, Code::Ok, &[1; 300], 0, 0);
                }
                let _ = engine.arm();
            }
        }

        #[test]
        fn garbage_from_an_engine_is_a_fault_and_never_more(
            writes in prop::collection::vec((0usize..SMALL.region_bytes(), any::<u8>()), 0..300),
            tail in prop_oneof![0u32..6, any::<u32>()],
        ) {
            let memory = region();
            let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
            for _ in 0..3 {
                client.submit(&request(&[b"abc"])).unwrap();
            }
            for (offset, byte) in writes {
                memory.write(offset, &[byte]);
            }
            memory.store_u32(640, tail, Ordering::Relaxed);
            let mut seen = Vec::new();
            let _ = client.reap(16, |c, output| { seen.push(c.ticket); assert!(output.to_vec().len() <= 16); });
            let distinct: std::collections::HashSet<_> = seen.iter().collect();
            prop_assert_eq!(distinct.len(), seen.len());
        }
    }
}

#[test]
fn threads_hand_over_every_byte() {
    let memory = region();
    let rounds: u32 = if cfg!(miri) { 40 } else { 20_000 };
    let mut client = ClientLane::new(memory.clone(), SMALL).unwrap();
    let engine = std::thread::spawn(move || {
        let (mut engine, _) = EngineLane::adopt(memory, SMALL).unwrap();
        let mut jobs = Vec::new();
        let mut done = 0;
        while done < rounds {
            engine.drain(3, &mut jobs).unwrap();
            if jobs.is_empty() {
                std::thread::yield_now();
            }
            while let Some(job) = jobs.pop() {
                answer(&mut engine, job).unwrap();
                done += 1;
            }
        }
    });
    let (mut sent, mut seen) = (0, 0);
    let mut expected = HashMap::new();
    while seen < rounds {
        if sent < rounds {
            let input = sent.to_le_bytes();
            if let Ok(ticket) = client.submit(&request(&[&input])) {
                expected.insert(ticket, answer_to(&input));
                sent += 1;
            }
        }
        let count = client
            .reap(16, |c, output| assert_eq!(Some(output.to_vec()), expected.remove(&c.ticket)))
            .unwrap();
        seen += count as u32;
        if count == 0 {
            std::thread::yield_now();
        }
    }
    engine.join().unwrap();
}

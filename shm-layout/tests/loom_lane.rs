//! The lane in loom's model checker: every interleaving, and every stale value that the memory model allows, of a
//! client and an engine that hand jobs over and fall asleep. Built only with `RUSTFLAGS="--cfg loom"`.
#![cfg(loom)]

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, fence};
use loom::thread;
use shm_layout::code::Code;
use shm_layout::lane::{ClientLane, EngineLane, Geometry, JobRequest, LaneMemory, SlotClass, initialize};
use shm_layout::wire::{Operation, Priority};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

const TINY: Geometry = Geometry::new(
    2,
    [
        SlotClass { slot_bytes: 8, count: 4 },
        SlotClass { slot_bytes: 16, count: 0 },
        SlotClass { slot_bytes: 24, count: 0 },
        SlotClass { slot_bytes: 32, count: 0 },
        SlotClass { slot_bytes: 40, count: 0 },
    ],
);

/// Lane memory as loom sees it: control words are atomics, all other bytes are cells in which loom reports a race.
/// Only the offsets that the tiny geometry uses exist.
struct Modelled {
    words: HashMap<usize, AtomicU64>,
    blocks: HashMap<usize, UnsafeCell<Vec<u8>>>,
}

// SAFETY: the cells are loom's, which checks every access for a race itself; that is what this test is for.
unsafe impl Send for Modelled {}
// SAFETY: as above.
unsafe impl Sync for Modelled {}

impl Modelled {
    fn new() -> Modelled {
        let [submissions, completions, client_cells, engine_cells] = TINY.table_offsets();
        let mut words: Vec<usize> = vec![256, 384, 512, 640, 768, 896];
        let mut blocks: Vec<(usize, usize)> = vec![(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)];
        for job in 0..TINY.jobs {
            words.push(submissions + 8 * job);
            words.extend([client_cells + 128 * job, client_cells + 128 * job + 8]);
            words.extend([engine_cells + 64 * job, engine_cells + 64 * job + 8]);
            blocks.push((completions + 64 * job, 64));
            blocks.push((client_cells + 128 * job + 16, 32));
        }
        for slot in 0..4 {
            blocks.push((TINY.arena_offset() + 8 * slot, 8));
        }
        Modelled {
            words: words.into_iter().map(|at| (at, AtomicU64::new(0))).collect(),
            blocks: blocks.into_iter().map(|(at, len)| (at, UnsafeCell::new(vec![0; len]))).collect(),
        }
    }
}

impl LaneMemory for Modelled {
    fn len_bytes(&self) -> usize {
        TINY.region_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.words[&offset].load(order) as u32
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.words[&offset].store(u64::from(value), order);
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.words[&offset].swap(u64::from(value), order) as u32
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.words[&offset].load(order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.words[&offset].store(value, order);
    }
    fn fence(&self, order: Ordering) {
        fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        // SAFETY: loom panics when another thread writes the block at the same time.
        self.blocks[&offset].with(|block| unsafe { into.copy_from_slice(&(&*block)[..into.len()]) });
    }
    fn write(&self, offset: usize, from: &[u8]) {
        if from.is_empty() {
            return;
        }
        // SAFETY: loom panics when another thread touches the block at the same time.
        self.blocks[&offset].with_mut(|block| unsafe { (&mut *block)[..from.len()].copy_from_slice(from) });
    }
}

/// `Arc` of loom's, so that dropping is modelled too.
#[derive(Clone)]
struct Shared(Arc<Modelled>);

impl LaneMemory for Shared {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes()
    }
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.0.load_u32(offset, order)
    }
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.0.store_u32(offset, value, order);
    }
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.0.swap_u32(offset, value, order)
    }
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.0.load_u64(offset, order)
    }
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.0.store_u64(offset, value, order);
    }
    fn fence(&self, order: Ordering) {
        self.0.fence(order);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.0.read(offset, into);
    }
    fn write(&self, offset: usize, from: &[u8]) {
        self.0.write(offset, from);
    }
}

fn request<'a>(input: &'a [&'a [u8]]) -> JobRequest<'a> {
    JobRequest {
        operation: Operation::Embed,
        priority: Priority::Interactive,
        deadline_ns: 0,
        input,
        output_capacity_bytes: 8,
    }
}

fn lane() -> Shared {
    let memory = Shared(Arc::new(Modelled::new()));
    initialize(&memory, &TINY, 1);
    memory
}

/// A bell that a sleeper waits for: in the model a sleep is a check that the bell has rung, and the property is that a
/// sleeper for whom there is work always finds it rung.
fn rung(bell: &AtomicBool) -> bool {
    bell.load(Ordering::Acquire)
}

#[test]
fn bytes_are_handed_over_without_a_race() {
    loom::model(|| {
        let memory = lane();
        let mut client = ClientLane::new(memory.clone(), TINY).unwrap();
        let engine = thread::spawn(move || {
            let (mut engine, recovered) = EngineLane::adopt(memory, TINY).unwrap();
            let mut jobs = recovered;
            engine.drain(2, &mut jobs).unwrap();
            for job in jobs {
                let mut input = Vec::new();
                engine.read_input(&job, &mut input);
                assert_eq!(input, b"a");
                engine.complete(job, Code::Ok, b"b", 0, 0).unwrap();
            }
        });
        client.submit(&request(&[b"a"])).unwrap();
        let mut seen = 0;
        client
            .reap(2, |_, output| {
                assert_eq!(output.to_vec(), b"b");
                seen += 1;
            })
            .unwrap();
        if seen == 1 {
            // The cell and its slots are ours again: writing them must not race with anything the engine still does.
            client.submit(&request(&[b"a"])).unwrap();
        }
        engine.join().unwrap();
    });
}

#[test]
fn a_submission_never_sleeps_past_the_engine() {
    loom::model(|| {
        let memory = lane();
        let bell = Arc::new(AtomicBool::new(false));
        let mut client = ClientLane::new(memory.clone(), TINY).unwrap();
        // A lane is armed from birth; this takes the arming away, as the first job of its life does.
        client.submit(&request(&[b"a"])).unwrap();
        assert!(client.needs_doorbell());
        let (mut engine, mut jobs) = EngineLane::adopt(memory, TINY).unwrap();
        engine.drain(2, &mut jobs).unwrap();
        assert_eq!(jobs.len(), 1);
        let client_bell = bell.clone();
        let client_thread = thread::spawn(move || {
            client.submit(&request(&[b"a"])).unwrap();
            if client.needs_doorbell() {
                client_bell.store(true, Ordering::Release);
            }
        });
        let sleeps = engine.arm().unwrap();
        client_thread.join().unwrap();
        if sleeps {
            assert!(rung(&bell), "the engine sleeps although a job waits");
        }
        engine.drain(2, &mut jobs).unwrap();
        assert_eq!(jobs.len(), 2);
        for job in jobs {
            engine.complete(job, Code::Ok, b"", 0, 0).unwrap();
        }
    });
}

#[test]
fn a_completion_never_sleeps_past_the_client() {
    loom::model(|| {
        let memory = lane();
        let bell = Arc::new(AtomicBool::new(false));
        let mut client = ClientLane::new(memory.clone(), TINY).unwrap();
        client.submit(&request(&[b"a"])).unwrap();
        let engine_bell = bell.clone();
        let engine_thread = thread::spawn(move || {
            let (mut engine, mut jobs) = EngineLane::adopt(memory, TINY).unwrap();
            engine.drain(2, &mut jobs).unwrap();
            let job = jobs.pop().unwrap();
            engine.complete(job, Code::Ok, b"b", 0, 0).unwrap();
            if engine.needs_wake() {
                engine_bell.store(true, Ordering::Release);
            }
        });
        let sleeps = client.prepare_wait().is_some();
        engine_thread.join().unwrap();
        if sleeps {
            assert!(rung(&bell), "the client sleeps although an answer waits");
        }
        assert_eq!(client.reap(2, |_, _| ()).unwrap(), 1);
    });
}

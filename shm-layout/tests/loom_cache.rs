//! The vector cache in loom's model checker: every interleaving, and every stale value that the memory model allows, of the
//! writer and a reader. Built only with `RUSTFLAGS="--cfg loom"`.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, fence};
use loom::thread;
use shm_layout::cache::{CacheGeometry, CacheKey, CacheRead, CacheReader, CacheWrite, CacheWriter, Insert};
use std::collections::HashMap;
use std::sync::atomic::Ordering;

/// Cache memory as loom sees it: header, tags, and the words of the few entries that the tests use.
struct Modelled {
    len_bytes: usize,
    words: HashMap<usize, AtomicU64>,
}

#[derive(Clone)]
struct Shared(Arc<Modelled>);

const GEOMETRY: CacheGeometry = CacheGeometry { sets: 1, dim: 4 };
/// Where the entries begin: behind the header and one line of tags.
const ENTRIES: usize = 128;

impl Shared {
    fn new() -> Shared {
        let mut words: Vec<usize> = (0..ENTRIES / 8).map(|word| 8 * word).collect();
        for entry in 0..2 {
            let at = ENTRIES + entry * GEOMETRY.entry_bytes();
            words.extend((0..6).map(|word| at + 8 * word));
        }
        let words = words.into_iter().map(|at| (at, AtomicU64::new(0))).collect();
        Shared(Arc::new(Modelled { len_bytes: GEOMETRY.region_bytes(), words }))
    }
}

impl CacheRead for Shared {
    fn len_bytes(&self) -> usize {
        self.0.len_bytes
    }
    fn load(&self, offset: usize, order: Ordering) -> u64 {
        self.0.words[&offset].load(order)
    }
    fn fence(&self, order: Ordering) {
        fence(order);
    }
}

impl CacheWrite for Shared {
    fn store(&self, offset: usize, value: u64, order: Ordering) {
        self.0.words[&offset].store(value, order);
    }
}

fn key(low: u64) -> CacheKey {
    CacheKey::new(low, 0)
}

fn bounded(check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    // The reader's tries multiply the interleavings; two changes of thread show every torn read there is.
    model.preemption_bound = Some(2);
    model.check(check);
}

/// One entry written over and over: a reader sees one writing or nothing.
#[test]
fn no_reader_sees_half_of_a_writing() {
    bounded(|| {
        let memory = Shared::new();
        let mut writer = CacheWriter::create(memory.clone(), GEOMETRY, 1, 9).unwrap();
        assert_eq!(writer.insert(key(1), &[1.0; 4], 0, 1, false), Insert::Kept);
        let reader = CacheReader::new(memory, 4, 9).unwrap();
        let reading = thread::spawn(move || {
            let mut found = Vec::new();
            if reader.lookup(key(1), || 1, &mut found) {
                assert!(found == [1.0; 4] || found == [2.0; 4], "torn: {found:?}");
            } else {
                assert!(found.is_empty());
            }
        });
        writer.insert(key(1), &[2.0; 4], 0, 1, false);
        reading.join().unwrap();
    });
}

/// A slot that goes to another text while it is read: never that one's vector.
#[test]
fn no_reader_sees_another_texts_vector() {
    bounded(|| {
        let memory = Shared::new();
        let mut writer = CacheWriter::create(memory.clone(), GEOMETRY, 1, 9).unwrap();
        writer.insert(key(1), &[1.0; 4], 0, 1, false);
        let reader = CacheReader::new(memory, 4, 9).unwrap();
        let reading = thread::spawn(move || {
            let mut found = Vec::new();
            if reader.lookup(key(1), || 1, &mut found) {
                assert_eq!(found, [1.0; 4]);
            }
        });
        writer.insert(key(2), &[2.0; 4], 0, 1, false);
        reading.join().unwrap();
    });
}

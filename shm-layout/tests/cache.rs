//! The vector cache: what is found, what goes when room is short, what lies are refused, and readers beside a writer.

use proptest::prelude::*;
use shm_layout::cache::{
    CacheFault, CacheGeometry, CacheKey, CacheRead, CacheReader, CacheWrite, CacheWriter, HeapCacheMemory,
    Insert, MAX_CACHE_BYTES, MAX_CACHE_ENTRIES,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

type Memory = Arc<HeapCacheMemory>;

fn cache(entries: usize, dim: usize) -> (CacheWriter<Memory>, CacheReader<Memory>) {
    let geometry = CacheGeometry::for_entries(entries, dim).unwrap();
    let memory = Arc::new(HeapCacheMemory::new(geometry.region_bytes()));
    let writer = CacheWriter::create(Arc::clone(&memory), geometry, entries, 9).unwrap();
    (writer, CacheReader::new(memory, dim, 9).unwrap())
}

fn vector(dim: usize, seed: u64) -> Vec<f32> {
    (0..dim).map(|i| (seed * 1000 + i as u64) as f32).collect()
}

fn found(reader: &CacheReader<Memory>, key: CacheKey, now_ns: u64) -> Option<Vec<f32>> {
    let mut out = vec![0.5];
    let is_found = reader.lookup(key, || now_ns, &mut out);
    assert_eq!(out[0], 0.5, "what was there stays");
    assert_eq!(out.len(), if is_found { 1 + reader.dim() } else { 1 });
    is_found.then(|| out.split_off(1))
}

/// A key of the only set of a small cache.
fn key(low: u64) -> CacheKey {
    CacheKey::new(low, 0)
}

#[test]
fn vectors_of_any_length_come_back_bit_for_bit() {
    for dim in [1, 2, 3, 63, 64, 65, 384, 1025] {
        let (mut writer, reader) = cache(20, dim);
        for text in ["", "a", "b"] {
            let numbers = vector(dim, text.len() as u64 + 1);
            assert_eq!(found(&reader, CacheKey::of_text(text), 1), None);
            assert_eq!(writer.insert(CacheKey::of_text(text), &numbers, 0, 1, false), Insert::Kept);
            assert_eq!(found(&reader, CacheKey::of_text(text), u64::MAX), Some(numbers));
        }
        assert_eq!(writer.entries(), if dim > 0 { 3 } else { 0 });
    }
}

#[test]
fn what_is_no_vector_is_refused() {
    let (mut writer, reader) = cache(4, 2);
    for bad in [&[1.0][..], &[1.0, 2.0, 3.0], &[f32::NAN, 1.0], &[1.0, f32::INFINITY]] {
        assert_eq!(writer.insert(key(1), bad, 0, 1, false), Insert::Refused);
    }
    assert_eq!((writer.entries(), found(&reader, key(1), 1)), (0, None));
}

#[test]
fn entries_expire_at_their_instant() {
    let (mut writer, reader) = cache(4, 2);
    writer.insert(key(1), &[1.0, 2.0], 100, 1, false);
    assert!(found(&reader, key(1), 99).is_some());
    assert!(found(&reader, key(1), 100).is_none());
    // Written again it lives again.
    writer.insert(key(1), &[1.0, 2.0], 300, 200, true);
    assert!(found(&reader, key(1), 250).is_some());
    assert_eq!(writer.entries(), 1);
}

#[test]
fn the_oldest_goes_and_what_has_expired_goes_first() {
    let (mut writer, reader) = cache(6, 1);
    for n in 1..=6 {
        let expires_at_ns = if n == 4 { 50 } else { 0 };
        assert_eq!(writer.insert(key(n), &[n as f32], expires_at_ns, 1, false), Insert::Kept);
    }
    writer.insert(key(7), &[7.0], 0, 60, false);
    assert!(found(&reader, key(4), 1).is_none() && found(&reader, key(1), 1).is_some());
    writer.insert(key(8), &[8.0], 0, 60, false);
    assert!(found(&reader, key(1), 1).is_none() && found(&reader, key(2), 1).is_some());
    assert_eq!(writer.entries(), 6);
}

#[test]
fn bulk_fills_free_room_and_displaces_nothing_that_lives() {
    let (mut writer, reader) = cache(6, 1);
    for n in 1..=6 {
        assert_eq!(writer.insert(key(n), &[n as f32], 50, 1, true), Insert::Kept);
    }
    assert_eq!(writer.insert(key(7), &[7.0], 0, 49, true), Insert::NoRoom);
    assert!((1..=6).all(|n| found(&reader, key(n), 49).is_some()));
    assert_eq!(writer.insert(key(7), &[7.0], 0, 50, true), Insert::Kept);
    assert_eq!(writer.insert(key(8), &[8.0], 0, 49, false), Insert::Kept);
    assert_eq!(writer.entries(), 6);
}

#[test]
fn headers_that_lie_are_refused() {
    let geometry = CacheGeometry::for_entries(16, 4).unwrap();
    let memory = Arc::new(HeapCacheMemory::new(geometry.region_bytes()));
    assert!(CacheReader::new(Arc::clone(&memory), 4, 9).is_err(), "zeros are no cache");
    CacheWriter::create(Arc::clone(&memory), geometry, 16, 9).unwrap();
    assert!(CacheReader::new(Arc::clone(&memory), 4, 9).is_ok());
    assert_eq!(CacheReader::new(Arc::clone(&memory), 4, 8).err(), Some(CacheFault::Header("fingerprint")));
    assert!(CacheReader::new(Arc::clone(&memory), 5, 9).is_err());
    assert!(CacheReader::new(Arc::clone(&memory), 0, 9).is_err());
    for at in (0..56).step_by(8) {
        let before = memory.load(at, Ordering::Relaxed);
        for lie in [0, before ^ 1, before.wrapping_mul(3), u64::MAX] {
            memory.store(at, lie, Ordering::Relaxed);
            assert!(CacheReader::new(Arc::clone(&memory), 4, 9).is_err(), "offset {at}: {lie}");
        }
        memory.store(at, before, Ordering::Relaxed);
    }
}

#[test]
fn geometries_are_bounded() {
    for (entries, dim) in [(0, 4), (4, 0), (MAX_CACHE_ENTRIES + 1, 4), (1, usize::MAX)] {
        assert!(CacheGeometry::for_entries(entries, dim).is_err());
    }
    for (entries, dim) in [(1, 1), (10_000, 384), (MAX_CACHE_ENTRIES, 4096), (1, 1 << 16)] {
        let geometry = CacheGeometry::for_entries(entries, dim).unwrap();
        assert!(geometry.region_bytes() <= MAX_CACHE_BYTES);
    }
    let geometry = CacheGeometry::for_entries(10_000, 384).unwrap();
    assert!(geometry.slots() >= 12_500 && geometry.entry_bytes() == 1600);
}

#[test]
fn a_reader_beside_the_writer_sees_whole_vectors_only() {
    const DIM: usize = 33;
    let (mut writer, reader) = cache(8, DIM);
    let rounds = if cfg!(miri) { 20 } else { 20_000 };
    std::thread::scope(|scope| {
        let reader = &reader;
        scope.spawn(move || {
            let mut out = Vec::new();
            for round in 0..rounds {
                out.clear();
                let wanted = 1 + round % 12;
                if reader.lookup(key(wanted), || 1, &mut out) {
                    assert_eq!(out.len(), DIM);
                    assert!(out.iter().all(|n| *n == out[0]), "a torn vector: {out:?}");
                    assert_eq!(out[0] as u64 % 12 + 1, wanted, "another text's vector");
                }
            }
        });
        for round in 0..rounds {
            // The number says whose it is and which writing it was.
            let owner = round % 12;
            let number = (owner + 12 * (round % 1000)) as f32;
            writer.insert(key(owner + 1), &[number; DIM], 0, 1, false);
        }
    });
}

#[derive(Debug, Clone)]
struct Step {
    low: u64,
    high: u64,
    ttl_ns: u64,
    is_bulk: bool,
    wait_ns: u64,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (1..40u64, any::<u64>(), 0..60u64, any::<bool>(), 0..10u64)
        .prop_map(|(low, high, ttl_ns, is_bulk, wait_ns)| Step { low, high, ttl_ns, is_bulk, wait_ns });
    proptest::collection::vec(step, 1..if cfg!(miri) { 20 } else { 200 })
}

#[test]
fn readers_are_told_of_the_generation_that_takes_over() {
    let geometry = CacheGeometry::for_entries(8, 5).unwrap();
    let memory = Arc::new(HeapCacheMemory::new(geometry.region_bytes()));
    let writer = CacheWriter::create(Arc::clone(&memory), geometry, 8, 9).unwrap();
    let early = CacheReader::new(Arc::clone(&memory), 5, 9).unwrap();
    assert_eq!(early.superseded_by(), None);
    writer.supersede(7);
    assert_eq!(early.superseded_by(), Some(7));
    let late = CacheReader::new(memory, 5, 9).unwrap();
    assert_eq!(late.superseded_by(), Some(7));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 128 }, failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a map: nothing is found that was not put in or has expired, nothing found is wrong, the bound holds, and
    /// what was put in last is found.
    #[test]
    fn whatever_is_found_is_what_was_put_in(entries in 1..30usize, steps in steps()) {
        let (mut writer, reader) = cache(entries, 3);
        let mut model: HashMap<CacheKey, (Vec<f32>, u64)> = HashMap::new();
        let mut now_ns = 1;
        for (number, step) in steps.into_iter().enumerate() {
            now_ns += step.wait_ns;
            let key = CacheKey::new(step.low, step.high % 5 * (u64::MAX / 5));
            let expires_at_ns = if step.ttl_ns == 0 { 0 } else { now_ns + step.ttl_ns };
            let numbers = vector(3, number as u64);
            let living = writer.entries();
            match writer.insert(key, &numbers, expires_at_ns, now_ns, step.is_bulk) {
                Insert::Kept => {
                    model.insert(key, (numbers.clone(), expires_at_ns));
                    prop_assert_eq!(found(&reader, key, now_ns), Some(numbers));
                }
                Insert::NoRoom => {
                    prop_assert!(step.is_bulk);
                    prop_assert_eq!(writer.entries(), living);
                }
                Insert::Refused => prop_assert!(false, "it was a vector"),
            }
            prop_assert!(writer.entries() <= entries.min(writer.capacity()));
            let mut alive = 0;
            for (key, (numbers, expires_at_ns)) in &model {
                if let Some(seen) = found(&reader, *key, now_ns) {
                    alive += 1;
                    prop_assert_eq!(&seen, numbers);
                    prop_assert!(*expires_at_ns == 0 || now_ns < *expires_at_ns);
                }
            }
            prop_assert!(alive <= writer.entries());
            let mut walked = 0;
            reader.walk(now_ns, |key, expires_at_ns, numbers| {
                walked += 1;
                prop_assert_eq!(Some(&(numbers.to_vec(), expires_at_ns)), model.get(&key));
                Ok::<(), TestCaseError>(())
            })?;
            prop_assert_eq!(walked, alive, "a walk sees what can be found, each once");
        }
    }

    /// Whatever lies in the region, a reader neither panics nor finds a key that does not stand there whole.
    #[test]
    fn no_garbage_makes_a_reader_stumble(words in proptest::collection::vec((0..2000usize, any::<u64>()), 0..200), low in 1..9u64) {
        let geometry = CacheGeometry::for_entries(8, 5).unwrap();
        let memory = Arc::new(HeapCacheMemory::new(geometry.region_bytes()));
        CacheWriter::create(Arc::clone(&memory), geometry, 8, 9).unwrap();
        let reader = CacheReader::new(Arc::clone(&memory), 5, 9).unwrap();
        let count = geometry.region_bytes() / 8;
        for (at, value) in words {
            memory.store(at % count * 8, value % 12, Ordering::Relaxed);
        }
        let _ = found(&reader, key(low), 1);
        let walked = reader.walk(1, |key, _, numbers| if key.low != 0 && numbers.len() == 5 { Ok(()) } else { Err(key) });
        prop_assert_eq!(walked, Ok(()));
    }
}

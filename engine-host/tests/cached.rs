//! An engine with a vector cache, with the test as its broker: what is computed once, what is not computed at all, and what
//! is said to the broker for keeping.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::double::{DIM, FINGERPRINT, vector_of};
use common::{CACHED, Rig, cache, check_rows};
use shm_layout::cache::{CacheKey, CacheWriter, Insert};
use shm_layout::code::Code;
use shm_layout::payload::decode_embeddings;
use shm_layout::wire::{CacheInsertKey, CacheTotals, FromEngine, Operation, Priority, ToEngine};
use shm_os::cache_mapping::CacheWriteMapping;

fn start() -> (Rig, CacheWriter<CacheWriteMapping>) {
    let mut rig = Rig::start();
    let (writer, load, fds) = cache(FINGERPRINT);
    rig.broker.send(&load, fds);
    rig.broker.expect(|message| *message == FromEngine::ModelReady { generation: CACHED });
    (rig, writer)
}

fn flags(payload: &[u8], texts: &[&str]) -> Vec<bool> {
    check_rows(payload, texts);
    decode_embeddings(payload, texts.len()).unwrap().cached
}

fn passes(rig: &Rig) -> Vec<Vec<String>> {
    rig.model.passes.lock().unwrap().clone()
}

/// The next vectors for the cache: their keys, and whether bulk work asked.
fn kept(rig: &mut Rig) -> (Vec<CacheInsertKey>, bool) {
    match rig.broker.expect(|message| matches!(message, FromEngine::CacheInsert { .. })) {
        FromEngine::CacheInsert { generation, bulk, keys, values } => {
            assert_eq!((generation, values.len()), (CACHED, 4 * DIM * keys.len()));
            (keys, bulk)
        }
        other => panic!("{other:?}"),
    }
}

fn insert_key(text: &str) -> CacheInsertKey {
    let key = CacheKey::of_text(text);
    CacheInsertKey { low: key.low, high: key.high, left_ms: 0 }
}

fn totals(rig: &mut Rig) -> CacheTotals {
    rig.broker.send(&ToEngine::Totals, vec![]);
    match rig.broker.expect(|message| matches!(message, FromEngine::CacheTotals { .. })) {
        FromEngine::CacheTotals { generation: CACHED, totals } => totals,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_job_that_is_found_whole_is_not_computed() {
    let (mut rig, mut writer) = start();
    for text in ["a", "b"] {
        let key = CacheKey::of_text(text);
        assert_eq!(writer.insert(key, &vector_of(text), 0, 1, false), Insert::Kept);
    }
    let mut client = common::Client::new(1);
    rig.broker.add_lane(&client, CACHED);
    let ticket = client.embed(Priority::Interactive, &["b", "a", "b"]);
    let (code, payload) = client.answer(ticket);
    assert_eq!((code, flags(&payload, &["b", "a", "b"])), (Code::Ok, vec![true; 3]));
    assert!(passes(&rig).is_empty());
    // Found in part: only the rest is computed, and said to the broker.
    let ticket = client.embed(Priority::Bulk, &["c", "a", "d"]);
    let (code, payload) = client.answer(ticket);
    assert_eq!((code, flags(&payload, &["c", "a", "d"])), (Code::Ok, vec![false, true, false]));
    assert_eq!(passes(&rig), [["c", "d"]]);
    assert_eq!(kept(&mut rig), (vec![insert_key("c"), insert_key("d")], true));
    let totals = totals(&mut rig);
    assert_eq!((totals.engine_hits, totals.engine_misses, totals.shared), (4, 2, 0));
}

#[test]
fn what_was_just_computed_is_found_before_the_broker_has_written_it() {
    let (mut rig, _writer) = start();
    let mut client = common::Client::new(1);
    rig.broker.add_lane(&client, CACHED);
    let first = client.embed(Priority::Interactive, &["new"]);
    let (_, payload) = client.answer(first);
    assert_eq!(flags(&payload, &["new"]), [false]);
    assert_eq!(kept(&mut rig), (vec![insert_key("new")], false));
    let again = client.embed(Priority::Interactive, &["new"]);
    let (_, payload) = client.answer(again);
    assert_eq!(flags(&payload, &["new"]), [true]);
    assert_eq!(passes(&rig), [["new"]]);
}

#[test]
fn one_computation_when_many_ask_at_once() {
    let (mut rig, _writer) = start();
    let mut clients: Vec<_> = (1..=5).map(common::Client::new).collect();
    clients.iter().for_each(|client| rig.broker.add_lane(client, CACHED));
    // While the first is held at the gate, the others come together.
    let gate = clients[0].embed(Priority::Interactive, &["GATE"]);
    rig.model.gate.wait_for_arrival();
    let tickets: Vec<_> = clients
        .iter_mut()
        .map(|client| client.embed(Priority::Interactive, &["same", "same", "GATE"]))
        .collect();
    rig.model.gate.open();
    assert_eq!(clients[0].code(gate), Code::Ok);
    for (client, ticket) in clients.iter_mut().zip(tickets) {
        assert_eq!(client.code(ticket), Code::Ok);
        client.check_vectors();
    }
    let computed: Vec<String> = passes(&rig).concat();
    assert_eq!(computed, ["GATE", "same"], "each text once");
}

#[test]
fn fresh_texts_are_neither_looked_up_nor_kept_nor_shared() {
    let (mut rig, mut writer) = start();
    writer.insert(CacheKey::of_text("a"), &vector_of("a"), 0, 1, false);
    let mut client = common::Client::new(1);
    rig.broker.add_lane(&client, CACHED);
    let fresh = client.try_submit(Operation::EmbedFresh, Priority::Interactive, 0, &["a", "x", "x"]).unwrap();
    let (code, payload) = client.answer(fresh);
    assert_eq!((code, flags(&payload, &["a", "x", "x"])), (Code::Ok, vec![false; 3]));
    assert_eq!(passes(&rig), [["a", "x", "x"]]);
    let later = client.embed(Priority::Interactive, &["x"]);
    let (_, payload) = client.answer(later);
    assert_eq!(flags(&payload, &["x"]), [false]);
    assert_eq!(kept(&mut rig), (vec![insert_key("x")], false), "the first that is kept");
}

#[test]
fn what_fails_is_not_kept() {
    let (mut rig, _writer) = start();
    let mut client = common::Client::new(1);
    rig.broker.add_lane(&client, CACHED);
    for bad in ["NAN", "REFUSE", "PANIC"] {
        for _ in 0..2 {
            let ticket = client.embed(Priority::Interactive, &[bad]);
            assert_ne!(client.code(ticket), Code::Ok);
        }
    }
    assert_eq!(passes(&rig).len(), 6, "each time anew");
    assert!(!rig.broker.has(|message| matches!(message, FromEngine::CacheInsert { .. })));
}

#[test]
fn a_cache_of_another_model_is_left_aside_and_the_model_served() {
    let mut rig = Rig::start();
    let (mut writer, load, fds) = cache(FINGERPRINT + 1);
    writer.insert(CacheKey::of_text("a"), &[9.0; DIM], 0, 1, false);
    rig.broker.send(&load, fds);
    rig.broker.expect(|message| *message == FromEngine::ModelReady { generation: CACHED });
    let mut client = common::Client::new(1);
    rig.broker.add_lane(&client, CACHED);
    let ticket = client.embed(Priority::Interactive, &["a"]);
    let (_, payload) = client.answer(ticket);
    assert_eq!(flags(&payload, &["a"]), [false]);
}

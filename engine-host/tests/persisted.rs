//! An engine that keeps its vectors over restarts, with the test as its broker: what it writes when, what it reads, and that
//! no damage to its files gives a wrong vector or keeps it from serving.

mod common;

/// Where the double finds the traits.
mod compute {
    pub(crate) use engine_host::{
        Compute, ComputeError, Generating, Loader, ModelFacts, ReceivedImage, Vectors,
    };
}

use common::double::{DIM, FINGERPRINT, IDENTITY, vector_of};
use common::{CACHED, Client, Rig, cache, check_rows};
use shm_layout::cache::{CacheKey, CacheWriter, Insert, SavedFormat, SavedRecord};
use shm_layout::code::Code;
use shm_layout::wire::{CacheInsertKey, FromEngine, Priority, ToEngine};
use shm_os::cache_mapping::CacheWriteMapping;
use shm_os::process::monotonic_ns;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Time to live of this test's broker, in ns.
const TTL_NS: u64 = 3600 * 1_000_000_000;

/// An engine with a cache, the writer's end of it, and a client.
struct World {
    rig: Rig,
    writer: CacheWriter<CacheWriteMapping>,
    client: Client,
}

impl World {
    fn start(vectors: &Path) -> World {
        let mut rig = Rig::start_keeping(Some(vectors.into()));
        let (writer, load, fds) = cache(FINGERPRINT);
        rig.broker.send(&load, fds);
        rig.broker.expect(|message| *message == FromEngine::ModelReady { generation: CACHED });
        let client = Client::new(1);
        rig.broker.add_lane(&client, CACHED);
        World { rig, writer, client }
    }

    /// Has a text embedded, as any other it may be found or computed, and checks the vector.
    fn embed(&mut self, text: &str) {
        let ticket = self.client.embed(Priority::Interactive, &[text]);
        let (code, payload) = self.client.answer(ticket);
        assert_eq!(code, Code::Ok);
        check_rows(&payload, &[text]);
    }

    /// The next vectors that the engine sends, put into the cache; by key, with the time that each has left.
    fn keep(&mut self) -> BTreeMap<(u64, u64), u64> {
        match self.rig.broker.expect(|message| matches!(message, FromEngine::CacheInsert { .. })) {
            FromEngine::CacheInsert { generation, keys, values, .. } => {
                assert_eq!((generation, values.len()), (CACHED, 4 * DIM * keys.len()));
                let now_ns = monotonic_ns();
                for (key, bytes) in keys.iter().zip(values.chunks(4 * DIM)) {
                    let vector: Vec<f32> =
                        bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
                    let kept = self.writer.insert(
                        CacheKey::new(key.low, key.high),
                        &vector,
                        now_ns + TTL_NS,
                        now_ns,
                        false,
                    );
                    assert_eq!(kept, Insert::Kept);
                    let text = ["a", "b", "c", "d"].iter().find(|text| insert_key(text).low == key.low);
                    assert_eq!(vector, vector_of(text.expect("a text of this test")), "a wrong vector");
                }
                keys.iter().map(|key| ((key.low, key.high), key.left_ms)).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Drains the engine and waits for its end.
    fn drain(mut self) {
        self.rig.broker.send(&ToEngine::Drain, vec![]);
        self.rig.outcome().unwrap();
    }

    /// Drains the engine at once; gives the keys of all that it sent. A file as short as this test's is always sent whole.
    fn restored(mut self) -> Vec<(u64, u64)> {
        self.rig.broker.send(&ToEngine::Drain, vec![]);
        let mut keys = Vec::new();
        while let Ok(Some((_, message))) = self.rig.broker.stream.receive::<FromEngine>(common::LONG) {
            if let FromEngine::CacheInsert { keys: more, .. } = message {
                keys.extend(more.iter().map(|key| (key.low, key.high)));
            }
        }
        self.rig.outcome().unwrap();
        keys
    }
}

fn insert_key(text: &str) -> CacheInsertKey {
    let key = CacheKey::of_text(text);
    CacheInsertKey { low: key.low, high: key.high, left_ms: 0 }
}

fn pair(text: &str) -> (u64, u64) {
    let key = CacheKey::of_text(text);
    (key.low, key.high)
}

/// A folder with a file of the vectors of `texts`.
fn saved(texts: &[&str]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("vectors");
    let mut world = World::start(&vectors);
    for text in texts {
        world.embed(text);
        world.keep();
    }
    world.drain();
    let file = the_file(&vectors);
    (folder, file)
}

/// The one file of a folder.
fn the_file(vectors: &Path) -> PathBuf {
    let files: Vec<PathBuf> =
        std::fs::read_dir(vectors).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().unwrap()
}

#[test]
fn what_an_engine_saved_the_next_one_restores() {
    let (_folder, file) = saved(&["a", "b"]);
    let vectors = file.parent().unwrap();
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o600);
    assert_eq!(vectors.metadata().unwrap().mode() & 0o7777, 0o700);
    let mut world = World::start(vectors);
    let restored = world.keep();
    let keys: BTreeSet<_> = restored.keys().copied().collect();
    assert_eq!(keys, BTreeSet::from([pair("a"), pair("b")]));
    let ttl_ms = TTL_NS / 1_000_000;
    assert!(restored.values().all(|left_ms| (ttl_ms / 2..=ttl_ms).contains(left_ms)), "{restored:?}");
    world.embed("a");
    assert!(world.rig.model.passes.lock().unwrap().is_empty(), "it was found");
    // Old and new are saved together.
    world.embed("c");
    world.keep();
    world.drain();
    let mut world = World::start(vectors);
    assert_eq!(world.keep().len(), 3);
    world.drain();
}

#[test]
fn unloading_saves_and_an_engine_that_replaces_another_keeps_what_is_in_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("vectors");
    let mut world = World::start(&vectors);
    world.embed("a");
    world.keep();
    world.rig.broker.send(&ToEngine::UnloadModel { generation: CACHED }, vec![]);
    world.rig.broker.expect(|message| *message == FromEngine::ModelUnloaded { generation: CACHED });
    world.drain();
    let before = std::fs::read(the_file(&vectors)).unwrap();

    // The file says nothing of "b", which lies in the cache already when the engine comes.
    let mut rig = Rig::start_keeping(Some(vectors.clone()));
    let (mut writer, load, fds) = cache(FINGERPRINT);
    assert_eq!(writer.insert(CacheKey::of_text("b"), &vector_of("b"), 0, 1, false), Insert::Kept);
    rig.broker.send(&load, fds);
    rig.broker.expect(|message| *message == FromEngine::ModelReady { generation: CACHED });
    let mut world = World { rig, writer, client: Client::new(1) };
    assert_eq!(world.keep().into_keys().collect::<Vec<_>>(), [pair("a")]);
    world.drain();
    assert!(std::fs::read(the_file(&vectors)).unwrap().len() > before.len());
    let mut world = World::start(&vectors);
    let restored = world.keep();
    assert_eq!((restored.len(), restored[&pair("b")]), (2, 0), "one of them never expires");
    world.drain();
}

#[test]
fn any_changed_byte_costs_a_record_or_the_file_and_nothing_else() {
    let (_folder, file) = saved(&["a", "b", "c"]);
    let good = std::fs::read(&file).unwrap();
    let (header, record) = (64, 32 + 4 * DIM);
    assert_eq!(good.len(), header + 3 * record);
    for at in (0..good.len()).step_by(5) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&file, &bad).unwrap();
        // The vectors are checked where they are kept.
        let mut world = World::start(file.parent().unwrap());
        if at >= header {
            assert_eq!(world.keep().len(), 2, "byte {at}");
        }
        world.embed("a");
        if !world.rig.model.passes.lock().unwrap().is_empty() {
            world.keep();
        }
        world.drain();
    }
    for cut in [0, 1, header - 1, header, header + record - 1, good.len() - 1] {
        std::fs::write(&file, &good[..cut]).unwrap();
        let whole = cut.saturating_sub(header) / record;
        let world = World::start(file.parent().unwrap());
        assert_eq!(world.restored().len(), whole, "{cut} bytes");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_replaced() {
    let (_folder, file) = saved(&["a"]);
    std::fs::write(&file, b"something else").unwrap();
    let mut world = World::start(file.parent().unwrap());
    world.embed("b");
    assert_eq!(world.keep().into_keys().collect::<Vec<_>>(), [pair("b")]);
    world.drain();
    let mut world = World::start(file.parent().unwrap());
    assert_eq!(world.keep().into_keys().collect::<Vec<_>>(), [pair("b")]);
    world.drain();
}

#[test]
fn without_a_folder_that_can_be_written_everything_else_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a file");
    std::fs::write(&file, "x").unwrap();
    let mut world = World::start(&file);
    for text in ["a", "b"] {
        world.embed(text);
        world.keep();
    }
    world.drain();
    assert_eq!(std::fs::read(&file).unwrap(), b"x");

    // The name is taken by a folder: the last step of saving fails.
    let (_folder, file) = saved(&["a"]);
    std::fs::remove_file(&file).unwrap();
    std::fs::create_dir(&file).unwrap();
    let mut world = World::start(file.parent().unwrap());
    world.embed("a");
    world.keep();
    world.drain();
    assert_eq!(the_file(file.parent().unwrap()), file, "nothing else is left");
}

#[test]
fn an_engine_that_loses_its_broker_saves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("vectors");
    let mut world = World::start(&vectors);
    world.embed("a");
    world.keep();
    assert!(world.rig.hang_up().is_err());
    // It may not even have come to make the folder.
    assert_eq!(std::fs::read_dir(&vectors).map_or(0, |files| files.count()), 0);
}

#[test]
fn what_has_expired_is_not_restored_and_a_file_of_nothing_else_goes() {
    let (_folder, file) = saved(&["c"]);
    let format = SavedFormat::new(IDENTITY, DIM).unwrap();
    assert_eq!(file.file_name().unwrap().to_str(), Some(format.file_name().as_str()));
    let write = |records: &[(&str, u64)]| {
        let mut bytes = format.header().to_vec();
        for (text, expires_at_ms) in records {
            let record = SavedRecord { key: CacheKey::of_text(text), expires_at_ms: *expires_at_ms };
            format.encode(record, &vector_of(text), &mut bytes).unwrap();
        }
        std::fs::write(&file, bytes).unwrap();
    };
    write(&[("a", 1), ("b", 0), ("c", u64::MAX)]);
    assert_eq!(World::start(file.parent().unwrap()).restored(), [pair("b"), pair("c")]);
    assert!(file.exists());
    write(&[("a", 1), ("b", 2)]);
    assert!(World::start(file.parent().unwrap()).restored().is_empty());
    assert!(!file.exists());
}

const TINY_DISK: &str = "ENGINE_HOST_TEST_TINY_DISK";

#[test]
fn a_full_disk_ends_saving_and_nothing_else() {
    if let Some(vectors) = std::env::var_os(TINY_DISK) {
        return on_tiny_disk(Path::new(&vectors));
    }
    let folder = tempfile::tempdir().unwrap();
    let mount = "mount -t tmpfs -o size=4k,mode=700 none \"$1\" || exit 77";
    let in_namespace = |script: &str| {
        Command::new("unshare")
            .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
            .arg(folder.path())
            .arg(std::env::current_exe().unwrap())
            .arg("a_full_disk_ends_saving_and_nothing_else")
            .env(TINY_DISK, folder.path())
            .status()
    };
    match in_namespace(&format!("{mount}; exec \"$2\" --exact \"$3\"")).map(|status| status.code()) {
        Ok(Some(0)) => {}
        // What a failed writing leads to is tested without a full disk too.
        Ok(Some(1 | 77)) if !in_namespace(mount).is_ok_and(|status| status.success()) => {
            eprintln!("skipped: no mount namespace here");
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => eprintln!("skipped: no unshare"),
        other => panic!("{other:?}"),
    }
}

/// The folder has room for one page, which is less than what is to be saved.
fn on_tiny_disk(vectors: &Path) {
    let mut world = World::start(vectors);
    let texts: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    for some in texts.chunks(10) {
        let ticket = world.client.embed(Priority::Interactive, some);
        assert_eq!(world.client.code(ticket), Code::Ok);
        for text in some {
            world.writer.insert(CacheKey::of_text(text), &vector_of(text), 0, 1, false);
        }
    }
    // Saves, and fails to.
    world.rig.broker.send(&ToEngine::UnloadModel { generation: CACHED }, vec![]);
    world.drain();
    assert_eq!(std::fs::read_dir(vectors).unwrap().count(), 0, "nothing is left, nothing was written");
    // With room it would have been.
    let mut world = World::start(vectors);
    world.embed("a");
    world.keep();
    world.drain();
    assert!(the_file(vectors).metadata().unwrap().len() < 4096);
}

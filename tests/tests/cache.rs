//! The vector cache with real processes: what one client had computed another finds, and nothing that goes wrong around it
//! ever gives a wrong vector.

use libc::{SYS_read, SYS_write};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, gettid};
use shm_layout::wire::CacheReport;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;
use tests::program::workspace;
use tests::running::{Broker, eventually, run_folder};
use worker_sdk::{EmbedOptions, Embeddings, Model, Route};

const CACHED: &[&str] = &["--cache-entries", "1000"];

fn report(broker: &Broker) -> CacheReport {
    broker.asked_models()[0].cache.expect("the model has a cache")
}

/// Waits until the broker holds so many vectors: it is told of them after the answers.
fn wait_for_entries(broker: &Broker, entries: u64) -> CacheReport {
    eventually("the vectors are cached", || Some(report(broker)).filter(|cache| cache.entries == entries))
}

fn fresh(model: &Model, texts: &[&str]) -> Embeddings {
    model.embed_with(texts, &EmbedOptions::default().bypass_cache(true)).expect("texts are computed")
}

#[test]
fn what_one_client_had_computed_all_others_find() {
    let broker = Broker::start(CACHED);
    let texts = ["a first text", "grüße", "", "a first text"];
    let model = broker.model(Route::Lane);
    let first = model.embed(&texts).expect("texts are embedded");
    assert_eq!(first.cached(), [false; 4]);
    assert_eq!(first[0], first[3]);
    let cache = wait_for_entries(&broker, 3);
    assert_eq!((cache.totals.engine_misses, cache.totals.shared, cache.capacity), (3, 1, 1000));

    // The same client, another one, one without shared memory, a future, and one that computes itself.
    let computed = fresh(&model, &texts);
    assert_eq!(computed.cached(), [false; 4]);
    let other = broker.model(Route::Lane);
    let attached = broker.model(Route::Lane).attach().expect("a worker can attach");
    let all = [
        model.embed(&texts),
        other.embed(&texts),
        other.submit(&texts, &EmbedOptions::bulk()).expect("a list is submitted").wait(),
        broker.model(Route::Socket).embed(&texts),
        attached.embed(&texts),
    ];
    for found in all {
        let found = found.expect("texts are embedded");
        assert_eq!(found.cached(), [true; 4]);
        assert_eq!(found.values(), computed.values(), "a cached vector is the computed one");
        assert_eq!((found.dim(), found.fingerprint()), (computed.dim(), computed.fingerprint()));
    }
    let cache = report(&broker);
    assert_eq!((cache.totals.engine_misses, cache.totals.engine_hits), (3, 4));
    assert_eq!(cache.totals.client_hits, 12, "the attached worker has no lane to count in");

    // Half of a list: in order, with its flags.
    let mixed = ["new one", "grüße", "new two", ""];
    let found = other.embed(&mixed).expect("texts are embedded");
    assert_eq!(found.cached(), [false, true, false, true]);
    assert_eq!(found.values(), fresh(&model, &mixed).values());
    let found = broker.model(Route::Socket).embed(&["grüße", "new three"]).expect("texts are embedded");
    assert_eq!(found.cached(), [true, false]);
}

#[test]
fn a_text_that_bypasses_the_cache_leaves_no_trace_in_it() {
    let broker = Broker::start(CACHED);
    let model = broker.model(Route::Lane);
    let secret = fresh(&model, &["nobody is to know"]);
    assert_eq!(model.embed(&["known"]).expect("a text is embedded").cached(), [false]);
    wait_for_entries(&broker, 1);
    for route in [Route::Lane, Route::Socket] {
        let again = broker.model(route);
        assert_eq!(fresh(&again, &["known", "nobody is to know"]).cached(), [false, false]);
    }
    let asked = model.embed(&["nobody is to know"]).expect("a text is embedded");
    assert_eq!((asked.cached(), asked.values()), (&[false][..], secret.values()));
}

#[test]
fn entries_expire() {
    let broker = Broker::start(&["--cache-entries", "10", "--cache-ttl", "1"]);
    let model = broker.model(Route::Lane);
    let first = model.embed(&["soon forgotten"]).expect("a text is embedded");
    eventually("it is found", || {
        let found = model.embed(&["soon forgotten"]).expect("a text is embedded");
        assert_eq!(found.values(), first.values());
        found.cached()[0].then_some(())
    });
    eventually("it is computed again", || {
        let found = model.embed(&["soon forgotten"]).expect("a text is embedded");
        assert_eq!(found.values(), first.values());
        (!found.cached()[0]).then_some(())
    });
}

#[test]
fn hits_outlive_engine_and_broker() {
    let broker = Broker::start(CACHED);
    let model = broker.model(Route::Lane);
    let first = model.embed(&["stays"]).expect("a text is embedded");
    wait_for_entries(&broker, 1);
    nix::sys::signal::kill(broker.engine_pid(), nix::sys::signal::Signal::SIGKILL)
        .expect("the engine is killed");
    assert_eq!(model.embed(&["stays"]).expect("found").cached(), [true]);
    // The engine that replaces it finds it as well, and goes on filling.
    let other = broker.model(Route::Socket).embed(&["stays", "more"]).expect("texts are embedded");
    assert_eq!((other.cached(), &other[0]), (&[true, false][..], &first[0]));
    wait_for_entries(&broker, 2);
    drop(broker);
    let found = model.embed(&["stays", "more"]).expect("found without any broker");
    assert_eq!((found.cached(), &found[0]), (&[true, true][..], &first[0]));
    let timeout = EmbedOptions::default().timeout(std::time::Duration::from_millis(100));
    assert!(model.embed_with(&["unknown"], &timeout).is_err(), "nobody is there to compute it");
}

#[test]
fn without_entries_there_is_no_cache() {
    let broker = Broker::start(&["--cache-entries", "0"]);
    let model = broker.model(Route::Lane);
    for _ in 0..2 {
        assert_eq!(model.embed(&["x", "x"]).expect("texts are embedded").cached(), [false, false]);
    }
    assert_eq!(broker.status().models[0].cache, None);
}

#[test]
fn one_computation_when_many_ask_at_once() {
    let broker = Broker::start(CACHED);
    let models: Vec<Model> = (0..8).map(|_| broker.model(Route::Lane)).collect();
    models[0].embed(&["warm"]).expect("a text is embedded");
    let values: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let asking: Vec<_> = models
            .iter()
            .map(|model| scope.spawn(|| model.embed(&["all at once"]).expect("embedded").into_values()))
            .collect();
        asking.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(values.iter().all(|other| *other == values[0]));
    let totals = report(&broker).totals;
    assert_eq!(totals.engine_misses, 2, "one text was computed twice: {totals:?}");
}

/// A broker on a small model that keeps its vectors in `cache`.
fn persistent(cache: &Path) -> Broker {
    let model = workspace().join("tests/parity/tiny/bert_mean");
    let paths = [&*model.to_string_lossy(), &*cache.to_string_lossy()].map(str::to_owned);
    Broker::start(&[
        "--cache-entries",
        "100",
        "--cache-persist",
        "--model",
        &paths[0],
        "--cache-dir",
        &paths[1],
    ])
}

/// The one file of saved vectors.
fn saved_file(cache: &Path) -> PathBuf {
    let files: Vec<PathBuf> = std::fs::read_dir(cache.join("vectors"))
        .expect("the folder is there")
        .map(|entry| entry.expect("it can be read").path())
        .collect();
    assert_eq!(files.len(), 1, "{files:?}");
    files.into_iter().next().expect("one")
}

/// Texts whose vectors [`saved`] leaves in a file.
const SAVED: &[&str] = &["first", "grüße", "", "the fourth one"];

/// A cache folder with a file of the vectors of [`SAVED`], and these vectors as they were computed.
fn saved() -> (TempDir, Embeddings) {
    let cache = run_folder();
    let broker = persistent(cache.path());
    let computed = broker.model(Route::Lane).embed(SAVED).expect("texts are embedded");
    wait_for_entries(&broker, SAVED.len() as u64);
    broker.stop();
    (cache, computed)
}

#[test]
fn with_persistence_hits_outlive_the_broker() {
    let (cache, computed) = saved();
    let file = saved_file(cache.path());
    assert_eq!(file.metadata().expect("it is there").mode() & 0o7777, 0o600);
    assert_eq!(cache.path().join("vectors").metadata().expect("it is there").mode() & 0o7777, 0o700);
    for round in 0..2 {
        let broker = persistent(cache.path());
        let model = broker.model(Route::Lane);
        let restored = wait_for_entries(&broker, SAVED.len() as u64);
        assert_eq!(restored.totals.engine_misses, 0);
        let found = model.embed(SAVED).expect("texts are embedded");
        assert_eq!(
            (found.cached(), found.values()),
            (&[true; SAVED.len()][..], computed.values()),
            "round {round}"
        );
        assert_eq!(fresh(&model, SAVED).values(), computed.values());
        let log = broker.stop();
        assert!(!log.contains("vectors cannot be saved"), "{log}");
    }
    assert_eq!(saved_file(cache.path()), file);
}

#[test]
fn without_persistence_nothing_is_written() {
    let cache = run_folder();
    let model = workspace().join("tests/parity/tiny/bert_mean");
    let paths = [&*model.to_string_lossy(), &*cache.path().to_string_lossy()].map(str::to_owned);
    let broker = Broker::start(&["--cache-entries", "100", "--model", &paths[0], "--cache-dir", &paths[1]]);
    broker.model(Route::Lane).embed(SAVED).expect("texts are embedded");
    wait_for_entries(&broker, SAVED.len() as u64);
    broker.stop();
    assert!(!cache.path().join("vectors").exists());
}

#[test]
fn a_damaged_file_never_gives_a_wrong_vector() {
    let (cache, computed) = saved();
    let file = saved_file(cache.path());
    let good = std::fs::read(&file).expect("it can be read");
    let record_bytes = (good.len() - 64) / SAVED.len();
    let with = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let damaged = [
        // Magic and identity; key, expiry, checksum and a number of a record; the end cut off; something else; nothing.
        with(1),
        with(20),
        with(64 + 3),
        with(64 + record_bytes + 20),
        with(64 + record_bytes + 25),
        with(64 + 2 * record_bytes + 40),
        good[..good.len() - 7].to_vec(),
        b"not at all".repeat(1000),
        Vec::new(),
    ];
    for (case, bytes) in damaged.iter().enumerate() {
        std::fs::write(&file, bytes).expect("it can be written");
        let broker = persistent(cache.path());
        let model = broker.model(Route::Lane);
        for _ in 0..2 {
            let found = model.embed(SAVED).expect("texts are embedded");
            assert_eq!(found.values(), computed.values(), "case {case}");
        }
        wait_for_entries(&broker, SAVED.len() as u64);
        broker.stop();
    }
    // The last of them was replaced by a whole one.
    let broker = persistent(cache.path());
    let model = broker.model(Route::Lane);
    wait_for_entries(&broker, SAVED.len() as u64);
    assert_eq!(model.embed(SAVED).expect("texts are embedded").cached(), [true; SAVED.len()]);
}

#[test]
fn where_nothing_can_be_saved_serving_goes_on_with_one_warning() {
    let warnings = |log: &str| log.lines().filter(|line| line.contains("vectors cannot be saved")).count();
    // A file where the folder should be; a folder where the file should be.
    for case in 0..2 {
        let (cache, computed) = saved();
        let file = saved_file(cache.path());
        std::fs::remove_file(&file).expect("it can be removed");
        if case == 0 {
            std::fs::remove_dir(cache.path().join("vectors")).expect("it is empty");
            std::fs::write(cache.path().join("vectors"), "").expect("a file can be made");
        } else {
            std::fs::create_dir(&file).expect("a folder can be made");
        }
        let broker = persistent(cache.path());
        let model = broker.model(Route::Lane);
        for _ in 0..2 {
            let found = model.embed(SAVED).expect("texts are embedded");
            assert_eq!(found.values(), computed.values());
        }
        wait_for_entries(&broker, SAVED.len() as u64);
        let log = broker.stop();
        assert_eq!(warnings(&log), 1, "{log}");
    }
}

/// Text that [`child_that_only_hits`] asks for.
const HIT: &str = "a text that was embedded before";

#[test]
#[ignore = "started by a_hit_makes_no_system_call"]
fn child_that_only_hits() {
    if std::env::var_os("MODELBROKER_SOCKET").is_none() {
        return;
    }
    let model = worker_sdk::Client::connect().and_then(|client| client.model("")).expect("a model is leased");
    eventually("it is cached", || model.embed(&[HIT]).expect("embedded").cached()[0].then_some(()));
    let (mut stdin, mut stdout) = (std::io::stdin().lock(), std::io::stdout().lock());
    writeln!(stdout, "\ntid {}", gettid()).expect("stdout is open");
    stdout.flush().expect("stdout is open");
    let mut go = [0; 1];
    stdin.read_exact(&mut go).expect("stdin is open");
    let all_cached = (0..1000).all(|_| model.embed(&[HIT]).is_ok_and(|found| found.cached()[0]));
    writeln!(stdout, "{all_cached}").expect("stdout is open");
    stdout.flush().expect("stdout is open");
}

// Registers have other names elsewhere.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_hit_makes_no_system_call() {
    let broker = Broker::start(CACHED);
    broker.model(Route::Lane).embed(&[HIT]).expect("a text is embedded");
    let mut child = Command::new(std::env::current_exe().expect("this test has a path"))
        .args(["--exact", "child_that_only_hits", "--ignored", "--nocapture", "--test-threads=1"])
        .env("MODELBROKER_SOCKET", broker.socket())
        .env("MODELBROKER_START", "never")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the child is started");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut line_with = |start: &str| {
        lines.by_ref().map_while(Result::ok).find_map(|line| line.strip_prefix(start).map(str::to_owned))
    };
    let thread =
        line_with("tid ").and_then(|tid| tid.parse().ok()).map(Pid::from_raw).expect("it says who it is");

    // From here on every system call of that thread stops it. It is waiting for the byte.
    let stopped = || waitpid(thread, Some(WaitPidFlag::__WALL)).expect("the thread is traced");
    ptrace::attach(thread).expect("a child can be traced");
    assert!(matches!(stopped(), WaitStatus::Stopped(..)));
    ptrace::setoptions(thread, ptrace::Options::PTRACE_O_TRACESYSGOOD).expect("traced");
    child.stdin.take().expect("piped").write_all(b"x").expect("stdin is open");
    let mut calls: Vec<i64> = Vec::new();
    while !calls.contains(&SYS_write) {
        ptrace::syscall(thread, None).expect("traced");
        match stopped() {
            WaitStatus::PtraceSyscall(_) => {
                let registers = ptrace::getregs(thread).expect("traced");
                calls.push(registers.orig_rax as i64);
            }
            WaitStatus::Stopped(..) => {}
            ended => panic!("the child ended: {ended:?} after {calls:?}"),
        }
    }
    ptrace::detach(thread, None).expect("traced");
    let last_read = calls.iter().rposition(|call| *call == SYS_read).expect("it read the byte");
    assert_eq!(calls[last_read + 1..], [SYS_write], "system calls between the byte and the result");
    assert_eq!(line_with("true"), Some(String::new()), "every text was found");
    assert!(child.wait().expect("the child ends").success());
}

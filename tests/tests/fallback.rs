//! The way back: programs that go on with a model of their own where the shared one cannot be had, and return to it.

use nix::sys::signal::{Signal, kill};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::program::workspace;
use tests::running::{Broker, eventually, run_folder};
use worker_sdk::{
    Client, ClientBuilder, EmbedOptions, Embeddings, Fallback, ModelRequest, Route, SdkError, StartBroker,
    Way,
};

/// How long calls wait for a broker that went away.
const PATIENCE: Duration = Duration::from_millis(200);

fn tiny_model() -> PathBuf {
    workspace().join("tests/parity/tiny/bert_mean")
}

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fallback-cache")
}

fn builder(socket: &Path) -> ClientBuilder {
    let builder = Client::builder().socket(socket).start_broker(StartBroker::Never).cache_dir(cache());
    builder.fallback(Fallback::Local).patience(PATIENCE)
}

fn start(folder: tempfile::TempDir) -> Broker {
    let (model, cache) = (tiny_model(), cache());
    let arguments =
        ["--model".into(), model.to_string_lossy(), "--cache-dir".into(), cache.to_string_lossy()];
    Broker::start_in(folder, &arguments.each_ref().map(|argument| argument.as_ref()))
}

fn name() -> String {
    tiny_model().to_string_lossy().into_owned()
}

fn texts(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("text {number} of some words, {}", number % 7)).collect()
}

fn bits(rows: &Embeddings) -> Vec<u32> {
    rows.values().iter().map(|value| value.to_bits()).collect()
}

#[test]
fn calls_go_on_without_a_broker_and_return_to_one_with_the_same_bits() {
    let folder = run_folder();
    let socket = folder.path().join("b.sock");
    let client = builder(&socket).connect().expect("no broker is no failure");
    for route in [Route::Lane, Route::Socket] {
        let model = client.model_with(ModelRequest::new(name()).route(route)).expect("a private model");
        assert_eq!(model.route_in_use(), Way::Private);
        assert_eq!(model.description().expect("a description").generation, 0);
    }
    let model = client.model(&name()).expect("a private model");
    let list = texts(40);
    let alone = model.embed(&list).expect("vectors");
    assert_eq!((alone.way(), alone.len()), (Way::Private, 40));
    let spans = model.token_spans(&list).expect("tokens");
    assert!(matches!(model.try_submit(&list, &EmbedOptions::default()), Err(SdkError::WouldBlock)));
    assert_eq!(
        bits(&model.submit(&list, &EmbedOptions::bulk()).expect("a job").wait().expect("vectors")),
        bits(&alone)
    );
    assert!(matches!(model.embed(&["x".repeat(600 << 10)]), Err(SdkError::Input(_))), "the same limits");

    let mut folder = folder;
    for _ in 0..2 {
        let broker = start(folder);
        let shared = eventually("a call finds the broker", || {
            let rows = model.embed(&list).expect("vectors");
            (rows.way() == Way::Shared).then_some(rows)
        });
        assert_eq!((bits(&shared), shared.fingerprint()), (bits(&alone), alone.fingerprint()));
        assert_eq!(model.token_spans(&list).expect("tokens"), spans);
        assert_eq!(model.route_in_use(), Way::Shared);
        assert!(model.description().expect("a description").generation > 0);

        folder = broker.kill_at_once();
        let after = model.embed_with(&list, &EmbedOptions::default().timeout(Duration::from_secs(100)));
        let after = after.expect("vectors");
        assert_eq!((after.way(), bits(&after)), (Way::Private, bits(&alone)));
        assert_eq!(model.route_in_use(), Way::Private);
    }
}

#[test]
fn a_broker_killed_in_the_middle_of_lists_and_jobs_is_no_failure() {
    let broker = start(run_folder());
    let client = builder(&broker.socket()).connect().expect("a client");
    let model = client.model(&name()).expect("the shared model");
    assert_eq!(model.route_in_use(), Way::Shared);
    let list = texts(12_000);
    let expected = bits(&model.embed(&list[..200]).expect("vectors"));
    let job = model.submit(&list[..200], &EmbedOptions::bulk()).expect("a job");
    let (pid, rows) = (
        broker.pid(),
        std::thread::scope(|scope| {
            let work = scope.spawn(|| model.embed_with(&list, &EmbedOptions::bulk()));
            eventually("the list is being computed", || {
                broker.status().engines.first().filter(|engine| engine.totals.texts > 1000).map(drop)
            });
            kill(broker.pid(), Signal::SIGKILL).expect("the broker is alive");
            work.join().expect("no panic").expect("vectors")
        }),
    );
    assert_eq!((rows.len(), rows.way()), (list.len(), Way::Private), "broker {pid}");
    assert_eq!(bits(&rows)[..expected.len()], expected);
    assert_eq!(bits(&job.wait().expect("the job's vectors")), expected);
    drop(broker);
}

#[test]
fn a_load_that_the_broker_cannot_do_is_done_here() {
    let broker = start(run_folder());
    // A name that leads somewhere in this process only.
    let parent = std::fs::File::open(tiny_model().parent().expect("a parent")).expect("a folder");
    let only_here = format!("/proc/self/fd/{}/bert_mean", parent.as_raw_fd());
    let strict = builder(&broker.socket()).fallback(Fallback::Error).connect().expect("a client");
    let refused = strict.model(&only_here).expect_err("the broker has no such folder");
    assert_eq!(refused.code(), "MODEL_INVALID");
    let private =
        strict.model_with(ModelRequest::new(&only_here).fallback(Fallback::Local)).expect("a private model");
    let rows = private.embed(&texts(3)).expect("vectors");
    assert_eq!(rows.way(), Way::Private);
    let shared = strict.model(&name()).expect("the shared model").embed(&texts(3)).expect("vectors");
    assert_eq!((shared.way(), bits(&shared)), (Way::Shared, bits(&rows)));

    let nowhere = strict.model_with(ModelRequest::new("/no/such/model").fallback(Fallback::Local));
    match nowhere.expect_err("nobody has it") {
        error @ SdkError::BothFailed { .. } => assert_eq!(error.code(), "MODEL_INVALID"),
        error => panic!("{error}"),
    }
    broker.stop();
}

#[test]
fn switched_off_nobody_looks_for_a_broker() {
    let broker = start(run_folder());
    for builder in [builder(&broker.socket()).sharing(false), builder(&broker.socket()).rollout_percent(0)] {
        let client = builder.fallback(Fallback::Error).connect().expect("a client");
        let model = client.model(&name()).expect("a private model");
        assert_eq!(model.embed(&texts(2)).expect("vectors").way(), Way::Private);
    }
    assert!(broker.asked_models().is_empty(), "the broker was asked for a model");
    let client = builder(&broker.socket()).rollout_percent(100).connect().expect("a client");
    assert_eq!(client.model(&name()).expect("a model").embed(&texts(2)).expect("vectors").way(), Way::Shared);
    broker.stop();
}

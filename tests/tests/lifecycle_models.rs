//! The life of models with real processes: idleness, room, orders, reloads under load, and that memory comes back.

use serde_json::Value;
use shm_layout::wire::{ModelReport, ModelState};
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tests::census::Census;
use tests::running::{Broker, PATIENCE, assert_ok, eventually, run_folder};
use tests::tiny_model;
use worker_sdk::{Client, Code, EmbedOptions, Model, ModelRequest, Route, SdkError, UnloadMode};

/// Tiny models of different weights in folders of their own.
struct Models {
    folder: tempfile::TempDir,
}

impl Models {
    fn new(names: &[&str]) -> Models {
        let models = Models { folder: run_folder() };
        for (seed, name) in names.iter().enumerate() {
            tiny_model::write(&models.path(name), seed as u64 + 1);
        }
        models
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().expect("folders of tests have plain names").to_owned()
    }
}

/// A broker whose default model is `name`, with its images in a folder of the test's own.
fn start(models: &Models, name: &str, arguments: &[&str]) -> Broker {
    let (model, images) = (models.name(name), models.name("cache"));
    let mut all = vec!["--model", &model, "--cache-dir", &images, "--inspectable", "--threads", "1"];
    all.extend(arguments);
    Broker::start(&all)
}

fn lease(client: &Client, name: &str) -> Model {
    client.model(name).expect("the model can be leased")
}

fn report(client: &Client, path: &Path) -> Option<ModelReport> {
    let source = path.to_str().expect("folders of tests have plain names");
    client.status().expect("the broker answers").models.into_iter().find(|m| m.detail.source == source)
}

fn state(client: &Client, path: &Path) -> Option<ModelState> {
    report(client, path).map(|model| model.state)
}

fn vector(model: &Model, text: &str) -> Vec<f32> {
    model.embed(&[text]).expect("embedded").into_values()
}

#[test]
fn an_idle_model_leaves_gives_its_memory_back_and_comes_again() {
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &["--unload-after", "1", "--cache-entries", "100"]);
    let client = broker.client();
    let before = eventually("an engine is up", || Census::take(&broker, &client));
    let model = lease(&client, "");
    let first = vector(&model, "hello");
    // A lease keeps it, longer than the time that idle models have.
    let held = report(&client, &models.path("a")).unwrap();
    assert!(held.detail.unload_in_us.is_none());
    let loaded = Census::take(&broker, &client).unwrap();
    assert!(loaded.engine_mappings.len() > before.engine_mappings.len(), "{loaded:?}");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(state(&client, &models.path("a")), Some(ModelState::Ready));
    drop(model);
    eventually("it leaves", || {
        (state(&client, &models.path("a")) == Some(ModelState::Unloaded)).then_some(())
    });
    before.await_again(&broker, &client);
    let again = lease(&client, "");
    assert_eq!(vector(&again, "hello"), first);
    let report = report(&client, &models.path("a")).unwrap();
    assert_eq!((report.loads, report.detail.unloads), (2, 1));
    drop(again);
    let log = broker.stop();
    assert!(log.contains("model.unload"), "{log}");
}

#[test]
fn a_model_over_the_bound_takes_the_place_of_the_least_recently_used_idle_one() {
    let models = Models::new(&["a", "b", "c"]);
    let broker = start(&models, "a", &["--max-models", "2"]);
    let client = broker.client();
    let (a, b) = (lease(&client, ""), lease(&client, &models.name("b")));
    let hasty = client.model_with(ModelRequest::new(models.name("c")).wait(Duration::ZERO));
    let Err(SdkError::Refused { code, message, .. }) = hasty else { panic!("granted: {hasty:?}") };
    assert_eq!(code, Code::ModelUnavailable);
    assert!(message.contains("the limit") && message.contains(&std::process::id().to_string()), "{message}");
    drop(a);
    let c = lease(&client, &models.name("c"));
    assert_eq!(state(&client, &models.path("a")), Some(ModelState::Unloaded));
    assert_eq!(state(&client, &models.path("b")), Some(ModelState::Ready), "one in use never leaves");
    vector(&b, "x");
    vector(&c, "x");
    // Who waits gets it as soon as one of the others is idle.
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| vector(&lease(&broker.client(), ""), "x"));
        eventually("it waits", || {
            report(&client, &models.path("a")).filter(|m| m.detail.waiting == 1).map(drop)
        });
        drop(c);
        waits.join().unwrap();
    });
    drop(b);
    broker.stop();
}

#[test]
fn orders_of_the_command_line_are_done_or_refused_with_reasons() {
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &[]);
    let name = models.name("a");
    let said = |arguments: &[&str], exit: i32| -> (Value, String) {
        let output = broker.run(arguments, b"");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {stderr}");
        (serde_json::from_slice(&output.stdout).unwrap_or(Value::Null), stderr)
    };
    let (_, why) = said(&["model", "--json", "health", &name], 4);
    assert!(why.contains("not loaded"), "{why}");
    let (loaded, _) = said(&["model", "--json", "load", &name], 0);
    assert_eq!((&loaded["was_loaded"], &loaded["generation"]), (&Value::from(false), &Value::from(1)));
    assert_eq!(said(&["model", "load", "--json", &name], 0).0["was_loaded"], true);
    assert_eq!(said(&["model", "--json", "health", &name], 0).0["healthy"], true);
    let client = broker.client();
    let model = lease(&client, "");
    let (_, why) = said(&["model", "unload", &name], 6);
    assert!(why.contains(&format!("processes {}", std::process::id())), "{why}");
    let (reloaded, _) = said(&["model", "--json", "reload", &name], 0);
    assert_eq!((&reloaded["replaced"], &reloaded["generation"]), (&Value::from(1), &Value::from(2)));
    let (listed, _) = said(&["model", "--json", "list", &name], 0);
    let listed = &listed["models"][0];
    assert_eq!(listed["is_loaded"], true);
    assert_eq!(listed["reloads"], 1);
    assert_eq!(listed["references"][0]["pid"], std::process::id());
    assert_eq!(said(&["model", "--json", "unload", "--when-idle", &name], 0).0["pending"], true);
    drop(model);
    eventually("it leaves", || {
        (state(&client, &models.path("a")) == Some(ModelState::Unloaded)).then_some(())
    });
    said(&["model", "load", &name], 0);
    let (unloaded, _) = said(&["model", "--json", "unload", &name], 0);
    assert!(unloaded["freed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(unloaded["pending"], false);
    assert_eq!(said(&["model", "--json", "unload", &name], 0).0["freed_bytes"], 0);
    said(&["model", "unload", "no-such-model"], 4);
    said(&["model", "list", "no-such-model"], 4);
    said(&["model", "load", "/no/such/folder"], 4);
    broker.stop();
}

#[test]
fn fifty_reloads_under_load_fail_no_request() {
    const RELOADS: u64 = 50;
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &["--cache-entries", "100"]);
    let (stop, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let client = broker.client();
    let wanted = vector(&lease(&client, ""), "text 1");
    let work = |route: Route, options: EmbedOptions| {
        let model = broker.model(route);
        let mut generations = HashSet::new();
        while !stop.load(Ordering::Relaxed) {
            let texts: Vec<String> = (0..3).map(|n| format!("text {n}")).collect();
            let rows = model.embed_with(&texts, &options).expect("no request fails");
            assert_eq!(rows.get(1), Some(wanted.as_slice()), "the same weights give the same vectors");
            generations.insert(model.description().unwrap().generation);
            answered.fetch_add(1, Ordering::Relaxed);
        }
        generations
    };
    let work = &work;
    std::thread::scope(|scope| {
        let computed = || EmbedOptions { bypass_cache: true, ..EmbedOptions::default() };
        let workers = [
            scope.spawn(move || work(Route::Lane, computed())),
            scope.spawn(move || work(Route::Lane, EmbedOptions::default())),
            scope.spawn(move || work(Route::Socket, computed())),
        ];
        for n in 1..=RELOADS {
            let before = answered.load(Ordering::Relaxed);
            let reloaded = client.reload_model("", PATIENCE).expect("a reload");
            assert_eq!(reloaded.description.generation, n + 1);
            eventually("requests are answered", || {
                (answered.load(Ordering::Relaxed) >= before + 3).then_some(())
            });
        }
        eventually("everybody has the last generation", || {
            let detail = report(&client, &models.path("a"))?.detail;
            (detail.generations.len() == 1).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            let generations = worker.join().unwrap();
            assert!(generations.contains(&(RELOADS + 1)), "{generations:?}");
            assert!(generations.len() > 10, "it took up only {generations:?}");
        }
    });
    let detail = report(&client, &models.path("a")).unwrap().detail;
    assert_eq!((u64::from(detail.reloads), detail.failures), (RELOADS, 0));
    drop(client);
    broker.stop();
}

#[test]
fn a_folder_that_is_replaced_shows_with_a_reload_and_not_before() {
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &["--cache-entries", "100"]);
    let client = broker.client();
    let model = lease(&client, "");
    let attached = model.attach().expect("the image can be attached");
    let before = vector(&model, "hello");
    tiny_model::write(&models.path("a"), 77);
    assert_eq!(vector(&model, "hello"), before);
    assert_eq!(vector(&model, "never asked before").len(), before.len());
    let reloaded = client.reload_model("", PATIENCE).unwrap();
    assert_eq!(reloaded.replaced, Some(1));
    let after =
        eventually("the new weights are taken up", || Some(vector(&model, "hello")).filter(|v| *v != before));
    assert_eq!(attached.embed(&["hello"]).unwrap().into_values(), before, "who is attached keeps its own");
    assert_eq!(model.description().unwrap().generation, 2);
    // A folder that is broken meanwhile changes nothing.
    std::fs::write(models.path("a").join("model.safetensors"), b"nonsense").unwrap();
    let Err(SdkError::Refused { code, message, .. }) = client.reload_model("", PATIENCE) else {
        panic!("reloaded")
    };
    assert_eq!(code, Code::ModelInvalid);
    assert!(message.contains("stays as it was"), "{message}");
    assert_eq!(vector(&model, "hello"), after);
    let report = report(&client, &models.path("a")).unwrap();
    assert_eq!(report.state, ModelState::Ready);
    assert_eq!(report.detail.last_error.unwrap().code, Code::ModelInvalid);
    drop((model, attached));
    broker.stop();
}

/// Resident memory of a process, in bytes. Not what it shares with nobody: pages of the program count as shared only while
/// a loader runs.
fn resident_bytes(pid: u32) -> u64 {
    shm_os::smaps::process_memory(pid).expect("the process can be looked at").rss_bytes
}

#[test]
fn two_hundred_loads_and_unloads_leave_nothing() {
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &["--cache-entries", "100"]);
    let client = broker.client();
    let engine = broker.engine_pid().as_raw().cast_unsigned();
    let cycle = || {
        let model = lease(&client, "");
        vector(&model, "hello");
        drop(model);
        eventually("it can be unloaded", || client.unload_model("", UnloadMode::IfIdle).ok());
    };
    (0..5).for_each(|_| cycle());
    let census = Census::take(&broker, &client).unwrap();
    let own = |pid| resident_bytes(pid) as f64;
    let broker_pid = broker.pid().as_raw().cast_unsigned();
    let before = (own(broker_pid), own(engine));
    (5..200).for_each(|_| cycle());
    let after = (own(broker_pid), own(engine));
    eprintln!(
        "broker {:.0} -> {:.0}, engine {:.0} -> {:.0} bytes of its own",
        before.0, after.0, before.1, after.1
    );
    assert!(after.0 <= before.0 * 1.03, "the broker grew from {} to {} bytes", before.0, after.0);
    assert!(after.1 <= before.1 * 1.03, "the engine grew from {} to {} bytes", before.1, after.1);
    census.await_again(&broker, &client);
    assert_eq!(report(&client, &models.path("a")).unwrap().loads, 200);
    broker.stop();
}

/// `MODELBROKER_TEST_RELOADS` in all, one after the other; 200 where nothing is said.
#[test]
fn reloads_in_a_row_leave_one_generation() {
    let reloads: u64 =
        std::env::var("MODELBROKER_TEST_RELOADS").ok().and_then(|n| n.parse().ok()).unwrap_or(200);
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &[]);
    let client = broker.client();
    let model = lease(&client, "");
    let census = Census::take(&broker, &client).unwrap();
    let begun = Instant::now();
    for n in 0..reloads {
        let reloaded = client.reload_model("", PATIENCE).expect("a reload");
        assert_eq!(reloaded.replaced, Some(n + 1));
    }
    eprintln!("{reloads} reloads in {:?}", begun.elapsed());
    eventually("one generation is left", || {
        vector(&model, "hello");
        report(&client, &models.path("a")).filter(|m| m.detail.generations.len() == 1).map(drop)
    });
    census.await_again(&broker, &client);
    broker.stop();
}

#[test]
fn what_is_to_be_preloaded_is_there_before_anybody_asks_and_stays() {
    let models = Models::new(&["a", "b"]);
    let preload = models.name("b");
    let broker = start(&models, "a", &["--preload", &preload, "--unload-after", "1", "--max-models", "1"]);
    let client = broker.client();
    eventually("it is loaded", || {
        (state(&client, &models.path("b")) == Some(ModelState::Ready)).then_some(())
    });
    let refused = client.model_with(ModelRequest::new("").wait(Duration::ZERO));
    assert!(
        matches!(&refused, Err(SdkError::Refused { message, .. }) if message.contains("preloaded")),
        "{refused:?}"
    );
    let report = report(&client, &models.path("b")).unwrap();
    assert!(report.detail.pinned && report.detail.unload_in_us.is_none());
    assert_eq!(report.loads, 1);
    broker.stop();
}

#[test]
fn a_budget_is_kept_and_its_refusal_names_the_figures() {
    let models = Models::new(&["a", "b"]);
    // One image of its own size fits, a padded one beside it does not.
    tiny_model::write_padded(&models.path("large"), 9, 20_000);
    let broker = start(&models, "a", &["--memory-budget", "4MiB"]);
    let client = broker.client();
    let a = lease(&client, "");
    drop(lease(&client, &models.name("b")));
    let Err(SdkError::Refused { code, message, retry_after }) = client.model(&models.name("large")) else {
        panic!("granted beyond the budget")
    };
    assert_eq!(code, Code::OutOfMemory);
    assert!(message.contains("bytes are needed") && message.contains("of the budget"), "{message}");
    assert!(!retry_after.is_zero());
    vector(&a, "x");
    let output = broker.run(&["model", "load", &models.name("large")], b"");
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        state(&client, &models.path("b")),
        Some(ModelState::Unloaded),
        "what was idle was given up before the refusal"
    );
    vector(&a, "y");
    drop(a);
    broker.stop();
}

/// A control group with a limit of memory, gone with the value. Version 1 or 2, wherever one can be made here.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn make(limit_bytes: u64) -> Option<Group> {
        let name = format!("modelbroker-test-{}", std::process::id());
        for (root, file) in
            [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")]
        {
            let group = Group { folder: Path::new(root).join(&name) };
            if !Path::new(root).join("cgroup.procs").exists() || std::fs::create_dir(&group.folder).is_err() {
                continue;
            }
            if std::fs::write(group.folder.join(file), limit_bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        None
    }

    fn take(&self, pid: u32) -> std::io::Result<()> {
        std::fs::write(self.folder.join("cgroup.procs"), pid.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.folder);
    }
}

#[test]
fn a_control_group_that_is_too_small_refuses_the_load_and_kills_nobody() {
    const LIMIT_BYTES: u64 = 96 << 20;
    let models = Models::new(&["a"]);
    // Its image has about 100 MiB.
    tiny_model::write_padded(&models.path("large"), 9, 400_000);
    let Some(group) = Group::make(LIMIT_BYTES) else {
        eprintln!(
            "SKIPPED: no control group with a memory limit can be made here (not root, or no such controller)"
        );
        return;
    };
    let broker = start(&models, "a", &[]);
    let client = broker.client();
    let model = lease(&client, "");
    // Broker first: what it starts from now on is in the group as well.
    group.take(broker.pid().as_raw().cast_unsigned()).expect("a process can be put into the group");
    group.take(broker.engine_pid().as_raw().cast_unsigned()).expect("a process can be put into the group");
    let Err(SdkError::Refused { code, message, .. }) = client.model(&models.name("large")) else {
        panic!("an image of 100 MiB was loaded in {LIMIT_BYTES} bytes")
    };
    assert!(matches!(code, Code::OutOfMemory | Code::ModelLoadError), "{code}: {message}");
    assert!(
        message.contains("bytes are needed") || message.contains("out of memory"),
        "it does not say that memory is short: {message}"
    );
    eprintln!("told: {code}: {message}");
    vector(&model, "everybody else goes on");
    assert_eq!(broker.status().engines[0].restarts, 0);
    drop(model);
    broker.stop();
}

#[test]
fn one_load_for_ten_threads_and_access_is_measured() {
    let models = Models::new(&["a"]);
    let broker = start(&models, "a", &[]);
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(|| vector(&broker.model(Route::Lane), "x"));
        }
    });
    let status = broker.status();
    assert_eq!(broker.asked_models()[0].loads, 1);
    assert_eq!((status.metrics.load.total(), status.metrics.access.total()), (1, 10));
    assert!(status.metrics.execution.total() >= 10, "{:?}", status.metrics);
    let output = broker.run(&["status", "--json"], b"");
    assert_ok(&output);
    broker.stop();
}

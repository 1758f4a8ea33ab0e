//! The configuration from the outside: layers and their origins as the program shows them, refusals, and changes that a
//! running broker takes up.

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tests::program::modelbroker;
use tests::running::{Broker, assert_ok, eventually, run_folder, run_program};

/// Runs the program with this environment alone, in an empty home.
fn run(home: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Output {
    Command::new(modelbroker())
        .env_clear()
        .env("HOME", home)
        .envs(environment.iter().copied())
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("modelbroker can be run")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn shown(home: &Path, environment: &[(&str, &str)], arguments: &[&str]) -> Value {
    let output = run(home, environment, &[&["config", "--json"], arguments].concat());
    assert_ok(&output);
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn entry(value: impl Into<Value>, origin: &str) -> Value {
    json!({ "value": value.into(), "origin": origin })
}

#[test]
fn every_layer_shows_its_origin() {
    let home = run_folder();
    let folder = home.path().join(".config/modelbroker");
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("config.toml");
    std::fs::write(&file, "[sharing]\nunload_after_seconds = 60\nmax_shared_models = 2\n").unwrap();
    let in_file = |line: u32| format!("file {}:{line}", file.display());
    let all = shown(
        home.path(),
        &[
            ("CORE_MODEL_MANAGER_MODELS_EMBEDDING_LOCAL_PATH", "/models/mine"),
            ("CORE_MODEL_MANAGER_DEVICE_PREFERENCE", "cpu"),
            ("MODEL_DEVICE", "cuda"),
            ("MODEL_NAME", "nlpai-lab/KURE-v1"),
            ("MODEL_CACHE_DIR", "/cache"),
            ("MODELBROKER_CACHE_TTL", "7"),
            ("MODELBROKER_CACHE_ENTRIES", ""),
        ],
        &["--set", "sharing.max_shared_models=3", "--socket", "/run/x.sock"],
    );
    for (key, expected) in [
        ("enabled", entry(true, "default")),
        ("sharing.unload_after_seconds", entry(60, &in_file(2))),
        ("sharing.max_shared_models", entry(3, "flag --set")),
        (
            "models.embedding.local_path",
            entry("/models/mine", "environment CORE_MODEL_MANAGER_MODELS_EMBEDDING_LOCAL_PATH"),
        ),
        ("device_preference", entry("cpu", "environment CORE_MODEL_MANAGER_DEVICE_PREFERENCE")),
        ("models.embedding.name", entry("nlpai-lab/KURE-v1", "environment MODEL_NAME")),
        ("serve.model", entry("nlpai-lab/KURE-v1", "environment MODEL_NAME")),
        ("serve.cache_dir", entry("/cache", "environment MODEL_CACHE_DIR")),
        ("embedding_cache.ttl_seconds", entry(7, "environment MODELBROKER_CACHE_TTL")),
        ("embedding_cache.max_cache_size", entry(10_000, "default")),
        ("serve.socket", entry("/run/x.sock", "flag --socket")),
        ("models.t5_summarizer.local_path", entry(Value::Null, "default")),
    ] {
        assert_eq!(all[key], expected, "{key}");
    }
    // Another file instead, by variable and by option.
    let other = home.path().join("other.toml");
    std::fs::write(&other, "enabled = false\n").unwrap();
    let other = other.to_str().unwrap();
    let origin = format!("file {other}:1");
    let by_variable = shown(home.path(), &[("MODELBROKER_CONFIG", other)], &[]);
    let by_option = shown(home.path(), &[("MODELBROKER_CONFIG", "/nonexistent")], &["--config", other]);
    for all in [by_variable, by_option] {
        assert_eq!(all["enabled"], entry(false, &origin));
        assert_eq!(all["sharing.unload_after_seconds"], entry(1800, "default"));
    }
    let text = run(home.path(), &[], &["config"]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("sharing.max_shared_models = 2  (file "));
}

#[test]
fn what_is_wrong_is_told_at_once_and_ends_with_2() {
    let home = run_folder();
    let file = home.path().join("c.toml");
    std::fs::write(&file, "trust_remote_code = true\n[sharing]\nunload_after = 5\n").unwrap();
    let path = file.to_str().unwrap();
    let environment = [("MODELBROKER_CACHE_TLL", "5"), ("MODEL_DEVICE", "abacus")];
    for command in
        [&["config", "check"][..], &["config"], &["serve"], &["status"], &["embed", "x"], &["reload-config"]]
    {
        let output = run(home.path(), &environment, &[command, &["--config", path]].concat());
        assert_eq!(output.status.code(), Some(2), "{command:?}: {}", said(&output));
        let said = said(&output);
        for part in [
            "4 reasons",
            "c.toml:1: trust_remote_code",
            "sharing.unload_after_seconds",
            "MODELBROKER_CACHE_TTL",
            "abacus",
        ] {
            assert!(said.contains(part), "{command:?}: {said}");
        }
    }
    let output = run(home.path(), &environment, &["config", "check", path, "--json"]);
    assert_eq!(output.status.code(), Some(2));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ok"], report["problems"].as_array().unwrap().len()), (&json!(false), 4));
    assert_eq!(report["problems"][1]["nearest"], "sharing.unload_after_seconds");
    std::fs::write(&file, "enabled = \n").unwrap();
    let output = run(home.path(), &[], &["config", "check", path]);
    assert!(said(&output).contains("c.toml:1: is not TOML"), "{}", said(&output));
    let output = run(home.path(), &[], &["config", "check", "/nonexistent.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(said(&output).contains("/nonexistent.toml: cannot be read"), "{}", said(&output));
    assert_eq!(run(home.path(), &[], &["config", "--set", "nonsense"]).status.code(), Some(2));
    // The doctor has it as a finding, and looks at the rest all the same.
    let output = run(home.path(), &[], &["doctor", "--json", "--config", path]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((report["ok"].clone(), output.status.code()), (json!(false), Some(8)));
    assert_eq!(report["checks"][0]["verdict"], "fail");
}

#[test]
fn a_first_file_is_written_once_and_changes_nothing() {
    let home = run_folder();
    let before = shown(home.path(), &[], &[]);
    assert_ok(&run(home.path(), &[], &["config", "init"]));
    let file = home.path().join(".config/modelbroker/config.toml");
    assert!(std::fs::read_to_string(&file).unwrap().contains("[sharing]"));
    assert_eq!(shown(home.path(), &[], &[]), before);
    std::fs::write(&file, "enabled = true\n").unwrap();
    let again = run(home.path(), &[], &["config", "init"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(said(&again).contains("is there already"), "{}", said(&again));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "enabled = true\n");
    let schema = run(home.path(), &[], &["config", "schema"]);
    let schema: Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert_eq!(schema["properties"]["trust_remote_code"]["const"], false);
}

#[test]
fn a_broker_that_is_switched_off_says_so() {
    let home = run_folder();
    let socket = home.path().join("b.sock");
    let socket = socket.to_str().unwrap();
    let output = run(home.path(), &[("CORE_MODEL_MANAGER_ENABLED", "false")], &["serve", "--socket", socket]);
    assert_eq!(output.status.code(), Some(2));
    let said = said(&output);
    assert!(said.contains("switched off") && said.contains("CORE_MODEL_MANAGER_ENABLED"), "{said}");
}

#[test]
fn a_running_broker_takes_up_what_it_can_and_says_what_it_cannot() {
    let folder = run_folder();
    let config = folder.path().join("test-config.toml");
    let write = |text: &str| std::fs::write(&config, text).unwrap();
    write("[serve]\nmodel = 'first/model'\nthreads = 1\n");
    let broker = Broker::start(&["--config", config.to_str().unwrap()]);
    assert_eq!(broker.status().default_model, "first/model");
    let unchanged = broker.run(&["reload-config"], b"");
    assert_ok(&unchanged);
    assert_eq!(String::from_utf8_lossy(&unchanged.stdout), "nothing changed\n");

    write("[serve]\nmodel = 'second/model'\nthreads = 2\n[sharing]\nunload_after_seconds = 60\n");
    let output = broker.run(&["reload-config", "--json"], b"");
    assert_ok(&output);
    let changed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        changed,
        json!({
            "applied": [
                "serve.model: \"first/model\" -> \"second/model\"",
                "sharing.unload_after_seconds: 1800 -> 60"
            ],
            "pending": ["serve.threads: 1 -> 2 (needs a restart of the broker)"]
        })
    );
    assert_eq!(broker.status().default_model, "second/model");

    // What cannot be used changes nothing and is told.
    write("[serve]\nmodel = 'third/model'\nthreads = 'many'\n");
    let refused = broker.run(&["reload-config"], b"");
    assert_eq!(refused.status.code(), Some(2), "{}", said(&refused));
    assert!(
        said(&refused).contains("CONFIG_INVALID") && said(&refused).contains("serve.threads"),
        "{}",
        said(&refused)
    );
    assert_eq!(broker.status().default_model, "second/model");

    // The same by signal; the broker stays.
    kill(broker.pid(), Signal::SIGHUP).unwrap();
    eventually("the refusal is logged", || broker.log().contains("config.refused").then_some(()));
    write("[serve]\nmodel = 'third/model'\nthreads = 2\n");
    kill(broker.pid(), Signal::SIGHUP).unwrap();
    eventually("the signal is heard", || (broker.status().default_model == "third/model").then_some(()));
    let log = broker.stop();
    assert!(log.contains("serve.threads: 1 -> 2 (needs a restart of the broker)"), "{log}");
}

#[test]
fn many_who_reload_at_once_are_all_answered() {
    let folder = run_folder();
    let config = folder.path().join("test-config.toml");
    std::fs::write(&config, "[serve]\nmodel = 'a/b'\n").unwrap();
    let broker = Broker::start(&["--config", config.to_str().unwrap()]);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let client = broker.client();
                for _ in 0..20 {
                    client.reload_configuration().expect("each is answered");
                }
            });
        }
    });
    broker.stop();
}

#[test]
fn configured_ids_are_models_and_may_come_and_change_while_the_broker_runs() {
    let folder = run_folder();
    let config = folder.path().join("test-config.toml");
    let write = |text: &str| std::fs::write(&config, text).unwrap();
    write("[models.mine]\ntype = 'embedding'\nname = 'all-MiniLM-L6-v2'\n");
    let broker = Broker::start(&["--config", config.to_str().unwrap(), "--cache-entries", "100"]);
    let first = broker.run(&["embed", "--model", "mine", "a text"], b"");
    assert_ok(&first);
    let default = broker.run(&["embed", "a text"], b"");
    assert_eq!(broker.status().models.iter().map(|model| model.loads).sum::<u32>(), 1, "both are one model");
    let vector = |output: &Output| -> Value {
        serde_json::from_slice::<Value>(&output.stdout).expect("a row")["embedding"].clone()
    };
    assert_eq!(vector(&first), vector(&default));
    // Another one beside it, of which nothing is kept.
    write(
        "[models.mine]\ntype = 'embedding'\nname = 'all-MiniLM-L6-v2'\n\
         [models.small]\ntype = 'embedding'\nname = 'all-MiniLM-L6-v2'\nprecision = 'int8'\ncache_embeddings = false\n",
    );
    assert_ok(&broker.run(&["reload-config"], b""));
    for _ in 0..2 {
        let output = broker.run(&["embed", "--model", "small", "a text"], b"");
        assert_ok(&output);
        assert_ne!(vector(&output), vector(&first), "another precision");
    }
    let status = broker.status();
    let of =
        |end: &str| status.models.iter().find(|model| model.model_id.ends_with(end)).expect("it is known");
    assert!(of("int8").cache.is_none() && of("MiniLM-L6-v2").cache.is_some());
    broker.stop();
}

#[test]
fn sharing_that_is_switched_off_in_the_file_needs_no_broker() {
    let folder = run_folder();
    let config = folder.path().join("config.toml");
    std::fs::write(&config, "[sharing]\nenabled = false\n").unwrap();
    let socket = folder.path().join("b.sock");
    let output = run_program(Some(&socket), &["embed", "--config", config.to_str().unwrap(), "a text"], b"");
    assert_ok(&output);
    assert!(!socket.exists(), "no broker was started");
}

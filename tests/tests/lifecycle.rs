//! Starting, sharing and ending: one broker however many start one, one load however many ask, and nothing left behind.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::collections::HashSet;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tests::program::modelbroker;
use tests::running::{Broker, assert_ok, eventually, run_folder, run_program};
use worker_sdk::{Client, EmbedOptions, ModelRequest, Route, StartBroker};

fn spawn_embed(socket: &std::path::Path, text: &str) -> Child {
    let mut command = Command::new(modelbroker());
    command.arg("--socket").arg(socket).args(["embed", text]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn ten_threads_and_twenty_processes_are_one_load() {
    let broker = Broker::start(&[]);
    let processes: Vec<Child> =
        (0..20).map(|n| spawn_embed(&broker.socket(), &format!("text {}", n % 3))).collect();
    let in_threads: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let ask = |n| broker.model(Route::Lane).embed(&[format!("text {}", n % 3)]).unwrap().into_values();
        let threads: Vec<_> = (0..10).map(|n| scope.spawn(move || ask(n))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for (n, child) in processes.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_ok(&output);
        let row: Value = serde_json::from_slice(&output.stdout).unwrap();
        let found = row["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32);
        assert!(found.zip(&in_threads[n % 3]).all(|(a, b)| (a - b).abs() <= 2e-6));
    }
    let models = broker.asked_models();
    assert_eq!(models.len(), 1);
    assert_eq!(models[0].loads, 1, "one load for thirty askers");
    broker.stop();
}

#[test]
fn names_of_one_model_are_one_model() {
    let broker = Broker::start(&[]);
    let client = broker.client();
    let ids: HashSet<String> = ["", "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"]
        .iter()
        .map(|name| client.model(name).unwrap().description().unwrap().model_id.clone())
        .collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(broker.status().models.iter().filter(|m| m.description.is_some()).count(), 1);
    broker.stop();
}

#[test]
fn racing_starters_get_one_broker_and_stop_ends_it() {
    let folder = run_folder();
    let socket = folder.path().join("b.sock");
    let starters: Vec<Child> = (0..4).map(|_| spawn_embed(&socket, "hello")).collect();
    let outputs: Vec<_> = starters.into_iter().map(|c| c.wait_with_output().unwrap()).collect();
    outputs.iter().for_each(assert_ok);
    let client = Client::builder().socket(&socket).start_broker(StartBroker::Never).connect().unwrap();
    let status = client.status().unwrap();
    assert_eq!(status.models[0].loads, 1, "one broker served all");
    let broker = Pid::from_raw(status.broker_pid as i32);
    drop(client);
    assert_ok(&run_program(Some(&socket), &["stop"], b""));
    eventually("the broker is gone", || kill(broker, None).is_err().then_some(()));
    assert!(!socket.exists());
    let again = run_program(Some(&socket), &["status"], b"");
    assert_eq!(again.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&again.stderr).contains("no broker"), "{again:?}");
}

#[test]
fn what_a_killed_broker_leaves_does_not_hinder_the_next() {
    let broker = Broker::start(&[]);
    broker.model(Route::Lane).embed(&["x"]).unwrap();
    let engine = broker.engine_pid();
    let folder = broker.kill_at_once();
    assert!(folder.path().join("b.sock").exists(), "a killed broker cleans nothing up");
    eventually("its engine is gone", || kill(engine, None).is_err().then_some(()));
    let next = Broker::start_in(folder, &[]);
    next.model(Route::Lane).embed(&["x"]).unwrap();
    let second = run_program(Some(&next.socket()), &["serve"], b"");
    assert_eq!(second.status.code(), Some(9), "{second:?}");
    next.stop();
}

#[test]
fn a_killed_broker_costs_its_clients_a_delay() {
    let folder = run_folder();
    let client = Client::builder()
        .socket(folder.path().join("b.sock"))
        .start_broker(StartBroker::IfNeeded)
        .broker_program(modelbroker())
        .connect()
        .unwrap();
    for route in [Route::Lane, Route::Socket] {
        let model = client.model_with(ModelRequest::new("").route(route)).unwrap();
        let expected = model.embed(&["before and after"]).unwrap();
        let texts: Vec<String> =
            (0..200).map(|n| format!("waiting text number {n} {}", "word ".repeat(100))).collect();
        let options = EmbedOptions::bulk().timeout(Duration::from_secs(100));
        let waiting = model.submit(&texts, &options).unwrap();
        let pid = client.status().unwrap().broker_pid;
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        assert_eq!(waiting.wait().unwrap().len(), 200, "no answer is lost");
        let after = model.embed(&["before and after"]).unwrap();
        assert!(after.values().iter().zip(expected.values()).all(|(a, b)| (a - b).abs() <= 2e-6));
        assert_ne!(client.status().unwrap().broker_pid, pid);
    }
    client.shutdown(Duration::from_secs(20)).unwrap();
}

#[test]
fn sigterm_while_busy_drains_and_leaves() {
    let broker = Broker::start(&[]);
    let model = broker.model(Route::Lane);
    model.embed(&["warm"]).unwrap();
    let texts: Vec<String> = (0..64).map(|n| format!("text {n} {}", "word ".repeat(60))).collect();
    let options = EmbedOptions::bulk().timeout(Duration::from_secs(100));
    let job = model.submit(&texts, &options).unwrap();
    let waiter = std::thread::spawn(move || job.wait().map(|e| e.len()));
    eventually("the engine is at work or done", || {
        broker.status().engines.first().filter(|e| e.totals.texts > 1 || e.totals.queued_jobs > 0).map(|_| ())
    });
    broker.stop();
    assert_eq!(waiter.join().unwrap().unwrap(), 64, "what was accepted is answered");
    drop(model);
}

#[test]
fn bad_models_and_bad_inputs_are_refused_by_name() {
    let broker = Broker::start(&[]);
    let folder = run_folder();
    let cases: [(&[&str], i32, &str); 5] = [
        (&["embed", "--model", "no-such-org/no-such-model", "x"], 4, "MODEL_NOT_FOUND"),
        (&["embed", "--model", folder.path().to_str().unwrap(), "x"], 4, "config.json"),
        (&["embed", "--input", "jsonl", "-"], 5, "line 1"),
        (&["search", "--store", "/nonexistent/store.db", "x"], 1, "no store"),
        (&["embed", "--format", "nonsense", "x"], 2, "possible values"),
    ];
    for (arguments, code, says) in cases {
        let output = broker.run(arguments, b"{\"no\": 1}\n");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    let long = "x".repeat(shm_layout::limits::MAX_TEXT_BYTES + 1);
    let output = broker.run(&["embed", "-"], long.as_bytes());
    assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(broker.run(&["embed", "-"], b"").status.code(), Some(5));
    assert!(broker.model(Route::Lane).embed(&["still fine"]).is_ok());
    broker.stop();
}

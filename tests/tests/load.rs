//! The load generator: what it counts, what it prints, how it ends.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use tests::census::children_of;
use tests::program::{modelbroker, workspace};
use tests::running::{Broker, assert_ok, eventually};

fn start_broker() -> Broker {
    let model = workspace().join("tests/parity/tiny/bert_mean");
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("storm-cache");
    let arguments =
        ["--model".into(), model.to_string_lossy(), "--cache-dir".into(), cache.to_string_lossy()]
            .map(String::from);
    Broker::start(&arguments.each_ref().map(String::as_str))
}

#[test]
fn texts_can_be_new_each_time_and_bulk_texts_longer() {
    let broker = start_broker();
    let common =
        ["load", "--json", "--duration", "0.5", "--threads", "2", "--bulk", "0.5", "--bulk-batch", "3"];
    let run = |extra: &[&str]| {
        let output = broker.run(&[&common[..], extra].concat(), b"");
        assert_ok(&output);
        serde_json::from_slice::<Value>(&output.stdout).expect("one JSON document")
    };
    let report =
        run(&["--no-repeat", "--histogram", "--tokens", "12", "--bulk-tokens", "24", "--route", "lane"]);
    assert_eq!((&report["settings"]["no_repeat"], &report["errors"]), (&true.into(), &0.into()));
    for class in ["interactive", "bulk"] {
        let class = &report[class];
        let pairs: Vec<(u64, u64)> = serde_json::from_value(class["latency_us"].clone()).expect("pairs");
        let count: u64 = pairs.iter().map(|(_, count)| count).sum();
        assert!(count > 0 && class["completed"] == count, "{class}");
    }
    let report = run(&["--verify", "--tokens", "6", "--bulk-tokens", "20"]);
    assert_eq!((&report["verified"], &report["max_abs_diff"]), (&true.into(), &0.0.into()));
    assert!(report["bulk"]["latency_us"].is_null(), "only when asked for");

    for (arguments, why) in [
        (["--no-repeat", "--tokens", "6"], "--tokens must be from 12"),
        (["--no-repeat", "--verify", "--json"], "cannot be used with"),
    ] {
        let output = broker.run(&[&["load"][..], &arguments].concat(), b"");
        assert!(String::from_utf8_lossy(&output.stderr).contains(why), "{arguments:?}: {output:?}");
    }
    broker.stop();
}

#[test]
fn every_figure_is_there_and_adds_up() {
    let broker = start_broker();
    for route in ["lane", "socket"] {
        let arguments = [
            "load",
            "--json",
            "--verify",
            "--route",
            route,
            "--tokens",
            "10",
            "--duration",
            "1",
            "--clients",
            "2",
            "--threads",
            "2",
            "--batch",
            "2",
            "--bulk",
            "0.5",
            "--bulk-batch",
            "5",
        ];
        let output = broker.run(&arguments, b"");
        assert_ok(&output);
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
        let number =
            |value: &Value| value.as_f64().unwrap_or_else(|| panic!("no number: {value} in {report:#}"));
        for name in
            ["lost", "wrong", "duplicated", "errors", "reconnects", "clients_killed", "clients_failed"]
        {
            assert_eq!(report[name], 0, "{name}");
        }
        let [all, interactive, bulk] = [&report, &report["interactive"], &report["bulk"]];
        for class in [all, interactive, bulk] {
            let quantiles =
                ["p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"].map(|name| number(&class[name]));
            assert!(quantiles[0] > 0.0 && quantiles.is_sorted(), "{quantiles:?}");
            assert!(number(&class["texts_per_s"]) > 0.0);
            assert!(number(&class["steady_texts_per_s"]) > 0.0);
        }
        for name in ["completed", "texts"] {
            assert_eq!(number(&all[name]), number(&interactive[name]) + number(&bulk[name]), "{name}");
        }
        assert_eq!(number(&interactive["texts"]), 2.0 * number(&interactive["completed"]));
        assert_eq!(number(&bulk["texts"]), 5.0 * number(&bulk["completed"]));
        assert_eq!(report["clients"].as_array().map(Vec::len), Some(2));
        // The promise is bit-identical vectors, in any batch.
        assert_eq!((&report["verified"], &report["max_abs_diff"]), (&true.into(), &0.0.into()));
    }
    broker.stop();
}

#[test]
fn wrong_settings_are_refused_by_name() {
    for (setting, value) in [("--clients", "0"), ("--bulk", "1.5"), ("--tokens", "1"), ("--timeout", "0")] {
        let output = tests::running::run_program(
            Some(Path::new("/nonexistent/b.sock")),
            &["load", setting, value],
            b"",
        );
        assert_eq!(output.status.code(), Some(2), "{setting}");
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains(setting), "{message}");
    }
}

#[test]
fn killed_clients_are_told_apart_and_an_interruption_gives_a_report() {
    let broker = start_broker();
    let load = Command::new(modelbroker())
        .arg("--socket")
        .arg(broker.socket())
        .args(["load", "--json", "--tokens", "10", "--duration", "600", "--clients", "2"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the load can be started");
    let at_work = |count| {
        let status = broker.status();
        status.sessions.iter().filter(|session| session.client_name == "load" && session.lanes > 0).count()
            == count
    };
    // The two clients and their parent, which holds the model for them.
    eventually("both clients hold a lane", || at_work(3).then_some(()));
    let client = children_of(load.id())[0];
    kill(Pid::from_raw(client.cast_signed()), Signal::SIGKILL).expect("it lives");
    eventually("the broker noticed", || at_work(2).then_some(()));
    kill(Pid::from_raw(load.id().cast_signed()), Signal::SIGINT).expect("it lives");
    let output = load.wait_with_output().expect("it ends");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    let expected = [("clients_killed", 1), ("clients_failed", 0), ("lost", 0), ("errors", 0)];
    for (name, value) in expected {
        assert_eq!(report[name], value, "{name}: {report:#}");
    }
    assert_eq!((&report["interrupted"], report["clients"].as_array().map(Vec::len)), (&true.into(), Some(1)));
    assert_eq!(output.status.code(), Some(7), "part of it is missing");
    eventually("no session of it is left", || at_work(0).then_some(()));
    broker.stop();
}

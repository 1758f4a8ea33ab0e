//! `status --json` against its published schema, with every part of it filled by real processes.

use serde_json::Value;
use tests::program::workspace;
use tests::running::{Broker, assert_ok, eventually, run_folder};
use tests::schema::problems;
use tests::tiny_model;
use worker_sdk::Route;

fn schema() -> Value {
    let text = std::fs::read_to_string(workspace().join("docs/status.schema.json"))
        .expect("the schema is in the tree");
    serde_json::from_str(&text).expect("the schema is JSON")
}

fn status(broker: &Broker) -> Value {
    let output = broker.run(&["status", "--json"], b"");
    assert_ok(&output);
    serde_json::from_slice(&output.stdout).expect("the status is JSON")
}

/// Everything that the schema allows an object to have is there, so that nothing in it is only promised.
fn assert_complete(schema: &Value, definition: &str, value: &Value) {
    let promised = schema["$defs"][definition]["properties"].as_object().expect("an object is defined");
    for name in promised.keys() {
        assert!(value.get(name).is_some(), "{definition} has no {name}: {value}");
    }
}

#[test]
fn the_status_is_what_its_schema_says() {
    let folder = run_folder();
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain name").to_owned();
    tiny_model::write(folder.path().join("a").as_path(), 1);
    tiny_model::write(folder.path().join("b").as_path(), 2);
    let (model, images) = (path("a"), path("cache"));
    let broker = Broker::start(&[
        "--model",
        &model,
        "--cache-dir",
        &images,
        "--cache-entries",
        "50",
        "--memory-budget",
        "1GiB",
        "--inspectable",
    ]);
    let schema = schema();
    assert_eq!(problems(&schema, &status(&broker)), Vec::<String>::new(), "before anything was asked for");
    let (lane, socket) = (broker.model(Route::Lane), broker.model(Route::Socket));
    lane.embed(&["one", "two"]).expect("embedded");
    socket.embed(&["one", "three"]).expect("embedded");
    let client = broker.client();
    client.model("/no/such/folder").expect_err("there is none");
    drop(client.model(&path("b")).expect("leased"));
    eventually("b is unloaded", || client.unload_model(&path("b"), Default::default()).ok());
    client.reload_model("", std::time::Duration::from_secs(60)).expect("reloaded");
    let report = status(&broker);
    assert_eq!(problems(&schema, &report), Vec::<String>::new(), "{report:#}");
    let asked = |model: &&Value| model["loads"] != 0 || model["state"] == "failed";
    let models: Vec<&Value> = report["models"].as_array().expect("a list").iter().filter(asked).collect();
    let states: Vec<&str> = models.iter().filter_map(|m| m["state"].as_str()).collect();
    assert_eq!(states, ["ready", "failed", "unloaded"]);
    let ready = models[0];
    for (definition, value) in [
        ("model", ready),
        ("image", &ready["image"]),
        ("cache", &ready["cache"]),
        ("generation", &ready["generations"][0]),
        ("reference", &ready["references"][0]),
        ("last_error", &models[1]["last_error"]),
        ("engine", &report["engines"][0]),
        ("session", &report["sessions"][0]),
        ("metrics", &report["metrics"]),
        ("memory", &report["metrics"]["memory"]),
        ("durations", &report["metrics"]["load"]),
        ("level", &report["metrics"]["leases"]),
    ] {
        assert_complete(&schema, definition, value);
    }
    // What other model managers say of a model.
    assert_eq!(ready["is_loaded"], true);
    assert_eq!(ready["model_name"], ready["id"]);
    assert!(ready["load_time"].as_f64().is_some_and(|seconds| seconds > 0.0 && seconds < 60.0), "{ready}");
    assert!(ready["memory_usage"].as_u64() >= ready["image"]["image_bytes"].as_u64());
    assert_eq!((&ready["device"], &ready["error_message"]), (&Value::from("cpu"), &Value::Null));
    assert_eq!(models[1]["is_loaded"], false);
    assert!(
        models[1]["error_message"].as_str().is_some_and(|why| why.contains("MODEL_INVALID")),
        "{}",
        models[1]
    );
    let metrics = &report["metrics"];
    assert_eq!((&metrics["loads"], &metrics["reloads"]), (&Value::from(3), &Value::from(1)));
    assert!(
        metrics["execution"]["count"].as_u64() >= Some(2) && metrics["access"]["count"].as_u64() >= Some(3)
    );
    assert!(metrics["errors"]["MODEL_INVALID"].as_u64() >= Some(1));
    let memory = &metrics["memory"];
    for name in [
        "available_bytes",
        "broker_pss_bytes",
        "engine_pss_bytes",
        "sessions_pss_bytes",
        "image_bytes",
        "budget_bytes",
    ] {
        assert!(memory[name].as_u64() > Some(0), "{name}: {memory}");
    }
    drop((lane, socket));
    broker.stop();
}

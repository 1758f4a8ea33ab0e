//! Every example of the SDK, run as it is with a broker of its own: what the documents tell people to try works.

use std::path::PathBuf;
use std::process::{Command, Output};
use tests::program::{modelbroker, workspace};
use tests::running::{Broker, assert_ok, run_folder};

/// What each example says when it works.
const EXAMPLES: [(&str, &str); 6] = [
    ("embed", "dimensions, fingerprint"),
    ("threads", "800 vectors in"),
    ("async", "list 3: 50 vectors"),
    ("attach", "bit for bit the same as the engine's: true"),
    ("fallback", "2 vectors of 32 dimensions from the shared model"),
    ("call", "en\t"),
];
/// Examples that run until they are stopped: the first is what `call` asks, and both are tested with the providers.
const PROVIDERS: [&str; 2] = ["provide_language", "provide_similarity"];

/// The built example; built now where `cargo test --workspace` has not.
fn example(name: &str) -> PathBuf {
    let folder = modelbroker().parent().expect("a program lies in a folder").join("examples");
    let path = folder.join(name);
    if !path.exists() {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(workspace()).args([
            "build",
            "--quiet",
            "--workspace",
            "--examples",
            "--target-dir",
        ]);
        cargo.arg(folder.ancestors().nth(2).expect("a profile lies in a target folder"));
        if folder.ancestors().nth(1).and_then(|f| f.file_name()).is_some_and(|name| name == "release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().expect("cargo can be run").success(), "building the examples failed");
    }
    path
}

fn tiny_model() -> PathBuf {
    workspace().join("tests/parity/tiny/bert_mean")
}

fn cache() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("examples-cache")
}

fn run(name: &str, socket: PathBuf, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(example(name));
    command.env("MODELBROKER_SOCKET", socket).env("MODELBROKER_START", "never");
    command.env("MODELBROKER_MODEL", tiny_model()).env("MODELBROKER_CACHE_DIR", cache());
    command.envs(variables.iter().copied()).output().expect("an example can be run")
}

#[test]
fn every_example_works() {
    let folder = workspace().join("worker-sdk/examples");
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .expect("the examples are there")
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    let mut known: Vec<&str> = EXAMPLES.iter().map(|(name, _)| *name).chain(PROVIDERS).collect();
    known.sort_unstable();
    assert_eq!(names, known, "each example has its line here");
    let (model, cache) = (tiny_model(), cache());
    let provider = format!("custom/language={}", example("provide_language").display());
    let broker = Broker::start(&[
        "--model",
        &model.to_string_lossy(),
        "--cache-dir",
        &cache.to_string_lossy(),
        "--provider",
        &provider,
    ]);
    for (name, says) in EXAMPLES {
        let output = run(name, broker.socket(), &[]);
        assert_ok(&output);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(says), "{name} said: {said}");
    }
    broker.stop();
}

#[test]
fn one_switch_leads_back_to_a_model_of_ones_own() {
    let folder = run_folder();
    let socket = folder.path().join("b.sock");
    let says = "2 vectors of 32 dimensions from a model of this process";
    for variables in [
        &[][..],
        &[("MODELBROKER_SHARING_ENABLED", "false")],
        &[("CORE_MODEL_MANAGER_SHARING_ENABLED", "0")],
        &[("MODELBROKER_SHARING_ROLLOUT_PERCENT", "0")],
        &[("CORE_MODEL_MANAGER_SHARING_ROLLOUT_PERCENT", "0")],
    ] {
        let output = run("fallback", socket.clone(), variables);
        assert_ok(&output);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(says), "{variables:?}: {said}");
        assert!(!socket.exists(), "{variables:?} started a broker");
    }
    // An example that knows no fallback uses the switch all the same, and fails without it.
    assert_ok(&run("embed", socket.clone(), &[("MODELBROKER_SHARING_ENABLED", "false")]));
    assert!(!run("embed", socket.clone(), &[]).status.success());
    assert_ok(&run("embed", socket.clone(), &[("MODELBROKER_FALLBACK", "local")]));
    for (variable, value) in [
        ("MODELBROKER_SHARING_ENABLED", "maybe"),
        ("MODELBROKER_SHARING_ROLLOUT_PERCENT", "101"),
        ("MODELBROKER_FALLBACK", "x"),
    ] {
        let output = run("embed", socket.clone(), &[(variable, value)]);
        assert!(!output.status.success(), "{variable}={value} was accepted");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(error.contains(variable) && error.contains(value), "{error}");
    }
}

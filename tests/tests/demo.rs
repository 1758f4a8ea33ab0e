//! The demo, on the tiny model: its figures are there, and however it ends nothing is left.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;
use tests::census::{children_of, is_gone};
use tests::program::{modelbroker, workspace};
use tests::running::{assert_ok, eventually, run_folder};

/// A demo whose temporary files go into `temp`.
fn demo(temp: &TempDir, corpus: &Path) -> Command {
    let mut command = Command::new(modelbroker());
    command.args(["demo", "--json", "--workers", "2", "--model"]);
    command.arg(workspace().join("tests/parity/tiny/bert_mean")).arg("--corpus").arg(corpus);
    command.env("TMPDIR", temp.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env("MODELBROKER_CACHE_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("storm-cache"));
    command
}

fn corpus(count: usize) -> TempDir {
    let folder = run_folder();
    for number in 0..count {
        let text = format!("# Document {number}\n\nthe cat sat on mat {number}.\n");
        std::fs::write(folder.path().join(format!("{number}.md")), text).expect("room for a document");
    }
    folder
}

fn left_in(folder: &TempDir) -> usize {
    std::fs::read_dir(folder.path()).expect("the folder is there").count()
}

#[test]
fn figures_of_all_ways_are_there_and_nothing_is_left() {
    let (temp, corpus) = (run_folder(), corpus(5));
    let output = demo(&temp, corpus.path()).output().expect("the demo can be run");
    assert_ok(&output);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON document");
    // The image is whole pages long in memory, which shows with one as small as this.
    let pages = report["image_bytes"].as_f64().expect("a number").div_euclid(4096.0) + 1.0;
    let most = pages * 4096.0 / report["image_bytes"].as_f64().expect("a number") + 0.001;
    for copies in [&report["weights_copies"], &report["attached"]["weights_copies"]] {
        let copies = copies.as_f64().expect("a number");
        assert!((1.0..=most).contains(&copies), "{report:#}");
    }
    assert_eq!(report["private"]["weights_copies"], 2.0, "{report:#}");
    let workers = |value: &Value| value["workers"].as_array().cloned().unwrap_or_default();
    for worker in workers(&report).iter().chain(&workers(&report["attached"])) {
        assert!(
            worker["private_mb"].as_f64() > Some(0.0) && worker["attach_us"].as_u64() > Some(0),
            "{report:#}"
        );
    }
    assert!(workers(&report).iter().all(|worker| worker["private_mb"].as_f64() <= Some(4.0)), "{report:#}");
    assert_eq!([workers(&report).len(), workers(&report["private"]).len()], [2, 2]);
    assert!(workers(&report["private"]).iter().all(|worker| worker["load_ms"].as_f64() > Some(0.0)));
    assert_eq!((&report["documents"]["indexed"], &report["documents"]["failed"]), (&5.into(), &0.into()));
    assert_eq!((&report["vectors_agree"], &report["questions"]), (&true.into(), &Value::Array(vec![])));
    assert_eq!(left_in(&temp), 0);
}

#[test]
fn interrupted_at_any_stage_it_leaves_nothing() {
    for stage in ["starting a broker", "getting the model", "indexing", "counting memory"] {
        let (temp, corpus) = (run_folder(), corpus(40));
        let mut child = demo(&temp, corpus.path()).spawn().expect("the demo can be started");
        let pid = Pid::from_raw(child.id().cast_signed());
        let stderr = child.stderr.take().expect("stderr is piped");
        let mut family = Vec::new();
        let mut interrupted = false;
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            if line.contains(stage) && !interrupted {
                interrupted = true;
                family = children_of(child.id());
                kill(pid, Signal::SIGINT).expect("it lives");
            }
        }
        assert!(interrupted, "{stage} never came");
        let status = child.wait().expect("a child can be waited for");
        // Told right at its end it may have been done all the same.
        assert!(matches!(status.code(), Some(0 | 1)), "{stage}: {status}");
        assert_eq!(left_in(&temp), 0, "{stage}");
        eventually("its processes are gone", || family.iter().all(|pid| is_gone(*pid)).then_some(()));
    }
}

#[test]
fn killed_it_takes_its_processes_with_it() {
    let (temp, corpus) = (run_folder(), corpus(40));
    let mut child = demo(&temp, corpus.path()).spawn().expect("the demo can be started");
    let stderr = child.stderr.take().expect("stderr is piped");
    let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("indexing")));
    let mut family = children_of(child.id());
    family.extend(family.clone().into_iter().flat_map(children_of));
    assert!(family.len() >= 2, "a broker and its engine: {family:?}");
    child.kill().expect("it lives");
    child.wait().expect("a child can be waited for");
    eventually("its processes are gone", || family.iter().all(|pid| is_gone(*pid)).then_some(()));
}

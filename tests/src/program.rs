//! Where the program under test is; builds it when it is missing or older than its sources.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

/// The workspace's root.
#[must_use]
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Path of the `modelbroker` program in the profile that this test was built in.
///
/// # Panics
/// When it cannot be built.
pub fn modelbroker() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        // target/PROFILE/deps/TEST-HASH
        let test = std::env::current_exe().expect("the test has a path");
        let profile_folder =
            test.parent().and_then(Path::parent).expect("a test lies in target/PROFILE/deps");
        let program = profile_folder.join("modelbroker");
        if !is_fresh(&program) {
            build(profile_folder);
        }
        program
    })
}

/// `cargo test --workspace` builds the program beside the tests, since `cli` has integration tests of its own; a lone
/// `cargo test -p tests` does not.
fn build(profile_folder: &Path) {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args(["build", "--quiet", "-p", "cli", "--bin", "modelbroker"]);
    cargo.arg("--target-dir").arg(profile_folder.parent().expect("a profile lies in a target folder"));
    if profile_folder.file_name().is_some_and(|name| name == "release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "building modelbroker failed");
}

/// Path of a program of `worker-sdk/examples`, built in the profile that this test was built in.
///
/// # Panics
/// When it cannot be built.
#[must_use]
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let profile_folder = test.parent().and_then(Path::parent).expect("a test lies in target/PROFILE/deps");
    // As a workspace: alone it would have other features, and everything below it be built once more. Says nothing and
    // takes no time when `cargo test --workspace` has built it.
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args(["build", "--quiet", "--workspace", "--example", name]);
    cargo.arg("--target-dir").arg(profile_folder.parent().expect("a profile lies in a target folder"));
    if profile_folder.file_name().is_some_and(|name| name == "release") {
        cargo.arg("--release");
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "building the example {name} failed");
    profile_folder.join("examples").join(name)
}

fn is_fresh(program: &Path) -> bool {
    let Ok(built) = program.metadata().and_then(|m| m.modified()) else { return false };
    let crates = [
        "shm-layout",
        "shm-os",
        "engine",
        "engine-host",
        "model-source",
        "model-loader",
        "worker-sdk",
        "broker",
        "doc-pipeline",
        "settings",
        "cli",
    ];
    crates.iter().all(|name| newest(&workspace().join(name).join("src")) <= built)
}

fn newest(folder: &Path) -> SystemTime {
    let Ok(entries) = std::fs::read_dir(folder) else { return SystemTime::UNIX_EPOCH };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(state) if state.is_dir() => newest(&entry.path()),
            Ok(state) => state.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            Err(_) => SystemTime::UNIX_EPOCH,
        })
        .max()
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

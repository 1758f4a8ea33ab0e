//! A really full disk: the test runs itself again in a mount namespace of its own, with a cache on a tiny tmpfs.

mod support;

use model_source::{ModelRef, NoProgress, SourceError, resolve};
use std::path::Path;
use std::process::Command;
use support::*;

const CACHE_VARIABLE: &str = "MODEL_SOURCE_TEST_TINY_DISK";

#[test]
fn a_full_disk_is_its_own_error_and_leaves_nothing() {
    if let Some(cache) = std::env::var_os(CACHE_VARIABLE) {
        return on_tiny_disk(Path::new(&cache));
    }
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=64k none \"$1\" || exit 77; exec \"$2\" --exact \"$3\"";
    let status = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .arg("a_full_disk_is_its_own_error_and_leaves_nothing")
        .env(CACHE_VARIABLE, dir.path())
        .status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => {}
        // No user namespaces on this machine: the mapping of the error is covered by a unit test.
        Ok(Some(1 | 77)) if !can_mount(dir.path()) => eprintln!("skipped: no mount namespace here"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => eprintln!("skipped: no unshare"),
        other => panic!("{other:?}"),
    }
}

fn can_mount(dir: &Path) -> bool {
    let script = "mount -t tmpfs -o size=64k none \"$1\"";
    Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .arg(dir)
        .status()
        .is_ok_and(|status| status.success())
}

fn on_tiny_disk(cache: &Path) {
    let files = model_files();
    let hub = Server::start(move |request| plain_hub(&files, request));
    let result = resolve(&ModelRef::parse("org/name").unwrap(), &options(cache, &hub.url()), &mut NoProgress);
    let error = result.unwrap_err();
    assert!(matches!(error, SourceError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("MODELBROKER_CACHE_DIR"));
    assert_nothing_left(cache);
}

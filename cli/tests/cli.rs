//! The command line by itself: help, versions, arguments that contradict each other, commands without a broker. What
//! needs a broker is tested in the `tests` package.

use std::process::{Command, Output};

fn modelbroker(arguments: &[&str]) -> Output {
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    let folder = tempfile::Builder::new().permissions(private).tempdir().unwrap();
    Command::new(env!("CARGO_BIN_EXE_modelbroker"))
        .args(arguments)
        .env("MODELBROKER_SOCKET", folder.path().join("b.sock"))
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn help_names_every_command_and_hides_the_children() {
    let output = modelbroker(&["--help"]);
    assert!(output.status.success());
    let help = text(&output.stdout);
    for command in ["serve", "stop", "status", "models", "embed", "index", "search", "load", "doctor", "demo"]
    {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is missing:\n{help}");
    }
    for child in ["index-document", "load-model", "engine"] {
        assert!(!help.contains(&format!("\n  {child} ")), "{child} is shown");
    }
    assert!(help.contains("Exit codes"));
}

#[test]
fn questions_to_no_broker_say_so_and_start_none() {
    for command in [&["status"][..], &["status", "--json"], &["models"], &["stop"]] {
        let output = modelbroker(command);
        assert_eq!(output.status.code(), Some(3), "{command:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("no broker is running"), "{}", text(&output.stderr));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn bad_arguments_end_with_2() {
    for arguments in [&["embed", "--format", "x"][..], &["index"], &["nonsense"], &["search", "q"]] {
        assert_eq!(modelbroker(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_socket_path_that_is_too_long_is_refused_with_the_fix() {
    let path = format!("/tmp/{}/b.sock", "x".repeat(120));
    let output = modelbroker(&["--socket", &path, "serve"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("choose a shorter one"), "{}", text(&output.stderr));
}

#[test]
fn a_run_folder_that_others_may_enter_is_refused_with_the_fix() {
    let folder = tempfile::tempdir().unwrap();
    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let socket = open.join("b.sock");
    let output = modelbroker(&["--socket", socket.to_str().unwrap(), "serve"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("chmod 700"), "{}", text(&output.stderr));
}

#[test]
fn children_that_nobody_started_say_so() {
    let output = modelbroker(&["engine", "--link-fd", "9"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("descriptor 9"), "{}", text(&output.stderr));
}

#[test]
fn the_doctor_finds_this_machine_fit() {
    let output = modelbroker(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], true, "{report:#}");
    assert!(report["checks"].as_array().unwrap().len() >= 8);
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn empty_environment_variables_count_as_unset_and_bad_ones_are_named() {
    let path = format!("/tmp/{}/b.sock", "x".repeat(120));
    let with = |name: &str, value: &str| {
        Command::new(env!("CARGO_BIN_EXE_modelbroker"))
            .args(["--socket", &path, "serve"])
            .env(name, value)
            .output()
            .unwrap()
    };
    for name in ["MODELBROKER_CACHE_ENTRIES", "MODELBROKER_CACHE_TTL", "MODELBROKER_PRECISION"] {
        // The arguments are fine, so it is the path that is refused.
        let output = with(name, "");
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output.stderr));
        let output = with(name, "nonsense");
        assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(name), "{name}: {}", text(&output.stderr));
    }
}

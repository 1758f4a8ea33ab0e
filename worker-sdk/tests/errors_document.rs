//! Keeps docs/errors.md true: its tables are made from the map of failures. `BLESS=1 cargo test -p worker-sdk --test
//! errors_document` writes them anew.

use std::fmt::Write as _;
use std::time::Duration;
use worker_sdk::{Code, ErrorCode, SdkError, row_of_code, row_of_error};

fn codes() -> String {
    let mut out = String::from("| reason | code | HTTP | exit |\n|---|---|---:|---:|\n");
    for code in Code::ALL.iter().filter(|code| **code != Code::Ok) {
        let row = row_of_code(*code);
        let (name, status, exit) = (row.code.name(), row.http_status, row.exit_code);
        let _ = writeln!(out, "| `{}` | `{name}` | {status} | {exit} |", code.name());
    }
    out
}

/// One of each failure that is the SDK's own.
fn own_failures() -> Vec<SdkError> {
    let text = String::new;
    vec![
        SdkError::NoBroker { socket: "/".into(), reason: text() },
        SdkError::StartFailed { program: "/".into(), reason: text(), log_tail: text() },
        SdkError::Connect(text()),
        SdkError::Disconnected { reason: text(), waited: Duration::ZERO },
        SdkError::SharingOff { reason: text() },
        SdkError::WouldBlock,
        SdkError::Argument(text()),
        SdkError::Fault { peer: "the broker", what: text() },
        SdkError::ModelChanged { model: text() },
        SdkError::Forked,
        SdkError::Os(text()),
        SdkError::Local("".into()),
    ]
}

fn failures() -> String {
    let mut out = String::from("| reason | code | HTTP | exit |\n|---|---|---:|---:|\n");
    for error in own_failures() {
        let row = row_of_error(&error);
        let (name, status, exit) = (row.code.name(), row.http_status, row.exit_code);
        let _ = writeln!(out, "| `{}` | `{name}` | {status} | {exit} |", error.code());
    }
    out
}

#[test]
fn the_document_is_the_map() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    let before = std::fs::read_to_string(&path).unwrap();
    let mut text = before.clone();
    for (name, content) in [("codes", codes()), ("failures", failures())] {
        let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
        let from = text.find(&begin).unwrap_or_else(|| panic!("no part {name}")) + begin.len();
        let to = from + text[from..].find(&end).unwrap_or_else(|| panic!("part {name} has no end"));
        text.replace_range(from..to, &format!("\n{content}\n"));
    }
    if text != before {
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, &text).unwrap();
        } else {
            panic!("docs/errors.md is not what the map says: run with BLESS=1");
        }
    }
    for code in ErrorCode::ALL {
        assert!(text.contains(&format!("`{}`", code.name())), "docs/errors.md does not name {}", code.name());
    }
}

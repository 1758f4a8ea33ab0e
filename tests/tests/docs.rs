//! Holds the written documents to the tree: links lead somewhere, named files and tests exist, exit codes and environment
//! variables are those of the code. Parts that are made from code are checked by `shm-layout/tests/docs.rs`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace").to_path_buf()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every Markdown document: its path from the root, and its text.
fn documents() -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
        .iter()
        .map(|path| ((*path).to_owned(), read(path)))
        .collect();
    for entry in std::fs::read_dir(root().join("docs")).expect("docs are there") {
        let name = entry.expect("docs can be read").file_name().to_string_lossy().into_owned();
        if name.ends_with(".md") {
            let path = format!("docs/{name}");
            let text = read(&path);
            found.push((path, text));
        }
    }
    assert!(found.len() >= 9, "documents are missing: {found:?}");
    found
}

/// Anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings =
        text.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    headings
        .map(|heading| {
            let kept = heading
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                .collect();
            let kept: String = kept;
            kept.replace(' ', "-")
        })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    for (path, text) in documents() {
        let folder = root().join(&path).parent().expect("a file lies in a folder").to_path_buf();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { root().join(&path) } else { folder.join(file) };
            assert!(target.exists(), "{path} links to {link}, which is not there");
            if !anchor.is_empty() {
                let there = std::fs::read_to_string(&target).expect("a linked document is text");
                assert!(anchors(&there).contains(anchor), "{path} links to {link}: no such heading");
            }
        }
    }
}

#[test]
fn files_that_are_named_exist() {
    for (path, text) in documents() {
        for named in text.split('`').skip(1).step_by(2) {
            let looks_like_a_path = named.contains('/')
                && [".rs", ".md", ".toml"].iter().any(|end| named.ends_with(end))
                && !named.contains([' ', '*', '$', '<', '…']);
            if looks_like_a_path && !named.starts_with(['/', '~']) {
                let exists = root().join(named).exists() || root().join("docs").join(named).exists();
                assert!(exists, "{path} names {named}, which is not there");
            }
        }
    }
}

#[test]
fn tests_that_hold_the_absences_exist() {
    let architecture = read("docs/architecture.md");
    let (_, absences) = architecture.split_once("## Stated absences").expect("the section is there");
    let (absences, _) = absences.split_once("\n## ").expect("another section follows");
    let tests: String = [
        "tests/tests/structure.rs",
        "tests/tests/lifecycle_models.rs",
        "shm-os/tests/processes.rs",
        "broker/tests/broker/lifecycle.rs",
    ]
    .iter()
    .map(|path| read(path))
    .collect();
    let mut count = 0;
    for name in absences.split('`').skip(1).step_by(2) {
        let name = name.trim_end_matches('…');
        if name.matches('_').count() >= 3 && name.chars().all(|c| c.is_ascii_lowercase() || c == '_') {
            assert!(tests.contains(&format!("fn {name}")), "no test {name}");
            count += 1;
        }
    }
    assert!(count >= 8, "only {count} tests are named");
}

#[test]
fn quick_start_is_two_commands() {
    let readme = read("README.md");
    let (_, start) = readme.split_once("## Quick start").expect("the section is there");
    let (start, _) = start.split_once("\n## ").expect("another section follows");
    let commands: Vec<&str> = start
        .split("```sh\n")
        .skip(1)
        .flat_map(|rest| rest.split("```").next().unwrap_or_default().lines())
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(commands, ["cargo run --release -- demo", "cargo test --workspace"]);
}

#[test]
fn exit_codes_are_those_of_the_program() {
    let code = read("cli/src/failure.rs");
    let (_, body) = code.split_once("enum Exit {").expect("the enum is there");
    let (body, _) = body.split_once("\n}").expect("the enum ends");
    let mut in_code: BTreeSet<u8> = body
        .lines()
        .filter_map(|line| line.split_once(" = ")?.1.trim_end_matches(',').parse().ok())
        .collect();
    in_code.insert(0);
    let operations = read("docs/operations.md");
    let (_, table) = operations.split_once("## Exit codes").expect("the section is there");
    let (table, _) = table.split_once("\n## ").expect("another section follows");
    let written: BTreeSet<u8> =
        table.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next()?.parse().ok()).collect();
    assert_eq!(written, in_code);
}

/// Rust sources of a crate's `src` folder, in one string.
fn code_of(folder: &Path, out: &mut String) {
    for entry in std::fs::read_dir(folder).expect("the tree can be read") {
        let path = entry.expect("the tree can be read").path();
        if path.is_dir() {
            code_of(&path, out);
        } else if path.extension().is_some_and(|end| end == "rs") {
            out.push_str(&std::fs::read_to_string(&path).expect("source is UTF-8"));
        }
    }
}

#[test]
fn environment_variables_are_those_of_the_code() {
    let mut code = String::new();
    for package in [
        "broker",
        "cli",
        "doc-pipeline",
        "engine",
        "engine-host",
        "model-loader",
        "model-source",
        "shm-os",
        "worker-sdk",
    ] {
        code_of(&root().join(package).join("src"), &mut code);
    }
    for file in ["table.rs", "file.rs", "environment.rs"] {
        // Tests there name variables that there are not.
        let text = read(&format!("settings/src/{file}"));
        code.push_str(text.split("#[cfg(test)]").next().unwrap_or_default());
    }
    let operations = read("docs/operations.md");
    let variable = |text: &str| {
        text.starts_with("MODELBROKER_")
            && !text.ends_with('_')
            && text.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    // Between quotes in the code: what is really asked for.
    let in_code: BTreeSet<&str> = code.split('"').filter(|text| variable(text)).collect();
    let written: BTreeSet<&str> = operations
        .split(|c: char| !c.is_ascii_uppercase() && c != '_')
        .filter(|text| variable(text))
        .collect();
    // Between the pipeline and its own subprocesses; nobody sets it by hand.
    let private = BTreeSet::from(["MODELBROKER_SUPERVISOR_PID"]);
    for name in &in_code {
        let sources = settings::Sources {
            environment: vec![((*name).into(), "x".into())],
            ..settings::Sources::default()
        };
        let said = settings::resolve(&sources).err().map(|problems| problems.to_string()).unwrap_or_default();
        assert!(
            !said.contains("stands for no setting"),
            "settings::OTHER_VARIABLES must name {name}: {said}"
        );
    }
    let missing: Vec<_> = in_code.difference(&written).filter(|name| !private.contains(**name)).collect();
    assert!(missing.is_empty(), "docs/operations.md does not name {missing:?}");
    let invented: Vec<_> = written.difference(&in_code).collect();
    assert!(invented.is_empty(), "docs/operations.md names {invented:?}, which the code does not ask for");
}

#[test]
fn dependencies_are_all_explained() {
    let workspace = read("Cargo.toml");
    let (_, list) = workspace.split_once("[workspace.dependencies]").expect("the section is there");
    let (list, _) = list.split_once("\n[").expect("another section follows");
    let explained = read("docs/dependencies.md");
    let mut manifests = String::new();
    for entry in std::fs::read_dir(root()).expect("the tree can be read") {
        let manifest = entry.expect("the tree can be read").path().join("Cargo.toml");
        manifests.push_str(&std::fs::read_to_string(manifest).unwrap_or_default());
    }
    for line in list.lines().filter(|line| line.contains(" = ") && !line.contains("path = ")) {
        let name = line.split(" = ").next().unwrap_or_default();
        let used = [".workspace = true", " = { workspace = true"];
        assert!(
            used.iter().any(|how| manifests.contains(&format!("\n{name}{how}"))),
            "no package uses {name}: take it out of Cargo.toml"
        );
        assert!(explained.contains(&format!("`{name}`")), "docs/dependencies.md does not explain {name}");
    }
}

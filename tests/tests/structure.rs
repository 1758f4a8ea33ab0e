//! The stated absences of docs/architecture.md: who links what, where `unsafe` and bincode may be, and the shape of the
//! source files. Reads the tree and asks cargo; starts no process of ours.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package lies in the workspace").to_path_buf()
}

/// Every package that `package` with its default features is linked with, on this platform, itself included.
fn linked_with(package: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root())
        .args(["tree", "-p", package, "-e", "normal,build", "--prefix", "none", "--format", "{p}"])
        .args(["--offline", "--locked"])
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names are UTF-8");
    let names: BTreeSet<String> =
        text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect();
    assert!(names.contains(package), "cargo tree says nothing of {package}");
    names
}

const COMPUTE: &[&str] = &[
    "engine",
    "engine-host",
    "model-loader",
    "candle-core",
    "candle-nn",
    "candle-transformers",
    "gemm",
    "tokenizers",
    "onig",
    "safetensors",
    "rayon",
];
const HTTP: &[&str] = &[
    "hyper",
    "ureq",
    "reqwest",
    "axum",
    "h2",
    "http",
    "httparse",
    "tiny_http",
    "actix-web",
    "rustls",
    "native-tls",
    "openssl",
    "tokio",
];
const FORMATS: &[&str] = &["serde_json", "settings", "toml", "zip", "flate2", "rusqlite", "model-source"];

fn assert_absent(package: &str, lists: &[&[&str]]) {
    let linked = linked_with(package);
    let found: Vec<&&str> =
        lists.iter().flat_map(|list| list.iter()).filter(|name| linked.contains(**name)).collect();
    assert!(found.is_empty(), "{package} must not be linked with {found:?}");
}

#[test]
fn the_broker_links_no_compute_no_tokenizer_no_http_and_no_parser_of_foreign_files() {
    assert_absent("broker", &[COMPUTE, HTTP, FORMATS, &["worker-sdk", "doc-pipeline"]]);
}

#[test]
fn a_thin_worker_links_no_compute_no_tokenizer_no_http_and_no_json() {
    assert_absent("worker-sdk", &[COMPUTE, HTTP, FORMATS, &["broker", "doc-pipeline"]]);
    let count = linked_with("worker-sdk").len();
    assert!(count <= 60, "a thin worker has {count} packages behind it");
}

#[test]
fn the_document_pipeline_is_an_ordinary_thin_worker() {
    assert_absent("doc-pipeline", &[COMPUTE, HTTP, &["broker", "model-source", "zip"]]);
}

#[test]
fn layouts_know_no_operating_system() {
    assert_absent(
        "shm-layout",
        &[COMPUTE, HTTP, FORMATS, &["libc", "nix", "shm-os", "memmap2", "shared_memory"]],
    );
}

#[test]
fn the_engine_knows_no_socket_and_the_children_know_no_broker() {
    assert_absent("engine", &[HTTP, &["shm-os", "broker", "worker-sdk", "interprocess"]]);
    assert_absent("engine-host", &[HTTP, &["broker", "worker-sdk", "model-source"]]);
    assert_absent("model-loader", &[&["broker", "worker-sdk", "engine-host"]]);
}

/// A source file: its path from the root, and its text.
struct Source {
    path: String,
    text: String,
}

/// Rust files of all packages, without what is generated or downloaded.
fn sources() -> Vec<Source> {
    fn collect(folder: &Path, root: &Path, found: &mut Vec<Source>) {
        for entry in std::fs::read_dir(folder).expect("the tree can be read") {
            let path = entry.expect("the tree can be read").path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" && name != "corpus" {
                    collect(&path, root, found);
                }
            } else if name.ends_with(".rs") {
                let relative = path.strip_prefix(root).expect("it lies below").to_string_lossy().into_owned();
                found.push(Source {
                    path: relative,
                    text: std::fs::read_to_string(&path).expect("source is UTF-8"),
                });
            }
        }
    }
    let mut found = Vec::new();
    collect(&root(), &root(), &mut found);
    assert!(found.len() > 100, "only {} source files were found", found.len());
    found
}

/// The text without comments, strings and character literals, so that a word found is code.
fn code_only(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = String::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        if rest.starts_with(b"//") {
            at += rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len());
        } else if rest.starts_with(b"/*") {
            at += rest.windows(2).position(|pair| pair == b"*/").map_or(rest.len(), |end| end + 2);
        } else if let Some(hashes) = raw_string(rest) {
            let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
            let open = rest.iter().position(|byte| *byte == b'"').unwrap_or(0) + 1;
            let end = rest[open..].windows(close.len()).position(|part| part == close);
            at += end.map_or(rest.len(), |end| open + end + close.len());
        } else if rest[0] == b'"' {
            let mut end = 1;
            while end < rest.len() && rest[end] != b'"' {
                end += if rest[end] == b'\\' { 2 } else { 1 };
            }
            at += end + 1;
        } else if rest[0] == b'\'' && (rest.get(1) == Some(&b'\\') || rest.get(2) == Some(&b'\'')) {
            let skip = if rest.get(1) == Some(&b'\\') { 3 } else { 2 };
            at += rest[skip.min(rest.len())..]
                .iter()
                .position(|byte| *byte == b'\'')
                .map_or(1, |end| skip + end + 1);
        } else {
            out.push(if rest[0].is_ascii() { rest[0] as char } else { ' ' });
            at += 1;
        }
    }
    out
}

/// Number of `#` of a raw string that begins here.
fn raw_string(rest: &[u8]) -> Option<usize> {
    let rest = rest.strip_prefix(b"b").unwrap_or(rest).strip_prefix(b"r")?;
    let hashes = rest.iter().take_while(|byte| **byte == b'#').count();
    (rest.get(hashes) == Some(&b'"')).then_some(hashes)
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
}

fn in_tests(path: &str) -> bool {
    path.split('/').any(|part| matches!(part, "tests" | "tests.rs" | "benches" | "examples" | "fuzz"))
}

#[test]
fn crates_that_need_no_unsafe_code_forbid_it() {
    for path in [
        "broker/src/lib.rs",
        "doc-pipeline/src/lib.rs",
        "cli/src/main.rs",
        "engine-host/src/lib.rs",
        "model-loader/src/lib.rs",
        "model-source/src/lib.rs",
        "settings/src/lib.rs",
        "worker-sdk/src/lib.rs",
    ] {
        let text = std::fs::read_to_string(root().join(path)).expect(path);
        assert!(text.lines().any(|line| line == "#![forbid(unsafe_code)]"), "{path} must forbid unsafe code");
    }
}

#[test]
fn unsafe_code_lives_in_three_places_and_says_why() {
    for source in sources() {
        let uses = words(&code_only(&source.text)).any(|word| word == "unsafe");
        if !uses || in_tests(&source.path) {
            continue;
        }
        let allowed = ["shm-layout/src/", "shm-os/src/", "engine/src/kernel/"];
        assert!(
            allowed.iter().any(|place| source.path.starts_with(place)),
            "{} has unsafe code",
            source.path
        );
        let reasons = source.text.contains("// SAFETY:") || source.text.contains("# Safety");
        assert!(reasons, "{} does not argue its unsafe code", source.path);
    }
}

#[test]
fn bincode_is_behind_one_codec() {
    let allowed = [
        "shm-layout/src/wire.rs",
        "shm-layout/src/wire/codec.rs",
        "shm-layout/src/wire/messages.rs",
        "shm-layout/src/code.rs",
    ];
    for source in sources() {
        let uses = words(&code_only(&source.text)).any(|word| word == "bincode");
        assert!(!uses || allowed.contains(&source.path.as_str()), "{} uses bincode", source.path);
    }
}

#[test]
fn every_file_says_what_lives_in_it_and_stays_short() {
    for source in sources() {
        assert!(source.text.starts_with("//!"), "{} does not open with a //! line", source.path);
        let own = source.text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let lines = own.lines().count();
        assert!(in_tests(&source.path) || lines <= 600, "{} has {lines} lines: look for a seam", source.path);
    }
}

#[test]
fn nothing_names_the_machine_that_it_was_written_on() {
    // Put together here, so that this file does not name them either. Paths below /home are test data.
    let mut machine: Vec<String> = ["work", "root"].iter().map(|folder| format!("/{folder}/")).collect();
    machine.extend(std::env::var("HOME").ok().filter(|home| home.len() > 1).map(|home| home + "/"));
    for source in sources() {
        for line in source.text.lines() {
            let found = machine.iter().find(|path| line.contains(path.as_str()));
            assert!(found.is_none(), "{}: {line}", source.path);
        }
    }
}

#[test]
fn no_pointer_type_stands_in_a_layout_table() {
    for path in [
        "shm-layout/src/image/layout.rs",
        "shm-layout/src/lane/geometry.rs",
        "shm-layout/src/cache/layout.rs",
        "shm-layout/src/cache/saved.rs",
        "shm-layout/src/wire/head.rs",
    ] {
        let text = std::fs::read_to_string(root().join(path)).expect(path);
        for kind in ["\"usize\"", "\"pointer\"", "\"*const", "\"&"] {
            assert!(!text.contains(kind), "{path} lays out {kind}");
        }
    }
}

#[test]
fn the_reader_of_source_knows_code_from_text() {
    let text = "// unsafe\nlet a = \"unsafe\"; /* unsafe */ let b = r#\"unsafe\"#; let c = '\"'; let d = b'\\''; fn x<'a>() {} safe";
    let code = code_only(text);
    assert!(!words(&code).any(|word| word == "unsafe"), "{code}");
    assert!(words(&code).any(|word| word == "safe"), "{code}");
}

//! Keeps docs/layout.md, docs/protocol.md and docs/limits.md true: whatever in them can be derived from the code stands
//! between `<!-- begin NAME -->` and `<!-- end NAME -->` and is compared with what the code says now.
//! `BLESS=1 cargo test -p shm-layout --test docs` writes those parts anew. The prose around them is written by hand.

use shm_layout::cache::{CACHE_ENTRY_FIELDS, CACHE_HEADER_FIELDS, SAVED_HEADER_FIELDS, SAVED_RECORD_FIELDS};
use shm_layout::code::Code;
use shm_layout::image::{HEADER_FIELDS, SECTION_ENTRY_FIELDS, TENSOR_ENTRY_FIELDS};
use shm_layout::lane::{
    CLIENT_CELL_FIELDS, COMPLETION_ENTRY_FIELDS, CONTROL_FIELDS, ENGINE_CELL_FIELDS, Geometry,
    LANE_HEADER_FIELDS, LAYOUT_HASH, SUBMISSION_ENTRY_FIELDS,
};
use shm_layout::payload::{EmbeddingRows, encode_embeddings, encode_texts, encode_token_spans};
use shm_layout::table::{Field, render_markdown};
use shm_layout::wire::{
    AnswerFrame, BrokerMessage, ClientMessage, Encode, HEAD_BYTES, HEAD_FIELDS, Hello, JobFrame,
    LaneDescription, Operation, Priority, encode_frame,
};
use std::fmt::Write as _;
use std::path::PathBuf;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn source(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Compares the parts of a document with what they should be, or writes them.
fn check(document: &str, parts: &[(&str, String)]) {
    let path = root().join("docs").join(document);
    let before = std::fs::read_to_string(&path).unwrap();
    let mut text = before.clone();
    for (name, content) in parts {
        let (begin, end) = (format!("<!-- begin {name} -->\n"), format!("<!-- end {name} -->"));
        let from = text.find(&begin).unwrap_or_else(|| panic!("{document} has no part {name}")) + begin.len();
        let to =
            from + text[from..].find(&end).unwrap_or_else(|| panic!("{document}: part {name} has no end"));
        text.replace_range(from..to, &format!("\n{}\n\n", content.trim()));
    }
    for line in before.lines().filter(|line| line.starts_with("<!-- begin ")) {
        let known = parts.iter().any(|(name, _)| line == format!("<!-- begin {name} -->"));
        assert!(known, "{document}: nobody writes the part `{line}`");
    }
    if text != before {
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(&path, text).unwrap();
        } else {
            let line = text.lines().zip(before.lines()).position(|(a, b)| a != b).map_or(0, |at| at + 1);
            panic!("docs/{document} is not what the code says, first at line {line}: run with BLESS=1");
        }
    }
}

fn table(title: &str, fields: &[Field]) -> String {
    let markdown = render_markdown(title, fields);
    // The heading is the document's.
    markdown.split_once("\n\n").map(|(_, rows)| rows.to_owned()).unwrap_or_default()
}

fn places() -> String {
    let g = Geometry::V1;
    let [submissions, completions, client_cells, engine_cells] = g.table_offsets();
    let mut out = String::from("| from | bytes | what |\n|---:|---:|---|\n");
    let mut row = |from: usize, to: usize, what: &str| {
        let _ = writeln!(out, "| {from} | {} | {what} |", to - from);
    };
    row(0, 256, "header");
    row(256, submissions, "control words, each on a line of 128 bytes of its own");
    row(submissions, completions, &format!("submission ring: {} entries", g.jobs));
    row(completions, client_cells, &format!("completion ring: {} entries", g.jobs));
    row(client_cells, engine_cells, &format!("client's halves of {} job cells", g.jobs));
    row(
        engine_cells,
        g.arena_offset(),
        &format!("engine's halves of {} job cells, then padding to a page", g.jobs),
    );
    let mut at = g.arena_offset();
    for (class, slots) in g.classes.iter().enumerate() {
        let end = at + slots.slot_bytes * slots.count;
        row(at, end, &format!("arena, class {class}: {} slots of {} bytes", slots.count, slots.slot_bytes));
        at = end;
    }
    let _ = write!(
        out,
        "\nThe region has {} bytes. `LAYOUT_HASH` of this layout: `{LAYOUT_HASH:#018x}`.",
        g.region_bytes()
    );
    out
}

#[test]
fn layout_document_is_what_the_tables_say() {
    let parts = [
        ("image-header", table("", HEADER_FIELDS)),
        ("image-section", table("", SECTION_ENTRY_FIELDS)),
        ("image-tensor", table("", TENSOR_ENTRY_FIELDS)),
        ("lane-places", places()),
        ("lane-header", table("", LANE_HEADER_FIELDS)),
        ("lane-control", table("", CONTROL_FIELDS)),
        ("lane-submission", table("", SUBMISSION_ENTRY_FIELDS)),
        ("lane-completion", table("", COMPLETION_ENTRY_FIELDS)),
        ("lane-client-cell", table("", CLIENT_CELL_FIELDS)),
        ("lane-engine-cell", table("", ENGINE_CELL_FIELDS)),
        ("cache-header", table("", CACHE_HEADER_FIELDS)),
        ("cache-entry", table("", CACHE_ENTRY_FIELDS)),
        ("saved-header", table("", SAVED_HEADER_FIELDS)),
        ("saved-record", table("", SAVED_RECORD_FIELDS)),
        ("frame-head", table("", HEAD_FIELDS)),
    ];
    check("layout.md", &parts);
}

/// A documented item of a source file: the comment over it, and its line without indentation.
fn documented(text: &str) -> Vec<(String, String)> {
    let mut items = Vec::new();
    let mut comment = String::new();
    for line in text.lines() {
        if line == "#[cfg(test)]" {
            break;
        }
        let line = line.trim();
        if let Some(more) = line.strip_prefix("///") {
            if !comment.is_empty() {
                comment.push(' ');
            }
            comment.push_str(more.trim());
        } else if !line.starts_with("#[") {
            items.push((std::mem::take(&mut comment), line.to_owned()));
        }
    }
    items
}

/// Links of rustdoc as plain code, and nothing that would end a table's cell.
fn plain(comment: &str) -> String {
    comment
        .replace("[`", "`")
        .replace("`]", "`")
        .replace('|', "\\|")
        .replace("crate::", "")
        .replace("super::", "")
}

fn codes() -> String {
    let mut out = String::from("| number | name | meaning |\n|---:|---|---|\n");
    let items = documented(&source("shm-layout/src/code.rs"));
    for code in Code::ALL {
        let wanted = format!("\"{}\";", code.name());
        let (comment, _) =
            items.iter().find(|(_, line)| line.ends_with(&wanted)).expect("each code has its line");
        let _ = writeln!(out, "| {} | `{}` | {} |", *code as u16, code.name(), plain(comment));
    }
    out
}

/// Every type of messages.rs and its neighbours that is encoded, field by field in the order of its encoding.
fn messages() -> String {
    let files = [
        "messages",
        "backing_kind",
        "status_messages",
        "cache_messages",
        "model_messages",
        "provider_messages",
        "task_messages",
        "config_messages",
    ];
    // The tests at a file's end would hide what comes behind them.
    let texts = files.map(|name| {
        let text = source(&format!("shm-layout/src/wire/{name}.rs"));
        text.split("#[cfg(test)]").next().unwrap_or_default().to_owned()
    });
    let text = texts.concat();
    let encoded = |name: &str| {
        let at = text.find(&format!(" {name} {{\n")).expect("the type is there");
        let before = &text[..at];
        before[before.rfind("#[derive(").expect("each type derives something")..].contains("Encode")
    };
    let mut out = String::new();
    // The type that is open, with the number of its next variant.
    let mut variant: Option<u32> = None;
    let (mut open, mut in_variant) = (false, false);
    for (comment, line) in documented(&text) {
        let header =
            [("pub struct ", false), ("pub enum ", true)].into_iter().find_map(|(start, is_enum)| {
                Some((line.strip_prefix(start)?.strip_suffix(" {")?.to_owned(), is_enum))
            });
        if let Some((name, is_enum)) = header {
            open = encoded(&name);
            variant = is_enum.then_some(0);
            if open {
                let _ = writeln!(out, "\n#### `{name}`\n\n{}\n", plain(&comment));
                out.push_str(if is_enum {
                    "| variant | fields | meaning |\n|---:|---|---|\n"
                } else {
                    "| field | type | meaning |\n|---|---|---|\n"
                });
            }
        } else if line == "}" && open {
            open = false;
        } else if open {
            let field = line.trim_end_matches(',');
            match (&mut variant, in_variant) {
                (_, true) if field == "}" => in_variant = false,
                (_, true) => {
                    let (name, kind) = field.split_once(": ").expect("a field of a variant");
                    let _ = writeln!(out, "| | `{name}: {kind}` | {} |", plain(&comment));
                }
                (Some(number), false) => {
                    let name = field.split([' ', '(']).next().unwrap_or_default();
                    let body = match field.split_once('(') {
                        Some((_, inner)) => format!("`{name}({inner}`"),
                        None => format!("`{name}`"),
                    };
                    let _ = writeln!(out, "| {number} | {body} | {} |", plain(&comment));
                    in_variant = field.ends_with('{');
                    *number += 1;
                }
                (None, false) => {
                    let (name, kind) =
                        field.trim_start_matches("pub ").split_once(": ").expect("a field of a struct");
                    let _ = writeln!(out, "| `{name}` | `{kind}` | {} |", plain(&comment));
                }
            }
        }
    }
    out
}

/// Bytes as hex, sixteen to a line, with offsets.
fn hex(bytes: &[u8]) -> String {
    let mut out = String::from("```text\n");
    for (row, chunk) in bytes.chunks(16).enumerate() {
        let words: Vec<String> = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
        let _ = writeln!(out, "{:04x}  {}", row * 16, words.join(" "));
    }
    out + "```"
}

fn frame<T: Encode>(request_id: u64, message: &T) -> String {
    hex(&encode_frame(request_id, message).expect("an example is small"))
}

#[test]
fn protocol_document_is_what_the_code_does() {
    let hello = Hello { protocol_major: 2, protocol_minor: 0, layout_hash: 0, client_name: "worker".into() };
    let texts = encode_texts(&["hi", "grüße"]).unwrap();
    let job = JobFrame {
        lease_id: 1,
        job_id: 7,
        operation: Operation::Embed,
        priority: Priority::Bulk,
        deadline_ns: 0,
        payload: texts.clone(),
    };
    let rows = EmbeddingRows {
        dim: 2,
        fingerprint: 0x1122_3344_5566_7788,
        cached: vec![false],
        values: vec![0.6, 0.8],
    };
    let answer = AnswerFrame {
        job_id: 7,
        status: Code::Overloaded,
        payload: b"busy".to_vec(),
        queue_us: 5,
        execution_us: 0,
    };
    let parts = [
        ("codes", codes()),
        ("messages", messages()),
        ("example-hello", frame(1, &ClientMessage::Hello(hello))),
        ("example-submit", frame(2, &ClientMessage::Submit(job))),
        ("example-answer", frame(2, &BrokerMessage::Answer(answer))),
        ("example-texts", hex(&texts)),
        ("example-embeddings", hex(&encode_embeddings(&rows))),
        ("example-spans", hex(&encode_token_spans(&[vec![0..2, 3..5], vec![]]))),
    ];
    check("protocol.md", &parts);
}

/// The encoding as docs/protocol.md puts it into words, by hand and without the codec.
#[test]
fn the_encoding_is_the_one_that_is_written_down() {
    fn body<T: Encode>(message: &T) -> Vec<u8> {
        encode_frame(0, message).unwrap()[HEAD_BYTES..].to_vec()
    }
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let hello = Hello { protocol_major: 1, protocol_minor: 2, layout_hash: 3, client_name: "ä".into() };
    let by_hand = [&0u32.to_le_bytes()[..], &[1, 0, 2, 0], &3u64.to_le_bytes(), &text("ä")].concat();
    assert_eq!(body(&ClientMessage::Hello(hello)), by_hand);
    // Variants are numbered by their place, also where the enum gives its variants numbers of their own.
    assert_eq!(body(&Operation::Tokenize), 1u32.to_le_bytes());
    assert_eq!(body(&Priority::Bulk), 1u32.to_le_bytes());
    assert_eq!(body(&ClientMessage::Ping), 7u32.to_le_bytes());
    // A code is its own number.
    assert_eq!(body(&Code::TooMany), 25u16.to_le_bytes());
    assert_eq!(body(&(true, false)), [1, 0]);
    assert_eq!(body(&vec![5u32]), [&1u64.to_le_bytes()[..], &[5, 0, 0, 0]].concat());
    let none: Option<LaneDescription> = None;
    let some = Some(LaneDescription { lane_id: 1, region_bytes: 2 });
    assert_eq!(body(&none), [0]);
    assert_eq!(body(&some), [&[1][..], &1u64.to_le_bytes(), &2u64.to_le_bytes()].concat());
    assert_eq!(body(&[7u8; 32]), [7; 32]);
}

/// Constants of a file, or of that part of it, as rows: name, value, comment. Only those whose comment says something.
fn constants(path: &str, wanted: impl Fn(&str) -> bool) -> String {
    let mut out = String::from("| bound | value | meaning |\n|---|---|---|\n");
    for (comment, line) in documented(&source(path)) {
        let rest = ["pub const ", "pub(crate) const ", "pub(super) const ", "const "]
            .into_iter()
            .find_map(|start| line.strip_prefix(start));
        let Some((name, rest)) = rest.and_then(|rest| rest.split_once(": ")) else { continue };
        let Some(value) = rest.split_once(" = ").map(|(_, value)| value) else { continue };
        let value = value.split(';').next().unwrap_or_default();
        if wanted(name) && !comment.is_empty() {
            let _ = writeln!(out, "| `{name}` | {} | {} |", shown(value), plain(&comment));
        }
    }
    format!("In `{path}`:\n\n{out}")
}

/// Fields of `struct Limits` of a file, with their defaults.
fn limits(path: &str) -> String {
    let text = source(path);
    let body = text.split_once("pub struct Limits {").expect("the struct is there").1;
    let defaults = text.split_once("        Limits {\n").expect("the defaults are there").1;
    let mut out = String::from("| bound | default | meaning |\n|---|---|---|\n");
    for (comment, line) in documented(body.split_once("\n}").expect("the struct ends").0) {
        let Some((name, _)) = line.strip_prefix("pub ").and_then(|line| line.split_once(": ")) else {
            continue;
        };
        let value = defaults
            .lines()
            .find_map(|line| line.trim().strip_prefix(&format!("{name}: ")))
            .unwrap_or_else(|| panic!("{path}: no default for {name}"));
        let _ = writeln!(out, "| `{name}` | {} | {} |", shown(value.trim_end_matches(',')), plain(&comment));
    }
    format!("`Limits` in `{path}`:\n\n{out}")
}

/// An expression of the code as people read it, where it is of a known shape.
fn shown(expression: &str) -> String {
    let bytes = |value: u64| match value {
        v if v >= 1 << 40 && v.is_multiple_of(1 << 40) => format!("{} Ti", v >> 40),
        v if v >= 1 << 30 && v.is_multiple_of(1 << 30) => format!("{} Gi", v >> 30),
        v if v >= 1 << 20 && v.is_multiple_of(1 << 20) => format!("{} Mi", v >> 20),
        v => format!("{} Ki", v >> 10),
    };
    let number = |text: &str| text.replace('_', "").trim().parse::<u64>().ok();
    let pair = |sign: &str| expression.split_once(sign).and_then(|(a, b)| Some((number(a)?, number(b)?)));
    if let Some((value, shift)) = pair(" << ") {
        return format!("{} (`{expression}`)", bytes(value << shift));
    }
    if let Some((value, factor)) = pair(" * ") {
        let product = value * factor;
        return if factor == 1024 { bytes(product) } else { product.to_string() };
    }
    if let Some(mebibytes) = expression.strip_suffix(" * MIB") {
        return format!("{mebibytes} Mi");
    }
    for (start, unit) in [("Duration::from_secs(", "s"), ("Duration::from_millis(", "ms")] {
        if let Some(inner) = expression.strip_prefix(start).and_then(|rest| rest.strip_suffix(')')) {
            return match inner.split_once(" * ").and_then(|(a, b)| Some((number(a)?, number(b)?))) {
                Some((a, b)) => format!("{} {unit}", a * b),
                None => format!("{inner} {unit}"),
            };
        }
    }
    number(expression).map_or_else(|| format!("`{expression}`"), |value| value.to_string())
}

#[test]
fn limits_document_is_what_the_constants_say() {
    let any = |_: &str| true;
    let max = |name: &str| name.starts_with("MAX_");
    let parts = [
        ("shared", constants("shm-layout/src/limits.rs", any)),
        ("image", constants("shm-layout/src/image/layout.rs", max)),
        ("cache", constants("shm-layout/src/cache/layout.rs", max)),
        ("cache-reader", constants("shm-layout/src/cache/reader.rs", |name| name == "READ_TRIES")),
        ("durations", constants("shm-layout/src/wire/model_messages.rs", any)),
        ("engine-measured", constants("engine-host/src/measured.rs", any)),
        ("broker-lifecycle", constants("broker/src/core/lifecycle.rs", max)),
        ("broker-alerts", constants("broker/src/core/alerts.rs", any)),
        ("broker-memory", constants("broker/src/io/memory.rs", max)),
        ("sdk-renew", constants("worker-sdk/src/seat/renew.rs", any)),
        ("sdk-session", constants("worker-sdk/src/session.rs", max)),
        ("cache-engine", constants("engine-host/src/cache.rs", max)),
        ("cache-saved", constants("engine-host/src/persist.rs", any)),
        ("private-files", constants("shm-os/src/private_files.rs", |name| name == "NAMING_TRIES")),
        ("broker", limits("broker/src/config.rs")),
        ("framed", constants("shm-os/src/framed.rs", any)),
        ("socket", constants("shm-os/src/socket.rs", max)),
        ("memfd", constants("shm-os/src/memfd.rs", max)),
        ("engine-config", constants("engine/src/config/mod.rs", max)),
        ("engine-families", constants("engine/src/config/families.rs", max)),
        ("engine-checkpoint", constants("engine/src/compile/checkpoint.rs", max)),
        ("engine-tokenizer", constants("engine/src/compile/tokenizer_check.rs", max)),
        (
            "engine-unigram",
            [
                constants("engine/src/unigram/trie.rs", |name| name == "MAX_UNITS"),
                constants("engine/src/unigram/tables.rs", max),
                constants("engine/src/unigram/file.rs", max),
                constants("engine/src/unigram/normalize.rs", max),
            ]
            .join("\n"),
        ),
        (
            "loader",
            [
                constants("model-loader/src/stamp.rs", |name| name != "FIRST_LINE"),
                constants("model-loader/src/verify.rs", max),
                constants("shm-os/src/image_backing/choice.rs", any),
            ]
            .join("\n"),
        ),
        ("engine-sentence", constants("engine/src/compile/sentence.rs", max)),
        ("engine-folder", constants("engine/src/compile/folder.rs", max)),
        ("engine-model", constants("engine/src/model/mod.rs", max)),
        ("engine-gguf", constants("engine/src/compile/gguf.rs", max)),
        ("engine-gguf-files", constants("engine/src/compile/gguf_files.rs", max)),
        ("engine-generator", constants("engine/src/compile/generator.rs", max)),
        ("generate", constants("engine/src/generate/mod.rs", max)),
        ("generate-config", constants("engine/src/generate/config.rs", max)),
        ("generate-options", constants("engine/src/generate/options.rs", max)),
        ("generate-kept", constants("engine/src/generate/generation.rs", max)),
        ("generate-template", constants("engine/src/generate/template.rs", max)),
        ("generate-text", constants("engine/src/generate/text.rs", max)),
        ("generate-work", constants("engine/src/kernel/decoder/product.rs", max)),
        ("engine-schedule", constants("engine-host/src/schedule.rs", any)),
        ("engine-generate", constants("engine-host/src/generate.rs", any)),
        ("source", limits("model-source/src/options.rs")),
        ("source-reference", constants("model-source/src/reference.rs", max)),
        ("source-layout", constants("model-source/src/layout.rs", max)),
        ("source-wheel", constants("model-source/src/wheel.rs", max)),
        ("source-unzip", constants("model-source/src/unzip.rs", max)),
        (
            "sdk",
            constants("worker-sdk/src/settings.rs", |name| {
                name.starts_with("DEFAULT_") || name.starts_with("FALLBACK_P")
            }),
        ),
        ("sdk-fallback", constants("worker-sdk/src/fallback.rs", |name| name.starts_with("RETURN_"))),
        ("sdk-split", constants("worker-sdk/src/split.rs", any)),
        ("sdk-seat", constants("worker-sdk/src/seat.rs", any)),
        ("sdk-provider", constants("worker-sdk/src/provider.rs", any)),
        ("provided-jobs", constants("broker/src/core/provided_jobs.rs", any)),
        ("pipeline", constants("doc-pipeline/src/limits.rs", any)),
        ("settings", constants("settings/src/limits.rs", any)),
        ("reload", constants("broker/src/core/reconfigure.rs", max)),
    ];
    check("limits.md", &parts);
}

//! The document pipeline by its documented route: `index` starts a subprocess per document, `search` finds what is in
//! them, and what has not changed is not computed again.

use serde_json::Value;
use std::fs;
use tests::program::workspace;
use tests::running::{Broker, assert_ok};

fn json(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stdout)))
}

#[test]
fn the_corpus_is_indexed_once_and_answers_its_questions() {
    let broker = Broker::start(&[]);
    let store = broker.folder().join("test-store.db");
    let store = store.to_str().unwrap();
    let corpus = workspace().join("demo/corpus");
    let corpus = corpus.to_str().unwrap();
    let first = broker.run(&["index", corpus, "--store", store, "--jobs", "4", "--json"], b"");
    assert_ok(&first);
    let first = json(&first);
    assert!(first["documents"].as_u64().unwrap() >= 20, "{first}");
    assert_eq!(first["indexed"], first["documents"]);
    let again = broker.run(&["index", corpus, "--store", store, "--jobs", "4", "--json"], b"");
    assert_ok(&again);
    assert_eq!(json(&again)["unchanged"], first["documents"], "an unchanged document costs nothing");

    let questions = fs::read_to_string(workspace().join("demo/corpus/questions.json")).unwrap();
    let questions: Vec<Value> = serde_json::from_str(&questions).unwrap();
    for question in &questions {
        let asked = question["question"].as_str().unwrap();
        let output = broker.run(&["search", "--store", store, asked, "-k", "3", "--json"], b"");
        assert_ok(&output);
        let hits = json(&output)["hits"].as_array().unwrap().clone();
        let wanted = question["document"].as_str().unwrap();
        assert!(hits[0]["document"].as_str().unwrap().ends_with(wanted), "{asked}: {hits:#?}");
        let phrase = question["phrase"].as_str().unwrap();
        assert!(
            hits.iter().any(|h| h["snippet"].as_str().unwrap().contains(phrase)),
            "{asked}: {phrase:?} is in none of {hits:#?}"
        );
    }
    let status = broker.status();
    assert_eq!(status.models[0].loads, 1, "one load for all subprocesses");
    assert_eq!(status.sessions.len(), 1, "every subprocess has let go: {:?}", status.sessions);
    broker.stop();
}

#[test]
fn a_changed_document_is_replaced_and_a_bad_one_named() {
    let broker = Broker::start(&[]);
    let folder = broker.folder().join("test-docs");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.md"), "# Pumps\n\nThe blue pump delivers 40 litres.\n").unwrap();
    fs::write(folder.join("b.txt"), "The red pump delivers 90 litres.\n").unwrap();
    let store = broker.folder().join("test-store.db");
    let (store, docs) = (store.to_str().unwrap(), folder.to_str().unwrap());
    assert_ok(&broker.run(&["index", docs, "--store", store], b""));

    fs::write(folder.join("a.md"), "# Pumps\n\nThe blue pump was replaced by a green compressor.\n").unwrap();
    fs::write(folder.join("c.txt"), [0xff, 0xfe, 0xfd, b'x', 0x80]).unwrap();
    fs::write(folder.join("d.txt"), b"ok \xff not").unwrap();
    let second = broker.run(&["index", docs, "--store", store, "--json"], b"");
    assert_eq!(second.status.code(), Some(7), "{}", String::from_utf8_lossy(&second.stderr));
    let summary = json(&second);
    assert_eq!(
        (&summary["replaced"], &summary["unchanged"]),
        (&Value::from(1), &Value::from(1)),
        "{summary}"
    );
    let failures = summary["failures"].to_string();
    assert!(failures.contains("d.txt"), "the bad one is named: {failures}");

    let found = broker.run(&["search", "--store", store, "green compressor", "--json"], b"");
    let found = json(&found);
    assert!(found["hits"][0]["document"].as_str().unwrap().ends_with("a.md"));
    assert_eq!(found["hits"][0]["heading_path"][0], "Pumps");
    let all = found["hits"].to_string();
    assert!(!all.contains("40 litres"), "chunks of the old version are gone: {all}");
    broker.stop();
}

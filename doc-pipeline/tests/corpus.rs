//! The demo's corpus: all of it can be indexed, tables come out with captions, its questions have their answers.

mod common;

use std::path::{Path, PathBuf};

use common::TestModel;
use doc_pipeline::{
    ChunkKind, IndexOptions, ModelIdentity, SearchOptions, Store, index_document, search_store, walk,
};

#[derive(serde::Deserialize)]
struct Question {
    question: String,
    document: String,
    phrase: String,
}

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/corpus")
}

#[test]
fn every_question_is_answered() {
    let folder = tempfile::tempdir().expect("temp dir");
    let model = TestModel::default();
    let mut store =
        Store::open_or_create(&folder.path().join("kb.db"), &ModelIdentity::of(&model)).expect("store");
    let walked = walk::expand(&[corpus()]).expect("walks");
    assert!(walked.documents.len() >= 20 && walked.problems.is_empty());
    for document in &walked.documents {
        index_document(document, &mut store, &model, &IndexOptions::default()).expect("index");
    }
    store.check().expect("consistent");

    let questions = std::fs::read_to_string(corpus().join("questions.json")).expect("there");
    let questions: Vec<Question> = serde_json::from_str(&questions).expect("questions");
    assert_eq!(questions.len(), 5);
    let mut in_tables = 0;
    for Question { question, document, phrase } in &questions {
        // The test model knows words but no meaning: the words must bring the answer among the first few.
        let hits = search_store(&mut store, &model, question, &SearchOptions { results: 5 }).expect("search");
        let hit = hits.iter().find(|hit| hit.document.ends_with(document) && hit.snippet.contains(phrase));
        let hit = hit.unwrap_or_else(|| panic!("no answer to {question:?}: {hits:#?}"));
        in_tables += usize::from(hit.kind == ChunkKind::Table);
    }
    assert!(in_tables >= 3, "{in_tables} answers in tables");
}

#[test]
fn html_and_csv_tables_keep_caption_and_header() {
    let folder = tempfile::tempdir().expect("temp dir");
    let model = TestModel::default();
    let mut store =
        Store::open_or_create(&folder.path().join("kb.db"), &ModelIdentity::of(&model)).expect("store");
    for name in ["shipping-rates.html", "price-list-2025.csv"] {
        index_document(&corpus().join(name), &mut store, &model, &IndexOptions::default()).expect("index");
    }
    let mut find = |query: &str, document: &str, row: &str| {
        let hits = search_store(&mut store, &model, query, &SearchOptions { results: 10 }).expect("search");
        let mut tables = hits.into_iter().filter(|hit| hit.kind == ChunkKind::Table);
        let table = tables.find(|hit| hit.document.ends_with(document) && hit.snippet.contains(row));
        table.unwrap_or_else(|| panic!("no table of {document} with {row}")).snippet
    };
    let rates = find("Ireland pallet express", "shipping-rates.html", "Ireland | £18 | £37 | £143 | £212");
    assert!(rates.starts_with(
        "Shipping rates by destination\nDestination | Parcel / Standard | Parcel / Express | Pallet"
    ));
    let prices = find(
        "sound hood Tarn 12 list price",
        "price-list-2025.csv",
        "SH-12 | Sound hood for Tarn 12 | 690,00",
    );
    assert!(prices.starts_with("price-list-2025\nArticle | Description | List price GBP"), "{prices}");
}

//! The store under real files and processes: unchanged, replaced, removed, refused, killed, shared.

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::TestModel;
use doc_pipeline::limits::DOCUMENT_MEMORY_BYTES_MAX;
use doc_pipeline::store::{NewDocument, Stored};
use doc_pipeline::supervise::{CancelToken, SuperviseOptions, bound_memory, die_with_supervisor, run};
use doc_pipeline::wire::{DocumentReport, FailureCode, Outcome};
use doc_pipeline::{
    ChunkOptions, Hit, IndexOptions, IndexOutcome, ModelIdentity, PipelineError, SearchOptions, Store,
    StoreError, index_document, search_store,
};

struct Setup {
    folder: tempfile::TempDir,
    model: TestModel,
}

impl Setup {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("temp dir"), model: TestModel::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), text).expect("write");
        self.path(name)
    }

    fn store(&self) -> Store {
        Store::open_or_create(&self.path("kb.db"), &ModelIdentity::of(&self.model)).expect("store")
    }

    fn index(&self, store: &mut Store, path: &Path) -> Result<IndexOutcome, PipelineError> {
        index_document(path, store, &self.model, &IndexOptions::default())
    }

    fn search(&self, store: &mut Store, query: &str) -> Vec<Hit> {
        search_store(store, &self.model, query, &SearchOptions::default()).expect("search")
    }
}

const PUMP: &str = "# Pump\n\n## Noise\n\nThe outdoor unit makes 47 decibel.\n\n## Weights\n\n\
                    Table 1: weights\n\n| model | weight |\n|---|---|\n| small | 61 kg |\n| large | 94 kg |\n";

#[test]
fn index_search_change_remove() {
    let setup = Setup::new();
    let mut store = setup.store();
    let pump = setup.write("pump.md", PUMP);
    let other = setup.write("leave.txt", "Leave policy\n\nEveryone has thirty days of leave.\n");
    assert!(matches!(setup.index(&mut store, &pump), Ok(IndexOutcome::Indexed { chunks: 2, .. })));
    assert!(matches!(setup.index(&mut store, &other), Ok(IndexOutcome::Indexed { .. })));
    assert!(matches!(setup.index(&mut store, &pump), Ok(IndexOutcome::Unchanged { chunks: 2, .. })));

    let hits = setup.search(&mut store, "large weight in kg?");
    let best = &hits[0];
    assert!(best.document.ends_with("pump.md") && best.snippet.contains("large | 94 kg"), "{best:?}");
    assert_eq!(best.heading_path, ["Pump", "Weights"]);
    assert_eq!(best.kind, doc_pipeline::ChunkKind::Table);
    assert_eq!((best.rank, best.bm25_rank, best.lines), (1, Some(1), Some((13, 14))));
    let json = serde_json::to_value(best).expect("JSON");
    assert_eq!(json["lines"], serde_json::json!([13, 14]));
    assert_eq!(json["kind"], "table");

    std::fs::write(
        &pump,
        PUMP.replace("94 kg", "99 kg").replace("## Noise", "## Sound\n\nQuiet.\n\n## Noise"),
    )
    .expect("write");
    assert!(matches!(
        setup.index(&mut store, &pump),
        Ok(IndexOutcome::Replaced { chunks: 3, previous_chunks: 2, .. })
    ));
    let all = setup.search(&mut store, "large weight");
    assert!(all.iter().any(|hit| hit.snippet.contains("99 kg")));
    assert!(!all.iter().any(|hit| hit.snippet.contains("94 kg")), "the old version is gone");
    store.check().expect("consistent");

    let stats = store.stats().expect("stats");
    assert_eq!((stats.documents, stats.chunks), (2, 4));
    let key = pump.canonicalize().expect("there").to_str().expect("UTF-8").to_owned();
    assert!(store.remove(&key).expect("remove"));
    assert!(!store.remove(&key).expect("remove"));
    store.check().expect("consistent");
    assert!(setup.search(&mut store, "large weight").iter().all(|hit| hit.document.ends_with("leave.txt")));
}

#[test]
fn other_options_index_again() {
    let setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("pump.md", PUMP);
    setup.index(&mut store, &path).expect("index");
    let options = IndexOptions { chunk: ChunkOptions { target_tokens: 64, overlap_tokens: 8 } };
    let outcome = index_document(&path, &mut store, &setup.model, &options).expect("index");
    assert!(matches!(outcome, IndexOutcome::Replaced { .. }));
    assert_eq!(store.documents().expect("documents").len(), 1);
}

#[test]
fn an_empty_document_is_stored_without_chunks() {
    let setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("empty.md", "");
    assert!(matches!(setup.index(&mut store, &path), Ok(IndexOutcome::Indexed { chunks: 0, tokens: 0 })));
    assert!(matches!(setup.index(&mut store, &path), Ok(IndexOutcome::Unchanged { chunks: 0, .. })));
    assert!(setup.search(&mut store, "anything").is_empty());
}

#[test]
fn failures_are_typed_and_leave_the_old_version() {
    let mut setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("a.md", "first version");
    setup.index(&mut store, &path).expect("index");

    setup.write("a.md", b"bad \xFF byte");
    let error = setup.index(&mut store, &path).expect_err("not UTF-8");
    assert_eq!(error.code(), FailureCode::Decode);
    assert!(error.to_string().contains("at byte 4 (0xff)"), "{error}");

    setup.write("a.md", "second version, poison");
    setup.model.fails_on = Some("poison");
    let error = setup.index(&mut store, &path).expect_err("the model fails");
    assert_eq!(error.code(), FailureCode::Model);

    assert_eq!(
        setup.index(&mut store, Path::new("x.pdf")).expect_err("format").code(),
        FailureCode::UnknownFormat
    );
    assert_eq!(setup.index(&mut store, &setup.path("none.md")).expect_err("read").code(), FailureCode::Read);
    assert_eq!(setup.search(&mut store, "version")[0].snippet, "first version");
    store.check().expect("consistent");
}

#[test]
fn another_model_is_refused() {
    let setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("a.md", "text");
    let other = TestModel { version: 2, ..TestModel::default() };
    let error =
        Store::open_or_create(&setup.path("kb.db"), &ModelIdentity::of(&other)).expect_err("other model");
    assert!(matches!(error, StoreError::ModelMismatch { .. }));
    assert!(error.to_string().contains("test-model") && error.to_string().contains("new store"), "{error}");
    let error = index_document(&path, &mut store, &other, &IndexOptions::default()).expect_err("other model");
    assert_eq!(error.code(), FailureCode::Store);
    assert!(search_store(&mut store, &other, "q", &SearchOptions::default()).is_err());
}

#[test]
fn files_that_are_no_store_are_refused_and_left_alone() {
    let setup = Setup::new();
    let model = ModelIdentity::of(&setup.model);
    let text = setup.write("notes.db", "these are notes, not a database, and long enough to be seen as such");
    assert!(matches!(Store::open_or_create(&text, &model), Err(StoreError::Foreign { .. })));
    assert!(std::fs::read_to_string(&text).expect("there").starts_with("these are notes"));

    let foreign = setup.path("other.db");
    let connection = rusqlite::Connection::open(&foreign).expect("sqlite");
    connection.execute_batch("CREATE TABLE t (x); PRAGMA user_version = 7").expect("table");
    assert!(matches!(Store::open_or_create(&foreign, &model), Err(StoreError::Foreign { .. })));

    drop(setup.store());
    let connection = rusqlite::Connection::open(setup.path("kb.db")).expect("sqlite");
    connection.execute_batch("PRAGMA user_version = 99").expect("set");
    drop(connection);
    let error = Store::open_existing(&setup.path("kb.db")).expect_err("newer");
    assert!(matches!(error, StoreError::Version { version: 99 }));

    assert!(matches!(Store::open_existing(&setup.path("none.db")), Err(StoreError::NotFound { .. })));
    assert!(matches!(Store::open_existing(setup.folder.path()), Err(StoreError::Open { .. })));
    assert!(matches!(
        Store::open_or_create(&setup.path("no/folder.db"), &model),
        Err(StoreError::Open { .. })
    ));
}

#[test]
fn a_file_that_changes_meanwhile_is_not_stored_stale() {
    let setup = Setup::new();
    let mut store = setup.store();
    let document = NewDocument {
        path: "/kb/a.md",
        title: "a",
        size_bytes: 1,
        content_hash: [1; 32],
        options_hash: [2; 32],
        chunks: &[],
        vectors: &[],
    };
    assert_eq!(store.replace(&document, || false).expect("store"), Stored::Stale);
    assert_eq!(store.document("/kb/a.md").expect("store"), None);
    assert_eq!(store.replace(&document, || true).expect("store"), Stored::Inserted);
    assert_eq!(store.replace(&document, || true).expect("store"), Stored::AlreadyThere);
    let wrong = NewDocument { vectors: &[vec![1.0]], ..document };
    assert!(matches!(store.replace(&wrong, || true), Err(StoreError::BadVectors { .. })));
}

#[test]
fn damage_is_found() {
    let setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("pump.md", PUMP);
    setup.index(&mut store, &path).expect("index");
    let other = rusqlite::Connection::open(setup.path("kb.db")).expect("sqlite");
    other.execute_batch("UPDATE vectors SET data = x'00'").expect("damage");
    assert!(matches!(store.check(), Err(StoreError::Damaged { .. })));
    let error =
        search_store(&mut store, &setup.model, "pump", &SearchOptions::default()).expect_err("damaged");
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn stores_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let setup = Setup::new();
    let mut store = setup.store();
    let path = setup.write("pump.md", PUMP);
    setup.index(&mut store, &path).expect("index");
    for name in ["kb.db", "kb.db-wal"] {
        let mode = std::fs::metadata(setup.path(name)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

// ---- Real processes: this binary runs itself, in the role that an environment variable names. ----

const ROLE_ENV: &str = "DOC_PIPELINE_TEST_ROLE";
const STORE_ENV: &str = "DOC_PIPELINE_TEST_STORE";
const DOCUMENT_ENV: &str = "DOC_PIPELINE_TEST_DOCUMENT";

fn subprocess(role: &str, store: &Path, document: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command.args(["--exact", "subprocess_entry", "--nocapture", "--test-threads", "1", "--quiet"]);
    command.env(ROLE_ENV, role).env(STORE_ENV, store).env(DOCUMENT_ENV, document);
    command
}

/// Does nothing as a test; the roles of the subprocesses are here.
#[test]
fn subprocess_entry() {
    let Ok(role) = std::env::var(ROLE_ENV) else {
        return;
    };
    let store = PathBuf::from(std::env::var_os(STORE_ENV).expect("set"));
    let document = PathBuf::from(std::env::var_os(DOCUMENT_ENV).expect("set"));
    let model = TestModel::default();
    let open = || Store::open_or_create(&store, &ModelIdentity::of(&model));
    match role.as_str() {
        "index" => {
            assert!(die_with_supervisor());
            bound_memory(DOCUMENT_MEMORY_BYTES_MAX).expect("a lower limit can be set");
            let result = open().map_err(PipelineError::from).and_then(|mut store| {
                index_document(&document, &mut store, &model, &IndexOptions::default())
            });
            println!("\n{}", DocumentReport::new(document, &result).to_line());
            // Not back into the test harness, which would print after the line.
            std::process::exit(i32::from(result.is_err()));
        }
        "replace-forever" => {
            let mut store = open().expect("store");
            for round in 0_u32.. {
                std::fs::write(&document, versions()[(round % 2) as usize].clone()).expect("write");
                index_document(&document, &mut store, &model, &IndexOptions::default()).expect("index");
                println!("\nstored {round}");
            }
        }
        "hungry" => {
            bound_memory(64 << 20).expect("a lower limit can be set");
            let mut hoard: Vec<Vec<u8>> = Vec::new();
            while hoard.len() < 1_024 {
                hoard.push(vec![1; 1 << 20]);
            }
            println!(
                "\n{}",
                DocumentReport::new(document, &Ok(IndexOutcome::Indexed { chunks: 0, tokens: 0 })).to_line()
            );
            std::process::exit(0);
        }
        other => panic!("no role {other}"),
    }
}

/// Two versions of a document, each with many chunks, one word telling them apart in all of them.
fn versions() -> [String; 2] {
    ["alpha", "omega"].map(|word| {
        let rows: String = (0..400).map(|row| format!("| {word} {row} | value {row} |\n")).collect();
        format!("# Big\n\n| {word} | value |\n|---|---|\n{rows}")
    })
}

#[test]
fn killed_writers_leave_one_whole_version() {
    let setup = Setup::new();
    let (store, document) = (setup.path("kb.db"), setup.path("doc.md"));
    for round in 0..8_u64 {
        let mut child =
            subprocess("replace-forever", &store, &document).stdout(Stdio::piped()).spawn().expect("spawn");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut stored = 0;
        while stored < 1 + round % 3 {
            let line = lines.next().expect("goes on forever").expect("UTF-8");
            stored += u64::from(line.starts_with("stored"));
        }
        // Somewhere within the next round: reading the file, embedding, or half-way through the transaction.
        std::thread::sleep(std::time::Duration::from_micros(round * 2_700));
        child.kill().expect("kill");
        child.wait().expect("reap");

        let mut store = setup.store();
        store.check().expect("consistent");
        assert_eq!(store.stats().expect("stats").documents, 1);
        let options = SearchOptions { results: 1_000 };
        let hits = search_store(&mut store, &setup.model, "value", &options).expect("search");
        assert!(hits.len() > 10);
        let of = |word: &str| hits.iter().filter(|hit| hit.snippet.contains(word)).count();
        let (alpha, omega) = (of("alpha"), of("omega"));
        assert!(alpha == 0 || omega == 0, "a mix of two versions: {alpha} and {omega}");
    }
}

#[test]
fn four_processes_index_into_one_fresh_store() {
    let setup = Setup::new();
    let store = setup.path("kb.db");
    let mut documents: Vec<PathBuf> = (0..14)
        .map(|n| setup.write(&format!("doc{n:02}.md"), format!("# Document {n}\n\nabout topic{n}\n\n{PUMP}")))
        .collect();
    documents.push(setup.write("broken.txt", b"\xC3("));
    documents.push(documents[0].clone());
    let options = SuperviseOptions { jobs: 4, ..SuperviseOptions::default() };
    let index = |documents: &[PathBuf]| {
        run(documents, &options, &CancelToken::new(), |path| subprocess("index", &store, path), |_| {})
    };
    let summary = index(&documents);
    assert_eq!((summary.documents, summary.failed), (16, 1), "{:?}", summary.failures);
    assert_eq!(summary.indexed + summary.unchanged, 15, "the doubled document is there once");
    assert_eq!(summary.failures[0].code, FailureCode::Decode);
    assert!(summary.failures[0].message.contains("at byte 0"), "{}", summary.failures[0].message);

    let mut opened = setup.store();
    opened.check().expect("consistent");
    assert_eq!(opened.stats().expect("stats").documents, 14);
    assert!(setup.search(&mut opened, "topic11")[0].document.ends_with("doc11.md"));

    let mut unchanged = 0;
    let again = run(
        &documents[..14],
        &options,
        &CancelToken::new(),
        |path| subprocess("index", &store, path),
        |report| unchanged += u64::from(matches!(report.outcome, Outcome::Unchanged { .. })),
    );
    assert_eq!((again.unchanged, unchanged), (14, 14));
}

#[test]
fn many_openers_of_a_fresh_store_all_get_it() {
    const OPENERS: usize = 4;
    const ROUNDS: usize = 100;
    let setup = Setup::new();
    for round in 0..ROUNDS {
        let path = setup.path(&format!("{round}.db"));
        let start = std::sync::Barrier::new(OPENERS);
        std::thread::scope(|scope| {
            for _ in 0..OPENERS {
                scope.spawn(|| {
                    start.wait();
                    let store =
                        Store::open_or_create(&path, &ModelIdentity::of(&setup.model)).expect("store");
                    assert_eq!(store.stats().expect("stats").documents, 0);
                });
            }
        });
    }
}

#[test]
fn a_subprocess_that_eats_memory_ends_alone() {
    let setup = Setup::new();
    let options = SuperviseOptions::default();
    let make = |path: &Path| subprocess("hungry", &setup.path("kb.db"), path);
    let summary = run(&[setup.path("a.md")], &options, &CancelToken::new(), make, |_| {});
    assert_eq!(summary.failures[0].code, FailureCode::Killed, "{:?}", summary.failures);
}

#[test]
fn threads_share_a_store_that_is_searched_meanwhile() {
    let setup = Setup::new();
    let documents: Vec<PathBuf> =
        (0..24).map(|n| setup.write(&format!("d{n}.md"), format!("{PUMP}\nnote {n}\n"))).collect();
    drop(setup.store());
    std::thread::scope(|scope| {
        for part in documents.chunks(6) {
            let setup = &setup;
            scope.spawn(move || {
                let mut store = setup.store();
                for document in part {
                    setup.index(&mut store, document).expect("index");
                    // Each search sees whole documents only: as many chunks as stored documents have.
                    assert!(!setup.search(&mut store, "decibel").is_empty());
                }
            });
        }
    });
    let store = setup.store();
    store.check().expect("consistent");
    assert_eq!(store.stats().expect("stats").documents, 24);
}

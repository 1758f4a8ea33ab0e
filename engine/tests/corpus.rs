//! Replays the saved inputs of the fuzz target `model_files` under plain `cargo test`. The parsers are taken in as source
//! files, as the target does: they are private to the engine.
//! `BLESS=1 cargo test -p engine --test corpus` writes the seeds anew; inputs that fuzzing found lie beside them.

#[allow(dead_code, unreachable_pub)]
#[path = "../src/config.rs"]
mod config;
#[allow(dead_code, unreachable_pub)]
#[path = "../src/json.rs"]
mod json;
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/model_files/mod.rs"]
mod model_files;

use std::path::PathBuf;

#[test]
fn every_saved_input_passes() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/model_files");
    for (name, bytes) in model_files::seeds() {
        let path = folder.join(format!("seed-{name}"));
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let saved = std::fs::read(&path).unwrap_or_default();
        assert!(saved == bytes, "{} is out of date: run with BLESS=1", path.display());
    }
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        model_files::run(&std::fs::read(&path).unwrap());
    }
    model_files::clean_up();
}

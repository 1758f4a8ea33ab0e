//! Replays the saved inputs of the fuzz targets `model_files` and `wordpiece` under plain `cargo test`. What they run is
//! taken in as source files, as the targets do: most of it is private to the engine.
//! `BLESS=1 cargo test -p engine --test corpus` writes the seeds anew; inputs that fuzzing found lie beside them.

#[allow(dead_code, unreachable_pub)]
#[path = "../src/config/mod.rs"]
mod config;
#[allow(dead_code, unreachable_pub)]
#[path = "../src/json.rs"]
mod json;
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/model_files/mod.rs"]
mod model_files;
#[allow(unreachable_pub)]
#[path = "../../fuzz/src/wordpiece/mod.rs"]
mod wordpiece;

use std::path::PathBuf;

fn replay<N: std::fmt::Display>(target: &str, seeds: Vec<(N, Vec<u8>)>, run: fn(&[u8])) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    for (name, bytes) in seeds {
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
        run(&std::fs::read(&path).unwrap());
    }
}

#[test]
fn every_saved_input_passes() {
    replay("model_files", model_files::seeds(), model_files::run);
    model_files::clean_up();
}

#[test]
fn every_saved_text_passes() {
    replay("wordpiece", wordpiece::seeds(), wordpiece::run);
}

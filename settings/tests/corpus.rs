//! Replays the fuzz target's saved inputs under plain `cargo test`, through the same entry point that libFuzzer uses.
//! `BLESS=1 cargo test -p settings --test corpus` writes the seeds anew; inputs that fuzzing found lie beside them.

#[allow(unreachable_pub)]
#[path = "../../fuzz/src/configuration/mod.rs"]
mod configuration;

use std::path::PathBuf;

fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/configuration")
}

#[test]
fn seeds_are_what_the_code_makes() {
    for (name, bytes) in configuration::seeds() {
        let path = corpus().join(format!("seed-{name}"));
        if std::env::var_os("BLESS").is_some() {
            std::fs::create_dir_all(corpus()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let saved = std::fs::read(&path).unwrap_or_default();
        assert!(saved == bytes, "{} is out of date: run with BLESS=1", path.display());
    }
}

#[test]
fn every_saved_input_passes() {
    let mut count = 0;
    for entry in std::fs::read_dir(corpus()).unwrap() {
        let path = entry.unwrap().path();
        // Shown only when the test fails: which input it was.
        println!("{}", path.display());
        configuration::run(&std::fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count >= 10, "the corpus has only {count} inputs");
}

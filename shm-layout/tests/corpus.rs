//! Replays the fuzz targets' saved inputs under plain `cargo test`, through the same entry points that libFuzzer uses.
//! `BLESS=1 cargo test -p shm-layout --test corpus` writes the seeds anew; inputs that fuzzing found lie beside them.

#[allow(unreachable_pub)]
#[path = "../../fuzz/src/layout/mod.rs"]
mod layout;

use std::path::PathBuf;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target)
}

#[test]
fn seeds_are_what_the_code_makes() {
    for target in layout::targets() {
        let folder = corpus(target.name);
        for (name, bytes) in (target.seeds)() {
            let path = folder.join(format!("seed-{name}"));
            if std::env::var_os("BLESS").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let saved = std::fs::read(&path).unwrap_or_default();
            assert!(saved == bytes, "{} is out of date: run with BLESS=1", path.display());
        }
    }
}

#[test]
fn every_saved_input_passes() {
    for target in layout::targets() {
        let mut count = 0;
        for entry in std::fs::read_dir(corpus(target.name)).unwrap() {
            let path = entry.unwrap().path();
            // Shown only when the test fails: which input it was.
            println!("{}", path.display());
            (target.run)(&std::fs::read(&path).unwrap());
            count += 1;
        }
        assert!(count >= 10, "the corpus of {} has only {count} inputs", target.name);
    }
}

//! What turning texts into token ids costs, by the engine's tables and by the tokenizers crate that they stand for, on prose
//! and on what is hard for the tables; and what loading each takes. `cargo bench -p benches --bench tokenize`.
//!
//! Reads the tokenizer.json that `TOKENIZER` names, else a stored one with a small vocabulary: words are then cut into more
//! pieces than with a real one.

use criterion::{Criterion, Throughput};
use engine::wordpiece::WordPiece;
use std::hint::black_box;
use std::path::Path;
use tokenizers::Tokenizer;

/// Texts of one set, each of some 100 words.
fn sets() -> Vec<(&'static str, Vec<String>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/corpus");
    let mut prose = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the demo's documents") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "md" || extension == "txt") {
            let text = std::fs::read_to_string(path).expect("text");
            prose.extend(text.split("\n\n").map(str::to_owned));
        }
    }
    prose.sort();
    let word = |seed: u64| {
        let mut rest = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let letter = |_| {
            rest = rest.rotate_left(7) ^ rest >> 3;
            char::from(b'a' + (rest % 26) as u8)
        };
        (0..9).map(letter).collect::<String>()
    };
    let noise = |text: u64| (0..100).map(|at| word(text * 100 + at)).collect::<Vec<_>>().join(" ");
    let chinese = |text: u32| {
        (0..100)
            .filter_map(|at| char::from_u32(0x4E00 + (text * 7919 + at * 31) % 0x2000))
            .collect::<String>()
    };
    let accents =
        "Être ou ne pas être, voilà la question déjà posée à l'été; Œuvres, Ångström, naïveté. ".repeat(6);
    vec![
        ("prose", prose),
        ("unknown_words", (0..200).map(noise).collect()),
        ("chinese", (0..200).map(chinese).collect()),
        ("accents", vec![accents; 50]),
    ]
}

fn benches(criterion: &mut Criterion) {
    let stored = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tiny/bert_mean/tokenizer.json");
    let path = std::env::var_os("TOKENIZER").map_or(stored, Into::into);
    let json = std::fs::read(&path).expect("TOKENIZER names a tokenizer.json");
    let tables = WordPiece::from_json(&json, false).expect("one that the tables cover");
    let mut library = Tokenizer::from_bytes(&json).expect("one that the crate reads");
    library.with_padding(None);
    library.with_truncation(None).expect("no truncation");

    let mut group = criterion.benchmark_group("load");
    group.bench_function("tables", |b| b.iter(|| WordPiece::from_json(black_box(&json), false)));
    group.bench_function("crate", |b| b.iter(|| Tokenizer::from_bytes(black_box(&json))));
    group.finish();

    for (name, texts) in sets() {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(texts.iter().map(|text| text.len() as u64).sum()));
        let mut ids = Vec::new();
        group.bench_function("tables", |b| {
            b.iter(|| {
                for text in &texts {
                    ids.clear();
                    tables.encode_into(text, &mut ids);
                    black_box(&ids);
                }
            });
        });
        group.bench_function("tables_spans", |b| {
            b.iter(|| texts.iter().for_each(|text| drop(black_box(tables.spans(text)))));
        });
        group.bench_function("crate", |b| {
            b.iter(|| {
                texts.iter().for_each(|text| drop(black_box(library.encode_fast(text.as_str(), false))))
            });
        });
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    benches(&mut criterion);
    criterion.final_summary();
}

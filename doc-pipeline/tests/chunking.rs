//! Invariants of chunking over generated documents: coverage, limits, overlap, tables whole and headed.

mod common;

use std::collections::HashSet;

use common::{TestModel, tokens_of};
use doc_pipeline::chunk::{ChunkError, chunk_document};
use doc_pipeline::parse::parse;
use doc_pipeline::{Chunk, ChunkKind, ChunkOptions, Document, Format};
use proptest::prelude::*;

/// What a generated document is made of; every word in it is unique.
#[derive(Debug, Clone)]
enum Piece {
    Heading(u8, usize),
    Paragraph(usize),
    Item(usize),
    Table { columns: usize, rows: usize, cell_words: usize, captioned: bool },
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        (1_u8..5, 1_usize..6).prop_map(|(level, words)| Piece::Heading(level, words)),
        (1_usize..150).prop_map(Piece::Paragraph),
        (1_usize..10).prop_map(Piece::Item),
        (1_usize..6, 0_usize..12, 1_usize..12, any::<bool>()).prop_map(
            |(columns, rows, cell_words, captioned)| Piece::Table { columns, rows, cell_words, captioned }
        ),
        Just(Piece::Table { columns: 40, rows: 3, cell_words: 2, captioned: true }),
        Just(Piece::Heading(2, 120)),
    ]
}

#[derive(Default)]
struct Writer {
    text: String,
    next: usize,
    paragraphs: Vec<Vec<String>>,
    tables: Vec<TableFacts>,
}

struct TableFacts {
    header: Vec<String>,
    cells: HashSet<String>,
}

impl Writer {
    fn words(&mut self, prefix: &str, count: usize) -> Vec<String> {
        (0..count)
            .map(|_| {
                self.next += 1;
                format!("{prefix}é{}", self.next)
            })
            .collect()
    }

    fn write(&mut self, piece: &Piece) {
        match piece {
            Piece::Heading(level, words) => {
                let words = self.words("h", *words).join(" ");
                self.text.push_str(&format!("\n\n{} {words}\n\n", "#".repeat(usize::from(*level))));
            }
            Piece::Paragraph(words) => {
                let words = self.words("p", *words);
                self.text.push_str(&format!("\n\n{}\n\n", words.join(" ")));
                self.paragraphs.push(words);
            }
            Piece::Item(words) => {
                let words = self.words("i", *words).join(" ");
                self.text.push_str(&format!("\n- {words}\n"));
            }
            Piece::Table { columns, rows, cell_words, captioned } => {
                let caption = self.words("c", 4).join(" ");
                if *captioned {
                    self.text.push_str(&format!("\n\nTable 1: {caption}\n\n"));
                } else {
                    self.text.push_str(&format!("\n\n{caption}\n\n"));
                }
                let header = self.words("t", *columns);
                self.text.push_str(&format!("| {} |\n|{}\n", header.join(" | "), "---|".repeat(*columns)));
                let mut cells = HashSet::new();
                for _ in 0..*rows {
                    let row: Vec<String> =
                        (0..*columns).map(|_| self.words("r", *cell_words).join(" ")).collect();
                    cells.extend(row.iter().flat_map(|cell| cell.split(' ').map(str::to_owned)));
                    self.text.push_str(&format!("| {} |\n", row.join(" | ")));
                }
                self.text.push('\n');
                self.tables.push(TableFacts { header, cells });
            }
        }
    }
}

fn words_of(text: &str) -> HashSet<&str> {
    text.split_whitespace().collect()
}

fn chunk(document: &Document, model: &TestModel, options: ChunkOptions) -> Vec<Chunk> {
    chunk_document(document, model, &options).expect("chunks")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn everything_is_in_a_chunk_and_no_chunk_is_too_long(
        pieces in proptest::collection::vec(piece(), 0..14),
        target in 16_usize..300, overlap_share in 0_usize..34, max_tokens in 40_usize..300,
        counts_line_breaks in any::<bool>(),
    ) {
        let mut writer = Writer::default();
        pieces.iter().for_each(|piece| writer.write(piece));
        let document = parse(Format::Markdown, &writer.text, "stem").expect("parses");
        let model = TestModel { max_tokens, counts_line_breaks, ..TestModel::default() };
        let options = ChunkOptions { target_tokens: target, overlap_tokens: target * overlap_share / 100 };
        let chunks = chunk(&document, &model, options);

        let texts: Vec<String> = chunks.iter().map(Chunk::embedding_text).collect();
        for (chunk, text) in chunks.iter().zip(&texts) {
            let counted = tokens_of(text, counts_line_breaks).len();
            prop_assert_eq!(chunk.tokens, counted, "the count is the model's own");
            prop_assert!(counted + 2 <= max_tokens);
        }

        // Words have at most two tokens ("pé123" and so on up to 8 characters): one cut in two is in two chunks.
        let all = writer.text.split_whitespace().filter(|word| word.contains('é'));
        let found: HashSet<&str> = texts.iter().flat_map(|text| words_of(text)).collect();
        let joined = texts.join("\u{1}");
        for word in all {
            let head: String = word.chars().take(4).collect();
            let tail: String = word.chars().skip(4).collect();
            prop_assert!(
                found.contains(word) || (joined.contains(&head) && joined.contains(&tail)),
                "{} is lost", word
            );
        }
    }

    #[test]
    fn tables_stand_alone_under_their_header(
        pieces in proptest::collection::vec(piece(), 1..10), target in 120_usize..250,
    ) {
        let mut writer = Writer::default();
        pieces.iter().filter(|piece| !matches!(piece, Piece::Table { columns: 40, .. })).for_each(|p| writer.write(p));
        let document = parse(Format::Markdown, &writer.text, "stem").expect("parses");
        let chunks = chunk(&document, &TestModel::default(), ChunkOptions { target_tokens: target, overlap_tokens: 10 });
        for table in &writer.tables {
            let header = table.header.join(" | ");
            for chunk in &chunks {
                let body = words_of(&chunk.body);
                if table.cells.iter().any(|cell| body.contains(cell.as_str())) {
                    prop_assert_eq!(chunk.kind, ChunkKind::Table);
                    prop_assert!(chunk.body.contains(&header), "no header in {}", chunk.body);
                    let foreign = body.iter().find(|word| {
                        word.contains('é') && !word.starts_with('c') && !table.cells.contains(**word)
                            && !table.header.iter().any(|name| name == *word)
                            // A row that is too long alone is cut within a word at worst.
                            && !table.cells.iter().any(|cell| cell.starts_with(*word))
                    });
                    prop_assert!(foreign.is_none(), "{:?} in {}", foreign, chunk.body);
                }
            }
        }
    }

    #[test]
    fn following_chunks_of_a_run_share_the_overlap(words in 100_usize..900, target in 24_usize..200, share in 1_usize..34) {
        // Four characters a word: one word is one token.
        let text: Vec<String> = (0..words).map(|word| format!("{word:04}")).collect();
        let document = parse(Format::Text, &text.join(" "), "").expect("parses");
        let overlap = (target * share / 100).max(1);
        let chunks =
            chunk(&document, &TestModel::default(), ChunkOptions { target_tokens: target, overlap_tokens: overlap });
        prop_assert!(chunks.len() > 1 || words < 220);
        for pair in chunks.windows(2) {
            let first: Vec<&str> = pair[0].body.split(' ').collect();
            let second: Vec<&str> = pair[1].body.split(' ').collect();
            prop_assert_eq!(&first[first.len() - overlap..], &second[..overlap]);
        }
    }
}

fn text_document(text: &str) -> Document {
    parse(Format::Markdown, text, "stem").expect("parses")
}

#[test]
fn a_long_table_repeats_caption_and_header() {
    let rows: String = (0..60).map(|row| format!("| part{row} | {row} mm |\n")).collect();
    let text =
        format!("# Manual\n\n## Sizes\n\nTable 4: sizes of parts\n\n| part | size |\n|---|---|\n{rows}");
    let options = ChunkOptions { target_tokens: 80, overlap_tokens: 0 };
    let chunks = chunk(&text_document(&text), &TestModel::default(), options);
    assert!(chunks.len() > 3);
    for chunk in &chunks {
        assert!(chunk.body.starts_with("Table 4: sizes of parts\npart | size\npart"), "{}", chunk.body);
        assert_eq!(chunk.context, "Manual > Sizes");
        assert_eq!(&*chunk.heading_path, ["Manual", "Sizes"]);
        assert!(chunk.tokens <= 80);
    }
    let lines: Vec<_> = chunks.iter().filter_map(|c| c.source).map(|s| (s.first_line, s.last_line)).collect();
    assert_eq!(lines.len(), chunks.len());
    assert!(lines.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0), "rows follow each other: {lines:?}");
}

#[test]
fn headings_without_text_of_their_own_are_not_chunks() {
    let chunks = chunk(
        &text_document("# A\n\n## B\n\ntext\n\n## C\n"),
        &TestModel::default(),
        ChunkOptions::default(),
    );
    let bodies: Vec<_> = chunks.iter().map(|chunk| (chunk.context.as_str(), chunk.body.as_str())).collect();
    assert_eq!(bodies, [("A > B", "text"), ("A > C", "C")], "A and B are in a context, C stands alone");
}

#[test]
fn a_giant_word_and_a_giant_table_cell_are_bounded_in_bytes() {
    let blob = "x".repeat(300_000);
    let text = format!("{blob}\n\n| a | b |\n|---|---|\n| {blob} | 1 |\n");
    // One token per 4 KiB piece, as tokenizers do that give up on long words.
    struct Lumps;
    impl doc_pipeline::TextModel for Lumps {
        fn model_id(&self) -> &str {
            "lumps"
        }
        fn fingerprint(&self) -> String {
            "0".to_owned()
        }
        fn dimension(&self) -> usize {
            2
        }
        fn max_tokens(&self) -> usize {
            256
        }
        fn token_spans(
            &self,
            texts: &[&str],
        ) -> Result<Vec<Vec<std::ops::Range<usize>>>, doc_pipeline::ModelFailure> {
            Ok(texts
                .iter()
                .map(|text| {
                    let mut at = 0;
                    text.split(' ')
                        .map(|word| {
                            let span = at..at + word.len();
                            at = span.end + 1;
                            span
                        })
                        .filter(|span| !span.is_empty())
                        .collect()
                })
                .collect())
        }
        fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, doc_pipeline::ModelFailure> {
            Ok(vec![vec![1.0, 0.0]; texts.len()])
        }
    }
    let chunks = chunk_document(&text_document(&text), &Lumps, &ChunkOptions::default()).expect("chunks");
    let longest = chunks.iter().map(|chunk| chunk.body.len()).max();
    assert!(longest <= Some(doc_pipeline::limits::CHUNK_BYTES_MAX + 100), "{longest:?}");
    let total: usize = chunks.iter().map(|chunk| chunk.body.matches('x').count()).sum();
    assert!(total >= 600_000, "all of it is there");
}

#[test]
fn options_that_make_no_sense_are_refused() {
    let document = text_document("text");
    let ask = |target_tokens, overlap_tokens, max_tokens| {
        let model = TestModel { max_tokens, ..TestModel::default() };
        chunk_document(&document, &model, &ChunkOptions { target_tokens, overlap_tokens })
    };
    assert!(matches!(ask(8, 0, 256), Err(ChunkError::TargetTooSmall { .. })));
    assert!(matches!(ask(60, 21, 256), Err(ChunkError::OverlapTooLarge { .. })));
    assert!(matches!(ask(60, 20, 10), Err(ChunkError::ModelTooSmall { .. })));
    assert_eq!(ask(60, 20, 256).expect("fine").len(), 1);
}

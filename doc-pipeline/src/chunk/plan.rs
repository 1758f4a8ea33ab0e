//! A document as the texts that are tokenized and the parts that chunks are made of. Pure; no token is known here.

use std::ops::Range;
use std::sync::Arc;

use crate::document::{BlockKind, Document, Source, Table};
use crate::limits::TOKENIZE_PIECE_BYTES;

/// Index of a text in [`Plan::texts`].
pub(super) type TextId = usize;

/// What is to be tokenized, and what chunks are made of it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Texts that chunks are cut from.
    pub(super) texts: Vec<String>,
    /// The texts in pieces that the tokenizer gets, in order of text and place.
    pub(super) pieces: Vec<Piece>,
    /// The parts in reading order.
    pub(super) parts: Vec<Part>,
}

/// A byte range of a text, short enough for the tokenizer, cut between words where there are any.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: TextId,
    pub(super) bytes: Range<usize>,
}

/// What never shares a chunk with another part.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) heading_path: Arc<[String]>,
    /// Title and headings; put before each chunk of the part.
    pub(super) context: TextId,
    pub(super) kind: PartKind,
}

#[derive(Debug)]
pub(super) enum PartKind {
    /// A heading. It becomes a chunk of its own only when no chunk's context holds it whole.
    Heading { text: TextId, whole_in_path: bool, source: Option<Source> },
    /// A run of paragraphs, list items and code; the offset where each begins, and its place.
    Run { text: TextId, blocks: Vec<(usize, Option<Source>)> },
    /// A table.
    Table {
        caption: Option<TextId>,
        header: Option<TextId>,
        rows: Vec<(TextId, Option<Source>)>,
        source: Option<Source>,
    },
}

impl Plan {
    pub(super) fn new(document: &Document) -> Self {
        let mut plan = Self::default();
        let mut run = Run::default();
        let mut context: Option<(Arc<[String]>, TextId)> = None;
        for block in &document.blocks {
            let path = &block.heading_path;
            let context_id = match &context {
                Some((of, id)) if of == path => *id,
                _ => {
                    plan.end_run(&mut run);
                    let id = plan.add_text(context_line(&document.title, path));
                    context = Some((path.clone(), id));
                    id
                }
            };
            let (text, separator) = match &block.kind {
                BlockKind::Paragraph(text) | BlockKind::Code { text, .. } => (text, "\n\n"),
                BlockKind::ListItem(text) => (text, "\n"),
                BlockKind::Heading { text, .. } => {
                    plan.end_run(&mut run);
                    let whole_in_path = path.last().is_some_and(|crumb| crumb == text);
                    let kind = PartKind::Heading {
                        text: plan.add_text(text.clone()),
                        whole_in_path,
                        source: block.source,
                    };
                    plan.parts.push(Part { heading_path: path.clone(), context: context_id, kind });
                    continue;
                }
                BlockKind::Table(table) => {
                    plan.end_run(&mut run);
                    let kind = plan.table(table, block.source);
                    plan.parts.push(Part { heading_path: path.clone(), context: context_id, kind });
                    continue;
                }
            };
            if !run.text.is_empty() {
                run.text.push_str(separator);
            }
            run.blocks.push((run.text.len(), block.source));
            run.text.push_str(text);
            run.place = Some((path.clone(), context_id));
        }
        plan.end_run(&mut run);
        plan
    }

    fn end_run(&mut self, run: &mut Run) {
        let Run { text, blocks, place } = std::mem::take(run);
        if let Some((heading_path, context)) = place {
            let text = self.add_text(text);
            self.parts.push(Part { heading_path, context, kind: PartKind::Run { text, blocks } });
        }
    }

    fn table(&mut self, table: &Table, source: Option<Source>) -> PartKind {
        let caption = table.caption.as_ref().map(|caption| self.add_text(caption.clone()));
        let header = (!table.header.is_empty()).then(|| self.add_text(row_line(&table.header)));
        let rows = table.rows.iter().map(|row| (self.add_text(row_line(&row.cells)), row.source)).collect();
        PartKind::Table { caption, header, rows, source }
    }

    fn add_text(&mut self, text: String) -> TextId {
        let id = self.texts.len();
        let mut start = 0;
        while start < text.len() {
            let end = piece_end(&text, start);
            self.pieces.push(Piece { text: id, bytes: start..end });
            start = end;
        }
        self.texts.push(text);
        id
    }
}

#[derive(Default)]
struct Run {
    text: String,
    blocks: Vec<(usize, Option<Source>)>,
    place: Option<(Arc<[String]>, TextId)>,
}

/// The end of the piece that begins at `start`: after the last white space that fits, else a character boundary.
fn piece_end(text: &str, start: usize) -> usize {
    if text.len() - start <= TOKENIZE_PIECE_BYTES {
        return text.len();
    }
    let mut limit = start + TOKENIZE_PIECE_BYTES;
    while !text.is_char_boundary(limit) {
        limit -= 1;
    }
    text[start..limit].rfind(char::is_whitespace).filter(|at| *at > 0).map_or(limit, |at| start + at)
}

/// "Title > Section > Subsection", the title left out where it is the first heading.
pub(crate) fn context_line(title: &str, path: &[String]) -> String {
    let title = (path.first().is_none_or(|first| first != title) && !title.is_empty()).then_some(title);
    title.into_iter().chain(path.iter().map(String::as_str)).collect::<Vec<_>>().join(" > ")
}

/// A row as one line, cells between bars, empty cells at its end left out.
fn row_line(cells: &[String]) -> String {
    let used = cells.iter().rposition(|cell| !cell.is_empty()).map_or(0, |last| last + 1);
    cells[..used].join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn context_names_the_title_once() {
        assert_eq!(context_line("A", &["A".to_owned(), "B".to_owned()]), "A > B");
        assert_eq!(context_line("T", &["A".to_owned()]), "T > A");
        assert_eq!(context_line("T", &[]), "T");
    }

    #[test]
    fn rows_drop_only_trailing_empty_cells() {
        assert_eq!(row_line(&["".to_owned(), "b".to_owned(), String::new()]), " | b");
    }

    proptest! {
        #[test]
        fn pieces_cover_a_text_in_order(word in "[a-z\u{e9}\u{1F980}]{1,9}", gap in "[ \n]{0,1}", times in 0_usize..3000) {
            let mut plan = Plan::default();
            plan.add_text(format!("{word}{gap}").repeat(times));
            let text = &plan.texts[0];
            let mut at = 0;
            for piece in &plan.pieces {
                prop_assert_eq!(piece.bytes.start, at);
                prop_assert!(piece.bytes.len() <= TOKENIZE_PIECE_BYTES && !piece.bytes.is_empty());
                prop_assert!(text.is_char_boundary(piece.bytes.end));
                at = piece.bytes.end;
            }
            prop_assert_eq!(at, text.len());
        }
    }
}

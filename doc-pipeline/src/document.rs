//! The one shape that every format is parsed into, and the builder that counts the limits. No format lives here.

use std::path::Path;
use std::sync::Arc;

use crate::limits::{
    BLOCKS_MAX, CRUMB_BYTES_MAX, TABLE_CELLS_MAX, TABLE_COLUMNS_MAX, TABLE_ROWS_MAX, TITLE_BYTES_MAX,
};
use crate::parse::ParseError;

/// A document format, known by the file's extension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `.md`, `.markdown`
    Markdown,
    /// `.txt`
    Text,
    /// `.html`, `.htm`
    Html,
    /// `.csv`: comma, semicolon or tab, found by looking
    Csv,
    /// `.tsv`: tab
    Tsv,
}

impl Format {
    /// The extensions that are known, in lower case.
    pub const EXTENSIONS: [&str; 7] = ["md", "markdown", "txt", "html", "htm", "csv", "tsv"];

    /// The format of a path by its extension, `None` when it has another one or none.
    pub fn of_path(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "md" | "markdown" => Some(Self::Markdown),
            "txt" => Some(Self::Text),
            "html" | "htm" => Some(Self::Html),
            "csv" => Some(Self::Csv),
            "tsv" => Some(Self::Tsv),
            _ => None,
        }
    }
}

/// A parsed document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The title: the format's own (front matter, `<title>`, first heading), else the file's stem.
    pub title: String,
    /// The blocks in reading order.
    pub blocks: Vec<Block>,
}

/// One block of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The headings that this block stands under, outermost first; a heading's own path includes itself. Each is
    /// cut to [`CRUMB_BYTES_MAX`].
    pub heading_path: Arc<[String]>,
    /// Where it came from, when the format tells (HTML does not).
    pub source: Option<Source>,
    /// What it is.
    pub kind: BlockKind,
}

/// The place of a block in the decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// First line, counted from 1.
    pub first_line: u32,
    /// Last line, inclusive.
    pub last_line: u32,
    /// First byte of the decoded UTF-8 text, byte order mark removed.
    pub start_byte: u64,
    /// One past the last byte.
    pub end_byte: u64,
}

impl Source {
    /// The smallest range that holds both.
    #[must_use]
    pub fn join(self, other: Self) -> Self {
        Self {
            first_line: self.first_line.min(other.first_line),
            last_line: self.last_line.max(other.last_line),
            start_byte: self.start_byte.min(other.start_byte),
            end_byte: self.end_byte.max(other.end_byte),
        }
    }
}

/// What a block is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BlockKind {
    /// A heading of level 1 to 6.
    Heading {
        /// 1 is the outermost.
        level: u8,
        /// Its whole text.
        text: String,
    },
    /// Running text.
    Paragraph(String),
    /// A code block.
    Code {
        /// The language that the document names.
        language: Option<String>,
        /// The code as written.
        text: String,
    },
    /// One item of a list, with its number when the list is ordered.
    ListItem(String),
    /// A table.
    Table(Table),
}

/// A table: never split but between rows, never mixed with other text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// What the document calls it.
    pub caption: Option<String>,
    /// Names of the columns; empty when the table has none.
    pub header: Vec<String>,
    /// The rows; they may be ragged.
    pub rows: Vec<TableRow>,
}

/// A row of a table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TableRow {
    /// The cells, line breaks already turned to spaces.
    pub cells: Vec<String>,
    /// Where the row came from, when the format tells.
    pub source: Option<Source>,
}

/// Collects blocks, keeps the heading path, counts every limit.
#[derive(Debug)]
pub(crate) struct Builder {
    pub(crate) blocks: Vec<Block>,
    pub(crate) title: Option<String>,
    path: Arc<[String]>,
    stack: Vec<(u8, String)>,
    cells: usize,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self { blocks: Vec::new(), title: None, path: Arc::from([]), stack: Vec::new(), cells: 0 }
    }

    fn push(&mut self, kind: BlockKind, source: Option<Source>) -> Result<(), ParseError> {
        if self.blocks.len() >= BLOCKS_MAX {
            return Err(ParseError::limit("blocks", BLOCKS_MAX, "BLOCKS_MAX"));
        }
        self.blocks.push(Block { heading_path: self.path.clone(), source, kind });
        Ok(())
    }

    /// A heading: closes those of its level and below. An empty one is dropped.
    pub(crate) fn heading(
        &mut self,
        level: u8,
        text: &str,
        source: Option<Source>,
    ) -> Result<(), ParseError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(());
        }
        let level = level.clamp(1, 6);
        while self.stack.last().is_some_and(|(open, _)| *open >= level) {
            self.stack.pop();
        }
        self.stack.push((level, cut(text, CRUMB_BYTES_MAX).to_owned()));
        self.path = self.stack.iter().map(|(_, text)| text.clone()).collect();
        if self.title.is_none() {
            self.title = Some(text.to_owned());
        }
        self.push(BlockKind::Heading { level, text: text.to_owned() }, source)
    }

    /// Running text or a list item; an empty one is dropped.
    pub(crate) fn text(&mut self, text: &str, item: bool, source: Option<Source>) -> Result<(), ParseError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(());
        }
        let text = text.to_owned();
        self.push(if item { BlockKind::ListItem(text) } else { BlockKind::Paragraph(text) }, source)
    }

    /// A code block; an empty one is dropped.
    pub(crate) fn code(
        &mut self,
        language: Option<String>,
        text: &str,
        source: Option<Source>,
    ) -> Result<(), ParseError> {
        let text = text.trim_end().trim_start_matches(['\n', '\r']);
        if text.trim().is_empty() {
            return Ok(());
        }
        self.push(BlockKind::Code { language, text: text.to_owned() }, source)
    }

    /// Counts the cells of one more row; to be called before the row is made.
    pub(crate) fn count_row(&mut self, rows_so_far: usize, columns: usize) -> Result<(), ParseError> {
        if columns > TABLE_COLUMNS_MAX {
            return Err(ParseError::limit("columns in a table", TABLE_COLUMNS_MAX, "TABLE_COLUMNS_MAX"));
        }
        if rows_so_far >= TABLE_ROWS_MAX {
            return Err(ParseError::limit("rows in a table", TABLE_ROWS_MAX, "TABLE_ROWS_MAX"));
        }
        self.cells += columns;
        if self.cells > TABLE_CELLS_MAX {
            return Err(ParseError::limit("table cells", TABLE_CELLS_MAX, "TABLE_CELLS_MAX"));
        }
        Ok(())
    }

    /// A table; empty rows are dropped, and so is a table without any text.
    pub(crate) fn table(&mut self, mut table: Table, source: Option<Source>) -> Result<(), ParseError> {
        table.rows.retain(|row| row.cells.iter().any(|cell| !cell.is_empty()));
        if table.header.iter().all(String::is_empty) {
            table.header.clear();
        }
        table.caption = table.caption.filter(|caption| !caption.is_empty());
        if table.rows.is_empty() && table.header.is_empty() && table.caption.is_none() {
            return Ok(());
        }
        self.push(BlockKind::Table(table), source)
    }

    /// The document, titled by what the format gave or else by `fallback_title`.
    pub(crate) fn finish(self, fallback_title: &str) -> Document {
        let title = self.title.as_deref().map(str::trim).filter(|title| !title.is_empty());
        let title = cut(title.unwrap_or(fallback_title), TITLE_BYTES_MAX).to_owned();
        Document { title, blocks: self.blocks }
    }
}

/// Counts lines up to ascending byte offsets without an index of all lines.
#[derive(Debug)]
pub(crate) struct LineCursor<'a> {
    text: &'a str,
    byte: usize,
    line: u32,
}

impl<'a> LineCursor<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, byte: 0, line: 1 }
    }

    fn line_at(&mut self, byte: usize) -> u32 {
        let byte = byte.min(self.text.len());
        if byte < self.byte {
            (self.byte, self.line) = (0, 1);
        }
        let newlines = self.text.as_bytes()[self.byte..byte].iter().filter(|b| **b == b'\n').count();
        self.line = self.line.saturating_add(u32::try_from(newlines).unwrap_or(u32::MAX));
        self.byte = byte;
        self.line
    }

    /// The source of a byte range, trailing white space left out.
    pub(crate) fn source(&mut self, range: std::ops::Range<usize>) -> Source {
        let end = range.end.min(self.text.len());
        let start = range.start.min(end);
        let trimmed = self.text.get(start..end).map_or(end, |part| start + part.trim_end().len());
        let first_line = self.line_at(start);
        let last_line = self.line_at(trimmed);
        // The next block starts at or after this one's start: counting goes on from there.
        (self.byte, self.line) = (start, first_line);
        Source { first_line, last_line, start_byte: start as u64, end_byte: trimmed as u64 }
    }
}

/// The longest prefix of at most `bytes_max` bytes that ends on a character boundary.
pub(crate) fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let mut end = bytes_max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].trim_end()
}

/// `text` with every run of white space turned to one space, ends trimmed.
pub(crate) fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heading_path_follows_levels() {
        let mut builder = Builder::new();
        for (level, text) in [(1, "A"), (2, "B"), (3, "C"), (2, "D")] {
            builder.heading(level, text, None).expect("within limits");
        }
        builder.text("x", false, None).expect("within limits");
        let document = builder.finish("stem");
        assert_eq!(document.title, "A");
        assert_eq!(&*document.blocks[2].heading_path, ["A", "B", "C"]);
        assert_eq!(&*document.blocks[4].heading_path, ["A", "D"]);
    }

    #[test]
    fn limits_are_errors_that_name_themselves() {
        let mut builder = Builder::new();
        let error = builder.count_row(0, TABLE_COLUMNS_MAX + 1).expect_err("over the limit");
        assert!(error.to_string().contains("TABLE_COLUMNS_MAX"));
        let error = builder.count_row(TABLE_ROWS_MAX, 1).expect_err("over the limit");
        assert!(error.to_string().contains("TABLE_ROWS_MAX"));
        builder.blocks = vec![
            Block {
                heading_path: Arc::from([]),
                source: None,
                kind: BlockKind::Paragraph(String::new())
            };
            BLOCKS_MAX
        ];
        assert!(
            builder.text("x", false, None).expect_err("over the limit").to_string().contains("BLOCKS_MAX")
        );
    }

    #[test]
    fn cutting_keeps_characters_whole() {
        assert_eq!(cut("aéb", 2), "a");
        assert_eq!(cut("aéb", 3), "aé");
        assert_eq!(cut("abc", 9), "abc");
    }

    #[test]
    fn lines_are_counted_from_one() {
        let text = "a\nb\n\nc\n";
        let mut cursor = LineCursor::new(text);
        assert_eq!(cursor.source(0..4).last_line, 2);
        let source = cursor.source(5..7);
        assert_eq!((source.first_line, source.last_line, source.end_byte), (4, 4, 6));
    }
}

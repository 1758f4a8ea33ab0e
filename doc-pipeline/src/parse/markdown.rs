//! Markdown with tables and front matter: pulldown-cmark's events to blocks. Inline markup is dropped, its text kept.

use std::collections::HashSet;
use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use super::{ParseError, html};
use crate::document::{BlockKind, Builder, LineCursor, Source, Table, TableRow, one_line};
use crate::limits::{CAPTION_BYTES_MAX, NESTING_MAX};

pub(super) fn parse(text: &str, builder: &mut Builder) -> Result<(), ParseError> {
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_TASKLISTS
        | Options::ENABLE_FOOTNOTES
        | Options::ENABLE_HEADING_ATTRIBUTES
        | Options::ENABLE_YAML_STYLE_METADATA_BLOCKS;
    let mut state = State {
        builder,
        lines: LineCursor::new(text),
        inline: String::new(),
        inline_range: None,
        depth: 0,
        items: Vec::new(),
        lists: Vec::new(),
        collecting: Collecting::Inline,
        table: Table::default(),
        row: Vec::new(),
        emphasis_depth: 0,
        emphasis_end: None,
        emphasised: HashSet::new(),
        front_title: None,
    };
    for (event, range) in Parser::new_ext(text, options).into_offset_iter() {
        state.event(event, range)?;
    }
    state.flush()?;
    let (emphasised, front_title) = (std::mem::take(&mut state.emphasised), state.front_title.take());
    if front_title.is_some() {
        builder.title = front_title;
    }
    attach_captions(builder, &emphasised);
    Ok(())
}

/// Where text events go.
#[derive(PartialEq, Eq)]
enum Collecting {
    Inline,
    Code(Option<String>),
    Html,
    FrontMatter,
}

struct State<'a, 'b> {
    builder: &'b mut Builder,
    lines: LineCursor<'a>,
    inline: String,
    inline_range: Option<Range<usize>>,
    depth: usize,
    /// One entry for each open list item: its number when ordered, taken by its first text.
    items: Vec<Option<u64>>,
    lists: Vec<Option<u64>>,
    collecting: Collecting,
    table: Table,
    row: Vec<String>,
    emphasis_depth: usize,
    /// Length of the paragraph's text when emphasis that began at its start ended.
    emphasis_end: Option<usize>,
    /// Blocks that are paragraphs of emphasised text only: captions, when a table follows.
    emphasised: HashSet<usize>,
    front_title: Option<String>,
}

impl State<'_, '_> {
    fn event(&mut self, event: Event<'_>, range: Range<usize>) -> Result<(), ParseError> {
        match event {
            Event::Start(tag) => {
                self.depth += 1;
                if self.depth > NESTING_MAX {
                    return Err(ParseError::limit("levels of nesting", NESTING_MAX, "NESTING_MAX"));
                }
                self.start(tag, range)
            }
            Event::End(tag) => {
                self.depth = self.depth.saturating_sub(1);
                self.end(tag, range)
            }
            Event::Text(text) | Event::Code(text) | Event::InlineMath(text) | Event::DisplayMath(text) => {
                self.push_text(&text, range);
                Ok(())
            }
            Event::Html(text) => {
                self.push_text(&text, range);
                Ok(())
            }
            Event::InlineHtml(tag) => {
                if tag.to_ascii_lowercase().starts_with("<br") {
                    self.push_text(" ", range);
                }
                Ok(())
            }
            Event::FootnoteReference(label) => {
                self.push_text(&format!("[{label}]"), range);
                Ok(())
            }
            Event::SoftBreak => {
                self.push_text(" ", range);
                Ok(())
            }
            Event::HardBreak => {
                self.push_text("\n", range);
                Ok(())
            }
            Event::TaskListMarker(done) => {
                self.push_text(if done { "[x] " } else { "[ ] " }, range);
                Ok(())
            }
            Event::Rule => self.flush(),
        }
    }

    fn push_text(&mut self, text: &str, range: Range<usize>) {
        self.inline.push_str(text);
        self.inline_range = Some(match self.inline_range.take() {
            Some(open) => open.start.min(range.start)..open.end.max(range.end),
            None => range,
        });
    }

    fn start(&mut self, tag: Tag<'_>, range: Range<usize>) -> Result<(), ParseError> {
        match tag {
            Tag::Emphasis | Tag::Strong => {
                if self.emphasis_depth == 0 && self.inline.is_empty() {
                    self.emphasis_end = Some(usize::MAX);
                }
                self.emphasis_depth += 1;
            }
            Tag::Strikethrough | Tag::Superscript | Tag::Subscript | Tag::Link { .. } | Tag::Image { .. } => {
            }
            Tag::TableHead | Tag::TableRow => self.row.clear(),
            Tag::TableCell => self.inline.clear(),
            Tag::Table(_) => {
                self.flush()?;
                self.table = Table::default();
            }
            Tag::List(first) => {
                self.flush()?;
                self.lists.push(first);
            }
            Tag::Item => {
                self.flush()?;
                let number = self.lists.last_mut().and_then(|list| {
                    let number = *list;
                    *list = list.map(|number| number.saturating_add(1));
                    number
                });
                self.items.push(number);
            }
            Tag::CodeBlock(kind) => {
                self.flush()?;
                let language = match kind {
                    CodeBlockKind::Fenced(info) => info.split_whitespace().next().map(str::to_owned),
                    CodeBlockKind::Indented => None,
                };
                self.collecting = Collecting::Code(language);
            }
            Tag::HtmlBlock => {
                self.flush()?;
                self.collecting = Collecting::Html;
            }
            Tag::MetadataBlock(_) => {
                self.flush()?;
                self.collecting = Collecting::FrontMatter;
            }
            _ => {
                self.flush()?;
                self.emphasis_end = None;
                // The element's own range, so that a block's place covers its markup too.
                self.inline_range = matches!(tag, Tag::Paragraph | Tag::Heading { .. }).then_some(range);
            }
        }
        Ok(())
    }

    fn end(&mut self, tag: TagEnd, range: Range<usize>) -> Result<(), ParseError> {
        match tag {
            TagEnd::Emphasis | TagEnd::Strong => {
                self.emphasis_depth = self.emphasis_depth.saturating_sub(1);
                if self.emphasis_depth == 0 && self.emphasis_end == Some(usize::MAX) {
                    self.emphasis_end = Some(self.inline.len());
                }
            }
            TagEnd::Strikethrough
            | TagEnd::Superscript
            | TagEnd::Subscript
            | TagEnd::Link
            | TagEnd::Image => {}
            TagEnd::Heading(level) => {
                let source = self.take_source(range);
                let text = one_line(&std::mem::take(&mut self.inline));
                self.builder.heading(level as u8, &text, Some(source))?;
            }
            TagEnd::TableCell => {
                let cell = one_line(&std::mem::take(&mut self.inline));
                self.inline_range = None;
                self.row.push(cell);
            }
            TagEnd::TableHead => {
                self.builder.count_row(0, self.row.len())?;
                self.table.header = std::mem::take(&mut self.row);
            }
            TagEnd::TableRow => {
                self.builder.count_row(self.table.rows.len(), self.row.len())?;
                let source = Some(self.lines.source(range));
                self.table.rows.push(TableRow { cells: std::mem::take(&mut self.row), source });
            }
            TagEnd::Table => {
                let source = Some(self.lines.source(range));
                let table = std::mem::take(&mut self.table);
                self.builder.table(table, source)?;
            }
            TagEnd::List(_) => {
                self.flush()?;
                self.lists.pop();
            }
            TagEnd::Item => {
                self.flush()?;
                self.items.pop();
            }
            TagEnd::CodeBlock | TagEnd::HtmlBlock | TagEnd::MetadataBlock(_) => {
                let source = Some(self.take_source(range));
                let text = std::mem::take(&mut self.inline);
                match std::mem::replace(&mut self.collecting, Collecting::Inline) {
                    Collecting::Code(language) => self.builder.code(language, &text, source)?,
                    Collecting::Html => html::append(&text, source, self.builder)?,
                    Collecting::FrontMatter => {
                        self.front_title = front_matter_title(&text);
                        self.builder.code(Some("yaml".to_owned()), &text, source)?;
                    }
                    Collecting::Inline => {}
                }
            }
            _ => self.flush()?,
        }
        Ok(())
    }

    fn take_source(&mut self, range: Range<usize>) -> Source {
        self.inline_range = None;
        self.lines.source(range)
    }

    /// Ends the open paragraph or list item, if there is one.
    fn flush(&mut self) -> Result<(), ParseError> {
        let text = std::mem::take(&mut self.inline);
        let range = self.inline_range.take();
        let emphasis_end = self.emphasis_end.take();
        self.emphasis_depth = 0;
        if text.trim().is_empty() {
            return Ok(());
        }
        let source = range.map(|range| self.lines.source(range));
        let is_item = !self.items.is_empty();
        let number = self.items.last_mut().and_then(Option::take);
        let numbered = number.map(|number| format!("{number}. {}", text.trim()));
        let before = self.builder.blocks.len();
        self.builder.text(numbered.as_deref().unwrap_or(&text), is_item, source)?;
        if !is_item && emphasis_end == Some(text.len()) {
            self.emphasised.insert(before);
        }
        Ok(())
    }
}

/// `title: …` of YAML front matter, quotes removed.
fn front_matter_title(yaml: &str) -> Option<String> {
    let line = yaml.lines().find_map(|line| line.strip_prefix("title:"))?;
    let title = line.trim().trim_matches(['"', '\'']).trim();
    (!title.is_empty()).then(|| title.to_owned())
}

/// A paragraph directly before a table is its caption when it is all emphasised or begins with "Table"; one
/// directly after it when it begins with "Table" and does not stand directly before another table.
fn attach_captions(builder: &mut Builder, emphasised: &HashSet<usize>) {
    let blocks = &builder.blocks;
    let is_table = |at: usize| blocks.get(at).is_some_and(|block| matches!(block.kind, BlockKind::Table(_)));
    let paragraph = |at: usize| match blocks.get(at).map(|block| &block.kind) {
        Some(BlockKind::Paragraph(text)) if text.len() <= CAPTION_BYTES_MAX => Some(text.as_str()),
        _ => None,
    };
    let mut captions: Vec<(usize, usize)> = Vec::new();
    let mut taken = HashSet::new();
    for at in (0..blocks.len()).filter(|at| is_table(*at)) {
        if let BlockKind::Table(Table { caption: Some(_), .. }) = &blocks[at].kind {
            continue;
        }
        let same_section = |other: usize| blocks[other].heading_path == blocks[at].heading_path;
        let before = at.checked_sub(1).filter(|before| {
            !taken.contains(before)
                && same_section(*before)
                && paragraph(*before)
                    .is_some_and(|text| emphasised.contains(before) || begins_with_table(text))
        });
        let after = Some(at + 1).filter(|after| {
            paragraph(*after).is_some_and(begins_with_table) && same_section(*after) && !is_table(after + 1)
        });
        if let Some(caption) = before.or(after) {
            taken.insert(caption);
            captions.push((at, caption));
        }
    }
    for (table_at, caption_at) in captions {
        let caption = match &builder.blocks[caption_at].kind {
            BlockKind::Paragraph(text) => one_line(text),
            _ => continue,
        };
        let caption_source = builder.blocks[caption_at].source;
        let block = &mut builder.blocks[table_at];
        block.source = match (block.source, caption_source) {
            (Some(table), Some(caption)) => Some(table.join(caption)),
            (table, _) => table,
        };
        if let BlockKind::Table(table) = &mut block.kind {
            table.caption = Some(caption);
        }
    }
    let mut at = 0;
    builder.blocks.retain(|_| {
        at += 1;
        !taken.contains(&(at - 1))
    });
}

fn begins_with_table(text: &str) -> bool {
    let Some((word, rest)) = text.trim_start().split_at_checked("table".len()) else {
        return false;
    };
    word.eq_ignore_ascii_case("table")
        && rest.trim_start().starts_with(|next: char| next.is_ascii_digit() || ".:–—-".contains(next))
}

#[cfg(test)]
mod tests {
    use super::begins_with_table;
    use crate::document::{Block, BlockKind, Document, Format, Table};
    use crate::parse::{ParseError, parse};
    use proptest::prelude::*;

    fn document(text: &str) -> Document {
        parse(Format::Markdown, text, "stem").expect("parses")
    }

    fn table(block: &Block) -> &Table {
        match &block.kind {
            BlockKind::Table(table) => table,
            other => panic!("expected a table, got {other:?}"),
        }
    }

    #[test]
    fn blocks_of_a_manual() {
        let text = "---\ntitle: \"Pump manual\"\n---\n# Intro\n\nSome *text* with `code` and\na [link](http://x).\n\n\
                    ## Steps\n\n1. First\n2. Second\n   - nested\n\n```sh\nls -l\n```\n> quoted\n";
        let document = document(text);
        assert_eq!(document.title, "Pump manual");
        let blocks: Vec<_> = document.blocks.iter().map(|block| block.kind.clone()).collect();
        assert_eq!(blocks[2], BlockKind::Paragraph("Some text with code and a link.".into()));
        assert_eq!(blocks[4], BlockKind::ListItem("1. First".into()));
        assert_eq!(blocks[5], BlockKind::ListItem("2. Second".into()));
        assert_eq!(blocks[6], BlockKind::ListItem("nested".into()));
        assert_eq!(blocks[7], BlockKind::Code { language: Some("sh".into()), text: "ls -l".into() });
        assert_eq!(blocks[8], BlockKind::Paragraph("quoted".into()));
        assert_eq!(&*document.blocks[8].heading_path, ["Intro", "Steps"]);
        let source = document.blocks[2].source.expect("markdown knows its lines");
        assert_eq!((source.first_line, source.last_line), (6, 7));
    }

    #[test]
    fn captions_before_and_after() {
        let text = "**Noise by model**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nTable 2: prices\n\n| c |\n|---|\n| 3 |\n\n\
                    # Next\n\n| d |\n|---|\n| **4** |\n\nTable 3. Last\n\n**Not a caption**\n";
        let document = document(text);
        let tables: Vec<_> =
            document.blocks.iter().filter(|b| matches!(b.kind, BlockKind::Table(_))).map(table).collect();
        let captions: Vec<_> = tables.iter().map(|table| table.caption.as_deref()).collect();
        assert_eq!(captions, [Some("Noise by model"), Some("Table 2: prices"), Some("Table 3. Last")]);
        assert_eq!(tables[0].header, ["a", "b"]);
        assert_eq!(tables[2].rows[0].cells, ["4"]);
        assert!(document.blocks.iter().any(|b| b.kind == BlockKind::Paragraph("Not a caption".into())));
        assert_eq!(table(&document.blocks[0]).rows[0].source.map(|source| source.first_line), Some(5));
    }

    #[test]
    fn a_caption_stays_in_its_section() {
        let document = document("Table 1: far\n\n# Next\n\n| a |\n|---|\n| 1 |\n");
        assert_eq!(table(&document.blocks[2]).caption, None);
        assert!(begins_with_table("table 3") && begins_with_table("Table: x"));
        assert!(!begins_with_table("Tables are here") && !begins_with_table("Table tennis"));
    }

    #[test]
    fn html_blocks_keep_their_tables() {
        let text = "# Parts\n\n<table><caption>Spares</caption><tr><th>No</th></tr><tr><td>17</td></tr></table>\n\nend\n";
        let document = document(text);
        let table = table(&document.blocks[1]);
        assert_eq!(table.caption.as_deref(), Some("Spares"));
        assert_eq!(&*document.blocks[1].heading_path, ["Parts"]);
    }

    #[test]
    fn absurd_nesting_is_an_error() {
        let text = format!("{} x", ">".repeat(2_000));
        assert!(matches!(
            parse(Format::Markdown, &text, "s"),
            Err(ParseError::Limit { name: "NESTING_MAX", .. })
        ));
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[-a-z#*_>`|~<>/!\\[\\]():=.0-9 \t\n\r\u{e9}]{0,300}|\\PC*") {
            let _ = parse(Format::Markdown, &text, "stem");
        }

        #[test]
        fn fragments_in_any_order_never_panic(parts in proptest::collection::vec(proptest::sample::select(vec![
            "# h\n", "\n\n", "| a | b |\n|---|---|\n", "| 1 |\n", "**bold**\n", "- item\n", "  1. sub\n", "```\n",
            "<table>", "<td colspan=9>", "</table>\n", "> ", "---\n", "text ", "[^1]", "[^1]: note\n", "    code\n",
            "Table 1: x\n", "é🦀",
        ]), 0..60)) {
            let _ = parse(Format::Markdown, &parts.concat(), "stem");
        }
    }
}

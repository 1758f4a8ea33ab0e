//! HTML to blocks: text by block elements, tables as tables, scripts, styles and navigation left out.

use ego_tree::iter::Edge;
use scraper::{ElementRef, Html, Node};

use super::{ParseError, html_depth};
use crate::document::{Builder, Source, Table, TableRow, one_line};
use crate::limits::{NESTING_MAX, SPAN_TEXT_BYTES_MAX, TABLE_COLUMNS_MAX, TABLE_ROWS_MAX};

/// Elements whose content is not the document's text.
const SKIPPED: [&str; 15] = [
    "script", "style", "nav", "template", "noscript", "svg", "math", "iframe", "object", "canvas", "audio",
    "video", "select", "textarea", "button",
];
/// Elements that end the paragraph before them and after them.
const BLOCKS: [&str; 31] = [
    "p",
    "div",
    "section",
    "article",
    "main",
    "aside",
    "header",
    "footer",
    "blockquote",
    "figure",
    "figcaption",
    "ul",
    "ol",
    "dl",
    "dd",
    "dt",
    "address",
    "details",
    "summary",
    "fieldset",
    "form",
    "hr",
    "body",
    "html",
    "head",
    "table",
    "tbody",
    "thead",
    "tr",
    "td",
    "th",
];

/// Parses a whole HTML document.
pub(super) fn parse(text: &str, builder: &mut Builder) -> Result<(), ParseError> {
    html_depth::check(text)?;
    let html = Html::parse_document(text);
    let mut title = None;
    walk(&html, None, builder, &mut title)?;
    if let Some(title) = title.filter(|title| !title.is_empty()) {
        builder.title = Some(title);
    }
    Ok(())
}

/// Appends the blocks of an HTML fragment that stands inside another format.
pub(super) fn append(text: &str, source: Option<Source>, builder: &mut Builder) -> Result<(), ParseError> {
    html_depth::check(text)?;
    let html = Html::parse_fragment(text);
    walk(&html, source, builder, &mut None)
}

fn heading_level(name: &str) -> Option<u8> {
    match name.as_bytes() {
        [b'h', level @ b'1'..=b'6'] => Some(level - b'0'),
        _ => None,
    }
}

fn walk(
    html: &Html,
    source: Option<Source>,
    builder: &mut Builder,
    title: &mut Option<String>,
) -> Result<(), ParseError> {
    let mut walker =
        Walker { builder, source, inline: String::new(), pre: 0, lists: Vec::new(), items: Vec::new() };
    let mut depth = 0_usize;
    // While set, everything down to the close of the element at this depth is passed over.
    let mut skip_depth: Option<usize> = None;
    for edge in html.tree.root().traverse() {
        match edge {
            Edge::Open(node) => {
                depth += 1;
                if depth > NESTING_MAX {
                    return Err(ParseError::limit("levels of nesting", NESTING_MAX, "NESTING_MAX"));
                }
                if skip_depth.is_some() {
                    continue;
                }
                match node.value() {
                    Node::Text(text) => walker.text(text),
                    Node::Element(element) => {
                        let name = element.name();
                        if SKIPPED.contains(&name) {
                            skip_depth = Some(depth);
                        } else if name == "title" {
                            if let Some(element) = ElementRef::wrap(node) {
                                title.get_or_insert_with(|| one_line(&element.text().collect::<String>()));
                            }
                            skip_depth = Some(depth);
                        } else if let Some(table) =
                            ElementRef::wrap(node).filter(|_| name == "table").filter(|table| is_data(*table))
                        {
                            walker.flush()?;
                            let table = read_table(table, walker.builder)?;
                            walker.builder.table(table, source)?;
                            skip_depth = Some(depth);
                        } else {
                            walker.open(name, element.attr("alt"), element.attr("start"))?;
                        }
                    }
                    _ => {}
                }
            }
            Edge::Close(node) => {
                if skip_depth == Some(depth) {
                    skip_depth = None;
                } else if skip_depth.is_none()
                    && let Node::Element(element) = node.value()
                {
                    walker.close(element.name())?;
                }
                depth = depth.saturating_sub(1);
            }
        }
    }
    walker.flush()
}

struct Walker<'b> {
    builder: &'b mut Builder,
    source: Option<Source>,
    inline: String,
    pre: usize,
    /// Next number of each open list; `None` for an unordered one.
    lists: Vec<Option<u64>>,
    /// Number of each open item, taken by its first text.
    items: Vec<Option<u64>>,
}

impl Walker<'_> {
    fn text(&mut self, text: &str) {
        if self.pre > 0 {
            self.inline.push_str(text);
            return;
        }
        push_collapsed(&mut self.inline, text);
    }

    fn open(&mut self, name: &str, alt: Option<&str>, start: Option<&str>) -> Result<(), ParseError> {
        match name {
            "br" if self.pre > 0 => self.inline.push('\n'),
            "br" => self.text(" "),
            "img" => self.text(alt.unwrap_or_default()),
            "pre" => {
                self.flush()?;
                self.pre += 1;
            }
            "ol" | "ul" => {
                self.flush()?;
                let first = start.and_then(|start| start.parse().ok()).unwrap_or(1);
                self.lists.push((name == "ol").then_some(first));
            }
            "li" => {
                self.flush()?;
                let number = self.lists.last_mut().and_then(|list| {
                    let number = *list;
                    *list = list.map(|number| number.saturating_add(1));
                    number
                });
                self.items.push(number);
            }
            _ if BLOCKS.contains(&name) || heading_level(name).is_some() => self.flush()?,
            _ => {}
        }
        Ok(())
    }

    fn close(&mut self, name: &str) -> Result<(), ParseError> {
        match name {
            "pre" => {
                let text = std::mem::take(&mut self.inline);
                self.pre = self.pre.saturating_sub(1);
                self.builder.code(None, &text, self.source)?;
            }
            "ol" | "ul" => {
                self.flush()?;
                self.lists.pop();
            }
            "li" => {
                self.flush()?;
                self.items.pop();
            }
            _ => {
                if let Some(level) = heading_level(name) {
                    let text = std::mem::take(&mut self.inline);
                    self.builder.heading(level, &one_line(&text), self.source)?;
                } else if BLOCKS.contains(&name) {
                    self.flush()?;
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ParseError> {
        let text = std::mem::take(&mut self.inline);
        if text.trim().is_empty() {
            return Ok(());
        }
        let number = self.items.last_mut().and_then(Option::take);
        let numbered = number.map(|number| format!("{number}. {}", text.trim()));
        self.builder.text(numbered.as_deref().unwrap_or(&text), !self.items.is_empty(), self.source)
    }
}

/// Appends `text` with runs of white space as one space, also across calls.
fn push_collapsed(out: &mut String, text: &str) {
    for character in text.chars() {
        if !character.is_whitespace() {
            out.push(character);
        } else if !out.is_empty() && !out.ends_with(' ') {
            out.push(' ');
        }
    }
}

/// Whether a table holds data. One with headings or tables inside, or that says so, only arranges the page.
fn is_data(table: ElementRef<'_>) -> bool {
    if table.attr("role").is_some_and(|role| role == "presentation" || role == "none") {
        return false;
    }
    table.descendants().skip(1).all(|node| match node.value() {
        Node::Element(element) => element.name() != "table" && heading_level(element.name()).is_none(),
        _ => true,
    })
}

/// A cell as written, before spans are spread.
struct Cell {
    text: String,
    is_header: bool,
    columns: usize,
    rows: usize,
}

fn read_table(table: ElementRef<'_>, builder: &mut Builder) -> Result<Table, ParseError> {
    let mut out = Table::default();
    let mut headers: Vec<Vec<String>> = Vec::new();
    // For each column the text that a cell above still spans and the rows it has left.
    let mut spanning: Vec<Option<(usize, String)>> = Vec::new();
    for element in table.descendants().filter_map(ElementRef::wrap) {
        match element.value().name() {
            "caption" if out.caption.is_none() => out.caption = Some(text_of(element)),
            "tr" => {
                let cells = read_cells(element);
                let in_head = element
                    .parent()
                    .and_then(ElementRef::wrap)
                    .is_some_and(|parent| parent.value().name() == "thead");
                let all_header = !cells.is_empty() && cells.iter().all(|cell| cell.is_header);
                let row = spread(cells, &mut spanning, out.rows.len(), builder)?;
                if out.rows.is_empty() && (in_head || all_header) {
                    headers.push(row);
                } else {
                    out.rows.push(TableRow { cells: row, source: None });
                }
            }
            _ => {}
        }
    }
    out.header = merge_headers(headers);
    Ok(out)
}

fn read_cells(row: ElementRef<'_>) -> Vec<Cell> {
    let span = |element: ElementRef<'_>, name: &str, limit: usize| {
        element.attr(name).and_then(|value| value.trim().parse::<usize>().ok()).unwrap_or(1).clamp(1, limit)
    };
    row.child_elements()
        .filter(|cell| matches!(cell.value().name(), "td" | "th"))
        .map(|cell| Cell {
            text: text_of(cell),
            is_header: cell.value().name() == "th",
            columns: span(cell, "colspan", TABLE_COLUMNS_MAX),
            rows: span(cell, "rowspan", TABLE_ROWS_MAX),
        })
        .collect()
}

/// Puts cells into columns. A spanning cell's text is repeated where it is short, so that each row can be read
/// alone; a long one would multiply the document.
fn spread(
    cells: Vec<Cell>,
    spanning: &mut Vec<Option<(usize, String)>>,
    rows_so_far: usize,
    builder: &mut Builder,
) -> Result<Vec<String>, ParseError> {
    let mut row: Vec<String> = Vec::new();
    let mut cells = cells.into_iter();
    loop {
        if let Some(slot) = spanning.get_mut(row.len())
            && let Some((left, text)) = slot
        {
            row.push(text.clone());
            *left -= 1;
            if *left == 0 {
                *slot = None;
            }
            continue;
        }
        let Some(cell) = cells.next() else {
            // A gap before a later spanning column is filled; past the last of them the row ends.
            if spanning.iter().skip(row.len()).any(Option::is_some) {
                row.push(String::new());
                continue;
            }
            break;
        };
        if row.len() + cell.columns > TABLE_COLUMNS_MAX {
            return Err(ParseError::limit("columns in a table", TABLE_COLUMNS_MAX, "TABLE_COLUMNS_MAX"));
        }
        let repeated = if cell.text.len() <= SPAN_TEXT_BYTES_MAX { cell.text.clone() } else { String::new() };
        for column in 0..cell.columns {
            if cell.rows > 1 {
                let at = row.len();
                if spanning.len() <= at {
                    spanning.resize_with(at + 1, || None);
                }
                spanning[at] = Some((cell.rows - 1, repeated.clone()));
            }
            row.push(if column == 0 { cell.text.clone() } else { repeated.clone() });
        }
    }
    builder.count_row(rows_so_far, row.len())?;
    Ok(row)
}

/// Several header rows as one: "Power / cold" for a group and its column.
fn merge_headers(rows: Vec<Vec<String>>) -> Vec<String> {
    let mut merged: Vec<String> = Vec::new();
    let mut last: Vec<String> = Vec::new();
    for row in rows {
        for (column, text) in row.into_iter().enumerate() {
            if merged.len() <= column {
                merged.resize(column + 1, String::new());
                last.resize(column + 1, String::new());
            }
            if !text.is_empty() && last[column] != text {
                if !merged[column].is_empty() {
                    merged[column].push_str(" / ");
                }
                merged[column].push_str(&text);
                last[column] = text;
            }
        }
    }
    merged
}

/// All text under an element on one line, skipped elements left out.
fn text_of(element: ElementRef<'_>) -> String {
    let mut out = String::new();
    let mut skipping = 0_usize;
    for edge in element.traverse() {
        match edge {
            Edge::Open(node) => match node.value() {
                Node::Text(text) if skipping == 0 => push_collapsed(&mut out, text),
                Node::Element(element) => {
                    let name = element.name();
                    if skipping > 0 || SKIPPED.contains(&name) {
                        skipping += 1;
                    } else if name == "br" || name == "li" || BLOCKS.contains(&name) {
                        push_collapsed(&mut out, " ");
                    } else if name == "img" {
                        push_collapsed(&mut out, element.attr("alt").unwrap_or_default());
                    }
                }
                _ => {}
            },
            Edge::Close(node) => {
                if skipping > 0 && node.value().is_element() {
                    skipping -= 1;
                }
            }
        }
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use crate::document::{BlockKind, Document, Format, Table};
    use crate::parse::{ParseError, parse};
    use proptest::prelude::*;

    fn document(text: &str) -> Document {
        parse(Format::Html, text, "stem").expect("parses")
    }

    fn tables(document: &Document) -> Vec<&Table> {
        document
            .blocks
            .iter()
            .filter_map(|block| match &block.kind {
                BlockKind::Table(table) => Some(table),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn text_headings_lists_and_code() {
        let document = document(
            "<html><head><title> The\n page </title><style>p{}</style></head><body><nav>Home</nav>\
             <h1>Main</h1><p>One <b>two</b>\n three<br>four</p><script>alert(1)</script>loose\
             <ol start=3><li>first<li>second</ol><ul><li>dot</ul><h2>Sub</h2><pre>a\n  b</pre></body></html>",
        );
        assert_eq!(document.title, "The page");
        let kinds: Vec<_> = document.blocks.iter().map(|block| block.kind.clone()).collect();
        assert_eq!(kinds[1], BlockKind::Paragraph("One two three four".into()));
        assert_eq!(kinds[2], BlockKind::Paragraph("loose".into()));
        assert_eq!(kinds[3], BlockKind::ListItem("3. first".into()));
        assert_eq!(kinds[4], BlockKind::ListItem("4. second".into()));
        assert_eq!(kinds[5], BlockKind::ListItem("dot".into()));
        assert_eq!(kinds[7], BlockKind::Code { language: None, text: "a\n  b".into() });
        assert_eq!(&*document.blocks[7].heading_path, ["Main", "Sub"]);
        assert_eq!(kinds.len(), 8, "nothing of nav, style or script: {kinds:?}");
    }

    #[test]
    fn tables_with_spans_captions_and_two_header_rows() {
        let document = document(
            "<table><caption>Power</caption><thead><tr><th rowspan=2>Model<th colspan=2>kW</tr>\
             <tr><th>cold<th>warm</tr></thead><tbody><tr><td rowspan=2>A<td>1<td>2</tr><tr><td>3<td>4</tr>\
             <tr><th>B</th><td colspan=2>none</td></tr></tbody></table>",
        );
        let table = tables(&document)[0];
        assert_eq!(table.caption.as_deref(), Some("Power"));
        assert_eq!(table.header, ["Model", "kW / cold", "kW / warm"]);
        let rows: Vec<_> = table.rows.iter().map(|row| row.cells.join("|")).collect();
        assert_eq!(rows, ["A|1|2", "A|3|4", "B|none|none"]);
    }

    #[test]
    fn tables_that_arrange_the_page_are_text() {
        let document = document("<table><tr><td><h2>Head</h2><p>body</p></td></tr></table>");
        assert!(tables(&document).is_empty());
        assert!(document.blocks.iter().any(|block| block.kind == BlockKind::Paragraph("body".into())));
    }

    #[test]
    fn absurd_spans_and_nesting_are_errors() {
        let wide = format!("<table><tr>{}</tr></table>", "<td colspan=99999999>x".repeat(3));
        assert!(matches!(
            parse(Format::Html, &wide, "s"),
            Err(ParseError::Limit { name: "TABLE_COLUMNS_MAX", .. })
        ));
        let many = format!("<table>{}</table>", "<tr><td colspan=1024>x".repeat(5_000));
        assert!(matches!(
            parse(Format::Html, &many, "s"),
            Err(ParseError::Limit { name: "TABLE_CELLS_MAX", .. })
        ));
        let deep = "<div>".repeat(1_000);
        assert!(matches!(
            parse(Format::Html, &deep, "s"),
            Err(ParseError::Limit { name: "NESTING_MAX", .. })
        ));
        let tall = "<table><tr><td rowspan=4000000000>a<td>b</table>";
        assert_eq!(tables(&document(tall))[0].rows.len(), 1);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[a-z<>/=\"'&;! \n\u{e9}]{0,200}|\\PC*") {
            let _ = parse(Format::Html, &text, "stem");
        }

        #[test]
        fn tags_in_any_order_never_panic(parts in proptest::collection::vec(proptest::sample::select(vec![
            "<table>", "</table>", "<tr>", "<td>", "<th rowspan=3>", "<td colspan=5 rowspan=2>", "</td>", "<thead>",
            "<caption>", "</caption>", "<h1>", "</h1>", "<h3>", "<p>", "</p>", "<li>", "<ul>", "</ul>", "<pre>", "</pre>",
            "<script>", "</script>", "<svg>", "<template>", "<select>", "text ", "é🦀", "<a href=x>", "<b>", "</b>",
            "<tbody>", "<title>", "</title>", "<!--", "-->", "<math>", "<frameset>",
        ]), 0..60)) {
            let _ = parse(Format::Html, &parts.concat(), "stem");
        }
    }
}

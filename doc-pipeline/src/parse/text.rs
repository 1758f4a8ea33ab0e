//! Plain text: paragraphs between blank lines, underlined headings, a first line as title.

use super::ParseError;
use crate::document::{Builder, LineCursor, one_line};

/// Longest first line that is taken for a title.
const TITLE_LINE_CHARS_MAX: usize = 100;
/// Shortest run of `=` or `-` that underlines a heading.
const UNDERLINE_MIN: usize = 3;

pub(super) fn parse(text: &str, builder: &mut Builder) -> Result<(), ParseError> {
    let mut lines = LineCursor::new(text);
    let mut offset = 0;
    let mut paragraph: Option<std::ops::Range<usize>> = None;
    for line in text.split_inclusive('\n') {
        let range = offset..offset + line.len();
        offset = range.end;
        if line.trim().is_empty() {
            flush(text, paragraph.take(), &mut lines, builder)?;
            continue;
        }
        if let (Some(open), Some(level)) = (&paragraph, underline_level(line)) {
            // Only the line directly above is the heading; what came before it is a paragraph of its own.
            let above = &text[open.clone()];
            let heading_start =
                open.start + above.trim_end_matches(['\n', '\r']).rfind('\n').map_or(0, |at| at + 1);
            let open_start = open.start;
            flush(text, Some(open_start..heading_start), &mut lines, builder)?;
            let source = lines.source(heading_start..range.end);
            builder.heading(level, &one_line(&text[heading_start..range.start]), Some(source))?;
            paragraph = None;
            continue;
        }
        paragraph = Some(paragraph.map_or(range.clone(), |open| open.start..range.end));
    }
    flush(text, paragraph, &mut lines, builder)
}

/// 1 for a line of `=`, 2 for a line of `-`.
fn underline_level(line: &str) -> Option<u8> {
    let line = line.trim();
    let all = |mark: u8| line.len() >= UNDERLINE_MIN && line.bytes().all(|byte| byte == mark);
    if all(b'=') {
        Some(1)
    } else if all(b'-') {
        Some(2)
    } else {
        None
    }
}

fn flush(
    text: &str,
    range: Option<std::ops::Range<usize>>,
    lines: &mut LineCursor<'_>,
    builder: &mut Builder,
) -> Result<(), ParseError> {
    let Some(range) = range.filter(|range| !text[range.clone()].trim().is_empty()) else {
        return Ok(());
    };
    let body = &text[range.clone()];
    if builder.blocks.is_empty() && builder.title.is_none() {
        let first = one_line(body.lines().next().unwrap_or_default());
        if first.chars().count() <= TITLE_LINE_CHARS_MAX {
            builder.title = Some(first);
        }
    }
    let source = lines.source(range);
    builder.text(body, false, Some(source))
}

#[cfg(test)]
mod tests {
    use crate::document::{BlockKind, Format};
    use crate::parse::parse;
    use proptest::prelude::*;

    #[test]
    fn paragraphs_headings_and_lines() {
        let text = "Shift notes\n\nFirst line\nsecond line.\nBoilers\n=======\r\nAll fine.\n   \nValves\n---\nStuck.\n";
        let document = parse(Format::Text, text, "notes").expect("parses");
        assert_eq!(document.title, "Shift notes");
        let kinds: Vec<_> = document.blocks.iter().map(|block| &block.kind).collect();
        assert!(matches!(kinds[1], BlockKind::Paragraph(text) if text == "First line\nsecond line."));
        assert!(matches!(kinds[2], BlockKind::Heading { level: 1, text } if text == "Boilers"));
        assert!(matches!(kinds[3], BlockKind::Paragraph(text) if text == "All fine."));
        assert_eq!(&*document.blocks[5].heading_path, ["Boilers", "Valves"]);
        assert_eq!(
            document.blocks[1].source.map(|source| (source.first_line, source.last_line)),
            Some((3, 4))
        );
    }

    #[test]
    fn an_empty_file_has_the_stem_as_title() {
        let document = parse(Format::Text, " \n\n", "stem").expect("parses");
        assert_eq!((document.title.as_str(), document.blocks.len()), ("stem", 0));
    }

    proptest! {
        #[test]
        fn every_word_is_kept(text in "[a-z=\\-\n\r\u{e9} ]{0,300}") {
            let document = parse(Format::Text, &text, "stem").expect("within limits");
            let mut kept = String::new();
            for block in &document.blocks {
                match &block.kind {
                    BlockKind::Paragraph(text) | BlockKind::Heading { text, .. } => kept.push_str(text),
                    _ => unreachable!("text has no other blocks"),
                }
            }
            let letters = |text: &str| text.chars().filter(|c| c.is_alphabetic()).collect::<String>();
            prop_assert_eq!(letters(&kept), letters(&text));
        }

        #[test]
        fn arbitrary_text_never_panics(text in any::<String>()) {
            let _ = parse(Format::Text, &text, "stem");
        }
    }
}

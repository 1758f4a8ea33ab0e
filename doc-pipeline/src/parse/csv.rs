//! CSV and TSV: one table, its first record the header, its caption the file's stem.

use std::io::Cursor;

use csv::{ByteRecord, ReaderBuilder, StringRecord, Trim};

use super::ParseError;
use crate::document::{Builder, Source, Table, TableRow, cut, one_line};
use crate::limits::{CSV_SNIFF_BYTES, CSV_SNIFF_RECORDS};

/// Delimiters that are tried, best first when they fit equally well.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];

pub(super) fn parse(
    text: &str,
    stem: &str,
    delimiter: Option<u8>,
    builder: &mut Builder,
) -> Result<(), ParseError> {
    let (body_start, declared) = declared_delimiter(text);
    let body = &text[body_start..];
    let first_line = 1 + u64::from(body_start > 0);
    let delimiter = delimiter.or(declared).unwrap_or_else(|| sniff(body));

    let mut reader = reader(delimiter).from_reader(Cursor::new(body.as_bytes()));
    let mut record = StringRecord::new();
    let mut table = Table { caption: Some(stem.to_owned()), ..Table::default() };
    let mut whole: Option<Source> = None;
    let mut header_read = false;
    loop {
        let more = reader.read_record(&mut record).map_err(|error| ParseError::Csv {
            line: first_line - 1 + error.position().map_or(1, csv::Position::line),
            message: error.to_string(),
        })?;
        if !more {
            break;
        }
        builder.count_row(table.rows.len(), record.len())?;
        let (start, line) = record.position().map_or((0, 1), |at| (at.byte(), at.line()));
        // The reader's place is before the empty lines that it passes over.
        let empty =
            body.as_bytes().iter().skip(start as usize).take_while(|byte| matches!(byte, b'\r' | b'\n'));
        let (skipped, empty_lines) =
            empty.fold((0, 0), |(bytes, lines), byte| (bytes + 1, lines + u64::from(*byte == b'\n')));
        let (start, line) = (start + skipped, first_line - 1 + line + empty_lines);
        let inner_lines: usize = record.iter().map(|cell| cell.matches('\n').count()).sum();
        let source = Source {
            first_line: u32::try_from(line).unwrap_or(u32::MAX),
            last_line: u32::try_from(line + inner_lines as u64).unwrap_or(u32::MAX),
            start_byte: body_start as u64 + start,
            end_byte: body_start as u64 + reader.position().byte(),
        };
        whole = Some(whole.map_or(source, |whole| whole.join(source)));
        let cells: Vec<String> = record.iter().map(one_line).collect();
        if header_read {
            table.rows.push(TableRow { cells, source: Some(source) });
        } else {
            table.header = cells;
            header_read = true;
        }
    }
    if header_read {
        builder.table(table, whole)?;
    }
    Ok(())
}

fn reader(delimiter: u8) -> ReaderBuilder {
    let mut builder = ReaderBuilder::new();
    builder.delimiter(delimiter).has_headers(false).flexible(true).trim(Trim::None);
    builder
}

/// Spreadsheets write `sep=;` as a first line: the bytes it takes and the delimiter it names.
fn declared_delimiter(text: &str) -> (usize, Option<u8>) {
    let line_end = text.find('\n').map_or(text.len(), |at| at + 1);
    let line = text[..line_end].trim_end_matches(['\n', '\r']).trim_matches('"');
    match line.strip_prefix("sep=").or_else(|| line.strip_prefix("SEP=")).map(str::as_bytes) {
        Some(&[delimiter]) if delimiter.is_ascii() && delimiter != b'"' => (line_end, Some(delimiter)),
        _ => (0, None),
    }
}

/// The delimiter under which most records have the same number of columns, and more than one.
fn sniff(text: &str) -> u8 {
    let sample = cut(text, CSV_SNIFF_BYTES);
    let mut best = (DELIMITERS[0], 0.0);
    for delimiter in DELIMITERS {
        let mut reader = reader(delimiter).from_reader(sample.as_bytes());
        let mut record = ByteRecord::new();
        let mut widths = Vec::with_capacity(CSV_SNIFF_RECORDS);
        while widths.len() < CSV_SNIFF_RECORDS && matches!(reader.read_byte_record(&mut record), Ok(true)) {
            widths.push(record.len());
        }
        widths.sort_unstable();
        let Some(&width) = widths.get(widths.len() / 2).filter(|width| **width > 1) else {
            continue;
        };
        let same = widths.iter().filter(|other| **other == width).count();
        // Consistency decides; the number of columns only between equally consistent ones.
        let score = same as f64 / widths.len() as f64 + 0.01 * (width.min(50) as f64) / 50.0;
        if score > best.1 {
            best = (delimiter, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use crate::document::{BlockKind, Format, Table};
    use crate::parse::{ParseError, parse};
    use proptest::prelude::*;

    fn table(text: &str, format: Format) -> Table {
        let document = parse(format, text, "prices").expect("parses");
        match document.blocks.into_iter().next().map(|block| block.kind) {
            Some(BlockKind::Table(table)) => table,
            other => panic!("expected a table, got {other:?}"),
        }
    }

    #[test]
    fn delimiters_are_found() {
        for text in
            ["a,b\n1;5,2\n3;7,4\n", "a;b\n1,5;2\n3,5;4\n", "a\tb\n1,5\t2\n3\t4\n", "sep=;\na;b\n1,5;2\n"]
        {
            let table = table(text, Format::Csv);
            assert_eq!(table.header, ["a", "b"], "{text:?}");
            assert!(table.rows.iter().all(|row| row.cells.len() == 2), "{text:?}");
        }
        assert_eq!(table("a,b\tc\n", Format::Tsv).header, ["a,b", "c"]);
    }

    #[test]
    fn quotes_ragged_rows_and_places() {
        let table = table("item,note\nA,\"two\nlines, quoted\"\n\nB\nC,x,y\n", Format::Csv);
        assert_eq!(table.caption.as_deref(), Some("prices"));
        assert_eq!(table.rows[0].cells, ["A", "two lines, quoted"]);
        assert_eq!(table.rows[1].cells, ["B"]);
        assert_eq!(table.rows[2].cells, ["C", "x", "y"]);
        let lines: Vec<_> =
            table.rows.iter().filter_map(|row| row.source).map(|s| (s.first_line, s.last_line)).collect();
        assert_eq!(lines, [(2, 3), (5, 5), (6, 6)]);
    }

    #[test]
    fn too_many_columns_is_an_error() {
        let text = "x,".repeat(crate::limits::TABLE_COLUMNS_MAX + 1);
        assert!(matches!(
            parse(Format::Csv, &text, "t"),
            Err(ParseError::Limit { name: "TABLE_COLUMNS_MAX", .. })
        ));
    }

    proptest! {
        #[test]
        fn written_tables_are_read_back(
            rows in proptest::collection::vec(proptest::collection::vec("[a-z,;\" \u{e9}]{1,8}x", 2..4), 1..8)
        ) {
            let mut writer = csv::WriterBuilder::new().flexible(true).from_writer(Vec::new());
            let header = ["h1", "h2"];
            writer.write_record(header).expect("to memory");
            for row in &rows {
                writer.write_record(row).expect("to memory");
            }
            let text = String::from_utf8(writer.into_inner().expect("to memory")).expect("UTF-8");
            let text = format!("sep=,\n{text}");
            let table = table(&text, Format::Csv);
            prop_assert_eq!(table.rows.len(), rows.len());
            for (read, written) in table.rows.iter().zip(&rows) {
                let written: Vec<String> =
                    written.iter().map(|cell| cell.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
                prop_assert_eq!(&read.cells, &written);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in "[a-c,;\t\"\r\n=\u{e9}]{0,200}|\\PC*") {
            let _ = parse(Format::Csv, &text, "stem");
            let _ = parse(Format::Tsv, &text, "stem");
        }
    }
}

//! Text of a known format to a [`Document`]. Pure: no file is opened here.

mod csv;
mod html;
mod html_depth;
mod markdown;
mod text;

use crate::document::{Builder, Document, Format};

/// Why a text can't be parsed as its format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// A limit of [`crate::limits`] is passed.
    #[error("the document has more than {limit} {what} (limit {name}): split it into smaller files")]
    Limit {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// The constant that sets it.
        name: &'static str,
    },
    /// The CSV reader found a record that it can't read.
    #[error("line {line}: not readable as CSV: {message}")]
    Csv {
        /// Line, counted from 1.
        line: u64,
        /// What is wrong with it.
        message: String,
    },
}

impl ParseError {
    pub(crate) fn limit(what: &'static str, limit: usize, name: &'static str) -> Self {
        Self::Limit { what, limit, name }
    }
}

/// Parses `text`. `stem` is the file's name without extension: the title when the document has none of its own,
/// and the caption of a CSV table. Never panics, whatever the text.
pub fn parse(format: Format, text: &str, stem: &str) -> Result<Document, ParseError> {
    let mut builder = Builder::new();
    match format {
        Format::Markdown => markdown::parse(text, &mut builder)?,
        Format::Text => text::parse(text, &mut builder)?,
        Format::Html => html::parse(text, &mut builder)?,
        Format::Csv => csv::parse(text, stem, None, &mut builder)?,
        Format::Tsv => csv::parse(text, stem, Some(b'\t'), &mut builder)?,
    }
    Ok(builder.finish(stem))
}

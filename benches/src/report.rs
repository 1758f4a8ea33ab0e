//! How results are shown: one JSON object with stable keys, or tables of the same figures. What is measured is not known
//! here.

use crate::machine;
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A table for people.
#[derive(Debug)]
pub(crate) struct Table {
    title: String,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(title: impl Into<String>, header: &[&str]) -> Table {
        Table {
            title: title.into(),
            header: header.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    fn to_markdown(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.chain(self.header.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let line = |row: &[String]| {
            let cells: Vec<String> =
                row.iter().enumerate().map(|(i, cell)| format!("{cell:<width$}", width = width(i))).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule: Vec<String> = (0..self.header.len()).map(|i| "-".repeat(width(i))).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!("**{}**\n\n{}{}{rows}\n", self.title, line(&self.header), line(&rule))
    }
}

/// A figure held against what is aimed at.
#[derive(Debug)]
pub(crate) struct Goal {
    /// What is compared, with its conditions.
    pub(crate) what: String,
    /// The figure; `None` when it was not measured in this run.
    pub(crate) value: Option<f64>,
    /// It should be at most this.
    pub(crate) at_most: f64,
}

impl Goal {
    /// Whether the goal was met; `None` when it was not measured.
    #[must_use]
    pub(crate) fn is_met(&self) -> Option<bool> {
        self.value.map(|value| value <= self.at_most)
    }
}

/// What a bench gives: figures for programs, the same in tables, and goals.
#[derive(Debug)]
pub(crate) struct Report {
    name: &'static str,
    figures: Map<String, Value>,
    tables: Vec<Table>,
    goals: Vec<Goal>,
    remarks: Vec<String>,
}

impl Report {
    /// An empty report of the bench `name`.
    pub(crate) fn new(name: &'static str) -> Report {
        Report { name, figures: Map::new(), tables: Vec::new(), goals: Vec::new(), remarks: Vec::new() }
    }

    /// Sets a figure of the JSON object.
    pub(crate) fn figure(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        self.figures.insert(key.into(), value.into());
    }

    /// Adds a table.
    pub(crate) fn table(&mut self, table: Table) {
        self.tables.push(table);
    }

    /// Adds a goal.
    pub(crate) fn goal(&mut self, what: impl Into<String>, value: Option<f64>, at_most: f64) {
        self.goals.push(Goal { what: what.into(), value, at_most });
    }

    /// Adds something that a reader of the figures must know.
    pub(crate) fn remark(&mut self, remark: impl Into<String>) {
        self.remarks.push(remark.into());
    }

    fn to_json(&self) -> Value {
        let goals: Vec<Value> = self
            .goals
            .iter()
            .map(|goal| {
                json!({"what": goal.what, "value": goal.value, "at_most": goal.at_most, "met": goal.is_met()})
            })
            .collect();
        let mut object = Map::new();
        object.insert("bench".into(), self.name.into());
        object.insert("machine".into(), machine::describe());
        object.extend(self.figures.clone());
        object.insert("goals".into(), goals.into());
        object.insert("remarks".into(), self.remarks.clone().into());
        Value::Object(object)
    }

    /// Tables, goals and remarks as Markdown.
    fn to_markdown(&self) -> String {
        let mut text = format!("{}\n\n", machine::sentence());
        self.tables.iter().for_each(|table| text.push_str(&table.to_markdown()));
        if !self.goals.is_empty() {
            let mut table = Table::new("Goals", &["what", "measured", "at most", "met"]);
            for goal in &self.goals {
                let met = goal.is_met().map_or("not measured", |met| if met { "yes" } else { "NO" });
                let value = goal.value.map_or("-".into(), short);
                table.row(vec![goal.what.clone(), value, short(goal.at_most), met.into()]);
            }
            text.push_str(&table.to_markdown());
        }
        self.remarks.iter().for_each(|remark| text.push_str(&format!("- {remark}\n")));
        text
    }

    /// Prints the report to standard output.
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            println!("{}", self.to_json());
        } else {
            println!("# {}\n\n{}", self.name, self.to_markdown());
        }
    }

    /// Puts the report into a document, in place of what stands between the two comments `<!-- NAME begin -->` and
    /// `<!-- NAME end -->`.
    ///
    /// # Errors
    /// When the document cannot be read or written, or has no such comments.
    pub(crate) fn write_into(&self, document: &Path) -> anyhow::Result<()> {
        let text =
            std::fs::read_to_string(document).with_context(|| format!("reading {}", document.display()))?;
        let text = replace_section(&text, self.name, &self.to_markdown())
            .with_context(|| format!("{} has no section for {}", document.display(), self.name))?;
        std::fs::write(document, text).with_context(|| format!("writing {}", document.display()))
    }
}

/// `text` with other content between the two comments of a section; `None` when they are not there.
fn replace_section(text: &str, name: &str, content: &str) -> Option<String> {
    let (begin, end) = (format!("<!-- {name} begin -->"), format!("<!-- {name} end -->"));
    let (before, rest) = text.split_once(&begin)?;
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}{begin}\n{}\n{end}{after}", content.trim_end()))
}

/// Three significant digits and more for larger numbers; for tables.
#[must_use]
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// For JSON: rounded to a tenth of a thousandth, so that figures stay readable.
#[must_use]
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_holds_figures_goals_and_the_machine() {
        let mut report = Report::new("test");
        report.figure("p50_us", 1.5);
        report.goal("a ratio", Some(0.4), 0.5);
        report.goal("another", Some(0.6), 0.5);
        report.goal("a third", None, 0.5);
        let json = report.to_json();
        assert_eq!(json["bench"], "test");
        assert_eq!(json["p50_us"], 1.5);
        assert_eq!(json["goals"][0]["met"], true);
        assert_eq!(json["goals"][1]["met"], false);
        assert!(json["goals"][2]["met"].is_null());
        assert!(json["machine"]["cores"].as_u64().unwrap() > 0);
    }

    #[test]
    fn a_section_of_a_document_is_replaced_and_nothing_else() {
        let text = "a\n<!-- x begin -->\nold\n<!-- x end -->\nb\n";
        let replaced = replace_section(text, "x", "new\n\n").unwrap();
        assert_eq!(replaced, "a\n<!-- x begin -->\nnew\n<!-- x end -->\nb\n");
        assert_eq!(replace_section(&replaced, "x", "new").unwrap(), replaced);
        assert!(replace_section(text, "y", "new").is_none());
    }

    #[test]
    fn numbers_stay_short() {
        assert_eq!(
            (short(123.4), short(12.34), short(1.234), short(0.1234)),
            ("123".into(), "12.3".into(), "1.23".into(), "0.123".into())
        );
        assert_eq!(rounded(1.234_567), 1.2346);
    }
}

//! How results are shown: one JSON object with stable keys, or tables of the same figures. What is measured is not known
//! here.

use crate::machine;
use serde_json::{Map, Value, json};

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

    fn print(&self) {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.chain(self.header.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let line = |row: &[String]| {
            let cells: Vec<String> =
                row.iter().enumerate().map(|(i, cell)| format!("{cell:<width$}", width = width(i))).collect();
            println!("| {} |", cells.join(" | "));
        };
        println!("\n## {}\n", self.title);
        line(&self.header);
        let rule: Vec<String> = (0..self.header.len()).map(|i| "-".repeat(width(i))).collect();
        line(&rule);
        self.rows.iter().for_each(|row| line(row));
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

    /// Prints the report to standard output.
    pub(crate) fn print(&self, as_json: bool) {
        if as_json {
            println!("{}", self.to_json());
            return;
        }
        println!("# {}\n\n{}", self.name, machine::describe());
        self.tables.iter().for_each(Table::print);
        if !self.goals.is_empty() {
            let mut table = Table::new("Goals", &["what", "measured", "at most", "met"]);
            for goal in &self.goals {
                let met = goal.is_met().map_or("not measured", |met| if met { "yes" } else { "NO" });
                let value = goal.value.map_or("-".into(), |value| format!("{value:.3}"));
                table.row(vec![goal.what.clone(), value, goal.at_most.to_string(), met.into()]);
            }
            table.print();
        }
        self.remarks.iter().for_each(|remark| println!("\n- {remark}"));
    }
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
    fn numbers_stay_short() {
        assert_eq!(
            (short(123.4), short(12.34), short(1.234), short(0.1234)),
            ("123".into(), "12.3".into(), "1.23".into(), "0.123".into())
        );
        assert_eq!(rounded(1.234_567), 1.2346);
    }
}

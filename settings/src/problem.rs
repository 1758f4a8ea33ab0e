//! What is wrong with a configuration: one problem, and all of them together. No rule of what is right.

use crate::limits::{MAX_PROBLEMS, MAX_SHOWN_CHARS};
use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A line of the configuration file, counted from 1; 0 = the file as a whole.
    File {
        /// The file.
        path: PathBuf,
        /// Its line.
        line: usize,
    },
    /// An environment variable.
    Environment(
        /// Its name.
        String,
    ),
    /// An option of the command line.
    Flag(
        /// The option with its dashes.
        String,
    ),
}

impl Display for Origin {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line: 0 } => write!(f, "file {}", shown(&path.to_string_lossy())),
            Origin::File { path, line } => write!(f, "file {}:{line}", shown(&path.to_string_lossy())),
            Origin::Environment(name) => write!(f, "environment {}", shown(name)),
            Origin::Flag(flag) => write!(f, "flag {}", shown(flag)),
        }
    }
}

/// One thing that is wrong: where, which key, which value, why, and the nearest right thing where there is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{origin}: {}{}{reason}{}",
    key.as_deref().map(shown).unwrap_or_default(),
    value_part(key.is_some(), value.as_deref()),
    nearest.as_ref().map(|near| format!("; the nearest is {near}")).unwrap_or_default()
)]
pub struct Problem {
    /// Where it was said.
    pub origin: Origin,
    /// The key as it was written; `None` where the file as a whole is meant.
    pub key: Option<String>,
    /// The value as it was written; `None` where it does not matter.
    pub value: Option<String>,
    /// Why it cannot be used, and what can.
    pub reason: String,
    /// The nearest key, variable or choice that would have been right.
    pub nearest: Option<String>,
}

impl Problem {
    /// A problem with a key or its value.
    pub(crate) fn new(origin: &Origin, key: &str, reason: impl Into<String>) -> Problem {
        Problem {
            origin: origin.clone(),
            key: Some(key.to_owned()),
            value: None,
            reason: reason.into(),
            nearest: None,
        }
    }

    /// A problem with the file as a whole, or with one of its lines.
    pub(crate) fn of_file(path: PathBuf, line: usize, reason: impl Into<String>) -> Problem {
        Problem {
            origin: Origin::File { path, line },
            key: None,
            value: None,
            reason: reason.into(),
            nearest: None,
        }
    }

    pub(crate) fn value(mut self, value: impl Into<String>) -> Problem {
        self.value = Some(value.into());
        self
    }

    pub(crate) fn nearest(mut self, nearest: Option<String>) -> Problem {
        self.nearest = nearest;
        self
    }
}

fn value_part(has_key: bool, value: Option<&str>) -> String {
    match (has_key, value) {
        (true, Some(value)) => format!(" = {}: ", shown(value)),
        (true, None) => ": ".to_owned(),
        (false, _) => String::new(),
    }
}

/// A foreign text as it may stand in a message: no control characters, of bounded length.
pub(crate) fn shown(text: &str) -> String {
    let mut out = String::new();
    for (at, c) in text.chars().enumerate() {
        if at == MAX_SHOWN_CHARS {
            out.push('…');
            break;
        }
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// Everything that is wrong with a configuration, file first, then environment, then flags.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Problems {
    list: Vec<Problem>,
    more: usize,
}

impl Problems {
    pub(crate) fn push(&mut self, problem: Problem) {
        match self.list.len() < MAX_PROBLEMS {
            true => self.list.push(problem),
            false => self.more += 1,
        }
    }

    /// The problems that were kept; at most [`MAX_PROBLEMS`].
    #[must_use]
    pub fn list(&self) -> &[Problem] {
        &self.list
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.list.len() + self.more
    }

    pub(crate) fn into_result<T>(mut self, value: T) -> Result<T, Problems> {
        self.list.sort_by(|a, b| a.origin.cmp(&b.origin));
        if self.list.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl From<Problem> for Problems {
    fn from(problem: Problem) -> Problems {
        Problems { list: vec![problem], more: 0 }
    }
}

impl Display for Problems {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.count() {
            1 => f.write_str("the configuration cannot be used:")?,
            count => write!(f, "the configuration cannot be used, for {count} reasons:")?,
        }
        for problem in &self.list {
            write!(f, "\n  {problem}")?;
        }
        if self.more > 0 {
            write!(f, "\n  and {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_everything_and_no_control_character() {
        let origin = Origin::File { path: "/x/c.toml".into(), line: 3 };
        let problem = Problem::new(&origin, "sharing.enabeld", "there is no such key")
            .nearest(Some("sharing.enabled".into()));
        assert_eq!(
            problem.to_string(),
            "file /x/c.toml:3: sharing.enabeld: there is no such key; the nearest is sharing.enabled"
        );
        let problem = Problem::new(&Origin::Flag("--set".into()), "k", "no").value("a\n\x1b[31m".to_owned());
        assert_eq!(problem.to_string(), "flag --set: k = a\\n\\u{1b}[31m: no");
    }

    #[test]
    fn many_problems_are_counted_not_kept() {
        let mut problems = Problems::default();
        for _ in 0..MAX_PROBLEMS + 7 {
            problems.push(Problem::new(&Origin::Default, "k", "no"));
        }
        assert_eq!((problems.list().len(), problems.count()), (MAX_PROBLEMS, MAX_PROBLEMS + 7));
        assert!(problems.to_string().ends_with("and 7 more"));
    }
}

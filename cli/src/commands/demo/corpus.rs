//! The documents of the demo, built into the program so that it needs nothing beside it, and the questions about them.

use crate::failure::{Exit, Failure};
use serde::Deserialize;
use std::path::Path;

/// A question with the place of its answer.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Question {
    pub(crate) question: String,
    /// File name of the document that has the answer.
    pub(crate) document: String,
    /// Words of the answer.
    pub(crate) phrase: String,
}

/// File with the questions, beside the documents.
pub(crate) const QUESTIONS_FILE: &str = "questions.json";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../../demo/corpus/", $name)))),*]
    };
}

/// Name and content of every file of `demo/corpus`.
const FILES: &[(&str, &str)] = files![
    "api-reference.md",
    "company-overview.md",
    "data-retention.md",
    "error-codes.html",
    "firmware-release-notes.md",
    "glossary.md",
    "hr-leave-policy.md",
    "hr-remote-work.txt",
    "incident-2024-11-tarnlink-outage.md",
    "incident-2025-02-test-bay-leak.md",
    "installation-guide.md",
    "maintenance-schedule.md",
    "meeting-notes-2025-03-12.txt",
    "meeting-notes-2025-04-09.md",
    "noise-measurements.csv",
    "onboarding-checklist.md",
    "price-list-2025.csv",
    "product-manual-tarn.md",
    "questions.json",
    "refrigerant-safety.txt",
    "returns-and-warranty.md",
    "security-policy.md",
    "shipping-rates.html",
    "spare-parts.csv",
    "supplier-evaluation.md",
    "support-handbook.html",
    "travel-expenses.md",
];

/// Writes the built-in files into a folder.
pub(crate) fn write_to(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)?;
    for (name, content) in FILES {
        std::fs::write(folder.join(name), content)?;
    }
    Ok(())
}

/// The questions of a folder; none where it has no file of them.
pub(crate) fn questions_of(folder: &Path) -> Result<Vec<Question>, Failure> {
    let path = folder.join(QUESTIONS_FILE);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::new(Exit::Input, format!("{}: {error}", path.display()))),
    };
    serde_json::from_str(&text).map_err(|e| {
        let form = "a list of {\"question\", \"document\", \"phrase\"}";
        Failure::new(Exit::Input, format!("{} is not {form}: {e}", path.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    #[test]
    fn the_program_holds_the_whole_corpus() {
        let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../demo/corpus");
        let there: BTreeSet<String> = std::fs::read_dir(source)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(there, FILES.iter().map(|(name, _)| (*name).to_owned()).collect());
        let folder = tempfile::tempdir().unwrap();
        write_to(folder.path()).unwrap();
        let questions = questions_of(folder.path()).unwrap();
        assert_eq!(questions.len(), 5);
        for question in questions {
            let content = std::fs::read_to_string(folder.path().join(&question.document)).unwrap();
            assert!(content.contains(&question.phrase), "{question:?}");
        }
        std::fs::write(folder.path().join(QUESTIONS_FILE), "{}").unwrap();
        assert_eq!(questions_of(folder.path()).unwrap_err().exit(), Exit::Input);
        std::fs::remove_file(folder.path().join(QUESTIONS_FILE)).unwrap();
        assert!(questions_of(folder.path()).unwrap().is_empty());
    }
}

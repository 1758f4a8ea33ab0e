//! The graded pairs of sentences, from the file beside the sources. No vectors.

use anyhow::{Context, ensure};
use std::collections::HashMap;

/// The file: what the grades mean stands at its top.
const FILE: &str = include_str!("../../similarity.tsv");
/// The highest grade.
const MAX_GRADE: u8 = 5;

/// Pairs of sentences with a grade of how much they mean the same.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// Every sentence once.
    pub(crate) sentences: Vec<String>,
    /// Grade, and the numbers of both sentences.
    pub(crate) pairs: Vec<(u8, usize, usize)>,
}

impl Pairs {
    /// Those of the file.
    ///
    /// # Errors
    /// Names the line that is none.
    pub(crate) fn read() -> anyhow::Result<Pairs> {
        Pairs::parse(FILE)
    }

    fn parse(text: &str) -> anyhow::Result<Pairs> {
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut sentences = Vec::new();
        let mut pairs = Vec::new();
        for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
            let pair = || -> Option<(u8, &str, &str)> {
                let mut fields = line.split('\t');
                let pair = (fields.next()?.parse().ok()?, fields.next()?, fields.next()?);
                fields.next().is_none().then_some(pair)
            };
            let (grade, a, b) =
                pair().with_context(|| format!("line {}: no grade and two sentences", at + 1))?;
            ensure!(
                grade <= MAX_GRADE && a != b,
                "line {}: a grade above {MAX_GRADE}, or one sentence twice",
                at + 1
            );
            let mut number = |sentence| {
                *numbers.entry(sentence).or_insert_with(|| {
                    sentences.push(String::from(sentence));
                    sentences.len() - 1
                })
            };
            pairs.push((grade, number(a), number(b)));
        }
        ensure!(!pairs.is_empty(), "no pairs");
        Ok(Pairs { sentences, pairs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_file_has_enough_pairs_of_every_grade_and_none_twice() {
        let all = Pairs::read().unwrap();
        for grade in 0..=MAX_GRADE {
            assert!(all.pairs.iter().filter(|(of, ..)| *of == grade).count() >= 40, "grade {grade}");
        }
        let unordered: HashSet<_> = all.pairs.iter().map(|(_, a, b)| (a.min(b), a.max(b))).collect();
        assert_eq!(unordered.len(), all.pairs.len());
        assert_eq!(all.sentences.iter().collect::<HashSet<_>>().len(), all.sentences.len());
    }

    #[test]
    fn lines_that_are_no_pair_are_refused() {
        assert_eq!(Pairs::parse("# x\n3\ta\tb\n1\tb\tc\n").unwrap().pairs, [(3, 0, 1), (1, 1, 2)]);
        for text in ["", "6\ta\tb", "x\ta\tb", "3\ta", "3\ta\tb\tc", "3\ta\ta"] {
            assert!(Pairs::parse(text).is_err(), "{text:?}");
        }
    }
}

//! The texts that engines are compared with: one length, a mix of lengths, and prose. No text comes twice, so that
//! nothing can be answered from a cache. Nothing is measured here.

use crate::texts::Texts;
use anyhow::{Context, ensure};
use clap::ValueEnum;
use std::collections::BTreeMap;
use std::path::Path;

/// Shortest and longest text of the mix, in tokens.
const MIX_TOKENS: (f64, f64) = (8.0, 256.0);
/// Sentences of the longest passage of prose; passages of 1 to so many come equally often.
const PASSAGE_SENTENCES: usize = 8;
/// Bytes of English prose for each token, about; only how many passages are taken depends on it.
const PROSE_BYTES_A_TOKEN: usize = 4;
/// Bytes of a document that is read for prose, at most.
const DOCUMENT_BYTES: u64 = 1 << 20;

/// A kind of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Set {
    /// Words, 16 tokens each.
    #[value(name = "16")]
    Short,
    /// Words, 128 tokens each.
    #[value(name = "128")]
    Medium,
    /// Words, 256 tokens each.
    #[value(name = "256")]
    Long,
    /// Words, 8 to 256 tokens, every doubling of the length as often as the next.
    Mix,
    /// Passages of 1 to 8 sentences from the demo's documents.
    Prose,
}

impl Set {
    /// Its name on the command line and in results.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Set::Short => "16",
            Set::Medium => "128",
            Set::Long => "256",
            Set::Mix => "mix",
            Set::Prose => "prose",
        }
    }

    /// Tokens of each of its texts, when all have the same.
    pub(crate) const fn tokens(self) -> Option<usize> {
        match self {
            Set::Short => Some(16),
            Set::Medium => Some(128),
            Set::Long => Some(256),
            Set::Mix | Set::Prose => None,
        }
    }
}

/// Makes texts of every set.
#[derive(Debug)]
pub(crate) struct Sets {
    words: BTreeMap<usize, Texts>,
    prose: Passages,
    shuffles: u64,
}

impl Sets {
    /// Texts, with prose from the documents in `corpus`.
    ///
    /// # Errors
    /// When the folder cannot be read or has too little prose.
    pub(crate) fn new(corpus: &Path) -> anyhow::Result<Sets> {
        Ok(Sets { words: BTreeMap::new(), prose: Passages::read(corpus)?, shuffles: 0 })
    }

    /// New texts of `tokens` tokens in all, about.
    pub(crate) fn of_tokens(&mut self, set: Set, tokens: usize) -> Vec<String> {
        match set {
            Set::Prose => {
                let mut texts = Vec::new();
                let mut bytes = 0;
                while bytes < tokens * PROSE_BYTES_A_TOKEN {
                    let text = self.prose.next();
                    bytes += text.len();
                    texts.push(text);
                }
                texts
            }
            Set::Mix => self.some(set, (tokens as f64 / mean_of_mix()).round().max(1.0) as usize),
            _ => self.some(set, (tokens / set.tokens().unwrap_or(1)).max(1)),
        }
    }

    /// So many new texts.
    pub(crate) fn some(&mut self, set: Set, count: usize) -> Vec<String> {
        match (set, set.tokens()) {
            (Set::Prose, _) => (0..count).map(|_| self.prose.next()).collect(),
            (_, Some(tokens)) => (0..count).map(|_| self.words(tokens)).collect(),
            (_, None) => {
                let mut lengths = mix(count);
                self.shuffles += 1;
                shuffle(&mut lengths, self.shuffles);
                lengths.into_iter().map(|tokens| self.words(tokens)).collect()
            }
        }
    }

    fn words(&mut self, tokens: usize) -> String {
        self.words.entry(tokens).or_insert_with(|| Texts::new(tokens)).next()
    }
}

/// Lengths whose logarithms are spread evenly, ascending: every round has the same, so that rounds compare.
fn mix(count: usize) -> Vec<usize> {
    let (low, high) = MIX_TOKENS;
    let at = |i: usize| (low * (high / low).powf((i as f64 + 0.5) / count as f64)).round() as usize;
    (0..count).map(at).collect()
}

/// Mean of the log-uniform distribution.
fn mean_of_mix() -> f64 {
    let (low, high) = MIX_TOKENS;
    (high - low) / (high / low).ln()
}

/// Fisher-Yates over splitmix64.
fn shuffle(lengths: &mut [usize], seed: u64) {
    let mut state = seed;
    for i in (1..lengths.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        lengths.swap(i, ((bits ^ bits >> 31) % (i as u64 + 1)) as usize);
    }
}

/// Passages of prose: some consecutive sentences of a document.
#[derive(Debug)]
pub(crate) struct Passages {
    documents: Vec<Vec<String>>,
    starts: Vec<(usize, usize)>,
    stride: usize,
    drawn: usize,
}

impl Passages {
    /// The Markdown and text documents of a folder.
    ///
    /// # Errors
    /// When it cannot be read or has too little prose.
    pub(crate) fn read(folder: &Path) -> anyhow::Result<Passages> {
        let listing = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
        let mut files = listing.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<Vec<_>>>()?;
        files.retain(|file| file.extension().is_some_and(|kind| kind == "md" || kind == "txt"));
        files.sort();
        let mut documents = Vec::new();
        for file in files {
            let bytes = file.metadata().with_context(|| format!("reading {}", file.display()))?.len();
            ensure!(bytes <= DOCUMENT_BYTES, "{} has {bytes} bytes: too many for prose", file.display());
            let text =
                std::fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
            documents.push(sentences(&text));
        }
        Passages::of(documents).with_context(|| format!("{} has too little prose", folder.display()))
    }

    /// `None` when no document has sentences enough for one passage.
    fn of(documents: Vec<Vec<String>>) -> Option<Passages> {
        let starts_of = |(number, sentences): (usize, &Vec<String>)| {
            let count = (sentences.len() + 1).saturating_sub(PASSAGE_SENTENCES);
            (0..count).map(move |at| (number, at)).collect::<Vec<_>>()
        };
        let starts: Vec<_> = documents.iter().enumerate().flat_map(starts_of).collect();
        let coprime = |stride: &usize| greatest_common_divisor(*stride, starts.len()) == 1;
        // About the golden section: consecutive passages lie far apart, and every start comes once a pass.
        let stride = (starts.len() * 618 / 1000..=starts.len()).find(coprime)?;
        (!starts.is_empty()).then_some(Passages { documents, starts, stride, drawn: 0 })
    }

    /// Every sentence of all documents.
    pub(crate) fn sentences(&self) -> impl Iterator<Item = String> {
        self.documents.iter().flatten().cloned()
    }

    /// The next passage; they begin to come again after 8 for each sentence that one can begin with.
    pub(crate) fn next(&mut self) -> String {
        let (pass, within) = (self.drawn / self.starts.len(), self.drawn % self.starts.len());
        let (document, at) = self.starts[within * self.stride % self.starts.len()];
        let count = 1 + (within + pass) % PASSAGE_SENTENCES;
        self.drawn += 1;
        self.documents[document][at..at + count].join(" ")
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Sentences of the paragraphs of a document; headings, tables, code and comments are left out.
fn sentences(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for paragraph in text.split("\n\n") {
        let start = paragraph.trim_start();
        if start.starts_with(['#', '|', '`', '<', '~']) {
            continue;
        }
        let mut sentence = String::new();
        for word in paragraph.split_whitespace().filter(|word| !matches!(*word, "-" | "*" | ">")) {
            if !sentence.is_empty() {
                sentence.push(' ');
            }
            sentence.push_str(word);
            if word.ends_with(['.', '!', '?']) {
                found.push(std::mem::take(&mut sentence));
            }
        }
        if !sentence.is_empty() {
            found.push(sentence);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn corpus() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/corpus")
    }

    #[test]
    fn sets_have_the_tokens_asked_for_and_no_text_twice() {
        let mut sets = Sets::new(&corpus()).unwrap();
        let mut seen = HashSet::new();
        for set in Set::value_variants() {
            for _round in 0..4 {
                let texts = sets.of_tokens(*set, 4096);
                let bytes: usize = texts.iter().map(String::len).sum();
                // Words of the generator are 4 to 8 bytes long, prose about as long.
                assert!((4096 * 3..4096 * 8).contains(&bytes), "{set:?}: {bytes} bytes");
                assert!(texts.iter().all(|text| !text.is_empty()));
                for text in texts {
                    assert!(seen.insert(text.clone()), "{set:?} has twice: {text}");
                }
            }
        }
    }

    #[test]
    fn lengths_of_the_mix_are_log_uniform() {
        let lengths = mix(100);
        assert!(lengths.iter().all(|tokens| (8..=256).contains(tokens)), "{lengths:?}");
        // Five doublings, each as often as the next.
        for octave in 0..5 {
            let (low, high) = (8 << octave, 16 << octave);
            let count = lengths.iter().filter(|tokens| (low..high).contains(*tokens)).count();
            assert!((18..=22).contains(&count), "{low}..{high}: {count}");
        }
        let mean = lengths.iter().sum::<usize>() as f64 / 100.0;
        assert!((mean / mean_of_mix() - 1.0).abs() < 0.02, "{mean}");
    }

    #[test]
    fn shuffling_keeps_all_and_moves_most() {
        let mut lengths: Vec<usize> = (0..100).collect();
        shuffle(&mut lengths, 1);
        assert!(lengths.iter().enumerate().filter(|(i, length)| i == *length).count() < 10);
        lengths.sort_unstable();
        assert_eq!(lengths, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn passages_are_consecutive_sentences_and_come_once() {
        let document = |letter: &str, count: usize| (0..count).map(|i| format!("{letter}{i}.")).collect();
        let mut passages = Passages::of(vec![document("a", 20), document("b", 3), document("c", 9)]).unwrap();
        let all: Vec<String> =
            (0..passages.starts.len() * PASSAGE_SENTENCES).map(|_| passages.next()).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(all.contains(&"a0. a1. a2.".to_owned()));
        assert!(all.iter().all(|passage| !passage.contains('b')), "too short a document was used");
        assert!(Passages::of(vec![document("b", 3)]).is_none());
        assert!(Passages::of(Vec::new()).is_none());
    }

    #[test]
    fn sentences_leave_out_what_is_no_prose() {
        let text =
            "# Title\n\nOne is\nhere. Two? - Three\n\n| a | b |\n|---|---|\n\n```sh\nrun it.\n```\n\nFour";
        assert_eq!(sentences(text), ["One is here.", "Two?", "Three", "Four"]);
    }

    #[test]
    fn a_folder_without_prose_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Passages::read(folder.path()).unwrap_err().to_string().contains("too little prose"));
        assert!(Passages::read(&folder.path().join("none")).is_err());
    }
}

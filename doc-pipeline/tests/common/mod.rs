//! A deterministic model for tests: tokens by rule, vectors by hashing words. Nothing of it is in the library.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ops::Range;

use doc_pipeline::{ModelFailure, TextModel};

/// Length of the test model's vectors.
pub(crate) const DIMENSION: usize = 512;

/// Tokens are runs of at most four characters within a word; a vector counts hashed words.
pub(crate) struct TestModel {
    /// Part of the fingerprint.
    pub(crate) version: u32,
    /// Longest input, with two special tokens.
    pub(crate) max_tokens: usize,
    /// Whether each line break within a text is a token too: then joined texts count more than their parts.
    pub(crate) counts_line_breaks: bool,
    /// Refuses texts that hold this word.
    pub(crate) fails_on: Option<&'static str>,
}

impl Default for TestModel {
    fn default() -> Self {
        Self { version: 1, max_tokens: 256, counts_line_breaks: false, fails_on: None }
    }
}

/// The tokens of a text.
pub(crate) fn tokens_of(text: &str, counts_line_breaks: bool) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut in_word = 0;
    for (at, character) in text.char_indices() {
        let end = at + character.len_utf8();
        if character == '\n' && counts_line_breaks {
            out.push(at..end);
            in_word = 0;
        } else if character.is_whitespace() {
            in_word = 0;
        } else if in_word % 4 == 0 {
            out.push(at..end);
            in_word += 1;
        } else {
            out.last_mut().expect("a word has a token").end = end;
            in_word += 1;
        }
    }
    out
}

fn hash(word: &str) -> u64 {
    word.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

impl TextModel for TestModel {
    fn model_id(&self) -> &str {
        "test-model"
    }

    fn fingerprint(&self) -> String {
        format!("{:064x}", self.version)
    }

    fn dimension(&self) -> usize {
        DIMENSION
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    fn token_spans(&self, texts: &[&str]) -> Result<Vec<Vec<Range<usize>>>, ModelFailure> {
        Ok(texts.iter().map(|text| tokens_of(text, self.counts_line_breaks)).collect())
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<Vec<f32>>, ModelFailure> {
        texts
            .iter()
            .map(|text| {
                if self.fails_on.is_some_and(|word| text.contains(word)) {
                    return Err(ModelFailure::unavailable("the model went away: start it again"));
                }
                assert!(
                    self.token_spans(&[text])?[0].len() + 2 <= self.max_tokens,
                    "a text would be truncated"
                );
                let mut vector = vec![0.0_f32; DIMENSION];
                vector[0] = 0.01;
                for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| word.chars().count() > 3)
                {
                    let hash = hash(&word.to_lowercase());
                    vector[(hash % DIMENSION as u64) as usize] += if hash >> 63 == 0 { 1.0 } else { -1.0 };
                }
                let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
                Ok(vector.into_iter().map(|x| x / norm).collect())
            })
            .collect()
    }
}

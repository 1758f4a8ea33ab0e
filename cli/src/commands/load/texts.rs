//! The texts of a load: made from a fixed list of words and a seed, all different. No clock, no model.

/// Fewest tokens of a text: two special tokens and the two words that make it different from all others.
pub(crate) const MIN_TOKENS: usize = 4;
/// Fewest tokens of a text that is made on the way: its words are drawn from so many that none comes twice.
pub(crate) const MIN_FRESH_TOKENS: usize = 12;
/// Most tokens of a text; every model cuts far below.
pub(crate) const MAX_TOKENS: usize = 32_768;
/// Most texts of a load: as many as two words can tell apart.
pub(crate) const MAX_TEXTS: usize = 4096;
/// Special tokens around a text of an encoder model.
const SPECIAL_TOKENS: usize = 2;

/// Short English words, each one token in the usual vocabularies.
const WORDS: [&str; 128] = [
    "the",
    "of",
    "and",
    "in",
    "to",
    "was",
    "he",
    "is",
    "as",
    "for",
    "on",
    "with",
    "that",
    "it",
    "his",
    "by",
    "at",
    "from",
    "her",
    "she",
    "you",
    "had",
    "an",
    "were",
    "but",
    "be",
    "this",
    "are",
    "not",
    "my",
    "they",
    "one",
    "which",
    "or",
    "have",
    "him",
    "me",
    "first",
    "all",
    "also",
    "their",
    "has",
    "up",
    "who",
    "out",
    "been",
    "when",
    "after",
    "there",
    "into",
    "new",
    "two",
    "its",
    "time",
    "would",
    "no",
    "what",
    "about",
    "said",
    "we",
    "over",
    "then",
    "other",
    "so",
    "more",
    "can",
    "if",
    "like",
    "back",
    "them",
    "only",
    "some",
    "could",
    "where",
    "just",
    "during",
    "before",
    "do",
    "made",
    "school",
    "through",
    "than",
    "now",
    "years",
    "most",
    "world",
    "may",
    "between",
    "down",
    "well",
    "three",
    "year",
    "while",
    "will",
    "later",
    "city",
    "under",
    "around",
    "did",
    "such",
    "being",
    "used",
    "state",
    "people",
    "part",
    "know",
    "against",
    "your",
    "many",
    "second",
    "university",
    "both",
    "national",
    "these",
    "until",
    "how",
    "life",
    "game",
    "house",
    "work",
    "early",
    "water",
    "light",
    "road",
    "music",
    "stone",
    "river",
    "paper",
];

/// A small generator of random numbers (splitmix64): the same texts from the same seed, everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    fn word(&mut self) -> &'static str {
        WORDS[(self.next() % WORDS.len() as u64) as usize]
    }
}

/// The mixing step of splitmix64: other numbers give numbers without any relation.
pub(crate) fn mixed(number: u64) -> u64 {
    let mut z = number;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Makes texts one by one, as many as are wanted. Ten words or more are drawn for each: 70 bits, so none comes twice.
pub(crate) struct Fresh {
    random: Random,
    words: usize,
}

impl Fresh {
    /// Texts of about `tokens` tokens, [`MIN_FRESH_TOKENS`] at least.
    pub(crate) fn new(seed: u64, tokens: usize) -> Fresh {
        Fresh { random: Random(seed), words: tokens.clamp(MIN_FRESH_TOKENS, MAX_TOKENS) - SPECIAL_TOKENS }
    }

    /// The next text.
    pub(crate) fn next(&mut self) -> String {
        let mut text = String::with_capacity(self.words * 8);
        for word in 0..self.words {
            if word > 0 {
                text.push(' ');
            }
            text.push_str(self.random.word());
        }
        text
    }
}

/// `count` texts (at most [`MAX_TEXTS`]) of about `tokens` tokens each, no two alike.
pub(crate) fn make(seed: u64, count: usize, tokens: usize) -> Vec<String> {
    let words = tokens.clamp(MIN_TOKENS, MAX_TOKENS) - SPECIAL_TOKENS;
    let mut random = Random(seed);
    (0..count.min(MAX_TEXTS))
        .map(|number| {
            // The first two words spell the number of the text.
            let mut text = format!("{} {}", WORDS[number / 64], WORDS[number % 64]);
            for _ in 2..words {
                text.push(' ');
                text.push_str(random.word());
            }
            text
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn texts_differ_have_the_length_and_repeat_with_the_seed() {
        for tokens in [0, MIN_TOKENS, 5, 64] {
            let texts = make(7, MAX_TEXTS + 1, tokens);
            let words = tokens.max(MIN_TOKENS) - SPECIAL_TOKENS;
            assert!(texts.iter().all(|text| text.split(' ').count() == words));
            assert_eq!(texts.iter().collect::<HashSet<_>>().len(), MAX_TEXTS, "{tokens}");
        }
        assert_eq!(make(1, 9, 20), make(1, 9, 20));
        assert_ne!(make(1, 9, 20), make(2, 9, 20));
    }

    #[test]
    fn fresh_texts_never_come_again() {
        let mut seen = HashSet::new();
        for seed in 0..4 {
            let mut fresh = Fresh::new(mixed(seed), 0);
            for _ in 0..10_000 {
                let text = fresh.next();
                assert_eq!(text.split(' ').count(), MIN_FRESH_TOKENS - SPECIAL_TOKENS);
                assert!(seen.insert(text));
            }
        }
    }
}

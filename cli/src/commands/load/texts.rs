//! The texts of a load: made from a fixed list of words and a seed, all different. No clock, no model.

/// Fewest tokens of a text: two special tokens and the two words that make it different from all others.
pub(crate) const MIN_TOKENS: usize = 4;
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
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
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
                text.push_str(WORDS[(random.next() % WORDS.len() as u64) as usize]);
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
}

//! Texts of a given length, no two alike, so that nothing can be answered from a cache. No measurements.

/// Words that are one token each in the vocabulary of BERT models.
const WORDS: [&str; 32] = [
    "water", "house", "river", "light", "market", "paper", "engine", "winter", "garden", "letter", "music",
    "number", "road", "school", "silver", "stone", "table", "train", "tree", "village", "wall", "wind",
    "window", "wood", "work", "year", "north", "south", "green", "small", "early", "still",
];
/// Tokens that the tokenizer adds around a text.
const SPECIAL_TOKENS: usize = 2;

/// Makes texts of one length.
#[derive(Debug)]
pub(crate) struct Texts {
    words: usize,
    state: u64,
}

impl Texts {
    /// Texts of `tokens` tokens, special ones counted; at least one word.
    pub(crate) fn new(tokens: usize) -> Texts {
        Texts { words: tokens.saturating_sub(SPECIAL_TOKENS).max(1), state: tokens as u64 }
    }

    /// The next text.
    pub(crate) fn next(&mut self) -> String {
        let mut text = String::with_capacity(self.words * 7);
        for word in 0..self.words {
            if word > 0 {
                text.push(' ');
            }
            // splitmix64: successive states give unrelated words.
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = self.state;
            bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            text.push_str(WORDS[(bits >> 32) as usize % WORDS.len()]);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_have_the_length_asked_for_and_differ() {
        let mut texts = Texts::new(16);
        let (first, second) = (texts.next(), texts.next());
        assert_eq!(first.split(' ').count(), 14);
        assert_ne!(first, second);
        assert_eq!(Texts::new(0).next().split(' ').count(), 1);
    }
}

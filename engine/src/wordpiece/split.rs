//! A normalised piece to tokens: words at blanks and punctuation, and each word into the longest entries of the vocabulary.

use super::chars::{AsciiClass, CharTable, Class, Source};
use super::normalize::{Padded, Sources};
use super::vocab::{Place, Vocab};
use std::ops::Range;

/// What tokens become: ids, or the places of the text that they stand for.
pub(super) trait Output {
    /// What has to be known of where normalised bytes come from.
    type Sources: Sources;
    /// Takes a token of the current piece, with its range in the normalised piece.
    fn token(&mut self, id: u32, range: Range<usize>);
    /// Takes an added token, with its range in the original text.
    fn added(&mut self, id: u32, range: Range<usize>);
    /// Tokens taken so far.
    fn taken(&self) -> usize;
    /// Forgets all tokens but the first `count`.
    fn truncate(&mut self, count: usize);
    /// Ends the current piece, whose normalised bytes come from `sources`.
    fn end_piece(&mut self, sources: &Self::Sources);
}

impl Output for Vec<u32> {
    type Sources = ();

    #[inline]
    fn token(&mut self, id: u32, _: Range<usize>) {
        self.push(id);
    }

    fn added(&mut self, id: u32, _: Range<usize>) {
        self.push(id);
    }

    #[inline]
    fn taken(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, count: usize) {
        Vec::truncate(self, count);
    }

    fn end_piece(&mut self, (): &()) {}
}

/// Ranges of tokens: in the original text, those of the current piece still in the normalised one.
#[derive(Default)]
pub(super) struct Spans {
    pub(super) found: Vec<Range<usize>>,
    /// How many are in the original text.
    placed: usize,
}

impl Output for Spans {
    type Sources = Vec<Source>;

    fn token(&mut self, _: u32, range: Range<usize>) {
        self.found.push(range);
    }

    fn added(&mut self, _: u32, range: Range<usize>) {
        self.found.push(range);
        self.placed = self.found.len();
    }

    fn taken(&self) -> usize {
        self.found.len()
    }

    fn truncate(&mut self, count: usize) {
        self.found.truncate(count);
    }

    fn end_piece(&mut self, sources: &Vec<Source>) {
        for range in self.found.iter_mut().skip(self.placed) {
            let first = sources.get(range.start).copied().unwrap_or_default();
            let last = sources.get(range.end.saturating_sub(1)).copied().unwrap_or_default();
            *range = first.0..last.1;
        }
        self.placed = self.found.len();
    }
}

/// Gives the tokens of the words in `range` of a normalised text.
pub(super) fn words<O: Output>(
    chars: &CharTable,
    vocab: &Vocab,
    text: &Padded<'_>,
    range: Range<usize>,
    output: &mut O,
) {
    let bytes = text.bytes();
    let (mut at, end) = (range.start, range.end);
    // Where the word begins that the text is in, if it is in one: `at` otherwise.
    let mut word = at;
    while at < end {
        let byte = bytes.get(at).copied().unwrap_or_default();
        let (class, len) = match chars.byte_class(byte) {
            AsciiClass::Is(class) => (class, 1),
            AsciiClass::NotAscii => match text.get().get(at..).and_then(|rest| rest.chars().next()) {
                Some(c) => (chars.class(c), c.len_utf8()),
                // Words begin and end between characters, so this does not occur.
                None => (Class::Blank, 1),
            },
        };
        let next = at + len;
        if class != Class::Word {
            if word < at {
                pieces(vocab, bytes, word..at, output);
            }
            if class == Class::Punctuation {
                pieces(vocab, bytes, at..next, output);
            }
            word = next;
        }
        at = next;
    }
    if word < end {
        pieces(vocab, bytes, word..end, output);
    }
}

/// Gives the tokens of one word: the longest entry that it begins with, then the longest continuation that the rest begins
/// with, and so on; the unknown token alone when there is none somewhere, or when the word is too long.
#[inline]
fn pieces<O: Output>(vocab: &Vocab, bytes: &[u8], word: Range<usize>, output: &mut O) {
    let taken = output.taken();
    let mut at = word.start;
    let mut place = Place::First;
    if !vocab.too_long(bytes, &word) {
        while at < word.end {
            let Some((id, len)) = vocab.longest(bytes, at..word.end, place) else { break };
            output.token(id, at..at + len);
            at += len;
            place = Place::Further;
        }
    }
    if at < word.end {
        output.truncate(taken);
        output.token(vocab.unknown(), word);
    }
}

//! The vocabulary as a hash table over byte strings that finds the longest entry a word begins with. Knows no Unicode.

use super::normalize::PADDING_BYTES;
use std::borrow::Cow;
use std::ops::Range;

/// Longest entry that is covered, bytes.
pub(super) const MAX_ENTRY_BYTES: usize = 256;
/// Longest entry that is held in its table row, bytes.
const SHORT_BYTES: usize = 16;
/// Bits of a slot that number an entry, from 1; the bits above are of the entry's hash.
const INDEX_BITS: u32 = 20;
/// Most entries, those for words' beginnings and for continuations together.
const MAX_ENTRIES: usize = (1 << INDEX_BITS) - 1;
/// Most slots that a search looks at; half-full tables of this size need some 70, and a vocabulary that needs more than this
/// was made to be slow.
const MAX_PROBES: usize = 256;
/// Bits of the number of a bucket of [`Vocab::starts`].
const START_BITS: u32 = 13;
/// Bytes of an entry that choose its bucket.
const START_BYTES: usize = 3;
/// Odd constants with bits well spread: digits of pi, of e, and of the golden ratio.
const SEEDS: [u64; 3] = [0x243F_6A88_85A3_08D3, 0xB7E1_5162_8AED_2A6B, 0x9E37_79B9_7F4A_7C15];
const _: () = assert!(PADDING_BYTES >= SHORT_BYTES);

/// Where in its word an entry may stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// At the word's beginning.
    First,
    /// Further on: the vocabulary has it with the continuation's prefix.
    Further,
}

/// One entry: its bytes if there are up to [`SHORT_BYTES`], else their place in `long`.
#[derive(Debug, Clone, Copy)]
struct Entry {
    low: u64,
    high: u64,
    id: u32,
    len_bytes: u16,
    place: Place,
}

/// A vocabulary with WordPiece's settings.
pub(super) struct Vocab {
    /// Open addressing with linear probing, at most half full; 0 is free.
    slots: Box<[u32]>,
    entries: Vec<Entry>,
    long: Vec<u8>,
    /// Which lengths from [`START_BYTES`] to [`SHORT_BYTES`] entries with these first bytes have, by place and a hash of the
    /// bytes: bit `n - 1` for length `n`. Spares looking for most of what is not there.
    starts: Box<[[u16; 1 << START_BITS]; 2]>,
    /// Whether there are entries of a length, for each place.
    lengths: [[bool; MAX_ENTRY_BYTES + 1]; 2],
    /// The longest entry's length, for each place.
    longest_bytes: [usize; 2],
    unknown: u32,
    max_word_chars: usize,
}

impl Vocab {
    /// Builds the table of a vocabulary of tokens and ids. `None` when it has a token twice, lacks `unknown`, or is larger
    /// than the table covers.
    pub(super) fn new(
        tokens: &[(Cow<'_, str>, u32)],
        prefix: &str,
        unknown: &str,
        max_word_chars: usize,
    ) -> Option<Vocab> {
        let further = |token: &str| token.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty());
        let count = tokens.len() + tokens.iter().filter(|(token, _)| further(token)).count();
        if count > MAX_ENTRIES {
            return None;
        }
        let mut vocab = Vocab {
            slots: vec![0; (2 * count).next_power_of_two().max(2)].into_boxed_slice(),
            entries: Vec::with_capacity(count),
            long: Vec::new(),
            starts: Box::new([[0; 1 << START_BITS]; 2]),
            lengths: [[false; MAX_ENTRY_BYTES + 1]; 2],
            longest_bytes: [0; 2],
            unknown: 0,
            max_word_chars,
        };
        for (token, id) in tokens {
            vocab.insert(token.as_bytes(), *id, Place::First)?;
            if let Some(rest) = token.strip_prefix(prefix).filter(|rest| !rest.is_empty()) {
                vocab.insert(rest.as_bytes(), *id, Place::Further)?;
            }
        }
        vocab.unknown = vocab.get(unknown)?;
        Some(vocab)
    }

    fn insert(&mut self, token: &[u8], id: u32, place: Place) -> Option<()> {
        if token.is_empty() {
            // No word is empty, so nothing looks for it.
            return Some(());
        }
        let (hash, low, high) = if token.len() <= SHORT_BYTES {
            let mut block = [0; SHORT_BYTES];
            block.get_mut(..token.len())?.copy_from_slice(token);
            let (low, high) = halves(u128::from_le_bytes(block));
            if token.len() >= START_BYTES {
                *self.starts[place as usize].get_mut(bucket(low))? |= 1 << (token.len() - 1);
            }
            (short_hash(low, high, token.len(), place), low, high)
        } else {
            let at = self.long.len() as u64;
            self.long.extend_from_slice(token);
            let hash = long_hash(token, place);
            (hash, hash, at)
        };
        *self.lengths[place as usize].get_mut(token.len())? = true;
        let longest = &mut self.longest_bytes[place as usize];
        *longest = token.len().max(*longest);
        let entry = Entry { low, high, id, len_bytes: token.len() as u16, place };
        let number = self.entries.len() as u32 + 1;
        let mask = self.slots.len() - 1;
        for probe in 0..MAX_PROBES {
            let slot = self.slots.get_mut((hash as usize).wrapping_add(probe) & mask)?;
            if *slot == 0 {
                *slot = number | tag(hash);
                self.entries.push(entry);
                return Some(());
            }
            let other = self.entries.get((*slot & MAX_ENTRIES as u32) as usize - 1)?;
            let same = (other.low, other.len_bytes, other.place) == (low, entry.len_bytes, place)
                && (other.high == high || token.len() > SHORT_BYTES);
            if same {
                return None;
            }
        }
        None
    }

    /// Finds the entry with this hash that `is` right.
    #[inline]
    fn find(&self, hash: u64, is: impl Fn(&Entry) -> bool) -> Option<u32> {
        let mask = self.slots.len() - 1;
        for probe in 0..MAX_PROBES {
            let slot = *self.slots.get((hash as usize).wrapping_add(probe) & mask)?;
            if slot == 0 {
                return None;
            }
            if slot >> INDEX_BITS == tag(hash) >> INDEX_BITS
                && let Some(entry) = self.entries.get((slot & MAX_ENTRIES as u32) as usize - 1)
                && is(entry)
            {
                return Some(entry.id);
            }
        }
        None
    }

    #[inline]
    fn find_short(&self, low: u64, high: u64, len_bytes: usize, place: Place) -> Option<u32> {
        self.find(short_hash(low, high, len_bytes, place), |entry| {
            entry.low == low
                && entry.high == high
                && usize::from(entry.len_bytes) == len_bytes
                && entry.place == place
        })
    }

    fn find_long(&self, token: &[u8], place: Place) -> Option<u32> {
        let hash = long_hash(token, place);
        self.find(hash, |entry| {
            let at = entry.high as usize;
            entry.low == hash
                && usize::from(entry.len_bytes) == token.len()
                && entry.place == place
                && self.long.get(at..at + token.len()) == Some(token)
        })
    }

    /// The id of a token, by its whole name.
    pub(super) fn get(&self, token: &str) -> Option<u32> {
        let mut block = [0; SHORT_BYTES];
        match block.get_mut(..token.len()) {
            None => self.find_long(token.as_bytes(), Place::First),
            Some(part) => {
                part.copy_from_slice(token.as_bytes());
                let (low, high) = halves(u128::from_le_bytes(block));
                self.find_short(low, high, token.len(), Place::First)
            }
        }
    }

    /// The longest entry for `place` that the bytes in `range` begin with: id and length. Behind the range must be
    /// [`PADDING_BYTES`] more bytes, whatever they are. An entry is UTF-8, so it ends between characters if the text is.
    #[inline]
    pub(super) fn longest(&self, bytes: &[u8], range: Range<usize>, place: Place) -> Option<(u32, usize)> {
        let most = range.len().min(self.longest_bytes[place as usize]);
        if most > SHORT_BYTES
            && let Some(found) = self.longest_long(bytes.get(range.start..range.start + most)?, place)
        {
            return Some(found);
        }
        let block = u128::from_le_bytes(*bytes.get(range.start..)?.first_chunk()?);
        // Bit n - 1 for length n; lengths too short for a bucket are always tried.
        let starts = self.starts[place as usize].get(bucket(block as u64)).copied().unwrap_or_default();
        let mut lengths =
            (starts | ((1 << (START_BYTES - 1)) - 1)) & ((1 << most.min(SHORT_BYTES)) - 1) as u16;
        while lengths != 0 {
            let len = lengths.ilog2() as usize + 1;
            lengths ^= 1 << (len - 1);
            let (low, high) = halves(block & (u128::MAX >> (128 - 8 * len)));
            if let Some(id) = self.find_short(low, high, len, place) {
                return Some((id, len));
            }
        }
        None
    }

    #[cold]
    fn longest_long(&self, bytes: &[u8], place: Place) -> Option<(u32, usize)> {
        let lengths = &self.lengths[place as usize];
        for len in (SHORT_BYTES + 1..=bytes.len()).rev() {
            if lengths.get(len).is_some_and(|there| *there)
                && let Some(id) = self.find_long(bytes.get(..len)?, place)
            {
                return Some((id, len));
            }
        }
        None
    }

    /// Whether a word has too many characters to be cut.
    #[inline]
    pub(super) fn too_long(&self, bytes: &[u8], word: &Range<usize>) -> bool {
        let starts = |word: &[u8]| word.iter().filter(|byte| (**byte as i8) >= -0x40).count();
        word.len() > self.max_word_chars
            && bytes.get(word.clone()).is_some_and(|word| starts(word) > self.max_word_chars)
    }

    /// The id of the unknown token.
    pub(super) fn unknown(&self) -> u32 {
        self.unknown
    }
}

fn tag(hash: u64) -> u32 {
    (hash >> 32) as u32 & !(MAX_ENTRIES as u32)
}

/// The bucket of what begins with these bytes.
#[inline]
fn bucket(low: u64) -> usize {
    (low << (64 - 8 * START_BYTES)).wrapping_mul(SEEDS[2]) as usize >> (usize::BITS - START_BITS)
}

#[inline]
fn halves(block: u128) -> (u64, u64) {
    (block as u64, (block >> 64) as u64)
}

/// Both halves of a product, folded: one multiplication that spreads all bits (as in wyhash).
#[inline]
fn fold(left: u64, right: u64) -> u64 {
    let (low, high) = halves(u128::from(left) * u128::from(right));
    low ^ high
}

#[inline]
fn short_hash(low: u64, high: u64, len_bytes: usize, place: Place) -> u64 {
    let shape = (2 * len_bytes as u64 + place as u64).wrapping_mul(SEEDS[2]);
    fold(low ^ SEEDS[0], high ^ SEEDS[1] ^ shape)
}

fn long_hash(token: &[u8], place: Place) -> u64 {
    let mut hash = SEEDS[2] ^ place as u64;
    for chunk in token.chunks(SHORT_BYTES) {
        let mut block = [0; SHORT_BYTES];
        block.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        let (low, high) = halves(u128::from_le_bytes(block));
        hash = fold(low ^ SEEDS[0] ^ hash, high ^ SEEDS[1]).wrapping_add(chunk.len() as u64);
    }
    hash
}

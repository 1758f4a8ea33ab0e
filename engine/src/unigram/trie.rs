//! A trie of byte strings in one array of 32-bit units, in the format of SentencePiece's character maps (Darts): built here,
//! and read where it lies. What the keys and their values mean must not be known here.
//!
//! A unit has its label in bits 0 to 7, whether a value hangs on it in bit 8, and the distance to its children in bits 10
//! to 30 (times 256 where bit 9 is set); with bit 31 it is a value. The child of `b` lies at the children's place XOR `b`,
//! the value at the place itself. No two nodes share a place, so the label alone tells whose child a unit is.

/// Most units: what the distance can reach without its factor.
const MAX_UNITS: usize = 1 << 21;
/// Units that are added at once; children of one node lie within one such block.
const BLOCK: usize = 256;
/// Blocks from the end in which free units are looked for. Older gaps stay: searching them again and again would make
/// building quadratic.
const OPEN_BLOCKS: usize = 16;
/// Marks a unit that is a value.
const VALUE: u32 = 1 << 31;
/// Marks a unit that a value hangs on.
const HAS_VALUE: u32 = 1 << 8;
const NONE: u32 = u32::MAX;

/// A trie in bytes that were written by anybody: whatever they are, a search ends with the text and reads within them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trie<'a> {
    units: &'a [[u8; 4]],
}

impl<'a> Trie<'a> {
    /// The trie in these bytes, little-endian units.
    pub(super) fn new(bytes: &'a [u8]) -> Trie<'a> {
        Trie { units: bytes.as_chunks::<4>().0 }
    }

    fn unit(self, place: usize) -> Option<u32> {
        self.units.get(place).map(|bytes| u32::from_le_bytes(*bytes))
    }

    /// Calls `found` with the length and value of each key that `text` begins with, shortest first, until it says no.
    /// Keys have no zero byte, and a search ends at one.
    pub(super) fn prefixes(self, text: &[u8], mut found: impl FnMut(usize, u32) -> bool) {
        let Some(root) = self.unit(0) else { return };
        let mut place = children(0, root);
        for (index, byte) in text.iter().enumerate() {
            if *byte == 0 {
                return;
            }
            let at = place ^ usize::from(*byte);
            let Some(unit) = self.unit(at) else { return };
            if unit & (VALUE | 0xff) != u32::from(*byte) {
                return;
            }
            place = children(at, unit);
            if unit & HAS_VALUE != 0 {
                let Some(value) = self.unit(place) else { return };
                if !found(index + 1, value & !VALUE) {
                    return;
                }
            }
        }
    }

    /// The value of exactly this key.
    pub(super) fn get(self, key: &[u8]) -> Option<u32> {
        let mut exact = None;
        self.prefixes(key, |len_bytes, value| {
            exact = (len_bytes == key.len()).then_some(value);
            true
        });
        exact
    }
}

fn children(at: usize, unit: u32) -> usize {
    at ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize
}

/// Builds the trie of `keys`, each with a value below 2^31; `None` when they need too many units, or a key is empty, there
/// twice, or has a zero byte.
pub fn build(mut keys: Vec<(&[u8], u32)>) -> Option<Vec<u8>> {
    keys.sort_unstable();
    let repeated = keys.windows(2).any(|pair| pair[0].0 == pair[1].0);
    let unfit = |(key, value): &(&[u8], u32)| key.is_empty() || key.contains(&0) || *value >= VALUE;
    if repeated || keys.iter().any(unfit) {
        return None;
    }
    let mut builder = Builder { units: Vec::new(), free: Vec::new(), placed: Vec::new(), first_free: NONE };
    builder.grow()?;
    builder.take(0);
    // A node: where its unit lies, its keys, and how many of their bytes lead to it.
    let mut nodes = vec![(0_usize, 0..keys.len(), 0_usize)];
    let mut labels: Vec<(u8, usize)> = Vec::new();
    while let Some((at, range, depth)) = nodes.pop() {
        labels.clear();
        let here = keys.get(range.clone())?;
        let mut value = None;
        for (offset, (key, number)) in here.iter().enumerate() {
            match key.get(depth) {
                None => value = Some(*number),
                Some(label) if labels.last().is_some_and(|(last, _)| last == label) => {}
                Some(label) => labels.push((*label, range.start + offset)),
            }
        }
        if labels.is_empty() && value.is_none() {
            continue;
        }
        let place = builder.find(&labels, value.is_some())?;
        let unit = builder.units.get_mut(at)?;
        *unit |= ((at ^ place) as u32) << 10;
        if let Some(value) = value {
            *unit |= HAS_VALUE;
            builder.take(place);
            *builder.units.get_mut(place)? = VALUE | value;
        }
        for (index, (label, start)) in labels.iter().enumerate() {
            let child = place ^ usize::from(*label);
            builder.take(child);
            *builder.units.get_mut(child)? = u32::from(*label);
            let end = labels.get(index + 1).map_or(range.end, |(_, next)| *next);
            nodes.push((child, *start..end, depth + 1));
        }
    }
    Some(builder.units.iter().flat_map(|unit| unit.to_le_bytes()).collect())
}

struct Builder {
    units: Vec<u32>,
    /// Neighbours of each free unit in the list of free ones, before and after.
    free: Vec<Option<(u32, u32)>>,
    /// Places that are some node's.
    placed: Vec<bool>,
    first_free: u32,
}

impl Builder {
    /// Adds a block of free units at the end, and closes the oldest open one.
    fn grow(&mut self) -> Option<()> {
        let start = self.units.len();
        if start + BLOCK > MAX_UNITS {
            return None;
        }
        self.units.resize(start + BLOCK, 0);
        self.placed.resize(start + BLOCK, false);
        self.free.resize(start + BLOCK, None);
        if let Some(closed) = start.checked_sub(OPEN_BLOCKS * BLOCK) {
            (closed..closed + BLOCK).for_each(|at| self.take(at));
        }
        // New ones go before the older: a node finds room there at once, and small ones fill the gaps behind.
        for at in (start..start + BLOCK).rev() {
            let next = self.first_free;
            self.free[at] = Some((NONE, next));
            if let Some(Some((before, _))) = self.free.get_mut(next as usize) {
                *before = at as u32;
            }
            self.first_free = at as u32;
        }
        Some(())
    }

    /// Takes a unit off the list of free ones, if it is there.
    fn take(&mut self, at: usize) {
        let Some((before, after)) = self.free.get_mut(at).and_then(Option::take) else { return };
        match self.free.get_mut(before as usize) {
            Some(Some((_, next))) => *next = after,
            _ => self.first_free = after,
        }
        if let Some(Some((previous, _))) = self.free.get_mut(after as usize) {
            *previous = before;
        }
    }

    fn is_free(&self, at: usize) -> bool {
        self.free.get(at).is_some_and(Option::is_some)
    }

    /// A place for the children with these labels, and for a value.
    fn find(&mut self, labels: &[(u8, usize)], value: bool) -> Option<usize> {
        let first = labels.first().map_or(0, |(label, _)| usize::from(*label));
        loop {
            let mut at = self.first_free;
            while at != NONE {
                let place = at as usize ^ if value { 0 } else { first };
                let fits = !self.placed.get(place).copied().unwrap_or(true)
                    && (!value || self.is_free(place))
                    && labels.iter().all(|(label, _)| self.is_free(place ^ usize::from(*label)));
                if fits {
                    self.placed[place] = true;
                    return Some(place);
                }
                at = self.free.get(at as usize).copied().flatten().map_or(NONE, |(_, next)| next);
            }
            self.grow()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn prefixes(trie: Trie<'_>, text: &[u8]) -> Vec<(usize, u32)> {
        let mut all = Vec::new();
        trie.prefixes(text, |len_bytes, value| {
            all.push((len_bytes, value));
            true
        });
        all
    }

    #[test]
    fn unfit_keys_are_refused() {
        assert!(build(vec![(b"", 1)]).is_none());
        assert!(build(vec![(b"a\0", 1)]).is_none());
        assert!(build(vec![(b"a", 1), (b"a", 2)]).is_none());
        assert!(build(vec![(b"a", VALUE)]).is_none());
        let none = build(Vec::new()).expect("no keys are fine");
        assert_eq!(Trie::new(&none).get(b"a"), None);
    }

    #[test]
    fn any_bytes_can_be_searched() {
        let mut bytes = build(vec![(b"abc", 7), (b"abd", 8)]).expect("a trie");
        for at in 0..bytes.len() {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                prefixes(Trie::new(&bytes), b"abcdefgh");
                bytes[at] ^= 1 << bit;
            }
        }
        prefixes(Trie::new(&[]), b"a");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn it_finds_what_a_map_finds(
            keys in prop::collection::btree_map("[a-d\u{3b1}-\u{3b4}\u{4e00}-\u{4e10}]{1,6}", 0..VALUE, 0..400),
            texts in prop::collection::vec("[a-d\u{3b1}-\u{3b4}\u{4e00}-\u{4e10}]{0,9}", 20),
        ) {
            let keys: BTreeMap<String, u32> = keys;
            let bytes = build(keys.iter().map(|(key, value)| (key.as_bytes(), *value)).collect()).expect("a trie");
            let trie = Trie::new(&bytes);
            for (key, value) in &keys {
                prop_assert_eq!(trie.get(key.as_bytes()), Some(*value));
            }
            for text in texts {
                let expected: Vec<(usize, u32)> = (1..=text.len())
                    .filter(|end| text.is_char_boundary(*end))
                    .filter_map(|end| keys.get(&text[..end]).map(|value| (end, *value)))
                    .collect();
                prop_assert_eq!(prefixes(trie, text.as_bytes()), expected);
            }
        }
    }
}

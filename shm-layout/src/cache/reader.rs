//! The readers' end of a cache: looks a key up without waiting, without writing, and without a system call.

use super::key::CacheKey;
use super::layout::{
    CacheFault, CacheGeometry, EXPIRES_AT, KEY_HIGH, KEY_LOW, SEQUENCE, SUPERSEDED_BY, VECTOR, WAYS,
};
use super::memory::CacheRead;
use std::sync::atomic::Ordering;

/// Times that an entry is read when the writer is at it; then it is a miss.
pub const READ_TRIES: usize = 3;
/// Words that are copied at once on the way from the region to the caller.
const COPY_WORDS: usize = 32;

/// A mapped cache whose header was checked. Any number of threads may look up at once.
#[derive(Debug)]
pub struct CacheReader<M> {
    memory: M,
    geometry: CacheGeometry,
    fingerprint: u64,
}

impl<M: CacheRead> CacheReader<M> {
    /// Checks the header of a region that was received, against the model that it should be for.
    ///
    /// # Errors
    /// [`CacheFault::Header`] naming the field that differs.
    pub fn new(memory: M, dim: usize, fingerprint: u64) -> Result<CacheReader<M>, CacheFault> {
        let geometry = CacheGeometry::check(&memory, dim, fingerprint)?;
        Ok(CacheReader { memory, geometry, fingerprint })
    }

    /// The memory that the cache lies in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Numbers in a vector.
    pub fn dim(&self) -> usize {
        self.geometry.dim
    }

    /// The fingerprint of the model that made the vectors.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The generation that has replaced the one that this cache is for; `None` = none has. One load.
    pub fn superseded_by(&self) -> Option<u64> {
        Some(self.memory.load(SUPERSEDED_BY, Ordering::Acquire)).filter(|generation| *generation != 0)
    }

    /// Entries that there is room for.
    pub fn slots(&self) -> usize {
        self.geometry.slots()
    }

    /// Appends the vector of `key` to `into`, `dim` numbers; false, and `into` as it was, when it is not there, expired,
    /// or being written. `now_ns` is asked only for entries that expire at all.
    pub fn lookup(&self, key: CacheKey, now_ns: impl Fn() -> u64, into: &mut Vec<f32>) -> bool {
        let set = self.geometry.set_of(key.high);
        let mut tags = [0; WAYS];
        self.memory.load_words(self.geometry.tag_at(set, 0), &mut tags);
        let length = into.len();
        for way in (0..WAYS).filter(|way| tags[*way] == key.low) {
            let at = self.geometry.entry_at(set, way);
            for _ in 0..READ_TRIES {
                match self.read_once(at, key, &now_ns, into) {
                    Some(true) => return true,
                    Some(false) => break,
                    None => into.truncate(length),
                }
            }
            into.truncate(length);
        }
        false
    }

    /// One try at an entry: `Some` says whether it is the key's and alive, `None` that the writer was at it.
    #[inline]
    fn read_once(
        &self,
        at: usize,
        key: CacheKey,
        now_ns: &impl Fn() -> u64,
        into: &mut Vec<f32>,
    ) -> Option<bool> {
        let found = self.copy_once(at, |found| found == key, into)?;
        Some(found.is_some_and(|(_, expires_at_ns)| expires_at_ns == 0 || now_ns() < expires_at_ns))
    }

    /// One try at an entry, if it holds a vector whose key is `wanted`: its key and expiry, and the vector behind what is in
    /// `into`. `None` when the writer was at it: what was appended means nothing then.
    #[inline]
    fn copy_once(
        &self,
        at: usize,
        wanted: impl Fn(CacheKey) -> bool,
        into: &mut Vec<f32>,
    ) -> Option<Option<(CacheKey, u64)>> {
        // Acquire: what the writer stored before it published this sequence is seen below.
        let before = self.memory.load(at + SEQUENCE, Ordering::Acquire);
        if !before.is_multiple_of(2) {
            return None;
        }
        let low = self.memory.load(at + KEY_LOW, Ordering::Relaxed);
        let high = self.memory.load(at + KEY_HIGH, Ordering::Relaxed);
        let expires_at_ns = self.memory.load(at + EXPIRES_AT, Ordering::Relaxed);
        // `before` is 0 where nothing was ever written, `low` where an entry was taken out: no entry of any key.
        let found = CacheKey { low, high };
        let is_wanted = before != 0 && low != 0 && wanted(found);
        if is_wanted {
            self.copy_vector(at + VECTOR, into);
        }
        // Pairs with the writer's Release fence behind the odd sequence: had a word above come from a later writing, the
        // load below would see that writing's sequence.
        self.memory.fence(Ordering::Acquire);
        if self.memory.load(at + SEQUENCE, Ordering::Relaxed) != before {
            return None;
        }
        Some(is_wanted.then_some((found, expires_at_ns)))
    }

    /// Hands `visit` a copy of each entry that is alive at `now_ns`: key, expiry (ns, 0 = never), vector; until it breaks.
    /// Entries that are written meanwhile are seen as they were before or after, or left out. Entries that were never used
    /// are not touched, so their pages take no memory.
    ///
    /// # Errors
    /// What `visit` broke with.
    pub fn walk<E>(
        &self,
        now_ns: u64,
        mut visit: impl FnMut(CacheKey, u64, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut vector = Vec::with_capacity(self.geometry.dim);
        for set in 0..self.geometry.sets {
            let mut tags = [0; WAYS];
            self.memory.load_words(self.geometry.tag_at(set, 0), &mut tags);
            for way in (0..WAYS).filter(|way| tags[*way] != 0) {
                let at = self.geometry.entry_at(set, way);
                for _ in 0..READ_TRIES {
                    vector.clear();
                    let Some(found) = self.copy_once(at, |_| true, &mut vector) else { continue };
                    if let Some((key, expires_at_ns)) = found
                        && (expires_at_ns == 0 || now_ns < expires_at_ns)
                    {
                        visit(key, expires_at_ns, &vector)?;
                    }
                    break;
                }
            }
        }
        Ok(())
    }

    fn copy_vector(&self, mut at: usize, into: &mut Vec<f32>) {
        let end = into.len() + self.geometry.dim;
        into.reserve(self.geometry.dim);
        let mut left = self.geometry.vector_words();
        let mut words = [0; COPY_WORDS];
        while left > 0 {
            let count = left.min(COPY_WORDS);
            self.memory.load_words(at, &mut words[..count]);
            for word in &words[..count] {
                into.push(f32::from_bits(*word as u32));
                into.push(f32::from_bits((*word >> 32) as u32));
            }
            at += 8 * count;
            left -= count;
        }
        // Of an odd number of numbers the last word holds one.
        into.truncate(end);
    }
}

//! The one writer's end of a cache: where a vector goes, what goes for it, and the writing that readers may watch.

use super::key::CacheKey;
use super::layout::{
    CacheFault, CacheGeometry, EXPIRES_AT, KEY_HIGH, KEY_LOW, SEQUENCE, SUPERSEDED_BY, VECTOR, WAYS,
};
use super::memory::CacheWrite;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

/// What became of a vector that was offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Insert {
    /// It is in the cache.
    Kept,
    /// It came from bulk work, and only living entries could have gone for it.
    NoRoom,
    /// It is not a vector of this cache: another length, or a number that is not finite.
    Refused,
}

/// The writer's end. All that it decides by stands in private memory; the region is only written.
#[derive(Debug)]
pub struct CacheWriter<M> {
    memory: M,
    geometry: CacheGeometry,
    most_entries: usize,
    slots: Vec<Slot>,
    entries: usize,
    /// Slots in the order in which they were filled, each with the number of that filling. Those filled again since are
    /// left in until they come to the front, or until there are as many of them as slots.
    order: VecDeque<(u64, u32)>,
    fillings: u64,
}

/// A slot as the writer knows it.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    low: u64,
    high: u64,
    expires_at_ns: u64,
    sequence: u64,
    /// Number of its filling; 0 = empty.
    filling: u64,
}

impl Slot {
    fn is_expired(&self, now_ns: u64) -> bool {
        self.expires_at_ns != 0 && self.expires_at_ns <= now_ns
    }
}

impl<M: CacheWrite> CacheWriter<M> {
    /// Lays out a fresh region of zeros. `most_entries` vectors at most are kept.
    ///
    /// # Errors
    /// [`CacheFault::Header`] when the region has another size than the geometry.
    pub fn create(
        memory: M,
        geometry: CacheGeometry,
        most_entries: usize,
        fingerprint: u64,
    ) -> Result<CacheWriter<M>, CacheFault> {
        if memory.len_bytes() != geometry.region_bytes() {
            return Err(CacheFault::Header("region_bytes"));
        }
        geometry.write_header(&memory, fingerprint);
        Ok(CacheWriter {
            memory,
            geometry,
            most_entries: most_entries.min(geometry.slots()),
            slots: vec![Slot::default(); geometry.slots()],
            entries: 0,
            order: VecDeque::new(),
            fillings: 0,
        })
    }

    /// Tells readers that another generation has replaced the one that this cache is for. Not 0.
    pub fn supersede(&self, generation: u64) {
        self.memory.store(SUPERSEDED_BY, generation, Ordering::Release);
    }

    /// Vectors that are kept now, expired ones that nothing has replaced counted.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Most vectors that are kept.
    pub fn capacity(&self) -> usize {
        self.most_entries
    }

    /// Keeps a vector until `expires_at_ns` (0 = for ever). What has expired goes first, then what is oldest: in the
    /// key's set, or, when the whole cache is full, anywhere. A vector of bulk work never displaces a living entry, so
    /// that indexing a corpus does not wash out queries.
    pub fn insert(
        &mut self,
        key: CacheKey,
        vector: &[f32],
        expires_at_ns: u64,
        now_ns: u64,
        is_bulk: bool,
    ) -> Insert {
        if vector.len() != self.geometry.dim || !vector.iter().all(|number| number.is_finite()) {
            return Insert::Refused;
        }
        let first = self.geometry.set_of(key.high) * WAYS;
        let set = &self.slots[first..first + WAYS];
        let is_same = |slot: &Slot| slot.filling != 0 && (slot.low, slot.high) == (key.low, key.high);
        let way = if let Some(way) = set.iter().position(is_same) {
            way
        } else if let Some(way) = set.iter().position(|slot| slot.filling != 0 && slot.is_expired(now_ns)) {
            way
        } else if let Some(way) = set.iter().position(|slot| slot.filling == 0) {
            if self.entries >= self.most_entries && !self.evict_oldest(now_ns, is_bulk) {
                return Insert::NoRoom;
            }
            way
        } else if is_bulk {
            return Insert::NoRoom;
        } else {
            (0..WAYS).min_by_key(|way| set[*way].filling).unwrap_or(0)
        };
        self.write(first + way, key, vector, expires_at_ns);
        Insert::Kept
    }

    /// Empties the slot that was filled the longest time ago; false when only a living one could go, and may not.
    fn evict_oldest(&mut self, now_ns: u64, only_expired: bool) -> bool {
        while let Some((filling, slot)) = self.order.front().copied() {
            let index = slot as usize;
            if self.slots[index].filling != filling {
                self.order.pop_front();
                continue;
            }
            if only_expired && !self.slots[index].is_expired(now_ns) {
                return false;
            }
            self.order.pop_front();
            self.empty(index);
            return true;
        }
        false
    }

    fn place(&self, index: usize) -> (usize, usize) {
        let (set, way) = (index / WAYS, index % WAYS);
        (self.geometry.tag_at(set, way), self.geometry.entry_at(set, way))
    }

    fn empty(&mut self, index: usize) {
        let (tag_at, at) = self.place(index);
        self.memory.store(tag_at, 0, Ordering::Relaxed);
        let sequence = self.begin(index, at);
        self.memory.store(at + KEY_LOW, 0, Ordering::Relaxed);
        self.memory.store(at + SEQUENCE, sequence + 2, Ordering::Release);
        self.slots[index] = Slot { sequence: sequence + 2, ..Slot::default() };
        self.entries -= 1;
    }

    /// Makes the entry's sequence odd; gives the even one before it.
    fn begin(&self, index: usize, at: usize) -> u64 {
        let sequence = self.slots[index].sequence;
        self.memory.store(at + SEQUENCE, sequence + 1, Ordering::Relaxed);
        // Pairs with the reader's Acquire fence: whoever sees a word written below sees the odd sequence as well.
        self.memory.fence(Ordering::Release);
        sequence
    }

    fn write(&mut self, index: usize, key: CacheKey, vector: &[f32], expires_at_ns: u64) {
        let (tag_at, at) = self.place(index);
        let sequence = self.begin(index, at);
        self.memory.store(at + KEY_LOW, key.low, Ordering::Relaxed);
        self.memory.store(at + KEY_HIGH, key.high, Ordering::Relaxed);
        self.memory.store(at + EXPIRES_AT, expires_at_ns, Ordering::Relaxed);
        for (word, pair) in vector.chunks(2).enumerate() {
            let second = pair.get(1).map_or(0, |number| u64::from(number.to_bits()));
            let value = u64::from(pair[0].to_bits()) | second << 32;
            self.memory.store(at + VECTOR + 8 * word, value, Ordering::Relaxed);
        }
        // Release: a reader that takes this sequence with Acquire sees the whole entry.
        self.memory.store(at + SEQUENCE, sequence + 2, Ordering::Release);
        // Last, and only a hint: found too early or too late it leads to an entry that is checked.
        self.memory.store(tag_at, key.low, Ordering::Relaxed);
        self.entries += usize::from(self.slots[index].filling == 0);
        self.fillings += 1;
        self.slots[index] = Slot {
            low: key.low,
            high: key.high,
            expires_at_ns,
            sequence: sequence + 2,
            filling: self.fillings,
        };
        self.order.push_back((self.fillings, index as u32));
        if self.order.len() > 2 * self.slots.len() {
            let slots = &self.slots;
            self.order.retain(|(filling, slot)| slots[*slot as usize].filling == *filling);
        }
    }
}

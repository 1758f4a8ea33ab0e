//! Who holds which generation, and with which lane. A lease ends with its release or with its session, however that dies.

use std::collections::{BTreeMap, HashMap};

/// A session's hold on a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) generation: u64,
    pub(crate) lane_id: Option<u64>,
}

/// All leases, by session and id.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    map: BTreeMap<(u64, u64), Lease>,
    /// Leases on each generation, where there are any: it is asked after every event.
    by_generation: HashMap<u64, usize>,
    last_id: u64,
}

impl Leases {
    /// Grants a lease; gives its id, unique in the broker's life.
    pub(crate) fn grant(&mut self, session: u64, generation: u64, lane_id: Option<u64>) -> u64 {
        self.last_id += 1;
        self.map.insert((session, self.last_id), Lease { generation, lane_id });
        *self.by_generation.entry(generation).or_default() += 1;
        self.last_id
    }

    pub(crate) fn get(&self, session: u64, lease_id: u64) -> Option<Lease> {
        self.map.get(&(session, lease_id)).copied()
    }

    pub(crate) fn end(&mut self, session: u64, lease_id: u64) -> Option<Lease> {
        let lease = self.map.remove(&(session, lease_id))?;
        if let Some(count) = self.by_generation.get_mut(&lease.generation) {
            *count -= 1;
            if *count == 0 {
                self.by_generation.remove(&lease.generation);
            }
        }
        Some(lease)
    }

    /// The ids of a session's leases.
    pub(crate) fn of_session(&self, session: u64) -> Vec<u64> {
        self.map.range((session, 0)..=(session, u64::MAX)).map(|((_, id), _)| *id).collect()
    }

    /// Number of a session's leases, and of those with a lane.
    pub(crate) fn count(&self, session: u64) -> (usize, usize) {
        let leases = self.map.range((session, 0)..=(session, u64::MAX));
        leases.fold((0, 0), |(all, lanes), (_, l)| (all + 1, lanes + usize::from(l.lane_id.is_some())))
    }

    /// Whether anybody holds this generation.
    pub(crate) fn holds(&self, generation: u64) -> bool {
        self.by_generation.contains_key(&generation)
    }

    /// Each lease with the session that holds it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Lease)> {
        self.map.iter().map(|((session, _), lease)| (*session, *lease))
    }

    /// Each lease with its session and id.
    pub(crate) fn iter_with_ids(&self) -> impl Iterator<Item = (u64, u64, Lease)> {
        self.map.iter().map(|((session, id), lease)| (*session, *id, *lease))
    }

    /// Leases on a generation.
    pub(crate) fn count_of(&self, generation: u64) -> usize {
        self.by_generation.get(&generation).copied().unwrap_or(0)
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_are_their_sessions_own() {
        let mut leases = Leases::default();
        let a = leases.grant(1, 7, Some(3));
        let b = leases.grant(2, 7, None);
        assert_eq!(leases.get(2, a), None);
        assert_eq!(leases.end(2, a), None);
        assert_eq!((leases.count(1), leases.count(2)), ((1, 1), (1, 0)));
        assert_eq!(leases.of_session(2), [b]);
        leases.end(1, a);
        assert!(leases.holds(7));
        leases.end(2, b);
        assert!(!leases.holds(7) && leases.len() == 0);
    }
}

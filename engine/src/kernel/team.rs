//! A team: the threads that compute one thing together, step by step, each a part of every step. No arithmetic.
//!
//! Steps are microseconds long where a single short text is computed, so members wait for each other by spinning.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Looks at a barrier before the thread offers its core to others.
const SPINS_BEFORE_YIELD: u32 = 1 << 14;

/// What the members of a team share.
struct Shared {
    members: usize,
    arrived: AtomicUsize,
    round: AtomicUsize,
    broken: AtomicBool,
}

/// One member's view of its team.
pub(super) struct Member<'a> {
    index: usize,
    shared: Option<&'a Shared>,
}

/// Breaks the barrier when its member panics, or the others would wait for ever.
struct Guard<'a>(&'a Shared);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.broken.store(true, Ordering::Release);
        }
    }
}

/// Runs `work` on `threads` threads of the current rayon pool as one team; alone on this thread when it is one. One team may be
/// at work in a pool at a time: two would wait for each other's threads.
pub(super) fn with_team(threads: usize, work: impl Fn(&Member<'_>) + Sync) {
    if threads <= 1 {
        return work(&Member::alone());
    }
    let shared = Shared {
        members: threads,
        arrived: AtomicUsize::new(0),
        round: AtomicUsize::new(0),
        broken: AtomicBool::new(false),
    };
    rayon::broadcast(|context| {
        // A pool may have more threads than are wanted.
        if context.index() < threads {
            let _guard = Guard(&shared);
            work(&Member { index: context.index(), shared: Some(&shared) });
        }
    });
}

impl Member<'_> {
    /// A team of one.
    pub(super) fn alone() -> Member<'static> {
        Member { index: 0, shared: None }
    }

    /// Whether this is the one member of each team that does what must be done once.
    pub(super) fn is_first(&self) -> bool {
        self.index == 0
    }

    fn members(&self) -> usize {
        self.shared.map_or(1, |shared| shared.members)
    }

    /// This member's part of `count` things, in blocks of `block`; every thing is in exactly one member's part.
    pub(super) fn part(&self, count: usize, block: usize) -> Range<usize> {
        let blocks = count.div_ceil(block);
        let at = |index: usize| (blocks * index / self.members() * block).min(count);
        at(self.index)..at(self.index + 1)
    }

    /// This member's tasks out of `count`: every so many-th, which spreads unequal neighbours.
    pub(super) fn tasks(&self, count: usize) -> impl Iterator<Item = usize> + use<> {
        (self.index..count).step_by(self.members())
    }

    /// Waits until all members are here; what any of them wrote before is visible to all behind it.
    ///
    /// # Panics
    /// When a member has panicked.
    pub(super) fn meet(&self) {
        let Some(shared) = self.shared else { return };
        let round = shared.round.load(Ordering::Relaxed);
        // AcqRel: the last to arrive has seen what all others wrote, and hands it on with the round.
        if shared.arrived.fetch_add(1, Ordering::AcqRel) + 1 == shared.members {
            shared.arrived.store(0, Ordering::Relaxed);
            shared.round.store(round.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while shared.round.load(Ordering::Acquire) == round {
            assert!(!shared.broken.load(Ordering::Acquire), "another thread of the team has failed");
            spins += 1;
            if spins % SPINS_BEFORE_YIELD == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn parts_cover_everything_once() {
        pool(3).install(|| {
            for (count, block) in [(0, 1), (1, 1), (7, 1), (7, 4), (100, 12), (5, 8)] {
                let seen: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                with_team(3, |member| {
                    for index in member.part(count, block).chain(member.tasks(count)) {
                        seen[index].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(seen.iter().all(|seen| seen.load(Ordering::Relaxed) == 2), "{count} by {block}");
            }
        });
    }

    #[test]
    fn nobody_passes_a_meeting_early() {
        let counter = AtomicUsize::new(0);
        pool(2).install(|| {
            with_team(2, |member| {
                for round in 1..=1000 {
                    counter.fetch_add(1, Ordering::Relaxed);
                    member.meet();
                    assert_eq!(counter.load(Ordering::Relaxed), 2 * round);
                    member.meet();
                }
            });
        });
    }

    #[test]
    fn a_failing_member_fails_the_team_and_not_the_next_one() {
        pool(2).install(|| {
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                with_team(2, |member| {
                    assert!(member.index == 0, "meant to fail");
                    member.meet();
                });
            }));
            assert!(failed.is_err());
            with_team(2, |member| member.meet());
        });
    }
}

//! Deadlines and pauses. Everything is counted on the monotonic clock; wall time must not be used here.

use std::time::{Duration, Instant};

/// Longest uninterrupted sleep while something may have died: nobody's death wakes a sleeper.
pub(crate) const SLICE: Duration = Duration::from_millis(50);

/// When nobody waits any more; `None` inside = never.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Option<Instant>,
    /// What the caller allowed, for messages.
    pub(crate) allowed: Duration,
}

impl Deadline {
    pub(crate) fn after(allowed: Option<Duration>) -> Deadline {
        match allowed {
            // A time too far off to name is no deadline.
            Some(allowed) => Deadline { at: Instant::now().checked_add(allowed), allowed },
            None => Deadline { at: None, allowed: Duration::MAX },
        }
    }

    pub(crate) fn at(self) -> Option<Instant> {
        self.at
    }

    pub(crate) fn has_passed(self) -> bool {
        self.at.is_some_and(|at| at <= Instant::now())
    }

    /// The time left, at most `most`.
    pub(crate) fn left_within(self, most: Duration) -> Duration {
        self.at.map_or(most, |at| at.saturating_duration_since(Instant::now()).min(most))
    }

    /// As `CLOCK_MONOTONIC` in ns, for peers; 0 = none.
    pub(crate) fn as_monotonic_ns(self) -> u64 {
        self.at.map_or(0, |at| {
            let left = at.saturating_duration_since(Instant::now());
            let now_ns = shm_os::process::monotonic_ns();
            now_ns.saturating_add(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX)).max(1)
        })
    }
}

/// Pause before attempt `attempt` (0 = the first repetition): doubles from `base` to `cap`, then a random share of the
/// upper half of that, so that many processes that lost the same broker do not return in step.
pub(crate) fn backoff(attempt: u32, base: Duration, cap: Duration) -> Duration {
    let full = base.saturating_mul(1 << attempt.min(16)).min(cap);
    let half_us = u64::try_from(full.as_micros() / 2).unwrap_or(u64::MAX);
    Duration::from_micros(half_us + random() % half_us.max(1))
}

/// A random number; need not be a good one.
pub(crate) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // Each RandomState is seeded differently; the clock tells forked twins apart.
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u64(shm_os::process::monotonic_ns());
    hasher.write_u32(shm_os::current_pid_cached());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_vary() {
        let (base, cap) = (Duration::from_millis(4), Duration::from_millis(100));
        for attempt in 0..40 {
            let full = base.saturating_mul(1 << attempt.min(16)).min(cap);
            let pause = backoff(attempt, base, cap);
            assert!(pause >= full / 2 && pause <= full, "{attempt}: {pause:?}");
        }
        let some: std::collections::HashSet<_> = (0..20).map(|_| backoff(3, base, cap)).collect();
        assert!(some.len() > 1);
    }

    #[test]
    fn deadlines_pass_or_never_do() {
        assert!(Deadline::after(Some(Duration::ZERO)).has_passed());
        assert!(!Deadline::after(None).has_passed());
        assert!(!Deadline::after(Some(Duration::MAX)).has_passed());
        assert_eq!(Deadline::after(None).as_monotonic_ns(), 0);
        let soon = Deadline::after(Some(Duration::from_secs(5)));
        assert!(soon.as_monotonic_ns() > shm_os::process::monotonic_ns());
        assert!(soon.left_within(SLICE) == SLICE);
    }
}

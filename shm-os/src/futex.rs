//! Waiting on, and waking through, a word of a shared mapping. Which word, and what its value means, must not be
//! known here.

use std::sync::atomic::AtomicU32;
use std::time::Duration;

use crate::{OsError, SharedMapping};

/// How a wait ended. None of them says that the word changed: look at it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitOutcome {
    /// Somebody woke this waiter (or the kernel did so for no reason).
    Woken,
    /// The word did not hold the expected value: there was nothing to wait for.
    ValueDiffers,
    /// The time ran out.
    TimedOut,
    /// A signal arrived.
    Interrupted,
}

/// Why a futex call was refused.
#[derive(Debug, thiserror::Error)]
pub enum FutexError {
    /// The word lies outside the mapping or is not 4-byte aligned.
    #[error(
        "a futex word at byte {offset_bytes} of a region of {mapping_bytes} bytes is misaligned or out of range"
    )]
    BadOffset {
        /// Offset asked for, bytes.
        offset_bytes: usize,
        /// Size of the mapping, bytes.
        mapping_bytes: usize,
    },
    /// The mapping belongs to the parent of this forked process.
    #[error("the region was mapped before this process was forked: connect anew in the child")]
    Forked,
    /// The kernel refused.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Sleeps until [`futex_wake`] on the same word, if the word at `offset_bytes` holds `expected`; `timeout` is counted
/// on the monotonic clock, `None` waits without end. Works between processes that map the same object.
///
/// The death of the waker wakes nobody: wait in slices and look whether the peer lives.
pub fn futex_wait(
    mapping: &SharedMapping,
    offset_bytes: usize,
    expected: u32,
    timeout: Option<Duration>,
) -> Result<WaitOutcome, FutexError> {
    let word = word_at(mapping, offset_bytes)?;
    let limit = timeout.map(timespec);
    let limit_ptr = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: `word` is an aligned word inside a live mapping (word_at), `limit_ptr` null or a timespec that outlives
    // the call. FUTEX_WAIT without the private flag identifies the word by its object, as both processes need.
    let result = unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, expected, limit_ptr, 0, 0) };
    if result == 0 {
        return Ok(WaitOutcome::Woken);
    }
    let error = OsError::last("waiting on a futex");
    match error.errno() {
        Some(libc::EAGAIN) => Ok(WaitOutcome::ValueDiffers),
        Some(libc::ETIMEDOUT) => Ok(WaitOutcome::TimedOut),
        Some(libc::EINTR) => Ok(WaitOutcome::Interrupted),
        _ => Err(error.into()),
    }
}

/// Wakes up to `max_waiters` waiters of the word at `offset_bytes`; gives how many were woken. Never blocks.
pub fn futex_wake(mapping: &SharedMapping, offset_bytes: usize, max_waiters: u32) -> Result<u32, FutexError> {
    let word = word_at(mapping, offset_bytes)?;
    let count = max_waiters.min(i32::MAX as u32);
    // SAFETY: `word` is an aligned word inside a live mapping (word_at); FUTEX_WAKE reads no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE, count, 0, 0, 0) };
    match u32::try_from(result) {
        Ok(woken) => Ok(woken),
        Err(_) => Err(OsError::last("waking a futex").into()),
    }
}

fn word_at(mapping: &SharedMapping, offset_bytes: usize) -> Result<*const AtomicU32, FutexError> {
    let mapping_bytes = mapping.len_bytes();
    let fits = offset_bytes.checked_add(4).is_some_and(|end| end <= mapping_bytes);
    if !fits || !offset_bytes.is_multiple_of(4) {
        return Err(FutexError::BadOffset { offset_bytes, mapping_bytes });
    }
    if !mapping.belongs_to_this_process() {
        return Err(FutexError::Forked);
    }
    // SAFETY: offset + 4 <= length, checked above; the base is page-aligned.
    Ok(unsafe { mapping.base().as_ptr().add(offset_bytes) }.cast_const().cast())
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memfd;
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    fn two_mappings() -> (SharedMapping, SharedMapping) {
        let fd = memfd::create_lane_region(4096).unwrap();
        let map = || SharedMapping::map_lane(fd.as_fd(), 4096).unwrap();
        (map(), map())
    }

    fn word(mapping: &SharedMapping) -> &AtomicU32 {
        // SAFETY: word_at checked range and alignment; accessed as an atomic only.
        unsafe { &*word_at(mapping, 64).unwrap() }
    }

    #[test]
    fn wakes_a_waiter_of_another_mapping_of_the_same_object() {
        let (a, b) = two_mappings();
        let waiter = std::thread::spawn(move || {
            while word(&b).load(Ordering::Acquire) == 0 {
                futex_wait(&b, 64, 0, None).unwrap();
            }
        });
        // Waiting until somebody was woken shows that the two addresses are one futex.
        while futex_wake(&a, 64, 1).unwrap() == 0 {
            std::thread::yield_now();
        }
        word(&a).store(1, Ordering::Release);
        futex_wake(&a, 64, u32::MAX).unwrap();
        waiter.join().unwrap();
    }

    #[test]
    fn tells_timeouts_and_changed_values_apart() {
        let (a, _) = two_mappings();
        assert_eq!(futex_wait(&a, 64, 1, None).unwrap(), WaitOutcome::ValueDiffers);
        assert_eq!(futex_wait(&a, 64, 0, Some(Duration::from_millis(1))).unwrap(), WaitOutcome::TimedOut);
        assert_eq!(futex_wait(&a, 64, 0, Some(Duration::ZERO)).unwrap(), WaitOutcome::TimedOut);
        assert_eq!(futex_wake(&a, 64, 1).unwrap(), 0);
    }

    #[test]
    fn refuses_words_that_are_not_in_the_region() {
        let (a, _) = two_mappings();
        for offset in [2, 4093, 4096, usize::MAX, usize::MAX - 3] {
            assert!(matches!(futex_wake(&a, offset, 1), Err(FutexError::BadOffset { .. })), "{offset}");
            assert!(matches!(futex_wait(&a, offset, 0, None), Err(FutexError::BadOffset { .. })), "{offset}");
        }
    }
}

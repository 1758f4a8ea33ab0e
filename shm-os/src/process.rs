//! Processes, clocks and this machine's shape: pidfds, limited children, cores. What children do must not be known
//! here.

mod spawn;

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

pub use spawn::{ChildLimits, MAX_TARGET_FD, SpawnedChild, spawn_limited};

use crate::{OsError, memfd};

/// Why a process operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// A descriptor to pass has an unusable target number.
    #[error("descriptor number {target} cannot be given to a child: use 3 to {MAX_TARGET_FD}, each once")]
    BadTarget {
        /// The number asked for.
        target: i32,
    },
    /// The program could not be started.
    #[error("{program} could not be started: {source}; check the path and that it is executable")]
    Spawn {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A handle of a process that stays its own when the number is given out anew; readable when the process ended.
/// errno ESRCH: there is no such process.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, OsError> {
    // SAFETY: pidfd_open takes two numbers and gives a new descriptor (close-on-exec).
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    memfd::own(raw, "opening a process handle (pidfd_open)")
}

/// Sends a signal to the process behind a pidfd; `false` when it has ended already. Signal 0 only asks.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<bool, OsError> {
    // SAFETY: a null siginfo is allowed; the descriptor is open.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null_mut::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(true);
    }
    let error = OsError::last("signalling a process");
    if error.errno() == Some(libc::ESRCH) { Ok(false) } else { Err(error) }
}

/// Takes over a descriptor that the parent handed down under a number (3 to [`MAX_TARGET_FD`]), close-on-exec from now
/// on. Each number can be taken once in a process's life.
///
/// # Errors
/// [`ProcessError::BadTarget`] for a number out of range or taken before, [`ProcessError::Os`] when nothing is open there.
pub fn take_inherited(number: i32) -> Result<OwnedFd, ProcessError> {
    static TAKEN: AtomicU64 = AtomicU64::new(0);
    if !(3..=MAX_TARGET_FD).contains(&number) {
        return Err(ProcessError::BadTarget { target: number });
    }
    // Not owned by anybody in this process yet, as far as this function can know: numbers are taken once.
    if TAKEN.fetch_or(1 << number, Ordering::Relaxed) & (1 << number) != 0 {
        return Err(ProcessError::BadTarget { target: number });
    }
    // SAFETY: F_SETFD takes a number and touches no memory; it fails on a descriptor that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(OsError::last(format!("taking over descriptor {number} from the parent process")).into());
    }
    // SAFETY: open (just checked) and taken once (TAKEN); callers name a number that the parent put there for them, so
    // nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Nanoseconds of CLOCK_MONOTONIC: the same clock in every process of this boot, without jumps.
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is writable; this clock always exists, so the call cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// Keeps other processes of the same user from reading this one's memory and the system from writing core dumps.
pub fn set_not_dumpable() -> Result<(), OsError> {
    // SAFETY: PR_SET_DUMPABLE takes a number.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } == 0 {
        Ok(())
    } else {
        Err(OsError::last("making this process unreadable for others"))
    }
}

/// How many cores this process may use at once: its CPU affinity, bounded by the cgroup's quota (v2 and v1), at
/// least 1.
pub fn cores_allowed() -> usize {
    // The standard library honours affinity and the quotas of both cgroup versions.
    std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
}

/// The CPU's architecture and what of it the kernels may use, such as "x86_64:avx2,fma,avx512f". Two machines with
/// the same string run the same packed image.
pub fn cpu_features() -> String {
    let mut found: Vec<&str> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! collect {
            ($($name:tt),*) => { $( if std::arch::is_x86_feature_detected!($name) { found.push($name); } )* };
        }
        collect!(
            "sse4.2",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avxvnni",
            "avx512f",
            "avx512bw",
            "avx512dq",
            "avx512vl",
            "avx512vnni",
            "avx512bf16",
            "avx512fp16"
        );
    }
    #[cfg(target_arch = "aarch64")]
    {
        macro_rules! collect {
            ($($name:tt),*) => { $( if std::arch::is_aarch64_feature_detected!($name) { found.push($name); } )* };
        }
        collect!("neon", "fp16", "dotprod", "bf16", "i8mm", "sve", "sve2");
    }
    if found.is_empty() {
        found.push("baseline");
    }
    format!("{}:{}", std::env::consts::ARCH, found.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_clock_goes_forward() {
        let a = monotonic_ns();
        let b = monotonic_ns();
        assert!(a > 0 && b >= a);
    }

    #[test]
    fn pidfds_signal_and_notice_the_end() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pidfd = pidfd_open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(pidfd_send_signal(pidfd.as_fd(), 0).unwrap());
        assert!(pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap());
        let poller = crate::Poller::new().unwrap();
        poller.add(&pidfd, 1, crate::Interest::READABLE).unwrap();
        let mut events = Vec::new();
        while poller.wait(&mut events, None).unwrap() == 0 {}
        child.wait().unwrap();
        assert!(!pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL).unwrap());
        assert_eq!(pidfd_open(i32::MAX).unwrap_err().errno(), Some(libc::ESRCH));
    }

    #[test]
    fn the_machine_has_a_shape() {
        assert!(cores_allowed() >= 1);
        assert!(cpu_features().starts_with(std::env::consts::ARCH));
    }
}

//! Starting a child with limits and exactly the descriptors it is meant to have.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::{fmt, io};

use super::{ProcessError, pidfd_open, pidfd_send_signal};
use crate::OsError;

/// Highest descriptor number that a child can be given.
pub const MAX_TARGET_FD: i32 = 63;
/// Where descriptors are parked on their way: above every target.
const PARKING_FD: RawFd = MAX_TARGET_FD + 1;

/// What a child may use and what it inherits. The default limits nothing and passes nothing but standard input,
/// output and error.
#[derive(Debug, Default)]
pub struct ChildLimits {
    /// Address space, bytes (RLIMIT_AS). Mapped images count.
    pub address_space_bytes: Option<u64>,
    /// CPU time, seconds (RLIMIT_CPU): SIGXCPU at the limit, SIGKILL one second later.
    pub cpu_seconds: Option<u64>,
    /// Open descriptors (RLIMIT_NOFILE).
    pub open_files: Option<u64>,
    /// Largest file it may write, bytes (RLIMIT_FSIZE).
    pub file_size_bytes: Option<u64>,
    /// Added to the niceness.
    pub nice: Option<i32>,
    /// SIGKILL when the *thread* that started the child ends: start such children from a thread that stays.
    pub parent_death_signal: bool,
    /// A session and process group of its own: no terminal signals, and the whole family can be killed.
    pub new_session: bool,
    /// No core dumps (RLIMIT_CORE 0).
    pub no_core_dump: bool,
    /// Descriptors with the numbers (3 to [`MAX_TARGET_FD`], each once) that they have in the child. Every other
    /// descriptor is closed there.
    pub inherit_fds: Vec<(OwnedFd, i32)>,
}

/// A child process with a handle that cannot come to mean another process. Dropping neither kills nor waits.
pub struct SpawnedChild {
    child: Child,
    pidfd: OwnedFd,
    new_session: bool,
}

impl fmt::Debug for SpawnedChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpawnedChild").field("pid", &self.child.id()).finish_non_exhaustive()
    }
}

impl SpawnedChild {
    /// The child's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Readable when the child has ended; for a [`Poller`](crate::Poller).
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The standard library's handle, for the pipes of standard input and output.
    pub fn child_mut(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status if the child has ended, without waiting; reaps it.
    pub fn wait_nonblocking(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        Ok(self.child.try_wait().map_err(|e| OsError::new("asking for a child's end", e))?)
    }

    /// Waits for the child's end and reaps it.
    pub fn wait(&mut self) -> Result<ExitStatus, ProcessError> {
        Ok(self.child.wait().map_err(|e| OsError::new("waiting for a child", e))?)
    }

    /// Sends a signal to the child; `false` when it has ended.
    pub fn signal(&self, signal: i32) -> Result<bool, ProcessError> {
        Ok(pidfd_send_signal(self.pidfd.as_fd(), signal)?)
    }

    /// Kills the child, and with `new_session` its whole process group. Call before the child is reaped.
    pub fn kill(&mut self) -> Result<(), ProcessError> {
        // A group's number is free for others once its leader is reaped: only an unreaped leader's is killed.
        let leader_lives = self.is_unreaped();
        if self.new_session && leader_lives {
            let group = i32::try_from(self.child.id()).unwrap_or(0);
            if group > 1 {
                // SAFETY: kill takes numbers; the group is this unreaped child's own (it called setsid).
                unsafe { libc::kill(-group, libc::SIGKILL) };
            }
        }
        self.signal(libc::SIGKILL).map(drop)
    }

    /// Whether the child is running or a zombie not waited for yet.
    fn is_unreaped(&self) -> bool {
        // SAFETY: all-zero is a valid siginfo.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let pidfd = self.pidfd.as_raw_fd().cast_unsigned();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: WNOWAIT leaves the child's state as it is; `info` is writable.
        let result = unsafe { libc::waitid(libc::P_PIDFD, pidfd, &raw mut info, options) };
        result == 0
    }
}

/// Starts `command` under `limits`. The descriptors given are closed here once the child has them.
pub fn spawn_limited(mut command: Command, limits: ChildLimits) -> Result<SpawnedChild, ProcessError> {
    let plan = ChildPlan::new(&limits)?;
    // Occupied until the child runs: otherwise the pipe by which the standard library learns of a failed exec could
    // get one of the numbers and be overwritten in the child.
    let _occupied = occupy(&plan.targets)?;
    // SAFETY: `ChildPlan::apply` makes only async-signal-safe calls (setsid, prctl, setrlimit, setpriority, fcntl,
    // dup3, close_range) and allocates nothing: its lists were made before the fork.
    unsafe { command.pre_exec(move || plan.apply()) };
    let program = command.get_program().to_string_lossy().into_owned();
    let new_session = limits.new_session;
    let child = command.spawn().map_err(|source| ProcessError::Spawn { program, source })?;
    drop(limits);
    // Not waited for yet, so the number is surely this child's.
    let pidfd = match pidfd_open(i32::try_from(child.id()).unwrap_or(-1)) {
        Ok(pidfd) => pidfd,
        Err(error) => {
            let mut child = child;
            let _ = child.kill();
            let _ = child.wait();
            return Err(error.into());
        }
    };
    Ok(SpawnedChild { child, pidfd, new_session })
}

/// Descriptors of nothing at each target number that is free.
fn occupy(targets: &[RawFd]) -> Result<Vec<OwnedFd>, OsError> {
    // The placeholders may themselves have got target numbers: all are held.
    let (placeholder, other_end) =
        std::io::pipe().map_err(|e| OsError::new("preparing a child's descriptors", e))?;
    let mut held = vec![OwnedFd::from(placeholder), OwnedFd::from(other_end)];
    for &target in targets {
        // SAFETY: F_DUPFD_CLOEXEC copies an open descriptor to the first free number from `target` on.
        let raw = unsafe { libc::fcntl(held[0].as_raw_fd(), libc::F_DUPFD_CLOEXEC, target) };
        if raw < 0 {
            return Err(OsError::last("preparing a child's descriptors"));
        }
        // SAFETY: just made, owned by nobody else.
        held.push(unsafe { OwnedFd::from_raw_fd(raw) });
    }
    Ok(held)
}

/// All that the child does between fork and exec, with every list made beforehand.
struct ChildPlan {
    rlimits: Vec<(libc::__rlimit_resource_t, u64, u64)>,
    nice: Option<i32>,
    parent_pid: Option<i32>,
    new_session: bool,
    sources: Vec<RawFd>,
    /// Sorted; `sources[i]` becomes `targets[i]`.
    targets: Vec<RawFd>,
}

impl ChildPlan {
    fn new(limits: &ChildLimits) -> Result<Self, ProcessError> {
        let mut pairs: Vec<(RawFd, RawFd)> =
            limits.inherit_fds.iter().map(|(fd, target)| (*target, fd.as_raw_fd())).collect();
        pairs.sort_unstable();
        for (index, &(target, _)) in pairs.iter().enumerate() {
            let twice = index > 0 && pairs[index - 1].0 == target;
            if !(3..=MAX_TARGET_FD).contains(&target) || twice {
                return Err(ProcessError::BadTarget { target });
            }
        }
        let mut rlimits = Vec::new();
        let mut limit = |resource, soft: Option<u64>, hard_extra: u64| {
            if let Some(soft) = soft {
                rlimits.push((resource, soft, soft.saturating_add(hard_extra)));
            }
        };
        limit(libc::RLIMIT_AS, limits.address_space_bytes, 0);
        limit(libc::RLIMIT_CPU, limits.cpu_seconds, 1);
        limit(libc::RLIMIT_NOFILE, limits.open_files, 0);
        limit(libc::RLIMIT_FSIZE, limits.file_size_bytes, 0);
        limit(libc::RLIMIT_CORE, limits.no_core_dump.then_some(0), 0);
        Ok(Self {
            rlimits,
            nice: limits.nice,
            parent_pid: limits.parent_death_signal.then(|| std::process::id().cast_signed()),
            new_session: limits.new_session,
            sources: pairs.iter().map(|pair| pair.1).collect(),
            targets: pairs.iter().map(|pair| pair.0).collect(),
        })
    }

    /// Runs in the child, between fork and exec: system calls on numbers only.
    fn apply(&self) -> io::Result<()> {
        let check =
            |result: libc::c_int| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
        // SAFETY: each call takes numbers or a pointer to a local that lives across it.
        unsafe {
            if self.new_session {
                check(libc::setsid())?;
            }
            if let Some(parent) = self.parent_pid {
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
                // The parent may have ended before the request was in place.
                if libc::getppid() != parent {
                    libc::_exit(1);
                }
            }
            if let Some(nice) = self.nice {
                let now = libc::getpriority(libc::PRIO_PROCESS, 0);
                check(libc::setpriority(libc::PRIO_PROCESS, 0, now.saturating_add(nice).clamp(-20, 19)))?;
            }
            self.place_descriptors(check)?;
            // Last: a low limit of open files or address space must not stop the steps above. A limit above what
            // this process may have is bounded to that.
            for &(resource, soft, hard) in &self.rlimits {
                let mut had = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                check(libc::getrlimit(resource, &raw mut had))?;
                let rlim_max = hard.min(had.rlim_max);
                let wanted = libc::rlimit { rlim_cur: soft.min(rlim_max), rlim_max };
                check(libc::setrlimit(resource, &raw const wanted))?;
            }
        }
        Ok(())
    }

    /// # Safety
    /// Only between fork and exec: it overwrites descriptor numbers of this process.
    unsafe fn place_descriptors(
        &self,
        check: impl Fn(libc::c_int) -> io::Result<libc::c_int>,
    ) -> io::Result<()> {
        // A target may be the number of another source: so each goes from its source over a parking place, in two
        // passes; parked copies follow one another upwards from PARKING_FD in the order of the targets.
        // SAFETY: numbers only; overwriting them is the purpose, and nothing in this process uses them before exec.
        unsafe {
            let mut last_parked = PARKING_FD - 1;
            let mut parked = [0; MAX_TARGET_FD as usize + 1];
            for (index, &source) in self.sources.iter().enumerate() {
                last_parked = check(libc::fcntl(source, libc::F_DUPFD_CLOEXEC, last_parked + 1))?;
                parked[index] = last_parked;
            }
            for (index, &target) in self.targets.iter().enumerate() {
                check(libc::dup3(parked[index], target, 0))?;
            }
            // Everything else is closed by exec; not now, the standard library's error pipe is among it.
            let mut first = 3;
            for &target in &self.targets {
                if target > first {
                    close_on_exec(first, target - 1)?;
                }
                first = target + 1;
            }
            close_on_exec(first, RawFd::MAX)
        }
    }
}

/// Marks descriptors `first..=last` close-on-exec.
///
/// # Safety
/// Only between fork and exec.
unsafe fn close_on_exec(first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: the call only sets flags of this process's descriptors.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC as libc::c_int)
    };
    if result == 0 {
        return Ok(());
    }
    // Before Linux 5.11: one by one up to the limit.
    // SAFETY: numbers only; a closed number gives EBADF, which is as good as done.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        let end = RawFd::try_from(limit.rlim_cur).unwrap_or(RawFd::MAX).min(1 << 20);
        for fd in first..=last.min(end) {
            libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
        }
    }
    Ok(())
}

//! Cheap detection of fork: which incarnation of the process is running. Nothing is done about a fork here;
//! each owner of process-bound state compares its generation and acts.
//!
//! The means is a page that the kernel clears in a forked child (`MADV_WIPEONFORK`): one relaxed load when
//! nothing happened, and, unlike `pthread_atfork`, also true for children made by a raw `clone`. A `vfork` child
//! shares its parent's memory and may only exec, so it counts as the parent.

use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// The wiped page's content; zero means "not set since the last fork".
#[repr(C)]
struct ForkPage {
    generation: AtomicU64,
    pid: AtomicU32,
}

/// Bytes mapped for the fork page; the kernel rounds up to its page size.
const FORK_PAGE_BYTES: usize = 4096;
const _: () = assert!(size_of::<ForkPage>() <= FORK_PAGE_BYTES);

/// The mapped page; null until first use, `UNSUPPORTED` where the kernel can't wipe on fork.
static PAGE: AtomicPtr<ForkPage> = AtomicPtr::new(ptr::null_mut());
/// The highest generation handed out; copied into children, so a child's next one differs from all before it.
static LAST: AtomicU64 = AtomicU64::new(0);
/// Stands for "no such page": generations are then process ids.
static UNSUPPORTED: ForkPage = ForkPage { generation: AtomicU64::new(0), pid: AtomicU32::new(0) };

fn unsupported() -> *mut ForkPage {
    ptr::from_ref(&UNSUPPORTED).cast_mut()
}

/// A number that is constant in one process and differs from that of each of its ancestors: state made under
/// another generation belongs to a parent, and must be left alone.
pub fn fork_generation() -> u64 {
    let Some(page) = page() else { return u64::from(std::process::id()) };
    let generation = page.generation.load(Ordering::Relaxed);
    if generation != 0 { generation } else { next_generation(page) }
}

/// This process's id without a system call after the first use; right in forked children too.
pub fn current_pid_cached() -> u32 {
    let Some(page) = page() else { return std::process::id() };
    match page.pid.load(Ordering::Relaxed) {
        0 => {
            let pid = std::process::id();
            page.pid.store(pid, Ordering::Relaxed);
            pid
        }
        pid => pid,
    }
}

#[cold]
fn next_generation(page: &ForkPage) -> u64 {
    // LAST grows before the page is set: a fork between the two leaves the child a number not used yet.
    let fresh = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    match page.generation.compare_exchange(0, fresh, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => fresh,
        Err(other_thread_set) => other_thread_set,
    }
}

fn page() -> Option<&'static ForkPage> {
    let mut page = PAGE.load(Ordering::Acquire);
    if page.is_null() {
        page = map_page();
    }
    // SAFETY: PAGE holds either the static UNSUPPORTED or a page that map_page checked, aligned to the page size,
    // zeroed (a valid ForkPage) and never unmapped.
    (page != unsupported()).then(|| unsafe { &*page })
}

/// No lock is used: a fork while another thread is in here must not leave the child waiting for that thread.
#[cold]
fn map_page() -> *mut ForkPage {
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let fresh = unsafe {
        libc::mmap(
            ptr::null_mut(),
            FORK_PAGE_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    let mut candidate = unsupported();
    if fresh != libc::MAP_FAILED {
        // SAFETY: the range was just mapped by this function and nobody else knows it.
        let wiped = unsafe { libc::madvise(fresh, FORK_PAGE_BYTES, libc::MADV_WIPEONFORK) } == 0;
        if wiped {
            candidate = fresh.cast();
        }
    }
    let chosen = match PAGE.compare_exchange(ptr::null_mut(), candidate, Ordering::AcqRel, Ordering::Acquire)
    {
        Ok(_) => candidate,
        Err(other_thread_set) => other_thread_set,
    };
    if fresh != libc::MAP_FAILED && chosen != fresh.cast() {
        // SAFETY: `fresh` was mapped above with this length and did not become the shared page.
        unsafe { libc::munmap(fresh, FORK_PAGE_BYTES) };
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `f` in a forked child and returns its 16 bytes. Only atomics and system calls may happen in `f`.
    fn in_forked_child(f: impl FnOnce() -> [u64; 2]) -> [u64; 2] {
        let (reader, writer) = std::io::pipe().unwrap();
        // SAFETY: the child calls only async-signal-safe code and leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let answer = f();
            // SAFETY: `answer` is 16 readable bytes; the descriptor is open in the child.
            unsafe {
                libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), answer.as_ptr().cast(), 16);
                libc::_exit(0)
            }
        }
        assert!(pid > 0);
        drop(writer);
        let mut bytes = [0; 16];
        std::io::Read::read_exact(&mut &reader, &mut bytes).unwrap();
        // SAFETY: waits for the child made above; null status is allowed.
        unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
        let word = |i: usize| u64::from_ne_bytes(bytes[i..i + 8].try_into().unwrap());
        [word(0), word(8)]
    }

    #[test]
    fn generation_is_stable_here_and_new_in_a_child() {
        let mine = fork_generation();
        assert_ne!(mine, 0);
        assert_eq!(current_pid_cached(), std::process::id());
        let [generation, pid] = in_forked_child(|| [fork_generation(), u64::from(current_pid_cached())]);
        assert_ne!(generation, mine);
        assert_ne!(generation, 0);
        assert_ne!(pid, u64::from(std::process::id()));
        assert_eq!(fork_generation(), mine);
    }

    #[test]
    fn threads_agree() {
        let mine = fork_generation();
        let others: Vec<_> = (0..8).map(|_| std::thread::spawn(fork_generation)).collect();
        for other in others {
            assert_eq!(other.join().unwrap(), mine);
        }
    }
}

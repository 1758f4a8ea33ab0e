//! Survival of SIGBUS in registered ranges (file-backed images): zeros are mapped over, a flag is set, the thread
//! goes on. Any other SIGBUS goes to the handler that was there before. What to do about a poisoned range is its
//! user's decision and must not be here.
//!
//! All that runs in the handler is async-signal-safe: atomics, `mmap`, `sigaction`, `raise`.

use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};

use crate::OsError;

/// How many ranges can be registered at once.
pub const MAX_RANGES: usize = 512;

/// One registered range. `sequence` is odd while the fields change, as in a seqlock, so that the handler never
/// acts on the start of one range with the length of another.
struct Slot {
    taken: AtomicBool,
    sequence: AtomicU32,
    start: AtomicUsize,
    len_bytes: AtomicUsize,
    protection: AtomicI32,
    poisoned: AtomicBool,
}

static SLOTS: [Slot; MAX_RANGES] = [const {
    Slot {
        taken: AtomicBool::new(false),
        sequence: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len_bytes: AtomicUsize::new(0),
        protection: AtomicI32::new(0),
        poisoned: AtomicBool::new(false),
    }
}; MAX_RANGES];

/// Whether our handler is in force.
static INSTALLED: AtomicBool = AtomicBool::new(false);
/// The action in force before ours, leaked on purpose: the handler may need it at any time. Null: not installed.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// What is mapped over a poisoned range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replacement {
    /// Zeros that can be read.
    ReadOnly,
    /// Zeros that can be read and written (privately, to be thrown away): for a writer's window.
    Writable,
}

/// A range's place in the registry; dropping it removes the range, before its memory is unmapped.
#[derive(Debug)]
pub(crate) struct Registration {
    index: usize,
}

impl Registration {
    /// Whether a SIGBUS hit the range.
    pub(crate) fn is_poisoned(&self) -> bool {
        SLOTS[self.index].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let slot = &SLOTS[self.index];
        write_slot(slot, 0, 0, 0);
        slot.taken.store(false, Ordering::Release);
    }
}

/// Installs the handler for this process, once; later calls do nothing. Called by itself when the first file-backed
/// image is mapped; a program that sets its own SIGBUS handler should do that before.
pub fn install() -> Result<(), OsError> {
    if INSTALLED.load(Ordering::Acquire) {
        return Ok(());
    }
    // SAFETY: all-zero is a valid sigaction; the call only fills it.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut previous) } != 0 {
        return Err(OsError::last("asking for the SIGBUS handler"));
    }
    // Stored before ours is installed: the handler must find it from its first run on.
    let leaked = Box::into_raw(Box::new(previous));
    if PREVIOUS.compare_exchange(ptr::null_mut(), leaked, Ordering::AcqRel, Ordering::Acquire).is_err() {
        // Another thread was first and may not have installed the handler yet: doing so twice does no harm.
        // SAFETY: this box was never shared.
        drop(unsafe { Box::from_raw(leaked) });
    }
    // SAFETY: all-zero is a valid sigaction.
    let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
    ours.sa_sigaction = on_sigbus as extern "C" fn(_, _, _) as usize;
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `ours` is initialised, its handler async-signal-safe and of the SA_SIGINFO shape.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) } != 0 {
        return Err(OsError::last("installing the SIGBUS handler"));
    }
    INSTALLED.store(true, Ordering::Release);
    Ok(())
}

/// Registers a mapped range for as long as the registration lives.
pub(crate) fn register(
    start: usize,
    len_bytes: usize,
    replacement: Replacement,
) -> Result<Registration, OsError> {
    install()?;
    let protection = match replacement {
        Replacement::ReadOnly => libc::PROT_READ,
        Replacement::Writable => libc::PROT_READ | libc::PROT_WRITE,
    };
    // Mappings are whole pages: the bytes after the end of the last one's content fault too.
    // SAFETY: sysconf takes a number.
    let page_bytes = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let len_bytes = len_bytes.next_multiple_of(page_bytes);
    for (index, slot) in SLOTS.iter().enumerate() {
        if slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            write_slot(slot, start, len_bytes, protection);
            return Ok(Registration { index });
        }
    }
    Err(OsError::new(
        "registering a mapped file with the SIGBUS handler",
        std::io::Error::other(format!(
            "{MAX_RANGES} mapped files are the limit; unload models that are not used"
        )),
    ))
}

/// Called by the slot's one owner.
fn write_slot(slot: &Slot, start: usize, len_bytes: usize, protection: i32) {
    slot.sequence.fetch_add(1, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    slot.start.store(start, Ordering::Relaxed);
    slot.len_bytes.store(len_bytes, Ordering::Relaxed);
    slot.protection.store(protection, Ordering::Relaxed);
    slot.poisoned.store(false, Ordering::Relaxed);
    slot.sequence.fetch_add(1, Ordering::Release);
}

/// The slot whose range holds `address`, with its range and protection.
fn find(address: usize) -> Option<(&'static Slot, usize, usize, i32)> {
    SLOTS.iter().find_map(|slot| {
        let before = slot.sequence.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Relaxed);
        let len_bytes = slot.len_bytes.load(Ordering::Relaxed);
        let protection = slot.protection.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let unchanged = before.is_multiple_of(2) && slot.sequence.load(Ordering::Relaxed) == before;
        // The range that faults is registered and stable: its user holds a reference while it reads.
        let inside = address >= start && address - start < len_bytes;
        (unchanged && inside).then_some((slot, start, len_bytes, protection))
    })
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: errno's location is valid in every thread; it is put back below, the interrupted code may need it.
    let saved_errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // A code of zero or less means that somebody sent the signal: no address goes with it.
    if code <= 0 || !replace_range(address) {
        pass_on(signal, info, context, code);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = saved_errno };
}

fn replace_range(address: usize) -> bool {
    let Some((slot, start, len_bytes, protection)) = find(address) else { return false };
    // First the flag: no reader may see zeros and an unset flag afterwards.
    slot.poisoned.store(true, Ordering::Release);
    // SAFETY: the range is one whole mapping of ours, in use by the interrupted thread (so it is not unmapped
    // meanwhile); fresh anonymous memory replaces it at the same place, and unmapping it later works as before.
    let mapped = unsafe {
        libc::mmap(
            start as *mut libc::c_void,
            len_bytes,
            protection,
            libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    mapped != libc::MAP_FAILED
}

fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void, code: libc::c_int) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: not null once the handler runs, and never freed.
    let previous = unsafe { &*previous };
    match previous.sa_sigaction {
        libc::SIG_IGN if code <= 0 => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: all-zero is SIG_DFL; sigaction and raise are async-signal-safe.
            unsafe {
                let default: libc::sigaction = std::mem::zeroed();
                libc::sigaction(signal, &raw const default, ptr::null_mut());
                // A fault repeats by itself on return; a sent signal does not.
                if code <= 0 {
                    libc::raise(signal);
                }
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the flag says that the address is a handler of this shape.
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO the address is a handler of one argument.
            let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memmap2::{Mmap, MmapOptions};
    use std::fs::File;
    use std::io::Write;

    fn file_of(len_bytes: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; len_bytes]).unwrap();
        file
    }

    fn map(file: &File) -> Mmap {
        // SAFETY: that the file changes under the mapping is what the test is about; it reads volatile.
        unsafe { MmapOptions::new().map(file) }.unwrap()
    }

    fn byte(map: &Mmap, at: usize) -> u8 {
        assert!(at < map.len());
        // SAFETY: in range, checked above.
        unsafe { map.as_ptr().add(at).read_volatile() }
    }

    #[test]
    fn truncation_under_a_registered_mapping_poisons_it_alone() {
        let (doomed, sound) = (file_of(20_000), file_of(20_000));
        let (a, b) = (map(&doomed), map(&sound));
        let guard_a = register(a.as_ptr() as usize, a.len(), Replacement::ReadOnly).unwrap();
        let guard_b = register(b.as_ptr() as usize, b.len(), Replacement::ReadOnly).unwrap();
        assert_eq!(byte(&a, 19_999), 7);
        doomed.set_len(0).unwrap();
        assert!(!guard_a.is_poisoned());
        assert_eq!(byte(&a, 19_999), 0);
        assert!(guard_a.is_poisoned());
        assert_eq!((byte(&a, 0), byte(&a, 8192)), (0, 0));
        assert!(!guard_b.is_poisoned());
        assert_eq!(byte(&b, 19_999), 7);
    }

    #[test]
    fn a_writers_window_stays_writable() {
        let file = file_of(8192);
        // SAFETY: private to this test.
        let mut window = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
        let guard = register(window.as_ptr() as usize, window.len(), Replacement::Writable).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: in range; the fault is handled by the replacement.
        unsafe { window.as_mut_ptr().add(5000).write_volatile(1) };
        assert!(guard.is_poisoned());
    }

    #[test]
    fn slots_are_used_again() {
        let file = file_of(4096);
        let map = map(&file);
        for _ in 0..2 * MAX_RANGES {
            drop(register(map.as_ptr() as usize, map.len(), Replacement::ReadOnly).unwrap());
        }
    }
}

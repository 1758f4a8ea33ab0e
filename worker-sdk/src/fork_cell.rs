//! State that belongs to one process and must not outlive a fork. What the state is must not be known here.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

/// Places for the states of processes that forked one out of the other.
const SLOTS: usize = 32;

type Slot<T> = Mutex<Option<(u64, Arc<T>)>>;

/// Holds one `T` for each process: a forked child gets a fresh one on first use and never touches its parent's.
///
/// A fork copies locks as they are, held ones too, and the threads that would release them are not copied. So a child
/// must not wait for any lock that its parent used: each process has a slot of its own, found by its fork generation.
/// The parent's state is dropped in the child when that is certainly safe (no thread of the parent used it at the
/// instant of the fork), and left as it is otherwise.
#[derive(Debug)]
pub(crate) struct ForkCell<T> {
    slots: Box<[Slot<T>]>,
}

impl<T> ForkCell<T> {
    pub(crate) fn new() -> ForkCell<T> {
        ForkCell { slots: (0..SLOTS).map(|_| Mutex::new(None)).collect() }
    }

    /// Only a process 32 forks deeper shares this slot; nobody else ever locks it.
    fn slot(&self, generation: u64) -> &Slot<T> {
        &self.slots[(generation % SLOTS as u64) as usize]
    }

    /// This process's state, if it has one.
    pub(crate) fn get(&self) -> Option<Arc<T>> {
        let generation = shm_os::fork_generation();
        let slot = self.slot(generation).lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().filter(|(of, _)| *of == generation).map(|(_, state)| Arc::clone(state))
    }

    /// This process's state, made now if it has none. `make` must not use this cell.
    pub(crate) fn get_or_make(&self, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let generation = shm_os::fork_generation();
        let mut slot = self.slot(generation).lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, state)) = slot.as_ref()
            && *of == generation
        {
            return Arc::clone(state);
        }
        let state = make();
        let displaced = slot.replace((generation, Arc::clone(&state)));
        drop(slot);
        drop(displaced);
        self.drop_inherited(generation);
        state
    }

    /// Lets go of what the ancestors had. A thread that was at work on such a state held a reference to it or the lock
    /// of its slot; neither is ever given up in this process, so a state in the middle of a change is never dropped.
    fn drop_inherited(&self, generation: u64) {
        for slot in &self.slots {
            let mut inherited = match slot.try_lock() {
                Ok(inherited) => inherited,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => continue,
            };
            let state = inherited.take_if(|(of, _)| *of != generation);
            drop(inherited);
            drop(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_state_in_one_process_whoever_asks() {
        let cell = ForkCell::new();
        assert!(cell.get().is_none());
        let states: Vec<Arc<u32>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|n| {
                    scope.spawn({
                        let cell = &cell;
                        move || cell.get_or_make(|| Arc::new(n))
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(states.iter().all(|state| Arc::ptr_eq(state, &states[0])));
        assert!(cell.get().is_some_and(|state| Arc::ptr_eq(&state, &states[0])));
    }
}

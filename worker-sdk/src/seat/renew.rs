//! Taking up a new generation of a model that was replaced while it is used. The new lease is had before the old one is let
//! go of, and what was out on the old one is sent again: no call fails, none is answered twice.

use super::link::Link;
use super::{Guard, Seat};
use crate::time::Deadline;
use shm_os::process::monotonic_ns;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Shortest time between two looks for news of the broker. A look costs one system call.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Longest wait for the new lease: the new generation is loaded and served when sessions are told of it.
const RENEW_WAIT: Duration = Duration::from_secs(2);
/// Pause before a renewal is tried again that failed. The old generation serves meanwhile.
const RENEW_PAUSE: Duration = Duration::from_secs(1);

impl Seat {
    /// Whether it is time to look for news; true for one of several callers.
    fn look_is_due(&self) -> bool {
        let (now_ns, due_ns) = (monotonic_ns(), self.look_due_ns.load(Ordering::Relaxed));
        let next_ns = now_ns.saturating_add(LOOK_INTERVAL.as_nanos() as u64);
        now_ns >= due_ns
            && self
                .look_due_ns
                .compare_exchange(due_ns, next_ns, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Takes up the new generation if the broker has told of one. Costs a look at the clock where nothing is due.
    pub(crate) fn freshen(&self) {
        if self.look_is_due() {
            let state = self.lock();
            let state = self.renew(state);
            self.leave(state);
        }
    }

    /// As [`Seat::freshen`], for the thread that leads.
    pub(super) fn freshen_leading<'a>(&'a self, state: Guard<'a>) -> Guard<'a> {
        if self.look_is_due() { self.renew(state) } else { state }
    }

    fn renew<'a>(&'a self, mut state: Guard<'a>) -> Guard<'a> {
        let Some(link) = &state.link else { return state };
        let session = std::sync::Arc::clone(&link.session);
        if !session.check_alive() || !link.is_superseded() || self.renewing.swap(true, Ordering::Acquire) {
            return state;
        }
        let number = link.number;
        self.unlock(state);
        let fresh = self.acquire(Deadline::after(Some(RENEW_WAIT)), &mut |_| {});
        state = self.lock();
        match fresh {
            Ok(fresh) if state.closed || !state.is_linked_by(number) => fresh.release(),
            Ok(fresh) => {
                tracing::info!(model = %fresh.model.model_id, generation = fresh.model.generation, "model replaced");
                let old = state.link.take();
                state.jobs.requeue_all();
                self.install(&mut state, fresh);
                if let Some(old) = old {
                    wake(&old);
                    old.release();
                }
            }
            Err(error) => {
                tracing::warn!(model = %self.request.name, %error, "a new generation cannot be taken up yet");
                let later = monotonic_ns().saturating_add(RENEW_PAUSE.as_nanos() as u64);
                self.look_due_ns.store(later, Ordering::Relaxed);
            }
        }
        self.renewing.store(false, Ordering::Release);
        state
    }
}

/// Whoever sleeps for answers in a lane that is let go of looks at the new one.
fn wake(old: &Link) {
    if let Some(lane) = &old.lane {
        let _ = lane.mapping.wake_client();
    }
}

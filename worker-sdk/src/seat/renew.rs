//! Taking up a new generation of a model that was replaced while it is used. The new lease is had before the old one is let
//! go of, and what was out on the old one is sent again: no call fails, none is answered twice.

use super::link::Link;
use super::{Guard, Seat};
use crate::time::Deadline;
use shm_os::process::monotonic_ns;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Shortest time between two looks for news of the broker, where there is no cache to tell. A look costs one system call.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Longest wait for the new lease: the new generation is loaded and served when it is told of.
const RENEW_WAIT: Duration = Duration::from_secs(2);
/// Pause before a renewal is tried again that failed. The old generation serves meanwhile.
const RENEW_PAUSE: Duration = Duration::from_secs(1);

/// What is known of the generation that is leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    /// It is the present one, or it is too early to look.
    None,
    /// It was replaced: its cache says so.
    Superseded,
    /// The session is to be asked.
    Look,
}

impl Seat {
    /// A cache tells by itself, in shared memory. Without one the session is looked at now and then, by one of the callers.
    fn news(&self) -> News {
        let told = match self.cache() {
            Some(cache) if !cache.is_superseded() => return News::None,
            Some(_) => News::Superseded,
            None => News::Look,
        };
        let (now_ns, due_ns) = (monotonic_ns(), self.look_due_ns.load(Ordering::Relaxed));
        let next_ns = now_ns.saturating_add(LOOK_INTERVAL.as_nanos() as u64);
        let is_ours = now_ns >= due_ns
            && self
                .look_due_ns
                .compare_exchange(due_ns, next_ns, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok();
        if is_ours { told } else { News::None }
    }

    /// Takes up the new generation if there is one. Costs one load where a cache says that there is none.
    pub(crate) fn freshen(&self) {
        let news = self.news();
        if news != News::None {
            let state = self.lock();
            let state = self.renew(state, news);
            self.leave(state);
        }
    }

    /// As [`Seat::freshen`], for the thread that leads.
    pub(super) fn freshen_leading<'a>(&'a self, state: Guard<'a>) -> Guard<'a> {
        match self.news() {
            News::None => state,
            news => self.renew(state, news),
        }
    }

    fn renew<'a>(&'a self, mut state: Guard<'a>, news: News) -> Guard<'a> {
        let Some(link) = &state.link else { return state };
        let session = std::sync::Arc::clone(&link.session);
        let is_replaced = match news {
            News::None => false,
            News::Superseded => session.is_alive(),
            News::Look => session.check_alive() && link.is_superseded(),
        };
        if !is_replaced || self.renewing.swap(true, Ordering::Acquire) {
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

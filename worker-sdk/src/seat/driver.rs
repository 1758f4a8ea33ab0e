//! Futures: a job's poll, and the background thread that leads where no caller is blocked.

use super::{Answer, Seat};
use crate::error::SdkError;
use crate::time::Deadline;
use std::sync::{Arc, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

/// How long the background thread stays when no future waits.
const DRIVER_LINGER: Duration = Duration::from_secs(2);

impl Seat {
    /// A future's look at its job: the outcome, or the promise that `waker` is woken when there is one.
    pub(crate) fn poll(self: &Arc<Self>, id: u64, waker: &Waker) -> Poll<Result<Answer, SdkError>> {
        let mut state = self.lock();
        if let Some(outcome) = state.jobs.take_done(id) {
            self.leave(state);
            return Poll::Ready(outcome);
        }
        if state.jobs.deadline(id).is_none() {
            self.leave(state);
            return Poll::Ready(Err(SdkError::Cancelled));
        }
        state.jobs.watch(id, waker);
        if !state.driver {
            let seat = Arc::clone(self);
            let spawned =
                std::thread::Builder::new().name("modelbroker-sdk".into()).spawn(move || seat.drive());
            match spawned {
                Ok(_) => state.driver = true,
                Err(error) => {
                    state.forget(id);
                    self.leave(state);
                    return Poll::Ready(Err(SdkError::Os(format!("starting a thread for futures: {error}"))));
                }
            }
        }
        self.leave(state);
        Poll::Pending
    }

    /// The background thread: leads while futures wait and no caller leads.
    fn drive(&self) {
        let mut state = self.lock();
        loop {
            if state.closed {
                state.driver = false;
                return self.leave(state);
            }
            if state.jobs.has_wakers() {
                self.unlock(state);
                state = self.lock();
                continue;
            }
            if state.jobs.watched() == 0 {
                let (woken, timeout) =
                    self.driver.wait_timeout(state, DRIVER_LINGER).unwrap_or_else(PoisonError::into_inner);
                state = woken;
                if timeout.timed_out() && state.jobs.watched() == 0 {
                    state.driver = false;
                    return self.leave(state);
                }
            } else if state.leading || state.jobs.call_follower() {
                // A blocked caller leads, or has just been called to; it calls this thread when it leaves.
                state = self.driver.wait(state).unwrap_or_else(PoisonError::into_inner);
            } else {
                state = self.lead(state, Deadline::after(None));
            }
        }
    }
}

//! What the leading thread does for all: taking up the lease, sending, sleeping until answers come, and coming back after
//! the broker's death. Who leads when is decided beside this file.

use super::link::{Link, Mail};
use super::{Guard, LOAD_GRACE, Outage, Seat};
use crate::connect::{RECONNECT_BASE, RECONNECT_CAP};
use crate::error::SdkError;
use crate::session::Watch;
use crate::settings::Route;
use crate::time::{Deadline, backoff};
use shm_layout::code::Code;
use shm_layout::wire::{Acquire, ClientMessage, ModelDescription};
use shm_os::futex::WaitOutcome;
use std::sync::Arc;
use std::time::{Duration, Instant};

impl Seat {
    /// Takes up the lease for the first time; afterwards it is kept up by whoever leads.
    pub(crate) fn open(
        &self,
        deadline: Deadline,
        watch: Watch<'_>,
    ) -> Result<Arc<ModelDescription>, SdkError> {
        let started = Instant::now();
        let mut attempts = 0;
        let link = loop {
            match self.acquire(deadline, watch) {
                Ok(link) => break link,
                // A broker that was there and went away: the next one may be up at once.
                Err(SdkError::Disconnected { .. } | SdkError::Refused { code: Code::ShuttingDown, .. })
                    if started.elapsed() < self.core.settings.patience() && !deadline.has_passed() =>
                {
                    std::thread::sleep(backoff(attempts, RECONNECT_BASE, RECONNECT_CAP));
                    attempts += 1;
                }
                Err(error) => return Err(error),
            }
        };
        let model = Arc::clone(&link.model);
        let mut state = self.lock();
        if state.link.is_none() {
            self.install(&mut state, link);
            self.unlock(state);
        } else {
            drop(state);
            link.release();
        }
        Ok(model)
    }

    pub(super) fn acquire(&self, deadline: Deadline, watch: Watch<'_>) -> Result<Link, SdkError> {
        let request = &*self.request;
        let session = self.core.session(self.core.settings.start, deadline, watch)?;
        let wait = deadline.left_within(request.wait);
        let message = ClientMessage::Acquire(Acquire {
            model: request.name.clone(),
            want_lane: request.route == Route::Lane,
            want_image: false,
            wait_ms: u32::try_from(wait.as_millis()).unwrap_or(u32::MAX),
        });
        let until = Deadline::after(Some(deadline.left_within(request.wait.saturating_add(LOAD_GRACE))));
        let reply = match session.request(&message, until, watch) {
            Err(SdkError::DeadlineExceeded(_)) if !deadline.has_passed() => {
                let message = format!("the model was not ready within {:?}: allow more time", request.wait);
                return Err(SdkError::Refused {
                    code: Code::LoadTimeout,
                    message,
                    retry_after: Duration::ZERO,
                });
            }
            reply => reply?,
        };
        let number = self.core.next_id();
        if self.core.is_other_broker(&session) {
            tracing::info!("another broker than before: the lease is new");
        }
        Link::from_reply(number, session, reply, request.route)
    }

    /// One round of work for all, ending when something happened or after [`SLICE`].
    pub(super) fn lead<'a>(&'a self, mut state: Guard<'a>, until: Deadline) -> Guard<'a> {
        state.leading = true;
        let mut state = self.lead_round(state, until);
        state.expire();
        state.leading = false;
        state
    }

    fn lead_round<'a>(&'a self, mut state: Guard<'a>, until: Deadline) -> Guard<'a> {
        state.expire();
        match &state.link {
            Some(link) if link.session.is_alive() => {}
            Some(_) => {
                state.link_down();
                return state;
            }
            None => return self.relink(state, until),
        }
        let mut state = self.freshen_leading(state);
        let news = self.reap(&mut state);
        self.push(&mut state);
        let slice = state.slice(until);
        let Some(link) = state.link.as_mut().filter(|_| news == 0) else { return state };
        let (session, number) = (Arc::clone(&link.session), link.number);
        match &link.lane {
            Some(lane) => {
                let Some(tail) = lane.client.prepare_wait() else { return state };
                let mapping = Arc::clone(&lane.mapping);
                self.unlock(state);
                match mapping.wait_completion(tail, slice) {
                    Ok(WaitOutcome::TimedOut) => drop(session.check_alive()),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::warn!(%error, "waiting for the engine failed");
                        std::thread::sleep(slice);
                    }
                }
                state = self.lock();
                if state.is_linked_by(number) {
                    self.reap(&mut state);
                }
            }
            None => {
                self.unlock(state);
                let mail = session.wait_mail(self.id, slice);
                state = self.lock();
                if state.is_linked_by(number)
                    && let Some(link) = &mut state.link
                {
                    for mail in link.sort(mail) {
                        match mail {
                            Mail::End(arrival) => self.deliver_one(&mut state, arrival),
                            Mail::Piece { job, partial } => self.add_piece(&mut state, job, partial),
                        }
                    }
                }
            }
        }
        state
    }

    /// One attempt to take up the lease again, or a pause before it.
    fn relink<'a>(&'a self, mut state: Guard<'a>, until: Deadline) -> Guard<'a> {
        let now = Instant::now();
        let faults = state.faults;
        let outage = state.outage.get_or_insert_with(|| {
            let pause =
                if faults > 1 { backoff(faults, RECONNECT_BASE, RECONNECT_CAP) } else { Duration::ZERO };
            Outage { since: now, attempts: 0, not_before: now + pause }
        });
        let (since, not_before) = (outage.since, outage.not_before);
        if not_before > now {
            let pause = state.slice(until).min(not_before - now);
            self.unlock(state);
            std::thread::sleep(pause);
            return self.lock();
        }
        self.unlock(state);
        let outcome = self.acquire(until, &mut |_| {
            // Others' deadlines go on running while this thread waits for a load.
            let mut state = self.lock();
            state.expire();
            self.unlock(state);
        });
        state = self.lock();
        match outcome {
            Ok(link) if state.closed => link.release(),
            Ok(link) => {
                tracing::info!(model = %link.model.model_id, gap = ?since.elapsed(), "connected to the broker again");
                self.install(&mut state, link);
            }
            Err(SdkError::DeadlineExceeded(_)) if until.has_passed() => {}
            Err(error @ SdkError::Fault { .. }) => {
                state.outage = None;
                self.fault(&mut state, &error.to_string());
            }
            Err(error) if error.is_broker_absence() => {
                let waited = since.elapsed();
                if waited > self.core.settings.patience() {
                    let lost = SdkError::Disconnected { reason: error.to_string(), waited };
                    // Those with a deadline of their own chose how long to wait, unless they can go on elsewhere.
                    let all = self.request.fall_back;
                    state.jobs.fail(&lost, |spec| all || spec.deadline.at().is_none());
                    state.outage = None;
                } else if let Some(outage) = &mut state.outage {
                    outage.not_before =
                        Instant::now() + backoff(outage.attempts, RECONNECT_BASE, RECONNECT_CAP);
                    outage.attempts += 1;
                }
            }
            Err(error) => {
                state.jobs.fail(&error, |_| true);
                state.outage = None;
            }
        }
        state
    }
}

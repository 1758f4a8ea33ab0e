//! The two threads. Both do the same: wait for events, take jobs from lanes, compute.
//!
//! # One hop
//! Waking a thread on another core costs 20-25 µs, so a job must not be handed from one thread to another. Both threads
//! wait on *one* poller. An event wakes one of them (edge-triggered: exactly one; the kernel takes the one that fell
//! asleep last); that one reads the lane, computes and posts the answer itself. An idle engine thus costs a job two
//! wake-ups in all: client to engine by the bell, engine to client by the futex. While one computes, the other waits for
//! events and serves the link; nobody spins.
//!
//! The exception is work that comes with other work: whoever finds more to do on the link than one message, or a model to
//! load, wakes the other thread for the rest.
//!
//! # Bells under load
//! A lane whose bell rang stays *unarmed*, and its client submits in silence, until a look finds it empty. While a batch is
//! computed nobody looks: what arrives meanwhile could not be computed anyway, and taking it would only cost the batch
//! processor time. So a busy lane rings at most once a batch, and a saturated engine hears no bells at all. Only in the breaks of
//! a bulk batch lanes are looked at in passing, see `breaks`.

use crate::compute::Loader;
use crate::execute::Moment;
use crate::host::{FIRST_LANE_TOKEN, Host, LINK_TOKEN};
use crate::lane::Taken;
use shm_os::PollEvent;
use std::time::Duration;

impl<L: Loader> Host<L> {
    /// Works until the engine ends.
    pub(crate) fn work(&self) {
        let mut events: Vec<PollEvent> = Vec::new();
        while !self.is_stopped() {
            let mut was_busy = self.look_at_lanes();
            if let Some(work) = self.next_work(Moment::Free) {
                self.execute(work);
                was_busy = true;
            } else {
                self.stop_when_drained();
            }
            let timeout = was_busy.then_some(Duration::ZERO);
            if let Err(error) = self.poller.wait(&mut events, timeout) {
                self.stop(Err(error.into()));
            }
            for event in &events {
                if event.token >= FIRST_LANE_TOKEN {
                    self.on_bell(event.token - FIRST_LANE_TOKEN);
                }
            }
            // The link last: a command may take milliseconds, and the lanes are then the other thread's.
            if let Some(event) = events.iter().find(|event| event.token == LINK_TOKEN) {
                if events.len() > 1 {
                    self.wake_a_thread();
                }
                if event.writable {
                    self.link.on_writable();
                }
                self.on_link();
            }
        }
        // The other thread may be asleep: one ring wakes one.
        self.wake_a_thread();
    }

    fn on_bell(&self, lane_id: u64) {
        let mut state = self.state();
        // A bell that rang just before its lane was dropped, or that somebody rings without need.
        if !state.draining && state.lanes.contains_key(&lane_id) && !state.unarmed.contains(&lane_id) {
            state.unarmed.push_back(lane_id);
        }
    }

    /// Gives each unarmed lane one turn, unless a batch is being computed; true when there was any.
    pub(crate) fn look_at_lanes(&self) -> bool {
        let (mut turns, mut has_looked) = (None, false);
        let mut taken: Vec<Taken> = Vec::new();
        loop {
            let mut state = self.state();
            let left = turns.get_or_insert(state.unarmed.len());
            if *left == 0 || state.computing || state.draining {
                return has_looked;
            }
            *left -= 1;
            let Some(lane_id) = state.unarmed.pop_front() else { return has_looked };
            let Some(lane) = state.lanes.get(&lane_id).cloned() else { continue };
            state.accepting += 1;
            drop(state);
            has_looked = true;
            let look_again = lane.drain(&mut taken).unwrap_or_else(|fault| {
                // There is nobody to answer what was taken just now.
                taken.clear();
                self.forget_faulty(&lane, &fault.to_string());
                false
            });
            if !taken.is_empty() {
                self.accept_from_lane(&lane, std::mem::take(&mut taken));
            }
            drop(lane);
            let mut state = self.state();
            state.accepting -= 1;
            if look_again && !state.unarmed.contains(&lane_id) {
                state.unarmed.push_back(lane_id);
            }
            drop(state);
        }
    }
}

//! What the broker says, done. Runs on whichever thread read it, in the order in which it was sent.

use crate::HostError;
use crate::accept::{Offer, Refused};
use crate::cache::Cache;
use crate::compute::{Compute, ComputeError, Loader, ModelFacts, ReceivedImage};
use crate::host::{FIRST_LANE_TOKEN, Host, MAX_RELAYED_INPUT_BYTES, Served, Wakes};
use crate::job::Origin;
use crate::lane::{Lane, LaneError, Permit};
use crate::link::Farewell;
use crate::schedule::Client;
use shm_layout::cache::CacheReader;
use shm_layout::code::Code;
use shm_layout::limits::{MAX_MESSAGE_BYTES, MAX_PAYLOAD_BYTES};
use shm_layout::wire::{BackingKind, CacheDescription, FromEngine, JobFrame, Operation, ToEngine};
use shm_os::Interest;
use shm_os::cache_mapping::CacheMapping;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A message as long as a frame's message may be.
fn cut(mut message: String) -> String {
    message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
    message
}

/// The generation's cache, mapped and checked; without it the model is served all the same.
fn map_cache(generation: u64, cache: CacheDescription, fd: &OwnedFd, facts: &ModelFacts) -> Option<Cache> {
    let mapped = CacheMapping::map(fd.as_fd(), cache.region_bytes)
        .inspect_err(|error| tracing::warn!(generation, %error, "a vector cache cannot be mapped"))
        .ok()?;
    let reader = CacheReader::new(mapped, facts.dim, facts.fingerprint)
        .inspect_err(|error| tracing::warn!(generation, %error, "a vector cache is not this model's"))
        .ok()?;
    Some(Cache::new(reader))
}

impl<L: Loader> Host<L> {
    /// Reads and does everything that the broker has sent; ends the engine when the link is gone.
    pub(crate) fn on_link(&self) {
        let mut messages = 0;
        let outcome = self.link.read(|message, fds| {
            messages += 1;
            // More than one: the other thread computes what the first ones brought while this one reads on. A lone job is
            // computed here, without that hop.
            if messages == 2 {
                self.wake_a_thread();
            }
            if let Err(error) = self.command(message, fds) {
                self.stop(Err(error));
            }
        });
        if let Err(error) = outcome {
            self.stop(Err(error.into()));
        }
    }

    fn command(&self, message: ToEngine, mut fds: Vec<OwnedFd>) -> Result<(), HostError> {
        // The link gives as many descriptors as the message needs.
        let missing = || HostError::Protocol("a message came without its descriptors");
        match message {
            ToEngine::LoadModel { generation, image_bytes, backing, cache } => {
                let cache = match cache {
                    Some(cache) => Some((cache, fds.pop().ok_or_else(missing)?)),
                    None => None,
                };
                self.load_model(generation, image_bytes, backing, fds.pop().ok_or_else(missing)?, cache);
            }
            ToEngine::UnloadModel { generation } => self.unload_model(generation),
            ToEngine::AddLane { lane_id, generation } => {
                let bell = fds.pop().ok_or_else(missing)?;
                let region = fds.pop().ok_or_else(missing)?;
                self.add_lane(lane_id, generation, &region, bell);
            }
            ToEngine::DropLane { lane_id } => self.drop_lane(lane_id),
            ToEngine::Job { relay_id, session_id, generation, attempts, job } => {
                self.relayed_job(relay_id, session_id, generation, attempts, job);
            }
            ToEngine::CancelJob { relay_id } => self.cancel_relayed(relay_id),
            ToEngine::Drain => self.drain(),
            ToEngine::Probe { generation } => self.probe(generation),
            ToEngine::Totals => {
                self.cache_totals().iter().for_each(|totals| self.link.send(totals));
                self.link.send(&FromEngine::Metrics(self.counters.measured.report()));
                self.link.send(&FromEngine::Totals(self.totals()));
            }
        }
        Ok(())
    }

    fn load_model(
        &self,
        generation: u64,
        len_bytes: u64,
        backing: BackingKind,
        fd: OwnedFd,
        cache: Option<(CacheDescription, OwnedFd)>,
    ) {
        if self.state().models.contains_key(&generation) {
            return self.link.send(&FromEngine::ModelReady { generation });
        }
        // Loading takes milliseconds; what waits meanwhile is the other thread's.
        self.wake_a_thread();
        let image = ReceivedImage { fd, len_bytes, backing };
        let loaded = catch_unwind(AssertUnwindSafe(|| {
            let model = self.loader.load(image)?;
            let facts = model.facts();
            if facts.dim == 0 {
                return Err(ComputeError::new(Code::ModelInvalid, "the model gives vectors without numbers"));
            }
            Ok((model, facts))
        }))
        .unwrap_or_else(|_| Err(ComputeError::new(Code::ModelInvalid, "loading the model's image panicked")));
        match loaded {
            Ok((model, facts)) => {
                let farewell = Farewell::new(&self.link, FromEngine::ModelUnloaded { generation });
                let cache =
                    cache.and_then(|(cache, fd)| map_cache(generation, cache, &fd, &facts)).map(Arc::new);
                let served = Arc::new(Served { model, facts, cache: cache.clone(), farewell });
                self.state().models.insert(generation, served);
                self.link.send(&FromEngine::ModelReady { generation });
                if let (Some(keeper), Some(cache)) = (&self.keeper, cache) {
                    keeper.load(generation, &cache, facts.identity);
                }
            }
            Err(ComputeError { code, message }) => {
                let message = cut(message);
                self.link.send(&FromEngine::ModelFailed { generation, code, message });
            }
        }
    }

    /// Jobs that wait for the model are refused; a batch that runs ends first.
    fn unload_model(&self, generation: u64) {
        let mut guard = self.state();
        let state = &mut *guard;
        let served = state.models.remove(&generation);
        let keys = state.schedule.remove_generation(generation);
        let jobs: Vec<_> = keys.iter().filter_map(|key| state.jobs.remove(key)).collect();
        drop(guard);
        let mut wakes = Wakes::default();
        for job in jobs {
            self.give_up(job, Code::ModelUnavailable, &mut wakes);
        }
        wakes.fire();
        if let Some(keeper) = &self.keeper {
            keeper.unload(generation);
        }
        match served {
            Some(served) => served.farewell.announce(),
            None => self.link.send(&FromEngine::ModelUnloaded { generation }),
        }
    }

    fn add_lane(&self, lane_id: u64, generation: u64, region: &OwnedFd, bell: OwnedFd) {
        let refuse = |message: String| {
            tracing::warn!(lane_id, message, "a lane cannot be served");
            self.link.send(&FromEngine::LaneFault { lane_id, message });
        };
        let Some(token) = lane_id.checked_add(FIRST_LANE_TOKEN) else {
            return refuse("the lane's number is out of range".into());
        };
        if self.state().lanes.contains_key(&lane_id) {
            return refuse("the lane is served already".into());
        }
        let farewell = Farewell::new(&self.link, FromEngine::LaneDropped { lane_id });
        let (lane, recovered) = match Lane::adopt(lane_id, generation, region.as_fd(), bell, farewell) {
            Ok((lane, recovered)) => (Arc::new(lane), recovered),
            Err(LaneError::Fault(fault)) => return refuse(fault.to_string()),
            Err(error) => return refuse(format!("the lane cannot be served: {error}")),
        };
        let mut state = self.state();
        state.lanes.insert(lane_id, Arc::clone(&lane));
        // What waits in its ring is taken, and the bell is armed, when the lane's turn comes.
        if !state.draining {
            state.unarmed.push_back(lane_id);
        }
        state.accepting += 1;
        drop(state);
        if let Err(error) = self.poller.add(lane.bell(), token, Interest::DOORBELL) {
            self.forget_faulty(&lane, &format!("the lane's bell cannot be watched: {error}"));
        } else if !recovered.is_empty() {
            tracing::info!(lane_id, jobs = recovered.len(), "took over jobs of a dead engine");
            self.accept_from_lane(&lane, recovered);
        }
        self.state().accepting -= 1;
    }

    fn drop_lane(&self, lane_id: u64) {
        if let Some((lane, jobs)) = self.retire(lane_id) {
            lane.announce_unmapping();
            // The last holder of the lane speaks: here, or the thread whose batch has a job of it.
            drop(jobs);
            return;
        }
        let faulted = self.state().faulted.remove(&lane_id);
        match faulted.and_then(|lane| lane.upgrade()) {
            Some(lane) => lane.announce_unmapping(),
            None => self.link.send(&FromEngine::LaneDropped { lane_id }),
        }
    }

    fn relayed_job(&self, relay_id: u64, session_id: u64, generation: u64, attempts: u32, job: JobFrame) {
        let state = self.state();
        let (is_known, draining) = (state.relayed.contains_key(&relay_id), state.draining);
        drop(state);
        if is_known {
            // One answer a job: the first one's.
            tracing::warn!(relay_id, "the broker sent a job twice");
            return;
        }
        let origin = Origin::Relay { relay_id, cancelled: Arc::new(AtomicBool::new(false)) };
        if draining {
            return self.refuse_all(vec![Refused::new(origin, Code::ShuttingDown)]);
        }
        if job.operation == Operation::Generate {
            return self.accept_generation(relay_id, session_id, generation, attempts, job);
        }
        let bytes = job.payload;
        let permit = Permit::acquire(&self.relayed_bytes, bytes.len(), MAX_RELAYED_INPUT_BYTES);
        let offer = Offer {
            client: Client::Session(session_id),
            origin,
            operation: Some(job.operation),
            priority: job.priority,
            generation,
            deadline_ns: job.deadline_ns,
            attempts,
            output_capacity_bytes: MAX_PAYLOAD_BYTES,
            input: permit.map(|permit| (bytes, permit)),
        };
        self.accept(generation, std::iter::once(offer));
    }

    fn cancel_relayed(&self, relay_id: u64) {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(relayed) = state.relayed.get(&relay_id) else { return };
        // If its batch runs, the thread that computes sees this before it answers or puts the job back.
        relayed.cancelled.store(true, Ordering::Relaxed);
        let Some(job) = state.jobs.remove(&relayed.key) else { return };
        state.schedule.remove(relayed.client, relayed.priority, relayed.key);
        drop(guard);
        self.give_up(job, Code::Cancelled, &mut Wakes::default());
    }

    /// Computes something known on a thread of its own, which ends with it: this one goes on reading.
    fn probe(&self, generation: u64) {
        let probed = move |code, message: String, probe_us| {
            let message = cut(message);
            FromEngine::Probed { generation, code, message, probe_us }
        };
        let Some(served) = self.state().models.get(&generation).cloned() else {
            let message = "the engine does not serve this model".to_owned();
            return self.link.send(&probed(Code::ModelUnavailable, message, 0));
        };
        let link = Arc::clone(&self.link);
        let compute = move || {
            let begun = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| served.model.probe())).unwrap_or_else(|_| {
                Err(ComputeError::new(Code::BadResult, "computing something known panicked"))
            });
            let probe_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            let message = match outcome {
                Ok(()) => probed(Code::Ok, String::new(), probe_us),
                Err(ComputeError { code, message }) => probed(code, message, probe_us),
            };
            link.send(&message);
        };
        if let Err(error) = std::thread::Builder::new().name("probe".into()).spawn(compute) {
            let message = format!("no thread for a health check: {error}");
            let message = cut(message);
            let code = Code::Internal;
            self.link.send(&FromEngine::Probed { generation, code, message, probe_us: 0 });
        }
    }

    /// Takes what the lanes hold now as accepted; what comes later stays in the lanes for the next engine.
    fn drain(&self) {
        let mut state = self.state();
        if state.draining {
            return;
        }
        state.draining = true;
        state.unarmed.clear();
        state.accepting += 1;
        let lanes: Vec<Arc<Lane>> = state.lanes.values().cloned().collect();
        drop(state);
        for lane in lanes {
            let mut taken = Vec::new();
            // Ends: a lane has a bounded number of cells, and none is used again before its answer is posted.
            while lane.drain(&mut taken).unwrap_or_else(|fault| {
                self.forget_faulty(&lane, &fault.to_string());
                false
            }) {}
            if !lane.has_departed() {
                self.accept_from_lane(&lane, taken);
            }
        }
        self.state().accepting -= 1;
    }
}

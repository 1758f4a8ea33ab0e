//! Both ends of a lane as `ring` drives them: the client's as the SDK does, the engine's as an engine does, less the
//! computing.

use super::{Caller, Patience, STUCK_AFTER, WAIT_SLICE};
use anyhow::{Context, ensure};
use shm_layout::code::Code;
use shm_layout::lane::{CheckedJob, ClientLane, EngineLane, Geometry, JobRequest};
use shm_layout::wire::{Operation, Priority};
use shm_os::lane_mapping::LaneMapping;
use shm_os::{Doorbell, Interest, PollEvent, Poller};
use std::time::Instant;

/// Most jobs taken from the lane at once, as in an engine.
const MAX_DRAINED_JOBS: usize = 16;

/// The client's end.
pub(super) struct OursCaller {
    lane: ClientLane<LaneMapping>,
    bell: Doorbell,
    sleeps: bool,
}

impl OursCaller {
    /// Takes the client's end of a fresh lane.
    pub(super) fn new(mapping: LaneMapping, bell: Doorbell) -> anyhow::Result<OursCaller> {
        Ok(OursCaller { lane: ClientLane::new(mapping, Geometry::V1)?, bell, sleeps: false })
    }

    /// Whether to sleep while waiting, or to poll.
    pub(super) fn woken(&mut self, sleeps: bool) -> &mut OursCaller {
        self.sleeps = sleeps;
        self
    }

    fn poll(&self) -> anyhow::Result<()> {
        let mut patience = Patience::new();
        while !self.lane.has_completions() {
            patience.spin()?;
        }
        Ok(())
    }

    fn sleep(&self) -> anyhow::Result<()> {
        let until = Instant::now() + STUCK_AFTER;
        while let Some(tail) = self.lane.prepare_wait() {
            self.lane.memory().wait_completion(tail, WAIT_SLICE)?;
            if self.lane.has_completions() {
                break;
            }
            ensure!(Instant::now() < until, "no answer for {STUCK_AFTER:?}");
        }
        Ok(())
    }
}

impl Caller for OursCaller {
    #[inline]
    fn call(&mut self, input: &[u8], output: &mut Vec<u8>) -> anyhow::Result<()> {
        let ticket = self.lane.submit(&JobRequest {
            operation: Operation::Embed,
            priority: Priority::Interactive,
            deadline_ns: 0,
            input: &[input],
            output_capacity_bytes: input.len(),
        })?;
        if self.lane.needs_doorbell() {
            self.bell.ring()?;
        }
        if self.sleeps {
            self.sleep()?
        } else {
            self.poll()?
        }
        let mut answered = None;
        self.lane.reap(MAX_DRAINED_JOBS, |completion, slot| {
            slot.copy_to(output);
            answered = Some(completion);
        })?;
        let completion = answered.context("woken without an answer")?;
        ensure!(
            completion.ticket == ticket && completion.status == Code::Ok,
            "not the answer that was asked for: {completion:?}"
        );
        Ok(())
    }
}

/// The engine's end.
pub(super) struct OursEcho {
    lane: EngineLane<LaneMapping>,
    poller: Poller,
    _bell: Doorbell,
    jobs: Vec<CheckedJob>,
    input: Vec<u8>,
}

impl OursEcho {
    /// Takes the engine's end of a lane, its bell watched as an engine watches it: edge-triggered, never read.
    pub(super) fn new(mapping: LaneMapping, bell: Doorbell) -> anyhow::Result<OursEcho> {
        mapping.prefault_tables();
        let poller = Poller::new()?;
        poller.add(&bell, 0, Interest::DOORBELL)?;
        let (lane, recovered) = EngineLane::adopt(mapping, Geometry::V1)?;
        ensure!(recovered.is_empty(), "a fresh lane has {} jobs", recovered.len());
        Ok(OursEcho { lane, poller, _bell: bell, jobs: Vec::new(), input: Vec::new() })
    }

    /// Answers what is there; gives how many jobs it was.
    #[inline]
    fn answer(&mut self) -> anyhow::Result<u32> {
        self.lane.drain(MAX_DRAINED_JOBS, &mut self.jobs)?;
        let mut answered = 0;
        for job in self.jobs.drain(..) {
            self.lane.read_input(&job, &mut self.input);
            self.lane.complete(job, Code::Ok, &self.input, 0, 0)?;
            answered += 1;
        }
        if answered > 0 && self.lane.needs_wake() {
            self.lane.memory().wake_client()?;
        }
        Ok(answered)
    }

    /// Echoes so many times without ever sleeping.
    pub(super) fn echo_polled(&mut self, round_trips: u32) -> anyhow::Result<()> {
        let mut left = round_trips;
        let mut patience = Patience::new();
        while left > 0 {
            let answered = self.answer()?;
            if answered == 0 {
                patience.spin()?;
            } else {
                left = left.saturating_sub(answered);
                patience = Patience::new();
            }
        }
        Ok(())
    }

    /// Echoes so many times, asleep in epoll between them.
    pub(super) fn echo_woken(&mut self, round_trips: u32) -> anyhow::Result<()> {
        let mut left = round_trips;
        let mut events: Vec<PollEvent> = Vec::new();
        while left > 0 {
            let answered = self.answer()?;
            left = left.saturating_sub(answered);
            if answered == 0 && self.lane.arm()? {
                // Without a limit, as in an engine; when the other process ends, the kernel ends this one.
                self.poller.wait(&mut events, None)?;
            }
        }
        Ok(())
    }
}

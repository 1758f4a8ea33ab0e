//! A lane as the engine holds it: the engine's end behind a lock that is held for microseconds, its bell, and the word
//! that goes to the broker when the last holder lets go. What jobs mean is not known here.

use crate::link::Farewell;
use shm_layout::code::Code;
use shm_layout::lane::{CheckedJob, EngineLane, Geometry, LaneFault};
use shm_os::Doorbell;
use shm_os::doorbell::DoorbellError;
use shm_os::lane_mapping::{LaneMapping, LaneMappingError};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most jobs taken from one lane before the next lane has its turn.
pub(crate) const MAX_DRAINED_JOBS: usize = 16;
/// Most bytes of input held for one lane: its whole arena. An honest client cannot have more in flight; one that points
/// many jobs at one slot can, and gets `OVERLOADED`.
pub(crate) const MAX_LANE_INPUT_BYTES: usize = Geometry::V1.region_bytes() - Geometry::V1.arena_offset();

/// Why a lane cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    /// The region is not a lane, or cannot be mapped.
    #[error(transparent)]
    Mapping(#[from] LaneMappingError),
    /// The bell is no bell.
    #[error(transparent)]
    Doorbell(#[from] DoorbellError),
    /// The client had broken the protocol already.
    #[error(transparent)]
    Fault(#[from] LaneFault),
}

/// Bytes held for a client; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Permit {
    /// Holds `bytes` more on `held`, unless that makes it more than `most`.
    pub(crate) fn acquire(held: &Arc<AtomicUsize>, bytes: usize, most: usize) -> Option<Permit> {
        held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            now.checked_add(bytes).filter(|sum| *sum <= most)
        })
        .ok()
        .map(|_| Permit { held: Arc::clone(held), bytes })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A job taken from the ring, with a private copy of its input; `None` when the client holds too much already.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) job: CheckedJob,
    pub(crate) input: Option<(Vec<u8>, Permit)>,
}

/// A lane that is served. Whoever holds it keeps the region mapped.
#[derive(Debug)]
pub(crate) struct Lane {
    id: u64,
    generation: u64,
    end: Mutex<EngineLane<Arc<LaneMapping>>>,
    // For waking without the lock.
    mapping: Arc<LaneMapping>,
    bell: Doorbell,
    departed: AtomicBool,
    held_bytes: Arc<AtomicUsize>,
    // Last: fields are dropped in order, so the region is unmapped when this speaks.
    farewell: Farewell,
}

impl Lane {
    /// Takes the engine's end of a region and gives the jobs that a dead engine left in its cells.
    pub(crate) fn adopt(
        id: u64,
        generation: u64,
        region: BorrowedFd<'_>,
        bell: OwnedFd,
        farewell: Farewell,
    ) -> Result<(Lane, Vec<Taken>), LaneError> {
        let mapping = Arc::new(LaneMapping::map(region)?);
        mapping.prefault_tables();
        let bell = Doorbell::from_received(bell)?;
        let (end, recovered) = EngineLane::adopt(Arc::clone(&mapping), Geometry::V1)?;
        let held_bytes = Arc::new(AtomicUsize::new(0));
        let lane = Lane {
            id,
            generation,
            end: Mutex::new(end),
            mapping,
            bell,
            departed: AtomicBool::new(false),
            held_bytes,
            farewell,
        };
        let end = lane.end();
        let recovered = recovered.into_iter().map(|job| lane.copy_input(&end, job)).collect();
        drop(end);
        Ok((lane, recovered))
    }

    fn end(&self) -> MutexGuard<'_, EngineLane<Arc<LaneMapping>>> {
        // The end's own state is changed only after its checks, so a panic elsewhere leaves it whole.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker's name of the lane.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// The model its jobs are for.
    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// The bell, to be watched edge-triggered and never read.
    pub(crate) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn copy_input(&self, end: &EngineLane<Arc<LaneMapping>>, job: CheckedJob) -> Taken {
        let permit = Permit::acquire(&self.held_bytes, job.input_bytes, MAX_LANE_INPUT_BYTES);
        let input = permit.map(|permit| {
            let mut bytes = Vec::with_capacity(job.input_bytes);
            end.read_input(&job, &mut bytes);
            (bytes, permit)
        });
        Taken { job, input }
    }

    /// Takes up to [`MAX_DRAINED_JOBS`] jobs. When there is none the lane is armed: the client's next job rings the
    /// bell. False when it was armed; true when it must be looked at again.
    pub(crate) fn drain(&self, into: &mut Vec<Taken>) -> Result<bool, LaneFault> {
        let mut jobs = Vec::new();
        let mut end = self.end();
        end.drain(MAX_DRAINED_JOBS, &mut jobs)?;
        if jobs.is_empty() {
            return Ok(!end.arm()?);
        }
        into.extend(jobs.into_iter().map(|job| self.copy_input(&end, job)));
        Ok(true)
    }

    /// What the client says it found in the cache, and what not.
    pub(crate) fn cache_counts(&self) -> (u64, u64) {
        shm_layout::lane::cache_counts(&self.mapping)
    }

    /// Takes up to [`MAX_DRAINED_JOBS`] jobs and arms nothing: for looks in passing.
    pub(crate) fn drain_in_passing(&self, into: &mut Vec<Taken>) -> Result<(), LaneFault> {
        let mut end = self.end();
        if end.has_submissions() {
            let mut jobs = Vec::new();
            end.drain(MAX_DRAINED_JOBS, &mut jobs)?;
            into.extend(jobs.into_iter().map(|job| self.copy_input(&end, job)));
        }
        Ok(())
    }

    /// Notes that a job begins to be computed.
    pub(crate) fn begin(&self, job: &CheckedJob) {
        self.end().begin(job);
    }

    /// Whether the client cancelled the job.
    pub(crate) fn is_cancelled(&self, job: &CheckedJob) -> bool {
        self.end().is_cancelled(job)
    }

    /// Posts a job's one answer; [`Lane::wake`] must follow, once for many.
    pub(crate) fn post(
        &self,
        job: CheckedJob,
        status: Code,
        output: &[u8],
        queue_us: u32,
        execution_us: u32,
    ) -> Result<(), LaneFault> {
        self.end().complete(job, status, output, queue_us, execution_us)
    }

    /// Wakes the client if it sleeps.
    pub(crate) fn wake(&self) {
        let sleeps = self.end().needs_wake();
        if sleeps && let Err(error) = self.mapping.wake_client() {
            // Clients wait in slices: it sees its answer with the next one.
            tracing::warn!(lane_id = self.id, %error, "a client could not be woken");
        }
    }

    /// From here on nobody is answered.
    pub(crate) fn depart(&self) {
        self.departed.store(true, Ordering::Relaxed);
    }

    /// Whether the client is gone or has broken the protocol.
    pub(crate) fn has_departed(&self) -> bool {
        self.departed.load(Ordering::Relaxed)
    }

    /// Tell the broker once the region is unmapped.
    pub(crate) fn announce_unmapping(&self) {
        self.farewell.announce();
    }
}

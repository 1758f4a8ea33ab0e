//! A lane region as a process holds it: mapped, checked, and with the one futex that a lane sleeps on. What lies in the
//! region is `shm_layout::lane`'s.

use crate::futex::{FutexError, WaitOutcome, futex_wait, futex_wake};
use crate::mapping::{MappingError, SharedMapping};
use crate::memfd::{self, MemfdError};
use shm_layout::lane::{self, CONTROL_FIELDS, Geometry, LaneFault, LaneMemory, REGION_BYTES, RawLaneMemory};
use shm_layout::table::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

const COMPLETION_TAIL: usize = offset_of(CONTROL_FIELDS, "completion_tail");

/// Why a lane region cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LaneMappingError {
    /// The memory object cannot be made.
    #[error(transparent)]
    Memfd(#[from] MemfdError),
    /// It cannot be mapped, or is not sealed as a lane must be.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// It is not laid out as this build lays lanes out.
    #[error(transparent)]
    Layout(#[from] LaneFault),
}

/// A mapped lane region: lane memory that lives as long as this value. Not there in forked children.
#[derive(Debug)]
pub struct LaneMapping {
    raw: RawLaneMemory,
    mapping: SharedMapping,
}

impl LaneMapping {
    /// Makes a region, sealed against every change of size, and writes its header.
    ///
    /// # Errors
    /// [`LaneMappingError`] when the system refuses.
    pub fn create(lane_id: u64) -> Result<(OwnedFd, LaneMapping), LaneMappingError> {
        let fd = memfd::create_lane_region(REGION_BYTES)?;
        let mapped = LaneMapping::wrap(SharedMapping::map_lane(fd.as_fd(), REGION_BYTES)?);
        lane::initialize(&mapped, &Geometry::V1, lane_id);
        Ok((fd, mapped))
    }

    /// Maps a region that was received, after checking its seals, its size and its header.
    ///
    /// # Errors
    /// [`LaneMappingError`] when it is not a lane of this build.
    pub fn map(fd: BorrowedFd<'_>) -> Result<LaneMapping, LaneMappingError> {
        let mapped = LaneMapping::wrap(SharedMapping::map_lane(fd, REGION_BYTES)?);
        lane::check_header(&mapped, &Geometry::V1)?;
        Ok(mapped)
    }

    fn wrap(mapping: SharedMapping) -> LaneMapping {
        // SAFETY: the mapping is read-write, page-aligned, of that length (`map_lane` checked size and seals, so it
        // cannot shrink), owned by the same value as `raw`, and gives no references into itself. In a forked child the
        // range is gone; `check_owner` keeps every access out there.
        let raw = unsafe { RawLaneMemory::new(mapping.base(), mapping.len_bytes()) };
        LaneMapping { raw, mapping }
    }

    /// Panics in a forked child, where an access would fault or, worse, hit another mapping.
    #[inline]
    fn check_owner(&self) {
        assert!(
            self.mapping.belongs_to_this_process(),
            "a lane was used in a forked child: connect anew there"
        );
    }

    /// Whether this process is the one that mapped the lane; a forked child is not and must not touch it.
    #[must_use]
    pub fn belongs_to_this_process(&self) -> bool {
        self.mapping.belongs_to_this_process()
    }

    /// Sleeps until the engine completes a job, if the completion tail still is `expected_tail` (from
    /// `ClientLane::prepare_wait`). The death of the engine or the broker wakes nobody: wait in slices.
    ///
    /// # Errors
    /// [`FutexError`] in a forked child, or when the kernel refuses.
    pub fn wait_completion(&self, expected_tail: u32, timeout: Duration) -> Result<WaitOutcome, FutexError> {
        futex_wait(&self.mapping, COMPLETION_TAIL, expected_tail, Some(timeout))
    }

    /// Wakes everybody who sleeps in [`LaneMapping::wait_completion`], in any process. Never blocks.
    ///
    /// # Errors
    /// [`FutexError`] in a forked child, or when the kernel refuses.
    pub fn wake_client(&self) -> Result<(), FutexError> {
        futex_wake(&self.mapping, COMPLETION_TAIL, u32::MAX).map(|_| ())
    }

    /// Makes the tables of the lane resident, so that the first jobs take no page faults. The arena stays untouched.
    pub fn prefault_tables(&self) {
        // Only a hint: without it the first jobs are slower.
        let _ = self.mapping.prefault(0, Geometry::V1.arena_offset());
    }
}

impl LaneMemory for LaneMapping {
    fn len_bytes(&self) -> usize {
        self.raw.len_bytes()
    }
    #[inline]
    fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        self.check_owner();
        self.raw.load_u32(offset, order)
    }
    #[inline]
    fn store_u32(&self, offset: usize, value: u32, order: Ordering) {
        self.check_owner();
        self.raw.store_u32(offset, value, order);
    }
    #[inline]
    fn swap_u32(&self, offset: usize, value: u32, order: Ordering) -> u32 {
        self.check_owner();
        self.raw.swap_u32(offset, value, order)
    }
    #[inline]
    fn load_u64(&self, offset: usize, order: Ordering) -> u64 {
        self.check_owner();
        self.raw.load_u64(offset, order)
    }
    #[inline]
    fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        self.check_owner();
        self.raw.store_u64(offset, value, order);
    }
    #[inline]
    fn fence(&self, order: Ordering) {
        self.raw.fence(order);
    }
    #[inline]
    fn read(&self, offset: usize, into: &mut [u8]) {
        self.check_owner();
        self.raw.read(offset, into);
    }
    #[inline]
    fn write(&self, offset: usize, from: &[u8]) {
        self.check_owner();
        self.raw.write(offset, from);
    }
    #[inline]
    fn prefetch(&self, offset: usize, len_bytes: usize) {
        self.raw.prefetch(offset, len_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::code::Code;
    use shm_layout::lane::{ClientLane, EngineLane, JobRequest};
    use shm_layout::wire::{Operation, Priority};

    #[test]
    fn a_job_goes_there_and_back_through_two_mappings() {
        let (fd, engine_side) = LaneMapping::create(7).unwrap();
        let client_side = LaneMapping::map(fd.as_fd()).unwrap();
        let mut client = ClientLane::new(client_side, Geometry::V1).unwrap();
        let engine = std::thread::spawn(move || {
            let (mut lane, recovered) = EngineLane::adopt(engine_side, Geometry::V1).unwrap();
            assert!(recovered.is_empty());
            let mut jobs = Vec::new();
            while jobs.is_empty() {
                lane.drain(16, &mut jobs).unwrap();
                std::thread::yield_now();
            }
            let job = jobs.remove(0);
            let mut input = Vec::new();
            lane.read_input(&job, &mut input);
            input.reverse();
            lane.complete(job, Code::Ok, &input, 1, 2).unwrap();
            if lane.needs_wake() {
                lane.memory().wake_client().unwrap();
            }
        });
        let request = JobRequest {
            operation: Operation::Embed,
            priority: Priority::Bulk,
            deadline_ns: 0,
            input: &[b"abc", b"def"],
            output_capacity_bytes: 100,
        };
        let ticket = client.submit(&request).unwrap();
        assert!(client.needs_doorbell());
        let mut answer = None;
        while answer.is_none() {
            if let Some(tail) = client.prepare_wait() {
                client.memory().wait_completion(tail, Duration::from_millis(50)).unwrap();
            }
            client.reap(16, |completion, output| answer = Some((completion, output.to_vec()))).unwrap();
        }
        let (completion, output) = answer.unwrap();
        assert_eq!((completion.ticket, completion.status), (ticket, Code::Ok));
        assert_eq!(output, b"fedcba");
        assert_eq!(client.in_flight(), 0);
        engine.join().unwrap();
    }

    #[test]
    fn regions_of_another_kind_are_refused() {
        let fd = memfd::create_lane_region(REGION_BYTES).unwrap();
        assert!(matches!(LaneMapping::map(fd.as_fd()), Err(LaneMappingError::Layout(_))));
        let small = memfd::create_lane_region(4096).unwrap();
        assert!(LaneMapping::map(small.as_fd()).is_err());
    }
}

//! The engine's end of a lane: takes jobs, checks what the client claims, posts each answer once. The client is not
//! trusted with anything: every word is read once into private memory, checked there, and used from there.

use super::fault::LaneFault;
use super::geometry::{
    ATTEMPTS, CANCELLED_SEQUENCE, CELL_BODY, CELL_BODY_BYTES, CLIENT_WAITING, COMPLETION_ENTRY_BYTES,
    COMPLETION_HEAD, COMPLETION_TAIL, DONE_SEQUENCE, ENGINE_ARMED, Geometry, SUBMISSION_HEAD,
    SUBMISSION_TAIL, SUBMITTED_SEQUENCE,
};
use super::memory::{LaneMemory, MAX_PREFETCH_BYTES};
use crate::code::Code;
use crate::wire::{Operation, Priority};
use std::sync::atomic::Ordering;

/// A job whose cell passed the checks. Not cloneable, and consumed by [`EngineLane::complete`]: one job, one answer.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a taken job must be completed, or its client waits for ever"]
pub struct CheckedJob {
    cell: u32,
    sequence: u64,
    /// What is asked; `None` for a number that this version does not know (an answer, not a fault).
    pub operation: Option<Operation>,
    /// How it is ranked.
    pub priority: Priority,
    /// `CLOCK_MONOTONIC` in ns; 0 = none.
    pub deadline_ns: u64,
    /// Bytes of the input.
    pub input_bytes: usize,
    /// Room for the output.
    pub output_capacity_bytes: usize,
    /// Times it had been begun when its engine died.
    pub attempts: u32,
    input_offset: usize,
    output_offset: usize,
}

impl CheckedJob {
    /// Number of the job in its lane.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }
}

/// The engine's end of a lane.
#[derive(Debug)]
pub struct EngineLane<M> {
    memory: M,
    geometry: Geometry,
    submission_head: u32,
    completion_tail: u32,
    /// The client's head as last read. The true one is at or past it, so room seen from here is there; it is read again
    /// only when none is seen, because each read fetches a line that the client has just written.
    completion_head: u32,
    /// For each cell the job that was taken and not yet answered; 0 = none.
    taken: Vec<u64>,
    guess: Guess,
}

/// What the next job's cell and input will be: those of the last one, since a client uses the hottest first. Worth only
/// what a prefetch is worth.
#[derive(Debug, Clone, Copy)]
struct Guess {
    cell: u32,
    input_offset: usize,
    input_bytes: usize,
}

impl<M: LaneMemory> EngineLane<M> {
    /// Takes the engine's end of a region, fresh or left behind by an engine that died, and gives the jobs which that
    /// engine had taken and not answered, oldest first. The dead engine must be dead: reaped, not just doomed.
    ///
    /// # Errors
    /// [`LaneFault`] when the client (the only other writer) left the region in a state that the protocol excludes.
    pub fn adopt(memory: M, geometry: Geometry) -> Result<(EngineLane<M>, Vec<CheckedJob>), LaneFault> {
        let submission_head = memory.load_u32(SUBMISSION_HEAD, Ordering::Acquire);
        let completion_tail = memory.load_u32(COMPLETION_TAIL, Ordering::Acquire);
        let jobs = geometry.jobs;
        let mut lane = EngineLane {
            memory,
            geometry,
            submission_head,
            completion_tail,
            completion_head: completion_tail,
            taken: vec![0; jobs],
            guess: Guess { cell: 0, input_offset: 0, input_bytes: 0 },
        };
        lane.ready()?;
        lane.read_completion_head()?;
        lane.settle_last_completion();
        let mut recovered = Vec::new();
        for cell in 0..jobs as u32 {
            let submitted = lane.submitted_sequence(cell);
            if submitted == 0 || submitted == lane.done_sequence(cell) {
                continue;
            }
            // A cell at or behind the head comes through the ring; before it, the dead engine had taken it.
            let (job, position) = lane.check_cell(cell, submitted)?;
            if (position.wrapping_sub(submission_head) as i32) < 0 {
                lane.taken[cell as usize] = submitted;
                recovered.push(job);
            }
        }
        recovered.sort_by_key(CheckedJob::sequence);
        Ok((lane, recovered))
    }

    /// The memory that this lane lies in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Marks done the job whose completion a dying engine published but had no time to mark. It can only be the last in
    /// the ring: `complete` marks each job before it publishes the next.
    fn settle_last_completion(&self) {
        let position = self.completion_tail.wrapping_sub(1);
        let mut entry = [0; COMPLETION_ENTRY_BYTES];
        self.memory.read(self.geometry.completion_entry(position), &mut entry);
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let sequence = u64::from(word(0)) | u64::from(word(4)) << 32;
        let (found, cell) = (word(8), word(12));
        if sequence != 0
            && found == position
            && (cell as usize) < self.geometry.jobs
            && self.submitted_sequence(cell) == sequence
        {
            self.memory.store_u64(
                self.geometry.engine_cell(cell) + DONE_SEQUENCE,
                sequence,
                Ordering::Release,
            );
        }
    }

    fn submitted_sequence(&self, cell: u32) -> u64 {
        // Acquire: pairs with the client's Release; the cell's body is complete behind it.
        self.memory.load_u64(self.geometry.client_cell(cell) + SUBMITTED_SEQUENCE, Ordering::Acquire)
    }

    fn done_sequence(&self, cell: u32) -> u64 {
        self.memory.load_u64(self.geometry.engine_cell(cell) + DONE_SEQUENCE, Ordering::Relaxed)
    }

    /// Entries that wait in the submission ring.
    fn ready(&self) -> Result<u32, LaneFault> {
        // Acquire: pairs with the client's Release of the tail.
        let tail = self.memory.load_u32(SUBMISSION_TAIL, Ordering::Acquire);
        let ready = tail.wrapping_sub(self.submission_head);
        if ready as usize > self.geometry.jobs {
            return Err(LaneFault::IndexOutOfRange {
                ring: "submission",
                head: self.submission_head,
                tail,
                capacity: self.geometry.jobs as u32,
            });
        }
        Ok(ready)
    }

    /// Reads the client's head anew.
    fn read_completion_head(&mut self) -> Result<(), LaneFault> {
        // Acquire: pairs with the client's Release of the head; it has read the entries before it.
        let head = self.memory.load_u32(COMPLETION_HEAD, Ordering::Acquire);
        if self.completion_tail.wrapping_sub(head) as usize > self.geometry.jobs {
            return Err(LaneFault::IndexOutOfRange {
                ring: "completion",
                head,
                tail: self.completion_tail,
                capacity: self.geometry.jobs as u32,
            });
        }
        self.completion_head = head;
        Ok(())
    }

    /// Whether the completion ring has no room, as far as was last seen.
    fn seems_full(&self) -> bool {
        self.completion_tail.wrapping_sub(self.completion_head) as usize >= self.geometry.jobs
    }

    fn check_cell(&self, cell: u32, sequence: u64) -> Result<(CheckedJob, u32), LaneFault> {
        let mut body = [0; CELL_BODY_BYTES];
        self.memory.read(self.geometry.client_cell(cell) + CELL_BODY, &mut body);
        let u16_at = |at: usize| u16::from_le_bytes([body[at], body[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]);
        let slot = |what, at: usize| {
            let (class, index, len_bytes) = (u16_at(at), u16_at(at + 2), u32_at(at + 4));
            self.geometry
                .slot_offset(class, index, len_bytes)
                .map(|offset| (offset, len_bytes as usize))
                .ok_or(LaneFault::BadSlot { what, class, index, len_bytes })
        };
        let (input_offset, input_bytes) = slot("input", 16)?;
        let (output_offset, output_capacity_bytes) = slot("output", 24)?;
        let priority = u16_at(6);
        let priority = Priority::from_number(priority)
            .ok_or(LaneFault::UnknownNumber { what: "priority", value: u32::from(priority) })?;
        let attempts = self.memory.load_u64(self.geometry.engine_cell(cell) + ATTEMPTS, Ordering::Relaxed);
        let job = CheckedJob {
            cell,
            sequence,
            operation: Operation::from_number(u16_at(4)),
            priority,
            deadline_ns: u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32,
            input_bytes,
            output_capacity_bytes,
            attempts: if attempts >> 8 == sequence { (attempts & 0xff) as u32 } else { 0 },
            input_offset,
            output_offset,
        };
        Ok((job, u32_at(0)))
    }

    /// Takes up to `most` jobs from the ring; says whether more wait.
    ///
    /// # Errors
    /// [`LaneFault`]: the client broke the protocol; jobs already in `into` stay valid, but there is nobody to answer.
    pub fn drain(&mut self, most: usize, into: &mut Vec<CheckedJob>) -> Result<bool, LaneFault> {
        let ready = self.ready()? as usize;
        let count = ready.min(most);
        if count > 0 {
            // Each of these lines was written by another core. Asked for at once they come at once; entry, cell and
            // input name each other, so otherwise each is a round trip of its own.
            self.memory.prefetch(self.geometry.submission_entry(self.submission_head), 1);
            self.memory.prefetch(self.geometry.client_cell(self.guess.cell), 1);
            self.memory.prefetch(CLIENT_WAITING, 1);
            self.memory.prefetch(self.guess.input_offset, self.guess.input_bytes.min(MAX_PREFETCH_BYTES));
        }
        for _ in 0..count {
            let position = self.submission_head;
            let entry = self.memory.load_u64(self.geometry.submission_entry(position), Ordering::Relaxed);
            let (cell, found) = (entry as u32, (entry >> 32) as u32);
            if found != position {
                return Err(LaneFault::Tripwire { ring: "submission", expected: position, found });
            }
            if cell as usize >= self.geometry.jobs {
                return Err(LaneFault::NoSuchCell(cell));
            }
            let sequence = self.submitted_sequence(cell);
            if sequence == 0 || self.taken[cell as usize] != 0 {
                return Err(LaneFault::CellInFlight(cell));
            }
            let (job, _) = self.check_cell(cell, sequence)?;
            self.taken[cell as usize] = sequence;
            self.guess = Guess { cell, input_offset: job.input_offset, input_bytes: job.input_bytes };
            into.push(job);
            self.submission_head = position.wrapping_add(1);
        }
        if count > 0 {
            // Before this, a death leaves the jobs in the ring; after it, in their cells. Either way they are found.
            self.memory.store_u32(SUBMISSION_HEAD, self.submission_head, Ordering::Release);
        }
        Ok(ready > count)
    }

    /// Whether jobs seem to wait in the ring. A hint: nothing is taken or announced, and a broken tail counts as a job, so that
    /// [`EngineLane::drain`] finds the fault.
    pub fn has_submissions(&self) -> bool {
        self.ready() != Ok(0)
    }

    /// Announces that the engine is about to sleep; false when a job has come meanwhile, and nothing is announced then.
    ///
    /// # Errors
    /// [`LaneFault`] when the tail is out of range.
    pub fn arm(&self) -> Result<bool, LaneFault> {
        self.memory.store_u32(ENGINE_ARMED, 1, Ordering::Relaxed);
        // Pairs with the fence in `ClientLane::needs_doorbell`: either the client sees us armed, or we see its tail.
        self.memory.fence(Ordering::SeqCst);
        if self.ready()? == 0 {
            return Ok(true);
        }
        self.memory.store_u32(ENGINE_ARMED, 0, Ordering::Relaxed);
        Ok(false)
    }

    /// A private copy of the job's input, replacing what `into` holds.
    pub fn read_input(&self, job: &CheckedJob, into: &mut Vec<u8>) {
        into.resize(job.input_bytes, 0);
        self.memory.read(job.input_offset, into);
    }

    /// Notes that the job begins to be computed; if the engine dies now, the job may be why.
    pub fn begin(&self, job: &CheckedJob) {
        let attempts = u64::from(job.attempts.saturating_add(1).min(0xff));
        let word = job.sequence << 8 | attempts;
        self.memory.store_u64(self.geometry.engine_cell(job.cell) + ATTEMPTS, word, Ordering::Relaxed);
    }

    /// Whether the client said that nobody wants the answer any more.
    pub fn is_cancelled(&self, job: &CheckedJob) -> bool {
        let at = self.geometry.client_cell(job.cell) + CANCELLED_SEQUENCE;
        self.memory.load_u64(at, Ordering::Relaxed) == job.sequence
    }

    /// Posts the job's answer; whoever posts must then ask [`EngineLane::needs_wake`], once for many. An `output` that
    /// does not fit turns into [`Code::OutputTooSmall`], or is cut when it is the message of an error.
    ///
    /// # Errors
    /// [`LaneFault`] when the client moved its head out of range or has no room for completions.
    pub fn complete(
        &mut self,
        job: CheckedJob,
        status: Code,
        output: &[u8],
        queue_us: u32,
        execution_us: u32,
    ) -> Result<(), LaneFault> {
        if self.seems_full() {
            self.read_completion_head()?;
        }
        if self.seems_full() {
            // An honest client has a cell for each completion that it has not reaped, so the ring cannot be full.
            return Err(LaneFault::CellInFlight(job.cell));
        }
        let (status, output) = if status == Code::Ok && output.len() > job.output_capacity_bytes {
            (Code::OutputTooSmall, &[][..])
        } else {
            (status, &output[..output.len().min(job.output_capacity_bytes)])
        };
        self.memory.write(job.output_offset, output);
        let position = self.completion_tail;
        let mut entry = [0; COMPLETION_ENTRY_BYTES];
        entry[0..8].copy_from_slice(&job.sequence.to_le_bytes());
        entry[8..12].copy_from_slice(&position.to_le_bytes());
        entry[12..16].copy_from_slice(&job.cell.to_le_bytes());
        entry[16..20].copy_from_slice(&(status as u32).to_le_bytes());
        entry[20..24].copy_from_slice(&(output.len() as u32).to_le_bytes());
        entry[24..28].copy_from_slice(&queue_us.to_le_bytes());
        entry[28..32].copy_from_slice(&execution_us.to_le_bytes());
        self.memory.write(self.geometry.completion_entry(position), &entry);
        self.taken[job.cell as usize] = 0;
        self.completion_tail = position.wrapping_add(1);
        // Release: pairs with the client's Acquire of the tail; output and entry are visible behind it. From here on
        // the job is answered; a death before the next line is settled by `adopt`.
        self.memory.store_u32(COMPLETION_TAIL, self.completion_tail, Ordering::Release);
        self.memory.store_u64(
            self.geometry.engine_cell(job.cell) + DONE_SEQUENCE,
            job.sequence,
            Ordering::Release,
        );
        Ok(())
    }

    /// Whether the client sleeps and must be woken; true once for each sleep.
    pub fn needs_wake(&self) -> bool {
        // Pairs with the fence in `ClientLane::prepare_wait`: either we see it waiting, or it sees our tail.
        self.memory.fence(Ordering::SeqCst);
        self.memory.load_u32(CLIENT_WAITING, Ordering::Relaxed) != 0
            && self.memory.swap_u32(CLIENT_WAITING, 0, Ordering::Relaxed) != 0
    }
}

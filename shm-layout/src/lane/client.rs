//! The client's end of a lane. It owns the job cells and the arena's free lists, privately; nothing here waits.

use super::fault::LaneFault;
use super::geometry::{
    CANCELLED_SEQUENCE, CELL_BODY, CELL_BODY_BYTES, CLIENT_WAITING, COMPLETION_ENTRY_BYTES, COMPLETION_HEAD,
    COMPLETION_TAIL, ENGINE_ARMED, Geometry, SUBMISSION_TAIL, SUBMITTED_SEQUENCE,
};
use super::memory::{LaneMemory, MAX_PREFETCH_BYTES};
use crate::code::Code;
use crate::wire::{Operation, Priority};
use std::sync::atomic::Ordering;

/// Names a job in flight: its cell, and which of the cell's jobs it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The cell.
    pub cell: u32,
    /// Number of the job, never used twice in a lane.
    pub sequence: u64,
}

/// A job to be submitted.
#[derive(Debug, Clone, Copy)]
pub struct JobRequest<'a> {
    /// What is asked.
    pub operation: Operation,
    /// How it is ranked.
    pub priority: Priority,
    /// `CLOCK_MONOTONIC` in ns after which nobody wants the answer; 0 = none.
    pub deadline_ns: u64,
    /// The payload, in pieces that are written one after the other.
    pub input: &'a [&'a [u8]],
    /// Room for the answer in bytes; also holds the message of an error.
    pub output_capacity_bytes: usize,
}

/// Why a job was not submitted. Nothing has changed; the caller still has its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Every job cell of the lane is in flight.
    #[error("all {0} job cells of the lane are in flight")]
    JobsFull(usize),
    /// No arena slot of a sufficient size is free.
    #[error("no free arena slot of {0} bytes")]
    ArenaFull(usize),
    /// Input or output are larger than any slot.
    #[error("{0} bytes are more than the largest slot of the arena")]
    TooLarge(usize),
}

/// The engine's word on a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The job.
    pub ticket: Ticket,
    /// Done, or why not.
    pub status: Code,
    /// Bytes of the output.
    pub output_bytes: usize,
    /// Time from being taken to being computed, in µs.
    pub queue_us: u32,
    /// Time computing, in µs.
    pub execution_us: u32,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    class: u16,
    index: u16,
    offset: usize,
}

#[derive(Debug)]
struct InFlight {
    sequence: u64,
    input: Slot,
    output: Slot,
    output_capacity_bytes: usize,
}

/// A job's output, to be copied out while it is reaped.
#[derive(Debug)]
pub struct OutputSlot<'a, M> {
    memory: &'a M,
    offset: usize,
    len_bytes: usize,
}

impl<M: LaneMemory> OutputSlot<'_, M> {
    /// A private copy of the output.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len_bytes];
        self.memory.read(self.offset, &mut bytes);
        bytes
    }

    /// Copies the output into `into`, replacing what it holds.
    pub fn copy_to(&self, into: &mut Vec<u8>) {
        into.resize(self.len_bytes, 0);
        self.memory.read(self.offset, into);
    }
}

/// The client's end of a lane. One owner at a time: a client with many threads keeps it behind a private lock.
#[derive(Debug)]
pub struct ClientLane<M> {
    memory: M,
    geometry: Geometry,
    submission_tail: u32,
    completion_head: u32,
    last_sequence: u64,
    /// Offset and capacity of the output of the job submitted last: the likeliest to be answered next.
    last_output: (usize, usize),
    cells: Vec<Option<InFlight>>,
    free_cells: Vec<u32>,
    free_slots: Vec<Vec<u16>>,
}

impl<M: LaneMemory> ClientLane<M> {
    /// Takes the client's end of a fresh region.
    ///
    /// # Errors
    /// [`LaneFault::Header`] when the region is not of this layout.
    pub fn new(memory: M, geometry: Geometry) -> Result<ClientLane<M>, LaneFault> {
        super::check_header(&memory, &geometry)?;
        Ok(ClientLane {
            memory,
            submission_tail: 0,
            completion_head: 0,
            last_sequence: 0,
            last_output: (0, 0),
            cells: (0..geometry.jobs).map(|_| None).collect(),
            // Last in, first out: the hottest cell and slot are used again first.
            free_cells: (0..geometry.jobs as u32).rev().collect(),
            free_slots: geometry.classes.iter().map(|c| (0..c.count as u16).rev().collect()).collect(),
            geometry,
        })
    }

    /// The memory that this lane lies in.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Jobs submitted and not yet reaped.
    pub fn in_flight(&self) -> usize {
        self.geometry.jobs - self.free_cells.len()
    }

    fn take_slot(&mut self, len_bytes: usize) -> Result<Slot, SubmitError> {
        let first = self
            .geometry
            .classes
            .iter()
            .position(|c| c.slot_bytes >= len_bytes)
            .ok_or(SubmitError::TooLarge(len_bytes))?;
        for class in first..self.free_slots.len() {
            if let Some(index) = self.free_slots[class].pop() {
                let class = class as u16;
                // `len_bytes` fits the class, so the offset exists.
                if let Some(offset) = self.geometry.slot_offset(class, index, len_bytes as u32) {
                    return Ok(Slot { class, index, offset });
                }
            }
        }
        Err(SubmitError::ArenaFull(len_bytes))
    }

    fn free_slot(&mut self, slot: Slot) {
        self.free_slots[slot.class as usize].push(slot.index);
    }

    /// Submits a job. Whoever submits must then ask [`ClientLane::needs_doorbell`]; several jobs may share one call.
    ///
    /// # Errors
    /// [`SubmitError`]: nothing was submitted.
    pub fn submit(&mut self, request: &JobRequest<'_>) -> Result<Ticket, SubmitError> {
        // The engine has written it since it was read here last; `needs_doorbell` looks at it soon.
        self.memory.prefetch(ENGINE_ARMED, 1);
        let input_bytes: usize = request.input.iter().map(|piece| piece.len()).sum();
        let Some(cell) = self.free_cells.pop() else { return Err(SubmitError::JobsFull(self.geometry.jobs)) };
        let slots = self.take_slot(input_bytes).and_then(|input| {
            self.take_slot(request.output_capacity_bytes).map(|output| (input, output)).inspect_err(|_| {
                self.free_slots[input.class as usize].push(input.index);
            })
        });
        let (input, output) = match slots {
            Ok(slots) => slots,
            Err(error) => {
                self.free_cells.push(cell);
                return Err(error);
            }
        };
        let mut at = input.offset;
        for piece in request.input {
            self.memory.write(at, piece);
            at += piece.len();
        }
        self.last_sequence += 1;
        let sequence = self.last_sequence;
        let position = self.submission_tail;
        let cell_at = self.geometry.client_cell(cell);
        self.memory.write(cell_at + CELL_BODY, &cell_body(request, position, input_bytes, input, output));
        // Release: an engine that takes over after a death reads the cell's body behind this word.
        self.memory.store_u64(cell_at + SUBMITTED_SEQUENCE, sequence, Ordering::Release);
        let entry = u64::from(cell) | u64::from(position) << 32;
        self.memory.store_u64(self.geometry.submission_entry(position), entry, Ordering::Relaxed);
        self.submission_tail = position.wrapping_add(1);
        // Release: pairs with the engine's Acquire load of the tail; everything above is visible behind it.
        self.memory.store_u32(SUBMISSION_TAIL, self.submission_tail, Ordering::Release);
        let output_capacity_bytes = request.output_capacity_bytes;
        self.last_output = (output.offset, output_capacity_bytes);
        self.cells[cell as usize] = Some(InFlight { sequence, input, output, output_capacity_bytes });
        Ok(Ticket { cell, sequence })
    }

    /// Whether the engine sleeps and must be woken; true once for each sleep.
    pub fn needs_doorbell(&self) -> bool {
        // Pairs with the fence in `EngineLane::arm`: either we see it armed, or it sees our tail.
        self.memory.fence(Ordering::SeqCst);
        self.memory.load_u32(ENGINE_ARMED, Ordering::Relaxed) != 0
            && self.memory.swap_u32(ENGINE_ARMED, 0, Ordering::Relaxed) != 0
    }

    /// Tells the engine that nobody wants this answer. It comes all the same, at the latest when the job would have run;
    /// until then cell and slots stay taken.
    pub fn cancel(&self, ticket: Ticket) {
        if self.is_in_flight(ticket) {
            let at = self.geometry.client_cell(ticket.cell) + CANCELLED_SEQUENCE;
            self.memory.store_u64(at, ticket.sequence, Ordering::Release);
        }
    }

    /// Whether the job has been submitted and not been reaped.
    pub fn is_in_flight(&self, ticket: Ticket) -> bool {
        matches!(self.cells.get(ticket.cell as usize), Some(Some(job)) if job.sequence == ticket.sequence)
    }

    /// Takes up to `most` completions and hands each to `take` with its output; gives how many there were.
    ///
    /// # Errors
    /// [`LaneFault`] when the engine broke the protocol; the lane must not be used any further.
    pub fn reap(
        &mut self,
        most: usize,
        mut take: impl FnMut(Completion, OutputSlot<'_, M>),
    ) -> Result<usize, LaneFault> {
        let tail = self.memory.load_u32(COMPLETION_TAIL, Ordering::Acquire);
        let ready = tail.wrapping_sub(self.completion_head);
        if ready as usize > self.geometry.jobs {
            return Err(LaneFault::IndexOutOfRange {
                ring: "completion",
                head: self.completion_head,
                tail,
                capacity: self.geometry.jobs as u32,
            });
        }
        let count = (ready as usize).min(most);
        if count > 0 {
            // As in `EngineLane::drain`: entry and output at once, not one after the other.
            let (output, capacity_bytes) = self.last_output;
            self.memory.prefetch(self.geometry.completion_entry(self.completion_head), 1);
            self.memory.prefetch(output, capacity_bytes.min(MAX_PREFETCH_BYTES));
        }
        for _ in 0..count {
            let position = self.completion_head;
            let mut entry = [0; COMPLETION_ENTRY_BYTES];
            self.memory.read(self.geometry.completion_entry(position), &mut entry);
            let (completion, job) = self.check_completion(&entry, position)?;
            let output = OutputSlot {
                memory: &self.memory,
                offset: job.output.offset,
                len_bytes: completion.output_bytes,
            };
            take(completion, output);
            self.free_slot(job.output);
            self.free_slot(job.input);
            self.free_cells.push(completion.ticket.cell);
            self.completion_head = position.wrapping_add(1);
        }
        if count > 0 {
            // Release: the engine writes these entries again only after it has seen this.
            self.memory.store_u32(COMPLETION_HEAD, self.completion_head, Ordering::Release);
        }
        Ok(count)
    }

    fn check_completion(
        &mut self,
        entry: &[u8; COMPLETION_ENTRY_BYTES],
        position: u32,
    ) -> Result<(Completion, InFlight), LaneFault> {
        let u32_at = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let sequence = u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32;
        let [found, cell, status, output_bytes, queue_us, execution_us] = [8, 12, 16, 20, 24, 28].map(u32_at);
        if found != position {
            return Err(LaneFault::Tripwire { ring: "completion", expected: position, found });
        }
        let job = self.cells.get_mut(cell as usize).ok_or(LaneFault::NoSuchCell(cell))?;
        let status =
            Code::from_number(status).ok_or(LaneFault::UnknownNumber { what: "status", value: status })?;
        match job.take() {
            Some(job) if job.sequence == sequence => {
                if output_bytes as usize > job.output_capacity_bytes {
                    return Err(LaneFault::BadSlot {
                        what: "output",
                        class: job.output.class,
                        index: job.output.index,
                        len_bytes: output_bytes,
                    });
                }
                let completion = Completion {
                    ticket: Ticket { cell, sequence },
                    status,
                    output_bytes: output_bytes as usize,
                    queue_us,
                    execution_us,
                };
                Ok((completion, job))
            }
            other => {
                *job = other;
                Err(LaneFault::NotInFlight(cell))
            }
        }
    }

    /// Announces that the caller is about to sleep. Gives the value of the completion tail to sleep on, or `None` when
    /// there is something to reap already.
    pub fn prepare_wait(&self) -> Option<u32> {
        self.memory.store_u32(CLIENT_WAITING, 1, Ordering::Relaxed);
        // Pairs with the fence in `EngineLane::needs_wake`: either it sees us waiting, or we see its tail.
        self.memory.fence(Ordering::SeqCst);
        let tail = self.memory.load_u32(COMPLETION_TAIL, Ordering::Acquire);
        if tail == self.completion_head {
            return Some(tail);
        }
        self.memory.store_u32(CLIENT_WAITING, 0, Ordering::Relaxed);
        None
    }

    /// Whether there is something to reap; for a client that spins before it sleeps.
    #[inline]
    pub fn has_completions(&self) -> bool {
        self.memory.load_u32(COMPLETION_TAIL, Ordering::Relaxed) != self.completion_head
    }
}

fn cell_body(
    request: &JobRequest<'_>,
    position: u32,
    input_bytes: usize,
    input: Slot,
    output: Slot,
) -> [u8; CELL_BODY_BYTES] {
    let mut body = [0; CELL_BODY_BYTES];
    body[0..4].copy_from_slice(&position.to_le_bytes());
    body[4..6].copy_from_slice(&(request.operation as u16).to_le_bytes());
    body[6..8].copy_from_slice(&(request.priority as u16).to_le_bytes());
    body[8..16].copy_from_slice(&request.deadline_ns.to_le_bytes());
    body[16..18].copy_from_slice(&input.class.to_le_bytes());
    body[18..20].copy_from_slice(&input.index.to_le_bytes());
    // Both lengths fit a slot, and no slot is larger than u32 holds.
    body[20..24].copy_from_slice(&(input_bytes as u32).to_le_bytes());
    body[24..26].copy_from_slice(&output.class.to_le_bytes());
    body[26..28].copy_from_slice(&output.index.to_le_bytes());
    body[28..32].copy_from_slice(&(request.output_capacity_bytes as u32).to_le_bytes());
    body
}

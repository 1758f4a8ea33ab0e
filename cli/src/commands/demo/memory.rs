//! Workers side by side, and what memory they take, counted from /proc while they live. How the figures are shown is not
//! here.

use super::stage::interrupted;
use crate::commands::worker::interrupt::Interrupt;
use crate::commands::worker::probe::{ProbePlan, ProbeReport};
use crate::commands::worker::process::{Said, WorkerProcess};
use crate::failure::{Exit, Failure};
use shm_os::memfd::IMAGE_MEMFD_NAME;
use shm_os::smaps::{self, MappingReport};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Longest time that a worker may take to be ready and have embedded.
const WORKER_TIMEOUT: Duration = Duration::from_secs(60);
const SLICE: Duration = Duration::from_millis(50);
/// What a worker embeds, so that it is measured in use and not idle.
const TEXTS: [&str; 3] = [
    "How loud is a heat pump at night?",
    "Express shipping of a pallet.",
    "The sensor on the evaporator reads outside of its range, and the board stops the compressor.",
];

/// Memory of one process, bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProcessMemory {
    pub(crate) pid: u32,
    /// Pages that no other process uses: what its end would give back.
    pub(crate) private_bytes: u64,
    /// All pages, shared ones divided by their users.
    pub(crate) pss_bytes: u64,
    /// The part of `pss_bytes` that is weights: the shared image's, or its own.
    pub(crate) weights_pss_bytes: u64,
}

impl ProcessMemory {
    fn read(pid: u32, is_weights: impl FnMut(&MappingReport) -> bool) -> Result<ProcessMemory, Failure> {
        let failed = |error: smaps::SmapsError| Failure::new(Exit::Failed, error.to_string());
        let all = smaps::process_memory(pid).map_err(failed)?;
        let (weights, _) = smaps::mappings_memory(pid, is_weights).map_err(failed)?;
        Ok(ProcessMemory {
            pid,
            private_bytes: all.private_bytes(),
            pss_bytes: all.pss_bytes,
            weights_pss_bytes: weights.pss_bytes,
        })
    }

    /// Of a process that has the shared image, if any.
    pub(crate) fn of_sharer(pid: u32) -> Result<ProcessMemory, Failure> {
        ProcessMemory::read(pid, |mapping| mapping.name.contains(IMAGE_MEMFD_NAME))
    }

    /// Of a process with weights of its own at an address.
    fn of_owner(pid: u32, start: u64, len_bytes: u64) -> Result<ProcessMemory, Failure> {
        let end = start.saturating_add(len_bytes);
        let overlaps = |m: &MappingReport| m.start < end && start < m.start.saturating_add(m.len_bytes);
        let mut memory = ProcessMemory::read(pid, overlaps)?;
        // The heap's mapping may have other things beside the weights.
        memory.weights_pss_bytes = memory.weights_pss_bytes.min(len_bytes);
        Ok(memory)
    }
}

/// A worker as it was while all of its group were alive.
#[derive(Debug)]
pub(crate) struct WorkerFigures {
    pub(crate) memory: ProcessMemory,
    pub(crate) report: ProbeReport,
}

/// How workers get the model.
#[derive(Debug, Clone)]
pub(crate) enum Way {
    Thin,
    Attached,
    /// Each reads this compiled image into its own memory.
    Private(PathBuf),
}

impl Way {
    fn role(&self) -> &'static str {
        match self {
            Way::Thin => "thin",
            Way::Attached => "attached",
            Way::Private(_) => "private",
        }
    }
}

/// Starts workers, one after the other so that they do not disturb each other's times.
pub(crate) struct Workers<'a> {
    pub(crate) socket: &'a Path,
    pub(crate) model: &'a str,
    pub(crate) interrupt: &'a Interrupt,
}

/// Workers that live, each with what it reported.
#[derive(Debug)]
pub(crate) struct LiveWorkers(Vec<(WorkerProcess, ProbeReport)>);

impl Workers<'_> {
    /// Starts `count` workers and waits until each has the model and has used it.
    pub(crate) fn start(&self, way: &Way, count: usize) -> Result<LiveWorkers, Failure> {
        let mut live = Vec::new();
        for _ in 0..count {
            live.push(self.start_one(way)?);
        }
        Ok(LiveWorkers(live))
    }

    fn start_one(&self, way: &Way) -> Result<(WorkerProcess, ProbeReport), Failure> {
        let (sender, said) = channel();
        let mut process = WorkerProcess::start(self.socket, way.role(), self.model, 0, sender)?;
        let image = match way {
            Way::Private(path) => Some(path.clone()),
            Way::Thin | Way::Attached => None,
        };
        process.tell(&ProbePlan { texts: TEXTS.map(str::to_owned).to_vec(), image })?;
        let end = Instant::now() + WORKER_TIMEOUT;
        loop {
            interrupted(self.interrupt)?;
            let failed = |what: String| {
                let message = format!("a worker process of the kind {:?} {what}", way.role());
                Failure::new(Exit::Failed, message)
            };
            match said.recv_timeout(SLICE) {
                Ok((_, Said::Line(line))) => {
                    let report =
                        serde_json::from_str(&line).map_err(|e| failed(format!("said nonsense: {e}")))?;
                    return Ok((process, report));
                }
                Ok((_, Said::End)) | Err(RecvTimeoutError::Disconnected) => {
                    let status = process.wait()?;
                    return Err(failed(format!("ended with {status} before it had embedded")));
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= end => {
                    return Err(failed(format!("was not ready within {WORKER_TIMEOUT:?}")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl LiveWorkers {
    /// Reads each one's memory, while all live.
    pub(crate) fn figures(&self) -> Result<Vec<WorkerFigures>, Failure> {
        self.0
            .iter()
            .map(|(process, report)| {
                let memory = match report.own_weights {
                    Some((start, len_bytes)) => ProcessMemory::of_owner(process.pid(), start, len_bytes)?,
                    None => ProcessMemory::of_sharer(process.pid())?,
                };
                Ok(WorkerFigures { memory, report: report.clone() })
            })
            .collect()
    }

    /// Lets them end and sees that each ended well.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        for (mut process, _) in self.0 {
            let status = process.wait()?;
            if !status.success() {
                return Err(Failure::new(Exit::Failed, format!("a worker process ended with {status}")));
            }
        }
        Ok(())
    }
}

/// How many copies of an image of `image_bytes` the processes hold together: each page counts once, whoever has it.
pub(crate) fn copies<'a>(processes: impl IntoIterator<Item = &'a ProcessMemory>, image_bytes: u64) -> f64 {
    let weights: u64 = processes.into_iter().map(|memory| memory.weights_pss_bytes).sum();
    weights as f64 / image_bytes.max(1) as f64
}

/// The middle one of some times; 0 of none.
pub(crate) fn median(mut times_us: Vec<u64>) -> u64 {
    times_us.sort_unstable();
    times_us.get(times_us.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_weights_are_found_in_this_process() {
        let own = vec![1u8; 32 << 20];
        let memory =
            ProcessMemory::of_owner(std::process::id(), own.as_ptr() as u64, own.len() as u64).unwrap();
        assert_eq!(memory.weights_pss_bytes, own.len() as u64);
        assert!(memory.private_bytes >= memory.weights_pss_bytes);
        let sharer = ProcessMemory::of_sharer(std::process::id()).unwrap();
        assert_eq!(copies([&memory, &sharer], 32 << 20), 1.0);
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!((median(vec![9, 1, 5]), median(vec![])), (5, 0));
    }
}

//! Counting what a broker and its engine hold, to see that nothing of a dead client stays. Nothing is started here.

use crate::running::{Broker, eventually};
use std::collections::BTreeMap;
use std::fs;
use worker_sdk::Client;

/// What is held on account of clients. Two of them that are equal mean that nothing has leaked in between.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census {
    /// Sessions by the name that the client gave.
    pub sessions: BTreeMap<String, usize>,
    /// Leases of all models.
    pub leases: u32,
    /// Lanes of all engines.
    pub lanes: u32,
    /// Open descriptors of the broker, by what they are (`socket`, `/memfd:...`, `anon_inode:[eventfd]`, ...).
    pub broker_descriptors: BTreeMap<String, usize>,
    /// Open descriptors of the engine.
    pub engine_descriptors: BTreeMap<String, usize>,
    /// Shared memory objects mapped by the broker, by name.
    pub broker_mappings: BTreeMap<String, usize>,
    /// Shared memory objects mapped by the engine.
    pub engine_mappings: BTreeMap<String, usize>,
}

impl Census {
    /// Counts now, over a connection that is there all the time. `None` while the engine is being replaced.
    #[must_use]
    pub fn take(broker: &Broker, client: &Client) -> Option<Census> {
        let status = client.status().ok()?;
        // One that has not reported itself opens descriptors yet.
        let engine = status.engines.first().filter(|engine| engine.pid != 0 && engine.threads > 0)?;
        let engine_pid = engine.pid;
        let broker_pid = broker.pid().as_raw().cast_unsigned();
        Some(Census {
            sessions: count(status.sessions.iter().map(|session| session.client_name.clone())),
            leases: status.models.iter().map(|model| model.leases).sum(),
            lanes: status.engines.iter().map(|engine| engine.lanes).sum(),
            broker_descriptors: descriptors(broker_pid)?,
            engine_descriptors: descriptors(engine_pid)?,
            broker_mappings: memory_objects(broker_pid)?,
            engine_mappings: memory_objects(engine_pid)?,
        })
    }

    /// Waits until what is held is what it was.
    ///
    /// # Panics
    /// When something more or less stays held.
    pub fn await_again(&self, broker: &Broker, client: &Client) {
        let mut last = None;
        let same = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually("what is held is what it was", || {
                last = Census::take(broker, client);
                (last.as_ref() == Some(self)).then_some(())
            });
        }));
        assert!(same.is_ok(), "before: {self:#?}\nafter: {last:#?}");
    }
}

fn count(names: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    names.for_each(|name| *counts.entry(name).or_default() += 1);
    counts
}

/// Open descriptors of a process by kind; numbers in their names left out, as they differ each time.
fn descriptors(pid: u32) -> Option<BTreeMap<String, usize>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let targets = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    Some(count(targets.map(|target| {
        let name = target.to_string_lossy().into_owned();
        name.split_once(":[")
            .filter(|_| !name.starts_with("anon_inode"))
            .map_or(name.clone(), |(kind, _)| kind.into())
    })))
}

/// Mapped memory objects of a process by name, each object once.
fn memory_objects(pid: u32) -> Option<BTreeMap<String, usize>> {
    let mut objects = BTreeMap::new();
    shm_os::smaps::each_mapping(pid, |mapping| {
        if mapping.name.starts_with("/memfd:") || mapping.name.starts_with("/dev/shm") {
            objects.insert(mapping.inode, mapping.name.clone());
        }
    })
    .ok()?;
    Some(count(objects.into_values()))
}

/// Names in `/dev/shm` that are this program's: there must be none, ever, but for an instant.
#[must_use]
pub fn shared_memory_names() -> Vec<String> {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains("modelbroker"))
        .collect()
}

/// Process ids of the children of a process, of all its threads.
#[must_use]
pub fn children_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Whether a process has ended. One that its parent has not asked about yet has ended too.
#[must_use]
pub fn is_gone(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        // After the name, which may hold anything, comes the state.
        Ok(stat) => stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with(['Z', 'X'])),
        Err(_) => true,
    }
}

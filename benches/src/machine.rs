//! The machine that is measured on: what it is, and which core a process runs on. No measurements.

use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// What figures depend on: processor, cores, memory, kernel, versions. No names of hosts, users or paths.
#[must_use]
pub(crate) fn describe() -> Value {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory_kib: u64 = field(&memory, "MemTotal")
        .and_then(|value| value.split_whitespace().next()?.parse().ok())
        .unwrap_or_default();
    json!({
        "cpu": field(&cpuinfo, "model name").unwrap_or("unknown"),
        "cpu_model": field(&cpuinfo, "model").unwrap_or("unknown"),
        "cores": allowed_cores().map(|cores| cores.len()).unwrap_or_default(),
        "memory_gib": memory_kib as f64 / f64::from(1 << 20),
        "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        "load_average_1m": std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()),
        "modelbroker": env!("CARGO_PKG_VERSION"),
    })
}

/// The same for people.
pub(crate) fn sentence() -> String {
    let of = describe();
    let text = |key: &str| of[key].as_str().unwrap_or("unknown").to_owned();
    let load = of["load_average_1m"].as_f64().map_or("unknown".into(), |load| format!("{load:.1}"));
    format!(
        "Measured on: {} (model {}), {} cores, {:.1} GiB, Linux {}; modelbroker {}; load average at the end {load}.",
        text("cpu"),
        text("cpu_model"),
        of["cores"],
        of["memory_gib"].as_f64().unwrap_or_default(),
        text("kernel"),
        text("modelbroker"),
    )
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// The cores that this process may use, ascending.
///
/// # Errors
/// When the kernel refuses to tell.
pub(crate) fn allowed_cores() -> anyhow::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("asking which cores may be used")?;
    Ok((0..CpuSet::count()).filter(|core| set.is_set(*core).unwrap_or(false)).collect())
}

/// Keeps this thread, and threads and processes that it starts, on one core.
///
/// # Errors
/// When the core does not exist or may not be used.
pub(crate) fn pin(core: usize) -> anyhow::Result<()> {
    pin_to(&[core])
}

/// Keeps this thread, and threads and processes that it starts, on some cores.
///
/// # Errors
/// When none of them may be used.
pub(crate) fn pin_to(cores: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core).with_context(|| format!("core {core}"))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("staying on cores {cores:?}"))
}

//! How much memory the system and this process's control group have left. Reads files of the kernel; what is done about it
//! is the core's.

use std::fs;
use std::path::{Path, PathBuf};

/// Where control groups are mounted.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Most levels of control groups that are looked at, from this process's own upwards.
const MAX_CGROUP_LEVELS: usize = 32;

/// What is left to be taken, in bytes: the least of the system and of each control group above this process. `None` where
/// nothing of it can be read.
pub(crate) fn available_bytes() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_available_bytes(&text));
    let membership = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = group_folders(&membership).into_iter().filter_map(|group| group.available_bytes());
    system.into_iter().chain(groups).min()
}

/// `MemAvailable` of /proc/meminfo.
fn meminfo_available_bytes(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A control group's folder, and which version's files lie in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    folder: PathBuf,
    is_v2: bool,
}

/// The control groups above a process, from the lines of its /proc/self/cgroup. In a container the path may be one of the
/// host's: then the root of what is mounted is the container's own.
fn group_folders(membership: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let is_v2 = controllers.is_empty();
        if !is_v2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let root = if is_v2 { PathBuf::from(CGROUP_ROOT) } else { Path::new(CGROUP_ROOT).join("memory") };
        let own = Path::new(path.trim_start_matches('/'));
        if own.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
            continue;
        }
        let levels = own.ancestors().take(MAX_CGROUP_LEVELS);
        groups.extend(levels.map(|level| Group { folder: root.join(level), is_v2 }));
    }
    groups
}

impl Group {
    /// What the group may take still; `None` where it has no limit or cannot be read.
    fn available_bytes(&self) -> Option<u64> {
        let read = |name: &str| fs::read_to_string(self.folder.join(name)).ok();
        let (limit, used) = if self.is_v2 {
            (read("memory.max")?, read("memory.current")?)
        } else {
            (read("memory.limit_in_bytes")?, read("memory.usage_in_bytes")?)
        };
        group_available_bytes(&limit, &used, &read("memory.stat").unwrap_or_default())
    }
}

/// What a control group may take still: its limit less what it uses, but for pages of files, which the kernel gives up.
/// `None` where there is no limit (`max`, or version 1's huge number).
fn group_available_bytes(limit: &str, used: &str, stat: &str) -> Option<u64> {
    const NO_LIMIT_BYTES: u64 = 1 << 60;
    let limit_bytes: u64 = limit.trim().parse().ok().filter(|bytes| *bytes < NO_LIMIT_BYTES)?;
    let used_bytes: u64 = used.trim().parse().ok()?;
    let value = |name: &str| -> Option<u64> {
        stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
    };
    // Version 1 counts children in the totals. Pages of memory objects are in neither: they are swap-backed.
    let file_pages = |kind: &str| value(&format!("total_{kind}")).or_else(|| value(kind)).unwrap_or(0);
    let files_bytes = file_pages("inactive_file").saturating_add(file_pages("active_file"));
    Some(limit_bytes.saturating_sub(used_bytes.saturating_sub(files_bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_says_what_is_available() {
        let text = "MemTotal:       16384 kB\nMemFree:  1 kB\nMemAvailable:    2048 kB\nBuffers: 7 kB\n";
        assert_eq!(meminfo_available_bytes(text), Some(2 << 20));
        for bad in ["", "MemAvailable: many kB", "MemAvailable: 99999999999999999999 kB", "MemAvailable: 5"] {
            assert_eq!(meminfo_available_bytes(bad), None, "{bad}");
        }
        assert!(available_bytes().is_some_and(|bytes| bytes > 0), "this system says it");
    }

    #[test]
    fn a_group_has_its_limit_less_what_it_cannot_give_up() {
        let stat = "anon 500\nfile 700\nshmem 300\ninactive_file 150\nactive_file 50\n";
        assert_eq!(group_available_bytes("1000\n", "900\n", stat), Some(300));
        assert_eq!(group_available_bytes("1000", "2000", ""), Some(0));
        assert_eq!(group_available_bytes("max", "900", stat), None);
        assert_eq!(group_available_bytes("9223372036854771712", "900", stat), None);
        assert_eq!(group_available_bytes("nonsense", "900", stat), None);
        let v1 = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 100\n";
        assert_eq!(group_available_bytes("1000", "900", v1), Some(300));
    }

    #[test]
    fn groups_are_found_by_either_version() {
        let folders = |text: &str| -> Vec<String> {
            group_folders(text)
                .into_iter()
                .map(|g| g.folder.to_string_lossy().trim_end_matches('/').to_owned())
                .collect()
        };
        assert_eq!(
            folders("0::/user.slice/x\n"),
            ["/sys/fs/cgroup/user.slice/x", "/sys/fs/cgroup/user.slice", "/sys/fs/cgroup"]
        );
        assert_eq!(
            folders("5:cpu,memory:/a\n3:cpuset:/b\n"),
            ["/sys/fs/cgroup/memory/a", "/sys/fs/cgroup/memory"]
        );
        assert_eq!(folders("0::/\n"), ["/sys/fs/cgroup"]);
        assert!(folders("nonsense\n0::/../../etc\n").is_empty());
    }
}

//! Memory of processes as /proc tells it: sums, and the share of single objects, so that copies of weights are
//! counted and not assumed. What should be found must not be known here.

use std::fs::File;
use std::io::{BufRead, BufReader};

use crate::OsError;

/// Memory of a process or of a set of its mappings, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// Resident pages.
    pub rss_bytes: u64,
    /// Resident pages, each divided by the number of its users: sums over processes count each page once.
    pub pss_bytes: u64,
    /// Resident pages that other processes use too.
    pub shared_bytes: u64,
    /// Resident pages of this process alone that a file still holds.
    pub private_clean_bytes: u64,
    /// Resident pages of this process alone that are written.
    pub private_dirty_bytes: u64,
    /// Pages that belong to no file: heap, stacks.
    pub anonymous_bytes: u64,
    /// Pages that were swapped out.
    pub swap_bytes: u64,
}

impl MemoryReport {
    /// Resident pages that no other process uses: what ending this process would free.
    pub fn private_bytes(&self) -> u64 {
        self.private_clean_bytes + self.private_dirty_bytes
    }

    fn add(&mut self, field: &str, bytes: u64) {
        let place = match field {
            "Rss" => &mut self.rss_bytes,
            "Pss" => &mut self.pss_bytes,
            "Shared_Clean" | "Shared_Dirty" => &mut self.shared_bytes,
            "Private_Clean" => &mut self.private_clean_bytes,
            "Private_Dirty" => &mut self.private_dirty_bytes,
            "Anonymous" => &mut self.anonymous_bytes,
            "Swap" => &mut self.swap_bytes,
            _ => return,
        };
        *place = place.saturating_add(bytes);
    }
}

/// One mapping of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MappingReport {
    /// First address.
    pub start: u64,
    /// Length of the range, bytes.
    pub len_bytes: u64,
    /// Inode of the file or memory object, 0 for anonymous memory.
    pub inode: u64,
    /// Path or name, such as "/memfd:modelbroker-image (deleted)"; empty for anonymous memory.
    pub name: String,
    /// Its pages.
    pub memory: MemoryReport,
}

/// Why memory figures could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SmapsError {
    /// /proc gave something else than documented.
    #[error("/proc/{pid}/smaps has a line that is not understood: {line:?}")]
    Malformed {
        /// Process asked for.
        pid: u32,
        /// The line's beginning.
        line: String,
    },
    /// The process is gone or belongs to another user, or /proc is not there.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// Memory of a whole process (from `smaps_rollup`, or summed up where the kernel has none).
pub fn process_memory(pid: u32) -> Result<MemoryReport, SmapsError> {
    match File::open(format!("/proc/{pid}/smaps_rollup")) {
        Ok(file) => parse_rollup(pid, BufReader::new(file)),
        Err(_) => {
            let mut sum = MemoryReport::default();
            each_mapping(pid, |mapping| sum = sum_of(sum, mapping.memory))?;
            Ok(sum)
        }
    }
}

/// Memory of those mappings of a process for which `wanted` says yes, and how many they are.
pub fn mappings_memory(
    pid: u32,
    mut wanted: impl FnMut(&MappingReport) -> bool,
) -> Result<(MemoryReport, usize), SmapsError> {
    let (mut sum, mut count) = (MemoryReport::default(), 0);
    each_mapping(pid, |mapping| {
        if wanted(mapping) {
            sum = sum_of(sum, mapping.memory);
            count += 1;
        }
    })?;
    Ok((sum, count))
}

/// Memory of the mappings whose name contains `part`, such as [`IMAGE_MEMFD_NAME`](crate::memfd::IMAGE_MEMFD_NAME).
pub fn memory_by_name(pid: u32, part: &str) -> Result<(MemoryReport, usize), SmapsError> {
    mappings_memory(pid, |mapping| mapping.name.contains(part))
}

/// Memory of the mappings of one file or memory object.
pub fn memory_by_inode(pid: u32, inode: u64) -> Result<(MemoryReport, usize), SmapsError> {
    mappings_memory(pid, |mapping| inode != 0 && mapping.inode == inode)
}

/// Calls `visit` with each mapping of a process.
pub fn each_mapping(pid: u32, visit: impl FnMut(&MappingReport)) -> Result<(), SmapsError> {
    let file = File::open(format!("/proc/{pid}/smaps"))
        .map_err(|e| OsError::new(format!("reading the memory of process {pid}"), e))?;
    parse_smaps(pid, BufReader::new(file), visit)
}

fn sum_of(a: MemoryReport, b: MemoryReport) -> MemoryReport {
    MemoryReport {
        rss_bytes: a.rss_bytes + b.rss_bytes,
        pss_bytes: a.pss_bytes + b.pss_bytes,
        shared_bytes: a.shared_bytes + b.shared_bytes,
        private_clean_bytes: a.private_clean_bytes + b.private_clean_bytes,
        private_dirty_bytes: a.private_dirty_bytes + b.private_dirty_bytes,
        anonymous_bytes: a.anonymous_bytes + b.anonymous_bytes,
        swap_bytes: a.swap_bytes + b.swap_bytes,
    }
}

fn parse_rollup(pid: u32, reader: impl BufRead) -> Result<MemoryReport, SmapsError> {
    let mut sum = MemoryReport::default();
    parse_smaps(pid, reader, |mapping| sum = sum_of(sum, mapping.memory))?;
    Ok(sum)
}

fn parse_smaps(
    pid: u32,
    reader: impl BufRead,
    mut visit: impl FnMut(&MappingReport),
) -> Result<(), SmapsError> {
    let mut current: Option<MappingReport> = None;
    for line in reader.split(b'\n') {
        let line = line.map_err(|e| OsError::new(format!("reading the memory of process {pid}"), e))?;
        // Names may hold any bytes.
        let line = String::from_utf8_lossy(&line);
        let first = line.split_whitespace().next().unwrap_or("");
        if let Some(field) = first.strip_suffix(':') {
            let bytes = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok());
            if let (Some(mapping), Some(kib)) = (current.as_mut(), bytes) {
                mapping.memory.add(field, kib.saturating_mul(1024));
            }
        } else if !line.is_empty() {
            if let Some(done) = current.take() {
                visit(&done);
            }
            let header = parse_header(&line);
            let malformed = || SmapsError::Malformed { pid, line: line.chars().take(80).collect() };
            current = Some(header.ok_or_else(malformed)?);
        }
    }
    if let Some(done) = current {
        visit(&done);
    }
    Ok(())
}

/// "7f0c-7f0d r--s 00000000 00:01 1042   /memfd:name (deleted)"
fn parse_header(line: &str) -> Option<MappingReport> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let inode = fields.nth(3)?.parse().ok()?;
    let name = fields.next().unwrap_or("").trim().to_owned();
    Some(MappingReport {
        start,
        len_bytes: end.checked_sub(start)?,
        inode,
        name,
        memory: MemoryReport::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image_backing::{ImageBacking, ImageKey, SealedMemfd};
    use crate::memfd::IMAGE_MEMFD_NAME;

    const SAMPLE: &str = "\
5581-5583 r--p 00000000 fe:00 4718 /usr/bin/with space\n\
Size:               8192 kB\nRss:                  12 kB\nPss:                   6 kB\nShared_Clean:         8 kB\n\
Shared_Dirty:         2 kB\nPrivate_Clean:        1 kB\nPrivate_Dirty:        1 kB\nAnonymous:            1 kB\n\
Swap:                 3 kB\nVmFlags: rd mr mw me\n\
7f00-7f01 rw-p 00000000 00:00 0 \nRss:                   4 kB\nPss:                   4 kB\nPrivate_Dirty:        4 kB\n\
7f02-7f03 r--s 00000000 00:01 77                         /memfd:modelbroker-image (deleted)\nRss: 40 kB\nPss: 20 kB\n";

    #[test]
    fn headers_and_figures_are_read() {
        let mut all = Vec::new();
        parse_smaps(1, SAMPLE.as_bytes(), |mapping| all.push(mapping.clone())).unwrap();
        assert_eq!(all.len(), 3);
        assert_eq!((all[0].inode, all[0].name.as_str(), all[0].len_bytes), (4718, "/usr/bin/with space", 2));
        assert_eq!(all[0].memory.pss_bytes, 6 << 10);
        assert_eq!(all[0].memory.shared_bytes, 10 << 10);
        assert_eq!(all[0].memory.private_bytes(), 2 << 10);
        assert_eq!((all[1].inode, all[1].name.as_str()), (0, ""));
        assert_eq!(all[2].name, "/memfd:modelbroker-image (deleted)");
        assert_eq!(parse_rollup(1, SAMPLE.as_bytes()).unwrap().rss_bytes, 56 << 10);
    }

    #[test]
    fn strange_lines_are_errors_not_panics() {
        for bad in ["garbage\n", "5-4 r--p 0 0:0 1 x\n", "zz-zz r 0 0 0\n"] {
            assert!(
                matches!(parse_smaps(1, bad.as_bytes(), |_| ()), Err(SmapsError::Malformed { .. })),
                "{bad}"
            );
        }
        parse_smaps(1, "Rss: 1 kB\n\n".as_bytes(), |_| ()).unwrap();
    }

    #[test]
    fn an_image_of_this_process_is_found() {
        let len_bytes = 1 << 20;
        let mut writer = SealedMemfd.reserve(&ImageKey::new("x").unwrap(), len_bytes).unwrap();
        writer.window().fill(1);
        let image = writer.publish().unwrap();
        let (first, second) = (image.map().unwrap(), image.map().unwrap());
        for mapping in [&first, &second] {
            assert_eq!(mapping.as_bytes().iter().map(|b| u64::from(*b)).sum::<u64>(), len_bytes);
        }
        let pid = std::process::id();
        let inode = nix::sys::stat::fstat(&image.fd_read_only).unwrap().st_ino;
        let (memory, count) = memory_by_inode(pid, inode).unwrap();
        assert_eq!((memory.rss_bytes, count), (2 * len_bytes, 2));
        assert_eq!(memory.pss_bytes, len_bytes, "two mappings, one copy");
        assert!(memory_by_name(pid, IMAGE_MEMFD_NAME).unwrap().0.rss_bytes >= memory.rss_bytes);
        let all = process_memory(pid).unwrap();
        assert!(all.rss_bytes >= memory.rss_bytes && all.pss_bytes > 0);
        assert!(process_memory(u32::MAX).is_err());
    }
}

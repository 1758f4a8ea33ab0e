//! Takes named files out of a zip archive that is not trusted: every entry's name is looked at before anything is
//! written, sizes and counts are bounded, only plain files are taken. Knows nothing of wheels.

use crate::cache::{FileRecord, record};
use crate::error::{SourceError, printable};
use crate::store::{CopyError, Sink};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use zip::CompressionMethod;
use zip::ZipArchive;

/// Most entries of an archive.
const MAX_ENTRIES: usize = 1024;
/// Largest central directory, in bytes: it is read into memory.
const MAX_DIRECTORY_BYTES: u32 = 1 << 20;
/// Fixed part of the end-of-directory record, and the longest comment after it, in bytes.
const END_RECORD_BYTES: usize = 22;
const MAX_COMMENT_BYTES: u64 = u16::MAX as u64;
const END_SIGNATURE: [u8; 4] = *b"PK\x05\x06";
/// The bits of a Unix mode that say what a file is, and the one value that is accepted.
const MODE_KIND: u32 = 0o170_000;
const MODE_REGULAR: u32 = 0o100_000;
const MODE_FOLDER: u32 = 0o040_000;

/// Why an archive is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ZipError {
    #[error("it is not a usable zip archive: {0}")]
    Broken(String),
    #[error("it contains an entry that is not allowed ({entry}): {reason}")]
    Entry { entry: String, reason: &'static str },
    #[error("it does not contain {0}")]
    Missing(String),
    #[error("{file} unpacks to more than {limit_bytes} bytes")]
    TooLarge { file: String, limit_bytes: u64 },
    #[error("{0}")]
    Local(#[from] SourceError),
}

/// Unpacks `prefix` + name for each of `names` to `dest`/name. All together may have at most `limit_bytes`.
pub(crate) fn extract(
    archive: &Path,
    prefix: &str,
    names: &[&str],
    dest: &Path,
    limit_bytes: u64,
    mut advance: impl FnMut(u64),
) -> Result<Vec<FileRecord>, ZipError> {
    let mut file = File::open(archive).map_err(|error| SourceError::io("open", archive, error))?;
    check_directory_size(&mut file)?;
    let broken = |error: zip::result::ZipError| ZipError::Broken(printable(&error.to_string(), 120));
    let mut zip = ZipArchive::new(file).map_err(broken)?;
    if zip.len() > MAX_ENTRIES {
        return Err(ZipError::Broken(format!("it has over {MAX_ENTRIES} entries")));
    }
    if zip.has_duplicate_names() {
        return Err(ZipError::Broken("two of its entries have one name".to_owned()));
    }
    for index in 0..zip.len() {
        let entry = zip.by_index_raw(index).map_err(broken)?;
        check_entry(entry.name_raw(), entry.unix_mode(), entry.encrypted())
            .map_err(|reason| ZipError::Entry { entry: shown(entry.name_raw()), reason })?;
    }

    let mut left_bytes = limit_bytes;
    let mut records = Vec::new();
    for name in names {
        let full = format!("{prefix}{name}");
        let Some(index) = zip.index_for_name(&full) else { return Err(ZipError::Missing(full)) };
        let mut entry = zip.by_index(index).map_err(broken)?;
        if !matches!(entry.compression(), CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(ZipError::Entry { entry: full, reason: "it is compressed in an unusual way" });
        }
        // The announced size is the archive's word; what is really unpacked is counted, and stops there.
        let announced = entry.size();
        if announced > left_bytes {
            return Err(ZipError::TooLarge { file: full, limit_bytes });
        }
        let mut sink = Sink::create(dest.join(name))?;
        match sink.copy_from(&mut entry, announced, &mut advance) {
            Ok(()) if sink.written_bytes() == announced => {}
            Ok(()) => return Err(ZipError::Broken(format!("{full} is shorter than announced"))),
            Err(CopyError::TooLong) => {
                return Err(ZipError::Broken(format!("{full} is longer than announced")));
            }
            Err(CopyError::Read(error)) => return Err(ZipError::Broken(format!("{full}: {error}"))),
            Err(CopyError::Write(error)) => return Err(error.into()),
        }
        left_bytes = left_bytes.saturating_sub(announced);
        records.push(record(name, sink)?);
    }
    Ok(records)
}

/// Looks at the end of the archive before its directory is read into memory: an archive of millions of entries is
/// refused unread. Zip64 is not needed below 65535 entries and 4 GB, so it is refused as well.
fn check_directory_size(file: &mut File) -> Result<(), ZipError> {
    let io = |error: std::io::Error| ZipError::Broken(error.to_string());
    let length = file.seek(SeekFrom::End(0)).map_err(io)?;
    let start = length.saturating_sub(END_RECORD_BYTES as u64 + MAX_COMMENT_BYTES);
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    let mut tail = Vec::new();
    file.take(END_RECORD_BYTES as u64 + MAX_COMMENT_BYTES).read_to_end(&mut tail).map_err(io)?;
    file.rewind().map_err(io)?;
    let mut found = false;
    // Every candidate must be small: which one a parser takes is then no matter.
    for window in tail.windows(END_RECORD_BYTES).filter(|window| window.starts_with(&END_SIGNATURE)) {
        let u16_at = |at: usize| window.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]));
        let entries = usize::from(u16_at(10));
        let directory_bytes = u32::from(u16_at(12)) | (u32::from(u16_at(14)) << 16);
        if entries > MAX_ENTRIES || directory_bytes > MAX_DIRECTORY_BYTES {
            return Err(ZipError::Broken(format!("it has over {MAX_ENTRIES} entries or is a zip64 archive")));
        }
        found = true;
    }
    if found { Ok(()) } else { Err(ZipError::Broken("it has no end record: it is cut or no zip".to_owned())) }
}

fn check_entry(name: &[u8], mode: Option<u32>, encrypted: bool) -> Result<(), &'static str> {
    let Ok(name) = std::str::from_utf8(name) else { return Err("its name is not UTF-8") };
    if name.is_empty() || name.starts_with('/') || name.contains(['\\', '\0', ':']) {
        return Err("its name is absolute or has foreign separators");
    }
    let path = name.strip_suffix('/').unwrap_or(name);
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err("its name leads elsewhere");
    }
    if encrypted {
        return Err("it is encrypted");
    }
    match mode.map(|mode| mode & MODE_KIND) {
        None | Some(0 | MODE_REGULAR | MODE_FOLDER) => Ok(()),
        Some(_) => Err("it is a link or device"),
    }
}

fn shown(name: &[u8]) -> String {
    printable(&String::from_utf8_lossy(name), 80)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::io::Write;
    use zip::write::SimpleFileOptions;

    pub(crate) fn archive(path: &Path, entries: &[(&str, &[u8])]) {
        let mut zip = zip::ZipWriter::new(File::create(path).unwrap());
        for (name, bytes) in entries {
            zip.start_file(
                *name,
                SimpleFileOptions::default().compression_method(CompressionMethod::Deflated),
            )
            .unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
    }

    fn take(entries: &[(&str, &[u8])], limit: u64) -> (Result<Vec<FileRecord>, ZipError>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        archive(&dir.path().join("a.zip"), entries);
        let out = dir.path().join("out");
        (extract(&dir.path().join("a.zip"), "m/", &["x"], &out, limit, |_| {}), dir)
    }

    #[test]
    fn takes_the_named_files_only() {
        let (records, dir) = take(&[("m/x", b"abc"), ("m/y", b"other"), ("z", b"")], 3);
        assert_eq!(records.unwrap().len(), 1);
        assert_eq!(std::fs::read(dir.path().join("out/x")).unwrap(), b"abc");
        assert_eq!(std::fs::read_dir(dir.path().join("out")).unwrap().count(), 1);
        assert!(matches!(take(&[("m/y", b"")], 3).0, Err(ZipError::Missing(_))));
        assert!(matches!(take(&[("m/x", b"abcd")], 3).0, Err(ZipError::TooLarge { .. })));
    }

    #[test]
    fn names_that_lead_elsewhere_refuse_the_whole_archive() {
        for name in ["../evil", "m/../../evil", "/etc/evil", "m/./e", "m//e", "a\\b", "C:e", ".."] {
            let (result, dir) = take(&[("m/x", b"abc"), (name, b"evil")], 100);
            assert!(matches!(result, Err(ZipError::Entry { .. })), "{name}: {result:?}");
            assert!(!dir.path().join("out").exists(), "nothing was written");
        }
    }

    #[test]
    fn links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.zip");
        let mut zip = zip::ZipWriter::new(File::create(&path).unwrap());
        zip.add_symlink("m/x", "/etc/passwd", SimpleFileOptions::default()).unwrap();
        zip.finish().unwrap();
        let result = extract(&path, "m/", &["x"], &dir.path().join("out"), 100, |_| {});
        assert!(
            matches!(result, Err(ZipError::Entry { reason: "it is a link or device", .. })),
            "{result:?}"
        );
    }

    #[test]
    fn too_many_entries_are_refused() {
        let names: Vec<String> = (0..=MAX_ENTRIES).map(|i| format!("f{i}")).collect();
        let entries: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        assert!(matches!(take(&entries, 100).0, Err(ZipError::Broken(_))));
    }

    #[test]
    fn a_lying_size_does_not_unpack_more() {
        // 1 MB of zeros, announced as 10 bytes in both headers.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.zip");
        archive(&path, &[("m/x", &vec![0_u8; 1 << 20])]);
        let bytes = std::fs::read(&path).unwrap();
        let patched: Vec<u8> = {
            let mut bytes = bytes;
            let real = (1_u32 << 20).to_le_bytes();
            for at in 0..bytes.len() - 4 {
                if bytes[at..at + 4] == real {
                    bytes[at..at + 4].copy_from_slice(&10_u32.to_le_bytes());
                }
            }
            bytes
        };
        std::fs::write(&path, patched).unwrap();
        let result = extract(&path, "m/", &["x"], &dir.path().join("out"), 1 << 30, |_| {});
        assert!(matches!(result, Err(ZipError::Broken(_))), "{result:?}");
        assert!(std::fs::metadata(dir.path().join("out/x")).unwrap().len() <= 10);
    }

    #[test]
    fn cut_archives_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.zip");
        archive(&path, &[("m/x", b"some text, some more text, some text")]);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let out = dir.path().join(format!("out{cut}"));
            assert!(extract(&path, "m/", &["x"], &out, 1000, |_| {}).is_err(), "{cut}");
        }
    }
}

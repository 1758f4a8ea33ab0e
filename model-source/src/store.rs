//! Writing of one file: hashed on the way, limited, synced. Knows nothing of where the bytes come from.

use crate::error::SourceError;
use sha2::{Digest, Sha256};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Bytes moved at a time.
const CHUNK_BYTES: usize = 256 << 10;

/// A file being written, with the digest of what was written so far.
pub(crate) struct Sink {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    written_bytes: u64,
}

/// How [`Sink::copy_from`] failed.
pub(crate) enum CopyError {
    /// The source failed or ended early.
    Read(io::Error),
    /// The source gave more than the limit.
    TooLong,
    /// Our disk failed.
    Write(SourceError),
}

impl Sink {
    /// Creates a file that must not exist yet, and the folders above it.
    pub(crate) fn create(path: PathBuf) -> Result<Sink, SourceError> {
        if let Some(parent) = path.parent() {
            create_dirs(parent)?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|error| SourceError::io("create", &path, error))?;
        Ok(Sink { file, path, hasher: Sha256::new(), written_bytes: 0 })
    }

    pub(crate) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// Copies until the source ends, or until the file would grow past `limit_bytes` in all.
    pub(crate) fn copy_from(
        &mut self,
        source: &mut dyn Read,
        limit_bytes: u64,
        mut advance: impl FnMut(u64),
    ) -> Result<(), CopyError> {
        let mut chunk = vec![0_u8; CHUNK_BYTES];
        loop {
            let count = match source.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(CopyError::Read(error)),
            };
            let total = self.written_bytes.saturating_add(count as u64);
            if total > limit_bytes {
                return Err(CopyError::TooLong);
            }
            let bytes = chunk.get(..count).unwrap_or_default();
            self.file
                .write_all(bytes)
                .map_err(|error| CopyError::Write(SourceError::io("write", &self.path, error)))?;
            self.hasher.update(bytes);
            self.written_bytes = total;
            advance(count as u64);
        }
    }

    /// Throws away what was written so far.
    pub(crate) fn restart(&mut self) -> Result<(), SourceError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|error| SourceError::io("truncate", &self.path, error))?;
        self.hasher = Sha256::new();
        self.written_bytes = 0;
        Ok(())
    }

    /// Syncs the file and gives its SHA-256 in hex. A failed sync is final: the caller drops the file.
    pub(crate) fn finish(self) -> Result<String, SourceError> {
        self.file.sync_all().map_err(|error| SourceError::io("sync", &self.path, error))?;
        Ok(hex(&self.hasher.finalize()))
    }
}

/// SHA-256 of all that `source` gives, in hex.
pub(crate) fn sha256_of(source: &mut dyn Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut chunk = vec![0_u8; CHUNK_BYTES];
    loop {
        match source.read(&mut chunk) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(count) => hasher.update(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether `text` is a SHA-256 in lower-case hex.
pub(crate) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Creates a folder and those above it, ours alone (mode 0700).
pub(crate) fn create_dirs(path: &Path) -> Result<(), SourceError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| SourceError::io("create", path, error))
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_dir(path: &Path) -> Result<(), SourceError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| SourceError::io("sync", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_limits_and_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file");
        let mut sink = Sink::create(path.clone()).unwrap();
        let mut seen = 0;
        assert!(sink.copy_from(&mut &b"junk"[..], 4, |n| seen += n).is_ok());
        assert!(matches!(sink.copy_from(&mut &b"x"[..], 4, |_| {}), Err(CopyError::TooLong)));
        sink.restart().unwrap();
        assert!(
            sink.copy_from(&mut &b"ab"[..], 3, |_| {}).is_ok()
                && sink.copy_from(&mut &b"c"[..], 3, |_| {}).is_ok()
        );
        assert_eq!((seen, sink.written_bytes()), (4, 3));
        let digest = sink.finish().unwrap();
        assert_eq!(digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(sha256_of(&mut &b"abc"[..]).unwrap(), digest);
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
        assert!(Sink::create(path).is_err(), "never overwrites");
    }

    #[test]
    fn a_full_disk_has_its_own_error() {
        let file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut sink = Sink { file, path: "/dev/full".into(), hasher: Sha256::new(), written_bytes: 0 };
        let result = sink.copy_from(&mut &b"abc"[..], 3, |_| {});
        assert!(matches!(result, Err(CopyError::Write(SourceError::DiskFull { .. }))));
    }
}

//! Our own cache of downloaded models: its layout on disk, its lock, and how a model gets in whole or not at all.
//!
//! ```text
//! <cache>/models/<org>--<name>/lock                       flock: one process at a time fetches this model
//! <cache>/models/<org>--<name>/refs/<revision>            name of a snapshot; `main` where no revision was asked for
//! <cache>/models/<org>--<name>/snapshots/<snapshot>/      a whole model: commit hash, or `wheel-<version>`
//! <cache>/models/<org>--<name>/snapshots/<snapshot>/modelbroker-source.json   where it is from, sizes, SHA-256
//! <cache>/models/<org>--<name>/tmp-*/                     being fetched; whoever gets the lock removes old ones
//! ```
//!
//! A snapshot appears by rename after all of it was synced, so what lies in `snapshots/` was whole once; sizes and
//! headers are looked at again on each use, and a snapshot that was damaged since counts as not there.

use crate::error::{Attempt, Outcome, Place, SourceError};
use crate::folder;
use crate::layout::check_file_name;
use crate::reference::{RepoId, Revision};
use crate::store::{Sink, create_dirs, sync_dir};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MANIFEST: &str = "modelbroker-source.json";
const MANIFEST_VERSION: u32 = 1;
const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const MAX_REF_BYTES: u64 = 256;
const STAGING_PREFIX: &str = "tmp-";
/// How often the lock of another process is asked for.
const LOCK_POLL: Duration = Duration::from_millis(50);

/// One file of a snapshot, as it was when fetched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    pub(crate) name: String,
    pub(crate) size_bytes: u64,
    pub(crate) sha256: String,
}

/// What is known of a snapshot's origin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Manifest {
    version: u32,
    /// `org/name`.
    id: String,
    /// URL or package that it came from.
    pub(crate) from: String,
    /// Commit on the hub; none for a wheel.
    pub(crate) revision: Option<String>,
    files: Vec<FileRecord>,
}

impl Manifest {
    pub(crate) fn new(
        repo: &RepoId,
        from: String,
        revision: Option<String>,
        files: Vec<FileRecord>,
    ) -> Manifest {
        Manifest { version: MANIFEST_VERSION, id: repo.to_string(), from, revision, files }
    }
}

/// The cache's folder of one model.
pub(crate) struct ModelCache {
    dir: PathBuf,
    repo: RepoId,
}

impl ModelCache {
    pub(crate) fn new(cache_dir: &Path, repo: &RepoId) -> ModelCache {
        ModelCache { dir: cache_dir.join("models").join(repo.folder_name()), repo: repo.clone() }
    }

    /// Finds a whole snapshot of that revision.
    pub(crate) fn find(&self, revision: Option<&Revision>) -> Result<(PathBuf, Manifest), Attempt> {
        let attempt = |outcome, why: String| Attempt {
            place: Place::OwnCache,
            location: self.dir.display().to_string(),
            outcome,
            why,
        };
        let ref_path = self.dir.join("refs").join(ref_name(revision));
        let snapshot = match read_small(&ref_path, MAX_REF_BYTES) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => match revision.filter(|r| r.is_commit())
            {
                Some(commit) => commit.as_str().to_owned(),
                None => return Err(attempt(Outcome::Absent, "not there".to_owned())),
            },
            Err(error) => return Err(attempt(Outcome::Unusable, format!("{}: {error}", ref_path.display()))),
        };
        if check_file_name(&snapshot).is_err() || snapshot.contains('/') {
            return Err(attempt(Outcome::Unusable, format!("{} is damaged", ref_path.display())));
        }
        let folder = self.dir.join("snapshots").join(snapshot);
        if !folder.is_dir() {
            return Err(attempt(Outcome::Absent, "not there".to_owned()));
        }
        self.check_snapshot(&folder).map(|manifest| (folder, manifest)).map_err(|why| {
            attempt(
                Outcome::Unusable,
                format!("its copy is damaged and is fetched again when possible: {why}"),
            )
        })
    }

    fn check_snapshot(&self, folder: &Path) -> Result<Manifest, String> {
        let bytes = read_small(&folder.join(MANIFEST), MAX_MANIFEST_BYTES)
            .map_err(|error| format!("{MANIFEST}: {error}"))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| format!("{MANIFEST}: {error}"))?;
        if manifest.version != MANIFEST_VERSION || manifest.id != self.repo.as_str() {
            return Err(format!("{MANIFEST} is of another version or model"));
        }
        for file in &manifest.files {
            check_file_name(&file.name).map_err(|reason| format!("{MANIFEST}: a file name {reason}"))?;
            match fs::symlink_metadata(folder.join(&file.name)) {
                Ok(metadata) if metadata.is_file() && metadata.len() == file.size_bytes => {}
                Ok(_) => return Err(format!("{} has changed", file.name)),
                Err(error) => return Err(format!("{}: {error}", file.name)),
            }
        }
        let root = folder.canonicalize().map_err(|error| error.to_string())?;
        folder::check(folder, Some(&root), false).map_err(|problem| problem.to_string())?;
        Ok(manifest)
    }

    /// Takes the model's lock, waiting for another process that has it. `on_wait` is called once before the wait.
    pub(crate) fn lock(
        &self,
        wait: Duration,
        on_wait: impl FnOnce(),
    ) -> Result<LockedCache<'_>, SourceError> {
        create_dirs(&self.dir)?;
        let path = self.dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| SourceError::io("open", &path, error))?;
        let began = Instant::now();
        let mut on_wait = Some(on_wait);
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if began.elapsed() < wait => {
                    if let Some(on_wait) = on_wait.take() {
                        on_wait();
                    }
                    std::thread::sleep(LOCK_POLL);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(SourceError::LockTimeout { path, waited_s: wait.as_secs() });
                }
                Err(TryLockError::Error(error)) => return Err(SourceError::io("lock", &path, error)),
            }
        }
        let locked = LockedCache { cache: self, _lock: file };
        locked.remove_leftovers();
        Ok(locked)
    }
}

/// The right to add snapshots of one model. The lock ends with this value, or with the process however it ends.
pub(crate) struct LockedCache<'a> {
    cache: &'a ModelCache,
    _lock: File,
}

impl LockedCache<'_> {
    /// Removes what killed processes left behind: with the lock held, nobody is working in it. What can't be removed
    /// stays; it is never looked into.
    fn remove_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.cache.dir) else { return };
        for entry in entries.flatten() {
            if entry.file_name().to_string_lossy().starts_with(STAGING_PREFIX)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "cannot remove an unfinished download");
            }
        }
    }

    /// A fresh folder to work in, removed with all that is in it unless it is committed.
    pub(crate) fn staging(&self) -> Result<TempDir, SourceError> {
        tempfile::Builder::new()
            .prefix(STAGING_PREFIX)
            .tempdir_in(&self.cache.dir)
            .map_err(|error| SourceError::io("create a folder in", &self.cache.dir, error))
    }

    /// Makes the folder `model` (inside a staging folder, its files synced) the snapshot `snapshot`, to be found under
    /// `revision` and under its own name. A damaged snapshot of that name is replaced.
    pub(crate) fn commit(
        &self,
        model: &Path,
        snapshot: &str,
        revision: Option<&Revision>,
        manifest: &Manifest,
    ) -> Result<PathBuf, SourceError> {
        let mut text = serde_json::to_vec_pretty(manifest)
            .map_err(|error| SourceError::io("write", model, io::Error::other(error)))?;
        text.push(b'\n');
        write_synced(model.join(MANIFEST), &text)?;
        for file in &manifest.files {
            if let Some(parent) = model.join(&file.name).parent() {
                sync_dir(parent)?;
            }
        }
        let snapshots = self.cache.dir.join("snapshots");
        create_dirs(&snapshots)?;
        let target = snapshots.join(snapshot);
        if target.exists() {
            let aside = self.staging()?;
            let old = aside.path().join("old");
            fs::rename(&target, &old).map_err(|error| SourceError::io("replace", &target, error))?;
        }
        fs::rename(model, &target).map_err(|error| SourceError::io("create", &target, error))?;
        sync_dir(&snapshots)?;
        self.write_ref(&ref_name(revision), snapshot)?;
        Ok(target)
    }

    fn write_ref(&self, name: &str, snapshot: &str) -> Result<(), SourceError> {
        let refs = self.cache.dir.join("refs");
        create_dirs(&refs)?;
        let staging = self.staging()?;
        let fresh = staging.path().join("ref");
        write_synced(fresh.clone(), format!("{snapshot}\n").as_bytes())?;
        let target = refs.join(name);
        fs::rename(&fresh, &target).map_err(|error| SourceError::io("create", &target, error))?;
        sync_dir(&refs)?;
        sync_dir(&self.cache.dir)
    }
}

fn ref_name(revision: Option<&Revision>) -> String {
    revision.map_or_else(|| "main".to_owned(), Revision::segment)
}

fn write_synced(path: PathBuf, bytes: &[u8]) -> Result<(), SourceError> {
    let written = File::create_new(&path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(|error| SourceError::io("write", &path, error))
}

fn read_small(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(io::Error::other(format!("longer than {limit_bytes} bytes")));
    }
    Ok(bytes)
}

/// A file record for what a [`Sink`] wrote.
pub(crate) fn record(name: &str, sink: Sink) -> Result<FileRecord, SourceError> {
    let size_bytes = sink.written_bytes();
    Ok(FileRecord { name: name.to_owned(), size_bytes, sha256: sink.finish()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::folder::tests::safetensors;

    fn fill(cache: &LockedCache<'_>, revision: Option<&Revision>, snapshot: &str) -> PathBuf {
        let staging = cache.staging().unwrap();
        let model = staging.path().join("model");
        let mut files = Vec::new();
        for (name, bytes) in [
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("model.safetensors", safetensors(b"w")),
        ] {
            let mut sink = Sink::create(model.join(name)).unwrap();
            assert!(sink.copy_from(&mut &bytes[..], 1000, |_| {}).is_ok());
            files.push(record(name, sink).unwrap());
        }
        let manifest = Manifest::new(&cache.cache.repo, "test".into(), None, files);
        cache.commit(&model, snapshot, revision, &manifest).unwrap()
    }

    #[test]
    fn only_committed_and_undamaged_snapshots_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ModelCache::new(dir.path(), &RepoId::new("org/name").unwrap());
        let outcome = |revision: Option<&Revision>| cache.find(revision).map_err(|attempt| attempt.outcome);
        assert_eq!(outcome(None).unwrap_err(), Outcome::Absent);
        let locked = cache.lock(Duration::ZERO, || {}).unwrap();
        let folder = fill(&locked, None, "s1");
        assert_eq!(outcome(None).unwrap().0, folder);
        let commit = "0123456789012345678901234567890123456789";
        let (branch, by_hash) = (Revision::new("refs/pr/1").unwrap(), Revision::new(commit).unwrap());
        assert_eq!(outcome(Some(&branch)).unwrap_err(), Outcome::Absent);
        fill(&locked, Some(&branch), commit);
        assert!(outcome(Some(&branch)).is_ok() && outcome(Some(&by_hash)).is_ok());

        for damage in ["config.json", "model.safetensors", MANIFEST] {
            fs::write(folder.join(damage), b"other").unwrap();
            assert_eq!(outcome(None).unwrap_err(), Outcome::Unusable, "{damage}");
            fill(&locked, None, "s1");
            assert!(outcome(None).is_ok(), "replaced");
        }
        fs::remove_file(folder.join("tokenizer.json")).unwrap();
        assert_eq!(outcome(None).unwrap_err(), Outcome::Unusable);
        fs::write(dir.path().join("models/org--name/refs/main"), "../../x").unwrap();
        assert_eq!(outcome(None).unwrap_err(), Outcome::Unusable);
        let left: Vec<_> = fs::read_dir(dir.path().join("models/org--name")).unwrap().collect();
        assert_eq!(left.len(), 3, "lock, refs, snapshots and nothing else: {left:?}");
    }

    #[test]
    fn the_lock_excludes_and_its_next_holder_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let cache = ModelCache::new(dir.path(), &RepoId::new("org/name").unwrap());
        let first = cache.lock(Duration::ZERO, || {}).unwrap();
        let kept = first.staging().unwrap().keep();
        let second = cache.lock(Duration::ZERO, || {}).map(|_| ());
        assert!(matches!(second, Err(SourceError::LockTimeout { .. })));
        drop(first);
        cache.lock(Duration::ZERO, || {}).unwrap();
        assert!(!kept.exists());
    }
}

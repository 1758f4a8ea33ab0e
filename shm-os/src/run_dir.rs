//! Private folders and lock files: where a user's sockets and caches may lie, and which process owns them. What is
//! put into the folders must not be known here.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::{OsError, fork_generation};

/// Name of the folder inside `$XDG_RUNTIME_DIR`.
pub const RUN_DIR_NAME: &str = "modelbroker";
/// How often taking a lock is tried again when its file was replaced meanwhile.
const LOCK_TRIES: u32 = 100;

/// Why a folder or lock file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The path is a symbolic link.
    #[error("{} is a symbolic link: remove it, or name the real folder", path.display())]
    Symlink {
        /// The path.
        path: PathBuf,
    },
    /// The path is a file or something else.
    #[error("{} is not a folder: remove it or choose another place", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// The folder belongs to another user.
    #[error("{} belongs to user {owner}, not to this user ({us}): choose another place", path.display())]
    WrongOwner {
        /// The path.
        path: PathBuf,
        /// The owner's uid.
        owner: u32,
        /// This process's effective uid.
        us: u32,
    },
    /// Others may enter or write the folder.
    #[error("{} has mode {mode:04o}, others may enter it: run `chmod 700 {}`", path.display(), path.display())]
    WrongMode {
        /// The path.
        path: PathBuf,
        /// The permission bits found.
        mode: u32,
    },
    /// The lock file was replaced again and again.
    #[error("the lock file {} keeps being replaced by another program: stop that program", path.display())]
    LockUnstable {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// The folder for this user's socket and lock: `$XDG_RUNTIME_DIR/modelbroker`, or `/tmp/modelbroker-<uid>` where that
/// variable names no usable folder. Nothing is created.
pub fn default_run_dir() -> PathBuf {
    let uid = effective_uid();
    let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let usable = |path: &PathBuf| match path.is_absolute().then(|| check_private_dir(path)) {
        Some(Ok(())) => true,
        reason => {
            tracing::debug!(?reason, "XDG_RUNTIME_DIR is not usable, taking a folder in /tmp");
            false
        }
    };
    match base.filter(usable) {
        Some(base) => base.join(RUN_DIR_NAME),
        None => PathBuf::from(format!("/tmp/{RUN_DIR_NAME}-{uid}")),
    }
}

/// Makes `path` a folder that only this user can enter (mode 0700, parents by default modes), or checks that it is
/// one already.
pub fn ensure_private_dir(path: &Path) -> Result<(), RunDirError> {
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent)
            .map_err(|e| OsError::new(format!("creating {}", parent.display()), e))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(OsError::new(format!("creating {}", path.display()), e).into()),
    }
    check_private_dir(path)
}

/// Checks that `path` is a folder, no symbolic link, of this user, that nobody else can enter.
pub fn check_private_dir(path: &Path) -> Result<(), RunDirError> {
    let meta = std::fs::symlink_metadata(path)
        .map_err(|e| OsError::new(format!("reading {}", path.display()), e))?;
    check_private_dir_metadata(path, &meta)
}

/// Opens a private folder and checks what was opened, so that nothing can be swapped in between.
pub(crate) fn open_private_dir(path: &Path) -> Result<File, RunDirError> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC)
        .open(path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ELOOP) => RunDirError::Symlink { path: path.into() },
            // O_NOFOLLOW with O_DIRECTORY reports a symbolic link as "not a directory" too.
            Some(libc::ENOTDIR) if path.is_symlink() => RunDirError::Symlink { path: path.into() },
            Some(libc::ENOTDIR) => RunDirError::NotAFolder { path: path.into() },
            _ => OsError::new(format!("opening {}", path.display()), e).into(),
        })?;
    let meta = opened.metadata().map_err(|e| OsError::new(format!("reading {}", path.display()), e))?;
    check_private_dir_metadata(path, &meta)?;
    Ok(opened)
}

fn check_private_dir_metadata(path: &Path, meta: &std::fs::Metadata) -> Result<(), RunDirError> {
    let path = || path.to_path_buf();
    if meta.file_type().is_symlink() {
        return Err(RunDirError::Symlink { path: path() });
    }
    if !meta.is_dir() {
        return Err(RunDirError::NotAFolder { path: path() });
    }
    let (owner, us) = (meta.uid(), effective_uid());
    if owner != us {
        return Err(RunDirError::WrongOwner { path: path(), owner, us });
    }
    let mode = meta.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(RunDirError::WrongMode { path: path(), mode });
    }
    Ok(())
}

/// This process's effective user id.
pub fn effective_uid() -> u32 {
    nix::unistd::geteuid().as_raw()
}

/// An exclusive lock held for as long as the value lives and the process with it: the truth about who owns a run
/// folder. The file holds the owner's pid, as information only. Dropping removes the file and then the lock.
#[derive(Debug)]
pub struct LockFile {
    file: File,
    path: PathBuf,
    fork_generation: u64,
}

impl LockFile {
    /// Takes the lock at `path` (created with mode 0600); `None` when another process, or another `LockFile` of this
    /// one, holds it. Never waits.
    pub fn try_lock(path: &Path) -> Result<Option<LockFile>, RunDirError> {
        for _ in 0..LOCK_TRIES {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(path)
                .map_err(|e| OsError::new(format!("opening the lock file {}", path.display()), e))?;
            if !flock_exclusive(&file)? {
                return Ok(None);
            }
            // The owner before us removes the file as it leaves: the lock counts only on the file that is there.
            if !is_at(&file, path) {
                continue;
            }
            let write_pid = |mut file: &File| {
                file.set_len(0)?;
                writeln!(file, "{}", std::process::id())
            };
            // Information only: a full disk must not keep the broker from starting.
            if let Err(error) = write_pid(&file) {
                tracing::warn!(%error, "the lock file could not be filled with the process id");
            }
            return Ok(Some(LockFile { file, path: path.into(), fork_generation: fork_generation() }));
        }
        Err(RunDirError::LockUnstable { path: path.into() })
    }

    /// The pid written in a lock file, for messages; it says nothing about whether that process lives.
    pub fn holder_pid(path: &Path) -> Option<u32> {
        let mut text = String::new();
        File::open(path).ok()?.take(16).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    /// Where the lock file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // A forked child drops a copy: file and lock are the parent's.
        if self.fork_generation == fork_generation() && is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Takes an exclusive `flock` without waiting; `false` when somebody else holds it.
pub(crate) fn flock_exclusive(file: impl AsFd) -> Result<bool, OsError> {
    // SAFETY: flock only reads the descriptor number, which is open for the duration of the call.
    if unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = OsError::last("locking a file (flock)");
    if error.errno() == Some(libc::EWOULDBLOCK) { Ok(false) } else { Err(error) }
}

/// Whether `path` leads to the very file that is open.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_private_dir_is_made_and_checked() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("a/b");
        ensure_private_dir(&dir).unwrap();
        ensure_private_dir(&dir).unwrap();
        assert_eq!(dir.metadata().unwrap().mode() & 0o777, 0o700);
        open_private_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o750)).unwrap();
        let error = ensure_private_dir(&dir).unwrap_err();
        assert!(matches!(error, RunDirError::WrongMode { mode: 0o750, .. }));
        assert!(error.to_string().contains("chmod 700"), "{error}");
        assert!(matches!(open_private_dir(&dir), Err(RunDirError::WrongMode { .. })));
    }

    #[test]
    fn links_and_files_are_no_private_dirs() {
        let temp = tempfile::tempdir().unwrap();
        let (real, link, file) =
            (temp.path().join("real"), temp.path().join("link"), temp.path().join("file"));
        ensure_private_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        std::fs::write(&file, "").unwrap();
        for check in [ensure_private_dir, |p: &Path| open_private_dir(p).map(drop)] {
            assert!(matches!(check(&link), Err(RunDirError::Symlink { .. })));
            assert!(matches!(check(&file), Err(RunDirError::NotAFolder { .. })));
        }
    }

    #[test]
    fn one_lock_at_a_time_and_nothing_left_behind() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let lock = LockFile::try_lock(&path).unwrap().unwrap();
        assert!(LockFile::try_lock(&path).unwrap().is_none());
        assert_eq!(LockFile::holder_pid(&path), Some(std::process::id()));
        drop(lock);
        assert!(!path.exists());
        drop(LockFile::try_lock(&path).unwrap().unwrap());
    }

    #[test]
    fn a_stale_lock_file_is_taken_over() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        std::fs::write(&path, "4000000\nlong leftover").unwrap();
        let _lock = LockFile::try_lock(&path).unwrap().unwrap();
        assert_eq!(LockFile::holder_pid(&path), Some(std::process::id()));
    }

    #[test]
    fn a_lock_on_a_removed_file_does_not_count() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let old = LockFile::try_lock(&path).unwrap().unwrap();
        std::fs::remove_file(&path).unwrap();
        let new = LockFile::try_lock(&path).unwrap().unwrap();
        drop(old);
        assert!(path.exists(), "only its own file is removed");
        drop(new);
    }

    #[test]
    fn racing_for_the_lock_has_one_winner_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let holders = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        if let Some(lock) = LockFile::try_lock(&path).unwrap() {
                            assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                            holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                            drop(lock);
                        }
                    }
                });
            }
        });
    }
}

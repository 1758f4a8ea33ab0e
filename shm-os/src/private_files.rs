//! Files in a folder that only this user can enter, each replaced as a whole or not at all. What lies in them must not be
//! known here.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::OsError;
use crate::run_dir::{self, RunDirError, effective_uid, flock_exclusive, is_at};

/// What temporary files' names begin with.
const TEMPORARY_PREFIX: &str = ".tmp-";
/// How often a temporary file is made anew when its name was taken or swept by another process.
const NAMING_TRIES: u32 = 16;
/// O_NONBLOCK: opening a FIFO that somebody put there must not hang.
const BASE_FLAGS: OFlag =
    OFlag::O_CLOEXEC.union(OFlag::O_NOFOLLOW).union(OFlag::O_NONBLOCK).union(OFlag::O_NOCTTY);

/// Why a file cannot be read or replaced.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The folder is not private to this user.
    #[error(transparent)]
    Folder(#[from] RunDirError),
    /// Something else than a regular file lies there, or a file that others own, read or write.
    #[error("{} is not a file of this user's alone: remove it", path.display())]
    NotPrivate {
        /// The path.
        path: PathBuf,
    },
    /// Temporary names were taken again and again.
    #[error("no temporary file can be made in {}: remove what begins with `{TEMPORARY_PREFIX}` there", path.display())]
    NoTemporaryName {
        /// The folder.
        path: PathBuf,
    },
    /// A system call failed.
    #[error(transparent)]
    Os(#[from] OsError),
}

/// A folder with mode 0700 of files with mode 0600. All is done through its descriptor, so that nobody can put another
/// folder in its place meanwhile.
#[derive(Debug)]
pub struct PrivateFolder {
    folder: File,
    path: PathBuf,
}

impl PrivateFolder {
    /// Opens the folder, making it if needed, and removes what killed processes left unfinished in it.
    ///
    /// # Errors
    /// [`PrivateFileError`] when it cannot be made, or others can enter it.
    pub fn open(path: &Path) -> Result<PrivateFolder, PrivateFileError> {
        run_dir::ensure_private_dir(path)?;
        let opened = PrivateFolder { folder: run_dir::open_private_dir(path)?, path: path.into() };
        opened.sweep();
        Ok(opened)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes temporary files whose writer is gone: a living writer holds a lock on its file. Best effort.
    fn sweep(&self) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        for name in entries.flatten().map(|entry| entry.file_name()) {
            if !name.to_string_lossy().starts_with(TEMPORARY_PREFIX) {
                continue;
            }
            let opened = openat(&self.folder, name.as_os_str(), OFlag::O_RDONLY | BASE_FLAGS, Mode::empty());
            if opened.is_ok_and(|file| flock_exclusive(&file).unwrap_or(false)) {
                let _ = unlinkat(&self.folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }

    /// Removes the files whose names end in `ending` but for the `most` that were changed last. Best effort.
    pub fn keep_newest(&self, ending: &str, most: usize) {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return };
        let named = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().ends_with(ending));
        let mut files: Vec<_> = named
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.file_name())))
            .collect();
        files.sort_unstable_by(|a, b| b.cmp(a));
        for (_, name) in files.iter().skip(most) {
            let _ = unlinkat(&self.folder, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }

    /// Opens a file for reading; `None` when there is none. Links are not followed.
    ///
    /// # Errors
    /// [`PrivateFileError::NotPrivate`] for what is no file, belongs to another user, or can be read or written by others.
    pub fn read(&self, name: &str) -> Result<Option<File>, PrivateFileError> {
        let path = || self.path.join(name);
        let file = match openat(&self.folder, name, OFlag::O_RDONLY | BASE_FLAGS, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP | Errno::ENXIO) => return Err(PrivateFileError::NotPrivate { path: path() }),
            Err(e) => return Err(OsError::new(format!("opening {}", path().display()), e).into()),
        };
        let meta = file.metadata().map_err(|e| OsError::new(format!("reading {}", path().display()), e))?;
        if !meta.is_file() || meta.uid() != effective_uid() || meta.mode() & 0o077 != 0 {
            return Err(PrivateFileError::NotPrivate { path: path() });
        }
        Ok(Some(file))
    }

    /// Removes a file; none being there is no error.
    ///
    /// # Errors
    /// [`PrivateFileError::Os`].
    pub fn remove(&self, name: &str) -> Result<(), PrivateFileError> {
        match unlinkat(&self.folder, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(OsError::new(format!("removing {}", self.path.join(name).display()), e).into()),
        }
    }

    /// Has a file written under a temporary name and then puts it in the place of `name`: content to the disk, then the
    /// name, then the folder, so that a power cut leaves the old file, the new one, or none.
    ///
    /// # Errors
    /// [`PrivateFileError`], also when `write` fails; nothing is left then, and what was there before stays. After a failed
    /// `fsync` it is unknown what reached the disk: do not try again.
    pub fn replace(
        &self,
        name: &str,
        write: impl FnOnce(&mut File) -> io::Result<()>,
    ) -> Result<(), PrivateFileError> {
        let mut unfinished = self.begin()?;
        let path = self.path.join(name);
        let failed = |error: io::Error| OsError::new(format!("writing {}", path.display()), error);
        write(&mut unfinished.file).map_err(failed)?;
        unfinished.file.sync_all().map_err(failed)?;
        renameat(&self.folder, unfinished.name.as_str(), &self.folder, name)
            .map_err(|e| OsError::new(format!("naming {}", path.display()), e))?;
        unfinished.is_named = true;
        self.folder.sync_all().map_err(failed)?;
        Ok(())
    }

    fn begin(&self) -> Result<Unfinished<'_>, PrivateFileError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        for _ in 0..NAMING_TRIES {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{TEMPORARY_PREFIX}{}-{count}", std::process::id());
            let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | BASE_FLAGS;
            let file = match openat(&self.folder, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
                Ok(fd) => File::from(fd),
                Err(Errno::EEXIST) => continue,
                Err(e) => {
                    return Err(OsError::new(format!("making a file in {}", self.path.display()), e).into());
                }
            };
            let unfinished = Unfinished { folder: &self.folder, name, file, is_named: false };
            // Held until the end: tells sweepers that its writer lives. One may have come before the lock.
            if flock_exclusive(&unfinished.file)?
                && is_at(&unfinished.file, &self.path.join(&unfinished.name))
            {
                return Ok(unfinished);
            }
        }
        Err(PrivateFileError::NoTemporaryName { path: self.path.clone() })
    }
}

/// A file under a temporary name; removed when dropped without its real one.
#[derive(Debug)]
struct Unfinished<'a> {
    folder: &'a File,
    name: String,
    file: File,
    is_named: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.is_named {
            let _ = unlinkat(self.folder, self.name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn folder() -> (tempfile::TempDir, PrivateFolder) {
        let temp = tempfile::tempdir().unwrap();
        let folder = PrivateFolder::open(&temp.path().join("files")).unwrap();
        (temp, folder)
    }

    fn names(folder: &PrivateFolder) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn text(folder: &PrivateFolder, name: &str) -> String {
        let mut text = String::new();
        folder.read(name).unwrap().unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let (_temp, folder) = folder();
        assert!(folder.read("a").unwrap().is_none());
        for content in ["first", "second"] {
            folder.replace("a", |file| file.write_all(content.as_bytes())).unwrap();
            assert_eq!((text(&folder, "a").as_str(), names(&folder)), (content, vec!["a".to_owned()]));
        }
        assert_eq!(folder.path().join("a").metadata().unwrap().mode() & 0o777, 0o600);
        folder.remove("a").unwrap();
        folder.remove("a").unwrap();
        assert!(names(&folder).is_empty());
    }

    #[test]
    fn a_failure_leaves_what_was_there_and_nothing_else() {
        let (_temp, folder) = folder();
        folder.replace("a", |file| file.write_all(b"old")).unwrap();
        let full = folder.replace("a", |file| {
            file.write_all(b"new")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(full.unwrap_err().to_string().contains("writing"));
        // A folder under the name: the last step fails.
        std::fs::create_dir(folder.path().join("b")).unwrap();
        assert!(folder.replace("b", |file| file.write_all(b"new")).is_err());
        assert_eq!(
            (text(&folder, "a").as_str(), names(&folder)),
            ("old", vec!["a".to_owned(), "b".to_owned()])
        );
    }

    #[test]
    fn what_others_could_have_written_is_not_read() {
        let (_temp, folder) = folder();
        folder.replace("a", |file| file.write_all(b"x")).unwrap();
        symlink(folder.path().join("a"), folder.path().join("link")).unwrap();
        std::fs::create_dir(folder.path().join("folder")).unwrap();
        nix::unistd::mkfifo(&folder.path().join("fifo"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        for name in ["link", "folder", "fifo"] {
            assert!(matches!(folder.read(name), Err(PrivateFileError::NotPrivate { .. })), "{name}");
        }
        for mode in [0o620, 0o602, 0o640] {
            std::fs::set_permissions(folder.path().join("a"), std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(matches!(folder.read("a"), Err(PrivateFileError::NotPrivate { .. })), "{mode:o}");
        }
        // A link is replaced, not written through.
        folder.replace("link", |file| file.write_all(b"y")).unwrap();
        assert_eq!(text(&folder, "link"), "y");
        assert_eq!(std::fs::read(folder.path().join("a")).unwrap(), b"x");
    }

    #[test]
    fn leftovers_are_swept_and_old_files_too() {
        let (_temp, folder) = folder();
        std::fs::write(folder.path().join(".tmp-1-1"), "left by a killed process").unwrap();
        folder
            .replace("new.x", |_| {
                let before = names(&folder);
                drop(PrivateFolder::open(folder.path()).unwrap());
                let swept: Vec<_> = before.iter().filter(|name| !names(&folder).contains(name)).collect();
                assert_eq!(swept, [".tmp-1-1"], "the living writer's file stays");
                Ok(())
            })
            .unwrap();
        let old = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
        for name in ["old.x", "old.y"] {
            folder.replace(name, |file| file.set_modified(old)).unwrap();
        }
        folder.keep_newest(".x", 1);
        assert_eq!(names(&folder), ["new.x", "old.y"]);
    }
}

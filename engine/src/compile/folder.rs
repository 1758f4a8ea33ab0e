//! Opening files of a model folder safely: regular files only, nothing outside the folder, and proof that they did not change.
//!
//! A model folder comes from strangers. Its names may be symbolic links to anything the user can read, FIFOs that block, or
//! devices without end. Every path component is opened with `O_NOFOLLOW`, so a link is never followed by accident. Links
//! are normal in one place: a Hugging Face cache keeps a snapshot as links into `blobs` beside it. So when a component is a
//! link, the path is resolved, and the result is opened, again link by link, beneath the folder itself, the `blobs` folder of
//! its own snapshot layout, or a folder that the caller allowed. A link anywhere else is an error that names it.

use super::error::CompileError;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

/// Longest path of a file inside a model folder, bytes.
const MAX_PATH_BYTES: usize = 256;
/// Most entries of a folder that are looked through for a file of a kind.
const MAX_FOLDER_ENTRIES: usize = 10_000;

/// What identifies one state of a file; any change of it while reading means the bytes can't be trusted to belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    len_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            len_bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// A regular file of the folder, open for reading.
#[derive(Debug)]
pub(crate) struct SourceFile {
    file: File,
    name: String,
    stamp: Stamp,
}

impl SourceFile {
    /// Length in bytes when it was opened.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.stamp.len_bytes
    }

    /// Name relative to the folder.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Fills `out` from `offset`. A file that became shorter is a file that changed.
    pub(crate) fn read_at(&self, out: &mut [u8], offset: u64) -> Result<(), CompileError> {
        self.file.read_exact_at(out, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => CompileError::Changed { name: self.name.clone() },
            _ => CompileError::Read { name: self.name.clone(), source },
        })
    }

    /// Fails when the open file is not in the state in which it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<(), CompileError> {
        let now =
            Stamp::of(&self.file).map_err(|source| CompileError::Read { name: self.name.clone(), source })?;
        if now == self.stamp { Ok(()) } else { Err(CompileError::Changed { name: self.name.clone() }) }
    }
}

/// A model folder: opens its files, and remembers them to prove at the end that the folder is still the same.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    path: PathBuf,
    root: File,
    /// Canonical folders that links may lead into; the first is the folder itself.
    allowed: Vec<PathBuf>,
    seen: Vec<(String, Stamp)>,
}

impl ModelFolder {
    /// Opens the folder. `allow_symlinks_into` are further folders that links in it may lead into; missing ones are ignored.
    pub(crate) fn open(path: &Path, allow_symlinks_into: &[PathBuf]) -> Result<Self, CompileError> {
        let folder = |source| CompileError::Folder { source };
        let canonical = path.canonicalize().map_err(folder)?;
        let root = File::open(&canonical).map_err(folder)?;
        if !root.metadata().map_err(folder)?.is_dir() {
            return Err(folder(io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let mut allowed = vec![canonical.clone()];
        allowed.extend(snapshot_blobs(&canonical));
        allowed.extend(allow_symlinks_into.iter().filter_map(|path| path.canonicalize().ok()));
        Ok(ModelFolder { path: canonical, root, allowed, seen: Vec::new() })
    }

    /// Opens the regular file `name` (a relative path without `..`), or gives `None` when there is none.
    pub(crate) fn file(&mut self, name: &str) -> Result<Option<SourceFile>, CompileError> {
        let Some(source) = self.open_file(name)? else { return Ok(None) };
        self.seen.push((name.to_owned(), source.stamp.clone()));
        Ok(Some(source))
    }

    /// The whole of a small file, or `None` when there is none.
    pub(crate) fn read(&mut self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, CompileError> {
        let Some(source) = self.file(name)? else { return Ok(None) };
        if source.len_bytes() > max_bytes {
            let reason = format!("has {} bytes, at most {max_bytes} are read", source.len_bytes());
            return Err(CompileError::File { name: name.to_owned(), reason });
        }
        let mut bytes = vec![0; source.len_bytes() as usize];
        source.read_at(&mut bytes, 0)?;
        source.check_unchanged()?;
        Ok(Some(bytes))
    }

    /// The name of the folder's one file with this ending, if the folder has no config.json.
    ///
    /// # Errors
    /// [`CompileError::File`] when there are several, or too many files to look through.
    pub(crate) fn only_file_ending_in(&mut self, ending: &str) -> Result<Option<String>, CompileError> {
        if self.open_file("config.json")?.is_some() {
            return Ok(None);
        }
        let read = |source| CompileError::Folder { source };
        let mut found = None;
        for (index, entry) in self.path.read_dir().map_err(read)?.enumerate() {
            let name = entry.map_err(read)?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(ending)) else { continue };
            if found.is_some() || index >= MAX_FOLDER_ENTRIES {
                let reason = format!("there is more than one {ending} file; keep one in the folder");
                return Err(CompileError::File { name: name.to_owned(), reason });
            }
            found = Some(name.to_owned());
        }
        Ok(found)
    }

    /// Fails when a file that was read is now another one, or changed. Call it after the last read.
    pub(crate) fn check_unchanged(&self) -> Result<(), CompileError> {
        for (name, stamp) in &self.seen {
            match self.open_file(name) {
                Ok(Some(now)) if now.stamp == *stamp => {}
                _ => return Err(CompileError::Changed { name: name.clone() }),
            }
        }
        Ok(())
    }

    fn open_file(&self, name: &str) -> Result<Option<SourceFile>, CompileError> {
        let refuse = |reason: &str| CompileError::File { name: name.to_owned(), reason: reason.to_owned() };
        let path = Path::new(name);
        check_relative(path).map_err(refuse)?;
        let opened = match open_beneath(&self.root, path) {
            Ok(file) => file,
            Err(nix::Error::ENOENT) => return Ok(None),
            // A link, or a link in place of a folder.
            Err(nix::Error::ELOOP | nix::Error::ENOTDIR) => match self.open_linked(path) {
                Ok(file) => file,
                Err(nix::Error::ENOENT) => return Err(refuse("is a link to a file that does not exist")),
                Err(nix::Error::EXDEV) => {
                    return Err(refuse(
                        "is a link that leaves the model folder; copy the file into the folder, or allow its target folder",
                    ));
                }
                Err(error) => return Err(CompileError::Read { name: name.to_owned(), source: error.into() }),
            },
            Err(error) => return Err(CompileError::Read { name: name.to_owned(), source: error.into() }),
        };
        let file = File::from(opened);
        let read = |source| CompileError::Read { name: name.to_owned(), source };
        if !file.metadata().map_err(read)?.is_file() {
            return Err(refuse("is not a regular file"));
        }
        let stamp = Stamp::of(&file).map_err(read)?;
        Ok(Some(SourceFile { file, name: name.to_owned(), stamp }))
    }

    /// Resolves a path with links and opens the result beneath one of the allowed folders; `EXDEV` when it is beneath none.
    /// A link that is swapped between the two steps gains nothing: the second step follows none.
    fn open_linked(&self, path: &Path) -> nix::Result<OwnedFd> {
        let target = self
            .path
            .join(path)
            .canonicalize()
            .map_err(|error| error.raw_os_error().map_or(nix::Error::EIO, nix::Error::from_raw))?;
        for allowed in &self.allowed {
            let Ok(rest) = target.strip_prefix(allowed) else { continue };
            let root = File::open(allowed).map_err(|_| nix::Error::ENOENT)?;
            return open_beneath(&root, rest);
        }
        Err(nix::Error::EXDEV)
    }
}

/// `…/models--org--name/blobs` for a folder `…/models--org--name/snapshots/REVISION`: the one place that the links of a
/// Hugging Face cache lead to.
fn snapshot_blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent()?;
    let repository = snapshots.parent()?;
    let named =
        repository.file_name()?.to_str()?.starts_with("models--") && snapshots.file_name()? == "snapshots";
    named.then(|| repository.join("blobs").canonicalize().ok()).flatten()
}

/// Refuses paths that are absolute, climb, or are absurdly long.
fn check_relative(path: &Path) -> Result<(), &'static str> {
    if path.as_os_str().len() > MAX_PATH_BYTES {
        return Err("path is too long");
    }
    if path.components().next().is_none() {
        return Err("path is empty");
    }
    if path.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err("path must be relative to the model folder, without `..`");
    }
    Ok(())
}

/// Opens `path` below `root` one component at a time without following any link. Never blocks on a FIFO.
fn open_beneath(root: &File, path: &Path) -> nix::Result<OwnedFd> {
    let common = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut parts = path.components().peekable();
    let mut folder: Option<OwnedFd> = None;
    while let Some(part) = parts.next() {
        let Component::Normal(name) = part else { return Err(nix::Error::EXDEV) };
        let flags = match parts.peek() {
            Some(_) => common | OFlag::O_DIRECTORY,
            None => common | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
        };
        let opened = match &folder {
            Some(folder) => openat(folder, name, flags, Mode::empty())?,
            None => openat(root, name, flags, Mode::empty())?,
        };
        if parts.peek().is_none() {
            return Ok(opened);
        }
        folder = Some(opened);
    }
    Err(nix::Error::ENOENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("temp dir");
        let model = dir.path().join("models--a--b/snapshots/1234");
        std::fs::create_dir_all(&model).expect("folders");
        (dir, model)
    }

    #[test]
    fn plain_files_links_inside_and_missing_files() {
        let (_dir, model) = folder();
        std::fs::write(model.join("a.json"), "{}").expect("write");
        symlink("a.json", model.join("b.json")).expect("link");
        let mut opened = ModelFolder::open(&model, &[]).expect("open");
        assert_eq!(opened.read("a.json", 10).expect("read"), Some(b"{}".to_vec()));
        assert_eq!(opened.read("b.json", 10).expect("read"), Some(b"{}".to_vec()));
        assert_eq!(opened.read("c.json", 10).expect("none"), None);
        opened.check_unchanged().expect("unchanged");
    }

    #[test]
    fn a_snapshot_may_link_into_its_own_blobs_only() {
        let (dir, model) = folder();
        let blobs = dir.path().join("models--a--b/blobs");
        std::fs::create_dir_all(&blobs).expect("blobs");
        std::fs::write(blobs.join("deadbeef"), "blob").expect("write");
        std::fs::write(dir.path().join("secret"), "secret").expect("write");
        symlink("../../blobs/deadbeef", model.join("good")).expect("link");
        symlink("../../../secret", model.join("bad")).expect("link");
        let mut opened = ModelFolder::open(&model, &[]).expect("open");
        assert_eq!(opened.read("good", 10).expect("read"), Some(b"blob".to_vec()));
        let error = opened.read("bad", 10).expect_err("outside").to_string();
        assert!(error.contains("leaves the model folder"), "{error}");
        let mut allowed = ModelFolder::open(&model, &[dir.path().to_owned()]).expect("open");
        assert_eq!(allowed.read("bad", 10).expect("allowed"), Some(b"secret".to_vec()));
    }

    #[test]
    fn fifos_devices_folders_and_climbing_paths_are_refused_at_once() {
        let (_dir, model) = folder();
        nix::unistd::mkfifo(&model.join("fifo"), Mode::S_IRWXU).expect("fifo");
        std::fs::create_dir(model.join("folder")).expect("folder");
        symlink("/dev/zero", model.join("device")).expect("link");
        symlink("loop", model.join("loop")).expect("link");
        let mut opened = ModelFolder::open(&model, &[]).expect("open");
        for name in ["fifo", "folder", "device", "loop", "../x", "/etc/passwd", "", "folder/../fifo"] {
            assert!(opened.read(name, 10).is_err(), "{name:?} was accepted");
        }
    }

    #[test]
    fn a_replaced_or_shortened_file_is_noticed() {
        let (_dir, model) = folder();
        std::fs::write(model.join("a"), "12345678").expect("write");
        let mut opened = ModelFolder::open(&model, &[]).expect("open");
        let file = opened.file("a").expect("open").expect("there");
        std::fs::write(model.join("new"), "12345678").expect("write");
        std::fs::rename(model.join("new"), model.join("a")).expect("rename");
        assert!(matches!(opened.check_unchanged(), Err(CompileError::Changed { .. })));
        drop(file);
        let file = opened.file("a").expect("open").expect("there");
        std::fs::write(model.join("a"), "1").expect("shorten");
        assert!(matches!(file.read_at(&mut [0; 8], 0), Err(CompileError::Changed { .. })));
        assert!(matches!(file.check_unchanged(), Err(CompileError::Changed { .. })));
    }

    #[test]
    fn a_file_over_its_bound_is_not_read() {
        let (_dir, model) = folder();
        std::fs::write(model.join("a"), "12345678").expect("write");
        let mut opened = ModelFolder::open(&model, &[]).expect("open");
        assert!(matches!(opened.read("a", 7), Err(CompileError::File { .. })));
    }
}

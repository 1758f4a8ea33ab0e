//! Stamps: a note beside a cached image that its content hash was checked while its file was in exactly this state, so that a
//! restart need not read gigabytes again. What an image is must not be known here.
//!
//! Whoever changes a file changes its ctime, and no program without privileges can set that. So a file whose device, inode,
//! length, mtime and ctime are those of the stamp holds what was checked then. Not noticed: a disk that loses bits, and a
//! program of the same user that had the file mapped writable before it was checked. So stamps hold for
//! [`STAMP_MAX_AGE`] only, and `modelbroker doctor --images` checks everything anew.

use shm_os::image_backing::ImageKey;
use shm_os::private_files::PrivateFolder;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long a check is good for; then the next load reads the whole image again.
const STAMP_MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);
/// A file must have been left alone for so long before it is read: two changes within one tick of the kernel's clock have the
/// same ctime.
const SETTLED_AFTER: Duration = Duration::from_millis(20);
/// Longest stamp, bytes.
const MAX_STAMP_BYTES: u64 = 512;
/// First line; another format has another one.
const FIRST_LINE: &str = "modelbroker image stamp 1";

/// The state of a file, as the system tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileState {
    device: u64,
    inode: u64,
    len_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    /// The state of an open file; `None` where it cannot be told, or where the file system keeps times in whole seconds: then
    /// a change within one of them would not show.
    pub(crate) fn of(file: &File) -> Option<FileState> {
        let meta = file.metadata().ok()?;
        let state = FileState {
            device: meta.dev(),
            inode: meta.ino(),
            len_bytes: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        (state.changed.1 != 0).then_some(state)
    }

    /// Waits until a change from now on shows in the ctime: at most [`SETTLED_AFTER`].
    pub(crate) fn settle(&self) {
        let nanos = u32::try_from(self.changed.1).unwrap_or(0);
        let seconds = u64::try_from(self.changed.0).unwrap_or(0);
        let changed = UNIX_EPOCH + Duration::new(seconds, nanos);
        let age = SystemTime::now().duration_since(changed).unwrap_or_default();
        std::thread::sleep(SETTLED_AFTER.saturating_sub(age));
    }

    fn text(&self, content_hash: &[u8; 32]) -> String {
        let hash = blake3::Hash::from_bytes(*content_hash).to_hex();
        format!(
            "{FIRST_LINE}\n{}\n{hash}\n{} {} {} {}.{:09} {}.{:09}\n",
            env!("CARGO_PKG_VERSION"),
            self.device,
            self.inode,
            self.len_bytes,
            self.modified.0,
            self.modified.1,
            self.changed.0,
            self.changed.1
        )
    }
}

fn name(key: &ImageKey) -> String {
    format!("{}.stamp", key.as_str())
}

/// Whether a stamp says that the image under `key` with this content hash was checked in this state, not too long before `now`.
pub(crate) fn holds(
    folder: &PrivateFolder,
    key: &ImageKey,
    state: &FileState,
    content_hash: &[u8; 32],
    now: SystemTime,
) -> bool {
    let read = || -> Option<String> {
        let mut text = String::new();
        folder.read(&name(key)).ok()??.take(MAX_STAMP_BYTES).read_to_string(&mut text).ok()?;
        Some(text)
    };
    let Some(text) = read() else { return false };
    let Some(checked_at) = text.strip_prefix(&state.text(content_hash)) else { return false };
    let Ok(seconds) = checked_at.trim_end_matches('\n').parse::<u64>() else { return false };
    let age = UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).and_then(|at| now.duration_since(at).ok());
    age.is_some_and(|age| age <= STAMP_MAX_AGE)
}

/// Notes that the image was checked in this state. Without a stamp the next load checks again, so a failure is only told.
pub(crate) fn write(
    folder: &PrivateFolder,
    key: &ImageKey,
    state: &FileState,
    content_hash: &[u8; 32],
    now: SystemTime,
) {
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let text = format!("{}{seconds}\n", state.text(content_hash));
    if let Err(error) = folder.replace(&name(key), |file| file.write_all(text.as_bytes())) {
        tracing::debug!(%error, "a stamp could not be written; the next load checks the image again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const HASH: [u8; 32] = [7; 32];

    struct Place {
        folder: PrivateFolder,
        key: ImageKey,
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let folder = PrivateFolder::open(&dir.path().join("images")).unwrap();
            Place { folder, key: ImageKey::new("m-1").unwrap(), dir }
        }

        fn file(&self, content: &str) -> File {
            let path = self.dir.path().join("image");
            fs::write(&path, content).unwrap();
            File::open(path).unwrap()
        }

        fn holds(&self, state: &FileState) -> bool {
            holds(&self.folder, &self.key, state, &HASH, SystemTime::now())
        }
    }

    #[test]
    fn a_stamp_holds_for_this_state_alone() {
        let place = Place::new();
        let Some(state) = FileState::of(&place.file("abc")) else { return };
        assert!(!place.holds(&state), "there is none yet");
        write(&place.folder, &place.key, &state, &HASH, SystemTime::now());
        assert!(place.holds(&state));
        let others = [
            FileState { device: state.device ^ 1, ..state.clone() },
            FileState { inode: state.inode ^ 1, ..state.clone() },
            FileState { len_bytes: 4, ..state.clone() },
            FileState { modified: (state.modified.0, state.modified.1 ^ 1), ..state.clone() },
            FileState { changed: (state.changed.0, state.changed.1 ^ 1), ..state.clone() },
        ];
        for other in others {
            assert!(!place.holds(&other), "{other:?}");
        }
        assert!(!holds(&place.folder, &place.key, &state, &[8; 32], SystemTime::now()));
        assert!(!holds(&place.folder, &ImageKey::new("m-2").unwrap(), &state, &HASH, SystemTime::now()));
    }

    #[test]
    fn a_file_written_again_with_its_old_times_is_another_state() {
        let place = Place::new();
        let file = place.file("abc");
        let Some(state) = FileState::of(&file) else { return };
        state.settle();
        let modified = file.metadata().unwrap().modified().unwrap();
        let same = fs::File::options().write(true).open(place.dir.path().join("image")).unwrap();
        (&same).write_all(b"abd").unwrap();
        same.set_modified(modified).unwrap();
        let after = FileState::of(&file).unwrap();
        assert_eq!(
            (after.modified, after.inode, after.len_bytes),
            (state.modified, state.inode, state.len_bytes)
        );
        assert_ne!(after.changed, state.changed);
    }

    #[test]
    fn old_stamps_and_those_of_the_future_hold_for_nothing() {
        let place = Place::new();
        let Some(state) = FileState::of(&place.file("abc")) else { return };
        let now = SystemTime::now();
        write(&place.folder, &place.key, &state, &HASH, now);
        let at = |now| holds(&place.folder, &place.key, &state, &HASH, now);
        assert!(at(now + STAMP_MAX_AGE - Duration::from_secs(1)));
        assert!(!at(now + STAMP_MAX_AGE + Duration::from_secs(2)));
        assert!(!at(now - Duration::from_secs(60)), "the clock was set back: nobody knows how old it is");
    }

    #[test]
    fn whatever_lies_there_instead_holds_for_nothing() {
        let place = Place::new();
        let Some(state) = FileState::of(&place.file("abc")) else { return };
        for content in
            ["", "x", &"y".repeat(5000), &state.text(&HASH), &format!("{}soon\n", state.text(&HASH))]
        {
            place.folder.replace(&name(&place.key), |file| file.write_all(content.as_bytes())).unwrap();
            assert!(!place.holds(&state), "{content:?}");
        }
    }
}

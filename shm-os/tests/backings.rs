//! One conformance suite for every image backing: what a backing's `Guarantees` say is tried out. Two processes on
//! one image are in `processes.rs`.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use shm_os::image_backing::{
    BackingError, BackingKind, ImageBacking, ImageFile, ImageKey, PosixShm, PublishedImage, SealedMemfd,
    copy_file_into_memfd, copy_image_into_sealed_memfd, map_published,
};
use shm_os::memfd;

const LEN_BYTES: u64 = 3 * 4096 + 17;

fn key(name: &str) -> ImageKey {
    ImageKey::new(name).unwrap()
}

/// Bytes that differ from page to page.
fn pattern(len_bytes: u64) -> Vec<u8> {
    (0..len_bytes).map(|i| (i.wrapping_mul(31) ^ (i >> 12)) as u8).collect()
}

/// Runs a check against each backing, with a cache folder of its own.
fn for_each_backing(check: impl Fn(&dyn ImageBacking)) {
    let temp = tempfile::tempdir().unwrap();
    let file = ImageFile::open(&temp.path().join("cache")).unwrap();
    let backings: [&dyn ImageBacking; 3] = [&SealedMemfd, &file, &PosixShm];
    for backing in backings {
        check(backing);
    }
}

fn publish(backing: &dyn ImageBacking, bytes: &[u8]) -> PublishedImage {
    let mut writer = backing.reserve(&key("image"), bytes.len() as u64).unwrap();
    writer.window().copy_from_slice(bytes);
    writer.publish().unwrap()
}

/// Tries every way to change an object through one descriptor; gives those that worked.
fn ways_to_change(fd: BorrowedFd<'_>) -> Vec<&'static str> {
    let file = File::from(fd.try_clone_to_owned().unwrap());
    let mut worked = Vec::new();
    if file.write_at(b"x", 0).is_ok() {
        worked.push("write");
    }
    if file.set_len(1).is_ok() {
        worked.push("shrink");
    }
    if file.set_len(1 << 20).is_ok() {
        worked.push("grow");
    }
    // SAFETY: fallocate works on the descriptor only.
    if unsafe {
        libc::fallocate(fd.as_raw_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 4096)
    } == 0
    {
        worked.push("punch");
    }
    if memmap2::MmapOptions::new().len(4096).map_raw(&file).is_ok() {
        worked.push("map writable");
    }
    worked
}

#[test]
fn content_is_the_same_by_each_way_of_filling() {
    let bytes = pattern(LEN_BYTES);
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&bytes).unwrap();
    for_each_backing(|backing| {
        let window = publish(backing, &bytes);
        assert_eq!((window.len_bytes, window.kind), (LEN_BYTES, backing.kind()));
        assert_eq!(window.map().unwrap().as_bytes(), bytes, "{backing:?}");

        let mut writer = backing.reserve(&key("streamed"), LEN_BYTES).unwrap();
        writer.seek(SeekFrom::End(-17)).unwrap();
        writer.write_all(&bytes[LEN_BYTES as usize - 17..]).unwrap();
        writer.seek(SeekFrom::Start(0)).unwrap();
        writer.write_all(&bytes[..LEN_BYTES as usize - 17]).unwrap();
        assert_eq!(writer.publish().unwrap().map().unwrap().as_bytes(), bytes, "{backing:?}");

        let mut writer = backing.reserve(&key("copied"), LEN_BYTES).unwrap();
        let mut reported = 0;
        writer
            .fill_from_file(&source, &mut |done| {
                reported = done;
                true
            })
            .unwrap();
        assert_eq!(reported, LEN_BYTES);
        assert_eq!(writer.publish().unwrap().map().unwrap().as_bytes(), bytes, "{backing:?}");
    });
}

#[test]
fn what_is_reserved_is_zero_and_bounded() {
    for_each_backing(|backing| {
        for bad in [0, memfd::MAX_IMAGE_BYTES + 1, u64::MAX] {
            assert!(
                matches!(backing.reserve(&key("x"), bad), Err(BackingError::BadLength { .. })),
                "{backing:?} {bad}"
            );
        }
        let mut writer = backing.reserve(&key("x"), 5000).unwrap();
        assert!(writer.window().iter().all(|byte| *byte == 0));
        writer.seek(SeekFrom::Start(4998)).unwrap();
        assert_eq!(writer.write(b"abc").unwrap(), 2);
        assert!(writer.write_all(b"c").is_err(), "the end is the end");
        assert!(writer.seek(SeekFrom::Start(5001)).is_err());
        assert!(writer.seek(SeekFrom::Current(-6000)).is_err());
        assert_eq!(&writer.publish().unwrap().map().unwrap().as_bytes()[4997..], b"\0ab");
    });
}

#[test]
fn receivers_cannot_change_what_they_received() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        let image = publish(backing, &bytes);
        assert!(backing.guarantees().read_only_descriptor);
        assert_eq!(ways_to_change(image.fd_read_only.as_fd()), [""; 0], "{backing:?}");
        let mapping = image.map().unwrap();
        let start = mapping.as_bytes().as_ptr().cast_mut().cast();
        // SAFETY: asks for more rights on a mapped range; it is refused.
        let result = unsafe { libc::mprotect(start, 4096, libc::PROT_READ | libc::PROT_WRITE) };
        assert!(result == -1 || mapping.is_private_fallback(), "{backing:?}");
        assert_eq!(mapping.as_bytes(), bytes);
    });
}

#[test]
fn an_immutable_image_withstands_its_owner() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        let image = publish(backing, &bytes);
        let mapping = image.map().unwrap();
        let path = format!("/proc/self/fd/{}", image.fd_read_only.as_raw_fd());
        let _ = std::fs::set_permissions(&path, Permissions::from_mode(0o600));
        let reopened = OpenOptions::new().read(true).write(true).open(&path);
        if backing.guarantees().immutable_for_everyone {
            if let Ok(writable) = reopened {
                assert_eq!(ways_to_change(writable.as_fd()), [""; 0], "{backing:?}");
            }
            assert_eq!(mapping.as_bytes(), bytes);
        } else {
            // What the guarantee does not promise is really possible: the documentation's warning is not idle.
            assert!(!ways_to_change(reopened.unwrap().as_fd()).is_empty(), "{backing:?}");
        }
    });
}

#[test]
fn truncation_by_the_owner_is_survived_and_told() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        if backing.guarantees().size_is_fixed {
            return;
        }
        let (image, bystander) = (publish(backing, &bytes), publish(backing, &bytes));
        let (mapping, unharmed) = (image.map().unwrap(), bystander.map().unwrap());
        let path = format!("/proc/self/fd/{}", image.fd_read_only.as_raw_fd());
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        assert!(!mapping.is_poisoned());
        // SAFETY: in range; volatile, since the content is what changes.
        let byte = unsafe { mapping.as_bytes().as_ptr().add(8192).read_volatile() };
        assert_eq!(byte, 0);
        assert!(mapping.is_poisoned(), "{backing:?}");
        assert_eq!(unharmed.as_bytes(), bytes);
        assert!(!unharmed.is_poisoned());
    });
}

#[test]
fn wrong_sizes_kinds_and_unsealed_objects_are_refused() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        let image = publish(backing, &bytes);
        let fd = image.fd_read_only.as_fd();
        for wrong in [1, LEN_BYTES - 1, LEN_BYTES + 1, 4 * 4096, 0, u64::MAX] {
            assert!(map_published(fd, backing.kind(), wrong).is_err(), "{backing:?} {wrong}");
        }
        for other in BackingKind::ALL {
            let needs_seals = other == BackingKind::SealedMemfd;
            if needs_seals != (backing.kind() == BackingKind::SealedMemfd) {
                assert!(map_published(fd, other, LEN_BYTES).is_err(), "{backing:?} taken for {other}");
            }
        }
        let writer = backing.reserve(&key("unfinished"), LEN_BYTES).unwrap();
        assert!(map_published(writer.as_fd(), backing.kind(), LEN_BYTES).is_err(), "{backing:?} unpublished");
    });
    let (reader, _writer) = std::io::pipe().unwrap();
    for kind in BackingKind::ALL {
        assert!(map_published(reader.as_fd(), kind, 4096).is_err());
    }
}

#[test]
fn an_image_outlives_its_name_and_its_descriptors() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        let image = publish(backing, &bytes);
        let mapping = image.map().unwrap();
        assert_eq!(backing.remove(&key("image")).unwrap(), backing.guarantees().survives_restart);
        assert!(!backing.remove(&key("image")).unwrap());
        let again = image.map().unwrap();
        drop(image);
        assert_eq!(mapping.as_bytes(), bytes);
        assert_eq!(again.as_bytes(), bytes);
    });
}

#[test]
fn an_image_is_found_again_where_that_is_promised() {
    let bytes = pattern(LEN_BYTES);
    for_each_backing(|backing| {
        drop(publish(backing, &bytes));
        let found = backing.open_existing(&key("image")).unwrap();
        assert_eq!(found.is_some(), backing.guarantees().survives_restart);
        if let Some(found) = found {
            assert_eq!(found.len_bytes, LEN_BYTES);
            assert_eq!(found.map().unwrap().as_bytes(), bytes);
        }
        assert!(backing.open_existing(&key("never-made")).unwrap().is_none());
    });
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn abandoned_writers_leave_no_file() {
    let temp = tempfile::tempdir().unwrap();
    let cache = temp.path().join("cache");
    let backing = ImageFile::open(&cache).unwrap();
    let writer = backing.reserve(&key("a"), LEN_BYTES).unwrap();
    drop(writer);
    assert_eq!(names_in(&cache), [""; 0]);
    let image = publish(&backing, &pattern(LEN_BYTES));
    assert_eq!(names_in(&cache), ["image"]);
    assert_eq!(image.path.as_deref(), Some(cache.join("image").as_path()));
    assert_eq!(cache.join("image").metadata().unwrap().permissions().mode() & 0o7777, 0o400);
    // Publishing under the same key replaces the file; the old image stays with its users.
    let old = image.map().unwrap();
    publish(&backing, &[1; 4096]);
    assert_eq!(names_in(&cache), ["image"]);
    assert_eq!(old.as_bytes(), pattern(LEN_BYTES));
    assert_eq!(backing.open_existing(&key("image")).unwrap().unwrap().len_bytes, 4096);
}

#[test]
fn opening_the_cache_sweeps_what_the_dead_left_and_spares_the_living() {
    let temp = tempfile::tempdir().unwrap();
    let cache = temp.path().join("cache");
    let first = ImageFile::open(&cache).unwrap();
    std::fs::write(cache.join(".tmp-0123456789abcdef"), "left by a killed process").unwrap();
    let living = File::create(cache.join(".tmp-fedcba9876543210")).unwrap();
    // SAFETY: flock works on the descriptor only.
    assert_eq!(unsafe { libc::flock(living.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }, 0);
    publish(&first, b"kept");
    ImageFile::open(&cache).unwrap();
    assert_eq!(names_in(&cache), [".tmp-fedcba9876543210", "image"]);
}

#[test]
fn strange_files_in_the_cache_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let cache = temp.path().join("cache");
    let backing = ImageFile::open(&cache).unwrap();
    publish(&backing, b"good");
    std::os::unix::fs::symlink(cache.join("image"), cache.join("link")).unwrap();
    std::fs::write(cache.join("loose"), "mode is not 0400").unwrap();
    std::fs::create_dir(cache.join("folder")).unwrap();
    nix::unistd::mkfifo(&cache.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::fs::write(cache.join("empty"), "").unwrap();
    std::fs::set_permissions(cache.join("empty"), Permissions::from_mode(0o400)).unwrap();
    for name in ["link", "loose", "folder", "fifo", "empty"] {
        let result = backing.open_existing(&key(name));
        assert!(
            matches!(result, Err(BackingError::Refused { .. } | BackingError::BadLength { .. })),
            "{name}: {result:?}"
        );
    }
    std::fs::set_permissions(&cache, Permissions::from_mode(0o755)).unwrap();
    assert!(matches!(ImageFile::open(&cache), Err(BackingError::Folder(_))));
}

#[test]
fn no_space_is_an_error_when_reserving() {
    let shm = Path::new("/dev/shm");
    let Ok(space) = nix::sys::statvfs::statvfs(shm) else { return };
    // Only where the whole request is refused up front: nothing is really filled by this test.
    let total_bytes = space.blocks() * space.fragment_size();
    if total_bytes == 0 || total_bytes >= memfd::MAX_IMAGE_BYTES || !shm.is_dir() {
        return;
    }
    let Ok(temp) = tempfile::tempdir_in(shm) else { return };
    let cache = temp.path().join("cache");
    let file = ImageFile::open(&cache).unwrap();
    for backing in [&file as &dyn ImageBacking, &PosixShm] {
        let error = backing.reserve(&key("big"), memfd::MAX_IMAGE_BYTES).unwrap_err();
        assert!(matches!(error, BackingError::NoSpace { .. }), "{error}");
        assert!(error.to_string().contains("free space"), "{error}");
    }
    assert_eq!(names_in(&cache), [""; 0]);
}

#[test]
fn copies_into_sealed_memory_are_exact_and_notice_a_changed_source() {
    let bytes = pattern(40 << 20);
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&bytes).unwrap();
    let len_bytes = bytes.len() as u64;
    let mut reports = Vec::new();
    let image = copy_image_into_sealed_memfd(&source, len_bytes, &mut |done| {
        reports.push(done);
        true
    })
    .unwrap();
    assert_eq!(image.map().unwrap().as_bytes(), bytes);
    assert!(reports.is_sorted() && reports.last() == Some(&len_bytes), "{reports:?}");
    for wrong in [len_bytes - 1, len_bytes + 1] {
        let result = copy_image_into_sealed_memfd(&source, wrong, &mut |_| true);
        assert!(matches!(result, Err(BackingError::SourceChanged { .. })));
    }
    let stopped = copy_image_into_sealed_memfd(&source, len_bytes, &mut |_| false);
    assert!(matches!(stopped, Err(BackingError::Cancelled)));
    let adopted = PublishedImage::from_sealed(image.fd_read_only.as_fd()).unwrap();
    assert_eq!((adopted.len_bytes, adopted.kind), (len_bytes, BackingKind::SealedMemfd));
    let other = memfd::create_writable_image(4096).unwrap();
    assert!(PublishedImage::from_sealed(other.as_fd()).is_err(), "not sealed");
    assert!(copy_file_into_memfd(&source, other.as_fd(), len_bytes, &mut |_| true).is_err());
}

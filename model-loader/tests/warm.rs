//! Images in the cache folder: loaded again without reading them while their stamps hold, read and compiled anew when they were
//! changed, found by a full check whatever a stamp says.

use model_loader::{LoadRequest, LoadedImage, PrecisionChoice, load_image, verify_cached_images};
use model_source::SourceOptions;
use shm_os::image_backing::{AUTO_FILE_BYTES, BackingChoice, BackingKind};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

fn load(cache: &Path, backing: BackingChoice) -> LoadedImage {
    let mut source = SourceOptions::from_env().expect("the environment is fine");
    source.cache_dir = cache.to_owned();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tiny/bert_mean");
    let reference = model.to_string_lossy().into_owned();
    let request = LoadRequest { reference, precision: PrecisionChoice::F32, backing, source };
    load_image(&request, &mut |_| {}).expect("the model loads")
}

fn bytes(loaded: &LoadedImage) -> Vec<u8> {
    loaded.image.map().expect("the image can be mapped").as_bytes().to_vec()
}

fn file_backing() -> BackingChoice {
    BackingKind::ImageFile.into()
}

/// Changes one byte of the weights, and sets length, mode and mtime to what they were.
fn damage(image: &Path) {
    let before = fs::metadata(image).expect("the image is there");
    fs::set_permissions(image, Permissions::from_mode(0o600)).expect("its owner may");
    let file = File::options().read(true).write(true).open(image).expect("its owner may");
    let (mut byte, place) = ([0], before.len() - 1000);
    file.read_exact_at(&mut byte, place).expect("it is long enough");
    file.write_all_at(&[byte[0] ^ 1], place).expect("its owner may");
    file.set_modified(before.modified().expect("a time")).expect("its owner may");
    fs::set_permissions(image, Permissions::from_mode(0o400)).expect("its owner may");
}

fn stamp_of(image: &Path) -> PathBuf {
    image.with_extension("stamp")
}

/// Makes the stamp say that the image was checked as it is now.
fn forge(image: &Path) {
    let state = fs::metadata(image).expect("the image is there");
    let stamp = fs::read_to_string(stamp_of(image)).expect("there is a stamp");
    let mut lines: Vec<String> = stamp.lines().map(str::to_owned).collect();
    lines[3] = format!(
        "{} {} {} {}.{:09} {}.{:09}",
        state.dev(),
        state.ino(),
        state.len(),
        state.mtime(),
        state.mtime_nsec(),
        state.ctime(),
        state.ctime_nsec()
    );
    fs::write(stamp_of(image), lines.join("\n") + "\n").expect("the stamp is ours");
}

#[test]
fn a_changed_image_is_noticed_a_stamped_one_is_not_read_and_a_full_check_sees_all() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path();
    let first = load(cache, file_backing());
    assert!(!first.from_cache);
    let image = first.image.path.clone().expect("it is a file");
    let whole = bytes(&first);
    drop(first);
    if !stamp_of(&image).exists() {
        // A file system without fine times: every load reads the image.
        return;
    }
    let again = load(cache, file_backing());
    assert!(again.from_cache && bytes(&again) == whole);
    drop(again);

    damage(&image);
    let mended = load(cache, file_backing());
    assert!(!mended.from_cache, "a damaged image was taken from the cache");
    assert_eq!(bytes(&mended), whole);
    drop(mended);

    // What a stamp vouches for is not read: that is what makes a restart fast.
    damage(&image);
    forge(&image);
    let trusted = load(cache, file_backing());
    assert!(trusted.from_cache && bytes(&trusted) != whole);
    drop(trusted);
    // Memory is another copy each time, and is checked each time.
    let copy = load(cache, BackingKind::SealedMemfd.into());
    assert!(!copy.from_cache && bytes(&copy) == whole);
    drop(copy);

    damage(&image);
    forge(&image);
    let found = verify_cached_images(cache).expect("the folder can be read");
    assert_eq!(found.len(), 1);
    assert!(found[0].damage.as_ref().is_some_and(|damage| damage.contains("hash")), "{found:?}");
    assert!(!image.exists(), "the damaged image is gone");
    let mended = load(cache, file_backing());
    assert!(!mended.from_cache && bytes(&mended) == whole);
    let found = verify_cached_images(cache).expect("the folder can be read");
    assert!(found.len() == 1 && found[0].damage.is_none(), "{found:?}");
    assert!(verify_cached_images(&cache.join("nothing")).expect("no folder has no images").is_empty());
}

#[test]
fn small_images_are_sealed_in_memory_where_nobody_chooses() {
    let folder = tempfile::tempdir().expect("a folder");
    let loaded = load(folder.path(), BackingChoice::Auto);
    assert!(loaded.image.len_bytes < AUTO_FILE_BYTES);
    assert_eq!(loaded.image.kind, BackingKind::SealedMemfd);
}

#[test]
fn where_the_cache_cannot_be_used_memory_is() {
    let folder = tempfile::tempdir().expect("a folder");
    let not_a_folder = folder.path().join("file");
    fs::write(&not_a_folder, "x").expect("a file");
    let loaded = load(&not_a_folder, BackingChoice::Auto);
    assert_eq!((loaded.from_cache, loaded.image.kind), (false, BackingKind::SealedMemfd));
}

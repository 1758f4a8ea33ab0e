//! From a reference to a published image: resolve, look into the cache, compile when there is none, check, publish.

use crate::error::LoadError;
use crate::key::{image_key, readable};
use crate::precision::{PrecisionChoice, id_with, split_precision};
use crate::stamp::{self, FileState};
use engine::compile::Precision;
use engine::{CompileOptions, CompileProgress, ImageSink, compile_folder, verify_image};
use model_source::{ModelRef, Progress, ResolvedModel, SourceOptions, resolve};
use shm_layout::image::CheckedImage;
use shm_layout::wire::LoadProgress;
use shm_os::OsError;
use shm_os::image_backing::{
    BackingChoice, BackingError, BackingKind, ImageBacking, ImageFile, ImageKey, ImageWriter, PosixShm,
    PublishedImage, SealedMemfd,
};
use shm_os::private_files::PrivateFolder;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Sub-folder of the cache that holds compiled images.
pub(crate) const IMAGES_FOLDER: &str = "images";

/// What to load and how.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    /// Model id, alias, or folder; `:f32`, `:bf16`, `:int8` or `:auto` behind it names the precision.
    pub reference: String,
    /// The precision when the reference names none.
    pub precision: PrecisionChoice,
    /// What the image shall lie in.
    pub backing: BackingChoice,
    /// Where models are looked for, and the cache folder that compiled images go into as well.
    pub source: SourceOptions,
}

/// A model that is ready to be handed out.
#[derive(Debug)]
pub struct LoadedImage {
    /// Canonical id; with the precision behind a colon, unless it is f32 and that is the default.
    pub model_id: String,
    /// The image; its content hash was checked on exactly these bytes, or, for an image file, when the file was last in
    /// the state that it is in (see `stamp`).
    pub image: PublishedImage,
    /// Whether it came from the cache of compiled images.
    pub from_cache: bool,
}

/// Loads a model. `progress` hears of every stage: `download`, `compile`, `copy`, `verify`.
///
/// A damaged image in the cache is thrown away and compiled anew. A cache folder that cannot be written (disk full,
/// read-only) is gone without for a memory backing, which compiles straight into memory then.
///
/// # Errors
/// [`LoadError`], whose text says what was wrong and what to do.
pub fn load_image(
    request: &LoadRequest,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedImage, LoadError> {
    let (name, choice) = split_precision(&request.reference);
    let reference = ModelRef::parse(name)?;
    let precision = choice.unwrap_or(request.precision).resolve();
    let mut model = resolve(
        &reference,
        &request.source,
        &mut Downloads { progress, stage: String::new(), done: 0, total: 0 },
    )?;
    model.id = id_with(&model.id, precision, request.precision.resolve());
    let key = image_key(&model.id, &model.folder)?;
    let choice = request.backing;
    let images = match Images::open(&request.source.cache_dir.join(IMAGES_FOLDER)) {
        Ok(images) => images,
        Err(error) => return without_cache(&model, precision, &key, choice, error, progress),
    };
    if let Some(image) = cached(&images, &key, choice, progress)? {
        return Ok(LoadedImage { model_id: model.id, image, from_cache: true });
    }
    let _lock = lock(&images.files.path_of(&key))?;
    // Somebody else may have compiled it while this process waited for the lock.
    if let Some(image) = cached(&images, &key, choice, progress)? {
        return Ok(LoadedImage { model_id: model.id, image, from_cache: true });
    }
    let file = match compile(&model, precision, &images.files, &key, progress) {
        Ok(file) => file,
        Err(error) if is_storage(&error) => {
            return without_cache(&model, precision, &key, choice, error, progress);
        }
        Err(error) => return Err(error),
    };
    clear_older(&images.files, &model.id, &key);
    let image = match memory(choice.kind_for(file.len_bytes)) {
        Some(memory) => {
            let image = copy(&file, memory.as_ref(), &key, progress)?;
            check(&image, progress).map(|_| image)
        }
        None => check_file(&images, &key, &file, progress).map(|()| file),
    };
    let image = image.map_err(|source| LoadError::Damaged { model_id: model.id.clone(), source })?;
    Ok(LoadedImage { model_id: model.id, image, from_cache: false })
}

/// The cached image, checked; `None` when there is none or it was damaged (it is gone then).
fn cached(
    images: &Images,
    key: &ImageKey,
    choice: BackingChoice,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Option<PublishedImage>, LoadError> {
    let found = match images.files.open_existing(key) {
        Ok(Some(found)) => found,
        Ok(None) => return Ok(None),
        Err(error) => {
            tracing::warn!(%error, "cached image refused; compiling the model again");
            images.files.remove(key)?;
            return Ok(None);
        }
    };
    let checked = match memory(choice.kind_for(found.len_bytes)) {
        Some(memory) => {
            let image = copy(&found, memory.as_ref(), key, progress)?;
            check(&image, progress).map(|_| image)
        }
        None => check_file(images, key, &found, progress).map(|()| found),
    };
    match checked {
        Ok(image) => Ok(Some(image)),
        Err(error) => {
            tracing::warn!(%error, "cached image is damaged; compiling the model again");
            images.files.remove(key)?;
            Ok(None)
        }
    }
}

/// The folder of compiled images, with the stamps of those that were checked.
pub(crate) struct Images {
    pub(crate) files: ImageFile,
    pub(crate) stamps: PrivateFolder,
}

impl Images {
    pub(crate) fn open(folder: &Path) -> Result<Images, BackingError> {
        let files = ImageFile::open(folder)?;
        let stamps = PrivateFolder::open(folder).map_err(|error| {
            BackingError::Os(OsError::new(
                "opening the folder of images",
                io::Error::other(error.to_string()),
            ))
        })?;
        Ok(Images { files, stamps })
    }
}

/// What a kind of backing is made with; `None` for the image file itself.
fn memory(kind: BackingKind) -> Option<Box<dyn ImageBacking>> {
    match kind {
        BackingKind::SealedMemfd => Some(Box::new(SealedMemfd)),
        BackingKind::PosixShm => Some(Box::new(PosixShm)),
        BackingKind::ImageFile => None,
    }
}

/// Compiles straight into memory because the cache folder is not usable; the next start will compile again.
fn without_cache(
    model: &ResolvedModel,
    precision: Precision,
    key: &ImageKey,
    choice: BackingChoice,
    reason: impl Into<LoadError>,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<LoadedImage, LoadError> {
    let reason = reason.into();
    let memory = match choice {
        BackingChoice::Auto => memory(BackingKind::SealedMemfd),
        BackingChoice::Always(kind) => memory(kind),
    };
    let Some(memory) = memory else { return Err(reason) };
    tracing::warn!(%reason, "the cache of compiled images is not usable; compiling into memory only");
    let image = compile(model, precision, memory.as_ref(), key, progress)?;
    check(&image, progress).map_err(|source| LoadError::Damaged { model_id: model.id.clone(), source })?;
    Ok(LoadedImage { model_id: model.id.clone(), image, from_cache: false })
}

fn is_storage(error: &LoadError) -> bool {
    matches!(
        error,
        LoadError::Compile {
            source: engine::CompileError::DiskFull { .. } | engine::CompileError::Write { .. },
            ..
        } | LoadError::Backing(_)
    )
}

/// Lets the compiler write into any backing.
struct Sink<'a> {
    backing: &'a dyn ImageBacking,
    key: &'a ImageKey,
    writer: Option<ImageWriter>,
    failure: Option<BackingError>,
}

impl ImageSink for Sink<'_> {
    fn reserve(&mut self, total_bytes: u64) -> io::Result<()> {
        match self.backing.reserve(self.key, total_bytes) {
            Ok(writer) => {
                self.writer = Some(writer);
                Ok(())
            }
            Err(error) => {
                let kind = match &error {
                    BackingError::NoSpace { .. } => io::ErrorKind::StorageFull,
                    _ => io::ErrorKind::Other,
                };
                let told = io::Error::new(kind, error.to_string());
                self.failure = Some(error);
                Err(told)
            }
        }
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let window = self.writer.as_mut().ok_or_else(outside)?.window();
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let end = start.checked_add(bytes.len()).ok_or_else(outside)?;
        window.get_mut(start..end).ok_or_else(outside)?.copy_from_slice(bytes);
        Ok(())
    }
}

fn compile(
    model: &ResolvedModel,
    precision: Precision,
    backing: &dyn ImageBacking,
    key: &ImageKey,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<PublishedImage, LoadError> {
    let options = CompileOptions {
        model_id: model.id.clone(),
        allow_symlinks_into: model.contained_in.iter().cloned().collect(),
        precision,
    };
    let mut sink = Sink { backing, key, writer: None, failure: None };
    let mut report = |at: CompileProgress| progress(stage("compile", at.done_bytes, at.total_bytes));
    match (compile_folder(&model.folder, &options, &mut sink, &mut report), sink.failure, sink.writer) {
        (Ok(_), _, Some(writer)) => Ok(writer.publish()?),
        (_, Some(failure), _) => Err(failure.into()),
        (Err(source), ..) => Err(LoadError::Compile { model_id: model.id.clone(), source }),
        (Ok(_), None, None) => Err(OsError::new("compiling", io::Error::from(io::ErrorKind::Other)).into()),
    }
}

fn copy(
    file: &PublishedImage,
    memory: &dyn ImageBacking,
    key: &ImageKey,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<PublishedImage, LoadError> {
    let source = file.fd_read_only.try_clone().map_err(|e| OsError::new("copying a descriptor", e))?;
    let mut writer = memory.reserve(key, file.len_bytes)?;
    writer.fill_from_file(&File::from(source), &mut |done| {
        progress(stage("copy", done, file.len_bytes));
        true
    })?;
    Ok(writer.publish()?)
}

/// Checks structure and content hash on the bytes that will be handed out; gives the hash.
fn check(
    image: &PublishedImage,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<[u8; 32], engine::VerifyError> {
    progress(stage("verify", 0, image.len_bytes));
    // An image that cannot be mapped is as good as damaged: it is compiled again, and the error of that is told.
    let mapping = image.map().map_err(|_| engine::VerifyError::Hash)?;
    verify_image(mapping.as_bytes())?;
    let content_hash = CheckedImage::new(mapping.as_bytes())?.header().values().content_hash;
    progress(stage("verify", image.len_bytes, image.len_bytes));
    if mapping.is_poisoned() { Err(engine::VerifyError::Hash) } else { Ok(content_hash) }
}

/// Checks an image file that will be handed out itself: its structure always, its content hash unless that was checked while
/// the file was in the state that it is in.
pub(crate) fn check_file(
    images: &Images,
    key: &ImageKey,
    file: &PublishedImage,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), engine::VerifyError> {
    let state = || file.fd_read_only.try_clone().ok().and_then(|fd| FileState::of(&File::from(fd)));
    let before = state();
    if let Some(before) = &before {
        let mapping = file.map().map_err(|_| engine::VerifyError::Hash)?;
        let claimed = CheckedImage::new(mapping.as_bytes())?.header().values().content_hash;
        if stamp::holds(&images.stamps, key, before, &claimed, SystemTime::now())
            && state().as_ref() == Some(before)
        {
            return Ok(());
        }
    }
    check_file_fully(images, key, file, progress)
}

/// As [`check_file`], whatever a stamp says; leaves one.
pub(crate) fn check_file_fully(
    images: &Images,
    key: &ImageKey,
    file: &PublishedImage,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<(), engine::VerifyError> {
    let state = || file.fd_read_only.try_clone().ok().and_then(|fd| FileState::of(&File::from(fd)));
    let before = state();
    before.iter().for_each(FileState::settle);
    let content_hash = check(file, progress)?;
    // A file that changed meanwhile was not checked in any one state.
    if let Some(before) = before.filter(|before| state().as_ref() == Some(before)) {
        stamp::write(&images.stamps, key, &before, &content_hash, SystemTime::now());
    }
    Ok(())
}

/// Removes images of earlier states of the same model. A failure costs disk space only.
fn clear_older(images: &ImageFile, model_id: &str, keep: &ImageKey) {
    let path = images.path_of(keep);
    let (Some(folder), Some(kept)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return;
    };
    let prefix = readable(model_id);
    let Ok(entries) = fs::read_dir(folder) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let stem = name.split('.').next().unwrap_or_default();
        let kept_stem = kept.split('.').next().unwrap_or_default();
        if name.starts_with(&prefix) && stem != kept_stem {
            let _ = fs::remove_file(folder.join(name));
        }
    }
}

/// Holds other loaders off while this one compiles; released when the file is closed, however the process ends.
fn lock(image_path: &Path) -> Result<File, LoadError> {
    let mut path = PathBuf::from(image_path).into_os_string();
    path.push(".lock");
    let failed = |e| OsError::new("locking the cache of compiled images", e);
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    file.lock().map_err(failed)?;
    Ok(file)
}

fn stage(name: &str, done_bytes: u64, total_bytes: u64) -> LoadProgress {
    LoadProgress { stage: name.to_owned(), done_bytes, total_bytes }
}

/// Hands the downloads' progress on.
struct Downloads<'a> {
    progress: &'a mut dyn FnMut(LoadProgress),
    stage: String,
    done: u64,
    total: u64,
}

impl Progress for Downloads<'_> {
    fn begin(&mut self, what: &str, total_bytes: Option<u64>) {
        self.stage = what.chars().take(120).collect();
        (self.done, self.total) = (0, total_bytes.unwrap_or(0));
        (self.progress)(stage(&self.stage, 0, self.total));
    }

    fn advance(&mut self, bytes: u64) {
        self.done = self.done.saturating_add(bytes);
        (self.progress)(stage(&self.stage, self.done, self.total));
    }

    fn end(&mut self) {}
}

//! Images in sealed anonymous memory: immutable for everyone, gone with their last user.

use std::os::fd::{AsFd, OwnedFd};

use super::writer::{ImageWriter, WritableObject};
use super::{BackingError, BackingKind, ImageBacking, ImageKey, PublishedImage, check_length};
use crate::memfd;

/// The default backing: a memfd sealed against writing and resizing. After its content was checked once nobody, not
/// even the same user or root, can change it.
#[derive(Clone, Copy, Debug, Default)]
pub struct SealedMemfd;

impl ImageBacking for SealedMemfd {
    fn kind(&self) -> BackingKind {
        BackingKind::SealedMemfd
    }

    fn reserve(&self, _key: &ImageKey, len_bytes: u64) -> Result<ImageWriter, BackingError> {
        check_length(len_bytes)?;
        ImageWriter::new(WritableObject::Memfd(memfd::create_writable_image(len_bytes)?), len_bytes)
    }

    fn open_existing(&self, _key: &ImageKey) -> Result<Option<PublishedImage>, BackingError> {
        Ok(None)
    }

    fn remove(&self, _key: &ImageKey) -> Result<bool, BackingError> {
        Ok(false)
    }
}

/// Seals a filled memory object; the writable descriptor ends here.
pub(super) fn publish(fd: OwnedFd) -> Result<PublishedImage, BackingError> {
    memfd::seal_image(fd.as_fd())?;
    PublishedImage::from_sealed(fd.as_fd())
}

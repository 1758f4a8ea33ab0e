//! The window through which an image is filled, the same for each backing. How it is published is the backing's.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memmap2::{Advice, MmapMut, MmapOptions};

use super::{BackingError, BackingKind, Guarantees, PublishedImage, image_file, posix_shm, sealed_memfd};
use crate::mapping::MappingError;
use crate::{OsError, sigbus};

/// An image being filled. Its memory is zero at first and private to this process until [`publish`](Self::publish)
/// is called; dropped without that it leaves nothing behind.
///
/// Fill it either through [`window`](Self::window), at any place in any order, or as a [`Write`] + [`Seek`] stream.
#[derive(Debug)]
pub struct ImageWriter {
    // Declared first: forgotten before the window's addresses are free for others.
    poison: Option<sigbus::Registration>,
    window: MmapMut,
    position_bytes: u64,
    object: WritableObject,
}

/// What lies under the window.
#[derive(Debug)]
pub(super) enum WritableObject {
    /// An unsealed memory object.
    Memfd(OwnedFd),
    /// A file without its final name.
    File(image_file::UnpublishedFile),
    /// An unlinked POSIX object.
    Shm(posix_shm::UnpublishedShm),
}

impl WritableObject {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Memfd(fd) => fd.as_fd(),
            Self::File(file) => file.as_fd(),
            Self::Shm(shm) => shm.as_fd(),
        }
    }

    fn kind(&self) -> BackingKind {
        match self {
            Self::Memfd(_) => BackingKind::SealedMemfd,
            Self::File(_) => BackingKind::ImageFile,
            Self::Shm(_) => BackingKind::PosixShm,
        }
    }
}

impl ImageWriter {
    /// The object has `len_bytes`, nobody else can write it, and its space is reserved.
    pub(super) fn new(object: WritableObject, len_bytes: u64) -> Result<Self, BackingError> {
        let len = usize::try_from(len_bytes).map_err(|_| MappingError::TooLong { len_bytes })?;
        // SAFETY: the object was just made by this process, nameless or under a name of this process's own in a
        // private folder, and is handed out only by publish, which ends the window first.
        let window = unsafe { MmapOptions::new().len(len).map_mut(object.fd().as_raw_fd()) }
            .map_err(|e| OsError::new("mapping an image to fill it", e))?;
        let _ = window.advise(Advice::HugePage);
        let poison = match Guarantees::of(object.kind()).size_is_fixed {
            true => None,
            false => Some(sigbus::register(window.as_ptr() as usize, len, sigbus::Replacement::Writable)?),
        };
        Ok(Self { poison, window, position_bytes: 0, object })
    }

    /// The whole image, writable.
    pub fn window(&mut self) -> &mut [u8] {
        &mut self.window
    }

    /// The image's length, bytes.
    pub fn len_bytes(&self) -> u64 {
        self.window.len() as u64
    }

    /// Which backing this writes to.
    pub fn kind(&self) -> BackingKind {
        self.object.kind()
    }

    /// Fills the whole image from a file of exactly the same length by the fastest way there is; `progress` is told
    /// the bytes copied so far and stops the copy by answering `false`.
    pub fn fill_from_file(
        &mut self,
        source: &File,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), BackingError> {
        super::copy::copy_file_into(source, self.object.fd(), self.window.len() as u64, progress)
    }

    /// Makes the image immutable (as far as the backing promises) and gives what clients receive. On any error
    /// nothing is left behind.
    pub fn publish(self) -> Result<PublishedImage, BackingError> {
        let Self { poison, window, object, .. } = self;
        let len_bytes = window.len() as u64;
        let poisoned = poison.as_ref().is_some_and(sigbus::Registration::is_poisoned);
        drop(poison);
        drop(window);
        if poisoned {
            return Err(BackingError::WriterPoisoned { place: object.kind().to_string() });
        }
        match object {
            WritableObject::Memfd(fd) => sealed_memfd::publish(fd),
            WritableObject::File(file) => file.publish(len_bytes),
            WritableObject::Shm(shm) => shm.publish(len_bytes),
        }
    }
}

impl AsFd for ImageWriter {
    /// The object being filled, for a loader child that fills it in this process's place.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.object.fd()
    }
}

impl Write for ImageWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let start = usize::try_from(self.position_bytes).unwrap_or(usize::MAX).min(self.window.len());
        let len = bytes.len().min(self.window.len() - start);
        if len == 0 && !bytes.is_empty() {
            let end_bytes = self.position_bytes.saturating_add(bytes.len() as u64);
            let error = BackingError::PastEnd { end_bytes, len_bytes: self.len_bytes() };
            return Err(io::Error::new(io::ErrorKind::WriteZero, error));
        }
        self.window[start..start + len].copy_from_slice(&bytes[..len]);
        self.position_bytes = (start + len) as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for ImageWriter {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let wanted = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len_bytes().checked_add_signed(by),
            SeekFrom::Current(by) => self.position_bytes.checked_add_signed(by),
        };
        match wanted.filter(|at| *at <= self.len_bytes()) {
            Some(at) => {
                self.position_bytes = at;
                Ok(at)
            }
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "seek outside the image reserved")),
        }
    }
}

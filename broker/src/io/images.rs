//! The check of an image that a loader hands over: seals or mode, size, header. Reads one page of it and nothing of any
//! model folder.

use crate::core::ImageFacts;
use shm_layout::image::{CheckedHeader, HEADER_BYTES, ImageError};
use shm_layout::limits::MAX_MODEL_NAME_BYTES;
use shm_layout::wire::{BackingKind, TaskFacts};
use shm_os::image_backing::{self, BackingError};
use std::os::fd::BorrowedFd;

/// Why what a loader handed over is not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageRefused {
    /// Not sealed, not read-only, of another size, or not mappable.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Its header is wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The loader calls the model by no usable name.
    #[error("the loader gave a model id of {0} bytes; it must have 1 to {MAX_MODEL_NAME_BYTES}")]
    BadModelId(usize),
    /// What the loader says of the model is not usable.
    #[error("the loader gave {0}")]
    Facts(&'static str),
}

/// Checks an image and reads from its header what clients are told.
///
/// # Errors
/// [`ImageRefused`] naming what is wrong.
pub(crate) fn check_image(
    fd: BorrowedFd<'_>,
    model_id: String,
    image_bytes: u64,
    backing: BackingKind,
    facts: TaskFacts,
) -> Result<ImageFacts, ImageRefused> {
    if model_id.is_empty() || model_id.len() > MAX_MODEL_NAME_BYTES {
        return Err(ImageRefused::BadModelId(model_id.len()));
    }
    facts.check().map_err(ImageRefused::Facts)?;
    let mapping = image_backing::map_published(fd, backing, image_bytes)?;
    let Some(head) = mapping.as_bytes().first_chunk::<HEADER_BYTES>() else {
        return Err(ImageError::TooShort { len_bytes: image_bytes }.into());
    };
    // Copied before it is parsed: a file may be changed by its owner while it is read.
    let head = *head;
    let header = CheckedHeader::parse(&head, image_bytes)?;
    let values = header.values();
    if values.task != facts.task {
        return Err(ImageRefused::Facts("another task than the image's"));
    }
    Ok(ImageFacts {
        model_id,
        output_dim: values.output_dim,
        max_seq_tokens: values.max_seq_tokens,
        image_bytes,
        fingerprint: values.fingerprint(),
        content_hash: values.content_hash,
        backing,
        facts,
        precision: values.precision.name(),
    })
}

//! The content hash: how it is computed over an image, and the check. Nothing about layout beyond that lives here.

use shm_layout::image::{CheckedImage, ImageError, content_hash_range};

/// Why an image's content is not what its compiler wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The image's structure is wrong.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The bytes changed after compiling.
    #[error("image content does not match its hash: it is corrupt; delete it and compile the model again")]
    Hash,
}

/// BLAKE3 of an image with the bytes of the hash field counted as zero. `bytes` must hold at least a header.
fn content_hash(bytes: &[u8]) -> [u8; 32] {
    let field = content_hash_range();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..field.start]);
    hasher.update(&[0; 32]);
    hasher.update(&bytes[field.end..]);
    *hasher.finalize().as_bytes()
}

/// Checks the structure of an image and that every byte is what the compiler wrote. Reads the whole image: about a second
/// for two gigabytes.
///
/// # Errors
/// [`VerifyError`] when the structure is wrong or the hash differs.
pub fn verify_image(bytes: &[u8]) -> Result<(), VerifyError> {
    let image = CheckedImage::new(bytes)?;
    if content_hash(bytes) == image.header().values().content_hash { Ok(()) } else { Err(VerifyError::Hash) }
}

//! Weights as bytes or floats, borrowed from an image. No copy is ever made here.

use shm_layout::image::{ImageBytes, TensorView};
use std::sync::Arc;

#[cfg(target_endian = "big")]
compile_error!("images are little-endian and are read in place; this target is not");

/// A tensor inside an image that is kept alive as long as this value.
#[derive(Clone)]
pub(crate) struct WeightSlice {
    image: Arc<dyn ImageBytes>,
    offset_bytes: usize,
    len_bytes: usize,
}

impl WeightSlice {
    /// `tensor`, a view into `image`.
    pub(crate) fn new(image: &Arc<dyn ImageBytes>, tensor: &TensorView<'_>) -> Self {
        WeightSlice {
            image: Arc::clone(image),
            offset_bytes: tensor.data_offset as usize,
            len_bytes: tensor.data.len(),
        }
    }

    /// The bytes. Empty when the image became shorter, which [`ImageBytes`] forbids; the kernels then refuse by length.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.image.as_bytes().get(self.offset_bytes..self.offset_bytes + self.len_bytes).unwrap_or(&[])
    }

    /// The floats. Empty when the image's bytes moved to an address that is not float-aligned or became shorter, which
    /// [`ImageBytes`] forbids; the kernels then refuse by length.
    pub(crate) fn floats(&self) -> &[f32] {
        let bytes = self.bytes();
        // SAFETY: every bit pattern is a valid f32, and `align_to` itself finds the part that is aligned; the borrow of
        // `self.image` keeps the bytes mapped and unwritten (the promise of `ImageBytes`).
        let (before, floats, after) = unsafe { bytes.align_to::<f32>() };
        if before.is_empty() && after.is_empty() { floats } else { &[] }
    }
}

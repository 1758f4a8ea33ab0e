//! Where an image's bytes come from: the trait that mappings implement, and an aligned heap copy for tests and tools.

use super::layout::PAGE_ALIGN_BYTES;

/// Memory that holds an image and stays where it is, unchanged, as long as the value lives.
///
/// Implementors promise that `as_bytes` returns the same address and length on every call, and that nobody writes to those
/// bytes while a value exists (a sealed memory object, or a private read-only file).
pub trait ImageBytes: Send + Sync + 'static {
    /// All bytes of the image.
    fn as_bytes(&self) -> &[u8];
}

/// An image on the heap, aligned like a mapping. A copy: for tests and tools, not for serving.
#[derive(Debug)]
pub struct HeapImage {
    storage: Box<[u8]>,
    start: usize,
    len_bytes: usize,
}

impl HeapImage {
    /// Copies `bytes` to page-aligned memory.
    pub fn new(bytes: &[u8]) -> Self {
        let align = PAGE_ALIGN_BYTES as usize;
        let mut storage = vec![0; bytes.len() + align].into_boxed_slice();
        // A boxed slice does not move, so the offset found here stays right.
        let start = match storage.as_ptr().align_offset(align) {
            offset if offset < align => offset,
            _ => 0,
        };
        storage[start..start + bytes.len()].copy_from_slice(bytes);
        HeapImage { storage, start, len_bytes: bytes.len() }
    }
}

impl ImageBytes for HeapImage {
    fn as_bytes(&self) -> &[u8] {
        &self.storage[self.start..self.start + self.len_bytes]
    }
}

//! Copying an image file into memory. What is copied must not be known here.
//!
//! By plain reads and writes: measured (example `backings`) they are as fast as sendfile, since giving out and clearing
//! fresh pages is what costs; copy_file_range does not cross file systems; a copy between two mappings takes twice as
//! long, by page faults.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use super::{BackingError, PublishedImage, check_length, sealed_memfd};
use crate::{OsError, memfd};

/// Bytes copied between two reports of progress.
pub const COPY_STEP_BYTES: u64 = 16 << 20;
/// Buffer of the plain way, bytes; small enough to stay in the L2 cache between its read and its write.
const BUFFER_BYTES: usize = 256 << 10;

/// Fills an unsealed memory object of `len_bytes` from the file's first bytes. The file must have exactly
/// `len_bytes`. `progress` is told the bytes copied so far, every [`COPY_STEP_BYTES`]; `false` stops the copy.
pub fn copy_file_into_memfd(
    source: &File,
    memfd: BorrowedFd<'_>,
    len_bytes: u64,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(), BackingError> {
    memfd::verify_size(memfd, len_bytes)?;
    copy_file_into(source, memfd, len_bytes, progress)
}

/// Copies a published image (or any file) of `len_bytes` into a new sealed memory object. Check its content hash on
/// the copy: from then on nobody can change it.
pub fn copy_image_into_sealed_memfd(
    source: &File,
    len_bytes: u64,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<PublishedImage, BackingError> {
    check_length(len_bytes)?;
    let fd = memfd::create_writable_image(len_bytes)?;
    copy_file_into(source, fd.as_fd(), len_bytes, progress)?;
    sealed_memfd::publish(fd)
}

pub(super) fn copy_file_into(
    source: &File,
    target: BorrowedFd<'_>,
    len_bytes: u64,
    progress: &mut dyn FnMut(u64) -> bool,
) -> Result<(), BackingError> {
    let source_len = source.metadata().map_err(|e| OsError::new("reading an image file's size", e))?.len();
    if source_len != len_bytes {
        return Err(BackingError::SourceChanged { expected_bytes: len_bytes, actual_bytes: source_len });
    }
    let target =
        File::from(target.try_clone_to_owned().map_err(|e| OsError::new("copying a descriptor", e))?);
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut done = 0;
    while done < len_bytes {
        let step_end = (done + COPY_STEP_BYTES).min(len_bytes);
        while done < step_end {
            let want = buffer.len().min(usize::try_from(step_end - done).unwrap_or(usize::MAX));
            let got = match source.read_at(&mut buffer[..want], done) {
                Ok(0) => {
                    return Err(BackingError::SourceChanged {
                        expected_bytes: len_bytes,
                        actual_bytes: done,
                    });
                }
                Ok(got) => got,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(OsError::new("reading an image file", e).into()),
            };
            target.write_all_at(&buffer[..got], done).map_err(|e| OsError::new("filling an image", e))?;
            done += got as u64;
        }
        if !progress(done) {
            return Err(BackingError::Cancelled);
        }
    }
    Ok(())
}

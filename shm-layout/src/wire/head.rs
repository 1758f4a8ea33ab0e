//! The sixteen bytes that open every frame.

use crate::limits::MAX_FRAME_BODY_BYTES;
use crate::table::{Field, assert_packed, offset_of};

/// Version of the protocol; both sides must have the same major number.
pub const PROTOCOL_MAJOR: u16 = 3;
/// Minor version: additions that an older peer of the same major version never sees unasked.
pub const PROTOCOL_MINOR: u16 = 0;
/// First four bytes of every frame, `MBF1` read as a little-endian number.
pub const MAGIC: u32 = u32::from_le_bytes(*b"MBF1");
/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 16;

/// The head of a frame, field by field.
pub const HEAD_FIELDS: &[Field] = &[
    Field { name: "magic", offset: 0, size: 4, kind: "u32", writer: "sender", meaning: "`MBF1`" },
    Field {
        name: "body_bytes",
        offset: 4,
        size: 4,
        kind: "u32",
        writer: "sender",
        meaning: "bytes of the body that follows",
    },
    Field {
        name: "request_id",
        offset: 8,
        size: 8,
        kind: "u64",
        writer: "sender",
        meaning: "chosen by the asker, repeated in every frame that answers it; 0 = answers nothing",
    },
];
const _: () = assert_packed(HEAD_FIELDS, HEAD_BYTES);
const MAGIC_AT: usize = offset_of(HEAD_FIELDS, "magic");
const BODY_BYTES_AT: usize = offset_of(HEAD_FIELDS, "body_bytes");
const REQUEST_ID_AT: usize = offset_of(HEAD_FIELDS, "request_id");

/// Why bytes are not the head of a frame. Each of these ends the connection: there is no way to find the next frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The first four bytes are not ours.
    #[error("not a modelbroker frame (it begins with {0:#010x})")]
    BadMagic(u32),
    /// The body would be longer than any frame may be.
    #[error("a frame of {0} bytes; the limit is {MAX_FRAME_BODY_BYTES}")]
    TooLong(u32),
}

/// A checked head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHead {
    /// Bytes of the body, at most [`MAX_FRAME_BODY_BYTES`].
    pub body_bytes: u32,
    /// Which request this frame asks or answers.
    pub request_id: u64,
}

impl FrameHead {
    /// Checks a head that a peer wrote.
    ///
    /// # Errors
    /// [`HeadError`] when it is not ours or announces too much.
    pub fn parse(bytes: &[u8; HEAD_BYTES]) -> Result<FrameHead, HeadError> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let magic = u32_at(MAGIC_AT);
        if magic != MAGIC {
            return Err(HeadError::BadMagic(magic));
        }
        let body_bytes = u32_at(BODY_BYTES_AT);
        if body_bytes as usize > MAX_FRAME_BODY_BYTES {
            return Err(HeadError::TooLong(body_bytes));
        }
        let mut id = [0; 8];
        id.copy_from_slice(&bytes[REQUEST_ID_AT..REQUEST_ID_AT + 8]);
        Ok(FrameHead { body_bytes, request_id: u64::from_le_bytes(id) })
    }

    /// The bytes of this head.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(&MAGIC.to_le_bytes());
        out[BODY_BYTES_AT..BODY_BYTES_AT + 4].copy_from_slice(&self.body_bytes.to_le_bytes());
        out[REQUEST_ID_AT..REQUEST_ID_AT + 8].copy_from_slice(&self.request_id.to_le_bytes());
        out
    }
}

//! The one place that knows how a frame's body is encoded: bincode 2, little-endian, fixed-width integers, with a decode
//! limit. `docs/protocol.md` writes that format down byte by byte, so the crate behind it can be replaced here.

use super::head::{FrameHead, HEAD_BYTES, HeadError};
use crate::limits::MAX_FRAME_BODY_BYTES;
use bincode::{Decode, Encode};

/// Why a body was not encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The message does not fit a frame.
    #[error("a message of {0} bytes; the limit is {MAX_FRAME_BODY_BYTES}")]
    TooLong(usize),
    /// The body is not such a message, or announces more than a frame can hold.
    #[error("a frame's body cannot be decoded: {0}")]
    Undecodable(String),
    /// Bytes are left over behind the message.
    #[error("{0} bytes behind the message in a frame's body")]
    Trailing(usize),
}

const fn config() -> impl bincode::config::Config {
    bincode::config::standard()
        .with_little_endian()
        .with_fixed_int_encoding()
        .with_limit::<MAX_FRAME_BODY_BYTES>()
}

/// Encodes one message as a whole frame: head and body.
///
/// # Errors
/// [`CodecError::TooLong`] when the body is over [`MAX_FRAME_BODY_BYTES`].
pub fn encode_frame<T: Encode>(request_id: u64, message: &T) -> Result<Vec<u8>, CodecError> {
    let mut frame = vec![0; HEAD_BYTES];
    let written = bincode::encode_into_std_write(message, &mut frame, config())
        .map_err(|e| CodecError::Undecodable(e.to_string()))?;
    if written > MAX_FRAME_BODY_BYTES {
        return Err(CodecError::TooLong(written));
    }
    // At most MAX_FRAME_BODY_BYTES, checked above.
    let head = FrameHead { body_bytes: written as u32, request_id };
    frame[..HEAD_BYTES].copy_from_slice(&head.to_bytes());
    Ok(frame)
}

/// Encodes one message as a frame's body has it: for payloads that are messages themselves.
///
/// # Errors
/// [`CodecError::TooLong`] when it is over [`MAX_FRAME_BODY_BYTES`].
pub fn encode_body<T: Encode>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut body = encode_frame(0, message)?;
    body.drain(..HEAD_BYTES);
    Ok(body)
}

/// Decodes the body of a frame; every byte must belong to the message.
///
/// # Errors
/// [`CodecError`]; never panics and never allocates more than a frame's limit, whatever the bytes are.
pub fn decode_body<T: Decode<()>>(body: &[u8]) -> Result<T, CodecError> {
    if body.len() > MAX_FRAME_BODY_BYTES {
        return Err(CodecError::TooLong(body.len()));
    }
    let (message, used) =
        bincode::decode_from_slice(body, config()).map_err(|e| CodecError::Undecodable(e.to_string()))?;
    if used != body.len() {
        return Err(CodecError::Trailing(body.len() - used));
    }
    Ok(message)
}

/// Collects bytes as they arrive and gives whole frames; holds at most one frame's limit.
#[derive(Debug, Default)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl FrameBuffer {
    /// An empty buffer.
    #[must_use]
    pub fn new() -> FrameBuffer {
        FrameBuffer::default()
    }

    /// Adds bytes that were read from the peer.
    pub fn extend(&mut self, bytes: &[u8]) {
        if self.start > 0 && (self.start == self.bytes.len() || self.start >= 64 * 1024) {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, `None` while it is incomplete.
    ///
    /// # Errors
    /// [`HeadError`] when what comes next is not a frame; the connection must end then.
    pub fn next_frame(&mut self) -> Result<Option<(FrameHead, Vec<u8>)>, HeadError> {
        let rest = &self.bytes[self.start..];
        let Some(head) = rest.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
        let head = FrameHead::parse(head)?;
        let end = HEAD_BYTES + head.body_bytes as usize;
        let Some(body) = rest.get(HEAD_BYTES..end) else { return Ok(None) };
        let body = body.to_vec();
        self.start += end;
        Ok(Some((head, body)))
    }

    /// Whether part of a frame has arrived and the rest has not: a peer may be slow, but not for ever.
    #[must_use]
    pub fn has_partial_frame(&self) -> bool {
        self.start < self.bytes.len()
    }

    /// Bytes held and not yet given out as frames.
    #[must_use]
    pub fn pending_bytes(&self) -> usize {
        self.bytes.len() - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::super::messages::{ClientMessage, Hello};
    use super::*;

    fn hello() -> ClientMessage {
        ClientMessage::Hello(Hello {
            protocol_major: 1,
            protocol_minor: 0,
            layout_hash: 7,
            client_name: "test".into(),
        })
    }

    #[test]
    fn frames_arrive_in_any_pieces() {
        let mut bytes = encode_frame(5, &hello()).unwrap();
        bytes.extend(encode_frame(6, &hello()).unwrap());
        let mut buffer = FrameBuffer::new();
        let mut seen = Vec::new();
        for byte in &bytes {
            buffer.extend(std::slice::from_ref(byte));
            while let Some((head, body)) = buffer.next_frame().unwrap() {
                assert_eq!(decode_body::<ClientMessage>(&body).unwrap(), hello());
                seen.push(head.request_id);
            }
        }
        assert_eq!(seen, [5, 6]);
        assert!(!buffer.has_partial_frame());
    }

    #[test]
    fn lies_are_refused() {
        let mut frame = encode_frame(5, &hello()).unwrap();
        frame[0] ^= 1;
        let mut buffer = FrameBuffer::new();
        buffer.extend(&frame);
        assert!(matches!(buffer.next_frame(), Err(HeadError::BadMagic(_))));
        frame[0] ^= 1;
        frame[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut buffer = FrameBuffer::new();
        buffer.extend(&frame);
        assert!(matches!(buffer.next_frame(), Err(HeadError::TooLong(_))));
        assert!(matches!(decode_body::<ClientMessage>(&[0xff; 32]), Err(CodecError::Undecodable(_))));
        let mut body = encode_frame(5, &hello()).unwrap().split_off(HEAD_BYTES);
        body.push(0);
        assert_eq!(decode_body::<ClientMessage>(&body), Err(CodecError::Trailing(1)));
    }
}

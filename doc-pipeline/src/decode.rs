//! Bytes of a file to text: UTF-8, or UTF-16 with a byte order mark. Nothing is replaced or guessed.

use std::borrow::Cow;

/// Why bytes are not text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Not UTF-8, and no byte order mark of another encoding.
    #[error(
        "invalid UTF-8 at byte {offset} (0x{byte:02x}): save the document as UTF-8, or as UTF-16 with a byte order mark"
    )]
    Utf8 {
        /// Offset in the file of the first byte that is not UTF-8.
        offset: usize,
        /// That byte.
        byte: u8,
    },
    /// A byte order mark of UTF-16, but a lone surrogate or half a character.
    #[error("invalid UTF-16 at byte {offset}: the file has a UTF-16 byte order mark but is damaged")]
    Utf16 {
        /// Offset in the file.
        offset: usize,
    },
    /// A NUL character: not a text document.
    #[error("NUL character at byte {offset} of the text: this looks like a binary file, not a document")]
    Binary {
        /// Offset in the decoded text.
        offset: usize,
    },
}

/// The text of a file, byte order mark removed.
pub fn decode(bytes: &[u8]) -> Result<Cow<'_, str>, DecodeError> {
    let text = match bytes {
        [0xFF, 0xFE, rest @ ..] => Cow::Owned(decode_utf16(rest, u16::from_le_bytes)?),
        [0xFE, 0xFF, rest @ ..] => Cow::Owned(decode_utf16(rest, u16::from_be_bytes)?),
        [0xEF, 0xBB, 0xBF, rest @ ..] => Cow::Borrowed(decode_utf8(rest, 3)?),
        _ => Cow::Borrowed(decode_utf8(bytes, 0)?),
    };
    match text.bytes().position(|byte| byte == 0) {
        Some(offset) => Err(DecodeError::Binary { offset }),
        None => Ok(text),
    }
}

fn decode_utf8(bytes: &[u8], skipped: usize) -> Result<&str, DecodeError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        DecodeError::Utf8 { offset: skipped + at, byte: bytes.get(at).copied().unwrap_or(0) }
    })
}

fn decode_utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String, DecodeError> {
    const BOM_BYTES: usize = 2;
    let (pairs, rest) = bytes.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(DecodeError::Utf16 { offset: BOM_BYTES + pairs.len() * 2 });
    }
    let mut text = String::with_capacity(bytes.len());
    let mut offset = BOM_BYTES;
    for decoded in char::decode_utf16(pairs.iter().map(|pair| unit(*pair))) {
        let character = decoded.map_err(|_| DecodeError::Utf16 { offset })?;
        offset += character.len_utf16() * 2;
        text.push(character);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn marks_are_removed() {
        assert_eq!(decode(b"\xEF\xBB\xBFhi").expect("text"), "hi");
        assert_eq!(decode(b"\xFF\xFEh\0i\0").expect("text"), "hi");
        assert_eq!(decode(b"\xFE\xFF\0h\0i").expect("text"), "hi");
    }

    #[test]
    fn errors_name_the_byte() {
        assert_eq!(decode(b"ab\xFFc"), Err(DecodeError::Utf8 { offset: 2, byte: 0xFF }));
        assert_eq!(decode(b"\xEF\xBB\xBFab\xC3"), Err(DecodeError::Utf8 { offset: 5, byte: 0xC3 }));
        assert_eq!(decode(b"\xFF\xFEh\0\x00\xD8"), Err(DecodeError::Utf16 { offset: 4 }));
        assert_eq!(decode(b"\xFF\xFEh\0i"), Err(DecodeError::Utf16 { offset: 4 }));
        assert_eq!(decode(b"a\0b"), Err(DecodeError::Binary { offset: 1 }));
    }

    proptest! {
        #[test]
        fn utf16_round_trips(text in "[^\u{0}]{0,40}") {
            let mut bytes = vec![0xFF, 0xFE];
            bytes.extend(text.encode_utf16().flat_map(u16::to_le_bytes));
            prop_assert_eq!(decode(&bytes).expect("valid UTF-16"), text);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }
    }
}

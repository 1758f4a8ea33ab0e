//! What a text is found by. Which model it is for does not stand in a key: each generation has a cache of its own.

/// Separates these hashes from all others that anybody makes of the same text.
const DOMAIN: &[u8] = b"modelbroker vector cache 1\0";
/// The options of plain embedding. Whatever changes a text's vector within a generation must stand here.
const PLAIN_OPTIONS: u64 = 0;

/// First 128 bits of BLAKE3 over domain, options and text. That many, and of a cryptographic hash, because clients share
/// the cache: nobody may be able to make a text that is answered with another's vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheKey {
    /// Bits 0 to 63; also the tag in the set's line. Never 0, which is the tag of an empty way.
    pub low: u64,
    /// Bits 64 to 127; choose the set.
    pub high: u64,
}

impl CacheKey {
    /// The key of a text that is embedded without any options.
    #[must_use]
    pub fn of_text(text: &str) -> CacheKey {
        let mut hasher = blake3::Hasher::new();
        hasher.update(DOMAIN).update(&PLAIN_OPTIONS.to_le_bytes()).update(text.as_bytes());
        let hash = hasher.finalize();
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&hash.as_bytes()[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        CacheKey::new(word(0), word(8))
    }

    /// A key of its two words, as they came from another process.
    #[must_use]
    pub const fn new(low: u64, high: u64) -> CacheKey {
        CacheKey { low: if low == 0 { 1 } else { low }, high }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_texts_apart_and_are_never_the_empty_tag() {
        assert_ne!(CacheKey::of_text("a"), CacheKey::of_text("b"));
        assert_ne!(CacheKey::of_text(""), CacheKey::of_text("\0"));
        assert_eq!(CacheKey::of_text("grüße"), CacheKey::of_text("grüße"));
        assert_eq!(CacheKey::new(0, 5), CacheKey { low: 1, high: 5 });
    }
}

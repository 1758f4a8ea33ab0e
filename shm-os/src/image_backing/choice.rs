//! Which backing an image is given: a kind for all, or one by its size. What the backings do must not be known here.

use super::BackingKind;

/// From this length on [`BackingChoice::Auto`] maps the image's file where it lies. Below it the copy into memory takes at
/// most about 0.3 s and buys that nobody can change the image.
pub const AUTO_FILE_BYTES: u64 = 512 << 20;

/// How the backing of an image is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingChoice {
    /// Sealed memory for images below [`AUTO_FILE_BYTES`], the image file for larger ones.
    #[default]
    Auto,
    /// This one for all.
    Always(BackingKind),
}

impl BackingChoice {
    /// Its name in settings: `auto`, or the kind's.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            BackingChoice::Auto => "auto",
            BackingChoice::Always(kind) => kind.name(),
        }
    }

    /// The kind for an image of this length.
    #[must_use]
    pub fn kind_for(self, len_bytes: u64) -> BackingKind {
        match self {
            BackingChoice::Always(kind) => kind,
            BackingChoice::Auto if len_bytes >= AUTO_FILE_BYTES => BackingKind::ImageFile,
            BackingChoice::Auto => BackingKind::SealedMemfd,
        }
    }
}

impl From<BackingKind> for BackingChoice {
    fn from(kind: BackingKind) -> BackingChoice {
        BackingChoice::Always(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_auto_looks_at_the_length() {
        assert_eq!(BackingChoice::Auto.kind_for(AUTO_FILE_BYTES - 1), BackingKind::SealedMemfd);
        assert_eq!(BackingChoice::Auto.kind_for(AUTO_FILE_BYTES), BackingKind::ImageFile);
        for kind in BackingKind::ALL {
            assert_eq!(BackingChoice::from(kind).kind_for(u64::MAX), kind);
            assert_eq!(BackingChoice::from(kind).name(), kind.name());
        }
    }
}

//! What an image may lie in, as messages and settings name it. How each is made and checked is not known here.

use super::{Decode, Encode};

/// What holds an image's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
#[repr(u8)]
pub enum BackingKind {
    /// An anonymous memory object, sealed against every change.
    SealedMemfd = 1,
    /// A read-only file in the cache folder.
    ImageFile = 2,
    /// A POSIX shared-memory object without a name.
    PosixShm = 3,
}

impl BackingKind {
    /// Each kind, in the order of its number.
    pub const ALL: [BackingKind; 3] =
        [BackingKind::SealedMemfd, BackingKind::ImageFile, BackingKind::PosixShm];

    /// The name in settings and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            BackingKind::SealedMemfd => "memfd",
            BackingKind::ImageFile => "file",
            BackingKind::PosixShm => "posix-shm",
        }
    }

    /// The number that stands for the kind.
    #[must_use]
    pub const fn as_u8(self) -> u8 {
        self as u8
    }

    /// The kind of a number that a peer wrote.
    #[must_use]
    pub fn from_u8(number: u8) -> Option<BackingKind> {
        BackingKind::ALL.into_iter().find(|kind| kind.as_u8() == number)
    }
}

impl std::fmt::Display for BackingKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no backing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no image backing: use memfd, file or posix-shm")]
pub struct UnknownBacking(
    /// What was given, cut to a readable length.
    pub String,
);

impl std::str::FromStr for BackingKind {
    type Err = UnknownBacking;

    fn from_str(text: &str) -> Result<BackingKind, UnknownBacking> {
        let unknown = || UnknownBacking(text.chars().take(32).collect());
        BackingKind::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(unknown)
    }
}

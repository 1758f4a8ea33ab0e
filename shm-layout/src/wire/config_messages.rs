//! What the messages say about the broker's configuration. Plain data; the order of fields is the encoding: append, never reorder.

use super::{Decode, Encode};

/// What became of a configuration that was read again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ConfigurationReloaded {
    /// What changed and takes effect, one line each.
    pub applied: Vec<String>,
    /// What changed and cannot take effect now, one line each, with what it needs.
    pub pending: Vec<String>,
}

//! Two configurations compared: what changed, and what of it a broker that runs can take up. Decides; does nothing.

use crate::problem::Origin;
use crate::resolve::{Effective, Setting};
use crate::table::{Live, find};
use crate::value::Value;
use std::collections::BTreeSet;

/// One key whose value changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The key.
    pub key: String,
    /// Its value before; [`Value::Unset`] where its model was not configured.
    pub from: Value,
    /// Its value now.
    pub to: Value,
    /// Where it comes from now.
    pub origin: Origin,
    /// When it takes effect.
    pub live: Live,
}

/// `key = from -> to`.
impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.from, self.to)
    }
}

/// What changed from one configuration to the next, in the order of the keys. Origins alone are no change.
#[must_use]
pub fn changes(from: &Effective, to: &Effective) -> Vec<Change> {
    let keys: BTreeSet<&String> = from.map().keys().chain(to.map().keys()).collect();
    let missing = Setting { value: Value::Unset, origin: Origin::Default };
    let mut changes = Vec::new();
    for key in keys {
        let old = from.map().get(key).unwrap_or(&missing);
        let new = to.map().get(key).unwrap_or(&missing);
        if old.value != new.value {
            changes.push(Change {
                key: key.clone(),
                from: old.value.clone(),
                to: new.value.clone(),
                origin: new.origin.clone(),
                live: find(key).map_or(Live::Restart, |named| named.spec.live),
            });
        }
    }
    changes
}

/// The configuration that holds in a running broker after `to` was read: what needs a restart stays as it was.
#[must_use]
pub fn in_force(from: &Effective, to: &Effective) -> Effective {
    let mut entries = to.map().clone();
    for (key, setting) in from.map() {
        if find(key).is_some_and(|named| named.spec.live == Live::Restart) {
            entries.insert(key.clone(), setting.clone());
        }
    }
    Effective::from_entries(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::ConfigFile;
    use crate::resolve::{Sources, resolve};

    fn with(text: &str) -> Effective {
        let file = Some(ConfigFile { path: "/c.toml".into(), text: text.into() });
        resolve(&Sources { file, ..Sources::default() }).unwrap()
    }

    #[test]
    fn changes_say_when_they_take_effect_and_restart_keys_stay() {
        let before = with("serve.threads = 1\nsharing.unload_after_seconds = 1800\n");
        let after =
            with("serve.threads = 2\n[sharing]\nunload_after_seconds = 60\n[models.x]\ntype = \"custom\"\n");
        let changed = changes(&before, &after);
        let shown: Vec<String> = changed.iter().map(ToString::to_string).collect();
        assert_eq!(shown[0], "models.x.batch_size: unset -> 32");
        assert_eq!(
            shown[shown.len() - 2..],
            ["serve.threads: 1 -> 2", "sharing.unload_after_seconds: 1800 -> 60"]
        );
        assert_eq!(changed.last().map(|c| c.live), Some(Live::Now));
        let held = in_force(&before, &after);
        assert_eq!((held.settings().serve.threads, held.settings().sharing.unload_after.as_secs()), (1, 60));
        assert_eq!(held.settings().models.len(), 3);
        // Said again at each reload, until the restart.
        assert_eq!(changes(&held, &after).len(), 1);
        assert!(changes(&before, &before).is_empty());
    }
}

//! Strict JSON helpers for foreign files: objects whose keys are unique, and integers with bounds. No file access.

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// A JSON object that refuses a repeated key and more than `MAX` keys; plain maps silently keep the last of two values,
/// so two readers of one file could see different things.
#[derive(Debug)]
pub(crate) struct UniqueMap<V, const MAX: usize>(pub(crate) BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>, const MAX: usize> Deserialize<'de> for UniqueMap<V, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor<V, const MAX: usize>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>, const MAX: usize> Visitor<'de> for MapVisitor<V, MAX> {
            type Value = UniqueMap<V, MAX>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = BTreeMap::new();
                while let Some((key, value)) = access.next_entry::<String, V>()? {
                    if map.len() >= MAX {
                        return Err(A::Error::custom(format!("more than {MAX} keys")));
                    }
                    if map.insert(key.clone(), value).is_some() {
                        return Err(A::Error::custom(format!("key {:?} appears twice", shorten(&key))));
                    }
                }
                Ok(UniqueMap(map))
            }
        }
        deserializer.deserialize_map(MapVisitor(PhantomData))
    }
}

/// At most 80 characters of a foreign string, so that error texts stay short.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

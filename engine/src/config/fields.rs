//! Typed access to the keys of a config.json, each with its range. What keys mean to a family is in `families`.

use super::{ConfigError, MAX_CONFIG_KEYS};
use crate::json::{UniqueMap, shorten};
use serde_json::Value;

/// Typed access to the keys of a config.json.
pub(super) struct Fields(UniqueMap<Value, MAX_CONFIG_KEYS>);

impl Fields {
    /// Parses an object with unique keys.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        serde_json::from_slice(bytes)
            .map(Fields)
            .map_err(|error| ConfigError::Json { reason: shorten(&error.to_string()) })
    }

    /// The value of a key; `None` also for null.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        self.0.0.get(field).filter(|value| !value.is_null())
    }

    /// The first of two keys that is there, else the second: models name the same number differently.
    pub(super) fn either(&self, first: &'static str, second: &'static str) -> &'static str {
        if self.get(first).is_some() { first } else { second }
    }

    /// Fails unless the key is missing, null, or `wanted`.
    pub(super) fn only(
        &self,
        field: &'static str,
        wanted: Value,
        supported: &'static str,
    ) -> Result<(), ConfigError> {
        let same = |value: &Value| match (value.as_f64(), wanted.as_f64()) {
            (Some(found), Some(wanted)) => found == wanted,
            _ => *value == wanted,
        };
        match self.get(field) {
            Some(value) if !same(value) => {
                Err(ConfigError::Unsupported { field, value: shorten(&value.to_string()), supported })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn flag(&self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        self.get(field).map_or(Ok(default), |value| {
            value.as_bool().ok_or(ConfigError::Field { field, wanted: "true or false" })
        })
    }

    pub(super) fn text(&self, field: &'static str) -> Result<&str, ConfigError> {
        self.0.0.get(field).and_then(Value::as_str).ok_or(ConfigError::Field { field, wanted: "a string" })
    }

    pub(super) fn number(
        &self,
        field: &'static str,
        low: u64,
        high: u64,
        default: Option<u64>,
    ) -> Result<usize, ConfigError> {
        let missing = ConfigError::Field { field, wanted: "an integer" };
        let value = match (self.0.0.get(field), default) {
            (None | Some(Value::Null), Some(default)) => return Ok(default as usize),
            (None | Some(Value::Null), None) => return Err(missing),
            (Some(value), _) if value.is_number() => value,
            _ => return Err(missing),
        };
        match value.as_u64() {
            Some(number) if (low..=high).contains(&number) => Ok(number as usize),
            _ => Err(ConfigError::Range { field, value: shorten(&value.to_string()), low, high }),
        }
    }

    pub(super) fn epsilon(&self, field: &'static str, default: f32) -> Result<f32, ConfigError> {
        let value = match self.0.0.get(field) {
            None | Some(Value::Null) => return Ok(default),
            Some(value) => value.as_f64().ok_or(ConfigError::Field { field, wanted: "a number" })?,
        };
        if value > 0.0 && value <= 0.1 {
            Ok(value as f32)
        } else {
            Err(ConfigError::Unsupported {
                field,
                value: value.to_string(),
                supported: "it must be above 0 and at most 0.1",
            })
        }
    }
}

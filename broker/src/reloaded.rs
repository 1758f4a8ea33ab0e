//! What a broker is told when its configuration was read again. Plain data; who reads it is whoever set the broker up, what
//! becomes of it is decided in `core::reconfigure`.

use crate::config::{BrokerConfig, ModelSettings};
use std::ffi::OsString;
use std::time::Duration;

/// What of a broker's configuration can change while it runs. Each field means what it means in [`BrokerConfig`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveSettings {
    /// Model given to clients that name none.
    pub default_model: String,
    /// Configured models; a changed source takes effect when the model is loaded next.
    pub models: Vec<ModelSettings>,
    /// How long a model without lease or job stays loaded.
    pub unload_after: Duration,
    /// Models loaded at once.
    pub max_shared_models: usize,
    /// Bytes that images and caches may take.
    pub memory_budget_bytes: Option<u64>,
    /// Whether loads, unloads and their like are logged.
    pub log_model_usage: bool,
    /// Whether memory that grows short is told as an alert.
    pub memory_monitoring: bool,
    /// Leave when no session existed for so long.
    pub idle_exit: Option<Duration>,
    /// Vectors that the caches of models loaded from now on hold.
    pub cache_entries: usize,
    /// How long the caches of models loaded from now on keep a vector.
    pub cache_ttl: Duration,
    /// Command of the loaders that are started from now on.
    pub loader_command: Vec<OsString>,
}

impl LiveSettings {
    /// Those of a configuration.
    #[must_use]
    pub fn of(config: &BrokerConfig) -> LiveSettings {
        LiveSettings {
            default_model: config.default_model.clone(),
            models: config.models.clone(),
            unload_after: config.unload_after,
            max_shared_models: config.max_shared_models,
            memory_budget_bytes: config.memory_budget_bytes,
            log_model_usage: config.log_model_usage,
            memory_monitoring: config.memory_monitoring,
            idle_exit: config.idle_exit,
            cache_entries: config.cache_entries,
            cache_ttl: config.cache_ttl,
            loader_command: config.loader_command.clone(),
        }
    }
}

/// A configuration that was read again and can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reloaded {
    /// What holds from now on.
    pub live: LiveSettings,
    /// What changed and takes effect, one line each, for log and answer.
    pub applied: Vec<String>,
    /// What changed and cannot take effect now, one line each, with what it needs.
    pub pending: Vec<String>,
}

/// Reads the configuration again. Called on a thread of its own, never in the event loop; an error says why nothing is to
/// change.
pub type ReadAgain = Box<dyn FnMut() -> Result<Reloaded, String> + Send>;

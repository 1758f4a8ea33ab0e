//! Orders to the broker about models: load, unload, reload, health. Leases and jobs are `model`'s.

use crate::client::{Client, unexpected};
use crate::error::SdkError;
use crate::session::Reply;
use crate::settings::{ModelRequest, StartBroker};
use crate::time::Deadline;
use shm_layout::wire::{ClientMessage, ModelCommand, ModelDescription, ModelOutcome, UnloadMode};
use std::time::Duration;

/// Time beyond the broker's own limit after which its answer is not waited for any more.
const ORDER_GRACE: Duration = Duration::from_secs(5);

/// A model that was loaded by order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedModel {
    /// What it is.
    pub description: ModelDescription,
    /// How long its load took.
    pub load_time: Duration,
    /// It was loaded before it was asked for.
    pub was_loaded: bool,
}

/// A model that was unloaded by order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnloadedModel {
    /// Its canonical id.
    pub model_id: String,
    /// Size of the image that broker and engine have let go of; 0 = it was not loaded.
    pub freed_bytes: u64,
    /// Somebody uses it still: its memory comes back when they let go of it.
    pub pending: bool,
}

/// A model that was replaced by a newly loaded generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReloadedModel {
    /// What it is now.
    pub description: ModelDescription,
    /// The generation before, if it was loaded.
    pub replaced: Option<u64>,
    /// How long the load took.
    pub load_time: Duration,
}

/// A model that has just computed what it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthyModel {
    /// What it is.
    pub description: ModelDescription,
    /// How long the engine computed.
    pub probe_time: Duration,
    /// The engine's process.
    pub engine_pid: u32,
}

impl Client {
    /// Has a model loaded, by id, alias or folder; `""` is the default model. Returns when it is served. It holds no lease:
    /// the model may be unloaded again when it is idle for as long as the broker is set up.
    ///
    /// # Errors
    /// [`SdkError::Refused`] when it cannot be had, as [`Client::model`]; `LOAD_TIMEOUT` when it takes longer than `wait`
    /// (it goes on loading).
    pub fn load_model(&self, name: &str, wait: Duration) -> Result<LoadedModel, SdkError> {
        let wait_ms = millis(wait);
        let start = self.core().settings.start;
        match self.order(name, start, wait, |model| ModelCommand::Load { model, wait_ms })? {
            ModelOutcome::Loaded { model, load_us, was_loaded } => {
                Ok(LoadedModel { description: model, load_time: Duration::from_micros(load_us), was_loaded })
            }
            other => Err(unexpected(&Reply::Model(Box::new(other)))),
        }
    }

    /// Has a model unloaded. Returns when broker and engine have let go of its memory, or at once where it is in use and
    /// `mode` says to wait or to take it away.
    ///
    /// # Errors
    /// [`SdkError::Refused`] with `MODEL_IN_USE`, naming who holds it, with [`UnloadMode::IfIdle`]; `MODEL_NOT_FOUND` for a
    /// name that the broker does not know.
    pub fn unload_model(&self, name: &str, mode: UnloadMode) -> Result<UnloadedModel, SdkError> {
        let patience = self.core().settings.patience();
        match self.order(name, StartBroker::Never, patience, |model| ModelCommand::Unload { model, mode })? {
            ModelOutcome::Unloaded { model_id, freed_bytes, pending } => {
                Ok(UnloadedModel { model_id, freed_bytes, pending })
            }
            other => Err(unexpected(&Reply::Model(Box::new(other)))),
        }
    }

    /// Has a model loaded anew beside the present generation and the two switched once the new one is served. No request
    /// fails meanwhile; whoever uses the model takes the new generation up by itself. A model that is not loaded is loaded.
    ///
    /// # Errors
    /// [`SdkError::Refused`] when the new one cannot be loaded: the old one stays. `LOAD_TIMEOUT` when it takes longer than
    /// `wait` (it goes on).
    pub fn reload_model(&self, name: &str, wait: Duration) -> Result<ReloadedModel, SdkError> {
        let wait_ms = millis(wait);
        match self.order(name, StartBroker::Never, wait, |model| ModelCommand::Reload { model, wait_ms })? {
            ModelOutcome::Reloaded { model, replaced, load_us } => Ok(ReloadedModel {
                description: model,
                replaced: (replaced != 0).then_some(replaced),
                load_time: Duration::from_micros(load_us),
            }),
            other => Err(unexpected(&Reply::Model(Box::new(other)))),
        }
    }

    /// Has the engine compute something known with a model, and compares.
    ///
    /// # Errors
    /// [`SdkError::Refused`] when the model is not loaded (`MODEL_UNAVAILABLE`), computes something else (`MODEL_INVALID`, `BAD_RESULT`), or
    /// the engine does not answer within `wait` (`DEADLINE_EXCEEDED`).
    pub fn model_health(&self, name: &str, wait: Duration) -> Result<HealthyModel, SdkError> {
        let wait_ms = millis(wait);
        match self.order(name, StartBroker::Never, wait, |model| ModelCommand::Health { model, wait_ms })? {
            ModelOutcome::Healthy { model, probe_us, engine_pid } => Ok(HealthyModel {
                description: model,
                probe_time: Duration::from_micros(probe_us),
                engine_pid,
            }),
            other => Err(unexpected(&Reply::Model(Box::new(other)))),
        }
    }

    fn order(
        &self,
        name: &str,
        start: StartBroker,
        wait: Duration,
        command: impl FnOnce(String) -> ModelCommand,
    ) -> Result<ModelOutcome, SdkError> {
        let request = ModelRequest::new(name);
        request.check()?;
        let message = ClientMessage::Model(command(request.resolved_name()));
        let deadline = Deadline::after(Some(wait.saturating_add(ORDER_GRACE)));
        match self.core().ask(&message, start, deadline)?.1 {
            Reply::Model(outcome) => Ok(*outcome),
            other => Err(unexpected(&other)),
        }
    }
}

fn millis(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis()).unwrap_or(u32::MAX)
}

//! Reading the configuration again: who asked, what is under way, what a new one changes. One reading at a time; who asks
//! while one is under way is answered by the next, since the file may have changed after it was read.

use super::{Action, Core, Policy};
use crate::config::ModelSettings;
use crate::reloaded::Reloaded;
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, ConfigurationReloaded};
use tracing::{info, warn};

/// Most requests to read the configuration again that wait. Beyond: `OVERLOADED`.
const MAX_RELOAD_WAITERS: usize = 64;
/// Most lines of what changed in an answer; the log has all.
const MAX_REPORTED_LINES: usize = 128;
/// Longest of these lines, bytes; what is over is cut.
const MAX_REPORTED_LINE_BYTES: usize = 256;
/// When a request that found too many others may be tried again, in ms.
const RETRY_RELOAD_MS: u32 = 1000;

/// Readings of the configuration.
#[derive(Debug, Default)]
pub(crate) struct Reconfigure {
    /// Sessions and requests that the reading under way answers; `None` = none is under way.
    reading: Option<Vec<(u64, u64)>>,
    /// Those that the next one answers.
    next: Vec<(u64, u64)>,
    /// A signal asked for the next one.
    next_by_signal: bool,
}

impl Core {
    /// SIGHUP arrived.
    pub(super) fn reload_signal(&mut self) {
        info!("signal: reading the configuration again");
        self.reconfigure.next_by_signal = true;
        self.read_next();
    }

    /// A client asks for it.
    pub(super) fn reload_wanted(&mut self, session: u64, request_id: u64, is_owner: bool) {
        if !is_owner {
            let message = "only the user who started the broker can have it read its configuration";
            self.refuse(session, request_id, Code::PermissionDenied, message, 0);
            return;
        }
        let waiting = self.reconfigure.next.len() + self.reconfigure.reading.as_ref().map_or(0, Vec::len);
        if waiting >= MAX_RELOAD_WAITERS {
            let message = format!("{waiting} requests to read the configuration wait already, the limit");
            self.refuse(session, request_id, Code::Overloaded, message, RETRY_RELOAD_MS);
            return;
        }
        self.reconfigure.next.push((session, request_id));
        self.read_next();
    }

    fn read_next(&mut self) {
        let Reconfigure { reading, next, next_by_signal } = &mut self.reconfigure;
        if reading.is_none() && (*next_by_signal || !next.is_empty()) {
            *reading = Some(std::mem::take(next));
            *next_by_signal = false;
            self.actions.push(Action::ReadConfiguration);
        }
    }

    /// It was read, or cannot be used: then nothing changes.
    pub(super) fn configuration_read(&mut self, now_ns: u64, outcome: Result<Reloaded, String>) {
        let asked = self.reconfigure.reading.take().unwrap_or_default();
        match outcome {
            Ok(reloaded) => {
                for line in &reloaded.applied {
                    info!(event = "config.applied", "{line}");
                }
                for line in &reloaded.pending {
                    warn!(event = "config.pending", "{line}");
                }
                info!(
                    event = "config.reloaded",
                    applied = reloaded.applied.len(),
                    pending = reloaded.pending.len(),
                    "configuration read again"
                );
                let answer = ConfigurationReloaded {
                    applied: reported(&reloaded.applied),
                    pending: reported(&reloaded.pending),
                };
                self.apply(now_ns, reloaded);
                for (session, request_id) in asked {
                    let message = BrokerMessage::ConfigurationReloaded(answer.clone());
                    self.send(session, request_id, message);
                }
            }
            Err(reason) => {
                warn!(
                    event = "config.refused",
                    "the configuration was read again and nothing changes: {reason}"
                );
                for (session, request_id) in asked {
                    self.refuse(session, request_id, Code::ConfigInvalid, reason.clone(), 0);
                }
            }
        }
        self.read_next();
    }

    fn apply(&mut self, now_ns: u64, reloaded: Reloaded) {
        let live = reloaded.live;
        self.config.policy = Policy {
            unload_after: live.unload_after,
            max_shared_models: live.max_shared_models,
            memory_budget_bytes: live.memory_budget_bytes,
            log_model_usage: live.log_model_usage,
        };
        self.config.default_model.clone_from(&live.default_model);
        self.config.idle_exit = live.idle_exit;
        self.config.memory_monitoring = live.memory_monitoring;
        self.config.caches = live.cache_entries > 0;
        self.actions.push(Action::Reconfigure {
            loader_command: live.loader_command,
            cache_entries: live.cache_entries,
            cache_ttl: live.cache_ttl,
        });
        self.configure_models_anew(now_ns, live.models);
    }

    /// The configured models are these from now on. An id whose source changed means the new one to whoever asks next; who
    /// holds the old one keeps it, and it leaves as any model does that nobody configured.
    fn configure_models_anew(&mut self, now_ns: u64, models: Vec<ModelSettings>) {
        let known = &mut self.models;
        for entry in known.entries.values_mut() {
            for id in std::mem::take(&mut entry.settings).ids {
                let is_own_name = entry.source == id || entry.canonical.as_ref() == Some(&id);
                if !is_own_name {
                    known.names.remove(&id);
                }
            }
        }
        for settings in models.iter().filter(|settings| settings.id != settings.source) {
            let means = known.names.get(&settings.id).and_then(|id| known.entries.get(id));
            // Somebody asked for it before it was configured: then it was taken for a name.
            if means.is_some_and(|entry| entry.source != settings.source) {
                known.names.remove(&settings.id);
            }
        }
        let preload = self.config.preload.clone();
        self.configure_models(now_ns, &models, &preload);
        self.config.models = models;
    }

    /// Nobody waits any more for what this session asked for.
    pub(super) fn forget_reloads(&mut self, session: u64) {
        let Reconfigure { reading, next, .. } = &mut self.reconfigure;
        for asked in reading.iter_mut().chain([next]) {
            asked.retain(|(of, _)| *of != session);
        }
    }
}

/// Lines as they fit into an answer.
fn reported(lines: &[String]) -> Vec<String> {
    let short = |line: &String| {
        let end = (0..=line.len().min(MAX_REPORTED_LINE_BYTES)).rev().find(|at| line.is_char_boundary(*at));
        line[..end.unwrap_or(0)].to_owned()
    };
    let mut kept: Vec<String> = lines.iter().take(MAX_REPORTED_LINES).map(short).collect();
    if lines.len() > MAX_REPORTED_LINES {
        kept.push(format!("and {} more, see the broker's log", lines.len() - MAX_REPORTED_LINES));
    }
    kept
}

//! Replacing a model while it is used: a new generation is loaded and served beside the old one, then new leases get it at
//! once, and sessions with leases on the old one are told. A reload that fails changes nothing.

use super::entry::Order;
use super::models::{EntryState, Reload};
use super::{Action, Core, ImageFacts};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, ModelOutcome, Refusal, Superseded};
use tracing::{info, warn};

impl Core {
    /// Puts a loaded model in line to be loaded once more. One reload serves all who ask for one while it waits; who asks
    /// when a loader is at work already is served by that one.
    pub(super) fn begin_reload(&mut self, now_ns: u64, id: u64) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        if entry.generation().is_some() && entry.reload.is_none() {
            entry.reload = Some(Reload::Queued);
            entry.requested_ns = now_ns;
        }
    }

    /// A loader has given the new generation of a loaded model.
    pub(super) fn reload_done(&mut self, now_ns: u64, id: u64, load_id: u64, facts: ImageFacts) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        if entry.canonical.as_deref().is_some_and(|canonical| canonical != facts.model_id) {
            let message = format!(
                "its source gives another model now, {}: ask for that by its name, or unload this one first",
                facts.model_id
            );
            self.actions.push(Action::DiscardImage { load_id });
            self.fail_reload(now_ns, id, Refusal { code: Code::ModelInvalid, message, retry_after_ms: 0 });
            return;
        }
        let Some(generation) = self.models.add_image(id, facts, now_ns) else {
            self.actions.push(Action::DiscardImage { load_id });
            return;
        };
        if let Some(entry) = self.models.entries.get_mut(&id) {
            entry.reload = Some(Reload::Warming { generation });
            self.metrics.loaded(entry.load_us);
        }
        self.actions.push(Action::KeepImage { load_id, generation });
        self.make_cache(now_ns, generation);
    }

    /// The engine serves a generation: if it was on its way to replace another, it does so now.
    pub(super) fn switch_if_warm(&mut self, now_ns: u64, generation: u64) {
        let Some(id) = self.models.images.get(&generation).map(|image| image.entry) else { return };
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        if entry.reload != Some(Reload::Warming { generation }) {
            return;
        }
        let replaced = entry.generation().unwrap_or(0);
        entry.reload = None;
        entry.state = EntryState::Loaded { generation };
        entry.last_use_ns = now_ns;
        entry.forget_probes();
        entry.counts.reloads = entry.counts.reloads.saturating_add(1);
        self.metrics.reloads += 1;
        let load_us = entry.load_us;
        let askers: Vec<_> = entry.askers.extract_if(.., |a| a.order == Order::Reload).collect();
        if self.config.policy.log_model_usage {
            let model = entry.name();
            info!(event = "model.reload.end", model, generation, replaced, load_us, "model reloaded");
        }
        let holders: Vec<(u64, u64)> = self
            .leases
            .iter_with_ids()
            .filter(|(_, _, lease)| self.models.images.get(&lease.generation).is_some_and(|i| i.entry == id))
            .filter(|(_, _, lease)| lease.generation != generation)
            .map(|(session, lease_id, _)| (session, lease_id))
            .collect();
        if replaced != 0 {
            self.actions.push(Action::SupersedeCache { generation: replaced, by: generation });
        }
        for (session, lease_id) in holders {
            self.send(session, 0, BrokerMessage::Superseded(Superseded { lease_id, generation }));
        }
        let Some(model) = self.models.images.get(&generation).map(|image| image.description.clone()) else {
            return;
        };
        for asker in askers {
            self.waits_no_more(asker.session);
            let outcome = ModelOutcome::Reloaded { model: model.clone(), replaced, load_us };
            self.send(asker.session, asker.request_id, BrokerMessage::Model(outcome));
        }
    }

    /// A reload failed: the old generation stays, and those who asked are told why.
    pub(super) fn fail_reload(&mut self, now_ns: u64, id: u64, refusal: Refusal) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        entry.reload = None;
        entry.planned_bytes = 0;
        entry.note_failure(&refusal, now_ns);
        self.metrics.load_failures += 1;
        warn!(
            event = "model.reload.failed",
            model = entry.name(),
            code = %refusal.code,
            "the old generation stays: {}",
            refusal.message
        );
        let askers: Vec<_> = entry.askers.extract_if(.., |a| a.order == Order::Reload).collect();
        let message = super::cut(format!("{}; the model stays as it was", refusal.message));
        self.refuse_askers(askers, &Refusal { message, ..refusal });
    }

    /// Gives up a reload that has become pointless.
    pub(super) fn cancel_reload(&mut self, now_ns: u64, id: u64, why: &str) {
        let Some(entry) = self.models.entries.get_mut(&id) else { return };
        if !entry.is_reloading() {
            return;
        }
        if let Some(load_id) = entry.load_id() {
            self.actions.push(Action::KillLoader { load_id });
        }
        let refusal = Refusal { code: Code::Cancelled, message: why.to_owned(), retry_after_ms: 0 };
        self.fail_reload(now_ns, id, refusal);
    }
}

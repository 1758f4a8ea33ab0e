//! Registration of providers, and leases on what they provide: who may offer what, who waits, what the end of a provider
//! leads to. Their jobs are `provided_jobs`.

use super::models::{ms_until, nanos};
use super::providers::{Offered, ProvidedWaiter, check_offer};
use super::relay::JobState;
use super::{Action, Core};
use shm_layout::code::Code;
use shm_layout::wire::{BrokerMessage, Leased, Provide, ProvidedReport, ProviderReport, Refusal};
use std::collections::BTreeSet;
use tracing::{info, warn};

/// When a client that found no provider may ask again, in ms.
const RETRY_ABSENT_MS: u32 = 1000;

impl Core {
    /// A session offers a model.
    pub(super) fn provide(&mut self, now_ns: u64, session: u64, request_id: u64, offer: Provide) {
        let refusal = match self.admit_offer(now_ns, session, &offer) {
            Ok(pid) => {
                let (model_id, kind) = (offer.model_id.clone(), offer.kind.clone());
                match self.providers.offer(session, pid, offer, &self.config.limits) {
                    Offered::Taken { generation, replaced } => {
                        info!(model = model_id, kind, session, pid, generation, "provider registered");
                        self.send(session, request_id, BrokerMessage::Provided { generation });
                        self.provider_came(now_ns, generation, replaced, &model_id);
                        return;
                    }
                    Offered::Again => (
                        Code::BadState,
                        format!("this session provides {model_id} already; offer a model once"),
                        0,
                    ),
                    Offered::Disagrees => (
                        Code::ModelInvalid,
                        format!(
                            "others provide {model_id} with another kind, fingerprint, operations or sizes; end them \
                             first, or choose another id"
                        ),
                        RETRY_ABSENT_MS,
                    ),
                    Offered::Full(what) => (
                        Code::TooMany,
                        format!("the limit of {what} is reached; end some first"),
                        RETRY_ABSENT_MS,
                    ),
                }
            }
            Err(refusal) => refusal,
        };
        let (code, message, retry_after_ms) = refusal;
        warn!(session, %code, "refused an offer: {message}");
        self.refuse(session, request_id, code, message, retry_after_ms);
    }

    /// Checks who offers and what; gives the offering process.
    fn admit_offer(&self, now_ns: u64, session: u64, offer: &Provide) -> Result<u32, (Code, String, u32)> {
        if self.leaving.has_begun() {
            return Err((Code::ShuttingDown, "the broker is leaving and takes no provider".into(), 100));
        }
        let Some(known) = self.sessions.get(session) else {
            return Err((Code::BadState, "no session".into(), 0));
        };
        // Providers see what everybody sends to their models.
        if known.uid != self.config.own_uid {
            let message = "only processes of the user who started the broker can provide models".to_owned();
            return Err((Code::PermissionDenied, message, 0));
        }
        if let Err(why) = check_offer(offer) {
            return Err((Code::ModelInvalid, why, 0));
        }
        if let Some(until_ns) = self.providers.banned_until_ns(known.pid, now_ns) {
            let message = "this process was dropped as a faulty provider; see the broker's log".to_owned();
            return Err((Code::ProviderFailed, message, ms_until(until_ns, now_ns)));
        }
        Ok(known.pid)
    }

    /// A provider can take jobs: those who waited for one get what they asked for.
    fn provider_came(&mut self, now_ns: u64, generation: u64, replaced: Option<u64>, model_id: &str) {
        if let Some(replaced) = replaced {
            // The model is another one; whoever waits with a job takes up a lease on that one and asks again.
            let held = self.relay.of_generation(replaced).filter(|(_, job)| job.state == JobState::Held);
            let held: Vec<u64> = held.map(|(id, _)| id).collect();
            for relay_id in held {
                self.answer_provided(relay_id, Code::Stale, "another model is provided under this id now");
            }
        }
        for waiter in self.providers.take_waiters(|waiter| waiter.model_id == model_id) {
            self.waits_no_more(waiter.session);
            self.grant_provided(waiter.session, waiter.request_id, generation);
        }
        self.give_jobs(now_ns, generation);
        self.note_idleness(now_ns);
    }

    /// A session takes no more jobs of a model.
    pub(super) fn withdraw(&mut self, now_ns: u64, session: u64, request_id: u64, model_id: &str) {
        match self.providers.withdraw(session, model_id) {
            Some(generation) => {
                info!(model = model_id, session, "provider withdraws");
                self.providers.note_absence(generation, now_ns);
                self.send(session, request_id, BrokerMessage::Withdrawn);
            }
            None => {
                let message = "this session does not provide this model".to_owned();
                self.refuse(session, request_id, Code::Stale, message, 0);
            }
        }
    }

    /// A session is gone: what it provided, others provide, or nobody.
    pub(super) fn provider_left(&mut self, now_ns: u64, session: u64) {
        for waiter in self.providers.take_waiters(|waiter| waiter.session == session) {
            self.waits_no_more(waiter.session);
        }
        for generation in self.providers.leave(session) {
            if let Some(model) = self.providers.models.get(&generation) {
                info!(model = model.offer.model_id, session, "provider gone");
            }
            self.providers.note_absence(generation, now_ns);
            self.jobs_lost_their_provider(now_ns, generation, session);
            self.give_jobs(now_ns, generation);
        }
        self.note_idleness(now_ns);
    }

    /// Grants a lease on a provided model, or lets the asker wait for a provider.
    pub(super) fn acquire_provided(
        &mut self,
        now_ns: u64,
        session: u64,
        request_id: u64,
        model_id: String,
        want_image: bool,
        wait_ms: u32,
    ) {
        if want_image {
            let message = format!(
                "{model_id} is computed by its provider and has no image here; lease the model that the provider uses"
            );
            self.refuse(session, request_id, Code::UnsupportedOperation, message, 0);
            return;
        }
        if let Some(generation) = self.providers.generation(&model_id)
            && self.providers.takers(generation) > 0
        {
            self.grant_provided(session, request_id, generation);
            return;
        }
        let mut wait_ns = u64::from(wait_ms) * 1_000_000;
        if !self.provider_children.has(&model_id) {
            // Nobody may ever come.
            wait_ns = wait_ns.min(nanos(self.config.limits.provider_return));
        }
        if let Some(known) = self.sessions.get_mut(session) {
            known.waiting += 1;
        }
        let deadline_ns = now_ns.saturating_add(wait_ns);
        self.providers.waiters.push(ProvidedWaiter { session, request_id, model_id, deadline_ns });
    }

    fn grant_provided(&mut self, session: u64, request_id: u64, generation: u64) {
        if self.sessions.get(session).is_none() {
            return;
        }
        let Some(model) = self.providers.models.get(&generation) else { return };
        let model = model.description(generation);
        let lease_id = self.leases.grant(session, generation, None);
        // No lane, whether one was asked for or not: the jobs travel as frames.
        let leased = Leased { lease_id, model, lane: None, image: false, cache: None };
        self.send(session, request_id, BrokerMessage::Leased(leased));
    }

    pub(super) fn provided_waiters_overdue(&mut self, now_ns: u64) {
        for waiter in self.providers.take_waiters(|waiter| waiter.deadline_ns <= now_ns) {
            let id = &waiter.model_id;
            let known = self.providers.generation(id).is_some() || self.provider_children.has(id);
            let (code, message) = if known {
                (
                    Code::ModelUnavailable,
                    format!("no provider of {id} is there just now; start it, or see its log"),
                )
            } else {
                (Code::ModelNotFound, format!("nobody provides {id}; start its provider"))
            };
            self.waits_no_more(waiter.session);
            let refusal = Refusal { code, message, retry_after_ms: RETRY_ABSENT_MS };
            self.send(waiter.session, waiter.request_id, BrokerMessage::Refused(refusal));
        }
    }

    /// Tells those who wait for a provider that they get nothing: the broker leaves.
    pub(super) fn refuse_provided_waiters(&mut self, refusal: &Refusal) {
        for waiter in self.providers.take_waiters(|_| true) {
            self.waits_no_more(waiter.session);
            self.send(waiter.session, waiter.request_id, BrokerMessage::Refused(refusal.clone()));
        }
    }

    /// Notes something that a provider did wrong; at the limit it is dropped, and what it had goes to others.
    pub(super) fn provider_fault(&mut self, now_ns: u64, session: u64, what: &str) {
        let Some(provider) = self.providers.sessions.get_mut(&session) else { return };
        provider.faults += 1;
        let (pid, faults) = (provider.pid, provider.faults);
        warn!(session, pid, faults, "a provider is at fault: {what}");
        let generations: Vec<u64> =
            self.providers.places.keys().filter(|(_, of)| *of == session).map(|(g, _)| *g).collect();
        for generation in generations {
            if let Some(model) = self.providers.models.get_mut(&generation) {
                model.last_fault = Some(super::cut(what.to_owned()));
            }
        }
        if faults >= self.config.limits.provider_faults {
            self.providers.ban(pid, now_ns, &self.config.limits);
            if let Some(child) = self.provider_children.of_pid(pid) {
                // The next one is a new process.
                self.actions.push(Action::KillProvider { child });
            }
            let message = format!("dropped as a faulty provider after {faults} faults; the last one: {what}");
            self.fault(now_ns, session, Code::ProviderFailed, &message);
        }
    }

    /// Lets go of provided models that nobody provides, leases or waits for any more.
    pub(super) fn retire_provided(&mut self, now_ns: u64) {
        while let Some((_, generation)) = self.next_retirement().filter(|(due_ns, _)| *due_ns <= now_ns) {
            self.providers.forget(generation);
        }
    }

    /// The provided model that is forgotten next, and when.
    fn next_retirement(&self) -> Option<(u64, u64)> {
        let return_ns = nanos(self.config.limits.provider_return);
        let absent = self.providers.models.iter().filter_map(|(generation, model)| {
            let since_ns = model.absent_since_ns?;
            let used = self.providers.places_of(*generation).next().is_some()
                || self.leases.holds(*generation)
                || self.relay.of_generation(*generation).next().is_some();
            let stay_ns = if self.providers.is_current(*generation) { return_ns } else { 0 };
            (!used).then_some((since_ns.saturating_add(stay_ns), *generation))
        });
        absent.min()
    }

    /// When something about providers is due: their jobs, those who wait, what is to be forgotten, children.
    pub(super) fn providers_timer_ns(&self) -> Option<u64> {
        let waiters = self.providers.waiters.iter().map(|waiter| waiter.deadline_ns).min();
        [waiters, self.next_retirement().map(|(due_ns, _)| due_ns), self.provided_jobs_timer_ns()]
            .into_iter()
            .flatten()
            .min()
    }

    /// A broker whose only sessions are those of its providers is idle.
    pub(super) fn note_idleness(&mut self, now_ns: u64) {
        if self.sessions.iter().all(|(_, known)| self.providers.is_provider(known.pid)) {
            self.idle_since_ns.get_or_insert(now_ns);
        } else {
            self.idle_since_ns = None;
        }
    }

    /// The state of every provided model, those that were never offered and have processes counted.
    pub(super) fn provided_report(&self, now_ns: u64) -> Vec<ProvidedReport> {
        let mut reports: Vec<ProvidedReport> = self
            .providers
            .models
            .iter()
            .filter(|(generation, _)| self.providers.is_current(**generation))
            .map(|(generation, model)| {
                let offer = model.offer.clone();
                let providers = self.providers.places_of(*generation).map(|(session_id, place)| {
                    let provider = self.providers.sessions.get(&session_id).copied().unwrap_or_default();
                    ProviderReport {
                        session_id,
                        pid: provider.pid,
                        in_flight: u32::try_from(place.in_flight).unwrap_or(u32::MAX),
                        max_in_flight: u32::try_from(place.max_in_flight).unwrap_or(u32::MAX),
                        faults: provider.faults,
                        withdrawn: place.withdrawn,
                    }
                });
                let held = self.leases.iter().filter(|(_, lease)| lease.generation == *generation);
                let holders: Vec<u64> = held.map(|(session, _)| session).collect();
                let pids: BTreeSet<u32> =
                    holders.iter().filter_map(|session| self.sessions.get(*session).map(|s| s.pid)).collect();
                let queued = self.relay.of_generation(*generation);
                let queued = queued.filter(|(_, job)| job.state == JobState::Held).count();
                ProvidedReport {
                    model_id: offer.model_id,
                    generation: *generation,
                    kind: offer.kind,
                    description: offer.description,
                    input_kind: offer.input_kind,
                    output_kind: offer.output_kind,
                    operations: offer.operations,
                    output_dim: offer.output_dim,
                    fingerprint: offer.fingerprint,
                    providers: providers.collect(),
                    leases: u32::try_from(holders.len()).unwrap_or(u32::MAX),
                    lease_pids: pids.into_iter().collect(),
                    queued_jobs: u32::try_from(queued).unwrap_or(u32::MAX),
                    absent_us: model
                        .absent_since_ns
                        .map_or(0, |since| now_ns.saturating_sub(since).max(1000) / 1000),
                    totals: model.totals,
                    last_fault: model.last_fault.clone(),
                    children: Vec::new(),
                }
            })
            .collect();
        self.provider_children.report_into(&mut reports);
        reports
    }
}

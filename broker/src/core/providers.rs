//! Which models clients' processes provide, by whom, who waits for one, and which processes the broker keeps running for
//! them. Pure bookkeeping: registration is decided in `provide`, jobs in `provided_jobs`, processes in `provider_children`.

use super::models::nanos;
use crate::config::Limits;
use shm_layout::image::Task;
use shm_layout::limits::{
    MAX_PAYLOAD_BYTES, MAX_PROVIDED_ID_BYTES, MAX_PROVIDED_KIND_BYTES, MAX_PROVIDED_TEXT_BYTES,
    MAX_PROVIDER_IN_FLIGHT, MAX_PROVIDER_JOB_MS,
};
use shm_layout::wire::TaskFacts;
use shm_layout::wire::{
    BackingKind, ModelDescription, Operation, PROVIDED_GENERATION, PROVIDED_PREFIX, Provide, ProvidedTotals,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// One provided model.
#[derive(Debug, Clone)]
pub(crate) struct Provided {
    /// What was offered first; who offers the same id later must agree in what clients see of it.
    pub(crate) offer: Provide,
    /// Since when nobody takes jobs for it.
    pub(crate) absent_since_ns: Option<u64>,
    pub(crate) totals: ProvidedTotals,
    pub(crate) last_fault: Option<String>,
    /// Interactive jobs given in a row while bulk work waited.
    pub(crate) interactive_run: u32,
}

/// One session's offer of one model.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) max_in_flight: usize,
    pub(crate) job_timeout_ns: u64,
    pub(crate) in_flight: usize,
    pub(crate) in_flight_bytes: usize,
    /// It has a job that must be alone with its provider.
    pub(crate) alone: bool,
    /// It takes no more jobs.
    pub(crate) withdrawn: bool,
    /// Counts up with each job given, so that equals take turns.
    last_given: u64,
}

/// One session that provides something.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Provider {
    pub(crate) pid: u32,
    pub(crate) faults: u32,
}

/// A request for a lease that waits for a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProvidedWaiter {
    pub(crate) session: u64,
    pub(crate) request_id: u64,
    pub(crate) model_id: String,
    pub(crate) deadline_ns: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Providers {
    pub(crate) models: BTreeMap<u64, Provided>,
    /// The generation that a name means now.
    current: HashMap<String, u64>,
    /// By generation and session.
    pub(crate) places: BTreeMap<(u64, u64), Place>,
    pub(crate) sessions: BTreeMap<u64, Provider>,
    pub(crate) waiters: Vec<ProvidedWaiter>,
    /// Processes that were dropped as faulty, and until when they may not come back.
    banned: BTreeMap<u32, u64>,
    last_generation: u64,
    given: u64,
}

/// Why an offer cannot be accepted as it is, in words.
pub(crate) type Unacceptable = String;

/// Whether an id is one that a provider may offer.
pub(crate) fn check_id(model_id: &str) -> Result<(), Unacceptable> {
    let rest = model_id.strip_prefix(PROVIDED_PREFIX).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    if rest.is_empty() || !rest.chars().all(plain) || model_id.len() > MAX_PROVIDED_ID_BYTES {
        return Err(format!(
            "{:?} is no id of a provided model: use `{PROVIDED_PREFIX}` and letters, digits, `.`, `_`, `-` or `/`, at most \
             {MAX_PROVIDED_ID_BYTES} bytes in all",
            model_id.chars().take(MAX_PROVIDED_ID_BYTES).collect::<String>()
        ));
    }
    Ok(())
}

/// Whether every number and text of an offer is within its bounds.
pub(crate) fn check_offer(offer: &Provide) -> Result<(), Unacceptable> {
    check_id(&offer.model_id)?;
    let texts = [
        ("kind", &offer.kind, MAX_PROVIDED_KIND_BYTES),
        ("description", &offer.description, MAX_PROVIDED_TEXT_BYTES),
        ("input_kind", &offer.input_kind, MAX_PROVIDED_TEXT_BYTES),
        ("output_kind", &offer.output_kind, MAX_PROVIDED_TEXT_BYTES),
    ];
    for (name, text, most) in texts {
        if text.len() > most {
            return Err(format!("{name} has {} bytes; the limit is {most}", text.len()));
        }
        if text.chars().any(char::is_control) {
            return Err(format!("{name} holds control characters; leave them out"));
        }
    }
    let numbers = [
        ("max_in_flight", offer.max_in_flight, u64::from(MAX_PROVIDER_IN_FLIGHT)),
        ("max_input_bytes", offer.max_input_bytes, MAX_PAYLOAD_BYTES as u64),
        ("max_output_bytes", offer.max_output_bytes, MAX_PAYLOAD_BYTES as u64),
        ("job_timeout_ms", offer.job_timeout_ms, u64::from(MAX_PROVIDER_JOB_MS)),
    ];
    for (name, number, most) in numbers {
        if !(1..=most).contains(&u64::from(number)) {
            return Err(format!("{name} is {number}; it must be from 1 to {most}"));
        }
    }
    let operations: BTreeSet<u16> = offer.operations.iter().map(|o| *o as u16).collect();
    if operations.is_empty() || operations.len() != offer.operations.len() {
        return Err("the operations are none, or one of them twice; name each once".to_owned());
    }
    let possible = |o: &Operation| matches!(o, Operation::Call | Operation::Embed | Operation::Tokenize);
    if let Some(other) = offer.operations.iter().find(|o| !possible(o)) {
        return Err(format!(
            "{other:?} is not among the operations that can be offered: Call, Embed (EmbedFresh comes as that) and Tokenize"
        ));
    }
    if offer.operations.contains(&Operation::Embed) != (offer.output_dim > 0)
        || offer.output_dim as usize > MAX_PAYLOAD_BYTES / 4
    {
        return Err(format!(
            "output_dim is {}; it must be the length of a vector, at most {}, where Embed is offered, else 0",
            offer.output_dim,
            MAX_PAYLOAD_BYTES / 4
        ));
    }
    Ok(())
}

/// What two offers of one model must agree in: all that a client sees of it.
fn agrees(a: &Provide, b: &Provide) -> bool {
    let seen = |o: &Provide| {
        let mut operations: Vec<u16> = o.operations.iter().map(|op| *op as u16).collect();
        operations.sort_unstable();
        let sizes = [o.output_dim, o.max_seq_tokens, o.max_input_bytes, o.max_output_bytes];
        (o.kind.clone(), o.fingerprint, operations, sizes)
    };
    seen(a) == seen(b)
}

/// What became of an offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offered {
    /// It is taken. A generation that it replaces is named: nobody provides that any more.
    Taken { generation: u64, replaced: Option<u64> },
    /// This session offers the model already.
    Again,
    /// Others offer the same id and something else under it.
    Disagrees,
    /// A limit is reached, in words.
    Full(&'static str),
}

impl Providers {
    /// Takes an offer that was found acceptable.
    pub(crate) fn offer(&mut self, session: u64, pid: u32, offer: Provide, limits: &Limits) -> Offered {
        if self.places.len() >= limits.max_providers {
            return Offered::Full("providers of all models");
        }
        if self.places.keys().filter(|(_, of)| *of == session).count() >= limits.max_provides_per_session {
            return Offered::Full("models provided by one session");
        }
        let known = self.current.get(&offer.model_id).copied();
        let mut replaced = None;
        let same = known.filter(|generation| {
            self.models.get(generation).is_some_and(|model| agrees(&model.offer, &offer))
        });
        let generation = match (same, known) {
            (Some(generation), _) if self.places.contains_key(&(generation, session)) => {
                return Offered::Again;
            }
            (Some(generation), _) => generation,
            (None, Some(other)) if self.takers(other) > 0 => return Offered::Disagrees,
            (None, other) => {
                if self.models.len() >= limits.max_provided {
                    return Offered::Full("provided models");
                }
                replaced = other;
                self.last_generation += 1;
                let generation = PROVIDED_GENERATION | self.last_generation;
                self.current.insert(offer.model_id.clone(), generation);
                let totals = other.and_then(|other| self.models.get(&other)).map(|m| m.totals);
                let model = Provided {
                    offer: offer.clone(),
                    absent_since_ns: None,
                    totals: totals.unwrap_or_default(),
                    last_fault: None,
                    interactive_run: 0,
                };
                self.models.insert(generation, model);
                generation
            }
        };
        let place = Place {
            max_in_flight: offer.max_in_flight as usize,
            job_timeout_ns: u64::from(offer.job_timeout_ms) * 1_000_000,
            in_flight: 0,
            in_flight_bytes: 0,
            alone: false,
            withdrawn: false,
            last_given: self.given,
        };
        self.places.insert((generation, session), place);
        self.sessions.entry(session).or_insert(Provider { pid, faults: 0 });
        if let Some(model) = self.models.get_mut(&generation) {
            model.absent_since_ns = None;
        }
        Offered::Taken { generation, replaced }
    }

    /// Those who take jobs of a generation.
    pub(crate) fn takers(&self, generation: u64) -> usize {
        self.places_of(generation).filter(|(_, place)| !place.withdrawn).count()
    }

    /// Each session's place of a generation.
    pub(crate) fn places_of(&self, generation: u64) -> impl Iterator<Item = (u64, &Place)> {
        self.places
            .range((generation, 0)..=(generation, u64::MAX))
            .map(|((_, session), place)| (*session, place))
    }

    /// The generation that a name means, whether anybody serves it just now or not.
    pub(crate) fn generation(&self, model_id: &str) -> Option<u64> {
        self.current.get(model_id).copied()
    }

    /// Whether a generation is what its name means.
    pub(crate) fn is_current(&self, generation: u64) -> bool {
        let name = self.models.get(&generation).map(|model| &model.offer.model_id);
        name.and_then(|name| self.current.get(name)) == Some(&generation)
    }

    /// Takes a session's place off new jobs; gives its generation.
    pub(crate) fn withdraw(&mut self, session: u64, model_id: &str) -> Option<u64> {
        let generation = self.generation(model_id)?;
        self.places.get_mut(&(generation, session))?.withdrawn = true;
        Some(generation)
    }

    /// Forgets a session that is gone; gives the generations that it provided.
    pub(crate) fn leave(&mut self, session: u64) -> Vec<u64> {
        if self.sessions.remove(&session).is_none() {
            return Vec::new();
        }
        let theirs: Vec<u64> =
            self.places.keys().filter(|(_, of)| *of == session).map(|(generation, _)| *generation).collect();
        for generation in &theirs {
            self.places.remove(&(*generation, session));
        }
        theirs
    }

    /// Notes since when nobody takes a generation's jobs.
    pub(crate) fn note_absence(&mut self, generation: u64, now_ns: u64) {
        if self.takers(generation) == 0
            && let Some(model) = self.models.get_mut(&generation)
        {
            model.absent_since_ns.get_or_insert(now_ns);
        }
    }

    /// Who gets the next job: the one with the fewest, in turns. `alone`: only one that has none.
    pub(crate) fn choose(
        &self,
        generation: u64,
        alone: bool,
        payload_bytes: usize,
        most_bytes: usize,
    ) -> Option<u64> {
        let free = |place: &Place| {
            !place.withdrawn
                && !place.alone
                && place.in_flight < place.max_in_flight
                && (place.in_flight == 0
                    || (!alone && place.in_flight_bytes.saturating_add(payload_bytes) <= most_bytes))
        };
        self.places_of(generation)
            .filter(|(_, place)| free(place))
            .min_by_key(|(session, place)| (place.in_flight, place.last_given, *session))
            .map(|(session, _)| session)
    }

    /// A provider gets a job.
    pub(crate) fn give(&mut self, generation: u64, session: u64, alone: bool, payload_bytes: usize) {
        self.given += 1;
        if let Some(place) = self.places.get_mut(&(generation, session)) {
            place.in_flight += 1;
            place.in_flight_bytes += payload_bytes;
            place.alone = alone;
            place.last_given = self.given;
        }
    }

    /// A provider has let go of a job.
    pub(crate) fn take_back(&mut self, generation: u64, session: u64, payload_bytes: usize) {
        if let Some(place) = self.places.get_mut(&(generation, session)) {
            place.in_flight = place.in_flight.saturating_sub(1);
            place.in_flight_bytes = place.in_flight_bytes.saturating_sub(payload_bytes);
            // A job that must be alone is the only one.
            place.alone = false;
        }
    }

    /// Keeps a process from coming back for a while.
    pub(crate) fn ban(&mut self, pid: u32, now_ns: u64, limits: &Limits) {
        self.banned.retain(|_, until_ns| *until_ns > now_ns);
        if self.banned.len() < limits.max_providers {
            self.banned.insert(pid, now_ns.saturating_add(nanos(limits.provider_ban)));
        }
    }

    /// Until when a process may not come back.
    pub(crate) fn banned_until_ns(&self, pid: u32, now_ns: u64) -> Option<u64> {
        self.banned.get(&pid).copied().filter(|until_ns| *until_ns > now_ns)
    }

    /// Whether this process provides something.
    pub(crate) fn is_provider(&self, pid: u32) -> bool {
        self.sessions.values().any(|provider| provider.pid == pid)
    }

    /// Takes out the waiters for which `gone` holds.
    pub(crate) fn take_waiters(
        &mut self,
        mut gone: impl FnMut(&ProvidedWaiter) -> bool,
    ) -> Vec<ProvidedWaiter> {
        self.waiters.extract_if(.., |waiter| gone(waiter)).collect()
    }

    /// Forgets a generation.
    pub(crate) fn forget(&mut self, generation: u64) {
        let Some(model) = self.models.remove(&generation) else { return };
        if self.current.get(&model.offer.model_id) == Some(&generation) {
            self.current.remove(&model.offer.model_id);
        }
    }
}

impl Provided {
    /// What a client that leases it is told.
    pub(crate) fn description(&self, generation: u64) -> ModelDescription {
        ModelDescription {
            model_id: self.offer.model_id.clone(),
            generation,
            output_dim: self.offer.output_dim,
            max_seq_tokens: self.offer.max_seq_tokens,
            image_bytes: 0,
            fingerprint: self.offer.fingerprint,
            content_hash: [0; 32],
            backing: BackingKind::SealedMemfd,
            facts: TaskFacts::of(Task::Embed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::offer;
    use super::*;

    #[test]
    fn offers_are_checked_field_by_field() {
        assert_eq!(check_offer(&offer("custom/x")), Ok(()));
        for id in
            ["x", "custom/", "custom/a b", "custom/ä", "/custom/x", &format!("custom/{}", "x".repeat(200))]
        {
            assert!(check_id(id).is_err(), "{id}");
        }
        type Change = fn(&mut Provide);
        let bad: [(&str, Change); 10] = [
            ("kind", |o| o.kind = "x".repeat(65)),
            ("description", |o| o.description = "a\nb".into()),
            ("max_in_flight", |o| o.max_in_flight = 0),
            ("max_input_bytes", |o| o.max_input_bytes = u32::MAX),
            ("max_output_bytes", |o| o.max_output_bytes = 0),
            ("job_timeout_ms", |o| o.job_timeout_ms = MAX_PROVIDER_JOB_MS + 1),
            ("operations", |o| o.operations = vec![Operation::Call; 2]),
            ("EmbedFresh", |o| o.operations = vec![Operation::EmbedFresh]),
            ("Generate", |o| o.operations.push(Operation::Generate)),
            ("output_dim", |o| o.output_dim = 3),
        ];
        for (name, change) in bad {
            let mut changed = offer("custom/x");
            change(&mut changed);
            let why = check_offer(&changed).unwrap_err();
            assert!(why.contains(name), "{name}: {why}");
        }
    }

    #[test]
    fn one_id_is_one_model_until_nobody_provides_it() {
        let limits =
            Limits { max_provided: 2, max_providers: 3, max_provides_per_session: 2, ..Limits::default() };
        let mut providers = Providers::default();
        let Offered::Taken { generation, replaced: None } =
            providers.offer(1, 10, offer("custom/x"), &limits)
        else {
            panic!()
        };
        assert_eq!(providers.offer(1, 10, offer("custom/x"), &limits), Offered::Again);
        let other = Provide { fingerprint: 9, ..offer("custom/x") };
        assert_eq!(providers.offer(2, 11, other.clone(), &limits), Offered::Disagrees);
        assert_eq!(
            providers.offer(2, 11, offer("custom/x"), &limits),
            Offered::Taken { generation, replaced: None }
        );
        assert_eq!(providers.leave(1), [generation]);
        assert_eq!(providers.withdraw(2, "custom/x"), Some(generation));
        let Offered::Taken { generation: newer, replaced } = providers.offer(3, 12, other, &limits) else {
            panic!()
        };
        assert_eq!((replaced, providers.is_current(generation)), (Some(generation), false));
        assert!(providers.is_current(newer));
        assert!(matches!(providers.offer(4, 13, offer("custom/y"), &limits), Offered::Full(_)));
        providers.forget(generation);
        assert_eq!(providers.generation("custom/x"), Some(newer));
    }

    #[test]
    fn jobs_go_to_who_has_fewest_and_a_lonely_job_stays_alone() {
        let limits = Limits::default();
        let mut providers = Providers::default();
        let mut generation = 0;
        for session in 1..=2 {
            let Offered::Taken { generation: g, .. } =
                providers.offer(session, 10, offer("custom/x"), &limits)
            else {
                panic!()
            };
            generation = g;
        }
        let mut order = Vec::new();
        for _ in 0..4 {
            let session = providers.choose(generation, false, 10, 100).unwrap();
            providers.give(generation, session, false, 10);
            order.push(session);
        }
        assert_eq!(order, [1, 2, 1, 2]);
        assert_eq!(providers.choose(generation, false, 81, 100), None, "too many bytes");
        assert_eq!(providers.choose(generation, true, 1, 100), None, "nobody has none");
        providers.take_back(generation, 2, 10);
        providers.take_back(generation, 2, 10);
        assert_eq!(providers.choose(generation, true, 200, 100), Some(2), "the first may be of any size");
        providers.give(generation, 2, true, 200);
        providers.take_back(generation, 1, 10);
        assert_eq!(providers.choose(generation, false, 1, 100), Some(1), "the other one is taken by it");
    }
}

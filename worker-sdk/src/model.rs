//! A leased model as callers use it: blocking calls here, futures in `job`. How jobs travel is `seat`'s.

use crate::cache::Found;
use crate::client::{Client, check_local};
#[cfg(feature = "local")]
use crate::compute::Computer;
use crate::embeddings::Embeddings;
use crate::error::SdkError;
#[cfg(feature = "local")]
use crate::fallback::{PrivateWay, describe};
use crate::fork_cell::ForkCell;
use crate::job::Job;
use crate::prompt::{Prompt, prompted};
use crate::seat::{Answer, JobSpec, Seat, SeatRequest};
use crate::settings::{EmbedOptions, ModelRequest, Route};
use crate::sharing::{Fallback, Way};
use crate::split::split;
use crate::time::Deadline;
use shm_layout::limits::MAX_TEXT_BYTES;
#[cfg(feature = "local")]
use shm_layout::payload::decode_texts;
use shm_layout::payload::{PayloadError, decode_embeddings, decode_token_spans, encode_texts};
use shm_layout::wire::{LoadProgress, ModelDescription, Operation};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Jobs of one blocking call that are in flight at once: enough to keep an engine busy while answers are taken, few
/// enough to leave the lane's room to others.
const WINDOW_JOBS: usize = 8;
/// Times that an answer may be unreadable before the caller is told.
pub(crate) const MAX_BAD_ANSWERS: u32 = 3;
/// Times that a list is begun anew because the model was replaced meanwhile.
pub(crate) const MAX_MODEL_CHANGES: u32 = 3;

/// A lease on a model. Clones share it; the last one to go gives it back, once its jobs are done or dropped.
///
/// Any number of threads may use one `Model`; they share one lane. In a process forked after it was made it goes on
/// working, with a session and a lease of the child's own, taken up on first use.
#[derive(Clone, Debug)]
pub struct Model {
    handle: Arc<Handle>,
}

#[derive(Debug)]
struct Handle {
    client: Client,
    request: Arc<SeatRequest>,
    seats: ForkCell<Seat>,
    /// The seat for jobs that travel as frames, where the other has a lane; made when it is needed.
    relay_request: Arc<SeatRequest>,
    relays: ForkCell<Seat>,
    /// The way without a broker, where the caller wants one.
    #[cfg(feature = "local")]
    private: Option<PrivateWay>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        // In a forked child that never used the model there is nothing to close: the seat inside is the parent's.
        for seat in [self.seats.get(), self.relays.get()].into_iter().flatten() {
            seat.close();
        }
    }
}

impl Model {
    pub(crate) fn lease(client: &Client, mut request: ModelRequest) -> Result<Model, SdkError> {
        request.check()?;
        let core = client.core();
        let fallback = request.fallback.unwrap_or(core.settings.fallback);
        check_local(fallback)?;
        let wanted = Arc::new(SeatRequest {
            name: request.resolved_name(),
            wait: request.wait,
            route: request.route,
            fall_back: fallback == Fallback::Local,
        });
        let relayed = SeatRequest {
            name: wanted.name.clone(),
            wait: wanted.wait,
            route: Route::Socket,
            fall_back: false,
        };
        let shares = core.settings.shares();
        if !shares && !cfg!(feature = "local") {
            return Err(SdkError::SharingOff { reason: core.settings.why_not() });
        }
        let handle = Handle {
            client: client.clone(),
            #[cfg(feature = "local")]
            private: (!shares || fallback == Fallback::Local)
                .then(|| PrivateWay::new(wanted.name.clone(), !shares, core.settings.cache_dir.clone())),
            request: wanted,
            seats: ForkCell::new(),
            relay_request: Arc::new(relayed),
            relays: ForkCell::new(),
        };
        let model = Model { handle: Arc::new(handle) };
        let mut report = |step: LoadProgress| {
            if let Some(progress) = &mut request.progress {
                progress(step);
            }
        };
        if shares {
            let mut watch = |step: Option<LoadProgress>| step.into_iter().for_each(&mut report);
            let opened = model.seat().open(Deadline::after(None), &mut watch);
            #[cfg(feature = "local")]
            if let (Err(error), Some(private)) = (&opened, &model.handle.private) {
                private.fall_back(&model.seat(), error.clone(), &mut report)?;
                return Ok(model);
            }
            opened?;
        } else {
            #[cfg(feature = "local")]
            if let Some(private) = &model.handle.private {
                private.model(None, &mut report)?;
            }
        }
        Ok(model)
    }

    /// Which way calls go just now: to the shared model, or to one that this process loaded because the shared one could not be
    /// had ([`Fallback::Local`]) or sharing is switched off. [`Embeddings::way`] says it of a result.
    #[must_use]
    pub fn route_in_use(&self) -> Way {
        #[cfg(feature = "local")]
        if let Some(private) = &self.handle.private {
            return private.in_use();
        }
        Way::Shared
    }

    /// The result of jobs whose shared model failed, from a private one where this model has that way.
    #[cfg(feature = "local")]
    pub(crate) fn rescue(&self, error: SdkError, specs: &[Arc<JobSpec>]) -> Result<Embeddings, SdkError> {
        let Some(private) = &self.handle.private else { return Err(error) };
        let model = private.fall_back(&self.seat(), error, &mut |_| {})?;
        let mut texts = Vec::new();
        for spec in specs {
            texts.extend(decode_texts(&spec.payload)?);
        }
        Ok(model.embed(&texts)?.computed_privately())
    }

    pub(crate) fn seat(&self) -> Arc<Seat> {
        let handle = &*self.handle;
        handle.seats.get_or_make(|| Arc::new(Seat::new(handle.client.core(), Arc::clone(&handle.request))))
    }

    /// The seat of jobs that travel as frames.
    pub(crate) fn relay_seat(&self) -> Arc<Seat> {
        let handle = &*self.handle;
        if handle.request.route == Route::Socket {
            return self.seat();
        }
        handle
            .relays
            .get_or_make(|| Arc::new(Seat::new(handle.client.core(), Arc::clone(&handle.relay_request))))
    }

    #[cfg(feature = "local")]
    pub(crate) fn client(&self) -> &Client {
        &self.handle.client
    }

    #[cfg(feature = "local")]
    pub(crate) fn request(&self) -> &SeatRequest {
        &self.handle.request
    }

    /// What the model is: id, generation, dimensions, longest input, fingerprint. After a reload or a restart of the
    /// broker it is that of the model as last leased.
    ///
    /// # Errors
    /// Only in a forked child, where the lease is taken up first.
    pub fn description(&self) -> Result<Arc<ModelDescription>, SdkError> {
        let seat = self.seat();
        #[cfg(feature = "local")]
        if let Some(private) = &self.handle.private {
            return private.run(&seat, || seat.model(), |model| Ok(Arc::new(describe(model))));
        }
        seat.model()
    }

    /// Times that the lease was taken up anew, because the broker went away, a peer broke the protocol, or the model was
    /// reloaded.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.seat().relinks()
    }

    /// One vector for each text, in order. Texts longer than the model reads are truncated by it. An empty list gives an
    /// empty result, without asking anybody.
    ///
    /// # Errors
    /// [`SdkError`]; nothing is computed when one of the texts is over the limit.
    pub fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Embeddings, SdkError> {
        self.embed_with(texts, &EmbedOptions::default())
    }

    /// As [`Model::embed`], with priority and timeout. Long lists are sent as several jobs, some of them ahead.
    ///
    /// # Errors
    /// As [`Model::embed`]; [`SdkError::DeadlineExceeded`] when the timeout runs out, and the rest is cancelled then.
    pub fn embed_with<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        let seat = self.seat();
        #[cfg(feature = "local")]
        if let Some(private) = &self.handle.private {
            let rows = private.run(
                &seat,
                || self.embed_prompted(&seat, texts, options),
                |model| embed_privately(model, texts, options),
            )?;
            return rows.shortened(options.dimensions);
        }
        self.embed_prompted(&seat, texts, options)?.shortened(options.dimensions)
    }

    fn embed_prompted<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        match prompted(texts, &options.prompt, &seat.model()?.facts)? {
            Some(texts) => self.embed_shared(seat, &texts, options),
            None => self.embed_shared(seat, texts, options),
        }
    }

    fn embed_shared<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        let deadline = Deadline::after(options.timeout);
        seat.freshen();
        if let Some(found) = self.look_up(seat, texts, options)? {
            if found.missing.is_empty() {
                return Ok(found.rows);
            }
            let missing: Vec<&str> = found.missing.iter().map(|index| texts[*index].as_ref()).collect();
            let computed = self.compute(seat, &missing, options, deadline)?;
            if let Some(all) = found.merge(&computed) {
                return Ok(all);
            }
            // The model was replaced meanwhile: what was found belongs to the old one.
        }
        self.compute(seat, texts, options, deadline)
    }

    /// What of a list the cache has; `None` when it has nothing of it, or is not to be asked.
    ///
    /// # Errors
    /// [`SdkError::Input`] for a text over the limit: it is named by its place in the whole list.
    fn look_up<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Option<Found>, SdkError> {
        if options.bypass_cache {
            return Ok(None);
        }
        let Some(cache) = seat.cache() else { return Ok(None) };
        let found = cache.look_up(texts);
        for index in &found.missing {
            let len_bytes = texts[*index].as_ref().len();
            if len_bytes > MAX_TEXT_BYTES {
                return Err(PayloadError::TextTooLong { index: *index, len_bytes }.into());
            }
        }
        Ok((found.missing.len() < texts.len() || texts.is_empty()).then_some(found))
    }

    /// Sends a list to the engine and gathers the answers.
    fn compute<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
        deadline: Deadline,
    ) -> Result<Embeddings, SdkError> {
        for _ in 0..=MAX_MODEL_CHANGES {
            let model = seat.model()?;
            let parts = split(texts, Operation::Embed, model.output_dim as usize)?;
            let mut all: Option<Embeddings> = None;
            let make = |part| spec(texts, part, options.operation(), options, deadline);
            let whole = run(seat, parts, make, |range, answer| {
                let rows = embeddings(&answer, range.len())?;
                match &mut all {
                    None => {
                        let mut first =
                            Embeddings::with_capacity(rows.dim(), rows.fingerprint(), texts.len());
                        first.append(rows);
                        all = Some(first);
                    }
                    Some(all) if (all.dim(), all.fingerprint()) == (rows.dim(), rows.fingerprint()) => {
                        all.append(rows)
                    }
                    Some(_) => return Ok(false),
                }
                Ok(true)
            })?;
            if whole {
                let empty = || Embeddings::with_capacity(model.output_dim as usize, model.fingerprint, 0);
                return Ok(all.unwrap_or_else(empty));
            }
        }
        Err(SdkError::ModelChanged { model: self.handle.request.name.clone() })
    }

    /// Sends a list and gives a handle on its result at once: a future, or something to wait for or cancel. Waits only
    /// while a great many jobs are in line already. The handle keeps a copy of the texts, and the lease. On a private model
    /// ([`Fallback::Local`]) they are computed before this returns.
    ///
    /// # Errors
    /// As [`Model::embed_with`].
    pub fn submit<T: AsRef<str>>(&self, texts: &[T], options: &EmbedOptions) -> Result<Job, SdkError> {
        let seat = self.seat();
        #[cfg(feature = "local")]
        if let Some(private) = &self.handle.private {
            let dimensions = options.dimensions;
            let done =
                |rows| Job::new(self.clone(), Arc::clone(&seat), Vec::new(), Vec::new(), rows, dimensions);
            return private.run(
                &seat,
                || self.submit_prompted(&seat, texts, options),
                |model| embed_privately(model, texts, options).map(done),
            );
        }
        self.submit_prompted(&seat, texts, options)
    }

    fn submit_prompted<T: AsRef<str>>(
        &self,
        seat: &Arc<Seat>,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Job, SdkError> {
        match prompted(texts, &options.prompt, &seat.model()?.facts)? {
            Some(texts) => self.submit_shared(seat, &texts, options),
            None => self.submit_shared(seat, texts, options),
        }
    }

    fn submit_shared<T: AsRef<str>>(
        &self,
        seat: &Arc<Seat>,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Job, SdkError> {
        let deadline = Deadline::after(options.timeout);
        let seat = Arc::clone(seat);
        seat.freshen();
        if let Some(found) = self.look_up(&seat, texts, options)?.filter(|found| found.missing.is_empty()) {
            return Ok(Job::new(self.clone(), seat, Vec::new(), Vec::new(), found.rows, options.dimensions));
        }
        // Sent whole: the engine finds what the cache has, and its answer is of one model.
        let (specs, empty) = self.specs(&seat, texts, options, deadline)?;
        seat.wait_room(deadline)?;
        let ids = specs.iter().map(|spec| seat.enqueue(Arc::clone(spec))).collect();
        Ok(Job::new(self.clone(), seat, specs, ids, empty, options.dimensions))
    }

    /// As [`Model::submit`], but never waits.
    ///
    /// # Errors
    /// [`SdkError::WouldBlock`] when there is no room for all of it just now, or the broker is away; nothing was sent. With
    /// [`Fallback::Local`] as well: [`Model::submit`] goes on privately then.
    pub fn try_submit<T: AsRef<str>>(&self, texts: &[T], options: &EmbedOptions) -> Result<Job, SdkError> {
        if self.route_in_use() == Way::Private {
            return Err(SdkError::WouldBlock);
        }
        let seat = self.seat();
        if let Some(texts) = prompted(texts, &options.prompt, &seat.model()?.facts)? {
            return self.try_submit(&texts, &options.clone().prompt(Prompt::None));
        }
        if let Some(found) = self.look_up(&seat, texts, options)?.filter(|found| found.missing.is_empty()) {
            return Ok(Job::new(self.clone(), seat, Vec::new(), Vec::new(), found.rows, options.dimensions));
        }
        let (specs, empty) = self.specs(&seat, texts, options, Deadline::after(options.timeout))?;
        let ids = seat.try_enqueue(&specs)?;
        Ok(Job::new(self.clone(), seat, specs, ids, empty, options.dimensions))
    }

    fn specs<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
        deadline: Deadline,
    ) -> Result<(Vec<Arc<JobSpec>>, Embeddings), SdkError> {
        let model = seat.model()?;
        let dim = model.output_dim as usize;
        let parts = split(texts, Operation::Embed, dim)?;
        let specs = parts.into_iter().map(|part| spec(texts, part, options.operation(), options, deadline));
        Ok((specs.collect::<Result<_, _>>()?, Embeddings::with_capacity(dim, model.fingerprint, 0)))
    }

    /// For each text the byte ranges of its tokens, as the model's own tokenizer cuts it; for counting and chunking
    /// without a tokenizer in this process. An empty list gives an empty result.
    ///
    /// # Errors
    /// As [`Model::embed`]; `OUTPUT_TOO_SMALL` for a single text of more than about 130 000 tokens: split it first.
    pub fn token_spans<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<Range<usize>>>, SdkError> {
        self.token_spans_with(texts, &EmbedOptions::default())
    }

    /// As [`Model::token_spans`], with priority and timeout.
    ///
    /// # Errors
    /// As [`Model::token_spans`].
    pub fn token_spans_with<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Vec<Vec<Range<usize>>>, SdkError> {
        let seat = self.seat();
        #[cfg(feature = "local")]
        if let Some(private) = &self.handle.private {
            return private.run(
                &seat,
                || self.spans_shared(&seat, texts, options),
                |model| {
                    check_lengths(texts)?;
                    model.token_spans(texts)
                },
            );
        }
        self.spans_shared(&seat, texts, options)
    }

    fn spans_shared<T: AsRef<str>>(
        &self,
        seat: &Seat,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Vec<Vec<Range<usize>>>, SdkError> {
        seat.freshen();
        let parts = split(texts, Operation::Tokenize, 1)?;
        let mut all = Vec::with_capacity(texts.len());
        let deadline = Deadline::after(options.timeout);
        let make = |part| spec(texts, part, Operation::Tokenize, options, deadline);
        run(seat, parts, make, |range, answer| {
            let texts: Vec<&str> = texts[range].iter().map(AsRef::as_ref).collect();
            all.append(&mut decode_token_spans(&answer.bytes, &texts)?);
            Ok(true)
        })?;
        Ok(all)
    }
}

/// Vectors from a model in this process, for the same texts as a broker takes.
#[cfg(feature = "local")]
fn embed_privately<T: AsRef<str>>(
    model: &Computer,
    texts: &[T],
    options: &EmbedOptions,
) -> Result<Embeddings, SdkError> {
    check_lengths(texts)?;
    let rows = match prompted(texts, &options.prompt, &describe(model).facts)? {
        Some(texts) => model.embed(&texts),
        None => model.embed(texts),
    };
    Ok(rows?.computed_privately())
}

#[cfg(feature = "local")]
fn check_lengths<T: AsRef<str>>(texts: &[T]) -> Result<(), SdkError> {
    let too_long = |text: &T| text.as_ref().len() > MAX_TEXT_BYTES;
    match texts.iter().position(too_long) {
        Some(index) => {
            Err(PayloadError::TextTooLong { index, len_bytes: texts[index].as_ref().len() }.into())
        }
        None => Ok(()),
    }
}

/// Reads an answer's vectors.
pub(crate) fn embeddings(answer: &Answer, texts: usize) -> Result<Embeddings, PayloadError> {
    let rows = decode_embeddings(&answer.bytes, texts)?;
    if rows.dim != answer.dim {
        return Err(PayloadError::Malformed("vectors of another dimension than the model's"));
    }
    if !rows.values.iter().all(|number| number.is_finite()) {
        return Err(PayloadError::Malformed("a vector with a number that is not finite"));
    }
    Ok(Embeddings::from_parts(rows.dim, rows.fingerprint, rows.cached, rows.values))
}

pub(crate) fn spec<T: AsRef<str>>(
    texts: &[T],
    part: Range<usize>,
    operation: Operation,
    options: &EmbedOptions,
    deadline: Deadline,
) -> Result<Arc<JobSpec>, SdkError> {
    let count = part.len();
    let bytes: Vec<&[u8]> = texts[part].iter().map(|text| text.as_ref().as_bytes()).collect();
    let payload = encode_texts(&bytes)?;
    Ok(Arc::new(JobSpec { operation, priority: options.priority, deadline, payload, texts: count }))
}

/// What is in flight of one call; cancelled when the call ends early.
struct InFlight<'a> {
    seat: &'a Seat,
    jobs: VecDeque<(Range<usize>, u64, Arc<JobSpec>)>,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        for (_, id, _) in &self.jobs {
            self.seat.forget(*id);
        }
    }
}

/// Sends the parts of a list, a window of them ahead, and hands the answers to `take` in order; false as soon as `take`
/// says false. An unreadable answer is asked for again over another lane.
pub(crate) fn run(
    seat: &Seat,
    parts: Vec<Range<usize>>,
    make: impl Fn(Range<usize>) -> Result<Arc<JobSpec>, SdkError>,
    mut take: impl FnMut(Range<usize>, Answer) -> Result<bool, PayloadError>,
) -> Result<bool, SdkError> {
    let mut flight = InFlight { seat, jobs: VecDeque::with_capacity(WINDOW_JOBS) };
    let mut parts = parts.into_iter();
    let mut bad_answers = 0;
    loop {
        while flight.jobs.len() < WINDOW_JOBS {
            let Some(part) = parts.next() else { break };
            let spec = make(part.clone())?;
            flight.jobs.push_back((part, seat.enqueue(Arc::clone(&spec)), spec));
        }
        let Some((part, id, spec)) = flight.jobs.pop_front() else { return Ok(true) };
        let answer = seat.wait(id)?;
        let (link_number, peer) = (answer.link_number, answer.peer());
        match take(part.clone(), answer) {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                bad_answers += 1;
                seat.distrust(link_number, &error.to_string());
                if bad_answers > MAX_BAD_ANSWERS {
                    return Err(SdkError::Fault { peer, what: error.to_string() });
                }
                flight.jobs.push_front((part, seat.enqueue(Arc::clone(&spec)), spec));
            }
        }
    }
}

//! Computing in this process on the pages that everybody shares. Only with the feature `local`; how a model computes is
//! the engine's.

use crate::cache::ClientCache;
use crate::client::unexpected;
use crate::compute::{Computer, check_process};
use crate::embeddings::Embeddings;
use crate::error::SdkError;
use crate::model::Model;
use crate::prompt::prompted;
use crate::session::{Reply, Session};
use crate::settings::EmbedOptions;
use crate::time::Deadline;
use shm_layout::code::Code;
use shm_layout::image::Task;
use shm_layout::wire::{Acquire, ClientMessage, Leased, ModelDescription};
use shm_os::image_backing::map_published;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A model that computes in this process on the shared image. Clones share it; the image is let go of with the last.
///
/// It needs no broker once it is attached: it keeps its generation of the model through reloads and restarts. Its
/// results are those of [`Model::embed`] bit for bit, where the engine runs on the same machine.
#[derive(Clone, Debug)]
pub struct AttachedModel {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    computer: Computer,
    cache: Option<ClientCache>,
    description: ModelDescription,
    _lease: HeldLease,
}

/// Keeps the broker from unloading what is mapped here; ends with the value, or with the session.
#[derive(Debug)]
struct HeldLease {
    session: Arc<Session>,
    lease_id: u64,
    generation: u64,
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        if self.generation == shm_os::fork_generation() && self.session.is_alive() {
            self.session.forget_superseded(self.lease_id);
            self.session.tell(&ClientMessage::Release { lease_id: self.lease_id });
        }
    }
}

impl Model {
    /// Maps the model's image into this process, to compute here. Takes about a millisecond for any size: nothing is
    /// copied, and the pages are those that all others use. The lease is one of its own: the `Model` may be dropped.
    ///
    /// # Errors
    /// [`SdkError`] when the image cannot be had, or is not sealed, sized or laid out as announced.
    pub fn attach(&self) -> Result<AttachedModel, SdkError> {
        let generation = shm_os::fork_generation();
        check_process()?;
        let (core, request) = (self.client().core(), self.request());
        let message = ClientMessage::Acquire(Acquire {
            model: request.name.clone(),
            want_lane: false,
            want_image: true,
            wait_ms: u32::try_from(request.wait.as_millis()).unwrap_or(u32::MAX),
        });
        let deadline = Deadline::after(Some(request.wait.saturating_add(crate::seat::LOAD_GRACE)));
        let (session, reply) = core.ask(&message, core.settings.start, deadline)?;
        let Reply::Leased(leased, fds) = reply else { return Err(unexpected(&reply)) };
        let lease = HeldLease { session, lease_id: leased.lease_id, generation };
        AttachedModel::map(*leased, fds, lease)
    }
}

impl AttachedModel {
    fn map(leased: Leased, mut fds: Vec<OwnedFd>, lease: HeldLease) -> Result<AttachedModel, SdkError> {
        let fault = |what: String| SdkError::Fault { peer: "the broker", what };
        // Image, then cache.
        let cache_fd = leased.cache.and_then(|_| fds.pop());
        let (Some(fd), true) = (fds.pop(), leased.image) else {
            return Err(fault("it gave no image with the lease".into()));
        };
        let description = leased.model;
        let cache = ClientCache::map(leased.cache, cache_fd, &description, Weak::new());
        let mapping = map_published(fd.as_fd(), description.backing, description.image_bytes)
            .map_err(|error| fault(format!("its image cannot be mapped: {error}")))?;
        let computer = Computer::new(mapping)?;
        let info = computer.info();
        if info.content_hash != description.content_hash || info.output_dim != description.output_dim as usize
        {
            return Err(fault("its image is another one than it announced".into()));
        }
        Ok(AttachedModel { shared: Arc::new(Shared { computer, cache, description, _lease: lease }) })
    }

    /// What the model is.
    #[must_use]
    pub fn description(&self) -> &ModelDescription {
        &self.shared.description
    }

    /// Names image, arithmetic and CPU path, as in the results.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        self.shared.computer.info().fingerprint
    }

    /// Bytes of the image that are mapped here, shared with every other process that uses the model.
    #[must_use]
    pub fn image_bytes(&self) -> usize {
        self.shared.computer.image_bytes()
    }

    /// Checks that every byte of the image is what its compiler wrote. Reads all of it: about a second for two gigabytes.
    ///
    /// # Errors
    /// [`SdkError::Local`] when it is not.
    pub fn verify(&self) -> Result<(), SdkError> {
        self.shared.computer.verify()
    }

    /// Builds the tokenizer now (some ten milliseconds) instead of at the first text.
    ///
    /// # Errors
    /// [`SdkError::Local`] when it cannot be built; [`SdkError::Forked`] in a forked child.
    pub fn warm(&self) -> Result<(), SdkError> {
        self.shared.computer.warm()
    }

    /// One vector for each text, in order; an empty list gives an empty result.
    ///
    /// # Errors
    /// [`SdkError::Local`] naming the text at fault; [`SdkError::Forked`] in a process forked after attaching.
    pub fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Embeddings, SdkError> {
        self.embed_with(texts, &EmbedOptions::default())
    }

    /// As [`AttachedModel::embed`], with the choice to leave the cache aside. A vector that it has is not computed; what is
    /// computed here is not kept in it. Priority and timeout are for the engine's queue and mean nothing here.
    ///
    /// # Errors
    /// As [`AttachedModel::embed`].
    pub fn embed_with<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        if !self.shared.computer.belongs_to_this_process() {
            return Err(SdkError::Forked);
        }
        let facts = &self.description().facts;
        if facts.task != Task::Embed {
            let message = format!("the model is a {}: it gives no embeddings", facts.task.name());
            return Err(SdkError::Refused { code: Code::WrongTask, message, retry_after: Duration::ZERO });
        }
        let rows = match prompted(texts, &options.prompt, facts)? {
            Some(texts) => self.embed_as_they_are(&texts, options),
            None => self.embed_as_they_are(texts, options),
        }?;
        rows.shortened(options.dimensions)
    }

    fn embed_as_they_are<T: AsRef<str>>(
        &self,
        texts: &[T],
        options: &EmbedOptions,
    ) -> Result<Embeddings, SdkError> {
        let Some(cache) = self.shared.cache.as_ref().filter(|_| !options.bypass_cache) else {
            return self.shared.computer.embed(texts);
        };
        let found = cache.look_up(texts);
        if found.missing.is_empty() {
            return Ok(found.rows);
        }
        if found.rows.is_empty() {
            return self.shared.computer.embed(texts);
        }
        let missing: Vec<&str> = found.missing.iter().map(|index| texts[*index].as_ref()).collect();
        let computed = self.shared.computer.embed(&missing)?;
        // Of one generation, so this does not fail; were it so, computing all is right.
        found.merge(&computed).map_or_else(|| self.shared.computer.embed(texts), Ok)
    }

    /// For each text the byte ranges of its tokens.
    ///
    /// # Errors
    /// As [`AttachedModel::embed`].
    pub fn token_spans<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<Range<usize>>>, SdkError> {
        self.shared.computer.token_spans(texts)
    }
}

//! Providing a model of one's own type: what is offered, what a handler gets and gives, starting and stopping. The
//! connection is `provider::link`'s, threads and answers are `provider::serve`'s.

mod job;
mod link;
mod serve;

pub use job::{ProvidedJob, ProviderError};

use crate::client::Client;
use crate::error::SdkError;
use crate::time::Deadline;
use link::Link;
use serve::Shared;
use shm_layout::limits::{MAX_PAYLOAD_BYTES, MAX_PROVIDER_IN_FLIGHT, MAX_PROVIDER_JOB_MS};
use shm_layout::wire::{Operation, Provide};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a job may take where nothing else is said.
const DEFAULT_JOB_TIMEOUT: Duration = Duration::from_secs(30);
/// Most threads that one provider computes with.
const MAX_PROVIDER_THREADS: usize = 64;

/// What a provider offers. See [`Client::provide`].
#[derive(Debug, Clone)]
#[must_use = "nothing is offered before provide()"]
pub struct ProviderSpec {
    offer: Provide,
    threads: usize,
    max_in_flight: Option<usize>,
}

impl ProviderSpec {
    /// A model of the id `custom/...`, computed by one thread, that takes and gives up to 1 MiB in at most 30 s.
    /// Without [`ProviderSpec::embed`] or other operations it takes calls.
    pub fn new(model_id: impl Into<String>) -> ProviderSpec {
        let model_id = model_id.into();
        let offer = Provide {
            fingerprint: fnv1a(model_id.as_bytes()),
            model_id,
            kind: String::from("custom"),
            description: String::new(),
            input_kind: String::from("bytes"),
            output_kind: String::from("bytes"),
            operations: Vec::new(),
            output_dim: 0,
            max_seq_tokens: 0,
            max_in_flight: 1,
            max_input_bytes: MAX_PAYLOAD_BYTES as u32,
            max_output_bytes: MAX_PAYLOAD_BYTES as u32,
            job_timeout_ms: u32::try_from(DEFAULT_JOB_TIMEOUT.as_millis()).unwrap_or(u32::MAX),
        };
        ProviderSpec { offer, threads: 1, max_in_flight: None }
    }

    /// What kind of model it is, in a word, for status pages (`custom`); at most 64 bytes.
    pub fn kind(mut self, kind: impl Into<String>) -> ProviderSpec {
        self.offer.kind = kind.into();
        self
    }

    /// What it does, what goes in and what comes out, for status pages; at most 512 bytes each.
    pub fn describe(
        mut self,
        description: impl Into<String>,
        input: impl Into<String>,
        output: impl Into<String>,
    ) -> ProviderSpec {
        self.offer.description = description.into();
        self.offer.input_kind = input.into();
        self.offer.output_kind = output.into();
        self
    }

    /// Names what computes: give another number whenever answers would differ. Providers of one id must agree in it (a
    /// hash of the id).
    pub fn fingerprint(mut self, fingerprint: u64) -> ProviderSpec {
        self.offer.fingerprint = fingerprint;
        self
    }

    /// It takes calls: bytes to bytes ([`crate::Model::call`]).
    pub fn call(self) -> ProviderSpec {
        self.operation(Operation::Call)
    }

    /// It embeds: texts to vectors of `dim` numbers ([`crate::Model::embed`] works on it).
    pub fn embed(mut self, dim: u32) -> ProviderSpec {
        self.offer.output_dim = dim;
        self.operation(Operation::Embed)
    }

    /// It takes this operation, `Call`, `Embed` or `Tokenize`; payloads are as `docs/protocol.md` lays them out.
    pub fn operation(mut self, operation: Operation) -> ProviderSpec {
        if !self.offer.operations.contains(&operation) {
            self.offer.operations.push(operation);
        }
        self
    }

    /// Threads that call the handler (1); at most 64.
    pub fn threads(mut self, threads: usize) -> ProviderSpec {
        self.threads = threads;
        self
    }

    /// Jobs that this process takes at once, those counted that wait here (as many as there are threads). More hides the
    /// way to the broker and back, and takes work from others that provide the same model.
    pub fn max_in_flight(mut self, jobs: usize) -> ProviderSpec {
        self.max_in_flight = Some(jobs);
        self
    }

    /// Largest payload of a call and of its answer, in bytes (1 MiB, which is also the most).
    pub fn sizes(mut self, max_input_bytes: u32, max_output_bytes: u32) -> ProviderSpec {
        self.offer.max_input_bytes = max_input_bytes;
        self.offer.max_output_bytes = max_output_bytes;
        self
    }

    /// Longest time for one job (30 s); at most 10 minutes. Beyond, its caller gets `PROVIDER_TIMEOUT`, and this
    /// provider is at fault.
    pub fn job_timeout(mut self, timeout: Duration) -> ProviderSpec {
        self.offer.job_timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self
    }

    /// What is sent to the broker, which checks the rest.
    fn finish(mut self) -> Result<(Provide, usize), SdkError> {
        if !(1..=MAX_PROVIDER_THREADS).contains(&self.threads) {
            return Err(SdkError::Argument(format!(
                "a provider with {} threads: use 1 to {MAX_PROVIDER_THREADS}",
                self.threads
            )));
        }
        if self.offer.operations.is_empty() {
            self.offer.operations.push(Operation::Call);
        }
        let in_flight = self.max_in_flight.unwrap_or(self.threads);
        self.offer.max_in_flight = u32::try_from(in_flight).unwrap_or(u32::MAX);
        debug_assert!(MAX_PROVIDER_THREADS <= MAX_PROVIDER_IN_FLIGHT as usize && MAX_PROVIDER_JOB_MS > 0);
        Ok((self.offer, self.threads))
    }
}

/// FNV-1a, 64 bits: any two ids are different models.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// A model that this process provides. It is registered from [`Client::provide`] on; [`Provider::serve`] computes.
/// Dropping it ends the registration; jobs that it had go to others.
#[derive(Debug)]
pub struct Provider {
    client: Client,
    offer: Provide,
    threads: usize,
    shared: Arc<Shared>,
    /// The connection that was made with the registration, until it is served.
    first: Mutex<Option<Link>>,
    serving: AtomicBool,
    generation: u64,
}

/// Ends [`Provider::serve`] from another thread.
#[derive(Debug, Clone)]
pub struct ProviderStop {
    shared: Arc<Shared>,
}

impl ProviderStop {
    /// No further jobs are taken; those that were taken are answered, then `serve` returns.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

impl Client {
    /// Offers to compute a model: whoever leases it by its id has its jobs computed by the handler that
    /// [`Provider::serve`] is given, in this process. Call that at once: jobs come from now on. Uses a connection of
    /// its own.
    ///
    /// # Errors
    /// [`SdkError::Refused`] with the reason when the offer is not acceptable, or others offer something else under the
    /// same id.
    pub fn provide(&self, spec: ProviderSpec) -> Result<Provider, SdkError> {
        let (offer, threads) = spec.finish()?;
        let core = self.core();
        let deadline = Deadline::after(Some(core.settings.patience()));
        // Starts a broker where that is allowed and none runs.
        core.session(core.settings.start, deadline, &mut |_| {})?;
        let link = Link::register(&core.settings, &offer, deadline)?;
        Ok(Provider {
            client: self.clone(),
            offer,
            threads,
            shared: Arc::new(Shared::new()?),
            first: Mutex::new(Some(link)),
            serving: AtomicBool::new(false),
            generation: shm_os::fork_generation(),
        })
    }
}

impl Provider {
    /// Computes until [`ProviderStop::stop`]: `handler` is called for each job, by as many threads as the spec says. When
    /// the broker goes away it is waited for, for as long as it takes, and the model is offered again. A handler that
    /// panics fails that job only.
    ///
    /// A job whose broker or provider died may be computed a second time, here or elsewhere: a handler should be free of
    /// effects, or its effects harmless when repeated. Every caller gets one answer all the same.
    ///
    /// # Errors
    /// [`SdkError::Refused`] when the broker will not have this provider any more and no waiting helps;
    /// [`SdkError::Forked`] in a forked child; [`SdkError::Argument`] while another thread serves.
    pub fn serve<F>(&self, handler: F) -> Result<(), SdkError>
    where
        F: Fn(&ProvidedJob) -> Result<Vec<u8>, ProviderError> + Sync,
    {
        if self.generation != shm_os::fork_generation() {
            return Err(SdkError::Forked);
        }
        if self.serving.swap(true, Ordering::AcqRel) {
            return Err(SdkError::Argument("this provider is being served by another thread already".into()));
        }
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        let settings = &self.client.core().settings;
        let outcome = serve::serve(&self.shared, settings, &self.offer, self.threads, first, &handler);
        self.serving.store(false, Ordering::Release);
        outcome
    }

    /// A handle that ends [`Provider::serve`].
    #[must_use]
    pub fn stopper(&self) -> ProviderStop {
        ProviderStop { shared: Arc::clone(&self.shared) }
    }

    /// The model's id.
    #[must_use]
    pub fn model_id(&self) -> &str {
        &self.offer.model_id
    }

    /// Times that the model was offered anew, because the broker went away.
    #[must_use]
    pub fn reconnects(&self) -> u64 {
        self.shared.reconnects()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_without_operations_takes_calls_and_as_many_jobs_as_it_has_threads() {
        let (offer, threads) = ProviderSpec::new("custom/x").threads(3).finish().unwrap();
        assert_eq!((threads, offer.max_in_flight, &offer.operations[..]), (3, 3, &[Operation::Call][..]));
        let (offer, _) = ProviderSpec::new("custom/x").embed(4).embed(4).max_in_flight(9).finish().unwrap();
        assert_eq!((offer.max_in_flight, offer.output_dim, offer.operations.len()), (9, 4, 1));
        assert!(ProviderSpec::new("custom/x").threads(0).finish().is_err());
        assert_ne!(
            ProviderSpec::new("custom/x").offer.fingerprint,
            ProviderSpec::new("custom/y").offer.fingerprint
        );
    }
}

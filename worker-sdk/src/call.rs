//! Calls: bytes to bytes, for models that somebody provides. Embedding calls are `model`'s.

use crate::error::SdkError;
use crate::model::Model;
use crate::seat::{Answer, JobSpec, Seat};
use crate::time::Deadline;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::payload::PayloadError;
use shm_layout::wire::{Operation, Priority};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How one call is to be treated.
#[derive(Debug, Clone, Default)]
pub struct CallOptions {
    /// Somebody waits (the default), or throughput matters.
    pub priority: Priority,
    /// Counted from the call. When it runs out the caller gets [`SdkError::DeadlineExceeded`] and the call is cancelled.
    /// `None`: as long as the provider allows itself, and the client's patience when the broker goes away.
    pub timeout: Option<Duration>,
}

impl CallOptions {
    /// Throughput before the single answer; gives way to interactive work.
    #[must_use]
    pub fn bulk() -> CallOptions {
        CallOptions { priority: Priority::Bulk, timeout: None }
    }

    /// Sets the timeout.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> CallOptions {
        self.timeout = Some(timeout);
        self
    }
}

impl Model {
    /// Has a provided model answer a payload, at most 1 MiB; what the bytes mean is between caller and provider. When a
    /// provider or the broker dies the call is made again, so that it may be computed twice; it is answered once.
    ///
    /// # Errors
    /// [`SdkError::Refused`]: `UNSUPPORTED_OPERATION` by a model that takes no calls, `PROVIDER_FAILED` and
    /// `PROVIDER_TIMEOUT` by a provider that does not do its work, or what the provider says of the input.
    pub fn call(&self, payload: &[u8], options: &CallOptions) -> Result<Vec<u8>, SdkError> {
        self.submit_call(payload, options)?.wait()
    }

    /// As [`Model::call`], but gives a handle at once: a future, or something to wait for or cancel.
    ///
    /// # Errors
    /// [`SdkError::Input`] for a payload over the limit.
    pub fn submit_call(&self, payload: &[u8], options: &CallOptions) -> Result<CallJob, SdkError> {
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(PayloadError::TooLarge { len_bytes: payload.len() }.into());
        }
        let deadline = Deadline::after(options.timeout);
        let seat = self.seat();
        seat.wait_room(deadline)?;
        let spec = JobSpec {
            operation: Operation::Call,
            priority: options.priority,
            deadline,
            payload: payload.to_vec(),
            texts: 0,
        };
        let id = seat.enqueue(Arc::new(spec));
        Ok(CallJob { seat, id, done: false, model: self.clone() })
    }
}

/// A call on its way; as [`crate::Job`] in all that concerns dropping, forks and threads.
#[derive(Debug)]
#[must_use = "dropping a call cancels it"]
pub struct CallJob {
    seat: Arc<Seat>,
    id: u64,
    done: bool,
    // Keeps the lease until the call is over.
    model: Model,
}

impl Drop for CallJob {
    fn drop(&mut self) {
        if !self.done && self.seat.belongs_to_this_process() {
            self.seat.forget(self.id);
        }
    }
}

impl CallJob {
    /// The model that answers.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// As [`Model::call`]; [`SdkError::Cancelled`] after [`CallJob::cancel`].
    pub fn wait(mut self) -> Result<Vec<u8>, SdkError> {
        self.check_process()?;
        if self.done {
            return Err(SdkError::Cancelled);
        }
        let outcome = self.seat.wait(self.id);
        self.take(outcome)
    }

    /// The answer if it is there; `None` while it is not. After it was given there is nothing more to be had.
    pub fn try_take(&mut self) -> Option<Result<Vec<u8>, SdkError>> {
        if let Err(error) = self.check_process() {
            return Some(Err(error));
        }
        if self.done {
            return Some(Err(SdkError::Cancelled));
        }
        let outcome = self.seat.try_take(self.id)?;
        Some(self.take(outcome))
    }

    /// Gives up the call: whoever waits for it gets [`SdkError::Cancelled`].
    pub fn cancel(&self) {
        if !self.done && self.seat.belongs_to_this_process() {
            self.seat.cancel(self.id);
        }
    }

    fn check_process(&self) -> Result<(), SdkError> {
        if self.seat.belongs_to_this_process() { Ok(()) } else { Err(SdkError::Forked) }
    }

    fn take(&mut self, outcome: Result<Answer, SdkError>) -> Result<Vec<u8>, SdkError> {
        self.done = true;
        Ok(outcome?.bytes)
    }
}

impl Future for CallJob {
    type Output = Result<Vec<u8>, SdkError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.check_process()?;
        if self.done {
            return Poll::Ready(Err(SdkError::Cancelled));
        }
        match self.seat.poll(self.id, context.waker()) {
            Poll::Ready(outcome) => Poll::Ready(self.take(outcome)),
            Poll::Pending => Poll::Pending,
        }
    }
}

//! A list that was submitted and whose result is taken later: by waiting, by asking, or as a future.

use crate::embeddings::Embeddings;
use crate::error::SdkError;
use crate::model::{MAX_BAD_ANSWERS, MAX_MODEL_CHANGES, Model, embeddings};
use crate::seat::{Answer, JobSpec, Seat};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

/// A list on its way. It is a future for any runtime, and can be waited for or asked without one.
///
/// Dropping it cancels what is not done. It keeps its model leased. In a process forked after it was made it gives
/// [`SdkError::Forked`]; the parent's job goes on undisturbed.
///
/// While a job is awaited and no other thread of the process is blocked in a call on the same model, one background
/// thread for that model takes the answers; it is started by the first poll and ends soon after the last.
#[derive(Debug)]
#[must_use = "dropping a job cancels it"]
pub struct Job {
    // Before the model: what is in flight is cancelled before the lease can end.
    parts: Parts,
    model: Model,
}

#[derive(Debug)]
struct Parts {
    seat: Arc<Seat>,
    specs: Vec<Arc<JobSpec>>,
    /// The jobs; those before `next` are taken.
    ids: Vec<u64>,
    next: usize,
    result: Embeddings,
    /// How many numbers of each vector are wanted.
    dimensions: Option<usize>,
    bad_answers: u32,
    model_changes: u32,
    finished: bool,
}

impl Drop for Parts {
    fn drop(&mut self) {
        if self.seat.belongs_to_this_process() {
            self.ids[self.next..].iter().for_each(|id| self.seat.forget(*id));
        }
    }
}

impl Job {
    pub(crate) fn new(
        model: Model,
        seat: Arc<Seat>,
        specs: Vec<Arc<JobSpec>>,
        ids: Vec<u64>,
        empty: Embeddings,
        dimensions: Option<usize>,
    ) -> Job {
        let parts = Parts {
            seat,
            specs,
            ids,
            next: 0,
            result: empty,
            dimensions,
            bad_answers: 0,
            model_changes: 0,
            finished: false,
        };
        Job { parts, model }
    }

    /// The model that computes.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Waits for the result.
    ///
    /// # Errors
    /// As [`Model::embed_with`]; [`SdkError::Cancelled`] after [`Job::cancel`].
    pub fn wait(mut self) -> Result<Embeddings, SdkError> {
        self.parts.wait().or_else(|error| self.rescue(error))
    }

    /// The result from a private model, where the shared one failed and the model has that way; the failure otherwise. In
    /// futures this blocks while it computes.
    #[cfg(feature = "local")]
    fn rescue(&mut self, error: SdkError) -> Result<Embeddings, SdkError> {
        if !self.parts.seat.belongs_to_this_process() {
            return Err(error);
        }
        let dimensions = self.parts.dimensions;
        self.model.rescue(error, &self.parts.specs)?.shortened(dimensions)
    }

    #[cfg(not(feature = "local"))]
    fn rescue(&mut self, error: SdkError) -> Result<Embeddings, SdkError> {
        Err(error)
    }

    /// The result if it is there; `None` while it is not. After it was given there is nothing more to be had.
    pub fn try_take(&mut self) -> Option<Result<Embeddings, SdkError>> {
        let outcome = self.parts.try_take()?;
        Some(outcome.or_else(|error| self.rescue(error)))
    }

    /// Gives up the job: whoever waits for it gets [`SdkError::Cancelled`], and what has not been computed is not.
    pub fn cancel(&self) {
        if self.parts.seat.belongs_to_this_process() {
            self.parts.ids[self.parts.next..].iter().for_each(|id| self.parts.seat.cancel(*id));
        }
    }
}

impl Parts {
    fn wait(&mut self) -> Result<Embeddings, SdkError> {
        self.check_process()?;
        while let Some(id) = self.pending() {
            let outcome = self.seat.wait(id);
            self.take(outcome)?;
        }
        self.finish()
    }

    fn try_take(&mut self) -> Option<Result<Embeddings, SdkError>> {
        if let Err(error) = self.check_process() {
            return Some(Err(error));
        }
        while let Some(id) = self.pending() {
            let outcome = self.seat.try_take(id)?;
            if let Err(error) = self.take(outcome) {
                return Some(Err(error));
            }
        }
        Some(self.finish())
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<Embeddings, SdkError>> {
        self.check_process()?;
        while let Some(id) = self.pending() {
            match self.seat.poll(id, context.waker()) {
                Poll::Ready(outcome) => self.take(outcome)?,
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(self.finish())
    }

    fn check_process(&self) -> Result<(), SdkError> {
        if self.seat.belongs_to_this_process() { Ok(()) } else { Err(SdkError::Forked) }
    }

    fn pending(&self) -> Option<u64> {
        self.ids.get(self.next).copied()
    }

    /// Adds the outcome of the next part.
    fn take(&mut self, outcome: Result<Answer, SdkError>) -> Result<(), SdkError> {
        self.add(outcome).inspect_err(|_| {
            // Nothing more can come of it.
            self.ids[self.next..].iter().for_each(|id| self.seat.forget(*id));
            self.ids.truncate(self.next);
            self.finished = true;
        })
    }

    fn add(&mut self, outcome: Result<Answer, SdkError>) -> Result<(), SdkError> {
        let answer = outcome?;
        match embeddings(&answer, self.specs[self.next].texts) {
            Ok(rows) if self.next == 0 => {
                self.result = rows;
                self.next = 1;
            }
            Ok(rows)
                if (rows.dim(), rows.fingerprint()) == (self.result.dim(), self.result.fingerprint()) =>
            {
                self.result.append(rows);
                self.next += 1;
            }
            Ok(_) => {
                // The model was replaced under its name: what came before belongs to the old one.
                self.model_changes += 1;
                if self.model_changes > MAX_MODEL_CHANGES {
                    return Err(SdkError::ModelChanged { model: "of this job".into() });
                }
                for part in 0..=self.next {
                    self.ids[part] = self.seat.enqueue(Arc::clone(&self.specs[part]));
                }
                self.next = 0;
            }
            Err(error) => {
                self.bad_answers += 1;
                self.seat.distrust(answer.link_number, &error.to_string());
                if self.bad_answers > MAX_BAD_ANSWERS {
                    return Err(SdkError::Fault { peer: answer.peer(), what: error.to_string() });
                }
                self.ids[self.next] = self.seat.enqueue(Arc::clone(&self.specs[self.next]));
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<Embeddings, SdkError> {
        if std::mem::replace(&mut self.finished, true) {
            return Err(SdkError::Cancelled);
        }
        let (dim, fingerprint) = (self.result.dim(), self.result.fingerprint());
        let whole = std::mem::replace(&mut self.result, Embeddings::with_capacity(dim, fingerprint, 0));
        whole.shortened(self.dimensions)
    }
}

impl Future for Job {
    type Output = Result<Embeddings, SdkError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.parts.poll(context) {
            Poll::Ready(outcome) => Poll::Ready(outcome.or_else(|error| self.rescue(error))),
            Poll::Pending => Poll::Pending,
        }
    }
}

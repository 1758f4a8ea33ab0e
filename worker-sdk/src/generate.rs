//! Calls on models that write: whole texts, and texts piece by piece. Such jobs always travel as frames on the socket: a token
//! takes milliseconds, a frame microseconds, and pieces need an order and an end.

use crate::call::CallOptions;
use crate::error::SdkError;
use crate::model::{MAX_BAD_ANSWERS, Model};
use crate::seat::{Answer, JobSpec, Progress, Seat};
use crate::time::Deadline;
use shm_layout::limits::MAX_PAYLOAD_BYTES;
use shm_layout::payload::PayloadError;
use shm_layout::wire::{
    ChatMessage, GenerateAnswer, GeneratePrompt, GenerateRequest, GenerateSettings, Operation, decode_body,
    encode_body,
};
use std::sync::Arc;

/// A text that is being written. Iterating gives its pieces; [`TextStream::finish`] the whole. Dropping it ends the generation.
#[derive(Debug)]
pub struct TextStream {
    // Before the model: the job is cancelled before the lease can end.
    job: Running,
    answer: Option<GenerateAnswer>,
    _model: Model,
}

/// A job under way, cancelled when it is dropped.
#[derive(Debug)]
struct Running {
    seat: Arc<Seat>,
    spec: Arc<JobSpec>,
    id: u64,
    bad_answers: u32,
    is_over: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_over && self.seat.belongs_to_this_process() {
            self.seat.forget(self.id);
        }
    }
}

impl Running {
    /// Reads the end of the job; `None` when it could not be read and was asked for again.
    fn end(&mut self, outcome: Result<Answer, SdkError>) -> Result<Option<GenerateAnswer>, SdkError> {
        self.is_over = true;
        let answer = outcome?;
        match decode_body::<GenerateAnswer>(&answer.bytes) {
            Ok(read) => Ok(Some(read)),
            Err(error) => {
                self.bad_answers += 1;
                self.seat.distrust(answer.link_number, &error.to_string());
                if self.bad_answers > MAX_BAD_ANSWERS {
                    return Err(SdkError::Fault { peer: "the engine", what: error.to_string() });
                }
                self.id = self.seat.enqueue(Arc::clone(&self.spec));
                self.is_over = false;
                Ok(None)
            }
        }
    }
}

impl TextStream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// As [`Model::generate`]; nothing more comes behind an error.
    pub fn next_piece(&mut self) -> Result<Option<String>, SdkError> {
        if !self.job.seat.belongs_to_this_process() {
            return Err(SdkError::Forked);
        }
        while !self.job.is_over {
            match self.job.seat.wait_progress(self.job.id) {
                Progress::Piece(text) => return Ok(Some(text)),
                Progress::End(outcome) => self.answer = self.job.end(outcome)?,
            }
        }
        Ok(None)
    }

    /// Waits for the end and gives the whole.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`SdkError::Cancelled`] when it had failed before.
    pub fn finish(mut self) -> Result<GenerateAnswer, SdkError> {
        while self.next_piece()?.is_some() {}
        self.answer.take().ok_or(SdkError::Cancelled)
    }
}

impl Iterator for TextStream {
    type Item = Result<String, SdkError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_piece().transpose()
    }
}

/// A conversation of one message.
#[must_use]
pub fn user_message(content: impl Into<String>) -> GeneratePrompt {
    GeneratePrompt::Chat(vec![ChatMessage { role: "user".into(), content: content.into() }])
}

impl Model {
    /// Writes a text: what a text-to-text model makes of the prompt, or how a chat model goes on.
    ///
    /// # Errors
    /// [`SdkError`]; `WRONG_TASK` of a model that does not write; settings out of range are refused with the setting's name.
    pub fn generate(
        &self,
        prompt: GeneratePrompt,
        settings: &GenerateSettings,
        options: &CallOptions,
    ) -> Result<GenerateAnswer, SdkError> {
        self.begin(prompt, settings, options, false)?.finish()
    }

    /// As [`Model::generate`], piece by piece as it is written. With several beams all of it comes at the end.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn stream(
        &self,
        prompt: GeneratePrompt,
        settings: &GenerateSettings,
        options: &CallOptions,
    ) -> Result<TextStream, SdkError> {
        self.begin(prompt, settings, options, true)
    }

    fn begin(
        &self,
        prompt: GeneratePrompt,
        settings: &GenerateSettings,
        options: &CallOptions,
        stream: bool,
    ) -> Result<TextStream, SdkError> {
        let request = GenerateRequest { prompt, settings: settings.clone(), stream };
        request.check().map_err(|what| SdkError::Argument(what.to_owned()))?;
        let payload = encode_body(&request).map_err(|error| SdkError::Argument(error.to_string()))?;
        if payload.len() > MAX_PAYLOAD_BYTES {
            return Err(PayloadError::TooLarge { len_bytes: payload.len() }.into());
        }
        let deadline = Deadline::after(options.timeout);
        let (operation, priority) = (Operation::Generate, options.priority);
        let spec = Arc::new(JobSpec { operation, priority, deadline, payload, texts: 1 });
        let seat = self.relay_seat();
        seat.wait_room(deadline)?;
        let id = seat.enqueue(Arc::clone(&spec));
        let job = Running { seat, spec, id, bad_answers: 0, is_over: false };
        Ok(TextStream { job, answer: None, _model: self.clone() })
    }
}

//! One answer in the making: its tokens, what it keeps between steps, and what happens when logits come. No kernels, no batching.

use super::beams::Beams;
use super::logits::{draw, log_softmax, most_likely, process};
use super::options::{FinishReason, GenerateOptions};
use super::text::{Streamed, Words};
use crate::model::ModelError;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most memory of kept keys and values of all generations of a process, bytes.
pub const MAX_KV_BYTES: u64 = 4 << 30;

/// Bytes of it in use.
static KV_IN_USE: AtomicU64 = AtomicU64::new(0);

/// A share of [`MAX_KV_BYTES`], given back when it goes.
#[derive(Debug)]
pub(super) struct KvShare {
    bytes: u64,
}

impl KvShare {
    /// Takes so many bytes.
    pub(super) fn take(bytes: u64) -> Result<KvShare, ModelError> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= MAX_KV_BYTES);
        match KV_IN_USE.try_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(KvShare { bytes }),
            Err(used) => {
                Err(ModelError::KvMemory { needed_bytes: bytes, used_bytes: used, max_bytes: MAX_KV_BYTES })
            }
        }
    }
}

impl Drop for KvShare {
    fn drop(&mut self) {
        KV_IN_USE.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// How far it is.
#[derive(Debug)]
pub(super) enum Phase {
    /// The encoder's layers before `layer` are done.
    Encode {
        /// `[tokens, width]`.
        hidden: Vec<f32>,
        /// Keys and values of one layer.
        cache: Vec<f32>,
        layer: usize,
    },
    /// So many tokens of the decoder's prompt are done.
    Prompt(usize),
    /// One token after the other.
    Decode,
    /// Nothing is left to do.
    Done(FinishReason),
}

/// Beams, and of each the slots of its tokens in the order of positions.
#[derive(Debug)]
pub(super) struct Search {
    pub(super) beams: Beams,
    pub(super) slots: Vec<Vec<u32>>,
}

/// One answer in the making.
#[derive(Debug)]
pub struct Generation {
    /// The generator that it belongs to.
    pub(super) owner: u64,
    pub(super) options: GenerateOptions,
    /// What the encoder reads; empty without one.
    pub(super) encoder_ids: Vec<u32>,
    /// What the decoder begins with.
    pub(super) prompt: Vec<u32>,
    pub(super) output: Vec<u32>,
    pub(super) max_tokens: usize,
    pub(super) phase: Phase,
    pub(super) slots: usize,
    pub(super) cache: Vec<f32>,
    pub(super) cross: Vec<f32>,
    pub(super) search: Option<Search>,
    pub(super) streamed: Streamed,
    pub(super) share: KvShare,
    /// Of the first logits, for [`super::Generator::probe`].
    pub(super) checksum: u64,
}

impl Generation {
    /// Whether the answer is complete.
    pub fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Done(_))
    }

    /// Text that came since the last call, whole characters that can't become part of a stop string any more; with beams empty
    /// until the end.
    pub fn take_text(&mut self) -> String {
        let is_last = self.is_done();
        self.streamed.take(&self.options.stop, is_last)
    }

    /// Why it ended; `None` while it goes on.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        match self.phase {
            Phase::Done(reason) => Some(reason),
            _ => None,
        }
    }

    /// The tokens so far, with the one that ended it if any; with beams empty until the end.
    pub fn token_ids(&self) -> &[u32] {
        &self.output
    }

    /// The text so far.
    pub fn text(&self) -> String {
        self.streamed.text().to_owned()
    }

    /// Tokens of the prompt as the model reads it.
    pub fn prompt_tokens(&self) -> usize {
        if self.encoder_ids.is_empty() { self.prompt.len() } else { self.encoder_ids.len() }
    }

    /// Tokens generated so far.
    pub fn output_tokens(&self) -> usize {
        match &self.search {
            Some(search) if !self.is_done() => search.beams.running()[0].ids.len(),
            _ => self.output.len(),
        }
    }

    /// Memory reserved for keys and values, bytes.
    pub fn kv_bytes(&self) -> u64 {
        self.share.bytes
    }

    /// Takes the logits of the next token, `[beams, vocab]`.
    pub(super) fn accept(
        &mut self,
        logits: &mut [f32],
        words: &Words,
        end_tokens: &[u32],
    ) -> Result<(), ModelError> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(ModelError::Compute {
                reason: "a logit is not finite; the answer was discarded".into(),
            });
        }
        if self.checksum == 0 {
            self.checksum = logits.iter().fold(1, |sum: u64, logit| {
                sum.wrapping_mul(0x0000_0100_0000_01b3) ^ u64::from(logit.to_bits())
            });
        }
        if matches!(self.phase, Phase::Prompt(_)) {
            self.phase = Phase::Decode;
        }
        if self.search.is_some() {
            return self.accept_beams(logits, words, end_tokens);
        }
        let ids: Vec<u32> = self.prompt.iter().chain(&self.output).copied().collect();
        process(logits, &ids, self.output.len(), &self.options, end_tokens);
        let id = match self.options.do_sample {
            true => draw(logits, &self.options, self.output.len()),
            false => most_likely(logits),
        };
        self.output.push(id);
        let mut reason = None;
        if end_tokens.contains(&id) {
            reason = Some(FinishReason::Stop);
        } else if self.output.len() >= self.max_tokens {
            reason = Some(FinishReason::Length);
        }
        self.streamed.advance(words, &self.output, reason.is_some())?;
        if !self.options.stop.is_empty() && self.streamed.cut(&self.options.stop) {
            reason = Some(FinishReason::Stop);
        }
        if let Some(reason) = reason {
            self.end(reason);
        }
        Ok(())
    }

    fn accept_beams(
        &mut self,
        logits: &mut [f32],
        words: &Words,
        end_tokens: &[u32],
    ) -> Result<(), ModelError> {
        let Some(search) = &mut self.search else { return Ok(()) };
        let vocab = logits.len() / search.beams.running().len();
        for (row, beam) in logits.chunks_exact_mut(vocab).zip(search.beams.running()) {
            log_softmax(row);
            let ids: Vec<u32> = self.prompt.iter().chain(&beam.ids).copied().collect();
            process(row, &ids, beam.ids.len(), &self.options, end_tokens);
        }
        match search.beams.advance(logits, &self.options, end_tokens) {
            Some(parents) => {
                let generated = search.beams.running()[0].ids.len();
                let first = self.prompt.len() + (generated - 1) * self.options.num_beams;
                let slots = parents.iter().enumerate().map(|(beam, parent)| {
                    let mut slots = search.slots[*parent].clone();
                    slots.push((first + beam) as u32);
                    slots
                });
                search.slots = slots.collect();
                Ok(())
            }
            None => {
                self.output = search.beams.answer().to_vec();
                self.streamed.replace(words.text(&self.output)?);
                let stopped = self.output.last().is_some_and(|id| end_tokens.contains(id));
                self.end(if stopped { FinishReason::Stop } else { FinishReason::Length });
                Ok(())
            }
        }
    }

    /// Nothing is left to do: what was kept goes.
    fn end(&mut self, reason: FinishReason) {
        self.phase = Phase::Done(reason);
        self.cache = Vec::new();
        self.cross = Vec::new();
        if let Ok(nothing) = KvShare::take(0) {
            self.share = nothing;
        }
    }
}

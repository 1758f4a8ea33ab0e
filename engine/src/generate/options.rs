//! What a caller asks of a generator and gets back: prompts, options with their checks, results. Nothing computes here.

use crate::model::ModelError;

/// Most tokens that may be asked for.
pub const MAX_OUTPUT_TOKENS: usize = 131_072;
/// Most beams.
pub const MAX_BEAMS: usize = 16;
/// Most stop strings.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, bytes.
pub const MAX_STOP_BYTES: usize = 256;
/// Most messages of a chat.
pub const MAX_CHAT_MESSAGES: usize = 1024;

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user` or `assistant`, as the model's template knows them.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What to answer.
#[derive(Debug, Clone, Copy)]
pub enum Prompt<'a> {
    /// A text as it is, with the tokenizer's special tokens.
    Text(&'a str),
    /// Messages, put into the model's chat template, which asks for the assistant's answer.
    Chat(&'a [ChatMessage]),
}

/// How to generate. Names and meanings are those of transformers' generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Longest prompt in tokens; `None` is the model's own bound. A text2text model reads no more of a longer one; a chat model
    /// refuses it.
    pub max_input_tokens: Option<usize>,
    /// Most tokens to generate, 1 to [`MAX_OUTPUT_TOKENS`]; fewer where the model's length ends before.
    pub max_output_tokens: usize,
    /// Tokens before an ending one is allowed.
    pub min_output_tokens: usize,
    /// Beams, 1 to [`MAX_BEAMS`]; 1 is no beam search.
    pub num_beams: usize,
    /// Whether a beam search ends as soon as there are `num_beams` finished answers.
    pub early_stopping: bool,
    /// Power of its length that an answer's score is divided by in a beam search.
    pub length_penalty: f32,
    /// Runs of so many tokens occur once at most; 0 allows all.
    pub no_repeat_ngram_size: usize,
    /// Above 1 makes tokens that occurred less likely; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Whether tokens are drawn; else the most likely one is taken.
    pub do_sample: bool,
    /// Drawing: logits are divided by it.
    pub temperature: f32,
    /// Drawing: only the so many most likely tokens; 0 is all.
    pub top_k: usize,
    /// Drawing: only the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Drawing: with equal seeds, prompts and options answers are equal.
    pub seed: u64,
    /// Strings that end the answer, which does not hold them.
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_input_tokens: None,
            max_output_tokens: 128,
            min_output_tokens: 0,
            num_beams: 1,
            early_stopping: false,
            length_penalty: 1.0,
            no_repeat_ngram_size: 0,
            repetition_penalty: 1.0,
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
        }
    }
}

impl GenerateOptions {
    /// Checks every field.
    ///
    /// # Errors
    /// [`ModelError::Option`] naming the field, its value and what is allowed.
    pub fn check(&self) -> Result<(), ModelError> {
        let bad = |field: &'static str, value: String, allowed: String| {
            Err(ModelError::Option { field, value, allowed })
        };
        let counts = [
            ("max_input_tokens", self.max_input_tokens.unwrap_or(1), 1, MAX_OUTPUT_TOKENS),
            ("max_output_tokens", self.max_output_tokens, 1, MAX_OUTPUT_TOKENS),
            ("min_output_tokens", self.min_output_tokens, 0, self.max_output_tokens),
            ("num_beams", self.num_beams, 1, MAX_BEAMS),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, 1024),
            ("top_k", self.top_k, 0, 2_000_000),
            ("stop", self.stop.len(), 0, MAX_STOP_STRINGS),
        ];
        for (field, value, low, high) in counts {
            if value < low || value > high {
                return bad(field, value.to_string(), format!("{low} to {high}"));
            }
        }
        let numbers = [
            ("length_penalty", self.length_penalty, -10.0, 10.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 10.0),
            ("temperature", self.temperature, 0.01, 100.0),
            ("top_p", self.top_p, 1e-6, 1.0),
        ];
        for (field, value, low, high) in numbers {
            // Not a number is in no range.
            if !(low..=high).contains(&value) {
                return bad(field, value.to_string(), format!("{low} to {high}"));
            }
        }
        if let Some(stop) = self.stop.iter().find(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
            return bad(
                "stop",
                format!("a string of {} bytes", stop.len()),
                format!("1 to {MAX_STOP_BYTES} bytes"),
            );
        }
        if self.num_beams > 1 && self.do_sample {
            return bad("do_sample", "true".into(), "false with num_beams above 1".into());
        }
        if self.num_beams > 1 && !self.stop.is_empty() {
            return bad("stop", format!("{} strings", self.stop.len()), "none with num_beams above 1".into());
        }
        Ok(())
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// By a token that ends, or a stop string.
    Stop,
    /// By the number of tokens that was asked for or that the model has room for.
    Length,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The text, without special tokens.
    pub text: String,
    /// The tokens, with the one that ended it if any.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

//! What the messages say about what a model is for, and about text that a model writes. Plain data; the order of variants and
//! fields is the encoding: append, never reorder.

use super::{Decode, Encode, Operation};
use crate::image::Task;
use crate::limits::{
    MAX_CHAT_MESSAGES, MAX_FACTS_BYTES, MAX_LABEL_BYTES, MAX_LABELS, MAX_PROMPT_BYTES, MAX_PROMPTS,
    MAX_STOP_BYTES, MAX_STOP_STRINGS,
};

/// A text that is put before others, under a name.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NamedPrompt {
    /// The name, for example `query`.
    pub name: String,
    /// What is put before a text.
    pub text: String,
}

/// What a model is for, and what its callers must know of it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct TaskFacts {
    /// What it is for.
    pub task: Task,
    /// A classifier's labels, in the order of its scores; may be empty.
    pub labels: Vec<String>,
    /// Prompts that come with an embedding model.
    pub prompts: Vec<NamedPrompt>,
    /// Name of the prompt that is put before texts for which none is asked.
    pub default_prompt: Option<String>,
    /// Whether conversations can be given as such.
    pub has_chat_template: bool,
}

impl TaskFacts {
    /// A model for `task` that says no more of itself.
    #[must_use]
    pub const fn of(task: Task) -> TaskFacts {
        TaskFacts {
            task,
            labels: Vec::new(),
            prompts: Vec::new(),
            default_prompt: None,
            has_chat_template: false,
        }
    }

    /// Checks what a peer wrote against the limits.
    ///
    /// # Errors
    /// What is over its limit.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.labels.len() > MAX_LABELS || self.labels.iter().any(|label| label.len() > MAX_LABEL_BYTES) {
            return Err("labels over the limit");
        }
        let fits = |prompt: &NamedPrompt| {
            prompt.name.len() <= MAX_LABEL_BYTES && prompt.text.len() <= MAX_PROMPT_BYTES
        };
        if self.prompts.len() > MAX_PROMPTS || !self.prompts.iter().all(fits) {
            return Err("prompts over the limit");
        }
        let labels: usize = self.labels.iter().map(String::len).sum();
        let prompts: usize = self.prompts.iter().map(|prompt| prompt.name.len() + prompt.text.len()).sum();
        if labels + prompts > MAX_FACTS_BYTES {
            return Err("labels and prompts over the limit for both together");
        }
        match &self.default_prompt {
            Some(name) if !self.prompts.iter().any(|prompt| prompt.name == *name) => {
                Err("a default prompt that is not among the prompts")
            }
            _ => Ok(()),
        }
    }

    /// Whether models for this task do what is asked.
    #[must_use]
    pub const fn does(&self, operation: Operation) -> bool {
        task_does(self.task, operation)
    }
}

/// Whether models for `task` do what `operation` asks.
#[must_use]
pub const fn task_does(task: Task, operation: Operation) -> bool {
    match operation {
        Operation::Embed | Operation::EmbedFresh => matches!(task, Task::Embed),
        Operation::Rank | Operation::Classify => matches!(task, Task::Classify),
        Operation::Generate => matches!(task, Task::TextToText | Task::Chat),
        Operation::Tokenize => matches!(task, Task::Embed | Task::Classify),
        Operation::Call => false,
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ChatMessage {
    /// Whose it is: `system`, `user`, `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

/// What a model is to go on from.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum GeneratePrompt {
    /// A text as it is.
    Text(String),
    /// A conversation, which the model's own template makes a text.
    Chat(Vec<ChatMessage>),
}

/// How text is generated; the names are those of the field.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct GenerateSettings {
    /// Longest input in tokens, longer ones are cut; `None` = as long as the model reads.
    pub max_input_tokens: Option<u32>,
    /// Most tokens that are generated.
    pub max_output_tokens: u32,
    /// Tokens before which the end is not considered.
    pub min_output_tokens: u32,
    /// Beams that are followed; 1 = the best token each time.
    pub num_beams: u32,
    /// Whether a beam search ends as soon as it has as many ends as beams.
    pub early_stopping: bool,
    /// Exponent of the length by which a beam's score is divided.
    pub length_penalty: f32,
    /// No run of so many tokens occurs twice; 0 = any may.
    pub no_repeat_ngram_size: u32,
    /// Divisor of the scores of tokens that occurred; 1 = none.
    pub repetition_penalty: f32,
    /// Whether tokens are drawn, instead of taking the best.
    pub do_sample: bool,
    /// Divisor of scores before tokens are drawn.
    pub temperature: f32,
    /// Tokens are drawn among so many of the best; 0 = among all.
    pub top_k: u32,
    /// Tokens are drawn among the best that together have this probability; 1 = among all.
    pub top_p: f32,
    /// With the same seed the same tokens are drawn.
    pub seed: u64,
    /// Texts at which generating ends; they are not part of the result.
    pub stop: Vec<String>,
}

impl Default for GenerateSettings {
    /// Greedy, at most 128 tokens.
    fn default() -> GenerateSettings {
        GenerateSettings {
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
            top_k: 50,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
        }
    }
}

/// The payload of a [`Operation::Generate`] job, as a frame's body is encoded.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct GenerateRequest {
    /// What to go on from.
    pub prompt: GeneratePrompt,
    /// How.
    pub settings: GenerateSettings,
    /// Whether the text is wanted piece by piece, as [`Partial`]s.
    pub stream: bool,
}

impl GenerateRequest {
    /// Checks what a peer wrote against the limits; the numbers of the settings are the model's to check.
    ///
    /// # Errors
    /// What is over its limit, in words.
    pub fn check(&self) -> Result<(), &'static str> {
        if let GeneratePrompt::Chat(messages) = &self.prompt {
            if messages.is_empty() {
                return Err("a conversation without messages; give at least one");
            }
            if messages.len() > MAX_CHAT_MESSAGES {
                return Err("a conversation of more messages than the limit; leave the oldest out");
            }
            if messages.iter().any(|message| message.role.len() > MAX_LABEL_BYTES) {
                return Err("a role longer than the limit; use system, user or assistant");
            }
        }
        let stop = &self.settings.stop;
        if stop.len() > MAX_STOP_STRINGS || stop.iter().any(|text| text.len() > MAX_STOP_BYTES) {
            return Err("stop strings over the limit; give fewer or shorter ones");
        }
        Ok(())
    }
}

/// Why generating ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum FinishReason {
    /// The model ended, or a stop string came.
    Stop,
    /// The most tokens that were asked for, or that the model can hold, were reached.
    Length,
}

impl FinishReason {
    /// Its name in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// The payload of the answer to a [`Operation::Generate`] job, as a frame's body is encoded.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct GenerateAnswer {
    /// The whole text.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens of the prompt as the model read it.
    pub prompt_tokens: u32,
    /// Tokens that were generated, the one that ended it counted.
    pub output_tokens: u32,
    /// Names weights, tokenizer and precision that made it.
    pub fingerprint: u64,
}

/// A piece of a text that is being generated. The answer follows it, with the whole text.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Partial {
    /// The job.
    pub job_id: u64,
    /// Bytes of the text before this piece. A job that is begun anew, in another engine, sends its pieces again.
    pub offset_bytes: u64,
    /// The piece.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_over_a_limit_are_refused() {
        let good = TaskFacts::of(Task::Classify);
        assert_eq!(good.check(), Ok(()));
        assert!(TaskFacts { labels: vec!["x".repeat(MAX_LABEL_BYTES + 1)], ..good.clone() }.check().is_err());
        assert!(TaskFacts { labels: vec![String::new(); MAX_LABELS + 1], ..good.clone() }.check().is_err());
        let prompt = NamedPrompt { name: "query".into(), text: "x".repeat(MAX_PROMPT_BYTES + 1) };
        assert!(TaskFacts { prompts: vec![prompt], ..good.clone() }.check().is_err());
        assert!(TaskFacts { default_prompt: Some("query".into()), ..good }.check().is_err());
    }

    #[test]
    fn each_operation_is_done_by_models_of_its_task_alone() {
        for (operation, tasks) in [
            (Operation::Embed, &[Task::Embed][..]),
            (Operation::Rank, &[Task::Classify]),
            (Operation::Generate, &[Task::TextToText, Task::Chat]),
        ] {
            for task in Task::ALL {
                assert_eq!(task_does(task, operation), tasks.contains(&task), "{operation:?} {task:?}");
            }
        }
    }

    #[test]
    fn requests_over_a_limit_are_refused() {
        let request = |prompt, stop| GenerateRequest {
            prompt,
            settings: GenerateSettings { stop, ..GenerateSettings::default() },
            stream: false,
        };
        let text = GeneratePrompt::Text("a".into());
        assert_eq!(request(text.clone(), vec!["x".into()]).check(), Ok(()));
        assert!(request(text.clone(), vec!["x".into(); MAX_STOP_STRINGS + 1]).check().is_err());
        assert!(request(text, vec!["x".repeat(MAX_STOP_BYTES + 1)]).check().is_err());
        assert!(request(GeneratePrompt::Chat(Vec::new()), Vec::new()).check().is_err());
        let message = ChatMessage { role: "user".into(), content: String::new() };
        let long = GeneratePrompt::Chat(vec![message; MAX_CHAT_MESSAGES + 1]);
        assert!(request(long, Vec::new()).check().is_err());
    }
}

//! The commands on texts that give no vectors: their options, with the texts that `--help` shows. No behaviour.

use super::InputFormat;
use clap::Args;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct SummarizeArgs {
    /// Model id or folder of a text-to-text model; the id of a configured one takes its settings too
    #[arg(long, value_name = "ID", default_value = "t5_summarizer")]
    pub(crate) model: String,
    /// Longest input in tokens, longer ones are cut [default: what is configured for the model, else 512]
    #[arg(long, value_name = "N")]
    pub(crate) max_input_length: Option<u32>,
    /// Longest summary in tokens [default: what is configured for the model, else 128]
    #[arg(long, value_name = "N")]
    pub(crate) max_output_length: Option<u32>,
    /// Beams of the search [default: what is configured for the model, else 4]
    #[arg(long, value_name = "N")]
    pub(crate) num_beams: Option<u32>,
    /// Longest wait for the answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// The text; `-` (or none) reads stdin
    pub(crate) text: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Model id or folder of a chat or text-to-text model
    #[arg(long, value_name = "ID")]
    pub(crate) model: String,
    /// What the model is told before the prompt (chat models)
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Give the prompt as it is, without the model's chat template
    #[arg(long)]
    pub(crate) raw: bool,
    /// Longest input in tokens; longer ones are cut [default: what the model reads]
    #[arg(long, value_name = "N")]
    pub(crate) max_input_length: Option<u32>,
    /// Most tokens that are written
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_output_length: u32,
    /// Beams of the search; with several the text comes whole at the end
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) num_beams: u32,
    /// Exponent of the length by which a beam's score is divided
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) length_penalty: f32,
    /// No run of so many tokens occurs twice; 0 = any may
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) no_repeat_ngram_size: u32,
    /// Divisor of the scores of tokens that occurred
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f32,
    /// Draw tokens at this temperature [default: take the best]
    #[arg(long, value_name = "X")]
    pub(crate) temperature: Option<f32>,
    /// Draw among so many of the best; 0 = among all
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) top_k: u32,
    /// Draw among the best that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// With the same seed the same tokens are drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Text at which writing ends; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Longest wait for the whole answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Print JSON, at the end
    #[arg(long)]
    pub(crate) json: bool,
    /// The prompt; `-` (or none) reads stdin
    pub(crate) prompt: Option<String>,
}

/// Texts that are compared with a query.
#[derive(Debug, Args)]
pub(crate) struct CorpusArgs {
    /// File with the texts; `-` reads stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) corpus: PathBuf,
    /// How the file is read
    #[arg(long, value_enum, default_value = "lines")]
    pub(crate) input: InputFormat,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SimilarArgs {
    /// What to look for
    pub(crate) query: String,
    #[command(flatten)]
    pub(crate) corpus: CorpusArgs,
    /// How many results
    #[arg(short, long = "results", value_name = "N", default_value_t = 5)]
    pub(crate) k: usize,
    /// Model id or folder [default: the broker's default model]
    #[arg(long, value_name = "ID", default_value = "")]
    pub(crate) model: String,
    /// Put the model's prompt of this name before the query
    #[arg(long, value_name = "NAME")]
    pub(crate) prompt_name: Option<String>,
    /// Longest wait for an answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct RankArgs {
    /// What the texts are to answer
    pub(crate) query: String,
    #[command(flatten)]
    pub(crate) corpus: CorpusArgs,
    /// How many results
    #[arg(short, long = "results", value_name = "N", default_value_t = 10)]
    pub(crate) k: usize,
    /// Model id or folder of a reranker
    #[arg(long, value_name = "ID", default_value = "BAAI/bge-reranker-v2-m3")]
    pub(crate) model: String,
    /// Longest wait for an answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
}

#[derive(Debug, Args)]
pub(crate) struct ClassifyArgs {
    /// Model id or folder of a classifier
    #[arg(long, value_name = "ID")]
    pub(crate) model: String,
    /// How stdin is read
    #[arg(long, value_enum, default_value = "lines")]
    pub(crate) input: InputFormat,
    /// Print JSON: every label with its score
    #[arg(long)]
    pub(crate) json: bool,
    /// Texts; `-` (or none) reads stdin
    #[arg(value_name = "TEXT")]
    pub(crate) texts: Vec<String>,
}

//! Stock candle as a peer: candle-transformers' BERT in a process of this program that speaks as the peers' scripts do.
//! Texts sorted by length and padded in batches of 32, as sentence-transformers does. Nothing of ours computes here.

use crate::worker::Worker;
use anyhow::{Context, ensure};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde_json::json;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tokenizers::Tokenizer;

/// Texts of a batch: sentence-transformers' default.
const BATCH_TEXTS: usize = 32;
/// Bytes of a weights file, at most.
const MAX_WEIGHTS_BYTES: u64 = 8 << 30;

/// Arguments of the process.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The model's folder.
    model: PathBuf,
}

/// Starts the process with so many threads.
///
/// # Errors
/// When it cannot be started.
pub(super) fn start(model: &str, threads: usize) -> anyhow::Result<Worker> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["candle", model]).env("RAYON_NUM_THREADS", threads.to_string());
    Worker::spawn(command)
}

/// What is asked for, one line each.
#[derive(Debug, Deserialize)]
struct Order {
    single: bool,
    texts: Vec<String>,
}

/// The process: serves orders until standard input ends.
///
/// # Errors
/// When an answer cannot be written; what keeps it from computing is said on its standard output.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let mut out = std::io::stdout().lock();
    let encoder = match Encoder::load(&arguments.model) {
        Ok(encoder) => encoder,
        Err(error) => {
            writeln!(out, "{}", json!({"unavailable": format!("{error:#}")}))?;
            return Ok(());
        }
    };
    writeln!(out, "{}", json!({"routes": ["in_process"], "versions": versions()}))?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let order: Order = serde_json::from_str(&line?).context("an order")?;
        let answer = match order.single {
            true => {
                let mut seconds = Vec::with_capacity(order.texts.len());
                for text in order.texts.chunks(1) {
                    let start = Instant::now();
                    encoder.embed(text)?;
                    seconds.push(start.elapsed().as_secs_f64());
                }
                json!({"seconds": seconds})
            }
            false => {
                let start = Instant::now();
                let rows = encoder.embed(&order.texts)?;
                let seconds = start.elapsed().as_secs_f64();
                let digits: String = rows
                    .iter()
                    .flatten()
                    .flat_map(|value| value.to_le_bytes())
                    .map(|b| format!("{b:02x}"))
                    .collect();
                json!({"seconds": seconds, "dim": rows.first().map_or(0, Vec::len), "vectors": digits})
            }
        };
        writeln!(out, "{answer}")?;
        out.flush()?;
    }
    Ok(())
}

/// Of what it consists, as the lock file has it.
fn versions() -> String {
    const LOCK: &str = include_str!("../../../Cargo.lock");
    let version = |name: &str| {
        let (_, rest) = LOCK.split_once(&format!("name = \"{name}\"\nversion = \""))?;
        rest.split_once('"').map(|(version, _)| format!("{name} {version}"))
    };
    let found: Vec<String> = ["candle-transformers", "candle-core", "gemm", "tokenizers"]
        .into_iter()
        .filter_map(version)
        .collect();
    format!("{}; gemm with its AVX-512 kernels", found.join(", "))
}

/// The model as candle's examples load it, with mean pooling and length 1.
struct Encoder {
    model: BertModel,
    tokenizer: Tokenizer,
}

impl Encoder {
    fn load(folder: &Path) -> anyhow::Result<Encoder> {
        let read = |name: &str| {
            std::fs::read(folder.join(name))
                .with_context(|| format!("reading {}", folder.join(name).display()))
        };
        let config: Config = serde_json::from_slice(&read("config.json")?).context("config.json")?;
        let weights = folder.join("model.safetensors");
        let bytes = weights.metadata().with_context(|| format!("reading {}", weights.display()))?.len();
        ensure!(bytes <= MAX_WEIGHTS_BYTES, "{} has {bytes} bytes: too many", weights.display());
        let weights =
            VarBuilder::from_buffered_safetensors(read("model.safetensors")?, DType::F32, &Device::Cpu)?;
        let model = BertModel::load(weights, &config)?;
        let mut tokenizer = Tokenizer::from_bytes(read("tokenizer.json")?).map_err(|e| anyhow::anyhow!(e))?;
        let settings: serde_json::Value = serde_json::from_slice(&read("sentence_bert_config.json")?)
            .context("sentence_bert_config.json")?;
        let max_length =
            settings["max_seq_length"].as_u64().context("sentence_bert_config.json has no max_seq_length")?;
        let truncation =
            tokenizers::TruncationParams { max_length: usize::try_from(max_length)?, ..Default::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|e| anyhow::anyhow!(e))?.with_padding(None);
        Ok(Encoder { model, tokenizer })
    }

    fn embed(&self, texts: &[String]) -> anyhow::Result<Vec<Vec<f32>>> {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let encoded = self.tokenizer.encode_batch_fast(texts, true).map_err(|e| anyhow::anyhow!(e))?;
        let mut order: Vec<usize> = (0..encoded.len()).collect();
        order.sort_by_key(|number| std::cmp::Reverse(encoded[*number].len()));
        let mut rows = vec![Vec::new(); encoded.len()];
        for batch in order.chunks(BATCH_TEXTS) {
            let longest = encoded[batch[0]].len();
            let mut ids = Vec::with_capacity(batch.len() * longest);
            let mut mask = Vec::with_capacity(batch.len() * longest);
            for number in batch {
                let own = encoded[*number].get_ids();
                ids.extend_from_slice(own);
                ids.resize(ids.len() + longest - own.len(), 0);
                mask.extend(std::iter::repeat_n(1_u32, own.len()));
                mask.resize(ids.len(), 0);
            }
            let vectors = self.forward(ids, mask, (batch.len(), longest))?;
            for (number, vector) in batch.iter().zip(vectors) {
                rows[*number] = vector;
            }
        }
        Ok(rows)
    }

    fn forward(&self, ids: Vec<u32>, mask: Vec<u32>, shape: (usize, usize)) -> anyhow::Result<Vec<Vec<f32>>> {
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        let mask = Tensor::from_vec(mask, shape, &Device::Cpu)?;
        let hidden = self.model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
        let kept = mask.to_dtype(DType::F32)?.unsqueeze(D::Minus1)?;
        let mean = hidden.broadcast_mul(&kept)?.sum(1)?.broadcast_div(&kept.sum(1)?)?;
        let length = mean.sqr()?.sum_keepdim(1)?.sqrt()?;
        Ok(mean.broadcast_div(&length)?.to_vec2()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_those_of_the_lock_file() {
        let versions = versions();
        assert!(
            versions.starts_with("candle-transformers 0.") && versions.contains("tokenizers 0."),
            "{versions}"
        );
    }
}

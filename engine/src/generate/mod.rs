//! Generators at work: load an image where it lies and turn prompts into texts, token by token. Steps over several answers at once
//! live here; what a step computes is in `kernel::decoder`.
//!
//! A step takes each answer one token further, all rows in one pass over the weights. Long prompts are computed in slices, so that
//! one step stays short; which slices these are, and what else is computed beside them, changes no bit of any answer.

mod beams;
mod config;
mod generation;
mod logits;
mod network;
mod options;
mod template;
mod text;

pub use config::MAX_SEQUENCE_TOKENS;
pub use generation::{Generation, MAX_KV_BYTES};
pub use options::{
    ChatMessage, FinishReason, GenerateOptions, Generated, MAX_BEAMS, MAX_CHAT_MESSAGES, MAX_OUTPUT_TOKENS,
    MAX_STOP_BYTES, MAX_STOP_STRINGS, Prompt,
};

pub(crate) use config::{GeneratorConfig, is_generator};
pub(crate) use template::{MAX_TEMPLATE_BYTES, check_template, template_of};
pub(crate) use text::Words;

use crate::kernel::{
    DistanceBias, Kept, Mismatch, Sees, Step, StepRow, path_name, project, rms_norm_row, run_stack,
};
use crate::model::ModelError;
use crate::packing::Precision;
use crate::threads::pool;
use beams::Beams;
use generation::{KvShare, Phase, Search};
use network::Network;
use shm_layout::image::{
    CheckedImage, Family, ImageBytes, ImageError, SectionKind, TENSOR_ALIGN_BYTES, Task,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;
use template::TokenNames;
use text::Streamed;

/// Tokens of prompts that one step computes at most, or an encoder's layers of as many tokens: what bounds how long a step takes.
pub const MAX_STEP_PROMPT_TOKENS: usize = 128;
/// Most answers that are computed in one pass; more take several.
pub const MAX_STEP_GENERATIONS: usize = 32;
/// Rows of logits that are in memory at once.
const MAX_LOGIT_ROWS: usize = 32;
/// Length of an image, bytes, from which on a step is computed on all threads; below it waking them costs more than they save.
const MIN_PARALLEL_BYTES: u64 = 4 << 20;
/// The probe's text: some words, some numbers, more than one script.
const PROBE_TEXT: &str = "The quick brown fox jumps over 13 lazy dogs; 敏捷的棕色狐狸.";
/// Tokens that the probe generates.
const PROBE_TOKENS: usize = 4;

/// What a loaded generator is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratorInfo {
    /// The id it was compiled under.
    pub id: String,
    /// What it is for.
    pub task: Task,
    /// Model family.
    pub family: Family,
    /// Precision of the matrices that are not quantised blocks.
    pub precision: Precision,
    /// Length of the image, bytes.
    pub image_bytes: u64,
    /// BLAKE3 content hash of the image.
    pub content_hash: [u8; 32],
    /// Names weights, tokenizer and precision; with equal [`GeneratorInfo::cpu_path`] as well, answers are equal.
    pub fingerprint: u64,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Longest prompt, tokens.
    pub max_input_tokens: usize,
    /// Longest prompt and answer together, tokens; of a text2text model the longest answer.
    pub max_total_tokens: usize,
    /// Whether it takes [`Prompt::Chat`].
    pub has_chat_template: bool,
    /// Name of the CPU path that computes.
    pub cpu_path: &'static str,
}

/// A generator, ready to compute. Shared by any number of threads; its weights stay in the image.
pub struct Generator {
    /// Unique in the process.
    serial: u64,
    image: Arc<dyn ImageBytes>,
    info: GeneratorInfo,
    network: Network,
    template: Option<String>,
    tokens: TokenNames,
    words: OnceLock<Result<Words, ModelError>>,
    probe: OnceLock<(u64, Vec<u32>)>,
}

impl std::fmt::Debug for Generator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Generator").field("info", &self.info).finish_non_exhaustive()
    }
}

impl From<Mismatch> for ModelError {
    fn from(mismatch: Mismatch) -> Self {
        ModelError::Compute { reason: mismatch.to_string() }
    }
}

impl Generator {
    /// Loads an image: checks its structure and finds its weights, copying none; under a millisecond for any size. The tokenizer
    /// is built at the first prompt, or by [`Generator::warm`].
    ///
    /// Whether the content is what the compiler wrote is not checked here; see [`crate::verify_image`].
    ///
    /// # Errors
    /// [`ModelError`] when the image is malformed, contradicts itself or is of no generator.
    pub fn load(image: Arc<dyn ImageBytes>) -> Result<Generator, ModelError> {
        static SERIALS: AtomicU64 = AtomicU64::new(1);
        let bytes = image.as_bytes();
        if !(bytes.as_ptr() as usize).is_multiple_of(TENSOR_ALIGN_BYTES as usize) {
            return Err(ImageError::Misaligned.into());
        }
        let checked = CheckedImage::new(bytes)?;
        let inconsistent = |what: &str| ModelError::Inconsistent { what: what.to_owned() };
        let section = |kind: SectionKind, name: &str| {
            checked.section(kind).ok_or_else(|| inconsistent(&format!("section {name} is missing")))
        };
        let config = GeneratorConfig::from_json(
            section(SectionKind::Config, "config.json")?,
            checked.section(SectionKind::GenerationConfig),
        )?;
        section(SectionKind::Tokenizer, "tokenizer.json")?;
        let text = |bytes: &[u8], what: &str| {
            std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| inconsistent(&format!("{what} is not UTF-8")))
        };
        let id = text(section(SectionKind::ModelId, "model id")?, "the model id")?;
        let template = checked
            .section(SectionKind::ChatTemplate)
            .map(|bytes| text(bytes, "the chat template"))
            .transpose()?;
        let tokens = TokenNames::of(checked.section(SectionKind::TokenizerConfig));
        let header = checked.header().values();
        let agrees = config.family == header.family
            && config.task == header.task
            && config.width == header.hidden_dim as usize
            && config.vocab_size == header.vocab_size as usize
            && config.max_input_tokens == header.max_seq_tokens as usize;
        if !agrees {
            return Err(inconsistent("header and config.json disagree"));
        }
        let info = GeneratorInfo {
            id,
            task: header.task,
            family: header.family,
            precision: header.precision,
            image_bytes: header.total_bytes,
            content_hash: header.content_hash,
            fingerprint: header.fingerprint(),
            vocab_size: config.vocab_size,
            max_input_tokens: config.max_input_tokens,
            max_total_tokens: config.max_total_tokens,
            has_chat_template: template.is_some(),
            cpu_path: path_name(),
        };
        let network = Network::new(&image, &checked, config, header.precision)?;
        Ok(Generator {
            serial: SERIALS.fetch_add(1, Ordering::Relaxed),
            image,
            info,
            network,
            template,
            tokens,
            words: OnceLock::new(),
            probe: OnceLock::new(),
        })
    }

    /// What the generator is.
    pub fn info(&self) -> &GeneratorInfo {
        &self.info
    }

    /// Builds the tokenizer now, some ten milliseconds, instead of at the first prompt.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when it can't be built.
    pub fn warm(&self) -> Result<(), ModelError> {
        self.words().map(|_| ())
    }

    fn words(&self) -> Result<&Words, ModelError> {
        let build = || {
            let checked = CheckedImage::new(self.image.as_bytes())?;
            let missing = || ModelError::Inconsistent { what: "section tokenizer.json is missing".into() };
            Words::new(checked.section(SectionKind::Tokenizer).ok_or_else(missing)?, self.info.vocab_size)
        };
        self.words.get_or_init(build).as_ref().map_err(ModelError::clone)
    }

    /// The text of a chat as the model reads it: messages in its template, asking for an answer.
    ///
    /// # Errors
    /// [`ModelError::Template`] when the model has none, or what the template said.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let Some(template) = &self.template else {
            let reason = "the model has no chat template; give it a text".into();
            return Err(ModelError::Template { reason });
        };
        template::render(template, messages, &self.tokens, SystemTime::now())
    }

    /// Tokenizes a prompt and reserves memory for its keys and values; computes nothing yet.
    ///
    /// # Errors
    /// [`ModelError`] when options are out of range, the prompt is too long for the model or empty, its template fails, or there
    /// is no room for its keys and values ([`ModelError::KvMemory`]: wait until others are done, or ask for fewer tokens).
    pub fn begin(&self, prompt: &Prompt<'_>, options: &GenerateOptions) -> Result<Generation, ModelError> {
        options.check()?;
        let words = self.words()?;
        let config = &self.network.config;
        let room = config.max_input_tokens.min(options.max_input_tokens.unwrap_or(usize::MAX));
        let ids = match prompt {
            Prompt::Text(text) if config.t5.is_some() => words.surrounded(text, room)?,
            Prompt::Text(text) => words.surrounded(text, usize::MAX)?,
            Prompt::Chat(messages) => words.bare(&self.render_chat(messages)?)?,
        };
        if ids.is_empty() || ids.len() > room {
            return Err(ModelError::TokenCount { index: 0, tokens: ids.len(), max_tokens: room });
        }
        let (encoder_ids, prompt) = match config.t5 {
            Some(t5) => (ids, vec![t5.start_token]),
            None => (Vec::new(), ids),
        };
        let max_tokens = options.max_output_tokens.min(config.max_total_tokens - prompt.len()).max(1);
        let per_slot = self.network.decoder.shape.slot_floats();
        let layers = self.network.decoder.layer_count();
        let slots = prompt.len() + max_tokens * options.num_beams;
        let (cache, cross) = (layers * slots * per_slot, layers * encoder_ids.len() * per_slot);
        let share = KvShare::take(4 * (cache as u64 + cross as u64))?;
        let search = (options.num_beams > 1).then(|| Search {
            beams: Beams::new(options.num_beams, max_tokens),
            slots: vec![(0..prompt.len() as u32).collect()],
        });
        let phase = match &self.network.encoder {
            None => Phase::Prompt(0),
            Some(encoder) => {
                let mut hidden = Vec::with_capacity(encoder_ids.len() * config.width);
                encoder_ids.iter().try_for_each(|id| self.network.embed(*id, &mut hidden))?;
                let cache = vec![0.0; encoder_ids.len() * encoder.shape.slot_floats()];
                Phase::Encode { hidden, cache, layer: 0 }
            }
        };
        Ok(Generation {
            owner: self.serial,
            options: options.clone(),
            encoder_ids,
            prompt,
            output: Vec::new(),
            max_tokens,
            phase,
            slots,
            // Zeroed pages come from the system when they are first written.
            cache: vec![0.0; cache],
            cross: vec![0.0; cross],
            search,
            streamed: Streamed::default(),
            share,
            checksum: 0,
        })
    }

    /// Takes each answer one token further, computed together; those whose prompt is long come so far that one step stays short.
    /// What is done stays as it is.
    ///
    /// # Errors
    /// [`ModelError::Compute`] when an answer is another generator's or a result is not finite; answers of the batch are then to
    /// be thrown away.
    pub fn step(&self, batch: &mut [&mut Generation]) -> Result<(), ModelError> {
        if batch.iter().any(|generation| generation.owner != self.serial) {
            return Err(ModelError::Compute { reason: "an answer was begun by another generator".into() });
        }
        let words = self.words()?;
        for batch in batch.chunks_mut(MAX_STEP_GENERATIONS) {
            pool().run_alone(self.info.image_bytes >= MIN_PARALLEL_BYTES, |threads| {
                let spent = self.encode(threads, batch)?;
                self.decode(threads, batch, words, MAX_STEP_PROMPT_TOKENS.saturating_sub(spent))
            })?;
        }
        Ok(())
    }

    /// Some layers of the encoder for answers that are equally far. Gives how much of the step's budget of tokens that took.
    fn encode(&self, threads: usize, batch: &mut [&mut Generation]) -> Result<usize, ModelError> {
        let (Some(encoder), Some(t5)) = (&self.network.encoder, self.network.config.t5) else { return Ok(0) };
        let far = |generation: &Generation| match generation.phase {
            Phase::Encode { layer, .. } => Some(layer),
            _ => None,
        };
        let Some(layer) = batch.iter().filter_map(|generation| far(generation)).max() else { return Ok(0) };
        let mut tokens = 0;
        let mut group: Vec<&mut Generation> = Vec::new();
        for generation in batch.iter_mut() {
            let more = generation.encoder_ids.len();
            if far(generation) == Some(layer) && (tokens == 0 || tokens + more <= MAX_STEP_PROMPT_TOKENS) {
                tokens += more;
                group.push(generation);
            }
        }
        let all = encoder.layer_count();
        let layers = (MAX_STEP_PROMPT_TOKENS * all / tokens.max(1)).clamp(1, all - layer);
        let width = self.network.config.width;
        let mut hidden = Vec::with_capacity(tokens * width);
        let (mut rows, mut kept, mut longest) = (Vec::with_capacity(tokens), Vec::new(), 1);
        for generation in &mut group {
            let count = generation.encoder_ids.len();
            let Phase::Encode { hidden: own, cache, .. } = &mut generation.phase else { continue };
            hidden.extend_from_slice(own);
            rows.extend((0..count).map(|position| StepRow {
                sequence: kept.len(),
                slot: position,
                position,
                sees: Sees::First(count),
            }));
            kept.push(Kept { cache, slots: count, cross: None });
            longest = longest.max(count);
        }
        let bias = encoder.bias_of_distances(t5, longest, longest);
        let bias = bias.as_ref().map(|values| DistanceBias { values, center: longest });
        let step = Step { rows: &rows, angles: &[], bias, layers: layer..layer + layers };
        run_stack(threads, &encoder.weights(), &step, &mut kept, &mut hidden)?;
        drop(kept);
        let mut from = 0;
        for generation in &mut group {
            let Phase::Encode { hidden: own, layer: done, .. } = &mut generation.phase else { continue };
            let until = from + own.len();
            own.copy_from_slice(&hidden[from..until]);
            from = until;
            *done = layer + layers;
            if *done == all {
                self.finish_encoding(threads, generation)?;
            }
        }
        Ok((tokens * layers).div_ceil(all))
    }

    /// The decoder's keys and values of what the encoder gave.
    fn finish_encoding(&self, threads: usize, generation: &mut Generation) -> Result<(), ModelError> {
        let (Phase::Encode { hidden, .. }, Some(encoder)) = (&mut generation.phase, &self.network.encoder)
        else {
            return Ok(());
        };
        for row in hidden.chunks_exact_mut(self.network.config.width) {
            rms_norm_row(row, encoder.final_norm(), encoder.shape.eps);
        }
        let decoder = &self.network.decoder;
        let tokens = generation.encoder_ids.len();
        let per_layer = tokens * decoder.shape.slot_floats();
        let mut part = Vec::new();
        for (layer, out) in generation.cross.chunks_exact_mut(per_layer).enumerate() {
            let matrices = decoder.cross_keys(layer).unwrap_or_default();
            if let [both] = &matrices[..] {
                project(threads, both, hidden, out)?;
                continue;
            }
            let mut column = 0;
            for matrix in &matrices {
                part.resize(tokens * matrix.outputs, 0.0);
                project(threads, matrix, hidden, &mut part)?;
                let rows = out.chunks_exact_mut(decoder.shape.slot_floats());
                for (out, row) in rows.zip(part.chunks_exact(matrix.outputs)) {
                    out[column..column + matrix.outputs].copy_from_slice(row);
                }
                column += matrix.outputs;
            }
        }
        generation.phase = Phase::Prompt(0);
        Ok(())
    }

    /// One token further for all that decode, and up to `budget` tokens of prompts.
    fn decode(
        &self,
        threads: usize,
        batch: &mut [&mut Generation],
        words: &Words,
        budget: usize,
    ) -> Result<(), ModelError> {
        let network = &self.network;
        let mut rows =
            Rows { network, left: budget, hidden: Vec::new(), angles: Vec::new(), rows: Vec::new() };
        // Of each answer that gets logits: its index, and its rows.
        let mut wanted = Vec::new();
        let mut kept = Vec::with_capacity(batch.len());
        for (index, generation) in batch.iter_mut().enumerate() {
            let Generation { phase, prompt, output, cache, cross, slots, search, .. } = &mut **generation;
            let sequence = kept.len();
            let before = rows.rows.len();
            match phase {
                Phase::Prompt(done) => {
                    let until = prompt.len().min(*done + rows.left);
                    for (position, id) in prompt.iter().enumerate().take(until).skip(*done) {
                        rows.add(*id, sequence, position, position, Sees::First(position + 1))?;
                    }
                    rows.left -= until - *done;
                    if until == prompt.len() && until > *done {
                        wanted.push((index, rows.rows.len() - 1..rows.rows.len()));
                    }
                    *done = until;
                }
                Phase::Decode => {
                    match search {
                        None => {
                            let Some(last) = output.last() else { continue };
                            let position = prompt.len() + output.len() - 1;
                            rows.add(*last, sequence, position, position, Sees::First(position + 1))?;
                        }
                        Some(search) => {
                            for (beam, slots) in search.beams.running().iter().zip(&search.slots) {
                                let (Some(last), Some(slot)) = (beam.ids.last(), slots.last()) else {
                                    continue;
                                };
                                let position = slots.len() - 1;
                                rows.add(*last, sequence, *slot as usize, position, Sees::Slots(slots))?;
                            }
                        }
                    }
                    wanted.push((index, before..rows.rows.len()));
                }
                Phase::Encode { .. } | Phase::Done(_) => continue,
            }
            let cross = (!cross.is_empty()).then_some(&cross[..]);
            kept.push(Kept { cache, slots: *slots, cross });
        }
        let Rows { mut hidden, angles, rows, .. } = rows;
        let farthest = rows.iter().map(|row| row.position).max().unwrap_or(0);
        let bias = network.config.t5.and_then(|t5| network.decoder.bias_of_distances(t5, farthest, 0));
        let bias = bias.as_ref().map(|values| DistanceBias { values, center: farthest });
        let step = Step { rows: &rows, angles: &angles, bias, layers: 0..network.decoder.layer_count() };
        run_stack(threads, &network.decoder.weights(), &step, &mut kept, &mut hidden)?;
        drop((kept, rows));
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let mut count = 0;
            let fitting = rest.iter().take_while(|(_, rows)| {
                count += rows.len();
                count <= MAX_LOGIT_ROWS
            });
            let (now, later) = rest.split_at(fitting.count().max(1));
            let mut logits = self.logits(threads, &hidden, now.iter().flat_map(|(_, rows)| rows.clone()))?;
            let mut logits = &mut logits[..];
            for (index, rows) in now {
                let (own, others) = logits.split_at_mut(rows.len() * network.config.vocab_size);
                batch[*index].accept(own, words, &network.config.end_tokens)?;
                logits = others;
            }
            rest = later;
        }
        Ok(())
    }

    /// Logits of some rows of the hidden state, `[rows, vocab]`.
    fn logits(
        &self,
        threads: usize,
        hidden: &[f32],
        rows: impl Iterator<Item = usize>,
    ) -> Result<Vec<f32>, ModelError> {
        let config = &self.network.config;
        let mut left = Vec::new();
        for row in rows {
            let start = left.len();
            left.extend_from_slice(&hidden[row * config.width..(row + 1) * config.width]);
            rms_norm_row(&mut left[start..], self.network.decoder.final_norm(), config.eps);
        }
        if config.t5.is_some_and(|t5| t5.scales_output) {
            let factor = 1.0 / (config.width as f32).sqrt();
            left.iter_mut().for_each(|value| *value *= factor);
        }
        let mut logits = vec![0.0; left.len() / config.width * config.vocab_size];
        project(threads, &self.network.output(), &mut left, &mut logits)?;
        Ok(logits)
    }

    /// Generates a few tokens from a known prompt and compares with the first time. Run it after a failed job: silently wrong
    /// results begin there.
    ///
    /// # Errors
    /// [`ModelError::Probe`] when the result differs, or any other error of computing.
    pub fn probe(&self) -> Result<(), ModelError> {
        let options = GenerateOptions { max_output_tokens: PROBE_TOKENS, ..GenerateOptions::default() };
        let mut generation = self.begin(&Prompt::Text(PROBE_TEXT), &options)?;
        while !generation.is_done() {
            self.step(&mut [&mut generation])?;
        }
        let now = (generation.checksum, generation.token_ids().to_vec());
        if *self.probe.get_or_init(|| now.clone()) == now { Ok(()) } else { Err(ModelError::Probe) }
    }

    /// The whole answer to a prompt.
    ///
    /// # Errors
    /// As [`Generator::begin`] and [`Generator::step`].
    pub fn generate(&self, prompt: &Prompt<'_>, options: &GenerateOptions) -> Result<Generated, ModelError> {
        let mut generation = self.begin(prompt, options)?;
        loop {
            if let Some(finish_reason) = generation.finish_reason() {
                return Ok(Generated {
                    text: generation.text(),
                    token_ids: generation.token_ids().to_vec(),
                    finish_reason,
                    prompt_tokens: generation.prompt_tokens(),
                });
            }
            self.step(&mut [&mut generation])?;
        }
    }
}

/// Rows of a step as they are gathered.
struct Rows<'a> {
    network: &'a Network,
    /// Tokens of prompts that may still be added.
    left: usize,
    hidden: Vec<f32>,
    angles: Vec<f32>,
    rows: Vec<StepRow<'a>>,
}

impl<'a> Rows<'a> {
    fn add(
        &mut self,
        id: u32,
        sequence: usize,
        slot: usize,
        position: usize,
        sees: Sees<'a>,
    ) -> Result<(), Mismatch> {
        self.network.embed(id, &mut self.hidden)?;
        self.network.angles(position, &mut self.angles);
        self.rows.push(StepRow { sequence, slot, position, sees });
        Ok(())
    }
}

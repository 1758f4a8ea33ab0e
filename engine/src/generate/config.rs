//! A generator's config.json and generation_config.json, checked: every number has a range before any code divides by it or
//! allocates from it, and what this version would compute differently is refused by name.

use crate::config::ConfigError;
use crate::json::{UniqueMap, shorten};
use crate::kernel::Feed;
use serde_json::Value;
use shm_layout::image::{Family, Task};

/// Most keys in one of these files.
const MAX_CONFIG_KEYS: usize = 4096;
/// Most tokens of a sequence that any generator takes, whatever its config says.
pub const MAX_SEQUENCE_TOKENS: usize = 131_072;
/// Tokens that a T5 reads when nothing says otherwise.
const T5_INPUT_TOKENS: usize = 512;
/// Tokens that a T5 writes at most: its positions are relative, so nothing in the model bounds them.
const T5_OUTPUT_TOKENS: usize = 4096;
/// Most ids that end a generation.
const MAX_END_TOKENS: usize = 16;

/// How rotary positions are computed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rope {
    pub(crate) theta: f64,
    /// Llama 3's way of stretching them.
    pub(crate) llama3: Option<Llama3Rope>,
    /// Whether neighbours are turned, not halves: weights of GGUF files for llama.
    pub(crate) neighbours: bool,
    /// What frequencies are divided by, one for each pair; empty: nothing.
    pub(crate) factors: Vec<f32>,
}

/// `rope_scaling` of type `llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Llama3Rope {
    pub(crate) factor: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) original_tokens: f64,
}

/// What a T5 has besides.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct T5Parts {
    pub(crate) encoder_layers: usize,
    pub(crate) buckets: usize,
    pub(crate) max_distance: usize,
    /// Whether the decoder's output is multiplied with `1/√width`.
    pub(crate) scales_output: bool,
    pub(crate) start_token: u32,
}

/// The numbers of a generator that computing needs, all in range.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GeneratorConfig {
    pub(crate) family: Family,
    pub(crate) task: Task,
    pub(crate) vocab_size: usize,
    pub(crate) width: usize,
    /// Layers of the decoder.
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) wide: usize,
    pub(crate) feed: Feed,
    pub(crate) eps: f32,
    /// Whether the checkpoint may leave the output matrix out.
    pub(crate) ties_output: bool,
    pub(crate) has_head_norms: bool,
    pub(crate) rope: Option<Rope>,
    pub(crate) t5: Option<T5Parts>,
    pub(crate) max_input_tokens: usize,
    /// Input and output together; of a T5 the output alone.
    pub(crate) max_total_tokens: usize,
    /// Ids that end a generation.
    pub(crate) end_tokens: Vec<u32>,
}

/// Whether a config.json's `model_type` is a generator's.
pub(crate) fn is_generator(model_type: &str) -> bool {
    matches!(model_type, "t5" | "llama" | "qwen3")
}

impl GeneratorConfig {
    /// Parses and checks a config.json with its generation_config.json, if there is one.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that is missing, out of range or not supported.
    pub(crate) fn from_json(config: &[u8], generation: Option<&[u8]>) -> Result<Self, ConfigError> {
        let fields = Fields::parse(config)?;
        let generation = generation.map(Fields::parse).transpose()?;
        let mut config = match fields.text("model_type")? {
            "t5" => t5(&fields, generation.as_ref())?,
            "llama" => causal(&fields, Family::Llama)?,
            "qwen3" => causal(&fields, Family::Qwen3)?,
            other => return Err(ConfigError::Architecture { found: shorten(other) }),
        };
        for fields in [Some(&fields), generation.as_ref()].into_iter().flatten() {
            refuse_unknown_ways(fields)?;
        }
        let ends =
            generation.as_ref().map(|fields| fields.ids("eos_token_id")).transpose()?.unwrap_or_default();
        config.end_tokens = if ends.is_empty() { fields.ids("eos_token_id")? } else { ends };
        if config.end_tokens.len() > MAX_END_TOKENS {
            return Err(fields.range("eos_token_id", "too many", 0, MAX_END_TOKENS as u64));
        }
        if let Some(id) = config.end_tokens.iter().find(|id| **id as usize >= config.vocab_size) {
            return Err(fields.range("eos_token_id", &id.to_string(), 0, config.vocab_size as u64 - 1));
        }
        Ok(config)
    }
}

/// Settings of generate that change tokens and that this version does not have.
fn refuse_unknown_ways(fields: &Fields) -> Result<(), ConfigError> {
    for field in [
        "forced_bos_token_id",
        "forced_eos_token_id",
        "forced_decoder_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "bad_words_ids",
        "sequence_bias",
        "encoder_no_repeat_ngram_size",
        "guidance_scale",
        "num_beam_groups",
    ] {
        let value = fields.0.0.get(field).unwrap_or(&Value::Null);
        let neutral = match value {
            Value::Null => true,
            Value::Number(number) => {
                matches!(field, "encoder_no_repeat_ngram_size") && number.as_u64() == Some(0)
                    || matches!(field, "guidance_scale" | "num_beam_groups") && number.as_f64() == Some(1.0)
            }
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        if !neutral {
            return Err(unsupported(field, value, "generation with it is not supported; remove it"));
        }
    }
    Ok(())
}

fn t5(fields: &Fields, generation: Option<&Fields>) -> Result<GeneratorConfig, ConfigError> {
    let feed = match fields.optional_text("feed_forward_proj").unwrap_or("relu") {
        "relu" => Feed::Relu,
        "gated-gelu" => Feed::GatedGelu,
        other => {
            let value = Value::String(other.to_owned());
            return Err(unsupported("feed_forward_proj", &value, "relu and gated-gelu are supported"));
        }
    };
    let vocab_size = fields.number("vocab_size", 1, 2_000_000, None)?;
    let encoder_layers = fields.number("num_layers", 1, 256, None)?;
    let heads = fields.number("num_heads", 1, 256, None)?;
    // Both halves of the buckets need one for each exact distance.
    let buckets = fields.number("relative_attention_num_buckets", 4, 1024, Some(32))?;
    let max_distance = fields.number("relative_attention_max_distance", 2, 1 << 20, Some(128))?;
    if !buckets.is_multiple_of(4) || max_distance <= buckets / 2 {
        return Err(unsupported(
            "relative_attention_num_buckets",
            &buckets.into(),
            "it must be a multiple of 4 and less than twice relative_attention_max_distance",
        ));
    }
    let start = generation.and_then(|fields| fields.0.0.get("decoder_start_token_id"));
    let start = match start {
        Some(Value::Null) | None => {
            fields.number("decoder_start_token_id", 0, vocab_size as u64 - 1, Some(0))?
        }
        Some(_) => {
            generation.unwrap_or(fields).number("decoder_start_token_id", 0, vocab_size as u64 - 1, None)?
        }
    };
    let ties = fields.flag("tie_word_embeddings", true)?;
    Ok(GeneratorConfig {
        family: Family::T5,
        task: Task::TextToText,
        vocab_size,
        width: fields.number("d_model", 1, 16_384, None)?,
        layers: fields.number("num_decoder_layers", 1, 256, Some(encoder_layers as u64))?,
        heads,
        kv_heads: heads,
        head_dim: fields.number("d_kv", 1, 1024, None)?,
        wide: fields.number("d_ff", 1, 131_072, None)?,
        feed,
        eps: fields.epsilon("layer_norm_epsilon", 1e-6)?,
        ties_output: true,
        has_head_norms: false,
        rope: None,
        t5: Some(T5Parts {
            encoder_layers,
            buckets,
            max_distance,
            scales_output: fields.flag("scale_decoder_outputs", ties)?,
            start_token: start as u32,
        }),
        max_input_tokens: fields.number(
            "n_positions",
            1,
            MAX_SEQUENCE_TOKENS as u64,
            Some(T5_INPUT_TOKENS as u64),
        )?,
        max_total_tokens: T5_OUTPUT_TOKENS,
        end_tokens: Vec::new(),
    })
}

fn causal(fields: &Fields, family: Family) -> Result<GeneratorConfig, ConfigError> {
    for field in ["attention_bias", "mlp_bias", "use_sliding_window"] {
        if fields.flag(field, false)? {
            return Err(unsupported(field, &true.into(), "only models without it are supported"));
        }
    }
    let layer_types = fields.0.0.get("layer_types").and_then(Value::as_array);
    if let Some(other) =
        layer_types.into_iter().flatten().find(|kind| kind.as_str() != Some("full_attention"))
    {
        return Err(unsupported("layer_types", other, "only full_attention is supported"));
    }
    match fields.optional_text("hidden_act").unwrap_or("silu") {
        "silu" => {}
        other => return Err(unsupported("hidden_act", &other.into(), "only silu is supported")),
    }
    let width = fields.number("hidden_size", 1, 16_384, None)?;
    let heads = fields.number("num_attention_heads", 1, 256, None)?;
    let kv_heads = fields.number("num_key_value_heads", 1, 256, Some(heads as u64))?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(unsupported(
            "num_key_value_heads",
            &kv_heads.into(),
            "it must divide num_attention_heads",
        ));
    }
    let default_dim = if family == Family::Qwen3 { 128 } else { (width / heads).max(1) as u64 };
    let head_dim = fields.number("head_dim", 2, 1024, Some(default_dim.max(2)))?;
    if !head_dim.is_multiple_of(2) {
        return Err(unsupported("head_dim", &head_dim.into(), "it must be even"));
    }
    let tokens = fields.number("max_position_embeddings", 2, 1 << 30, Some(2048))?.min(MAX_SEQUENCE_TOKENS);
    Ok(GeneratorConfig {
        family,
        task: Task::Chat,
        vocab_size: fields.number("vocab_size", 1, 2_000_000, None)?,
        width,
        layers: fields.number("num_hidden_layers", 1, 256, None)?,
        heads,
        kv_heads,
        head_dim,
        wide: fields.number("intermediate_size", 1, 131_072, None)?,
        feed: Feed::GatedSilu,
        eps: fields.epsilon("rms_norm_eps", 1e-6)?,
        ties_output: fields.flag("tie_word_embeddings", false)?,
        has_head_norms: family == Family::Qwen3,
        rope: Some(rope(fields, head_dim)?),
        t5: None,
        max_input_tokens: tokens - 1,
        max_total_tokens: tokens,
        end_tokens: Vec::new(),
    })
}

/// `rope_theta` and `rope_scaling`, or both in the newer `rope_parameters`.
fn rope(fields: &Fields, head_dim: usize) -> Result<Rope, ConfigError> {
    let object = |field: &str| fields.0.0.get(field).and_then(Value::as_object);
    let newer = object("rope_parameters");
    let scaling = newer.or(object("rope_scaling"));
    let number = |map: &serde_json::Map<String, Value>, key: &str| map.get(key).and_then(Value::as_f64);
    let bad = |value: &Value, supported| unsupported("rope_scaling", value, supported);
    let theta = scaling
        .and_then(|map| number(map, "rope_theta"))
        .or_else(|| fields.0.0.get("rope_theta").and_then(Value::as_f64))
        .unwrap_or(10_000.0);
    if !(theta > 1.0 && theta <= 1e12) {
        return Err(unsupported("rope_theta", &theta.into(), "it must be above 1 and at most 1e12"));
    }
    let neighbours = fields.flag("rope_neighbours", false)?;
    let factors = match fields.0.0.get("rope_factors") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(list)) if list.len() == head_dim / 2 => {
            let factors: Vec<f32> =
                list.iter().filter_map(Value::as_f64).map(|factor| factor as f32).collect();
            match factors.len() == list.len()
                && factors.iter().all(|factor| factor.is_finite() && *factor > 0.0)
            {
                true => factors,
                false => return Err(ConfigError::Field { field: "rope_factors", wanted: "numbers above 0" }),
            }
        }
        Some(_) => {
            return Err(ConfigError::Field {
                field: "rope_factors",
                wanted: "one number for each pair of a head",
            });
        }
    };
    let Some(map) = scaling else { return Ok(Rope { theta, llama3: None, neighbours, factors }) };
    let kind = map.get("rope_type").or(map.get("type"));
    let whole = map.get("partial_rotary_factor").and_then(Value::as_f64).is_none_or(|factor| factor == 1.0);
    let llama3 = match kind.and_then(Value::as_str).unwrap_or("default") {
        _ if !whole => return Err(bad(&Value::Object(map.clone()), "partial_rotary_factor must be 1")),
        "default" => None,
        "llama3" => {
            let read = |key: &str| {
                number(map, key)
                    .filter(|value| *value > 0.0 && *value <= 1e9)
                    .ok_or_else(|| bad(&Value::Object(map.clone()), "llama3 needs its four numbers, above 0"))
            };
            let scaled = Llama3Rope {
                factor: read("factor")?,
                low: read("low_freq_factor")?,
                high: read("high_freq_factor")?,
                original_tokens: read("original_max_position_embeddings")?,
            };
            if scaled.high <= scaled.low {
                return Err(bad(
                    &Value::Object(map.clone()),
                    "high_freq_factor must be above low_freq_factor",
                ));
            }
            Some(scaled)
        }
        other => return Err(bad(&other.into(), "only default and llama3 are supported")),
    };
    Ok(Rope { theta, llama3, neighbours, factors })
}

fn unsupported(field: &'static str, value: &Value, supported: &'static str) -> ConfigError {
    ConfigError::Unsupported { field, value: shorten(&value.to_string()), supported }
}

/// Typed access to the keys of a JSON object.
struct Fields(UniqueMap<Value, MAX_CONFIG_KEYS>);

impl Fields {
    fn parse(bytes: &[u8]) -> Result<Fields, ConfigError> {
        serde_json::from_slice(bytes)
            .map(Fields)
            .map_err(|error| ConfigError::Json { reason: shorten(&error.to_string()) })
    }

    fn range(&self, field: &'static str, value: &str, low: u64, high: u64) -> ConfigError {
        ConfigError::Range { field, value: shorten(value), low, high }
    }

    fn text(&self, field: &'static str) -> Result<&str, ConfigError> {
        self.optional_text(field).ok_or(ConfigError::Field { field, wanted: "a string" })
    }

    fn optional_text(&self, field: &str) -> Option<&str> {
        self.0.0.get(field).and_then(Value::as_str)
    }

    fn flag(&self, field: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.0.0.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(ConfigError::Field { field, wanted: "true or false" }),
        }
    }

    fn number(
        &self,
        field: &'static str,
        low: u64,
        high: u64,
        default: Option<u64>,
    ) -> Result<usize, ConfigError> {
        let value = match (self.0.0.get(field), default) {
            (None | Some(Value::Null), Some(default)) => return Ok(default as usize),
            (Some(value), _) if value.is_number() => value,
            _ => return Err(ConfigError::Field { field, wanted: "an integer" }),
        };
        match value.as_u64() {
            Some(number) if (low..=high).contains(&number) => Ok(number as usize),
            _ => Err(self.range(field, &value.to_string(), low, high)),
        }
    }

    fn epsilon(&self, field: &'static str, default: f32) -> Result<f32, ConfigError> {
        match self.0.0.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => match value.as_f64() {
                Some(number) if number > 0.0 && number <= 0.1 => Ok(number as f32),
                _ => Err(unsupported(field, value, "it must be above 0 and at most 0.1")),
            },
        }
    }

    /// One id, a list of ids, or none.
    fn ids(&self, field: &'static str) -> Result<Vec<u32>, ConfigError> {
        let one = |value: &Value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or(ConfigError::Field { field, wanted: "a token id or a list of them" })
        };
        match self.0.0.get(field) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().take(MAX_END_TOKENS + 1).map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }
}

//! The model's config.json, checked: every integer has a range before any code divides by it or allocates from it.

use crate::json::{UniqueMap, shorten};
use serde_json::Value;
use shm_layout::image::Family;

/// Most keys in a config.json.
const MAX_CONFIG_KEYS: usize = 4096;
/// Largest config.json, bytes.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Model types that this version computes.
pub const SUPPORTED_MODEL_TYPES: &[&str] = &["bert", "roberta", "xlm-roberta", "camembert"];

/// Why a config.json can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not the JSON that was expected.
    #[error("config.json can't be read: {reason}")]
    Json {
        /// What the parser found.
        reason: String,
    },
    /// A field is missing or of another type.
    #[error("config.json: `{field}` is missing or not {wanted}")]
    Field {
        /// Key in config.json.
        field: &'static str,
        /// Type that was expected.
        wanted: &'static str,
    },
    /// A number is out of range.
    #[error("config.json: `{field}` is {value}, allowed is {low} to {high}")]
    Range {
        /// Key in config.json.
        field: &'static str,
        /// Value found.
        value: String,
        /// Smallest allowed value.
        low: u64,
        /// Largest allowed value.
        high: u64,
    },
    /// The model is of an architecture that this version does not compute.
    #[error("config.json: model_type {found:?} is not supported; supported are: {}", SUPPORTED_MODEL_TYPES.join(", "))]
    Architecture {
        /// The model_type found.
        found: String,
    },
    /// A setting of a supported architecture that this version does not compute.
    #[error("config.json: `{field}` = {value} is not supported; {supported}")]
    Unsupported {
        /// Key in config.json.
        field: &'static str,
        /// Value found.
        value: String,
        /// What is supported instead.
        supported: &'static str,
    },
}

/// Activation between the two halves of a feed-forward block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x/2 (1 + erf(x/√2))`.
    GeluErf,
    /// The tanh approximation of GELU.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// The numbers of an encoder that computing needs, all in range.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// Model family.
    pub family: Family,
    /// Width of the hidden state.
    pub hidden_dim: usize,
    /// Number of layers.
    pub layer_count: usize,
    /// Number of attention heads; divides `hidden_dim`.
    pub head_count: usize,
    /// Width of the feed-forward block.
    pub intermediate_dim: usize,
    /// Activation of the feed-forward block.
    pub activation: Activation,
    /// Rows of the position table.
    pub position_count: usize,
    /// Rows of the token type table.
    pub type_count: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the variance in layer norms.
    pub layer_norm_eps: f32,
    /// Id of the padding token.
    pub pad_token_id: u32,
}

impl EncoderConfig {
    /// Parses and checks a config.json.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that is missing, out of range or not supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let map: UniqueMap<Value, MAX_CONFIG_KEYS> = serde_json::from_slice(bytes)
            .map_err(|error| ConfigError::Json { reason: shorten(&error.to_string()) })?;
        let map = Fields(map);
        let model_type = map.text("model_type")?;
        let family = match model_type {
            "bert" => Family::Bert,
            "roberta" | "xlm-roberta" | "camembert" => Family::Roberta,
            other => return Err(ConfigError::Architecture { found: shorten(other) }),
        };
        for field in ["is_decoder", "add_cross_attention"] {
            if map.0.0.get(field).is_some_and(|value| value == &Value::Bool(true)) {
                return Err(ConfigError::Unsupported {
                    field,
                    value: "true".into(),
                    supported: "only encoders are supported",
                });
            }
        }
        if let Some(kind) = map.0.0.get("position_embedding_type")
            && kind.as_str() != Some("absolute")
            && !kind.is_null()
        {
            return Err(ConfigError::Unsupported {
                field: "position_embedding_type",
                value: shorten(&kind.to_string()),
                supported: "only \"absolute\" is supported",
            });
        }
        let activation = match map.text("hidden_act")? {
            "gelu" => Activation::GeluErf,
            "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
            "relu" => Activation::Relu,
            other => {
                return Err(ConfigError::Unsupported {
                    field: "hidden_act",
                    value: shorten(other),
                    supported: "gelu, gelu_new, gelu_fast, gelu_pytorch_tanh and relu are supported",
                });
            }
        };
        let config = EncoderConfig {
            family,
            hidden_dim: map.number("hidden_size", 1, 16_384, None)?,
            layer_count: map.number("num_hidden_layers", 1, 256, None)?,
            head_count: map.number("num_attention_heads", 1, 256, None)?,
            intermediate_dim: map.number("intermediate_size", 1, 131_072, None)?,
            activation,
            position_count: map.number("max_position_embeddings", 1, 131_072, None)?,
            type_count: map.number("type_vocab_size", 1, 64, Some(2))?,
            vocab_size: map.number("vocab_size", 1, 2_000_000, None)?,
            layer_norm_eps: map.epsilon("layer_norm_eps")?,
            pad_token_id: map.number("pad_token_id", 0, 2_000_000, Some(0))? as u32,
        };
        if !config.hidden_dim.is_multiple_of(config.head_count) {
            return Err(ConfigError::Unsupported {
                field: "num_attention_heads",
                value: config.head_count.to_string(),
                supported: "it must divide hidden_size",
            });
        }
        if config.pad_token_id as usize >= config.vocab_size {
            return Err(ConfigError::Range {
                field: "pad_token_id",
                value: config.pad_token_id.to_string(),
                low: 0,
                high: config.vocab_size as u64 - 1,
            });
        }
        if config.position_count <= config.first_position() {
            return Err(ConfigError::Range {
                field: "max_position_embeddings",
                value: config.position_count.to_string(),
                low: config.first_position() as u64 + 1,
                high: 131_072,
            });
        }
        Ok(config)
    }

    /// Position of the first token: 0 for BERT, the one after the padding id for RoBERTa.
    pub fn first_position(&self) -> usize {
        match self.family {
            Family::Roberta => self.pad_token_id as usize + 1,
            _ => 0,
        }
    }

    /// Longest sequence in tokens that the position table allows.
    pub fn max_tokens(&self) -> usize {
        self.position_count - self.first_position()
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_dim / self.head_count
    }
}

/// Typed access to the keys of a config.json.
struct Fields(UniqueMap<Value, MAX_CONFIG_KEYS>);

impl Fields {
    fn text(&self, field: &'static str) -> Result<&str, ConfigError> {
        self.0.0.get(field).and_then(Value::as_str).ok_or(ConfigError::Field { field, wanted: "a string" })
    }

    fn number(
        &self,
        field: &'static str,
        low: u64,
        high: u64,
        default: Option<u64>,
    ) -> Result<usize, ConfigError> {
        let missing = ConfigError::Field { field, wanted: "an integer" };
        let value = match (self.0.0.get(field), default) {
            (None | Some(Value::Null), Some(default)) => return Ok(default as usize),
            (None | Some(Value::Null), None) => return Err(missing),
            (Some(value), _) if value.is_number() => value,
            _ => return Err(missing),
        };
        match value.as_u64() {
            Some(number) if (low..=high).contains(&number) => Ok(number as usize),
            _ => Err(ConfigError::Range { field, value: shorten(&value.to_string()), low, high }),
        }
    }

    fn epsilon(&self, field: &'static str) -> Result<f32, ConfigError> {
        let value = match self.0.0.get(field) {
            None | Some(Value::Null) => return Ok(1e-12),
            Some(value) => value.as_f64().ok_or(ConfigError::Field { field, wanted: "a number" })?,
        };
        if value > 0.0 && value <= 0.1 {
            Ok(value as f32)
        } else {
            Err(ConfigError::Unsupported {
                field,
                value: value.to_string(),
                supported: "it must be above 0 and at most 0.1",
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "hidden_act": "gelu", "max_position_embeddings": 64, "type_vocab_size": 2,
            "vocab_size": 100, "layer_norm_eps": 1e-12, "pad_token_id": 0
        })
    }

    fn parse(value: &Value) -> Result<EncoderConfig, ConfigError> {
        EncoderConfig::from_json(value.to_string().as_bytes())
    }

    #[test]
    fn a_good_config_is_read() {
        let config = parse(&good()).expect("valid");
        assert_eq!((config.hidden_dim, config.head_dim(), config.max_tokens()), (32, 8, 64));
    }

    #[test]
    fn every_integer_is_ranged() {
        for field in [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "vocab_size",
            "pad_token_id",
        ] {
            for value in [json!(-1), json!(1.5), json!(u64::MAX), json!(4e18), json!("12"), json!([1])] {
                let mut config = good();
                config[field] = value.clone();
                let error = parse(&config).expect_err(field).to_string();
                assert!(error.contains(field), "{field} = {value}: {error}");
            }
            if field != "pad_token_id" {
                let mut config = good();
                config[field] = json!(0);
                assert!(parse(&config).is_err(), "{field} = 0 was accepted");
            }
        }
    }

    #[test]
    fn heads_must_divide_the_width() {
        let mut config = good();
        config["num_attention_heads"] = json!(5);
        assert!(matches!(parse(&config), Err(ConfigError::Unsupported { field: "num_attention_heads", .. })));
    }

    #[test]
    fn another_architecture_is_named_with_the_supported_ones() {
        let mut config = good();
        config["model_type"] = json!("gpt2");
        let error = parse(&config).expect_err("unsupported").to_string();
        assert!(error.contains("gpt2") && error.contains("xlm-roberta"), "{error}");
    }

    #[test]
    fn a_repeated_key_is_refused() {
        let text = good().to_string().replacen('{', "{\"hidden_size\": 8, ", 1);
        let error = EncoderConfig::from_json(text.as_bytes()).expect_err("duplicate").to_string();
        assert!(error.contains("twice"), "{error}");
    }
}

//! The model's config.json, checked: every integer has a range before any code divides by it or allocates from it. What the keys
//! of a family mean is in `families`.

mod families;
mod fields;

use crate::json::shorten;
use fields::Fields;
use serde_json::Value;
use shm_layout::image::{Family, Pooling, Task};

/// Most keys in a config.json.
const MAX_CONFIG_KEYS: usize = 4096;
/// Largest config.json, bytes.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Model types that this version computes.
pub const SUPPORTED_MODEL_TYPES: &[&str] = &[
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "qwen3",
];
/// Most labels of a classifier.
pub const MAX_LABELS: usize = 4096;
/// Widest attention head.
pub const MAX_HEAD_DIM: usize = 1024;
/// Most layers behind the pooling.
pub const MAX_HEAD_LAYERS: usize = 8;
/// Outputs of a gated feed-forward block that are packed together; `intermediate_size` is a multiple of it.
pub const GATED_BLOCK: usize = 16;

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
    /// The model brings code of its own, which is never run, and is of no architecture that is known here.
    #[error(
        "config.json: model_type {found:?} needs code of the model's own (auto_map); trust_remote_code can only be false: no \
         model's code is ever run; supported are: {}",
        SUPPORTED_MODEL_TYPES.join(", ")
    )]
    CustomCode {
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
    /// `x / (1 + e^-x)`.
    Silu,
}

/// What is done to the result of a layer behind the pooling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadActivation {
    /// Nothing.
    Identity,
    /// The hyperbolic tangent.
    Tanh,
    /// `max(x, 0)`.
    Relu,
    /// `x/2 (1 + erf(x/√2))`.
    Gelu,
}

impl HeadActivation {
    /// All of them.
    pub const ALL: [HeadActivation; 4] =
        [HeadActivation::Identity, HeadActivation::Tanh, HeadActivation::Relu, HeadActivation::Gelu];

    /// Its name in images.
    pub const fn name(self) -> &'static str {
        match self {
            HeadActivation::Identity => "identity",
            HeadActivation::Tanh => "tanh",
            HeadActivation::Relu => "relu",
            HeadActivation::Gelu => "gelu",
        }
    }
}

/// How a checkpoint names and arranges its tensors; models of one family may differ in this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    /// BERT.
    Bert,
    /// DistilBERT: BERT without token types, with names of its own.
    DistilBert,
    /// RoBERTa, XLM-RoBERTa, CamemBERT.
    Roberta,
    /// MPNet.
    Mpnet,
    /// ModernBERT.
    ModernBert,
    /// Nomic BERT.
    NomicBert,
    /// Qwen3 as an embedder or classifier.
    Qwen3,
}

/// What a norm does to a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `(x - mean) / √(variance + eps) · weight + bias`.
    Layer,
    /// `x / √(mean of squares + eps) · weight`.
    Rms,
}

/// Which linear layers and norms have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys, values and the attention's output.
    pub attention: bool,
    /// Both halves of the feed-forward block.
    pub feed_forward: bool,
    /// Layer norms.
    pub norm: bool,
}

/// Bases of rotary positions: those of layers that see the whole text, and of those with a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Base in layers that see all tokens.
    pub whole_base: f64,
    /// Base in layers with a window.
    pub window_base: f64,
}

/// What follows the pooling of a classifier, in the order of computing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClassifierHead {
    /// BERT: dense, tanh, classifier.
    Pooler,
    /// RoBERTa, MPNet: dense, tanh, projection.
    Dense,
    /// DistilBERT: dense, ReLU, classifier.
    PreClassifier,
    /// ModernBERT: dense, activation, norm, classifier; whether the dense layer has a bias.
    Prediction {
        /// Activation behind the dense layer.
        activation: Activation,
        /// Whether the dense layer has a bias.
        bias: bool,
    },
    /// Qwen3: one linear layer without bias.
    Score,
}

/// What makes a model a classifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Classifier {
    /// Number of labels.
    pub label_count: usize,
    /// Which tokens' states it reads.
    pub pooling: Pooling,
    /// The layers behind the pooling.
    pub head: ClassifierHead,
}

/// The numbers of an encoder that computing needs, all in range.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// Model family.
    pub family: Family,
    /// How the checkpoint names its tensors.
    pub model_type: ModelType,
    /// Width of the hidden state.
    pub hidden_dim: usize,
    /// Number of layers.
    pub layer_count: usize,
    /// Number of attention heads.
    pub head_count: usize,
    /// Number of key and value heads; divides `head_count`.
    pub kv_head_count: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// Width of the feed-forward block.
    pub intermediate_dim: usize,
    /// Activation of the feed-forward block.
    pub activation: Activation,
    /// Whether the feed-forward block multiplies its activated half with another one.
    pub is_gated: bool,
    /// Whether norms are before attention and feed-forward block (and one behind the last layer) instead of after them.
    pub is_pre_norm: bool,
    /// Kind of all norms.
    pub norm: NormKind,
    /// Which biases exist.
    pub biases: Biases,
    /// Whether there is a norm on what the embedding layer gives.
    pub has_embedding_norm: bool,
    /// Whether the first layer's attention has a norm before it (pre-norm models).
    pub has_first_norm: bool,
    /// Whether queries and keys are normalised, head by head.
    pub has_head_norms: bool,
    /// Rows of the position table; 0 when there is none.
    pub position_count: usize,
    /// Rows of the token type table; 0 when there is none.
    pub type_count: usize,
    /// Rotary positions.
    pub rotary: Option<Rotary>,
    /// Number of buckets of relative positions, shared by all layers; 0 when there are none.
    pub relative_buckets: usize,
    /// Whether a token sees only itself and those before it.
    pub is_causal: bool,
    /// How many tokens to each side are seen in layers with a window.
    pub window_reach: usize,
    /// Of each layer whether it has a window.
    pub windows: Vec<bool>,
    /// Longest sequence in tokens that the model knows positions for.
    pub token_limit: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the variance in norms.
    pub layer_norm_eps: f32,
    /// Id of the padding token.
    pub pad_token_id: u32,
    /// What makes it a classifier, if it is one.
    pub classifier: Option<Classifier>,
}

impl EncoderConfig {
    /// Parses and checks a config.json.
    ///
    /// # Errors
    /// [`ConfigError`] naming the field that is missing, out of range or not supported.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        let fields = Fields::parse(bytes)?;
        let mut config = match fields.text("model_type")? {
            "bert" => families::bert(&fields)?,
            "distilbert" => families::distilbert(&fields)?,
            "roberta" | "xlm-roberta" | "camembert" => families::roberta(&fields)?,
            "mpnet" => families::mpnet(&fields)?,
            "modernbert" => families::modernbert(&fields)?,
            "nomic_bert" => families::nomic_bert(&fields)?,
            "qwen3" => families::qwen3(&fields)?,
            other if fields.get("auto_map").is_some() => {
                return Err(ConfigError::CustomCode { found: shorten(other) });
            }
            other => return Err(ConfigError::Architecture { found: shorten(other) }),
        };
        config.check()?;
        config.classifier = families::classifier(&fields, &config)?;
        Ok(config)
    }

    /// Checks what numbers say of each other.
    fn check(&self) -> Result<(), ConfigError> {
        let unsupported = |field, value: usize, supported| {
            Err(ConfigError::Unsupported { field, value: value.to_string(), supported })
        };
        if !self.head_count.is_multiple_of(self.kv_head_count) {
            return unsupported(
                "num_key_value_heads",
                self.kv_head_count,
                "it must divide num_attention_heads",
            );
        }
        if self.rotary.is_some() && !self.head_dim.is_multiple_of(2) {
            return unsupported("head_dim", self.head_dim, "it must be even for rotary positions");
        }
        if self.is_gated && !self.intermediate_dim.is_multiple_of(GATED_BLOCK) {
            return unsupported("intermediate_size", self.intermediate_dim, "it must be a multiple of 16");
        }
        if self.pad_token_id as usize >= self.vocab_size {
            return Err(ConfigError::Range {
                field: "pad_token_id",
                value: self.pad_token_id.to_string(),
                low: 0,
                high: self.vocab_size as u64 - 1,
            });
        }
        if self.token_limit == 0 {
            return Err(ConfigError::Range {
                field: "max_position_embeddings",
                value: self.position_count.to_string(),
                low: self.first_position() as u64 + 1,
                high: families::MAX_POSITIONS,
            });
        }
        Ok(())
    }

    /// What the model is for.
    pub fn task(&self) -> Task {
        if self.classifier.is_some() { Task::Classify } else { Task::Embed }
    }

    /// Position of the first token: 0, or the one after the padding id for RoBERTa and MPNet.
    pub fn first_position(&self) -> usize {
        match self.family {
            Family::Roberta | Family::Mpnet => self.pad_token_id as usize + 1,
            _ => 0,
        }
    }

    /// Longest sequence in tokens that the model knows positions for.
    pub fn max_tokens(&self) -> usize {
        self.token_limit
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Width of all heads' contexts side by side.
    pub fn context_dim(&self) -> usize {
        self.head_count * self.head_dim
    }

    /// Outputs of the layer that gives queries, keys and values.
    pub fn qkv_dim(&self) -> usize {
        (self.head_count + 2 * self.kv_head_count) * self.head_dim
    }
}

/// Labels of a classifier by their numbers, from `id2label`: `LABEL_n` where it has none. The count is that of `id2label`, else
/// `num_labels`, else 2, as transformers counts.
///
/// # Errors
/// [`ConfigError`] when there are none or more than [`MAX_LABELS`].
pub(crate) fn labels(bytes: &[u8]) -> Result<Vec<String>, ConfigError> {
    families::labels(&Fields::parse(bytes)?)
}

/// `problem_type` of a config.json, if it says.
pub(crate) fn problem_type(bytes: &[u8]) -> Result<Option<String>, ConfigError> {
    let fields = Fields::parse(bytes)?;
    Ok(fields.get("problem_type").and_then(Value::as_str).map(shorten))
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

    fn of_type(model_type: &str) -> Value {
        let mut config = good();
        config["model_type"] = json!(model_type);
        for (key, value) in [
            ("dim", 32),
            ("n_layers", 2),
            ("n_heads", 4),
            ("hidden_dim", 64),
            ("n_embd", 32),
            ("n_head", 4),
            ("n_inner", 64),
            ("n_layer", 2),
            ("n_positions", 64),
        ] {
            config[key] = json!(value);
        }
        config["num_key_value_heads"] = json!(2);
        for (key, value) in [("activation", "gelu"), ("hidden_activation", "gelu")] {
            config[key] = json!(value);
        }
        if matches!(model_type, "qwen3" | "nomic_bert") {
            config["hidden_act"] = json!("silu");
        }
        config
    }

    #[test]
    fn every_family_is_read_and_no_absurd_number_is_taken() {
        for model_type in SUPPORTED_MODEL_TYPES {
            let config = of_type(model_type);
            let read = parse(&config).unwrap_or_else(|error| panic!("{model_type}: {error}"));
            assert_eq!((read.hidden_dim, read.layer_count, read.head_count), (32, 2, 4), "{model_type}");
            assert_eq!(read.task(), Task::Embed);
            for (field, _) in config.as_object().expect("object") {
                if config[field].is_string() {
                    continue;
                }
                for value in
                    [json!(-1), json!(0), json!(1.5), json!(u64::MAX), json!("x"), json!([1]), json!({})]
                {
                    let mut changed = config.clone();
                    changed[field] = value;
                    // Whatever is accepted is in range.
                    if let Ok(read) = parse(&changed) {
                        assert!(
                            read.hidden_dim <= 16_384
                                && read.head_dim() <= MAX_HEAD_DIM
                                && read.head_dim() > 0
                        );
                        assert!(read.max_tokens() > 0 && read.windows.len() == read.layer_count);
                    }
                }
            }
        }
    }

    #[test]
    fn classifiers_are_known_by_their_architecture() {
        let mut config = good();
        config["architectures"] = json!(["BertForSequenceClassification"]);
        config["id2label"] = json!({"0": "no", "1": "yes", "2": "perhaps"});
        let read = parse(&config).expect("valid");
        assert_eq!(read.task(), Task::Classify);
        assert_eq!(read.classifier.map(|classifier| classifier.label_count), Some(3));
        assert_eq!(labels(config.to_string().as_bytes()).expect("labels"), ["no", "yes", "perhaps"]);
        config["id2label"] = json!({});
        assert!(parse(&config).is_err(), "no labels");
        config["id2label"] = json!(null);
        config["num_labels"] = json!(u64::MAX);
        assert!(parse(&config).is_err(), "too many labels");
    }

    #[test]
    fn code_of_a_model_is_never_run() {
        let mut config = good();
        config["auto_map"] = json!({"AutoModel": "modeling.Custom"});
        parse(&config).expect("the architecture is known here");
        config["model_type"] = json!("surprise");
        let error = parse(&config).expect_err("unknown code").to_string();
        assert!(error.contains("trust_remote_code can only be false"), "{error}");
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

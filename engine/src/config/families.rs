//! What the keys of a config.json mean to each family. No tensor names; those are the compiler's.

use super::fields::Fields;
use super::{
    Activation, Biases, Classifier, ClassifierHead, ConfigError, EncoderConfig, MAX_HEAD_DIM, MAX_LABELS,
    ModelType, NormKind, Rotary,
};
use crate::json::shorten;
use serde_json::{Value, json};
use shm_layout::image::{Family, Pooling};

/// Most positions.
pub(super) const MAX_POSITIONS: u64 = 131_072;
/// Widest hidden state.
const MAX_HIDDEN_DIM: u64 = 16_384;
/// Most layers.
const MAX_LAYERS: u64 = 256;
/// Most attention heads.
const MAX_HEADS: u64 = 256;
/// Widest feed-forward block.
const MAX_INTERMEDIATE_DIM: u64 = 131_072;
/// Most token ids.
const MAX_VOCAB: u64 = 2_000_000;
/// Most token types.
const MAX_TYPES: u64 = 64;
/// Most buckets of relative positions.
const MAX_BUCKETS: u64 = 1024;
/// The padding id of MPNet, which its position numbers depend on whatever config.json says.
const MPNET_PAD: u32 = 1;

/// Names of keys that differ among families.
struct Names {
    hidden: &'static str,
    layers: &'static str,
    heads: &'static str,
    intermediate: &'static str,
    activation: &'static str,
    positions: &'static str,
    epsilon: &'static str,
}

const BERT_NAMES: Names = Names {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    intermediate: "intermediate_size",
    activation: "hidden_act",
    positions: "max_position_embeddings",
    epsilon: "layer_norm_eps",
};

/// A BERT without token types; families change what differs.
fn plain(fields: &Fields, names: &Names, default_epsilon: f32) -> Result<EncoderConfig, ConfigError> {
    for field in ["is_decoder", "add_cross_attention"] {
        fields.only(field, json!(false), "only encoders are supported")?;
    }
    let hidden_dim = fields.number(names.hidden, 1, MAX_HIDDEN_DIM, None)?;
    let head_count = fields.number(names.heads, 1, MAX_HEADS, None)?;
    let layer_count = fields.number(names.layers, 1, MAX_LAYERS, None)?;
    let head_dim = match fields.get("head_dim") {
        Some(_) => fields.number("head_dim", 1, MAX_HEAD_DIM as u64, None)?,
        None if !hidden_dim.is_multiple_of(head_count) => {
            return Err(ConfigError::Unsupported {
                field: names.heads,
                value: head_count.to_string(),
                supported: "it must divide the width of the hidden state",
            });
        }
        None if hidden_dim / head_count > MAX_HEAD_DIM => {
            return Err(ConfigError::Unsupported {
                field: names.heads,
                value: head_count.to_string(),
                supported: "heads may be at most 1024 wide",
            });
        }
        None => hidden_dim / head_count,
    };
    let position_count = fields.number(names.positions, 1, MAX_POSITIONS, None)?;
    Ok(EncoderConfig {
        family: Family::Bert,
        model_type: ModelType::Bert,
        hidden_dim,
        layer_count,
        head_count,
        kv_head_count: head_count,
        head_dim,
        intermediate_dim: fields.number(names.intermediate, 1, MAX_INTERMEDIATE_DIM, None)?,
        activation: activation(fields, names.activation)?,
        is_gated: false,
        is_pre_norm: false,
        norm: NormKind::Layer,
        biases: Biases { attention: true, feed_forward: true, norm: true },
        has_embedding_norm: true,
        has_first_norm: true,
        has_head_norms: false,
        position_count,
        type_count: 0,
        rotary: None,
        relative_buckets: 0,
        is_causal: false,
        window_reach: usize::MAX,
        windows: vec![false; layer_count],
        token_limit: position_count,
        vocab_size: fields.number("vocab_size", 1, MAX_VOCAB, None)?,
        layer_norm_eps: fields.epsilon(names.epsilon, default_epsilon)?,
        pad_token_id: fields.number("pad_token_id", 0, MAX_VOCAB, Some(0))? as u32,
        classifier: None,
    })
}

fn activation(fields: &Fields, field: &'static str) -> Result<Activation, ConfigError> {
    match fields.text(field)? {
        "gelu" => Ok(Activation::GeluErf),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        "silu" | "swish" | "swiglu" => Ok(Activation::Silu),
        other => Err(ConfigError::Unsupported {
            field,
            value: shorten(other),
            supported: "gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu and silu are supported",
        }),
    }
}

/// Heads that tile the hidden state exactly, as all families but decoders have them.
fn without_head_dim(fields: &Fields, config: &EncoderConfig) -> Result<(), ConfigError> {
    fields.only(
        "head_dim",
        json!(config.hidden_dim / config.head_count),
        "it must be the hidden state's width divided by the number of heads",
    )
}

fn absolute(fields: &Fields, config: &EncoderConfig) -> Result<(), ConfigError> {
    fields.only("position_embedding_type", json!("absolute"), "only \"absolute\" is supported")?;
    without_head_dim(fields, config)
}

pub(super) fn bert(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let config = plain(fields, &BERT_NAMES, 1e-12)?;
    absolute(fields, &config)?;
    Ok(EncoderConfig { type_count: fields.number("type_vocab_size", 1, MAX_TYPES, Some(2))?, ..config })
}

pub(super) fn distilbert(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let names = Names {
        hidden: "dim",
        layers: "n_layers",
        heads: "n_heads",
        intermediate: "hidden_dim",
        activation: "activation",
        // Its layer norms have a fixed epsilon.
        epsilon: "no key",
        ..BERT_NAMES
    };
    let config = plain(fields, &names, 1e-12)?;
    without_head_dim(fields, &config)?;
    Ok(EncoderConfig { model_type: ModelType::DistilBert, ..config })
}

pub(super) fn roberta(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let config = plain(fields, &BERT_NAMES, 1e-12)?;
    absolute(fields, &config)?;
    Ok(EncoderConfig {
        family: Family::Roberta,
        model_type: ModelType::Roberta,
        type_count: fields.number("type_vocab_size", 1, MAX_TYPES, Some(2))?,
        token_limit: config.position_count.saturating_sub(config.pad_token_id as usize + 1),
        ..config
    })
}

pub(super) fn mpnet(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let config = plain(fields, &BERT_NAMES, 1e-12)?;
    without_head_dim(fields, &config)?;
    Ok(EncoderConfig {
        family: Family::Mpnet,
        model_type: ModelType::Mpnet,
        pad_token_id: MPNET_PAD,
        relative_buckets: fields.number("relative_attention_num_buckets", 4, MAX_BUCKETS, Some(32))?,
        token_limit: config.position_count.saturating_sub(MPNET_PAD as usize + 1),
        ..config
    })
}

/// A base of rotary positions: `rope_parameters` (of a kind of layers, where there are kinds), else an older key, else a default.
fn rotary_base(
    fields: &Fields,
    kind: Option<&str>,
    older: &'static str,
    default: f64,
) -> Result<f64, ConfigError> {
    const RANGE: &str = "it must be 1 to 1e12";
    let only_default = |field: &'static str, parameters: &Value| {
        let of_type = parameters.get("rope_type").or(parameters.get("type"));
        match of_type {
            Some(found) if found != "default" => Err(ConfigError::Unsupported {
                field,
                value: shorten(&found.to_string()),
                supported: "only rotary positions of type \"default\" are",
            }),
            _ => Ok(()),
        }
    };
    if let Some(scaling) = fields.get("rope_scaling") {
        only_default("rope_scaling", scaling)?;
        if scaling.get("rope_type").or(scaling.get("type")).is_none() {
            return Err(ConfigError::Field { field: "rope_scaling", wanted: "null or of type \"default\"" });
        }
    }
    let parameters = fields.get("rope_parameters");
    let parameters = kind.map_or(parameters, |kind| parameters.and_then(|all| all.get(kind)));
    let (field, value) = match parameters.and_then(|parameters| parameters.get("rope_theta")) {
        Some(value) => ("rope_parameters", Some(value)),
        None => (older, fields.get(older)),
    };
    if let Some(parameters) = parameters {
        only_default("rope_parameters", parameters)?;
        for key in ["partial_rotary_factor", "factor"] {
            if parameters.get(key).is_some_and(|value| value.as_f64() != Some(1.0) && !value.is_null()) {
                return Err(ConfigError::Unsupported {
                    field: "rope_parameters",
                    value: shorten(&parameters.to_string()),
                    supported: "only rotary positions over whole heads, unscaled, are",
                });
            }
        }
    }
    let Some(value) = value else { return Ok(default) };
    let base = value.as_f64().ok_or(ConfigError::Field { field, wanted: "a number" })?;
    if (1.0..=1e12).contains(&base) {
        Ok(base)
    } else {
        Err(ConfigError::Unsupported { field, value: base.to_string(), supported: RANGE })
    }
}

/// Which layers have a window: `layer_types`, else every one whose number is no multiple of `every`.
fn windows(fields: &Fields, layer_count: usize, every: usize) -> Result<Vec<bool>, ConfigError> {
    let Some(types) = fields.get("layer_types") else {
        return Ok((0..layer_count).map(|layer| !layer.is_multiple_of(every)).collect());
    };
    let wrong = || ConfigError::Field {
        field: "layer_types",
        wanted: "a list of \"full_attention\" and \"sliding_attention\", one for each layer",
    };
    let types = types.as_array().filter(|types| types.len() == layer_count).ok_or_else(wrong)?;
    types
        .iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(wrong()),
        })
        .collect()
}

pub(super) fn modernbert(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let names = Names { activation: "hidden_activation", epsilon: "norm_eps", ..BERT_NAMES };
    let config = plain(fields, &names, 1e-5)?;
    without_head_dim(fields, &config)?;
    let every = fields.number("global_attn_every_n_layers", 1, MAX_LAYERS, Some(3))?;
    let rotary = Rotary {
        whole_base: rotary_base(fields, Some("full_attention"), "global_rope_theta", 160_000.0)?,
        window_base: match fields.get("rope_parameters") {
            Some(_) => rotary_base(fields, Some("sliding_attention"), "local_rope_theta", 10_000.0)?,
            None => rotary_base(fields, None, "local_rope_theta", 10_000.0)?,
        },
    };
    Ok(EncoderConfig {
        family: Family::ModernBert,
        model_type: ModelType::ModernBert,
        is_gated: true,
        is_pre_norm: true,
        biases: Biases {
            attention: fields.flag("attention_bias", false)?,
            feed_forward: fields.flag("mlp_bias", false)?,
            norm: fields.flag("norm_bias", false)?,
        },
        has_first_norm: false,
        position_count: 0,
        rotary: Some(rotary),
        window_reach: fields.number("local_attention", 1, MAX_POSITIONS, Some(128))? / 2,
        windows: windows(fields, config.layer_count, every)?,
        ..config
    })
}

pub(super) fn nomic_bert(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    const SUPPORTED: &str = "only the architecture of nomic-embed-text-v1 and v1.5 is";
    // Two forms of config.json are about: the original one with GPT-2's names, and that of transformers.
    let names = Names {
        hidden: fields.either("n_embd", "hidden_size"),
        layers: fields.either("n_layer", "num_hidden_layers"),
        heads: fields.either("n_head", "num_attention_heads"),
        intermediate: fields.either("n_inner", "intermediate_size"),
        activation: fields.either("activation_function", "hidden_act"),
        positions: fields.either("n_positions", "max_position_embeddings"),
        epsilon: fields.either("layer_norm_epsilon", "layer_norm_eps"),
    };
    let config = plain(fields, &names, 1e-12)?;
    without_head_dim(fields, &config)?;
    for (field, wanted) in [
        ("prenorm", json!(false)),
        ("rotary_emb_fraction", json!(1.0)),
        ("rotary_emb_interleaved", json!(false)),
        ("parallel_block", json!(false)),
        ("use_rms_norm", json!(false)),
        ("qkv_proj_bias", json!(false)),
        ("mlp_fc1_bias", json!(false)),
        ("mlp_fc2_bias", json!(false)),
        ("causal", json!(false)),
        ("num_experts", json!(0)),
    ] {
        fields.only(field, wanted, SUPPORTED)?;
    }
    if fields.get("rotary_emb_scale_base").is_some() {
        fields.only("rotary_emb_scale_base", Value::Null, SUPPORTED)?;
    }
    if config.activation != Activation::Silu {
        return Err(ConfigError::Unsupported {
            field: names.activation,
            value: shorten(fields.text(names.activation)?),
            supported: SUPPORTED,
        });
    }
    // With a scaling factor positions beyond those trained change all others, by the text's length; they are not used then.
    let token_limit = match fields.get("rotary_scaling_factor") {
        Some(_) => {
            fields.number("max_trained_positions", 1, MAX_POSITIONS, Some(2048))?.min(config.position_count)
        }
        None => config.position_count,
    };
    let base = rotary_base(fields, None, "rotary_emb_base", 1000.0)?;
    Ok(EncoderConfig {
        family: Family::NomicBert,
        model_type: ModelType::NomicBert,
        is_gated: true,
        biases: Biases { attention: false, feed_forward: false, norm: true },
        position_count: 0,
        type_count: fields.number("type_vocab_size", 1, MAX_TYPES, Some(2))?,
        rotary: Some(Rotary { whole_base: base, window_base: base }),
        token_limit,
        ..config
    })
}

pub(super) fn qwen3(fields: &Fields) -> Result<EncoderConfig, ConfigError> {
    let config = plain(fields, &Names { epsilon: "rms_norm_eps", ..BERT_NAMES }, 1e-6)?;
    fields.only("use_sliding_window", json!(false), "layers with a window are not")?;
    let windows = windows(fields, config.layer_count, 1)?;
    if windows.contains(&true) {
        return Err(ConfigError::Unsupported {
            field: "layer_types",
            value: "sliding_attention".into(),
            supported: "layers with a window are not",
        });
    }
    let base = rotary_base(fields, None, "rope_theta", 10_000.0)?;
    Ok(EncoderConfig {
        family: Family::Qwen3,
        model_type: ModelType::Qwen3,
        kv_head_count: fields.number("num_key_value_heads", 1, MAX_HEADS, Some(config.head_count as u64))?,
        // The default of transformers, whatever the hidden state's width.
        head_dim: if fields.get("head_dim").is_some() { config.head_dim } else { 128 },
        is_gated: true,
        is_pre_norm: true,
        norm: NormKind::Rms,
        biases: Biases { attention: fields.flag("attention_bias", false)?, feed_forward: false, norm: false },
        has_embedding_norm: false,
        has_head_norms: true,
        position_count: 0,
        rotary: Some(Rotary { whole_base: base, window_base: base }),
        is_causal: true,
        windows,
        ..config
    })
}

/// What makes the model a classifier: the architecture that config.json names first.
pub(super) fn classifier(fields: &Fields, config: &EncoderConfig) -> Result<Option<Classifier>, ConfigError> {
    let architecture = fields.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
    if !architecture.is_some_and(|name| name.ends_with("ForSequenceClassification")) {
        return Ok(None);
    }
    let (pooling, head) = match config.model_type {
        ModelType::Bert => (Pooling::CLS, ClassifierHead::Pooler),
        ModelType::Roberta | ModelType::Mpnet => (Pooling::CLS, ClassifierHead::Dense),
        ModelType::DistilBert => (Pooling::CLS, ClassifierHead::PreClassifier),
        ModelType::Qwen3 => (Pooling::LAST, ClassifierHead::Score),
        ModelType::ModernBert => {
            fields.only("classifier_activation", json!("gelu"), "only \"gelu\" is")?;
            let pooling = match fields.get("classifier_pooling").map(|value| value.as_str()) {
                None | Some(Some("cls")) => Pooling::CLS,
                Some(Some("mean")) => Pooling::MEAN,
                _ => {
                    return Err(ConfigError::Field {
                        field: "classifier_pooling",
                        wanted: "\"cls\" or \"mean\"",
                    });
                }
            };
            let bias = fields.flag("classifier_bias", false)?;
            (pooling, ClassifierHead::Prediction { activation: Activation::GeluErf, bias })
        }
        ModelType::NomicBert => {
            return Err(ConfigError::Unsupported {
                field: "architectures",
                value: "NomicBertForSequenceClassification".into(),
                supported: "Nomic BERT is supported as an embedder only",
            });
        }
    };
    Ok(Some(Classifier { label_count: labels(fields)?.len(), pooling, head }))
}

/// See [`super::labels`].
pub(super) fn labels(fields: &Fields) -> Result<Vec<String>, ConfigError> {
    let names = match fields.get("id2label") {
        None => None,
        Some(Value::Object(names)) => Some(names),
        Some(_) => return Err(ConfigError::Field { field: "id2label", wanted: "an object" }),
    };
    let count = match names {
        Some(names) => names.len(),
        None => fields.number("num_labels", 1, MAX_LABELS as u64, Some(2))?,
    };
    if count == 0 || count > MAX_LABELS {
        return Err(ConfigError::Range {
            field: "id2label",
            value: count.to_string(),
            low: 1,
            high: MAX_LABELS as u64,
        });
    }
    let name = |label: usize| match names.and_then(|names| names.get(&label.to_string())) {
        Some(Value::String(name)) => shorten(name),
        _ => format!("LABEL_{label}"),
    };
    Ok((0..count).map(name).collect())
}

//! The sentence-transformers side of a model folder: modules.json, pooling, sequence length. Reads small JSON files only.

use super::error::CompileError;
use super::folder::ModelFolder;
use crate::config::{HeadActivation, MAX_HEAD_LAYERS};
use crate::json::{UniqueMap, shorten};
use serde::Deserialize;
use serde_json::Value;
use shm_layout::image::Pooling;

/// Largest of these JSON files, bytes.
const MAX_SETTINGS_BYTES: u64 = 1 << 20;
/// Most modules in a modules.json.
const MAX_MODULES: usize = 16;
/// Most keys in one of these files.
const MAX_KEYS: usize = 256;
/// Most features on either side of a Dense module.
const MAX_DENSE_FEATURES: u64 = 65_536;
/// Most prompts of a model.
pub const MAX_PROMPTS: usize = 256;
/// Longest prompt, and name of one, bytes.
pub const MAX_PROMPT_BYTES: usize = 4096;
/// Names under which sentence-transformers looks for the transformer's settings, in its order.
const SETTINGS_NAMES: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

type Object = UniqueMap<Value, MAX_KEYS>;

/// What sentence-transformers would do around the encoder.
#[derive(Debug)]
pub(crate) struct SentenceSettings {
    /// Folder of the encoder's files below the model folder: empty, or ending in `/`.
    pub(crate) prefix: String,
    /// Pooling modes.
    pub(crate) pooling: Pooling,
    /// Whether the settings name a pooling; a cross-encoder's have only the transformer.
    pub(crate) has_pooling: bool,
    /// Linear layers behind the pooling.
    pub(crate) dense: Vec<DenseModule>,
    /// `word_embedding_dimension` of the pooling settings, if they exist.
    pub(crate) pooled_dim: Option<u64>,
    /// Whether vectors are normalised.
    pub(crate) normalize: bool,
    /// Whether texts are lower-cased first.
    pub(crate) lower_case: bool,
    /// Longest sequence in tokens by the settings, if they say.
    pub(crate) max_seq_tokens: Option<u64>,
    /// Longest sequence in tokens by the tokenizer's settings, if they say.
    pub(crate) tokenizer_max_tokens: Option<u64>,
    /// modules.json as found.
    pub(crate) modules_json: Option<Vec<u8>>,
    /// sentence_bert_config.json as found.
    pub(crate) sentence_bert_config: Option<Vec<u8>>,
    /// config_sentence_transformers.json as found.
    pub(crate) sentence_transformers_config: Option<Vec<u8>>,
}

/// A linear layer behind the pooling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DenseModule {
    /// Its folder below the model folder, ending in `/`.
    pub(crate) prefix: String,
    /// Numbers that it reads.
    pub(crate) inputs: usize,
    /// Numbers that it gives.
    pub(crate) outputs: usize,
    /// Whether it has a bias.
    pub(crate) has_bias: bool,
    /// What is done to its result.
    pub(crate) activation: HeadActivation,
}

/// Prompts by name, and the name of the one that is put before texts when no other is asked for.
pub(crate) type Prompts = (Vec<(String, String)>, Option<String>);

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

impl SentenceSettings {
    /// Reads the settings. A folder without modules.json is a plain encoder: sentence-transformers then takes the mean.
    pub(crate) fn read(folder: &mut ModelFolder) -> Result<Self, CompileError> {
        let mut settings = SentenceSettings {
            prefix: String::new(),
            pooling: Pooling::MEAN,
            has_pooling: false,
            dense: Vec::new(),
            pooled_dim: None,
            normalize: false,
            lower_case: false,
            max_seq_tokens: None,
            tokenizer_max_tokens: None,
            modules_json: folder.read("modules.json", MAX_SETTINGS_BYTES)?,
            sentence_bert_config: None,
            sentence_transformers_config: None,
        };
        if let Some(bytes) = settings.modules_json.clone() {
            settings.read_modules(folder, &bytes)?;
        }
        settings.read_lengths(folder)?;
        settings.read_prompts(folder)?;
        Ok(settings)
    }

    fn read_modules(&mut self, folder: &mut ModelFolder, bytes: &[u8]) -> Result<(), CompileError> {
        let bad = |reason: String| CompileError::SentenceTransformers { name: "modules.json".into(), reason };
        let modules: Vec<Module> =
            serde_json::from_slice(bytes).map_err(|error| bad(shorten(&error.to_string())))?;
        if modules.len() > MAX_MODULES {
            return Err(bad(format!("has {} modules, at most {MAX_MODULES} are read", modules.len())));
        }
        let mut pooling_path = None;
        for (position, module) in modules.iter().enumerate() {
            let name = module.kind.rsplit('.').next().unwrap_or_default();
            let path = module.path.trim_end_matches('/');
            match (position, name) {
                (0, "Transformer") if path.is_empty() => {}
                (0, "Transformer") => self.prefix = format!("{path}/"),
                (1, "Pooling") => pooling_path = Some(path),
                (2.., "Dense") if !self.normalize && !path.is_empty() => {
                    let module = read_dense(folder, path)?;
                    self.dense.push(module);
                }
                // Active in training only.
                (2.., "Dropout") => {}
                (2.., "Normalize") => self.normalize = true,
                _ => {
                    return Err(bad(format!(
                        "module {position} is {:?}; supported is Transformer, then Pooling, Dense modules and Normalize; no \
                         model's own code is ever run, trust_remote_code can only be false",
                        shorten(&module.kind)
                    )));
                }
            }
        }
        if self.dense.len() > MAX_HEAD_LAYERS {
            return Err(bad(format!(
                "has {} Dense modules, at most {MAX_HEAD_LAYERS} are",
                self.dense.len()
            )));
        }
        let Some(pooling_path) = pooling_path else {
            // A cross-encoder's: the transformer gives the scores itself.
            return if modules.is_empty() { Err(bad("has no Transformer module".into())) } else { Ok(()) };
        };
        self.has_pooling = true;
        let name = match pooling_path {
            "" => "config.json".to_owned(),
            path => format!("{path}/config.json"),
        };
        self.read_pooling(folder, &name)
    }

    fn read_pooling(&mut self, folder: &mut ModelFolder, name: &str) -> Result<(), CompileError> {
        let bad = |reason: String| CompileError::SentenceTransformers { name: name.to_owned(), reason };
        let bytes = folder.read(name, MAX_SETTINGS_BYTES)?.ok_or(CompileError::Missing {
            name: name.to_owned(),
            fix: "modules.json names it: download the model again",
        })?;
        let map = object(name, &bytes)?.0;
        let mut modes: Vec<Pooling> = Vec::new();
        let mut named = None;
        for (key, value) in &map {
            match (key.as_str(), value) {
                ("pooling_mode_cls_token", Value::Bool(true)) => modes.push(Pooling::CLS),
                ("pooling_mode_max_tokens", Value::Bool(true)) => modes.push(Pooling::MAX),
                ("pooling_mode_mean_tokens", Value::Bool(true)) => modes.push(Pooling::MEAN),
                ("pooling_mode_mean_sqrt_len_tokens", Value::Bool(true)) => {
                    modes.push(Pooling::MEAN_SQRT_LEN)
                }
                ("pooling_mode_lasttoken", Value::Bool(true)) => modes.push(Pooling::LAST),
                ("include_prompt", Value::Bool(false)) => {
                    return Err(bad(
                        "include_prompt is false: leaving prompts out of the pooling is not supported".into(),
                    ));
                }
                ("pooling_mode", value) => {
                    named = Some(named_modes(value).map_err(bad)?);
                }
                (key, Value::Bool(true)) if key.starts_with("pooling_mode") => {
                    return Err(bad(format!(
                        "{} is not supported; cls, mean, max, mean_sqrt_len and lasttoken are",
                        shorten(key)
                    )));
                }
                _ => {}
            }
        }
        // The new key outranks the old ones. Without any mode set sentence-transformers takes the mean.
        self.pooling = named.unwrap_or(modes).into_iter().reduce(Pooling::union).unwrap_or(Pooling::MEAN);
        self.pooled_dim =
            map.get("word_embedding_dimension").or(map.get("embedding_dimension")).and_then(Value::as_u64);
        Ok(())
    }

    fn read_lengths(&mut self, folder: &mut ModelFolder) -> Result<(), CompileError> {
        for name in SETTINGS_NAMES {
            let name = format!("{}{name}", self.prefix);
            let Some(bytes) = folder.read(&name, MAX_SETTINGS_BYTES)? else { continue };
            let map = object(&name, &bytes)?.0;
            self.max_seq_tokens = match map.get("max_seq_length") {
                None | Some(Value::Null) => None,
                Some(value) => Some(value.as_u64().filter(|length| *length > 0).ok_or_else(|| {
                    CompileError::SentenceTransformers {
                        name: name.clone(),
                        reason: format!(
                            "max_seq_length is {}, not a positive integer",
                            shorten(&value.to_string())
                        ),
                    }
                })?),
            };
            self.lower_case = map.get("do_lower_case") == Some(&Value::Bool(true));
            self.sentence_bert_config = Some(bytes);
            break;
        }
        let name = format!("{}tokenizer_config.json", self.prefix);
        if let Some(bytes) = folder.read(&name, MAX_SETTINGS_BYTES)? {
            let map = object(&name, &bytes)?.0;
            // Files without a length hold 1e30 here: no integer, so no limit.
            self.tokenizer_max_tokens =
                map.get("model_max_length").and_then(Value::as_u64).filter(|length| *length > 0);
            if map.get("truncation_side").is_some_and(|side| side != "right" && !side.is_null()) {
                return Err(CompileError::SentenceTransformers {
                    name,
                    reason: "truncation_side must be \"right\"; other sides are not supported".into(),
                });
            }
        }
        Ok(())
    }

    fn read_prompts(&mut self, folder: &mut ModelFolder) -> Result<(), CompileError> {
        const NAME: &str = "config_sentence_transformers.json";
        let Some(bytes) = folder.read(NAME, MAX_SETTINGS_BYTES)? else { return Ok(()) };
        prompts(&bytes).map_err(|reason| CompileError::SentenceTransformers { name: NAME.into(), reason })?;
        self.sentence_transformers_config = Some(bytes);
        Ok(())
    }
}

/// The prompts of a config_sentence_transformers.json, sorted by name.
///
/// # Errors
/// What is wrong, for people.
pub(crate) fn prompts(bytes: &[u8]) -> Result<Prompts, String> {
    let map: Object = serde_json::from_slice(bytes).map_err(|error| shorten(&error.to_string()))?;
    let mut prompts = Vec::new();
    match map.0.get("prompts") {
        None | Some(Value::Null) => {}
        Some(Value::Object(all)) if all.len() <= MAX_PROMPTS => {
            for (name, prompt) in all {
                let prompt = match prompt {
                    Value::String(prompt) => prompt.as_str(),
                    Value::Null => "",
                    _ => return Err(format!("prompt {:?} is not a string", shorten(name))),
                };
                if name.len() > MAX_PROMPT_BYTES || prompt.len() > MAX_PROMPT_BYTES {
                    return Err(format!(
                        "prompt {:?} is longer than {MAX_PROMPT_BYTES} bytes",
                        shorten(name)
                    ));
                }
                prompts.push((name.clone(), prompt.to_owned()));
            }
        }
        Some(Value::Object(all)) => {
            return Err(format!("has {} prompts, at most {MAX_PROMPTS} are read", all.len()));
        }
        Some(_) => return Err("prompts is not an object".into()),
    }
    prompts.sort_unstable();
    let default = match map.0.get("default_prompt_name") {
        None | Some(Value::Null) => None,
        Some(Value::String(name)) if prompts.iter().any(|(known, _)| known == name) => Some(name.clone()),
        Some(other) => {
            return Err(format!(
                "default_prompt_name is {}, which names no prompt",
                shorten(&other.to_string())
            ));
        }
    };
    Ok((prompts, default))
}

/// The settings of a Dense module.
fn read_dense(folder: &mut ModelFolder, path: &str) -> Result<DenseModule, CompileError> {
    let name = format!("{path}/config.json");
    let bad = |reason: String| CompileError::SentenceTransformers { name: name.clone(), reason };
    let bytes = folder.read(&name, MAX_SETTINGS_BYTES)?.ok_or(CompileError::Missing {
        name: name.clone(),
        fix: "modules.json names it: download the model again",
    })?;
    let map = object(&name, &bytes)?.0;
    let features = |key: &str| {
        map.get(key)
            .and_then(Value::as_u64)
            .filter(|count| (1..=MAX_DENSE_FEATURES).contains(count))
            .map(|count| count as usize)
            .ok_or_else(|| bad(format!("{key} is missing or not 1 to {MAX_DENSE_FEATURES}")))
    };
    let activation = match map.get("activation_function") {
        None => HeadActivation::Tanh,
        Some(Value::String(function)) => match function.as_str() {
            "torch.nn.modules.activation.Tanh" => HeadActivation::Tanh,
            "torch.nn.modules.linear.Identity" => HeadActivation::Identity,
            "torch.nn.modules.activation.ReLU" => HeadActivation::Relu,
            "torch.nn.modules.activation.GELU" => HeadActivation::Gelu,
            other => {
                return Err(bad(format!(
                    "activation_function {:?} is not supported; Tanh, Identity, ReLU and GELU of torch.nn are",
                    shorten(other)
                )));
            }
        },
        Some(_) => return Err(bad("activation_function is not a string".into())),
    };
    for key in ["module_input_name", "module_output_name"] {
        if map.get(key).is_some_and(|value| !value.is_null() && value != "sentence_embedding") {
            return Err(bad(format!("{key} must be \"sentence_embedding\"")));
        }
    }
    if map.get("use_residual").is_some_and(|value| value != &Value::Bool(false)) {
        return Err(bad("use_residual is not supported".into()));
    }
    Ok(DenseModule {
        prefix: format!("{path}/"),
        inputs: features("in_features")?,
        outputs: features("out_features")?,
        has_bias: map.get("bias") != Some(&Value::Bool(false)),
        activation,
    })
}

/// The modes of the key `pooling_mode`: one name, or a list of names in the order in which an image concatenates them.
fn named_modes(value: &Value) -> Result<Vec<Pooling>, String> {
    let names = match value {
        Value::Array(names) => names.as_slice(),
        name => std::slice::from_ref(name),
    };
    let mut modes: Vec<Pooling> = Vec::new();
    for name in names {
        let mode = match name.as_str() {
            Some("cls") => Pooling::CLS,
            Some("max") => Pooling::MAX,
            Some("mean") => Pooling::MEAN,
            Some("mean_sqrt_len_tokens") => Pooling::MEAN_SQRT_LEN,
            Some("lasttoken") => Pooling::LAST,
            _ => {
                let shown = shorten(&name.to_string());
                return Err(format!(
                    "pooling_mode {shown} is not supported; cls, max, mean, mean_sqrt_len_tokens and lasttoken are"
                ));
            }
        };
        if modes.last().is_some_and(|last| last.bits() >= mode.bits()) {
            return Err(
                "pooling_mode lists modes twice or not in the order cls, max, mean, mean_sqrt_len_tokens, lasttoken"
                    .into(),
            );
        }
        modes.push(mode);
    }
    Ok(modes)
}

fn object(name: &str, bytes: &[u8]) -> Result<Object, CompileError> {
    serde_json::from_slice(bytes)
        .map_err(|error| CompileError::Json { name: name.to_owned(), reason: shorten(&error.to_string()) })
}

//! The configuration as a typed structure: units in types, words as enums. Made from checked entries only; reads nothing.

use crate::resolve::Setting;
use crate::table::{MODELS, model_key};
use crate::value::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$each:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$each])* $variant,)* }

        impl $name {
            /// Each of them.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The word in settings.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $word,)* }
            }

            fn from_word(word: &str) -> Option<$name> {
                $name::ALL.iter().copied().find(|known| known.name() == word)
            }
        }
    };
}

words! {
    /// What a model is for.
    ModelType {
        /// Texts to vectors.
        Embedding = "embedding",
        /// Text to text.
        Text2Text = "text2text",
        /// Query and texts to scores.
        Reranker = "reranker",
        /// Texts to scores of classes.
        Classifier = "classifier",
        /// A conversation to its continuation.
        Chat = "chat",
        /// Served by a provider of its own.
        Custom = "custom",
        /// Served by a remote API.
        Remote = "remote",
    }
}

words! {
    /// Precision of a model's matrices.
    Precision {
        /// Single precision.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 8-bit integers.
        Int8 = "int8",
        /// bf16 where the CPU has instructions for it, else f32.
        Auto = "auto",
    }
}

words! {
    /// What weights images lie in.
    Backing {
        /// By size: a memory object below 512 MiB, a file from there on.
        Auto = "auto",
        /// A sealed memory object.
        Memfd = "memfd",
        /// A read-only file.
        File = "file",
        /// A POSIX shared-memory object.
        PosixShm = "posix-shm",
    }
}

words! {
    /// What a process does that cannot have the shared model.
    Fallback {
        /// It fails.
        Error = "error",
        /// It loads a copy of its own.
        Local = "local",
    }
}

/// Where a model is wished to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// Whatever is best.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device; `None` = the first. `gpu` is the same.
    Cuda(Option<u16>),
}

impl Device {
    fn from_word(word: &str) -> Device {
        match word {
            "cpu" => Device::Cpu,
            "gpu" | "cuda" => Device::Cuda(None),
            other => match other.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
                Some(number) => Device::Cuda(Some(number)),
                None => Device::Auto,
            },
        }
    }
}

/// `auto`, `cpu`, `cuda` or `cuda:N`.
impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(None) => f.write_str("cuda"),
            Device::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

/// Everything that can be set. What each means stands in the table of keys (docs/configuration.md).
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// `enabled`.
    pub enabled: bool,
    /// `auto_initialize`.
    pub auto_initialize: bool,
    /// `log_model_usage`.
    pub log_model_usage: bool,
    /// `memory_monitoring`.
    pub memory_monitoring: bool,
    /// `device_preference`.
    pub device_preference: Device,
    /// `gpu_memory_fraction`: over 0, up to 1.
    pub gpu_memory_fraction: f64,
    /// `allow_gpu_growth`.
    pub allow_gpu_growth: bool,
    /// `sharing.*`.
    pub sharing: Sharing,
    /// `embedding_cache.*`.
    pub embedding_cache: EmbeddingCache,
    /// `models.*`, in the order of their ids.
    pub models: Vec<Model>,
    /// `serve.*`.
    pub serve: Serve,
}

/// `sharing.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharing {
    /// Whether processes share models at all.
    pub enabled: bool,
    /// Percentage of processes that do, 0 to 100.
    pub rollout_percent: u8,
    /// How long an unused model stays; zero = for ever.
    pub unload_after: Duration,
    /// Models loaded at once; 0 = no such bound.
    pub max_shared_models: usize,
    /// What a process does that cannot have the shared model.
    pub fallback: Fallback,
}

/// `embedding_cache.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingCache {
    /// Vectors that the cache of each model holds; 0 when caches are off.
    pub entries: usize,
    /// How long a vector is kept; zero = as long as the model is loaded.
    pub ttl: Duration,
    /// Kept in files over restarts.
    pub persist_to_disk: bool,
}

/// `models.ID.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// The id.
    pub id: String,
    /// What it is for.
    pub kind: ModelType,
    /// Its name.
    pub name: Option<String>,
    /// The folder to take it from.
    pub local_path: Option<PathBuf>,
    /// Numbers in a vector.
    pub dimension: Option<u32>,
    /// Where it computes; `None` = [`Settings::device_preference`].
    pub device: Option<Device>,
    /// Texts in one request.
    pub batch_size: usize,
    /// Whether processes share it.
    pub shared: bool,
    /// Whether its vectors are kept.
    pub cache_embeddings: bool,
    /// Tokens of an input.
    pub max_input_tokens: usize,
    /// Tokens that are generated at most.
    pub max_output_tokens: usize,
    /// Beams of the beam search.
    pub num_beams: usize,
    /// Precision; `None` = [`Serve::precision`].
    pub precision: Option<Precision>,
    /// Loaded at start and kept.
    pub preload: bool,
    /// How long it stays unused; zero = for ever; `None` = [`Sharing::unload_after`].
    pub unload_after: Option<Duration>,
}

impl Model {
    /// What to load: the folder, else the name, with the precision behind a colon where one is set. `None`: a custom
    /// type without either.
    #[must_use]
    pub fn source(&self) -> Option<String> {
        let folder = self.local_path.as_ref().and_then(|path| path.to_str()).map(str::to_owned);
        let source = folder.or_else(|| self.name.clone())?;
        Some(match self.precision {
            Some(precision) => format!("{source}:{}", precision.name()),
            None => source,
        })
    }
}

/// `serve.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serve {
    /// Model for clients that name none.
    pub model: String,
    /// Precision of models that are asked for without one.
    pub precision: Precision,
    /// Compute threads; 0 = the cores that the process may use.
    pub threads: usize,
    /// What images lie in.
    pub backing: Backing,
    /// Where models and images are cached; `None` = the user's cache folder.
    pub cache_dir: Option<PathBuf>,
    /// Leave after so long without any session; `None` = stay.
    pub idle_exit: Option<Duration>,
    /// Bytes that models and caches may take; `None` = as much as there is.
    pub memory_budget_bytes: Option<u64>,
    /// The socket; `None` = in the user's run folder.
    pub socket: Option<PathBuf>,
    /// Where log lines go; `None` = stderr.
    pub log_file: Option<PathBuf>,
    /// Log lines as JSON.
    pub log_json: bool,
    /// Let processes of other users in.
    pub allow_other_users: bool,
}

/// Checked entries, by key. A key that is missing or of another type would be a bug of the table, which tests would find; it
/// reads as nothing.
struct Entries<'a>(&'a BTreeMap<String, Setting>);

impl Entries<'_> {
    fn value(&self, key: &str) -> &Value {
        self.0.get(key).map_or(&Value::Unset, |setting| &setting.value)
    }

    fn switch(&self, key: &str) -> bool {
        matches!(self.value(key), Value::Switch(true))
    }

    fn whole(&self, key: &str) -> Option<u64> {
        match self.value(key) {
            Value::Whole(number) => Some(*number),
            _ => None,
        }
    }

    fn count(&self, key: &str) -> usize {
        self.whole(key).and_then(|number| usize::try_from(number).ok()).unwrap_or(0)
    }

    fn seconds(&self, key: &str) -> Option<Duration> {
        self.whole(key).map(Duration::from_secs)
    }

    fn text(&self, key: &str) -> Option<&str> {
        match self.value(key) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        self.text(key).map(PathBuf::from)
    }
}

impl Settings {
    pub(crate) fn from_entries(entries: &BTreeMap<String, Setting>) -> Settings {
        let of = Entries(entries);
        let ids = entries.keys().filter_map(|key| key.strip_prefix(MODELS)?.strip_suffix(".type"));
        let cache_on = of.switch("embedding_cache.enabled");
        Settings {
            enabled: of.switch("enabled"),
            auto_initialize: of.switch("auto_initialize"),
            log_model_usage: of.switch("log_model_usage"),
            memory_monitoring: of.switch("memory_monitoring"),
            device_preference: of.text("device_preference").map(Device::from_word).unwrap_or_default(),
            gpu_memory_fraction: match of.value("gpu_memory_fraction") {
                Value::Fraction(number) => *number,
                _ => 1.0,
            },
            allow_gpu_growth: of.switch("allow_gpu_growth"),
            sharing: Sharing {
                enabled: of.switch("sharing.enabled"),
                rollout_percent: u8::try_from(of.count("sharing.rollout_percent")).unwrap_or(100),
                unload_after: of.seconds("sharing.unload_after_seconds").unwrap_or_default(),
                max_shared_models: of.count("sharing.max_shared_models"),
                fallback: of
                    .text("sharing.fallback")
                    .and_then(Fallback::from_word)
                    .unwrap_or(Fallback::Error),
            },
            embedding_cache: EmbeddingCache {
                entries: if cache_on { of.count("embedding_cache.max_cache_size") } else { 0 },
                ttl: of.seconds("embedding_cache.ttl_seconds").unwrap_or_default(),
                persist_to_disk: of.switch("embedding_cache.persist_to_disk"),
            },
            models: ids.filter_map(|id| model(&of, id)).collect(),
            serve: Serve {
                model: of.text("serve.model").unwrap_or_default().to_owned(),
                precision: of
                    .text("serve.precision")
                    .and_then(Precision::from_word)
                    .unwrap_or(Precision::F32),
                threads: of.count("serve.threads"),
                backing: of.text("serve.backing").and_then(Backing::from_word).unwrap_or(Backing::Auto),
                cache_dir: of.path("serve.cache_dir"),
                idle_exit: of.seconds("serve.idle_exit_seconds"),
                memory_budget_bytes: of.whole("serve.memory_budget_bytes"),
                socket: of.path("serve.socket"),
                log_file: of.path("serve.log_file"),
                log_json: of.switch("serve.log_json"),
                allow_other_users: of.switch("serve.allow_other_users"),
            },
        }
    }
}

fn model(of: &Entries<'_>, id: &str) -> Option<Model> {
    let key = |field: &str| model_key(id, field);
    Some(Model {
        id: id.to_owned(),
        kind: of.text(&key("type")).and_then(ModelType::from_word)?,
        name: of.text(&key("name")).map(str::to_owned),
        local_path: of.path(&key("local_path")),
        dimension: of.whole(&key("dimension")).and_then(|number| u32::try_from(number).ok()),
        device: of.text(&key("device")).map(Device::from_word),
        batch_size: of.count(&key("batch_size")),
        shared: of.switch(&key("shared")),
        cache_embeddings: of.switch(&key("cache_embeddings")),
        max_input_tokens: of.count(&key("max_input_length")),
        max_output_tokens: of.count(&key("max_output_length")),
        num_beams: of.count(&key("num_beams")),
        precision: of.text(&key("precision")).and_then(Precision::from_word),
        preload: of.switch(&key("preload")),
        unload_after: of.seconds(&key("unload_after_seconds")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{BACKINGS, FALLBACKS, MODEL_TYPES, PRECISIONS};

    #[test]
    fn words_are_those_of_the_table() {
        let names = |all: &[&'static str]| all.to_vec();
        assert_eq!(ModelType::ALL.iter().map(|w| w.name()).collect::<Vec<_>>(), names(MODEL_TYPES));
        assert_eq!(Precision::ALL.iter().map(|w| w.name()).collect::<Vec<_>>(), names(PRECISIONS));
        assert_eq!(Backing::ALL.iter().map(|w| w.name()).collect::<Vec<_>>(), names(BACKINGS));
        assert_eq!(Fallback::ALL.iter().map(|w| w.name()).collect::<Vec<_>>(), names(FALLBACKS));
        for word in ["auto", "cpu", "cuda", "cuda:7"] {
            assert_eq!(Device::from_word(word).to_string(), word);
        }
        assert_eq!(Device::from_word("gpu").to_string(), "cuda");
    }
}

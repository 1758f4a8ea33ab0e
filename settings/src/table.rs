//! The keys: everything that is known of each, in one table, from which parsing, documents, schema and the template file are
//! made. No value of a running program.

use crate::limits::{
    MAX_BATCH, MAX_BEAMS, MAX_BYTES, MAX_CACHE_ENTRIES, MAX_DIMENSION, MAX_LENGTH_TOKENS, MAX_SECONDS,
    MAX_SHARED_MODELS, MAX_THREADS, MIN_BUDGET_BYTES,
};
use crate::value::Value;

/// What values a key takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// true or false.
    Switch,
    /// true or false, of which only false is accepted; carries why.
    OnlyFalse(
        /// Why the other one is refused.
        &'static str,
    ),
    /// A whole number from the first to the second; the last is what is counted, for people.
    Whole(u64, u64, &'static str),
    /// A size: a whole number of bytes, or a text with a unit such as `"8 GiB"`; from the first to the second.
    Bytes(u64, u64),
    /// A number over 0, up to 1.
    Fraction,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// A device: `auto`, `gpu`, `cuda`, `cuda:N` or `cpu`.
    Device,
    /// A name.
    Name,
    /// A path; `~/` is the home folder, and a relative one in the file is seen from the file's folder.
    Path,
}

/// What a running broker does with a changed value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Live {
    /// Takes it up at once.
    Now,
    /// Uses it for models that are loaded from then on.
    NextLoad,
    /// Clients read it themselves, at their start.
    Clients,
    /// Needs a restart.
    Restart,
}

impl Live {
    /// In words, for documents.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Live::Now => "at once",
            Live::NextLoad => "next load",
            Live::Clients => "clients, at their start",
            Live::Restart => "restart",
        }
    }
}

/// A default as it stands in the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Preset {
    Unset,
    Switch(bool),
    Whole(u64),
    Fraction(f64),
    Text(&'static str),
}

/// One key. In [`table`] it is the whole key; in [`model_table`] what follows `models.ID.`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spec {
    /// The key.
    pub key: &'static str,
    /// What values it takes.
    pub kind: Kind,
    pub(crate) preset: Preset,
    /// When a changed value takes effect in a running broker.
    pub live: Live,
    /// Further environment variables of our own, after the one that is made from the key.
    pub ours: &'static [&'static str],
    /// Variables that users have from elsewhere; the last of all variables.
    pub foreign: &'static [&'static str],
    /// Option of `serve` for it.
    pub flag: Option<&'static str>,
    /// What it means, for people; one line.
    pub meaning: &'static str,
}

impl Spec {
    /// Its value where nobody says anything. The default model's and the models' own defaults are put together elsewhere.
    #[must_use]
    pub fn default(&self) -> Value {
        match self.preset {
            Preset::Unset => Value::Unset,
            Preset::Switch(on) => Value::Switch(on),
            Preset::Whole(number) => Value::Whole(number),
            Preset::Fraction(number) => Value::Fraction(number),
            Preset::Text(text) => Value::Text(text.to_owned()),
        }
    }

    /// Whether it can be without a value: then an empty text takes the value away.
    #[must_use]
    pub fn is_optional(&self) -> bool {
        matches!(self.preset, Preset::Unset)
    }
}

const fn spec(key: &'static str, kind: Kind, preset: Preset, live: Live, meaning: &'static str) -> Spec {
    Spec { key, kind, preset, live, ours: &[], foreign: &[], flag: None, meaning }
}

impl Spec {
    const fn ours(self, ours: &'static [&'static str]) -> Spec {
        Spec { ours, ..self }
    }

    const fn foreign(self, foreign: &'static [&'static str]) -> Spec {
        Spec { foreign, ..self }
    }

    const fn flag(self, flag: &'static str) -> Spec {
        Spec { flag: Some(flag), ..self }
    }
}

pub(crate) const MODEL_TYPES: &[&str] =
    &["embedding", "text2text", "reranker", "classifier", "chat", "custom", "remote"];
pub(crate) const PRECISIONS: &[&str] = &["f32", "bf16", "int8", "auto"];
pub(crate) const BACKINGS: &[&str] = &["auto", "memfd", "file", "posix-shm"];
pub(crate) const FALLBACKS: &[&str] = &["error", "local"];

const SECONDS: Kind = Kind::Whole(0, MAX_SECONDS, "seconds");

use Kind::{Bytes, Choice, Device, Fraction, Name, OnlyFalse, Path, Switch, Whole};
use Live::{Clients, NextLoad, Now, Restart};

/// All keys but those of the models.
const TABLE: &[Spec] = &[
    spec("enabled", Switch, Preset::Switch(true), Restart, "false: `serve` refuses to start"),
    spec(
        "auto_initialize",
        Switch,
        Preset::Switch(true),
        Restart,
        "load the models with `preload` when the broker starts; false: everything on first use",
    ),
    spec("log_model_usage", Switch, Preset::Switch(true), Now, "log loads, unloads and their like"),
    spec(
        "memory_monitoring",
        Switch,
        Preset::Switch(true),
        Now,
        "watch the memory that models take and warn when it grows short",
    ),
    spec(
        "device_preference",
        Device,
        Preset::Text("auto"),
        NextLoad,
        "where models compute that name no device",
    )
    .foreign(&["MODEL_DEVICE"]),
    spec(
        "gpu_memory_fraction",
        Fraction,
        Preset::Fraction(0.8),
        Restart,
        "share of a GPU's memory that may be used",
    ),
    spec("allow_gpu_growth", Switch, Preset::Switch(true), Restart, "take GPU memory as it is needed"),
    spec(
        "trust_remote_code",
        OnlyFalse(
            "code that comes with a model is never run: it would run with all rights of this user. Convert the model to \
             safetensors of a supported architecture, or serve it by a provider of your own",
        ),
        Preset::Switch(false),
        Restart,
        "exists because other programs have it; only false is accepted",
    ),
    spec("sharing.enabled", Switch, Preset::Switch(true), Clients, "false: every process loads its own copy"),
    spec(
        "sharing.rollout_percent",
        Whole(0, 100, "percent"),
        Preset::Whole(100),
        Clients,
        "share of processes, by their names, that use the shared models",
    ),
    spec(
        "sharing.unload_after_seconds",
        SECONDS,
        Preset::Whole(1800),
        Now,
        "how long a model that nobody uses stays loaded; 0 = for ever",
    )
    .flag("--unload-after"),
    spec(
        "sharing.max_shared_models",
        Whole(0, MAX_SHARED_MODELS, "models"),
        Preset::Whole(5),
        Now,
        "models loaded at once; the one idle for longest leaves first; 0 = no such bound",
    )
    .flag("--max-models"),
    spec(
        "sharing.fallback",
        Choice(FALLBACKS),
        Preset::Text("error"),
        Clients,
        "what a process does that cannot have the shared model: fail, or load its own copy",
    )
    .ours(&["MODELBROKER_FALLBACK"]),
    spec(
        "embedding_cache.enabled",
        Switch,
        Preset::Switch(true),
        NextLoad,
        "keep vectors that were computed",
    ),
    spec(
        "embedding_cache.max_cache_size",
        Whole(0, MAX_CACHE_ENTRIES, "vectors"),
        Preset::Whole(10_000),
        NextLoad,
        "vectors that the cache of each loaded model holds; 0 = no cache",
    )
    .ours(&["MODELBROKER_CACHE_ENTRIES"])
    .flag("--cache-entries"),
    spec(
        "embedding_cache.ttl_seconds",
        SECONDS,
        Preset::Whole(3600),
        NextLoad,
        "how long a vector is kept; 0 = as long as the model is loaded",
    )
    .ours(&["MODELBROKER_CACHE_TTL"])
    .flag("--cache-ttl"),
    spec(
        "embedding_cache.persist_to_disk",
        Switch,
        Preset::Switch(false),
        Restart,
        "keep the caches in files in the cache folder, over restarts",
    )
    .ours(&["MODELBROKER_CACHE_PERSIST"])
    .flag("--cache-persist"),
    spec(
        "serve.model",
        Name,
        Preset::Unset,
        Now,
        "model for clients that name none: an id, a name or a folder; unset = what `models.embedding` names",
    )
    .ours(&["MODELBROKER_MODEL"])
    .foreign(&["MODEL_NAME"])
    .flag("--model"),
    spec(
        "serve.precision",
        Choice(PRECISIONS),
        Preset::Text("f32"),
        NextLoad,
        "precision of models that are asked for without one",
    )
    .ours(&["MODELBROKER_PRECISION"])
    .flag("--precision"),
    spec(
        "serve.threads",
        Whole(0, MAX_THREADS, "threads"),
        Preset::Whole(0),
        Restart,
        "compute threads of the engine; 0 = the cores that the process may use",
    )
    .flag("--threads"),
    spec(
        "serve.backing",
        Choice(BACKINGS),
        Preset::Text("auto"),
        Restart,
        "what weights images lie in; auto = memfd, and a file for large ones",
    )
    .flag("--backing"),
    spec(
        "serve.cache_dir",
        Path,
        Preset::Unset,
        Restart,
        "where models and images are cached; unset = `$XDG_CACHE_HOME/modelbroker` or `~/.cache/modelbroker`",
    )
    .ours(&["MODELBROKER_CACHE_DIR"])
    .foreign(&["MODEL_CACHE_DIR"])
    .flag("--cache-dir"),
    spec(
        "serve.idle_exit_seconds",
        SECONDS,
        Preset::Unset,
        Now,
        "leave after so long without any session; unset = stay",
    )
    .flag("--idle-exit"),
    spec(
        "serve.memory_budget_bytes",
        Bytes(MIN_BUDGET_BYTES, MAX_BYTES),
        Preset::Unset,
        Now,
        "bytes that models and caches may take; unset = as much as the system and the control group have",
    )
    .flag("--memory-budget"),
    spec(
        "serve.socket",
        Path,
        Preset::Unset,
        Restart,
        "the broker's socket; unset = `broker.sock` in the user's run folder",
    )
    .ours(&["MODELBROKER_SOCKET"])
    .flag("--socket"),
    spec("serve.log_file", Path, Preset::Unset, Restart, "append log lines to this file; unset = stderr")
        .flag("--log-file"),
    spec("serve.log_json", Switch, Preset::Switch(false), Restart, "log lines as JSON").flag("--log-json"),
    spec(
        "serve.allow_other_users",
        Switch,
        Preset::Switch(false),
        Restart,
        "let processes of other users in",
    )
    .flag("--allow-other-users"),
];

/// Keys of one model, without `models.ID.`.
const MODEL_TABLE: &[Spec] = &[
    spec("type", Choice(MODEL_TYPES), Preset::Unset, NextLoad, "what the model is for; must be given"),
    spec("name", Name, Preset::Unset, NextLoad, "hub id, short name or folder, as everywhere"),
    spec("local_path", Path, Preset::Unset, NextLoad, "folder to take the model from, instead of its name"),
    spec(
        "dimension",
        Whole(1, MAX_DIMENSION, "numbers"),
        Preset::Unset,
        NextLoad,
        "numbers in a vector, where it is known",
    ),
    spec("device", Device, Preset::Unset, NextLoad, "where it computes; unset = `device_preference`"),
    spec("batch_size", Whole(1, MAX_BATCH, "texts"), Preset::Whole(32), Clients, "texts in one request"),
    spec(
        "shared",
        Switch,
        Preset::Switch(true),
        NextLoad,
        "false: the broker refuses it, and each process loads its own copy",
    ),
    spec(
        "cache_embeddings",
        Switch,
        Preset::Switch(true),
        NextLoad,
        "keep its vectors in the embedding cache",
    ),
    spec(
        "max_input_length",
        Whole(1, MAX_LENGTH_TOKENS, "tokens"),
        Preset::Whole(512),
        Clients,
        "tokens of an input; what is longer is truncated",
    ),
    spec(
        "max_output_length",
        Whole(1, MAX_LENGTH_TOKENS, "tokens"),
        Preset::Whole(128),
        Clients,
        "tokens that are generated at most",
    ),
    spec("num_beams", Whole(1, MAX_BEAMS, "beams"), Preset::Whole(4), Clients, "beams of the beam search"),
    spec(
        "precision",
        Choice(PRECISIONS),
        Preset::Unset,
        NextLoad,
        "precision of its matrices; unset = `serve.precision`",
    ),
    spec("preload", Switch, Preset::Switch(false), NextLoad, "load it at start and keep it"),
    spec(
        "unload_after_seconds",
        SECONDS,
        Preset::Unset,
        Now,
        "how long it stays loaded while nobody uses it; 0 = for ever; unset = `sharing.unload_after_seconds`",
    ),
];

/// All keys but those of the models, in the order in which people read them.
#[must_use]
pub fn table() -> &'static [Spec] {
    TABLE
}

/// Keys of one model: each stands for `models.ID.KEY`.
#[must_use]
pub fn model_table() -> &'static [Spec] {
    MODEL_TABLE
}

/// Id of the model whose name is the default model's too.
pub(crate) const EMBEDDING_ID: &str = "embedding";

/// Models that are configured before anybody says anything: id, and the keys that differ from [`model_table`].
#[must_use]
pub fn default_models() -> &'static [(&'static str, &'static [(&'static str, DefaultValue)])] {
    &[
        (
            EMBEDDING_ID,
            &[
                ("type", DefaultValue::Text("embedding")),
                ("name", DefaultValue::Text("sentence-transformers/all-MiniLM-L6-v2")),
                ("dimension", DefaultValue::Whole(384)),
            ],
        ),
        (
            "t5_summarizer",
            &[
                ("type", DefaultValue::Text("text2text")),
                ("name", DefaultValue::Text("google/flan-t5-large")),
            ],
        ),
    ]
}

/// A default of a configured model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DefaultValue {
    /// A number.
    Whole(u64),
    /// A text.
    Text(&'static str),
}

impl DefaultValue {
    pub(crate) fn value(self) -> Value {
        match self {
            DefaultValue::Whole(number) => Value::Whole(number),
            DefaultValue::Text(text) => Value::Text(text.to_owned()),
        }
    }
}

/// What a key names: its row, and the model's id where it is a model's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Named<'a> {
    pub(crate) spec: &'static Spec,
    pub(crate) model: Option<&'a str>,
}

/// First part of the models' keys.
pub(crate) const MODELS: &str = "models.";

/// The row of a key; `None` where there is no such key. The id of a model is not judged.
pub(crate) fn find(key: &str) -> Option<Named<'_>> {
    if let Some(spec) = TABLE.iter().find(|spec| spec.key == key) {
        return Some(Named { spec, model: None });
    }
    // An id may hold dots: what follows the last one is the model's key.
    let (id, field) = key.strip_prefix(MODELS)?.rsplit_once('.')?;
    let spec = MODEL_TABLE.iter().find(|spec| spec.key == field)?;
    Some(Named { spec, model: Some(id) })
}

/// The key of a model's setting.
pub(crate) fn model_key(id: &str, field: &str) -> String {
    format!("{MODELS}{id}.{field}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_are_unique_and_found_again() {
        let mut seen = HashSet::new();
        for spec in table() {
            assert!(seen.insert(spec.key), "{} twice", spec.key);
            assert_eq!(find(spec.key).map(|named| named.spec.key), Some(spec.key));
            assert!(!spec.key.starts_with(MODELS));
        }
        for spec in model_table() {
            let key = model_key("a.b", spec.key);
            assert_eq!(find(&key), Some(Named { spec, model: Some("a.b") }));
        }
        for wrong in ["", "models", "models.", "models.type", "models.a.nothing", "sharing", "a.type"] {
            assert_eq!(find(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn defaults_are_within_their_ranges() {
        for spec in table().iter().chain(model_table()) {
            match (spec.kind, spec.preset) {
                (_, Preset::Unset) | (Kind::Switch | Kind::OnlyFalse(_), Preset::Switch(_)) => {}
                (Kind::Whole(least, most, _), Preset::Whole(n)) => assert!((least..=most).contains(&n)),
                (Kind::Fraction, Preset::Fraction(n)) => assert!(n > 0.0 && n <= 1.0),
                (Kind::Choice(words), Preset::Text(word)) => assert!(words.contains(&word), "{}", spec.key),
                (Kind::Device, Preset::Text(word)) => assert_eq!(word, "auto"),
                other => panic!("{}: {other:?}", spec.key),
            }
        }
    }
}

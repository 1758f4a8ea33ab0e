//! The layers put together: for each key the value of the strongest layer, with its origin; and every problem of every layer.

use crate::environment;
use crate::file::{self, ConfigFile};
use crate::limits::{MAX_ID_BYTES, MAX_KEY_BYTES, MAX_MODELS};
use crate::nearest::nearest;
use crate::problem::{Origin, Problem, Problems};
use crate::settings::Settings;
use crate::table::{EMBEDDING_ID, MODELS, PRECISIONS, default_models, find, model_key, model_table, table};
use crate::value::{Places, Raw, Value, read};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;

/// A value of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlagValue {
    /// The option, with its dashes: `--set`, `--cache-ttl`.
    pub flag: String,
    /// The flat key.
    pub key: String,
    /// The value as text.
    pub value: String,
}

/// Everything that says something, weakest first. Defaults need not be given.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The configuration file, if there is one.
    pub file: Option<ConfigFile>,
    /// Why a file that there is could not be read; the other layers are judged all the same.
    pub unreadable: Option<Problem>,
    /// The environment; an empty value counts as unset.
    pub environment: Vec<(OsString, OsString)>,
    /// The command line.
    pub flags: Vec<FlagValue>,
    /// The home folder, which `~/` means.
    pub home: Option<PathBuf>,
}

/// A value and where it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The value.
    pub value: Value,
    /// Who said so.
    pub origin: Origin,
}

/// The configuration that holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Effective {
    entries: BTreeMap<String, Setting>,
    settings: Settings,
}

impl Effective {
    /// Each flat key with its value and origin, in the order of the keys.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Setting)> {
        self.entries.iter().map(|(key, setting)| (key.as_str(), setting))
    }

    /// One key's value and origin; `None` where there is no such key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Setting> {
        self.entries.get(key)
    }

    /// All of it, typed.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// `{key: {"value": …, "origin": "…"}}`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let entry = |setting: &Setting| serde_json::json!({ "value": setting.value.to_json(), "origin": setting.origin.to_string() });
        self.entries.iter().map(|(key, setting)| (key.clone(), entry(setting))).collect()
    }

    /// Of already checked entries.
    pub(crate) fn from_entries(entries: BTreeMap<String, Setting>) -> Effective {
        let settings = Settings::from_entries(&entries);
        Effective { entries, settings }
    }

    pub(crate) fn map(&self) -> &BTreeMap<String, Setting> {
        &self.entries
    }
}

/// One value of a layer.
struct Said {
    key: String,
    raw: Raw,
    origin: Origin,
}

/// Puts the layers together: defaults, then the file, the environment, the command line.
///
/// # Errors
/// [`Problems`]: all of them, of all layers, those included whose value another layer overrides.
pub fn resolve(sources: &Sources) -> Result<Effective, Problems> {
    let mut problems = Problems::default();
    if let Some(problem) = &sources.unreadable {
        problems.push(problem.clone());
    }
    let from_file = match &sources.file {
        Some(file) => file::entries(file, &mut problems).map(|entries| {
            let said = |entry: file::FileEntry| Said {
                key: entry.key,
                raw: entry.raw,
                origin: Origin::File { path: file.path.clone(), line: entry.line },
            };
            entries.into_iter().map(said).collect()
        }),
        None => sources.unreadable.is_none().then(Vec::new),
    };
    let file_is_known = from_file.is_some();
    let from_file: Vec<Said> = from_file.unwrap_or_default();
    let flags = flags(&sources.flags, &mut problems);
    let mut ids: BTreeSet<String> = default_models().iter().map(|(id, _)| (*id).to_owned()).collect();
    for said in from_file.iter().chain(&flags) {
        if let Some(id) = find(&said.key).and_then(|named| named.model) {
            ids.insert(id.to_owned());
        }
    }
    ids.retain(|id| id_problem(id).is_none());
    let environment =
        environment::entries(&sources.environment, file_is_known.then_some(&ids), &mut problems);
    let environment = environment.into_iter().map(|entry| Said {
        key: entry.key,
        raw: Raw::Text(entry.value),
        origin: Origin::Environment(entry.variable),
    });
    let mut entries = defaults(&ids);
    for said in from_file.into_iter().chain(environment).chain(flags) {
        let folder = match &said.origin {
            Origin::File { path, .. } => path.parent(),
            _ => None,
        };
        match one(&said, &ids, Places { home: sources.home.as_deref(), folder }) {
            Ok(value) => {
                entries.insert(said.key, Setting { value, origin: said.origin });
            }
            Err(problem) => problems.push(*problem),
        }
    }
    derive(&mut entries);
    // What belongs together cannot be judged where parts are missing.
    if problems.count() == 0 {
        check_together(&entries, &ids, &mut problems);
    }
    problems.into_result(()).map(|()| Effective::from_entries(entries))
}

/// Options, of which each key may have one.
fn flags(flags: &[FlagValue], problems: &mut Problems) -> Vec<Said> {
    let mut found: Vec<Said> = Vec::new();
    for flag in flags {
        let origin = Origin::Flag(flag.flag.clone());
        if let Some(first) = found.iter().find(|said| said.key == flag.key) {
            let reason = format!("was given by {} already", first.origin);
            problems.push(Problem::new(&origin, &flag.key, reason).value(format!("\"{}\"", flag.value)));
            continue;
        }
        found.push(Said { key: flag.key.clone(), raw: Raw::Text(flag.value.clone()), origin });
    }
    found
}

/// Why a model cannot be called so.
fn id_problem(id: &str) -> Option<String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > MAX_ID_BYTES {
        return Some(format!("a model's id has 1 to {MAX_ID_BYTES} characters"));
    }
    let begins = id.starts_with(|c: char| c.is_ascii_alphanumeric());
    (!begins || !id.chars().all(allowed)).then(|| {
        "a model's id begins with a letter or digit and holds letters, digits, `.`, `_` and `-` only"
            .to_owned()
    })
}

/// One value of one layer.
fn one(said: &Said, ids: &BTreeSet<String>, places: Places<'_>) -> Result<Value, Box<Problem>> {
    let problem = |reason: String| Problem::new(&said.origin, &said.key, reason).value(said.raw.shown());
    let Some(named) = find(&said.key) else {
        return Err(Box::new(
            problem("there is no such key".to_owned()).nearest(nearest_key(&said.key, ids)),
        ));
    };
    if let Some(reason) = named.model.and_then(id_problem) {
        return Err(Box::new(problem(reason)));
    }
    read(named.spec, &said.raw, places)
        .map_err(|unusable| Box::new(problem(unusable.reason).nearest(unusable.nearest)))
}

/// The key that is nearest to one that there is not.
fn nearest_key(key: &str, ids: &BTreeSet<String>) -> Option<String> {
    if key.len() > MAX_KEY_BYTES {
        return None;
    }
    let mut ids = ids.clone();
    // A new model whose other keys may be right.
    if let Some((id, _)) = key.strip_prefix(MODELS).and_then(|rest| rest.rsplit_once('.'))
        && id_problem(id).is_none()
    {
        ids = BTreeSet::from([id.to_owned()]);
    }
    let of_models = ids.iter().flat_map(|id| model_table().iter().map(|spec| model_key(id, spec.key)));
    let all: Vec<String> = table().iter().map(|spec| spec.key.to_owned()).chain(of_models).collect();
    nearest(key, all.iter().map(String::as_str)).map(str::to_owned)
}

fn defaults(ids: &BTreeSet<String>) -> BTreeMap<String, Setting> {
    let mut entries = BTreeMap::new();
    let mut add = |key: String, value: Value| {
        entries.insert(key, Setting { value, origin: Origin::Default });
    };
    for spec in table() {
        add(spec.key.to_owned(), spec.default());
    }
    for id in ids {
        for spec in model_table() {
            add(model_key(id, spec.key), spec.default());
        }
    }
    for (id, fields) in default_models() {
        for (field, value) in *fields {
            add(model_key(id, field), value.value());
        }
    }
    entries
}

/// Defaults that follow from other values.
fn derive(entries: &mut BTreeMap<String, Setting>) {
    for (id, fields) in default_models() {
        let is_default = |field: &str| {
            entries.get(&model_key(id, field)).is_none_or(|setting| setting.origin == Origin::Default)
        };
        // Another model has another dimension.
        let other_model = !is_default("name") || !is_default("local_path");
        let key = model_key(id, "dimension");
        if other_model && is_default("dimension") && fields.iter().any(|(field, _)| *field == "dimension") {
            entries.insert(key, Setting { value: Value::Unset, origin: Origin::Default });
        }
    }
    if entries.get("serve.model").is_some_and(|setting| setting.value == Value::Unset)
        && let Some(setting) = ["local_path", "name"]
            .iter()
            .filter_map(|field| entries.get(&model_key(EMBEDDING_ID, field)))
            .find(|setting| setting.value != Value::Unset)
            .cloned()
    {
        let precision = entries.get(&model_key(EMBEDDING_ID, "precision")).map(|setting| &setting.value);
        let value = match (setting.value, precision) {
            (Value::Text(source), Some(Value::Text(precision))) => {
                Value::Text(format!("{source}:{precision}"))
            }
            (value, _) => value,
        };
        entries.insert("serve.model".to_owned(), Setting { value, origin: setting.origin });
    }
}

/// Rules over more than one key.
fn check_together(entries: &BTreeMap<String, Setting>, ids: &BTreeSet<String>, problems: &mut Problems) {
    let of = |id: &str, field: &str| entries.get(&model_key(id, field));
    let text = |id: &str, field: &str| match of(id, field).map(|setting| &setting.value) {
        Some(Value::Text(text)) => Some(text.as_str()),
        _ => None,
    };
    // Where a model was begun: of its keys the first that somebody set.
    let begun = |id: &str| {
        let origins = model_table().iter().filter_map(|spec| Some(&of(id, spec.key)?.origin));
        origins.filter(|origin| **origin != Origin::Default).min().cloned().unwrap_or(Origin::Default)
    };
    if ids.len() > MAX_MODELS {
        let reason = format!("{} models are configured; the limit is {MAX_MODELS}", ids.len());
        let last = ids.iter().map(|id| begun(id)).max().unwrap_or(Origin::Default);
        problems.push(Problem::new(&last, "models", reason));
    }
    let mut preloaded = 0;
    for id in ids {
        let kind = text(id, "type");
        if kind.is_none() {
            problems.push(Problem::new(
                &begun(id),
                &model_key(id, "type"),
                "must be given: what the model is for",
            ));
        }
        let source = text(id, "local_path").or_else(|| text(id, "name"));
        if source.is_none() && kind.is_some_and(|kind| kind != "custom") {
            let reason = "must be given, or `local_path`: which model it is";
            problems.push(Problem::new(&begun(id), &model_key(id, "name"), reason));
        }
        let suffix = source.and_then(|source| source.rsplit_once(':')).map(|(_, suffix)| suffix);
        if let (Some(suffix), Some(precision)) =
            (suffix.filter(|suffix| PRECISIONS.contains(suffix)), of(id, "precision"))
            && precision.value != Value::Unset
        {
            let reason = format!("the model's name ends in :{suffix} already: say it in one place");
            let key = model_key(id, "precision");
            problems.push(Problem::new(&precision.origin, &key, reason).value(precision.value.to_string()));
        }
        preloaded += u64::from(of(id, "preload").is_some_and(|s| s.value == Value::Switch(true)));
    }
    let key = "sharing.max_shared_models";
    if let Some(Setting { value: Value::Whole(most), origin }) = entries.get(key)
        && *most > 0
        && preloaded > *most
    {
        let reason = format!("{preloaded} models are to be preloaded and kept: allow at least as many");
        problems.push(Problem::new(origin, key, reason).value(most.to_string()));
    }
}

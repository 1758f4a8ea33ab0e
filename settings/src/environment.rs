//! The environment as a layer: which variables stand for which keys, and which are nobody's. Reads no process's environment.

use crate::nearest::nearest;
use crate::problem::{Origin, Problem, Problems};
use crate::table::{Spec, model_key, model_table, table};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;

/// First part of our own variables.
pub const PREFIX: &str = "MODELBROKER_";
/// First part of the variables that users of an earlier module manager have.
pub const CORE_PREFIX: &str = "CORE_MODEL_MANAGER_";
/// Variables of ours that no key stands behind: what reads them is named in docs/operations.md.
pub const OTHER_VARIABLES: &[&str] = &[
    "MODELBROKER_BIN",
    "MODELBROKER_CONFIG",
    "MODELBROKER_CPU_PATH",
    "MODELBROKER_HUB_CDN_HOSTS",
    "MODELBROKER_LOG",
    "MODELBROKER_OFFLINE",
    "MODELBROKER_PYTHON",
    "MODELBROKER_START",
    "MODELBROKER_SUPERVISOR_PID",
];
/// Beginnings of variables that tests and measurements use among themselves; they are not looked at.
pub const UNCHECKED_PREFIXES: &[&str] =
    &["MODELBROKER_TEST_", "MODELBROKER_STORM_", "MODELBROKER_BENCH_", "MODELBROKER_FORCE_"];

/// Ranks of variables: which of several for one key counts. The last of ours goes before the first of the next.
const OURS: usize = 0;
const CORE: usize = 100;
const FOREIGN: usize = 200;

/// A key, a model's id, or a prefix as it stands in variables.
pub(crate) fn capitals(text: &str) -> String {
    let capital = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    text.chars().map(capital).collect()
}

/// A value of the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EnvironmentEntry {
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) variable: String,
}

/// Variables that stand for a key that is no model's, with their ranks.
fn variables(spec: &'static Spec) -> impl Iterator<Item = (usize, String)> {
    let made = [(OURS, PREFIX), (CORE, CORE_PREFIX)];
    let made = made.map(|(rank, prefix)| (rank, format!("{prefix}{}", capitals(spec.key))));
    let ours = spec.ours.iter().enumerate().map(|(at, name)| (OURS + 1 + at, (*name).to_owned()));
    let foreign = spec.foreign.iter().enumerate().map(|(at, name)| (FOREIGN + at, (*name).to_owned()));
    made.into_iter().chain(ours).chain(foreign)
}

/// Keys that each variable stands for, with its rank among the key's variables.
type Known = BTreeMap<String, Vec<(String, usize)>>;

fn known(ids: &BTreeSet<String>) -> Known {
    let mut known: Known = BTreeMap::new();
    let mut add = |variable: String, key: &str, rank: usize| {
        known.entry(variable).or_default().push((key.to_owned(), rank));
    };
    for spec in table() {
        for (rank, variable) in variables(spec) {
            add(variable, spec.key, rank);
        }
    }
    for id in ids {
        for spec in model_table() {
            let key = model_key(id, spec.key);
            add(format!("{PREFIX}{}", capitals(&key)), &key, OURS);
            add(format!("{CORE_PREFIX}{}", capitals(&key)), &key, CORE);
        }
    }
    if ids.contains(crate::table::EMBEDDING_ID) {
        add("MODEL_NAME".into(), &model_key(crate::table::EMBEDDING_ID, "name"), FOREIGN);
    }
    known
}

/// Values that the environment gives: for each key the one of highest rank. `ids` are the configured models, `None` when they
/// are not known since the file could not be read: then variables of models are left alone.
pub(crate) fn entries(
    environment: &[(OsString, OsString)],
    ids: Option<&BTreeSet<String>>,
    problems: &mut Problems,
) -> Vec<EnvironmentEntry> {
    let none = BTreeSet::new();
    let known = known(ids.unwrap_or(&none));
    let mut best: BTreeMap<String, (usize, EnvironmentEntry)> = BTreeMap::new();
    let mut sorted: Vec<(&str, &OsString)> =
        environment.iter().filter_map(|(name, value)| Some((name.to_str()?, value))).collect();
    sorted.sort_unstable();
    for (name, value) in sorted {
        if value.is_empty() {
            continue;
        }
        let origin = Origin::Environment(name.to_owned());
        let Some(keys) = known.get(name) else {
            if let Some(problem) = unknown(name, &origin, ids.is_some(), &known) {
                problems.push(problem);
            }
            continue;
        };
        let Some(value) = value.to_str() else {
            problems.push(Problem::new(&origin, &keys[0].0, "is not UTF-8 text"));
            continue;
        };
        // Two models whose ids look the same in capitals; the same variable for keys of two kinds is meant.
        let models: Vec<&str> =
            keys.iter().map(|(key, _)| key.as_str()).filter(|key| key.starts_with("models.")).collect();
        if models.len() > 1 {
            let reason = format!("could mean {}: set it in the file", models.join(" or "));
            problems.push(Problem::new(&origin, models[0], reason).value(format!("\"{value}\"")));
            continue;
        }
        for (key, rank) in keys {
            let entry =
                EnvironmentEntry { key: key.clone(), value: value.to_owned(), variable: name.to_owned() };
            match best.get(key) {
                Some((there, _)) if there <= rank => {}
                _ => {
                    best.insert(key.clone(), (*rank, entry));
                }
            }
        }
    }
    best.into_values().map(|(_, entry)| entry).collect()
}

/// What is wrong with a variable that stands for no key, if it is ours to judge.
fn unknown(name: &str, origin: &Origin, ids_known: bool, known: &Known) -> Option<Problem> {
    let rest = name.strip_prefix(PREFIX).or_else(|| name.strip_prefix(CORE_PREFIX))?;
    let elsewhere =
        OTHER_VARIABLES.contains(&name) || UNCHECKED_PREFIXES.iter().any(|start| name.starts_with(start));
    let of_a_model = rest.starts_with("MODELS_");
    if elsewhere || (of_a_model && !ids_known) {
        return None;
    }
    let candidates = known.keys().map(String::as_str);
    let others = OTHER_VARIABLES.iter().copied();
    let nearest = match name.starts_with(PREFIX) {
        true => nearest(name, candidates.chain(others).filter(|name| name.starts_with(PREFIX))),
        false => nearest(name, candidates.filter(|name| name.starts_with(CORE_PREFIX))),
    };
    let is_field = model_table().iter().any(|spec| rest.ends_with(&format!("_{}", capitals(spec.key))));
    let reason = match of_a_model && is_field {
        true => "names no configured model: models are added in the file, or with --set",
        false => "stands for no setting",
    };
    let mut problem = Problem::new(origin, "", reason).nearest(nearest.map(str::to_owned));
    problem.key = None;
    Some(problem)
}

/// Variables of a key for people, in the order in which they count.
pub(crate) fn variables_shown(spec: &'static Spec, of_model: bool) -> Vec<String> {
    if of_model {
        let field = capitals(spec.key);
        return vec![format!("{PREFIX}MODELS_ID_{field}"), format!("{CORE_PREFIX}MODELS_ID_{field}")];
    }
    let mut all: Vec<(usize, String)> = variables(spec).collect();
    all.sort();
    all.into_iter().map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[&str]) -> BTreeSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn read(pairs: &[(&str, &str)], models: &[&str]) -> (Vec<(String, String, String)>, Vec<String>) {
        let environment: Vec<(OsString, OsString)> =
            pairs.iter().map(|(name, value)| (name.into(), value.into())).collect();
        let mut problems = Problems::default();
        let entries = entries(&environment, Some(&ids(models)), &mut problems);
        let said = problems.list().iter().map(ToString::to_string).collect();
        (entries.into_iter().map(|e| (e.key, e.value, e.variable)).collect(), said)
    }

    fn entry(key: &str, value: &str, variable: &str) -> (String, String, String) {
        (key.into(), value.into(), variable.into())
    }

    #[test]
    fn no_variable_stands_for_two_things_by_accident() {
        for (variable, keys) in known(&ids(&["embedding", "t5_summarizer"])) {
            let meant: Vec<&str> = keys.iter().map(|(key, _)| key.as_str()).collect();
            match variable.as_str() {
                "MODEL_NAME" => assert_eq!(meant, ["serve.model", "models.embedding.name"]),
                _ => assert_eq!(meant.len(), 1, "{variable}: {meant:?}"),
            }
            assert!(!OTHER_VARIABLES.contains(&variable.as_str()), "{variable}");
        }
    }

    #[test]
    fn every_name_of_a_key_is_understood() {
        let (found, problems) = read(
            &[
                ("CORE_MODEL_MANAGER_MODELS_EMBEDDING_LOCAL_PATH", "/m"),
                ("CORE_MODEL_MANAGER_DEVICE_PREFERENCE", "cpu"),
                ("CORE_MODEL_MANAGER_SHARING_MAX_SHARED_MODELS", "3"),
                ("MODEL_CACHE_DIR", "/c"),
                ("MODELBROKER_MODELS_MY_MODEL_1_BATCH_SIZE", "8"),
                ("MODELBROKER_LOG", "debug"),
                ("MODELBROKER_TEST_ANYTHING", "x"),
                ("MODELBROKER_CACHE_TTL", ""),
                ("PATH", "/bin"),
            ],
            &["embedding", "my-model.1"],
        );
        assert_eq!(problems, [""; 0]);
        assert_eq!(
            found,
            [
                entry("device_preference", "cpu", "CORE_MODEL_MANAGER_DEVICE_PREFERENCE"),
                entry("models.embedding.local_path", "/m", "CORE_MODEL_MANAGER_MODELS_EMBEDDING_LOCAL_PATH"),
                entry("models.my-model.1.batch_size", "8", "MODELBROKER_MODELS_MY_MODEL_1_BATCH_SIZE"),
                entry("serve.cache_dir", "/c", "MODEL_CACHE_DIR"),
                entry("sharing.max_shared_models", "3", "CORE_MODEL_MANAGER_SHARING_MAX_SHARED_MODELS"),
            ]
        );
    }

    #[test]
    fn ours_go_before_theirs_and_theirs_before_anybodys() {
        let all = [
            ("MODEL_CACHE_DIR", "/4"),
            ("CORE_MODEL_MANAGER_SERVE_CACHE_DIR", "/3"),
            ("MODELBROKER_CACHE_DIR", "/2"),
            ("MODELBROKER_SERVE_CACHE_DIR", "/1"),
        ];
        for from in 0..all.len() {
            // The last of those that are left is the strongest.
            let (found, _) = read(&all[..=from], &[]);
            assert_eq!(found, [entry("serve.cache_dir", all[from].1, all[from].0)]);
        }
        let (found, _) = read(&[("MODEL_NAME", "m")], &["embedding"]);
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn unknown_and_ambiguous_variables_are_named() {
        let (_, said) = read(
            &[
                ("CORE_MODEL_MANAGER_DEVICE_PREFERENC", "cpu"),
                ("MODELBROKER_CACHE_ENTRY", "1"),
                ("MODELBROKER_MODELS_OTHER_NAME", "x"),
                ("MODELBROKER_MODELS_A_B_NAME", "x"),
            ],
            &["a.b", "a-b"],
        );
        assert_eq!(
            said,
            [
                "environment CORE_MODEL_MANAGER_DEVICE_PREFERENC: stands for no setting; the nearest is \
                 CORE_MODEL_MANAGER_DEVICE_PREFERENCE",
                "environment MODELBROKER_CACHE_ENTRY: stands for no setting; the nearest is MODELBROKER_CACHE_ENTRIES",
                "environment MODELBROKER_MODELS_A_B_NAME: models.a-b.name = \"x\": could mean models.a-b.name or \
                 models.a.b.name: set it in the file",
                "environment MODELBROKER_MODELS_OTHER_NAME: names no configured model: models are added in the file, or \
                 with --set; the nearest is MODELBROKER_MODELS_A_B_NAME",
            ]
        );
    }
}

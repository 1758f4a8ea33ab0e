//! What a configuration says of itself: values and origins over all layers, and the text of every kind of problem.

use proptest::prelude::*;
use settings::{ConfigFile, Effective, FlagValue, Problems, Sources, Value, resolve};
use std::ffi::OsString;

fn sources(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str, &str)]) -> Sources {
    Sources {
        file: Some(ConfigFile { path: "/etc/c.toml".into(), text: file.into() }),
        environment: environment.iter().map(|(n, v)| (OsString::from(n), OsString::from(v))).collect(),
        flags: flags
            .iter()
            .map(|(flag, key, value)| FlagValue {
                flag: (*flag).into(),
                key: (*key).into(),
                value: (*value).into(),
            })
            .collect(),
        home: Some("/home/u".into()),
        unreadable: None,
    }
}

fn good(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str, &str)]) -> Effective {
    resolve(&sources(file, environment, flags)).unwrap_or_else(|e| panic!("{e}"))
}

fn bad(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str, &str)]) -> Vec<String> {
    let problems: Problems = resolve(&sources(file, environment, flags)).expect_err("it has problems");
    problems.list().iter().map(ToString::to_string).collect()
}

fn shown(effective: &Effective, key: &str) -> String {
    let setting = effective.get(key).unwrap_or_else(|| panic!("no {key}"));
    format!("{} ({})", setting.value, setting.origin)
}

#[test]
fn the_defaults_are_those_that_users_were_promised() {
    let all = good("", &[], &[]);
    for (key, value) in [
        ("enabled", "true"),
        ("trust_remote_code", "false"),
        ("device_preference", "\"auto\""),
        ("gpu_memory_fraction", "0.8"),
        ("sharing.unload_after_seconds", "1800"),
        ("sharing.max_shared_models", "5"),
        ("sharing.rollout_percent", "100"),
        ("embedding_cache.max_cache_size", "10000"),
        ("embedding_cache.ttl_seconds", "3600"),
        ("embedding_cache.persist_to_disk", "false"),
        ("models.embedding.type", "\"embedding\""),
        ("models.embedding.name", "\"sentence-transformers/all-MiniLM-L6-v2\""),
        ("models.embedding.dimension", "384"),
        ("models.embedding.batch_size", "32"),
        ("models.embedding.local_path", "unset"),
        ("models.t5_summarizer.type", "\"text2text\""),
        ("models.t5_summarizer.name", "\"google/flan-t5-large\""),
        ("models.t5_summarizer.max_input_length", "512"),
        ("models.t5_summarizer.max_output_length", "128"),
        ("models.t5_summarizer.num_beams", "4"),
        ("serve.model", "\"sentence-transformers/all-MiniLM-L6-v2\""),
    ] {
        assert_eq!(shown(&all, key), format!("{value} (default)"), "{key}");
    }
    let typed = all.settings();
    assert_eq!(typed.embedding_cache.ttl.as_secs(), 3600);
    assert_eq!(
        typed.models.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(),
        ["embedding", "t5_summarizer"]
    );
}

#[test]
fn stronger_layers_win_and_say_so() {
    let file = "[sharing]\nunload_after_seconds = 60\nmax_shared_models = 2\n[serve]\nthreads = 1\n";
    let environment =
        [("CORE_MODEL_MANAGER_SHARING_MAX_SHARED_MODELS", "3"), ("MODELBROKER_SERVE_THREADS", "2")];
    let all = good(file, &environment, &[("--threads", "serve.threads", "4")]);
    assert_eq!(shown(&all, "sharing.unload_after_seconds"), "60 (file /etc/c.toml:2)");
    assert_eq!(
        shown(&all, "sharing.max_shared_models"),
        "3 (environment CORE_MODEL_MANAGER_SHARING_MAX_SHARED_MODELS)"
    );
    assert_eq!(shown(&all, "serve.threads"), "4 (flag --threads)");
    let json = all.to_json();
    assert_eq!(json["serve.threads"], serde_json::json!({"value": 4, "origin": "flag --threads"}));
    assert_eq!(json["models.embedding.device"], serde_json::json!({"value": null, "origin": "default"}));
    assert_eq!(json.as_object().unwrap().len(), all.entries().count());
}

#[test]
fn variables_that_users_have_are_taken_as_they_are() {
    let all = good(
        "",
        &[("MODEL_NAME", "nlpai-lab/KURE-v1"), ("MODEL_CACHE_DIR", "/m"), ("MODEL_DEVICE", "cuda")],
        &[],
    );
    assert_eq!(shown(&all, "models.embedding.name"), "\"nlpai-lab/KURE-v1\" (environment MODEL_NAME)");
    assert_eq!(shown(&all, "serve.model"), "\"nlpai-lab/KURE-v1\" (environment MODEL_NAME)");
    assert_eq!(shown(&all, "serve.cache_dir"), "\"/m\" (environment MODEL_CACHE_DIR)");
    assert_eq!(shown(&all, "device_preference"), "\"cuda\" (environment MODEL_DEVICE)");
    // Another model has another dimension, unless somebody says which.
    assert_eq!(shown(&all, "models.embedding.dimension"), "unset (default)");
}

#[test]
fn the_default_model_is_the_configured_embedding_model_unless_another_is_named() {
    let all = good("[models.embedding]\nlocal_path = 'm'\nprecision = 'int8'\n", &[], &[]);
    assert_eq!(shown(&all, "serve.model"), "\"/etc/m:int8\" (file /etc/c.toml:2)");
    assert_eq!(all.settings().models[0].source().as_deref(), Some("/etc/m:int8"));
    let all = good("[models.embedding]\nname = 'a/b'\n", &[("MODELBROKER_MODEL", "c/d")], &[]);
    assert_eq!(shown(&all, "serve.model"), "\"c/d\" (environment MODELBROKER_MODEL)");
}

#[test]
fn a_new_model_has_the_models_defaults() {
    let all = good(
        "[models.rank]\ntype = 'reranker'\nname = 'BAAI/bge-reranker-v2-m3'\npreload = true\n",
        &[],
        &[],
    );
    let model = all.settings().models.iter().find(|m| m.id == "rank").unwrap();
    assert!(model.preload && model.shared && model.batch_size == 32 && model.dimension.is_none());
    let all = good("", &[], &[("--set", "models.x.type", "custom")]);
    assert_eq!(all.settings().models.len(), 3);
}

/// A file, an environment, flags, and what is said of them.
type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a [(&'a str, &'a str, &'a str)], &'a str);

#[test]
fn every_kind_of_problem_names_key_value_reason_origin_and_the_nearest() {
    let cases: &[Case<'_>] = &[
        (
            "\n[sharing]\nunload_after = 60\n",
            &[],
            &[],
            "file /etc/c.toml:3: sharing.unload_after = 60: there is no such key; the nearest is \
             sharing.unload_after_seconds",
        ),
        (
            "[models.mine]\ntipe = 'chat'\n",
            &[],
            &[],
            "file /etc/c.toml:2: models.mine.tipe = \"chat\": there is no such key; the nearest is models.mine.type",
        ),
        (
            "[sharing]\nmax_shared_models = 'five'\n",
            &[],
            &[],
            "file /etc/c.toml:2: sharing.max_shared_models = \"five\": give a whole number of models from 0 to 64, \
             without quotes",
        ),
        (
            "",
            &[("MODELBROKER_CACHE_ENTRIES", "99999999999999999999")],
            &[],
            "environment MODELBROKER_CACHE_ENTRIES: embedding_cache.max_cache_size = \"99999999999999999999\": out of \
             range: give a number of vectors from 0 to 1048576",
        ),
        (
            "",
            &[],
            &[("--set", "serve.precision", "int9")],
            "flag --set: serve.precision = \"int9\": choose one of f32, bf16, int8, auto; the nearest is int8",
        ),
        (
            "trust_remote_code = true\n",
            &[],
            &[],
            "file /etc/c.toml:1: trust_remote_code = true: only false is accepted: code that comes with a model is never \
             run: it would run with all rights of this user. Convert the model to safetensors of a supported architecture, \
             or serve it by a provider of your own",
        ),
        (
            "[serve]\nmemory_budget_bytes = '9000 PiB'\n",
            &[],
            &[],
            "file /etc/c.toml:2: serve.memory_budget_bytes = \"9000 PiB\": give a number of bytes, or a text such as \
             \"8 GiB\" or \"500 MB\"",
        ),
        (
            "[models.\"a b\"]\ntype = 'chat'\n",
            &[],
            &[],
            "file /etc/c.toml:2: models.a b.type = \"chat\": a model's id \
          begins with a letter or digit and holds letters, digits, `.`, `_` and `-` only",
        ),
        (
            "[models.x]\nname = 'a/b'\n",
            &[],
            &[],
            "file /etc/c.toml:2: models.x.type: must be given: what the model is for",
        ),
        (
            "[models.x]\ntype = 'chat'\n",
            &[],
            &[],
            "file /etc/c.toml:2: models.x.name: must be given, or `local_path`: which model it is",
        ),
        (
            "[models.x]\ntype = 'embedding'\nname = 'a/b:int8'\nprecision = 'bf16'\n",
            &[],
            &[],
            "file /etc/c.toml:4: models.x.precision = \"bf16\": the model's name ends in :int8 already: say it in one place",
        ),
        (
            "sharing.max_shared_models = 1\nmodels.embedding.preload = true\nmodels.t5_summarizer.preload = true\n",
            &[],
            &[],
            "file /etc/c.toml:1: sharing.max_shared_models = 1: 2 models are to be preloaded and kept: allow at least as many",
        ),
        ("serve = 1\n", &[], &[], "file /etc/c.toml:1: serve = 1: there is no such key"),
        (
            "[serve]\nmodel = [1]\n",
            &[],
            &[],
            "file /etc/c.toml:2: serve.model = (an array): give a text, in quotes",
        ),
        (
            "",
            &[],
            &[("--set", "enabled", "1"), ("--set", "enabled", "0")],
            "flag --set: enabled = \"0\": was given by flag --set already",
        ),
    ];
    for (file, environment, flags, said) in cases {
        assert_eq!(bad(file, environment, flags), [*said], "{file}");
    }
}

#[test]
fn all_problems_are_told_at_once_those_of_overridden_values_too() {
    let said = bad(
        "nonsense = 1\n[embedding_cache]\nttl_seconds = -1\n",
        &[("MODELBROKER_CACHE_TTL", "5"), ("MODEL_DEVICE", "abacus")],
        &[("--set", "serve.threads", "many")],
    );
    assert_eq!(said.len(), 4, "{said:#?}");
    // A file that cannot be read hides no problem of the others.
    let said = bad("enabled = \n", &[("MODEL_DEVICE", "abacus"), ("MODELBROKER_MODELS_MINE_NAME", "x")], &[]);
    assert_eq!(said.len(), 2, "{said:#?}");
}

#[test]
fn sizes_of_everything_are_bounded() {
    let many: String = (0..200).map(|n| format!("[models.m{n}]\ntype = 'custom'\n")).collect();
    let said = bad(&many, &[], &[]);
    assert_eq!(said, ["file /etc/c.toml:400: models: 202 models are configured; the limit is 64"]);
    let long = "x".repeat(10_000);
    assert!(bad(&format!("{long} = 1\n"), &[], &[])[0].len() < 300);
    assert!(bad(&format!("[serve]\nmodel = '{long}'\n"), &[], &[])[0].len() < 300);
    assert_eq!(bad(&format!("[models.{long}]\ntype = 'chat'\n"), &[], &[]).len(), 1);
    let wrong: String = (0..1000).map(|n| format!("k{n} = 1\n")).collect();
    let problems = resolve(&sources(&wrong, &[], &[])).unwrap_err();
    assert_eq!((problems.count(), problems.list().len()), (1000, settings::limits::MAX_PROBLEMS));
}

/// A valid value of each of some keys, as text that both the file and the environment understand.
fn some_key() -> impl Strategy<Value = (&'static str, &'static str)> {
    prop_oneof![
        Just(("serve.threads", "MODELBROKER_SERVE_THREADS")),
        Just(("sharing.rollout_percent", "CORE_MODEL_MANAGER_SHARING_ROLLOUT_PERCENT")),
        Just(("embedding_cache.ttl_seconds", "MODELBROKER_CACHE_TTL")),
        Just(("models.embedding.num_beams", "CORE_MODEL_MANAGER_MODELS_EMBEDDING_NUM_BEAMS")),
    ]
}

proptest! {
    #[test]
    fn the_strongest_layer_that_speaks_is_the_one_that_counts(
        (key, variable) in some_key(),
        file in proptest::option::of(1u64..16),
        environment in proptest::option::of(1u64..16),
        flag in proptest::option::of(1u64..16),
    ) {
        let text = file.map(|n| format!("{key} = {n}\n")).unwrap_or_default();
        let value = environment.map(|n| n.to_string()).unwrap_or_default();
        let flag_text = flag.map(|n| n.to_string());
        let flags: Vec<(&str, &str, &str)> = flag_text.iter().map(|n| ("--set", key, n.as_str())).collect();
        let all = good(&text, &[(variable, &value)], &flags);
        let setting = all.get(key).unwrap();
        match flag.or(environment).or(file) {
            Some(number) => prop_assert_eq!(&setting.value, &Value::Whole(number)),
            None => prop_assert_eq!(&setting.origin.to_string(), "default"),
        }
        let origin = match (flag, environment, file) {
            (Some(_), _, _) => "flag --set".to_owned(),
            (_, Some(_), _) => format!("environment {variable}"),
            (_, _, Some(_)) => "file /etc/c.toml:1".to_owned(),
            _ => "default".to_owned(),
        };
        prop_assert_eq!(setting.origin.to_string(), origin);
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC{0,300}", name in "[A-Z_]{0,40}", value in "\\PC{0,40}") {
        let _ = resolve(&sources(
            &text,
            &[(&format!("MODELBROKER_{name}"), &value), (&format!("CORE_MODEL_MANAGER_MODELS_{name}"), &value)],
            &[("--set", &text, &value)],
        ));
    }

    #[test]
    fn no_toml_makes_it_panic(
        parts in proptest::collection::vec(
            (
                prop_oneof![
                    Just("[sharing]"), Just("[models.a.b]"), Just("[models]"), Just("enabled"), Just("a.b.c"),
                    Just("\"models.x.type\""), Just("unload_after_seconds"), Just("[[x]]"), Just("models.embedding"),
                    Just("serve.memory_budget_bytes"), Just("gpu_memory_fraction"),
                ],
                prop_oneof![
                    Just(""), Just("= 1"), Just("= -9223372036854775808"), Just("= nan"), Just("= 1979-05-27"),
                    Just("= '8 GiB'"), Just("= {a.b = 1}"), Just("= [1, [2]]"), Just("= 0xFFFFFFFFFFFFFFFF"), Just("="),
                    Just("= true"), Just("= 1e400"), Just("= \"\\u0000\""),
                ],
            ),
            0..12,
        )
    ) {
        let text: String = parts.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
        if let Err(problems) = resolve(&sources(&text, &[], &[])) {
            prop_assert!(problems.count() > 0 && !problems.to_string().contains('\0'));
        }
    }
}

//! Configuration files: whatever stands in one leads to settings or to problems, never to a panic; and what holds is within the
//! bounds, has an origin for each key, and says the same when it is read again.

use settings::{ConfigFile, Origin, Sources, Value, resolve};

/// The bytes are the file.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let file = ConfigFile { path: "/c.toml".into(), text: text.to_owned() };
    let sources = Sources { file: Some(file), home: Some("/home/u".into()), ..Sources::default() };
    match resolve(&sources) {
        Ok(all) => {
            let lines = text.lines().count().max(1);
            for (key, setting) in all.entries() {
                match &setting.origin {
                    Origin::Default => {}
                    Origin::File { line, .. } => assert!((1..=lines).contains(line), "{key}: line {line}"),
                    other => panic!("{key} has the origin {other}"),
                }
                if let Value::Text(text) = &setting.value {
                    assert!(!text.is_empty() && !text.contains(char::is_control), "{key}");
                }
            }
            let typed = all.settings();
            assert!(typed.models.len() <= settings::limits::MAX_MODELS && !typed.models.is_empty());
            assert!(typed.sharing.rollout_percent <= 100 && !typed.serve.model.is_empty());
            assert!(typed.gpu_memory_fraction > 0.0 && typed.gpu_memory_fraction <= 1.0);
            assert_eq!(resolve(&sources).as_ref(), Ok(&all), "it is read in one way");
        }
        Err(problems) => {
            assert!(problems.count() > 0 && problems.list().len() <= settings::limits::MAX_PROBLEMS);
            let said = problems.to_string();
            assert!(!said.replace('\n', "").contains(char::is_control), "{said:?}");
        }
    }
}

/// Inputs to start from.
#[must_use]
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let named = [
        ("empty", ""),
        ("template", &settings::template()),
        ("tables", "[sharing]\nunload_after_seconds = 60\n[models.embedding]\nname = 'a/b'\n"),
        ("flat", "\"sharing.unload_after_seconds\" = 60\nmodels.embedding.name = 'a/b'\n"),
        ("twice", "\"sharing.enabled\" = true\n[sharing]\nenabled = false\n"),
        ("model", "[models.\"my-model.1\"]\ntype = 'chat'\nname = 'a/b:int8'\npreload = true\n"),
        ("no-type", "[models.x]\nname = 'a/b'\n"),
        ("precisions", "[models.x]\ntype = 'embedding'\nname = 'a:int8'\nprecision = 'bf16'\n"),
        ("sizes", "[serve]\nmemory_budget_bytes = '8.5 GiB'\n"),
        ("absurd", "[serve]\nthreads = 0xFFFFFFFFFFFFFFFF\nmemory_budget_bytes = -1\n"),
        ("numbers", "gpu_memory_fraction = nan\n[sharing]\nrollout_percent = 1e400\n"),
        ("wrong-types", "enabled = 'true'\nsharing = 1\n[embedding_cache]\nttl_seconds = [1, {a = 2}]\n"),
        ("wrong-keys", "[sharing]\nunload_after = 1\n[models.x.y]\ntipe = 1979-05-27\n"),
        ("controls", "[serve]\nmodel = \"a\\u0000b\\u001b[31m\"\n"),
        ("paths", "[serve]\ncache_dir = '~/c'\nsocket = 'b.sock'\nlog_file = ''\n"),
        ("not-toml", "enabled = \n[[[[\n"),
        ("deep", "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o.p.q.r = 1\n"),
    ];
    named.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
}

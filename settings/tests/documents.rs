//! Keeps docs/configuration.md and docs/config.schema.json true: both are made from the table of keys.
//! `BLESS=1 cargo test -p settings --test documents` writes them anew; the prose around the table is written by hand.

use std::path::PathBuf;

fn docs(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name)
}

fn compare(name: &str, wanted: &str) {
    let path = docs(name);
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    if there == wanted {
        return;
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, wanted).unwrap();
    } else {
        let line = there.lines().zip(wanted.lines()).position(|(a, b)| a != b).map_or(0, |at| at + 1);
        panic!("docs/{name} is not what the table says, first at line {line}: run with BLESS=1");
    }
}

#[test]
fn the_schema_is_the_tables() {
    compare("config.schema.json", &format!("{:#}\n", settings::schema()));
}

#[test]
fn the_document_is_the_tables() {
    let text = std::fs::read_to_string(docs("configuration.md")).unwrap();
    let (begin, end) = ("<!-- begin keys -->\n", "<!-- end keys -->");
    let (before, rest) = text.split_once(begin).expect("the table begins");
    let (_, after) = rest.split_once(end).expect("the table ends");
    compare("configuration.md", &format!("{before}{begin}\n{}\n{end}{after}", settings::markdown_table()));
}

#[test]
fn the_documents_example_can_be_used() {
    let text = std::fs::read_to_string(docs("configuration.md")).unwrap();
    let (example, _) = text.split_once("```toml\n").unwrap().1.split_once("```").unwrap();
    let file = settings::ConfigFile { path: "/example.toml".into(), text: example.to_owned() };
    let sources = settings::Sources { file: Some(file), ..settings::Sources::default() };
    let all = settings::resolve(&sources).unwrap_or_else(|problems| panic!("{problems}"));
    let said = all.entries().filter(|(_, setting)| setting.origin != settings::Origin::Default).count();
    // The default model follows the configured one.
    assert_eq!(said, 6 + 1);
}

/// The schema's own rules and the parser's are two texts about the same thing: what the template offers fits both.
#[test]
fn the_schema_knows_every_key_and_no_other() {
    let schema = settings::schema();
    let properties = schema["properties"].as_object().unwrap();
    for spec in settings::table() {
        assert!(properties.contains_key(spec.key), "{}", spec.key);
        if let Some((group, key)) = spec.key.split_once('.') {
            assert!(properties[group]["properties"][key].is_object(), "{}", spec.key);
        }
    }
    let model = schema["$defs"]["model"]["properties"].as_object().unwrap();
    assert_eq!(model.len(), settings::model_table().len());
    let flat = properties.len();
    let groups = 4;
    assert_eq!(flat, settings::table().len() + groups, "every key flat, and four tables");
}

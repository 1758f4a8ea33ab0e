//! JSON Schema (draft 2020-12) of the configuration file, for editors and other checkers. Made from the table of keys.

use crate::limits::{MAX_ID_BYTES, MAX_TEXT_BYTES};
use crate::table::{Kind, Spec, model_table, table};
use crate::value::Value;
use serde_json::{Map, Value as Json, json};

/// The schema. Tables and quoted flat keys are both allowed, as in the file; that a key may be given once only, and what
/// [`crate::resolve`] checks over several keys, cannot be said in it.
#[must_use]
pub fn schema() -> Json {
    let mut properties = Map::new();
    let mut groups: Map<String, Json> = Map::new();
    for spec in table() {
        let one = property(spec);
        if let Some((group, key)) = spec.key.split_once('.')
            && let Json::Object(of_group) = groups.entry(group).or_insert_with(|| json!({}))
        {
            of_group.insert(key.to_owned(), one.clone());
        }
        properties.insert(spec.key.to_owned(), one);
    }
    for (group, of_group) in groups {
        properties.insert(
            group,
            json!({ "type": "object", "additionalProperties": false, "properties": of_group }),
        );
    }
    let model: Map<String, Json> =
        model_table().iter().map(|spec| (spec.key.to_owned(), property(spec))).collect();
    let id = format!("[A-Za-z0-9][A-Za-z0-9._-]{{0,{}}}", MAX_ID_BYTES - 1);
    let mut flat = Map::new();
    for spec in model_table() {
        flat.insert(format!("^models\\.{id}\\.{}$", spec.key), property(spec));
    }
    properties.insert(
        "models".to_owned(),
        json!({
            "type": "object",
            "description": "configured models, by their ids",
            "additionalProperties": false,
            "patternProperties": { format!("^{id}$"): { "$ref": "#/$defs/model" } },
        }),
    );
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of modelbroker",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
        "patternProperties": flat,
        "$defs": {
            "model": { "type": "object", "additionalProperties": false, "properties": model },
        },
    })
}

fn property(spec: &Spec) -> Json {
    let mut one = match spec.kind {
        Kind::Switch => json!({ "type": "boolean" }),
        Kind::OnlyFalse(_) => json!({ "const": false }),
        Kind::Whole(least, most, _) => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::Bytes(least, most) => json!({
            "anyOf": [
                { "type": "integer", "minimum": least, "maximum": most },
                { "type": "string", "pattern": "^[0-9]+(\\.[0-9]+)? *([KkMmGgTt][Ii]?)?[Bb]?$" },
            ],
        }),
        Kind::Fraction => json!({ "type": "number", "exclusiveMinimum": 0, "maximum": 1 }),
        Kind::Choice(words) => json!({ "enum": words }),
        Kind::Device => json!({ "type": "string", "pattern": "^(auto|gpu|cpu|cuda(:[0-9]{1,3})?)$" }),
        Kind::Name | Kind::Path => json!({ "type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES }),
    };
    if spec.is_optional() {
        // An empty text takes the value away.
        one = json!({ "anyOf": [one, { "const": "" }] });
    }
    if let Json::Object(fields) = &mut one {
        fields.insert("description".to_owned(), spec.meaning.into());
        if spec.default() != Value::Unset {
            fields.insert("default".to_owned(), spec.default().to_json());
        }
    }
    one
}

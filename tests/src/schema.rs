//! A validator for the part of JSON Schema (draft 2020-12) that this project's schemas use. A keyword that it does not know
//! is an error, so that no schema says more than is checked.

use serde_json::Value;

/// Keywords that say nothing about a value.
const NOTES: [&str; 6] = ["$schema", "$id", "$defs", "title", "description", "examples"];

/// Checks a value; gives what is wrong with it, by its place.
#[must_use]
pub fn problems(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "$", &mut found);
    found
}

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() || number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn is_type(value: &Value, name: &str) -> bool {
    let found = type_of(value);
    found == name || (found == "integer" && name == "number")
}

fn check(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    let Value::Object(rules) = schema else {
        match schema {
            Value::Bool(true) => {}
            Value::Bool(false) => found.push(format!("{at}: nothing is allowed here")),
            other => found.push(format!("{at}: {other} is no schema")),
        }
        return;
    };
    for (keyword, rule) in rules {
        match keyword.as_str() {
            note if NOTES.contains(&note) => {}
            "$ref" => match rule.as_str().and_then(|path| root.pointer(path.strip_prefix('#')?)) {
                Some(target) => check(root, target, value, at, found),
                None => found.push(format!("{at}: {rule} leads nowhere")),
            },
            "type" => {
                let fits = match rule {
                    Value::Array(names) => names.iter().filter_map(Value::as_str).any(|n| is_type(value, n)),
                    one => one.as_str().is_some_and(|name| is_type(value, name)),
                };
                if !fits {
                    found.push(format!("{at}: {} instead of {rule}", type_of(value)));
                }
            }
            "enum" => {
                if !rule.as_array().is_some_and(|values| values.contains(value)) {
                    found.push(format!("{at}: {value} is none of {rule}"));
                }
            }
            "anyOf" => {
                let fits = |one: &Value| {
                    let mut problems = Vec::new();
                    check(root, one, value, at, &mut problems);
                    problems.is_empty()
                };
                if !rule.as_array().is_some_and(|all| all.iter().any(fits)) {
                    found.push(format!("{at}: {value} fits none of the choices"));
                }
            }
            "minimum" => {
                if let (Some(number), Some(least)) = (value.as_f64(), rule.as_f64())
                    && number < least
                {
                    found.push(format!("{at}: {number} is less than {least}"));
                }
            }
            "pattern" => {
                if let (Some(text), Some(pattern)) = (value.as_str(), rule.as_str())
                    && !matches(text, pattern)
                {
                    found.push(format!("{at}: {text:?} is not of the form {pattern}"));
                }
            }
            "required" => {
                for name in rule.as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if value.is_object() && value.get(name).is_none() {
                        found.push(format!("{at}: {name} is missing"));
                    }
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(root, rule, item, &format!("{at}[{index}]"), found);
                }
            }
            "properties" => {
                for (name, property) in rule.as_object().into_iter().flatten() {
                    if let Some(inner) = value.get(name) {
                        check(root, property, inner, &format!("{at}.{name}"), found);
                    }
                }
            }
            "additionalProperties" => {
                let known = rules.get("properties").and_then(Value::as_object);
                for (name, inner) in value.as_object().into_iter().flatten() {
                    if known.is_none_or(|known| !known.contains_key(name)) {
                        check(root, rule, inner, &format!("{at}.{name}"), found);
                    }
                }
            }
            unknown => {
                found.push(format!("{at}: the schema says {unknown}, which this validator does not know"))
            }
        }
    }
}

/// The forms that the schemas name, by hand: so few of them need no expression engine.
fn matches(text: &str, pattern: &str) -> bool {
    let is_hex =
        |digits: usize| text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    match pattern {
        "^[0-9a-f]{16}$" => is_hex(16),
        "^[0-9a-f]{64}$" => is_hex(64),
        "^(auto|cpu|cuda(:[0-9]+)?)$" => {
            matches!(text, "auto" | "cpu" | "cuda")
                || text
                    .strip_prefix("cuda:")
                    .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::problems;
    use serde_json::json;

    #[test]
    fn each_rule_finds_what_breaks_it() {
        let schema = json!({
            "type": "object", "required": ["n"], "additionalProperties": false,
            "properties": {
                "n": {"type": "integer", "minimum": 0},
                "s": {"$ref": "#/$defs/hash"},
                "list": {"type": "array", "items": {"enum": ["a", null]}},
                "maybe": {"anyOf": [{"$ref": "#/$defs/hash"}, {"type": "null"}]},
            },
            "$defs": {"hash": {"type": "string", "pattern": "^[0-9a-f]{16}$"}},
        });
        let hash = "0123456789abcdef";
        assert!(
            problems(&schema, &json!({"n": 1, "s": hash, "list": ["a", null], "maybe": null})).is_empty()
        );
        for (bad, says) in [
            (json!({}), "n is missing"),
            (json!({"n": -1}), "less than"),
            (json!({"n": 1.5}), "number instead of"),
            (json!({"n": 1, "s": "x"}), "form"),
            (json!({"n": 1, "list": ["b"]}), "$.list[0]"),
            (json!({"n": 1, "maybe": 3}), "none of the choices"),
            (json!({"n": 1, "more": 1}), "nothing is allowed"),
            (json!([]), "array instead of"),
        ] {
            let found = problems(&schema, &bad);
            assert!(found.iter().any(|problem| problem.contains(says)), "{bad}: {found:?}");
        }
        let unknown = problems(&json!({"maxLength": 3}), &json!("x"));
        assert!(unknown[0].contains("does not know"), "{unknown:?}");
    }
}

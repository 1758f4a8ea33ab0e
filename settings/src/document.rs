//! The keys for people: the table of docs/configuration.md and the commented file that `modelbroker config init` writes.
//! Made from the table of keys; holds no key of its own.

use crate::environment::variables_shown;
use crate::limits::MAX_DEVICE;
use crate::table::{EMBEDDING_ID, Kind, Spec, default_models, model_table, table};
use crate::value::Value;
use std::fmt::Write as _;

/// What a key takes, in words.
fn takes(kind: Kind) -> String {
    match kind {
        Kind::Switch => "true or false".to_owned(),
        Kind::OnlyFalse(_) => "false".to_owned(),
        Kind::Whole(least, most, of) => format!("{of}, {least} to {most}"),
        Kind::Bytes(least, most) => {
            format!("bytes, {least} to {most}, or a text such as \"8 GiB\" or \"500 MB\"")
        }
        Kind::Fraction => "number over 0, up to 1".to_owned(),
        Kind::Choice(words) => words.join(", "),
        Kind::Device => format!("auto, gpu, cuda, cuda:N (up to {MAX_DEVICE}), cpu"),
        Kind::Name => "name".to_owned(),
        Kind::Path => "path".to_owned(),
    }
}

/// Environment variables of a key, the strongest first. For a model's key `ID` stands for the model's id in capitals.
#[must_use]
pub fn variables_of(spec: &'static Spec, of_model: bool) -> Vec<String> {
    let mut names = variables_shown(spec, of_model);
    if of_model && spec.key == "name" {
        names.push("MODEL_NAME".to_owned());
    }
    names
}

/// The table of all keys, in Markdown.
#[must_use]
pub fn markdown_table() -> String {
    let mut out = String::from("| key | takes | default | takes effect | meaning |\n|---|---|---|---|---|\n");
    let mut row = |key: &str, spec: &'static Spec, of_model: bool| {
        let default = match spec.default() {
            Value::Unset => "unset".to_owned(),
            value => format!("`{value}`"),
        };
        let variables: Vec<String> =
            variables_of(spec, of_model).iter().map(|name| format!("`{name}`")).collect();
        let flag = spec.flag.map(|flag| format!("; `serve {flag}`")).unwrap_or_default();
        let _ = writeln!(
            out,
            "| `{key}` | {} | {default} | {} | {}. {}{flag} |",
            takes(spec.kind),
            spec.live.name(),
            spec.meaning,
            variables.join(", "),
        );
    };
    for spec in table() {
        row(spec.key, spec, false);
    }
    for spec in model_table() {
        row(&format!("models.ID.{}", spec.key), spec, true);
    }
    out
}

/// A configuration file with every key, its meaning and its default; all of them commented out, so that it changes nothing.
#[must_use]
pub fn template() -> String {
    let mut out = String::from(
        "# Configuration of modelbroker. Every key stands here with its default; take away the `#` before a line (and before its\n\
         # [table]) to change one. `modelbroker config` shows what holds and where it comes from, `modelbroker config check`\n\
         # what is wrong. Environment variables and options of the command line go before this file.\n",
    );
    let mut open = "";
    for spec in table() {
        let (group, key) = spec.key.rsplit_once('.').unwrap_or(("", spec.key));
        if group != open {
            let _ = write!(out, "\n[{group}]\n");
            open = group;
        }
        entry(&mut out, key, spec, &spec.default());
    }
    for (id, fields) in default_models() {
        let _ = write!(out, "\n[models.{id}]\n");
        for spec in model_table() {
            let own = fields.iter().find(|(field, _)| *field == spec.key).map(|(_, value)| value.value());
            let default = own.unwrap_or_else(|| spec.default());
            match *id == EMBEDDING_ID {
                // What each means is said once.
                true => entry(&mut out, spec.key, spec, &default),
                false => line(&mut out, spec.key, &default),
            }
        }
    }
    out
}

fn entry(out: &mut String, key: &str, spec: &Spec, default: &Value) {
    let _ = writeln!(out, "# {}. ({})", spec.meaning, takes(spec.kind));
    line(out, key, default);
}

fn line(out: &mut String, key: &str, default: &Value) {
    let _ = match default {
        Value::Unset => writeln!(out, "#{key} = \"\""),
        value => writeln!(out, "#{key} = {value}"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::ConfigFile;
    use crate::resolve::{Sources, resolve};

    #[test]
    fn the_template_changes_nothing_and_its_lines_are_the_defaults() {
        let defaults = resolve(&Sources::default()).unwrap();
        let with = |text: String| {
            let file = Some(ConfigFile { path: "/c.toml".into(), text });
            resolve(&Sources { file, ..Sources::default() }).unwrap_or_else(|e| panic!("{e}"))
        };
        assert_eq!(crate::changes(&defaults, &with(template())), []);
        // A line without a space after its `#` is a setting. An empty text takes a value away; where a number or a choice is
        // meant it would do so too.
        let open: String = template()
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert_eq!(crate::changes(&defaults, &with(open.clone())), []);
        let said = open.lines().filter(|line| line.contains(" = ") && !line.starts_with('#')).count();
        assert_eq!(said, table().len() + 2 * model_table().len());
    }
}

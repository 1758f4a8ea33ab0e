//! Values: what a key has, and how it is read from TOML or from text. Knows no layers.

use crate::limits::{MAX_DEVICE, MAX_TEXT_BYTES};
use crate::nearest::nearest;
use crate::table::{Kind, Spec};
use std::path::{Path, PathBuf};

/// A setting's value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// None: what that means stands with the key.
    Unset,
    /// true or false.
    Switch(bool),
    /// A whole number, of what the key's name says.
    Whole(u64),
    /// A number.
    Fraction(f64),
    /// A name, path or word.
    Text(String),
}

impl Value {
    /// As JSON; without a value it is `null`.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Unset => serde_json::Value::Null,
            Value::Switch(on) => (*on).into(),
            Value::Whole(number) => (*number).into(),
            Value::Fraction(number) => (*number).into(),
            Value::Text(text) => text.as_str().into(),
        }
    }
}

/// As in a TOML file; `unset` where there is no value.
impl std::fmt::Display for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::Unset => f.write_str("unset"),
            Value::Switch(on) => write!(f, "{on}"),
            Value::Whole(number) => write!(f, "{number}"),
            Value::Fraction(number) => write!(f, "{number}"),
            Value::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// A value as it was written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Raw {
    /// TOML's true or false.
    Switch(bool),
    /// TOML's integer.
    Whole(i128),
    /// TOML's float.
    Float(f64),
    /// TOML's string.
    String(String),
    /// Anything else of TOML: its type's name.
    Other(&'static str),
    /// Text from the environment or the command line, which has no types.
    Text(String),
}

impl Raw {
    /// As it may stand in a message.
    pub(crate) fn shown(&self) -> String {
        match self {
            Raw::Switch(on) => on.to_string(),
            Raw::Whole(number) => number.to_string(),
            Raw::Float(number) => number.to_string(),
            Raw::String(text) | Raw::Text(text) => format!("\"{text}\""),
            Raw::Other(kind) => format!("({kind})"),
        }
    }
}

/// Why a value cannot be used: the reason, and the nearest right word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unusable {
    pub(crate) reason: String,
    pub(crate) nearest: Option<String>,
}

impl Unusable {
    fn new(reason: impl Into<String>) -> Unusable {
        Unusable { reason: reason.into(), nearest: None }
    }
}

/// What paths are seen from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    /// The home folder, for `~/`.
    pub(crate) home: Option<&'a Path>,
    /// The configuration file's folder, for relative paths in it.
    pub(crate) folder: Option<&'a Path>,
}

/// A raw value as the key's own.
pub(crate) fn read(spec: &Spec, raw: &Raw, places: Places<'_>) -> Result<Value, Unusable> {
    if spec.is_optional()
        && let Raw::String(text) | Raw::Text(text) = raw
        && text.trim().is_empty()
    {
        return Ok(Value::Unset);
    }
    match spec.kind {
        Kind::Switch => switch(raw).map(Value::Switch),
        Kind::OnlyFalse(why) => match switch(raw)? {
            false => Ok(Value::Switch(false)),
            true => Err(Unusable::new(format!("only false is accepted: {why}"))),
        },
        Kind::Whole(least, most, of) => whole(raw, least, most, of).map(Value::Whole),
        Kind::Bytes(least, most) => bytes(raw, least, most).map(Value::Whole),
        Kind::Fraction => fraction(raw).map(Value::Fraction),
        Kind::Choice(words) => {
            let word = text(raw)?.trim();
            match words.iter().find(|known| known.eq_ignore_ascii_case(word)) {
                Some(known) => Ok(Value::Text((*known).to_owned())),
                None => Err(Unusable {
                    reason: format!("choose one of {}", words.join(", ")),
                    nearest: nearest(word, words.iter().copied()).map(str::to_owned),
                }),
            }
        }
        Kind::Device => device(text(raw)?).map(Value::Text),
        Kind::Name => name(text(raw)?).map(|text| Value::Text(text.to_owned())),
        Kind::Path => path(name(text(raw)?)?, places).map(Value::Text),
    }
}

fn text(raw: &Raw) -> Result<&str, Unusable> {
    match raw {
        Raw::String(text) | Raw::Text(text) => Ok(text),
        _ => Err(Unusable::new("give a text, in quotes")),
    }
}

fn switch(raw: &Raw) -> Result<bool, Unusable> {
    match raw {
        Raw::Switch(on) => Ok(*on),
        Raw::Text(text) => match text.trim().to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Ok(true),
            "0" | "false" | "no" | "off" => Ok(false),
            _ => Err(Unusable::new("give true or false (1 or 0)")),
        },
        Raw::String(_) => Err(Unusable::new("give true or false, without quotes")),
        _ => Err(Unusable::new("give true or false")),
    }
}

fn whole(raw: &Raw, least: u64, most: u64, of: &str) -> Result<u64, Unusable> {
    let number = match raw {
        Raw::Whole(number) => Some(*number),
        Raw::Text(text) => text.trim().parse::<i128>().ok(),
        _ => None,
    };
    let range = || format!("from {least} to {most}");
    let Some(number) = number else {
        let quotes = if matches!(raw, Raw::String(_)) { ", without quotes" } else { "" };
        return Err(Unusable::new(format!("give a whole number of {of} {}{quotes}", range())));
    };
    match u64::try_from(number) {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(Unusable::new(format!("out of range: give a number of {of} {}", range()))),
    }
}

fn fraction(raw: &Raw) -> Result<f64, Unusable> {
    let number = match raw {
        Raw::Float(number) => Some(*number),
        Raw::Whole(number) => Some(*number as f64),
        Raw::Text(text) => text.trim().parse::<f64>().ok(),
        _ => None,
    };
    match number {
        Some(number) if number > 0.0 && number <= 1.0 => Ok(number),
        Some(_) => Err(Unusable::new("out of range: give a number over 0, up to 1")),
        None => Err(Unusable::new("give a number over 0, up to 1")),
    }
}

/// Units of sizes: powers of 1024 with an `i`, of 1000 without.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("kb", 1000),
    ("kib", 1 << 10),
    ("mb", 1_000_000),
    ("mib", 1 << 20),
    ("gb", 1_000_000_000),
    ("gib", 1 << 30),
    ("tb", 1_000_000_000_000),
    ("tib", 1 << 40),
];

fn bytes(raw: &Raw, least: u64, most: u64) -> Result<u64, Unusable> {
    let parsed = match raw {
        Raw::Whole(number) => Some(*number as f64),
        Raw::String(text) | Raw::Text(text) => {
            let text = text.trim();
            let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
            let (number, unit) = text.split_at(at);
            let unit = unit.trim().to_ascii_lowercase();
            let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
            number.parse::<f64>().ok().zip(factor).map(|(number, factor)| number * factor as f64)
        }
        _ => None,
    };
    match parsed {
        // Below 2^53 every whole number is exact in the type; the bound lies below.
        Some(size) if size >= least as f64 && size <= most as f64 => Ok(size as u64),
        Some(_) => Err(Unusable::new(format!("out of range: give from {least} to {most} bytes"))),
        None => Err(Unusable::new("give a number of bytes, or a text such as \"8 GiB\" or \"500 MB\"")),
    }
}

fn device(text: &str) -> Result<String, Unusable> {
    let word = text.trim().to_ascii_lowercase();
    let numbered = word.strip_prefix("cuda:").and_then(|n| n.parse::<u16>().ok());
    let known = ["auto", "gpu", "cuda", "cpu"];
    if known.contains(&word.as_str()) || numbered.is_some_and(|n| n <= MAX_DEVICE) {
        return Ok(word);
    }
    Err(Unusable {
        reason: format!("choose auto, gpu, cuda, cuda:N (up to {MAX_DEVICE}) or cpu"),
        nearest: nearest(&word, known).map(str::to_owned),
    })
}

fn name(text: &str) -> Result<&str, Unusable> {
    let text = text.trim();
    if text.is_empty() {
        return Err(Unusable::new("must not be empty"));
    }
    if text.len() > MAX_TEXT_BYTES {
        return Err(Unusable::new(format!("has {} bytes; the limit is {MAX_TEXT_BYTES}", text.len())));
    }
    if text.chars().any(char::is_control) {
        return Err(Unusable::new("holds a control character"));
    }
    Ok(text)
}

fn path(text: &str, places: Places<'_>) -> Result<String, Unusable> {
    let from_home = text.strip_prefix("~/").or((text == "~").then_some(""));
    let path = match (from_home, places.home, places.folder) {
        (Some(rest), Some(home), _) => home.join(rest),
        (Some(_), None, _) => {
            return Err(Unusable::new("there is no home folder that `~` could mean: give the whole path"));
        }
        (None, _, Some(folder)) => folder.join(text),
        (None, _, None) => PathBuf::from(text),
    };
    path.into_os_string().into_string().map_err(|_| Unusable::new("lies in a folder whose name is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::find;

    fn of(key: &str, raw: Raw) -> Result<Value, String> {
        let spec = find(key).unwrap().spec;
        let places = Places { home: Some(Path::new("/home/u")), folder: Some(Path::new("/etc/mb")) };
        read(spec, &raw, places).map_err(|e| e.reason)
    }

    fn text(key: &str, value: &str) -> Result<Value, String> {
        of(key, Raw::Text(value.into()))
    }

    #[test]
    fn sizes_have_units() {
        let key = "serve.memory_budget_bytes";
        for (given, bytes) in [
            ("8 GiB", 8 << 30),
            ("8GiB", 8 << 30),
            ("1.5 gib", 3 << 29),
            ("500 MB", 500_000_000),
            ("2tb", 2_000_000_000_000),
            ("2097152", 2 << 20),
            ("2097152 B", 2 << 20),
        ] {
            assert_eq!(text(key, given), Ok(Value::Whole(bytes)), "{given}");
        }
        assert_eq!(of(key, Raw::Whole(1 << 20)), Ok(Value::Whole(1 << 20)));
        assert_eq!(text(key, ""), Ok(Value::Unset));
        for bad in
            ["8 XiB", "GiB", "-1", "1e30", "99999999999999999999999", "0", "2048 TiB", "1.2.3 GB", "nan"]
        {
            assert!(text(key, bad).is_err(), "{bad}");
        }
        assert!(of(key, Raw::Whole(-1)).is_err() && of(key, Raw::Whole(i128::MAX)).is_err());
    }

    #[test]
    fn toml_has_types_and_text_has_not() {
        assert_eq!(of("enabled", Raw::Switch(true)), Ok(Value::Switch(true)));
        assert_eq!(text("enabled", "Yes"), Ok(Value::Switch(true)));
        assert!(of("enabled", Raw::String("true".into())).unwrap_err().contains("without quotes"));
        assert!(of("enabled", Raw::Whole(1)).is_err());
        assert_eq!(text("sharing.rollout_percent", " 5 "), Ok(Value::Whole(5)));
        assert!(
            of("sharing.rollout_percent", Raw::String("5".into())).unwrap_err().contains("without quotes")
        );
        assert!(of("sharing.rollout_percent", Raw::Float(5.0)).is_err());
        assert!(text("sharing.rollout_percent", "101").unwrap_err().contains("from 0 to 100"));
        assert_eq!(of("gpu_memory_fraction", Raw::Whole(1)), Ok(Value::Fraction(1.0)));
        for bad in ["0", "1.1", "-0.5", "NaN", "inf", "x"] {
            assert!(text("gpu_memory_fraction", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_false_says_why() {
        assert_eq!(text("trust_remote_code", "0"), Ok(Value::Switch(false)));
        let said = text("trust_remote_code", "true").unwrap_err();
        assert!(said.contains("never run") && said.contains("Convert"), "{said}");
    }

    #[test]
    fn words_devices_and_paths() {
        assert_eq!(text("serve.precision", "INT8"), Ok(Value::Text("int8".into())));
        let spec = find("serve.precision").unwrap().spec;
        let places = Places { home: None, folder: None };
        let bad = read(spec, &Raw::Text("bf61".into()), places).unwrap_err();
        assert_eq!(bad.nearest.as_deref(), Some("bf16"));
        for good in ["auto", "GPU", "cuda", "cuda:3", "cpu"] {
            assert_eq!(text("device_preference", good), Ok(Value::Text(good.to_lowercase())));
        }
        for bad in ["tpu", "cuda:", "cuda:-1", "cuda:300", ""] {
            assert!(text("device_preference", bad).is_err(), "{bad}");
        }
        assert_eq!(text("serve.cache_dir", "~/c"), Ok(Value::Text("/home/u/c".into())));
        assert_eq!(text("serve.cache_dir", "c"), Ok(Value::Text("/etc/mb/c".into())));
        assert_eq!(text("serve.cache_dir", "/c"), Ok(Value::Text("/c".into())));
        assert!(read(find("serve.cache_dir").unwrap().spec, &Raw::Text("~/c".into()), places).is_err());
        assert!(text("serve.model", "a\nb").is_err());
        assert!(text("serve.model", &"x".repeat(MAX_TEXT_BYTES + 1)).is_err());
    }
}

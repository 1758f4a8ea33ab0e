//! Chat templates: messages become the text that the model was trained to continue. Templates are foreign programs in Jinja, run
//! with bounds on their length, steps, recursion and output. No tokens here.
//!
//! What templates may use besides Jinja is what transformers gives them: `raise_exception`, `strftime_now` (in UTC), `tojson`
//! without escapes for HTML, loop controls, methods of Python's strings and dictionaries, and `generation` blocks.

use super::options::{ChatMessage, MAX_CHAT_MESSAGES};
use crate::json::shorten;
use crate::model::{MAX_TEXT_BYTES, ModelError};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, context};
use std::collections::BTreeMap;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// Longest chat template, bytes.
pub(crate) const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Steps that rendering may take, and so many more for each message.
const MAX_TEMPLATE_STEPS: u64 = 20_000;
/// See [`MAX_TEMPLATE_STEPS`].
const MAX_TEMPLATE_STEPS_PER_MESSAGE: u64 = 5_000;
/// Deepest recursion of a template's macros and blocks.
const MAX_TEMPLATE_RECURSION: usize = 32;
/// Deepest nesting of what `tojson` writes.
const MAX_JSON_DEPTH: usize = 32;
/// Tokens that templates know by name.
const TOKEN_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Largest length that a special token has in a template, bytes.
const MAX_TOKEN_BYTES: usize = 1024;

/// Special tokens by the name that templates know them by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct TokenNames(Vec<(&'static str, String)>);

impl TokenNames {
    /// Those of a tokenizer_config.json; what can't be read names none.
    pub(super) fn of(tokenizer_config: Option<&[u8]>) -> TokenNames {
        let parsed =
            tokenizer_config.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(bytes).ok());
        let names = TOKEN_NAMES.into_iter().filter_map(|name| {
            let value = parsed.as_ref()?.get(name)?;
            let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
            (token.len() <= MAX_TOKEN_BYTES).then(|| (name, token.to_owned()))
        });
        TokenNames(names.collect())
    }
}

/// The chat template in a tokenizer_config.json: the one text, or the one called `default`.
///
/// # Errors
/// What is wrong with it, for people.
pub(crate) fn template_of(tokenizer_config: &[u8]) -> Result<Option<String>, String> {
    let parsed: serde_json::Value =
        serde_json::from_slice(tokenizer_config).map_err(|error| shorten(&error.to_string()))?;
    let named = |list: &Vec<serde_json::Value>| {
        let found =
            list.iter().find(|entry| entry.get("name").and_then(|name| name.as_str()) == Some("default"))?;
        found.get("template")?.as_str().map(str::to_owned)
    };
    match parsed.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(template)) => Ok(Some(template.clone())),
        Some(serde_json::Value::Array(list)) => {
            named(list).map(Some).ok_or_else(|| "chat_template has no template called default".into())
        }
        Some(_) => Err("chat_template is no text".into()),
    }
}

/// Whether a template is one that can be run: short enough and without errors of syntax.
///
/// # Errors
/// What is wrong with it, for people.
pub(crate) fn check_template(template: &str) -> Result<(), String> {
    if template.len() > MAX_TEMPLATE_BYTES {
        return Err(format!("has {} bytes, at most {MAX_TEMPLATE_BYTES} are read", template.len()));
    }
    let template = without_generation_blocks(template);
    environment(SystemTime::now())
        .template_from_str(&template)
        .map(|_| ())
        .map_err(|error| shorten(&error.to_string()))
}

/// The text that `template` makes of a chat, asking for an answer; `now` is what it may ask for as the time.
///
/// # Errors
/// [`ModelError::Template`] with what the template said, or the bound that it ran into.
pub(super) fn render(
    template: &str,
    messages: &[ChatMessage],
    tokens: &TokenNames,
    now: SystemTime,
) -> Result<String, ModelError> {
    let fail = |reason: String| ModelError::Template { reason };
    let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
    if messages.is_empty() || messages.len() > MAX_CHAT_MESSAGES || bytes > MAX_TEXT_BYTES {
        return Err(fail(format!(
            "the chat has {} messages of {bytes} bytes, allowed are 1 to {MAX_CHAT_MESSAGES} of {MAX_TEXT_BYTES} bytes in all",
            messages.len()
        )));
    }
    let template = without_generation_blocks(template);
    let mut environment = environment(now);
    environment.set_fuel(Some(MAX_TEMPLATE_STEPS + MAX_TEMPLATE_STEPS_PER_MESSAGE * messages.len() as u64));
    let list: Vec<Value> = messages
        .iter()
        .map(|message| context! { role => message.role.as_str(), content => message.content.as_str() })
        .collect();
    let mut values: BTreeMap<&str, Value> =
        tokens.0.iter().map(|(name, token)| (*name, Value::from(token.as_str()))).collect();
    values.insert("messages", Value::from(list));
    values.insert("add_generation_prompt", Value::from(true));
    values.insert("tools", Value::from(()));
    values.insert("documents", Value::from(()));
    let mut out = Bounded(Vec::new());
    environment
        .template_from_str(&template)
        .and_then(|template| template.render_captured_to(Value::from(values), &mut out))
        .map_err(|error| fail(reason_of(&error)))?;
    String::from_utf8(out.0).map_err(|_| fail("its output is not UTF-8".into()))
}

/// What went wrong, in words that say what to do.
fn reason_of(error: &Error) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".into(),
        ErrorKind::WriteFailure => format!("its output is longer than {MAX_TEXT_BYTES} bytes"),
        _ => shorten(&error.detail().map_or_else(|| error.to_string(), str::to_owned)),
    }
}

/// Output that refuses to become longer than any prompt may be.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT_BYTES {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn environment<'source>(now: SystemTime) -> Environment<'source> {
    let mut environment = Environment::new();
    // Only syntax of other marks can be refused.
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_recursion_limit(MAX_TEMPLATE_RECURSION);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |reason: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, reason))
    });
    environment.add_function("strftime_now", move |format: String| strftime(&format, now));
    environment.add_filter("tojson", |value: Value, options: Kwargs| -> Result<String, Error> {
        let indent: Option<usize> = options.get("indent")?;
        let _: Option<bool> = options.get("ensure_ascii")?;
        options.assert_all_used()?;
        let mut out = String::new();
        to_json(&value, indent.map(|indent| indent.min(16)), 0, &mut out)?;
        Ok(out)
    });
    environment
}

/// Templates mark the assistant's words with `{% generation %}` for training; for writing a prompt the mark means nothing.
fn without_generation_blocks(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (tag, behind) = tag.split_at(end);
        let name =
            tag[2..].trim_matches(|letter: char| letter.is_whitespace() || letter == '-' || letter == '+');
        out.push_str(before);
        match name {
            "generation" => out.push_str(&tag.replace(name, "if true")),
            "endgeneration" => out.push_str(&tag.replace(name, "endif")),
            _ => out.push_str(tag),
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
fn to_json(value: &Value, indent: Option<usize>, depth: usize, out: &mut String) -> Result<(), Error> {
    let bad = |reason: &'static str| Error::new(ErrorKind::InvalidOperation, reason);
    if depth > MAX_JSON_DEPTH || out.len() > MAX_TEXT_BYTES {
        return Err(bad("tojson of something too large"));
    }
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let quoted = |text: &str| serde_json::to_string(text).map_err(|_| bad("tojson of a broken text"));
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())?),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut is_first = true;
            for item in value.try_iter()? {
                out.push_str(if std::mem::take(&mut is_first) { "" } else { comma });
                line(depth + 1, out);
                to_json(&item, indent, depth + 1, out)?;
            }
            if !is_first {
                line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            let mut is_first = true;
            for key in value.try_iter()? {
                out.push_str(if std::mem::take(&mut is_first) { "" } else { comma });
                line(depth + 1, out);
                out.push_str(&quoted(&key.to_string())?);
                out.push_str(": ");
                to_json(&value.get_item(&key)?, indent, depth + 1, out)?;
            }
            if !is_first {
                line(depth, out);
            }
            out.push('}');
        }
        _ => return Err(bad("tojson of something that is no JSON")),
    }
    Ok(())
}

/// A time in UTC by the letters of C's `strftime` that templates use.
fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[(month - 1) as usize], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&format!("{:02}", year % 100)),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('H') => out.push_str(&format!("{:02}", second / 3600)),
            Some('M') => out.push_str(&format!("{:02}", second / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", second % 60)),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('%') => out.push('%'),
            other => {
                let reason =
                    format!("strftime_now does not know %{}", other.map_or(String::new(), String::from));
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1970-01-01, by Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (400 * era + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn templates_of_several_families_render_as_by_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/parity/tiny_generators/templates.json");
        let cases: Vec<serde_json::Value> =
            serde_json::from_slice(&std::fs::read(path).expect("read")).expect("JSON");
        assert_eq!(cases.len(), 8);
        // 26 July 2024.
        let now = UNIX_EPOCH + Duration::from_secs(1_721_998_800);
        let tokens = TokenNames::of(Some(br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#));
        for case in cases {
            let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
            let messages: Vec<ChatMessage> = case["messages"]
                .as_array()
                .expect("messages")
                .iter()
                .map(|message| ChatMessage {
                    role: text(&message["role"]),
                    content: text(&message["content"]),
                })
                .collect();
            let template = text(&case["template"]);
            check_template(&template).expect("a good template");
            let found = render(&template, &messages, &tokens, now).expect("renders");
            assert_eq!(found, text(&case["rendered"]), "{}", case["name"]);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, wanted) in
            [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (19_782, (2024, 2, 29)), (20_778, (2026, 11, 21))]
        {
            assert_eq!(civil(days), wanted);
        }
        let now = UNIX_EPOCH + Duration::from_secs(20_778 * 86_400 + 3_723);
        assert_eq!(
            strftime("%a %A %b %y %Y-%m-%d %H:%M:%S %%", now).expect("known"),
            "Sat Saturday Nov 26 2026-11-21 01:02:03 %"
        );
        assert!(strftime("%Q", now).is_err());
    }

    #[test]
    fn templates_are_found_in_a_tokenizer_config() {
        assert_eq!(template_of(b"{}"), Ok(None));
        assert_eq!(template_of(br#"{"chat_template": "x"}"#), Ok(Some("x".into())));
        let named = br#"{"chat_template": [{"name": "tool", "template": "y"}, {"name": "default", "template": "x"}]}"#;
        assert_eq!(template_of(named), Ok(Some("x".into())));
        assert!(template_of(br#"{"chat_template": 3}"#).is_err());
        assert!(check_template(&"x".repeat(MAX_TEMPLATE_BYTES + 1)).is_err());
    }
}

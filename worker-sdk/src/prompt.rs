//! Prompts: what is put before texts, by the model's own settings or by the caller's choice. Pure.

use crate::error::SdkError;
use shm_layout::limits::MAX_PROMPT_BYTES;
use shm_layout::wire::TaskFacts;

/// What is put before each text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Prompt {
    /// The model's default prompt, where it has one; most have none.
    #[default]
    ModelDefault,
    /// Nothing.
    None,
    /// The model's prompt of this name, for example `query` or `passage`.
    Named(String),
    /// This text.
    Text(String),
}

/// The text of a prompt; `None` where nothing is put before.
///
/// # Errors
/// [`SdkError::Argument`] for a name that the model does not have (it names those that there are), and for a text over
/// [`MAX_PROMPT_BYTES`].
pub(crate) fn prompt_text<'a>(prompt: &'a Prompt, facts: &'a TaskFacts) -> Result<Option<&'a str>, SdkError> {
    let named =
        |name: &str| facts.prompts.iter().find(|known| known.name == name).map(|known| known.text.as_str());
    let text = match prompt {
        Prompt::None => None,
        Prompt::ModelDefault => facts.default_prompt.as_deref().and_then(named),
        Prompt::Named(name) => Some(named(name).ok_or_else(|| {
            let known: Vec<&str> = facts.prompts.iter().map(|known| known.name.as_str()).collect();
            let known = if known.is_empty() { "it has none".to_owned() } else { known.join(", ") };
            let shown: String = name.chars().take(64).collect();
            SdkError::Argument(format!("the model has no prompt named {shown:?}; those that it has: {known}"))
        })?),
        Prompt::Text(text) if text.len() > MAX_PROMPT_BYTES => {
            return Err(SdkError::Argument(format!(
                "a prompt of {} bytes; the limit is {MAX_PROMPT_BYTES}: put it into the texts",
                text.len()
            )));
        }
        Prompt::Text(text) => Some(text.as_str()),
    };
    Ok(text.filter(|text| !text.is_empty()))
}

/// The texts with the prompt before each; `None` where they stay as they are.
///
/// # Errors
/// As [`prompt_text`].
pub(crate) fn prompted<T: AsRef<str>>(
    texts: &[T],
    prompt: &Prompt,
    facts: &TaskFacts,
) -> Result<Option<Vec<String>>, SdkError> {
    let with = |before: &str| texts.iter().map(|text| format!("{before}{}", text.as_ref())).collect();
    Ok(prompt_text(prompt, facts)?.map(with))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shm_layout::image::Task;
    use shm_layout::wire::NamedPrompt;

    #[test]
    fn prompts_are_found_by_name_and_by_default() {
        let of = |name: &str, text: &str| NamedPrompt { name: name.into(), text: text.into() };
        let facts = TaskFacts {
            prompts: vec![of("query", "query: "), of("document", "")],
            default_prompt: Some("query".into()),
            ..TaskFacts::of(Task::Embed)
        };
        let text = |prompt: Prompt| prompt_text(&prompt, &facts).map(|text| text.map(str::to_owned));
        assert_eq!(text(Prompt::ModelDefault).unwrap().as_deref(), Some("query: "));
        assert_eq!(text(Prompt::None).unwrap(), None);
        assert_eq!(text(Prompt::Named("document".into())).unwrap(), None);
        assert_eq!(text(Prompt::Text("x".into())).unwrap().as_deref(), Some("x"));
        let error = text(Prompt::Named("passage".into())).unwrap_err().to_string();
        assert!(error.contains("query, document"), "{error}");
        assert!(text(Prompt::Text("x".repeat(MAX_PROMPT_BYTES + 1))).is_err());
        let all = prompted(&["a", "b"], &Prompt::ModelDefault, &facts).unwrap().unwrap();
        assert_eq!(all, ["query: a", "query: b"]);
        assert_eq!(prompted(&["a"], &Prompt::ModelDefault, &TaskFacts::of(Task::Embed)).unwrap(), None);
    }
}

//! A tokenizer.json of a Unigram model to the parts of its tables, or the answer that it is not covered. No table is laid
//! out here.

use super::normalize::{MAX_REPLACEMENT_BYTES, Step};
use super::tables::Settings;
use crate::wordpiece::file::{Added, PostProcessor, numbered, version};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::borrow::Cow;
use std::collections::HashMap;

/// The only version that the crate reads.
const VERSION: &str = "1.0";
/// Most steps of a normalizer; XLM-RoBERTa has two, T5 three.
const MAX_STEPS: usize = 16;

/// What a covered tokenizer.json says.
pub(super) struct Parts<'a> {
    /// Pieces and their scores; the place is the id.
    pub(super) pieces: Vec<(Cow<'a, str>, f64)>,
    /// The character map's trie and replacements; empty where it has none.
    pub(super) map: (Vec<u8>, Vec<u8>),
    /// All else.
    pub(super) settings: Settings,
}

/// Reads a tokenizer.json; see [`super::compile`].
pub(super) fn read(json: &[u8]) -> Option<Parts<'_>> {
    let file: File<'_> = serde_json::from_slice(json).ok()?;
    let model = file.model;
    if file.version != VERSION || model.kind != "Unigram" || model.byte_fallback.unwrap_or(false) {
        return None;
    }
    let pieces: Vec<(Cow<'_, str>, f64)> =
        model.vocab.into_iter().map(|piece| (piece.0.0, piece.1)).collect();
    let unknown_id = model.unk_id.filter(|id| (*id as usize) < pieces.len())?;
    if pieces.iter().any(|(_, score)| !score.is_finite()) {
        return None;
    }
    let mut ids = HashMap::with_capacity(pieces.len());
    for (id, (piece, _)) in pieces.iter().enumerate() {
        ids.insert(piece.as_ref(), u32::try_from(id).ok()?);
    }
    let added_tokens = numbered(file.added_tokens, |token| ids.get(token).copied(), pieces.len())?;
    let (before, text_type_id, after) = match file.post_processor {
        None => Default::default(),
        Some(processor) => processor.fringes()?,
    };
    let mut map = None;
    let mut steps = Vec::new();
    if let Some(normalizer) = file.normalizer {
        normalizer.steps(&mut steps, &mut map)?;
    }
    let (words, metaspace) = file.pre_tokenizer.flatten()?;
    let settings = Settings {
        steps,
        words,
        replacement: metaspace.replacement,
        prepend: metaspace.prepend()?,
        split: metaspace.split.unwrap_or(true),
        unknown_id,
        added_tokens,
        before,
        after,
        text_type_id,
    };
    Some(Parts { pieces, map: map.unwrap_or_default(), settings })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File<'a> {
    #[serde(default = "version")]
    version: String,
    #[serde(rename = "truncation", default)]
    _truncation: IgnoredAny,
    #[serde(rename = "padding", default)]
    _padding: IgnoredAny,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Normalizer>,
    pre_tokenizer: PreTokenizer,
    post_processor: Option<PostProcessor>,
    #[serde(rename = "decoder", default)]
    _decoder: IgnoredAny,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: String,
    unk_id: Option<u32>,
    #[serde(borrow)]
    vocab: Vec<Piece<'a>>,
    byte_fallback: Option<bool>,
}

#[derive(Deserialize)]
struct Piece<'a>(#[serde(borrow)] Text<'a>, f64);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
enum Normalizer {
    Precompiled { precompiled_charsmap: String },
    Strip { strip_left: bool, strip_right: bool },
    Replace { pattern: Pattern, content: String },
    Sequence { normalizers: Vec<Normalizer> },
}

#[derive(Deserialize)]
enum Pattern {
    Regex(String),
}

impl Normalizer {
    /// Appends the steps that this does, if all of them are known and at most one has a character map.
    fn steps(self, steps: &mut Vec<Step>, map: &mut Option<(Vec<u8>, Vec<u8>)>) -> Option<()> {
        if steps.len() >= MAX_STEPS {
            return None;
        }
        match self {
            Normalizer::Precompiled { precompiled_charsmap } => {
                if map.is_some() {
                    return None;
                }
                *map = Some(charsmap(&STANDARD.decode(precompiled_charsmap).ok()?)?);
                steps.push(Step::Map);
            }
            Normalizer::Strip { strip_left: left, strip_right: right } => {
                steps.push(Step::Strip { left, right });
            }
            Normalizer::Replace { pattern: Pattern::Regex(pattern), content } => {
                // Longer content would lengthen texts; none has it.
                if pattern != " {2,}" || content.len() > 4 {
                    return None;
                }
                steps.push(Step::Spaces(content));
            }
            Normalizer::Sequence { normalizers } => {
                for inner in normalizers {
                    inner.steps(steps, map)?;
                }
            }
        }
        Some(())
    }
}

/// A character map's two halves: the length of the trie, the trie, and texts that each end with a zero byte.
fn charsmap(bytes: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let (len_bytes, rest) = bytes.split_first_chunk::<4>()?;
    // Whole units only; the crate takes what is behind them as text.
    let len_bytes = u32::from_le_bytes(*len_bytes) as usize / 4 * 4;
    let (trie, replacements) = rest.split_at_checked(len_bytes)?;
    std::str::from_utf8(replacements).ok()?;
    let longest = replacements.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0);
    (longest <= MAX_REPLACEMENT_BYTES).then(|| (trie.to_vec(), replacements.to_vec()))
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PreTokenizer {
    WhitespaceSplit {},
    Metaspace(Metaspace),
    Sequence { pretokenizers: Vec<PreTokenizer> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Metaspace {
    replacement: char,
    add_prefix_space: Option<bool>,
    prepend_scheme: Option<String>,
    split: Option<bool>,
    #[serde(rename = "str_rep", default)]
    _str_rep: IgnoredAny,
}

impl Metaspace {
    /// Whether the replacement is put before each piece of text; `None` where that depends on the piece's place.
    fn prepend(&self) -> Option<bool> {
        match (self.add_prefix_space, self.prepend_scheme.as_deref()) {
            (None | Some(true), None | Some("always")) => Some(true),
            (Some(false), None | Some("never")) | (_, Some("never")) => Some(false),
            _ => None,
        }
    }
}

impl PreTokenizer {
    /// Whether texts are cut at blanks first, and then the Metaspace; `None` for anything else.
    fn flatten(self) -> Option<(bool, Metaspace)> {
        let mut all = Vec::new();
        self.collect(&mut all);
        let mut all = all.into_iter();
        match (all.next()?, all.next(), all.next()) {
            (PreTokenizer::Metaspace(metaspace), None, None) => Some((false, metaspace)),
            (PreTokenizer::WhitespaceSplit {}, Some(PreTokenizer::Metaspace(metaspace)), None) => {
                Some((true, metaspace))
            }
            _ => None,
        }
    }

    fn collect(self, into: &mut Vec<PreTokenizer>) {
        match self {
            PreTokenizer::Sequence { pretokenizers } => {
                pretokenizers.into_iter().for_each(|inner| inner.collect(into));
            }
            other => into.push(other),
        }
    }
}

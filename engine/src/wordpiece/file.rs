//! A tokenizer.json to the parts of a [`super::WordPiece`], or the answer that it is not covered. No normalisation and no
//! matching here.

use super::added::AddedToken;
use super::chars::Rules;
use super::vocab::Vocab;
use super::{Fringe, PairFringes};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

/// The only version that the crate reads.
const VERSION: &str = "1.0";

/// What a covered tokenizer.json says.
pub(super) struct Parts {
    pub(super) rules: Rules,
    pub(super) vocab: Vocab,
    pub(super) added_tokens: Vec<AddedToken>,
    pub(super) before: Fringe,
    pub(super) after: Fringe,
    pub(super) text_type_id: u32,
    pub(super) pair: Option<PairFringes>,
}

/// Reads a tokenizer.json; see [`super::WordPiece::from_json`].
pub(super) fn read(json: &[u8], lower_case: bool) -> Option<Parts> {
    let file: File<'_> = serde_json::from_slice(json).ok()?;
    let PreTokenizer::Bert {} = file.pre_tokenizer;
    if file.version != VERSION || file.model.kind != "WordPiece" {
        return None;
    }
    let model = file.model;
    let vocab = Vocab::new(
        &model.vocab.0,
        &model.continuing_subword_prefix,
        &model.unk_token,
        model.max_input_chars_per_word,
    )?;
    let added_tokens = numbered(file.added_tokens, |token| vocab.get(token), model.vocab.0.len())?;
    let ((before, text_type_id, after), pair) = match file.post_processor {
        None => (Default::default(), Some(PairFringes { type_ids: [0, 1], ..PairFringes::default() })),
        Some(processor) => {
            let pair = processor.pair_fringes();
            (processor.fringes()?, pair)
        }
    };
    let rules = file.normalizer.rules(lower_case)?;
    Some(Parts { rules, vocab, added_tokens, before, after, text_type_id, pair })
}

/// What a tokenizer.json puts around two texts; `None` if it does not take two, or in a form that is not known.
pub(crate) fn pair_fringes_of(json: &[u8]) -> Option<PairFringes> {
    #[derive(Deserialize)]
    struct Only {
        post_processor: Option<PostProcessor>,
    }
    let file: Only = serde_json::from_slice(json).ok()?;
    file.post_processor?.pair_fringes()
}

/// Gives added tokens their ids as the crate does: the vocabulary's, else the next after its last. The file's are ignored.
pub(crate) fn numbered(
    tokens: Vec<Added>,
    id_of: impl Fn(&str) -> Option<u32>,
    vocab_len: usize,
) -> Option<Vec<AddedToken>> {
    let mut next = u32::try_from(vocab_len).ok()?;
    let (mut contents, mut ids) = (HashSet::new(), HashSet::new());
    let mut numbered = Vec::with_capacity(tokens.len());
    for token in tokens {
        let id = match id_of(&token.content) {
            Some(id) => id,
            None => {
                next = next.checked_add(1)?;
                next - 1
            }
        };
        // The crate lets the last of two tokens replace the first in some of its maps.
        if !contents.insert(token.content.clone()) || !ids.insert(id) {
            return None;
        }
        numbered.push(AddedToken {
            content: token.content,
            id,
            single_word: token.single_word,
            left_strip: token.lstrip,
            right_strip: token.rstrip,
            normalized: token.normalized,
        });
    }
    Some(numbered)
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
    normalizer: Normalizer,
    pre_tokenizer: PreTokenizer,
    post_processor: Option<PostProcessor>,
    #[serde(rename = "decoder", default)]
    _decoder: IgnoredAny,
    #[serde(borrow)]
    model: Model<'a>,
}

/// The version of a file that names none.
pub(crate) fn version() -> String {
    VERSION.to_owned()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Added {
    #[serde(rename = "id")]
    _id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    #[serde(rename = "special")]
    _special: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
enum Normalizer {
    #[serde(rename = "BertNormalizer")]
    Bert {
        clean_text: bool,
        handle_chinese_chars: bool,
        #[serde(default)]
        strip_accents: Option<bool>,
        lowercase: bool,
    },
    Lowercase {},
    Sequence {
        normalizers: Vec<Normalizer>,
    },
}

impl Normalizer {
    /// What the normalizers do, if they are at most a Lowercase and then one BertNormalizer.
    fn rules(self, lower_case: bool) -> Option<Rules> {
        let mut flat = Vec::new();
        self.flatten(&mut flat);
        let mut flat = flat.into_iter();
        let mut first = flat.next()?;
        let mut lower_first = false;
        if let Normalizer::Lowercase {} = first {
            lower_first = true;
            first = flat.next()?;
        }
        match (first, flat.next()) {
            (Normalizer::Bert { clean_text, handle_chinese_chars, strip_accents, lowercase }, None) => {
                Some(Rules {
                    lower_first: lower_first || (lower_case && !lowercase),
                    clean: clean_text,
                    space_chinese: handle_chinese_chars,
                    strip_accents: strip_accents.unwrap_or(lowercase),
                    lower: lowercase,
                })
            }
            _ => None,
        }
    }

    fn flatten(self, into: &mut Vec<Normalizer>) {
        match self {
            Normalizer::Sequence { normalizers } => {
                normalizers.into_iter().for_each(|inner| inner.flatten(into));
            }
            other => into.push(other),
        }
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
enum PreTokenizer {
    #[serde(rename = "BertPreTokenizer")]
    Bert {},
}

#[derive(Deserialize)]
#[serde(tag = "type", deny_unknown_fields)]
pub(crate) enum PostProcessor {
    #[serde(rename = "BertProcessing")]
    Bert { sep: (String, u32), cls: (String, u32) },
    #[serde(rename = "TemplateProcessing")]
    Template { single: Vec<Piece>, pair: Vec<Piece>, special_tokens: HashMap<String, Special> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) enum Piece {
    Sequence { id: String, type_id: u32 },
    SpecialToken { id: String, type_id: u32 },
}

#[derive(Deserialize)]
pub(crate) struct Special {
    ids: Vec<u32>,
}

impl PostProcessor {
    /// The same around two texts; `None` if the template does not say each once, the first before the second.
    fn pair_fringes(&self) -> Option<PairFringes> {
        let (pair, special_tokens) = match self {
            PostProcessor::Bert { sep, cls } => {
                return Some(PairFringes {
                    before: (vec![cls.1], vec![0]),
                    between: (vec![sep.1], vec![0]),
                    after: (vec![sep.1], vec![1]),
                    type_ids: [0, 1],
                });
            }
            PostProcessor::Template { pair, special_tokens, .. } => (pair, special_tokens),
        };
        let mut fringes: [Fringe; 3] = Default::default();
        let mut type_ids = Vec::new();
        for piece in pair {
            match piece {
                Piece::Sequence { id, type_id } if *id == ["A", "B"].get(type_ids.len())? as &str => {
                    type_ids.push(*type_id);
                }
                Piece::Sequence { .. } => return None,
                Piece::SpecialToken { id, type_id } => {
                    let ids = &special_tokens.get(id)?.ids;
                    let side = fringes.get_mut(type_ids.len())?;
                    side.0.extend(ids);
                    side.1.extend(ids.iter().map(|_| type_id));
                }
            }
        }
        let [before, between, after] = fringes;
        Some(PairFringes { before, between, after, type_ids: type_ids.try_into().ok()? })
    }

    /// Special tokens before the text, the text's type id, and special tokens behind it; `None` if that is not all.
    pub(crate) fn fringes(self) -> Option<(Fringe, u32, Fringe)> {
        match self {
            PostProcessor::Bert { sep, cls } => Some(((vec![cls.1], vec![0]), 0, (vec![sep.1], vec![0]))),
            PostProcessor::Template { single, special_tokens, .. } => {
                let (mut before, mut after) = (Fringe::default(), Fringe::default());
                let mut text_type_id = None;
                for piece in single {
                    match piece {
                        Piece::Sequence { id, type_id } if id == "A" && text_type_id.is_none() => {
                            text_type_id = Some(type_id);
                        }
                        Piece::Sequence { .. } => return None,
                        Piece::SpecialToken { id, type_id } => {
                            let ids = &special_tokens.get(&id)?.ids;
                            let side = if text_type_id.is_none() { &mut before } else { &mut after };
                            side.0.extend(ids);
                            side.1.extend(ids.iter().map(|_| type_id));
                        }
                    }
                }
                Some((before, text_type_id?, after))
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model<'a> {
    #[serde(rename = "type")]
    kind: String,
    unk_token: String,
    continuing_subword_prefix: String,
    max_input_chars_per_word: usize,
    #[serde(borrow)]
    vocab: Pairs<'a>,
}

/// Tokens and ids in the file's order, not copied where they have no escapes.
struct Pairs<'a>(Vec<(Cow<'a, str>, u32)>);

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Pairs<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor;
        impl<'de> Visitor<'de> for PairsVisitor {
            type Value = Pairs<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tokens and ids")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Pairs<'de>, A::Error> {
                let mut pairs = Vec::new();
                while let Some((key, id)) = access.next_entry::<Key<'de>, u32>()? {
                    pairs.push((key.0, id));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor)
    }
}

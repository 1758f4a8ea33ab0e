//! Unigram tokenizers (SentencePiece: XLM-RoBERTa, T5) over tables that lie in the image: nothing is parsed or built when a
//! model is loaded, and all processes share one copy. The same token ids as the tokenizers crate for every text; what the
//! tables do not cover is refused when they are made, so that the caller takes the crate. No `unsafe`, no file access,
//! nothing kept between texts.
//!
//! A text goes through four steps, as in the crate: added tokens such as `<mask>` are cut out; each piece between them is
//! normalised (`normalize`); spaces become `▁`, and the piece is cut before each of them; each part is cut into the pieces of
//! the vocabulary whose scores have the largest sum (Viterbi).

mod aligned;
mod file;
mod normalize;
mod tables;
mod trie;

use crate::wordpiece::Fringe;
use crate::wordpiece::added::AddedTokens;
use aligned::Aligned;
use normalize::normalize;
use shm_layout::image::ImageBytes;
use std::ops::Range;
use std::sync::Arc;
use tables::{Places, Settings, Tables};

/// Builds a trie in the format of SentencePiece's character maps of keys and values below 2^31, little-endian units; `None`
/// when a key is empty, there twice or has a zero byte, or they need more than two million units. For tests and
/// benches that make character maps.
pub use trie::build as build_trie;

/// Makes the tables of a tokenizer.json, to be stored and given to [`Unigram::open`] later.
///
/// `None` when the file has anything that the tables do not cover: another model than Unigram, byte fallback, a normalizer of
/// other steps than a character map, stripping, and joining of spaces; a pre-tokenizer of other parts than WhitespaceSplit
/// and Metaspace, or one that treats the first piece of a text apart; a post-processor that does more than put special
/// tokens around a text; a piece twice; fields unknown here; more pieces than fit (about a million bytes of distinct
/// beginnings); or when it is malformed. Padding, truncation and the decoder are ignored.
#[must_use]
pub fn compile(json: &[u8]) -> Option<Vec<u8>> {
    let tables = tables::lay_out(&file::read(json)?)?;
    // Tables that cannot be taken up are none.
    let len_bytes = tables.len();
    let made = Arc::new(Made(tables));
    Unigram::open(Arc::clone(&made) as Arc<dyn ImageBytes>, 0..len_bytes)?;
    Arc::into_inner(made).map(|made| made.0)
}

/// Tables that no image holds yet.
#[derive(Debug)]
struct Made(Vec<u8>);

impl ImageBytes for Made {
    fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A tokenizer over tables. Shared by any number of threads.
pub struct Unigram {
    image: Arc<dyn ImageBytes>,
    /// Where the tables lie in the image.
    range: Range<usize>,
    places: Places,
    settings: Settings,
    /// Matched in the text as it is.
    raw_tokens: AddedTokens,
    /// Matched in the normalised text.
    normalized_tokens: AddedTokens,
}

impl std::fmt::Debug for Unigram {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Unigram").field("range", &self.range).finish_non_exhaustive()
    }
}

/// The best way to a place in a text, by the piece that ends there.
#[derive(Debug, Clone, Copy)]
struct Best {
    score: f64,
    start: u32,
    id: u32,
}

/// Marks a place that no way leads to.
const UNREACHED: u32 = u32::MAX;

/// Memory that is used again for each part of a text.
#[derive(Default)]
struct Scratch {
    /// A piece of text with its spaces replaced.
    spaced: String,
    best: Vec<Best>,
    /// Pieces of the best way, last first.
    path: Vec<(Range<usize>, u32)>,
}

impl Unigram {
    /// Takes up the tables that lie in `range` of `image`; microseconds, but for looking through the scores once. `None` when
    /// they are not whole. Whether they are those that the compiler wrote is for the image's hash to say.
    #[must_use]
    pub fn open(image: Arc<dyn ImageBytes>, range: Range<usize>) -> Option<Unigram> {
        let (places, settings) = tables::find(image.as_bytes().get(range.clone())?)?;
        let (raw, mut normalized): (Vec<_>, Vec<_>) =
            settings.added_tokens.iter().cloned().partition(|token| !token.normalized);
        let tables = places.tables(image.as_bytes().get(range.clone())?);
        for token in &mut normalized {
            token.content = normalize(&token.content, &settings.steps, tables.map);
        }
        let (raw_tokens, normalized_tokens) = (AddedTokens::new(raw)?, AddedTokens::new(normalized)?);
        Some(Unigram { image, range, places, settings, raw_tokens, normalized_tokens })
    }

    /// Special tokens before a text.
    #[must_use]
    pub fn before(&self) -> &Fringe {
        &self.settings.before
    }

    /// Special tokens after a text.
    #[must_use]
    pub fn after(&self) -> &Fringe {
        &self.settings.after
    }

    /// Token type id of the text's own tokens.
    #[must_use]
    pub fn text_type_id(&self) -> u32 {
        self.settings.text_type_id
    }

    /// Appends the token ids of `text`, without special tokens around it and without cutting.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<u32>) {
        let bytes = self.image.as_bytes().get(self.range.clone()).unwrap_or_default();
        let tables = self.places.tables(bytes);
        let mut scratch = Scratch::default();
        self.raw_tokens.split(text, |range, id| match id {
            Some(id) => ids.push(id),
            None => self.piece(tables, text.get(range).unwrap_or_default(), &mut scratch, ids),
        });
    }

    /// Byte ranges in `text` of all its tokens, in order, as the crate gives them: what several tokens were made of is in each
    /// one's range. Slower than [`Unigram::encode_into`].
    #[must_use]
    pub fn spans(&self, text: &str) -> Vec<Range<usize>> {
        let bytes = self.image.as_bytes().get(self.range.clone()).unwrap_or_default();
        let tables = self.places.tables(bytes);
        let (mut scratch, mut spans) = (Scratch::default(), Vec::new());
        self.raw_tokens.split(text, |range, id| {
            if id.is_some() {
                return spans.push(range);
            }
            let mut piece = Aligned::new(text.get(range.clone()).unwrap_or_default(), range.start);
            piece.normalize(&self.settings.steps, tables.map);
            self.normalized_tokens.split(&piece.text, |range, id| {
                if id.is_some() {
                    return spans.push(piece.place(range));
                }
                let part = piece.part(range);
                if self.settings.words {
                    for word in part.text.split_whitespace() {
                        let start = word.as_ptr() as usize - part.text.as_ptr() as usize;
                        self.spaced_spans(
                            tables,
                            part.part(start..start + word.len()),
                            &mut scratch,
                            &mut spans,
                        );
                    }
                } else {
                    self.spaced_spans(tables, part, &mut scratch, &mut spans);
                }
            });
        });
        spans
    }

    fn spaced_spans(
        &self,
        tables: Tables<'_>,
        mut text: Aligned,
        scratch: &mut Scratch,
        spans: &mut Vec<Range<usize>>,
    ) {
        if text.text.is_empty() {
            return;
        }
        text.mark_spaces(self.settings.replacement, self.settings.prepend);
        self.each_marked(&text.text, |start, part| {
            self.best_path(tables, part, scratch);
            let found = scratch.path.iter().rev();
            spans.extend(found.map(|(range, _)| text.place(start + range.start..start + range.end)));
        });
    }

    /// Tokenizes a piece of a text that holds no added token that is matched unnormalised.
    fn piece(&self, tables: Tables<'_>, piece: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let text = normalize(piece, &self.settings.steps, tables.map);
        self.normalized_tokens.split(&text, |range, id| match id {
            Some(id) => ids.push(id),
            None => {
                let part = text.get(range).unwrap_or_default();
                if self.settings.words {
                    part.split_whitespace().for_each(|word| self.spaced(tables, word, scratch, ids));
                } else {
                    self.spaced(tables, part, scratch, ids);
                }
            }
        });
    }

    /// Replaces spaces, and cuts before each of what they become.
    fn spaced(&self, tables: Tables<'_>, text: &str, scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let mark = self.settings.replacement;
        let mut spaced = std::mem::take(&mut scratch.spaced);
        spaced.clear();
        if self.settings.prepend && !text.starts_with([' ', mark]) {
            spaced.push(mark);
        }
        spaced.extend(text.chars().map(|character| if character == ' ' { mark } else { character }));
        let unknown_id = self.settings.unknown_id;
        self.each_marked(&spaced, |_, part| {
            self.best_path(tables, part, scratch);
            let bytes = part.as_bytes();
            ids.extend(scratch.path.iter().rev().map(|(range, id)| match *id == unknown_id {
                // What is unknown may be a piece when it is joined.
                true => tables.trie.get(&bytes[range.clone()]).unwrap_or(unknown_id),
                false => *id,
            }));
        });
        scratch.spaced = spaced;
    }

    /// Calls `part` with each part of a text whose spaces are replaced, and where it begins.
    fn each_marked(&self, text: &str, mut part: impl FnMut(usize, &str)) {
        let mut start = 0;
        while let Some(rest) = text.get(start..).filter(|rest| !rest.is_empty()) {
            let behind_first = rest.chars().next().map_or(0, char::len_utf8);
            let next = rest.get(behind_first..).and_then(|behind| behind.find(self.settings.replacement));
            let len = next.filter(|_| self.settings.split).map_or(rest.len(), |at| at + behind_first);
            part(start, rest.get(..len).unwrap_or_default());
            start += len;
        }
    }

    /// Cuts a part into the pieces with the largest sum of scores, last first in `scratch.path`; of equal ones the crate's
    /// choice.
    fn best_path(&self, tables: Tables<'_>, part: &str, scratch: &mut Scratch) {
        let bytes = part.as_bytes();
        let unknown_id = self.settings.unknown_id;
        let best = &mut scratch.best;
        best.clear();
        best.resize(bytes.len() + 1, Best { score: 0.0, start: UNREACHED, id: 0 });
        for (start, character) in part.char_indices() {
            let (score_here, char_bytes) = (best[start].score, character.len_utf8());
            let start_place = start as u32;
            let mut single = false;
            tables.trie.prefixes(&bytes[start..], |len_bytes, id| {
                let score = tables.score(id) + score_here;
                let target = &mut best[start + len_bytes];
                if target.start == UNREACHED || score > target.score {
                    *target = Best { score, start: start_place, id };
                }
                single |= len_bytes == char_bytes;
                true
            });
            if !single {
                let score = tables.unknown_score + score_here;
                let target = &mut best[start + char_bytes];
                if target.start == UNREACHED || score > target.score {
                    *target = Best { score, start: start_place, id: unknown_id };
                }
            }
        }
        scratch.path.clear();
        let mut end = bytes.len();
        while end > 0 {
            let Best { start, id, .. } = best[end];
            // Every character begins with a way to it; only tables that are no tables lead elsewhere.
            let start = if start == UNREACHED || start as usize >= end { end - 1 } else { start as usize };
            match scratch.path.last_mut() {
                // What is unknown one behind the other is one token.
                Some((range, last)) if id == unknown_id && *last == unknown_id => range.start = start,
                _ => scratch.path.push((start..end, id)),
            }
            end = start;
        }
    }
}

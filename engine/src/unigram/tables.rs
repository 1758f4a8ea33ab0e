//! The tables of a Unigram tokenizer as they lie in an image: laid out by the compiler, found again by every process that
//! maps it. Nothing is copied but the settings, a few hundred bytes; what a text becomes is decided in `super`.

use super::file::Parts;
use super::normalize::{CharMap, Step};
use super::trie::{Trie, build};
use crate::wordpiece::Fringe;
use crate::wordpiece::added::AddedToken;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// First bytes of the tables.
const MAGIC: &[u8; 8] = b"MBUNIGR1";
/// Bytes of the head: magic, then five lengths as u64.
const HEAD_BYTES: usize = 8 + LENGTHS * 8;
/// Settings, trie of pieces, scores, trie of the character map, its replacements.
const LENGTHS: usize = 5;
/// Largest settings, bytes: 4096 added tokens of 1024 bytes at most, in practice some hundred.
const MAX_SETTINGS_BYTES: usize = 16 << 20;
/// Subtracted from the lowest score for a character that no piece covers; as in SentencePiece.
const UNKNOWN_PENALTY: f64 = 10.0;

/// What is small enough to be read into each process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// Normalisation, in order.
    pub(super) steps: Vec<Step>,
    /// Whether texts are cut at blanks first.
    pub(super) words: bool,
    /// What stands for a space.
    pub(super) replacement: char,
    /// Whether it is put before every piece of text that does not begin with it.
    pub(super) prepend: bool,
    /// Whether texts are cut before each of it.
    pub(super) split: bool,
    /// Id of what no piece covers.
    pub(super) unknown_id: u32,
    pub(super) added_tokens: Vec<AddedToken>,
    pub(super) before: Fringe,
    pub(super) after: Fringe,
    pub(super) text_type_id: u32,
}

/// Lays the tables out; `None` when the pieces do not fit into a trie.
pub(super) fn lay_out(parts: &Parts<'_>) -> Option<Vec<u8>> {
    let mut pieces: Vec<(&[u8], u32)> = Vec::with_capacity(parts.pieces.len());
    let mut scores = Vec::with_capacity(parts.pieces.len() * 8);
    for (id, (piece, score)) in (0_u32..).zip(&parts.pieces) {
        pieces.push((piece.as_bytes(), id));
        scores.extend(score.to_le_bytes());
    }
    let trie = build(pieces)?;
    let settings = serde_json::to_vec(&parts.settings).ok()?;
    if settings.len() > MAX_SETTINGS_BYTES {
        return None;
    }
    let sections: [&[u8]; LENGTHS] = [&settings, &trie, &scores, &parts.map.0, &parts.map.1];
    let mut bytes = MAGIC.to_vec();
    sections.iter().for_each(|section| bytes.extend((section.len() as u64).to_le_bytes()));
    sections.iter().for_each(|section| bytes.extend_from_slice(section));
    Some(bytes)
}

/// Where the tables lie in their bytes.
#[derive(Debug, Clone)]
pub(super) struct Places {
    trie: Range<usize>,
    scores: Range<usize>,
    map_trie: Range<usize>,
    replacements: Range<usize>,
    /// Score of a character that no piece covers.
    unknown_score: f64,
}

/// Finds tables in bytes that anybody may have written; `None` when they are not whole.
pub(super) fn find(bytes: &[u8]) -> Option<(Places, Settings)> {
    let head = bytes.get(..HEAD_BYTES)?.strip_prefix(MAGIC)?;
    let mut end = HEAD_BYTES;
    let mut ranges: [Range<usize>; LENGTHS] = Default::default();
    for (range, len_bytes) in ranges.iter_mut().zip(head.as_chunks::<8>().0) {
        let start = end;
        end = start.checked_add(usize::try_from(u64::from_le_bytes(*len_bytes)).ok()?)?;
        *range = start..end;
    }
    if end != bytes.len() {
        return None;
    }
    let [settings, trie, scores, map_trie, replacements] = ranges;
    if settings.len() > MAX_SETTINGS_BYTES || !scores.len().is_multiple_of(8) {
        return None;
    }
    let settings: Settings = serde_json::from_slice(bytes.get(settings)?).ok()?;
    let mut places = Places { trie, scores, map_trie, replacements, unknown_score: 0.0 };
    let all = places.tables(bytes).scores.iter().map(|score| f64::from_le_bytes(*score));
    places.unknown_score = all.fold(f64::INFINITY, f64::min) - UNKNOWN_PENALTY;
    let known = (settings.unknown_id as usize) < places.scores.len() / 8;
    (known && places.unknown_score.is_finite()).then_some((places, settings))
}

/// The tables, borrowed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tables<'a> {
    /// From a piece to its id.
    pub(super) trie: Trie<'a>,
    /// Score of each id.
    scores: &'a [[u8; 8]],
    pub(super) map: CharMap<'a>,
    pub(super) unknown_score: f64,
}

impl Places {
    /// The tables in the bytes that they were found in.
    pub(super) fn tables<'a>(&self, bytes: &'a [u8]) -> Tables<'a> {
        let section = |range: &Range<usize>| bytes.get(range.clone()).unwrap_or_default();
        Tables {
            trie: Trie::new(section(&self.trie)),
            scores: section(&self.scores).as_chunks::<8>().0,
            map: CharMap {
                trie: Trie::new(section(&self.map_trie)),
                replacements: section(&self.replacements),
            },
            unknown_score: self.unknown_score,
        }
    }
}

impl Tables<'_> {
    /// The score of an id; the lowest there is for one that the vocabulary does not have.
    pub(super) fn score(self, id: u32) -> f64 {
        self.scores.get(id as usize).map_or(f64::NEG_INFINITY, |score| f64::from_le_bytes(*score))
    }
}

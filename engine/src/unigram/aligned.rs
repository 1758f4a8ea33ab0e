//! A text on its way through normalisation, with the place in the original that each of its bytes comes from. Places are moved
//! as the tokenizers crate moves them, oddities included: what a removed first character was is taken for what follows it.

use super::normalize::{CharMap, Step, each_part};

/// A piece of text, normalised as far as it is, with places in the whole original text.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    pub(super) text: String,
    /// For each byte, where the character that it comes from begins and ends.
    places: Vec<(usize, usize)>,
    /// Where the piece begins.
    start: usize,
}

impl Aligned {
    /// A piece as it stands in the original from byte `start` on.
    pub(super) fn new(piece: &str, start: usize) -> Aligned {
        let places = piece.char_indices().flat_map(|(at, character)| {
            let end = at + character.len_utf8();
            (at..end).map(move |_| (start + at, start + end))
        });
        Aligned { text: piece.to_owned(), places: places.collect(), start }
    }

    /// A part of it.
    pub(super) fn part(&self, range: std::ops::Range<usize>) -> Aligned {
        let places = self.places.get(range.clone()).unwrap_or_default();
        let start = places.first().map_or(self.start, |(start, _)| *start);
        Aligned { text: self.text.get(range).unwrap_or_default().to_owned(), places: places.to_vec(), start }
    }

    /// Where in the original the bytes of this range come from.
    pub(super) fn place(&self, range: std::ops::Range<usize>) -> std::ops::Range<usize> {
        match self.places.get(range).unwrap_or_default() {
            [] => self.start..self.start,
            [(start, end)] => *start..*end,
            [(start, _), .., (_, end)] => *start..*end,
        }
    }

    /// Does all steps of normalisation.
    pub(super) fn normalize(&mut self, steps: &[Step], map: CharMap<'_>) {
        for step in steps {
            match step {
                Step::Map => self.map(map),
                Step::Strip { left, right } => {
                    let text = self.text.as_str();
                    let kept = if *left { text.trim_start() } else { text };
                    let start = text.len() - kept.len();
                    let kept = if *right { kept.trim_end() } else { kept };
                    *self = Aligned { start: self.start, ..self.part(start..start + kept.len()) };
                }
                Step::Spaces(content) => self.replace("  ", content),
            }
        }
    }

    /// Replaces each character with what the map says.
    fn map(&mut self, map: CharMap<'_>) {
        let mut changes: Vec<(char, isize)> = Vec::with_capacity(self.text.len());
        each_part(&self.text, map, |part, replacement| {
            let Some(replacement) = replacement else {
                return changes.extend(part.chars().map(|character| (character, 0)));
            };
            let (old, new) = (part.chars().count(), replacement.chars().count());
            // Of more characters the last ones count as new; of fewer the last one stands for those that went.
            let kept = new - new.saturating_sub(old);
            changes.extend(replacement.chars().enumerate().map(|(index, c)| (c, isize::from(index >= kept))));
            if new < old
                && let Some((_, change)) = changes.last_mut()
            {
                *change -= (old - new) as isize;
            }
        });
        let mut replaced = self.text.chars();
        let (mut at, mut places, mut text) = (0, Vec::with_capacity(self.places.len()), String::new());
        for (character, change) in changes {
            let place = match change {
                1.. if at == 0 => (self.start, self.start),
                1.. => self.places.get(at - 1).copied().unwrap_or((self.start, self.start)),
                _ => self.places.get(at).or(self.places.last()).copied().unwrap_or((self.start, self.start)),
            };
            if change <= 0 {
                at += replaced.by_ref().take(1 + change.unsigned_abs()).map(char::len_utf8).sum::<usize>();
            }
            places.extend((0..character.len_utf8()).map(|_| place));
            text.push(character);
        }
        (self.text, self.places) = (text, places);
    }

    /// Replaces each `space`, or each run of them where it is two, with `content`.
    fn replace(&mut self, space: &str, content: &str) {
        let (mut text, mut places) = (String::with_capacity(self.text.len()), Vec::new());
        let mut done = 0;
        while let Some(found) = self.text.get(done..).and_then(|rest| rest.find(space)) {
            let start = done + found;
            let rest = self.text.get(start..).unwrap_or_default();
            let len = if space.len() == 1 { 1 } else { rest.len() - rest.trim_start_matches(' ').len() };
            text.push_str(self.text.get(done..start).unwrap_or_default());
            places.extend_from_slice(self.places.get(done..start).unwrap_or_default());
            done = start + len;
            let place = self.places.get(done - 1).copied().unwrap_or((self.start, self.start));
            text.push_str(content);
            places.extend((0..content.len()).map(|_| place));
        }
        text.push_str(self.text.get(done..).unwrap_or_default());
        places.extend_from_slice(self.places.get(done..).unwrap_or_default());
        (self.text, self.places) = (text, places);
    }

    /// Spaces become `mark`, which is also put before a text that does not begin with it.
    pub(super) fn mark_spaces(&mut self, mark: char, prepend: bool) {
        let mark_text = mark.to_string();
        self.replace(" ", &mark_text);
        if prepend && !self.text.starts_with(mark) {
            let place = self.places.first().copied().unwrap_or((self.start, self.start));
            self.text.insert(0, mark);
            self.places.splice(0..0, (0..mark.len_utf8()).map(|_| place));
        }
    }
}

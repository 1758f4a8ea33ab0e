//! A piece of text to its normalised form, with or without where each byte comes from. What a character becomes is in
//! `chars`.

use super::chars::{Becomes, CharTable, Source, hangul_parts};

/// Zero bytes behind a normalised text, so that the words in it can be read in blocks.
pub(super) const PADDING_BYTES: usize = 16;
const PADDING: &str = "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
const _: () = assert!(PADDING.len() == PADDING_BYTES);

/// Where the bytes of a normalised text come from: nothing where only ids are wanted, else one [`Source`] for each byte.
pub(super) trait Sources: Default {
    /// Notes `bytes` normalised bytes that come from as many bytes at `start`, each from its own.
    fn run(&mut self, start: usize, bytes: usize);
    /// Notes one character of `bytes` normalised bytes.
    fn char(&mut self, source: Source, bytes: usize);
    /// Forgets all but the first `bytes`.
    fn truncate(&mut self, bytes: usize);
}

impl Sources for () {
    #[inline]
    fn run(&mut self, _: usize, _: usize) {}
    #[inline]
    fn char(&mut self, _: Source, _: usize) {}
    #[inline]
    fn truncate(&mut self, _: usize) {}
}

impl Sources for Vec<Source> {
    fn run(&mut self, start: usize, bytes: usize) {
        self.extend((start..start + bytes).map(|at| (at, at + 1)));
    }

    fn char(&mut self, source: Source, bytes: usize) {
        self.extend(std::iter::repeat_n(source, bytes));
    }

    fn truncate(&mut self, bytes: usize) {
        Vec::truncate(self, bytes);
    }
}

/// A normalised piece; used for one piece after another.
pub(super) struct Normalized<S> {
    text: String,
    len_bytes: usize,
    sources: S,
}

/// A normalised text with [`PADDING_BYTES`] zero bytes behind it.
pub(super) struct Padded<'a> {
    text: &'a str,
    len_bytes: usize,
}

impl<'a> Padded<'a> {
    /// The text without what is behind it.
    pub(super) fn get(&self) -> &'a str {
        self.text.get(..self.len_bytes).unwrap_or_default()
    }

    /// The text's bytes and the zero bytes behind them.
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }
}

impl<S: Sources> Normalized<S> {
    pub(super) fn with_capacity(bytes: usize) -> Self {
        Normalized { text: String::with_capacity(bytes + PADDING_BYTES), len_bytes: 0, sources: S::default() }
    }

    pub(super) fn clear(&mut self) {
        self.truncate(0);
    }

    fn truncate(&mut self, bytes: usize) {
        self.text.truncate(bytes);
        self.sources.truncate(bytes);
    }

    /// The text with its padding, once all of it is there.
    pub(super) fn padded(&mut self) -> Padded<'_> {
        self.len_bytes = self.text.len();
        self.text.push_str(PADDING);
        Padded { text: &self.text, len_bytes: self.len_bytes }
    }

    /// Where its bytes come from.
    pub(super) fn sources(&self) -> &S {
        &self.sources
    }

    #[inline]
    fn push(&mut self, c: char, source: Source) {
        self.text.push(c);
        self.sources.char(source, c.len_utf8());
    }
}

impl CharTable {
    /// Appends the normalised form of `piece`, which begins at byte `start` of the original text.
    pub(super) fn normalize<S: Sources>(&self, piece: &str, start: usize, out: &mut Normalized<S>) {
        let mut rest = piece;
        while !rest.is_empty() {
            let at = start + piece.len() - rest.len();
            let plain = rest.bytes().position(|byte| self.stops(byte)).unwrap_or(rest.len());
            // What stops the run is an ASCII byte or the first byte of a character.
            let (run, behind) = rest.split_at(plain);
            if !run.is_empty() {
                let before = out.text.len();
                out.text.push_str(run);
                if let (true, Some(copied)) = (self.lowers(), out.text.get_mut(before..)) {
                    copied.make_ascii_lowercase();
                }
                out.sources.run(at, run.len());
            }
            let mut chars = behind.chars();
            if let Some(c) = chars.next()
                && !self.push(c, (at + plain, at + plain + c.len_utf8()), out)
            {
                out.truncate(0);
                return self.normalize_exactly(piece, start, out);
            }
            rest = chars.as_str();
        }
    }

    /// Appends what `c` becomes; `false` when that depends on the characters around it.
    #[inline]
    fn push<S: Sources>(&self, c: char, source: Source, out: &mut Normalized<S>) -> bool {
        match self.becomes(c) {
            Becomes::Same => out.push(c, source),
            Becomes::Nothing => {}
            Becomes::Char(other) => out.push(other, source),
            Becomes::Spaced(other) => [' ', other, ' '].into_iter().for_each(|c| out.push(c, source)),
            Becomes::Hangul => {
                if let Some((parts, count)) = hangul_parts(c) {
                    parts.into_iter().take(count).for_each(|c| out.push(c, source));
                }
            }
            Becomes::Several => {
                self.rules().apply(vec![(c, source)]).into_iter().for_each(|(c, source)| out.push(c, source));
            }
            Becomes::Ordered => return false,
        }
        true
    }

    #[cold]
    fn normalize_exactly<S: Sources>(&self, piece: &str, start: usize, out: &mut Normalized<S>) {
        let chars = piece.char_indices().map(|(at, c)| (c, (start + at, start + at + c.len_utf8())));
        for (c, source) in self.rules().apply(chars.collect()) {
            out.push(c, source);
        }
    }

    /// The normalised form of a short text.
    pub(super) fn normalize_all(&self, text: &str) -> String {
        let mut out = Normalized::<()>::with_capacity(text.len());
        self.normalize(text, 0, &mut out);
        out.text
    }
}

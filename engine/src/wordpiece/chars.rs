//! What one character becomes: the normalisation of BertNormalizer as the tokenizers crate does it, on the same Unicode
//! tables, and a memory of the answers. No strings of text here.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use unicode_categories::UnicodeCategories;
use unicode_normalization_alignments::UnicodeNormalization;
use unicode_normalization_alignments::char::canonical_combining_class;

/// Characters of one page of the table. A page is allocated when a text first holds one of them.
const PAGE_CHARS: usize = 1024;
/// Pages that all characters take.
const PAGES: usize = 0x11_0000 / PAGE_CHARS;

/// Byte range in the original text that a character comes from.
pub(super) type Source = (usize, usize);

/// What the normalizer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rules {
    /// Lower-case before all else.
    pub(super) lower_first: bool,
    /// Drop control characters, and make every blank a space.
    pub(super) clean: bool,
    /// Put spaces around Chinese characters.
    pub(super) space_chinese: bool,
    /// Decompose, and drop nonspacing marks.
    pub(super) strip_accents: bool,
    /// Lower-case after all else.
    pub(super) lower: bool,
}

impl Rules {
    /// Normalises a sequence of characters, each with where it comes from, exactly as the crate does; slow. The alignment is
    /// the crate's too: of what a reordering of marks moves, the n-th first part is taken for the n-th character.
    pub(super) fn apply(&self, text: Vec<(char, Source)>) -> Vec<(char, Source)> {
        let mut text = self.decomposed(text);
        if self.lower {
            text = lower_cased(&text);
        }
        text
    }

    /// All steps but the last lower-casing.
    fn decomposed(&self, mut text: Vec<(char, Source)>) -> Vec<(char, Source)> {
        if self.lower_first {
            text = lower_cased(&text);
        }
        if self.clean {
            text.retain(|(c, _)| *c != '\0' && *c != '\u{fffd}' && !is_control(*c));
            text.iter_mut().filter(|(c, _)| c.is_whitespace()).for_each(|(c, _)| *c = ' ');
        }
        if self.space_chinese {
            let spaced = |&(c, source): &(char, Source)| {
                let (all, one) = ([' ', c, ' '], [c, c, c]);
                let (out, count) = if is_chinese(c) { (all, 3) } else { (one, 1) };
                out.into_iter().take(count).map(move |c| (c, source))
            };
            text = text.iter().flat_map(spaced).collect();
        }
        if self.strip_accents {
            let mut sources = text.iter().map(|(_, source)| *source);
            let mut source = Source::default();
            let mut parts = Vec::with_capacity(text.len());
            for (c, further) in text.iter().map(|(c, _)| *c).nfd() {
                if further == 0 {
                    source = sources.next().unwrap_or(source);
                }
                if !c.is_mark_nonspacing() {
                    parts.push((c, source));
                }
            }
            text = parts;
        }
        text
    }
}

fn lower_cased(text: &[(char, Source)]) -> Vec<(char, Source)> {
    text.iter().flat_map(|&(c, source)| c.to_lowercase().map(move |c| (c, source))).collect()
}

/// The crate's idea of a control character: Cc, Cf and Co, but for three blanks.
fn is_control(c: char) -> bool {
    !matches!(c, '\t' | '\n' | '\r') && c.is_other()
}

/// The crate's list of blocks; two of them begin and end where BERT's authors had them, not where Unicode has them.
fn is_chinese(c: char) -> bool {
    matches!(
        u32::from(c),
        0x4E00..=0x9FFF
            | 0x3400..=0x4DBF
            | 0x20000..=0x2A6DF
            | 0x2A700..=0x2B73F
            | 0x2B740..=0x2B81F
            | 0x2B920..=0x2CEAF
            | 0xF900..=0xFAFF
            | 0x2F800..=0x2FA1F
    )
}

/// What a character of the normalised text means for words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Part of a word.
    Word,
    /// Between words, no part of any.
    Blank,
    /// A word by itself.
    Punctuation,
}

fn class_of(c: char) -> Class {
    if c.is_whitespace() {
        Class::Blank
    } else if c.is_ascii_punctuation() || c.is_punctuation() {
        Class::Punctuation
    } else {
        Class::Word
    }
}

/// What a character of a text becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Becomes {
    /// Itself.
    Same,
    /// Nothing.
    Nothing,
    /// Another character.
    Char(char),
    /// A character with a space on each side.
    Spaced(char),
    /// The two or three parts of a Hangul syllable.
    Hangul,
    /// Several characters, whatever stands around it: ask [`Rules::apply`].
    Several,
    /// It has a mark that remains, whose place depends on the marks around it: ask [`Rules::apply`] about the whole piece.
    Ordered,
}

/// Bits of a packed answer: a character in the low 21, what it becomes in the next three, its class in the next two. Zero
/// is "not asked yet", as no [`Becomes`] has the number 0.
const BECOMES_SHIFT: u32 = 21;
const CLASS_SHIFT: u32 = 24;
const CHAR_MASK: u32 = (1 << BECOMES_SHIFT) - 1;

type Page = Box<[AtomicU32]>;

/// Answers for all characters, worked out when first asked: well below a microsecond each, a few nanoseconds later.
pub(super) struct CharTable {
    rules: Rules,
    pages: Box<[OnceLock<Page>]>,
    ascii_classes: [AsciiClass; 256],
    /// Whether an ASCII byte becomes another thing than itself or, where the rules say so, its lower case.
    ascii_stops: [bool; 256],
}

/// What a byte of the normalised text means for words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AsciiClass {
    /// As [`Class`].
    Is(Class),
    /// Begins or continues a character that is not ASCII.
    NotAscii,
}

impl CharTable {
    pub(super) fn new(rules: Rules) -> CharTable {
        let mut table = CharTable {
            rules,
            pages: (0..PAGES).map(|_| OnceLock::new()).collect(),
            ascii_classes: [AsciiClass::NotAscii; 256],
            ascii_stops: [true; 256],
        };
        for byte in 0..128_u8 {
            let c = char::from(byte);
            let plain = if table.lowers() { c.to_ascii_lowercase() } else { c };
            let becomes = table.becomes(c);
            table.ascii_classes[usize::from(byte)] = AsciiClass::Is(class_of(c));
            table.ascii_stops[usize::from(byte)] =
                becomes != Becomes::Char(plain) && !(becomes == Becomes::Same && plain == c);
        }
        table
    }

    pub(super) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Whether ASCII letters become lower case.
    pub(super) fn lowers(&self) -> bool {
        self.rules.lower || self.rules.lower_first
    }

    /// Whether a byte of a text is not ASCII or becomes more than its lower case.
    #[inline]
    pub(super) fn stops(&self, byte: u8) -> bool {
        self.ascii_stops[usize::from(byte)]
    }

    /// The class of a byte of the normalised text.
    #[inline]
    pub(super) fn byte_class(&self, byte: u8) -> AsciiClass {
        self.ascii_classes[usize::from(byte)]
    }

    /// The class of a character of the normalised text.
    #[inline]
    pub(super) fn class(&self, c: char) -> Class {
        match self.packed(c) >> CLASS_SHIFT {
            0 => Class::Word,
            1 => Class::Blank,
            _ => Class::Punctuation,
        }
    }

    /// What a character of a text becomes.
    #[inline]
    pub(super) fn becomes(&self, c: char) -> Becomes {
        let packed = self.packed(c);
        let other = || char::from_u32(packed & CHAR_MASK).unwrap_or(c);
        match packed >> BECOMES_SHIFT & 7 {
            1 => Becomes::Same,
            2 => Becomes::Nothing,
            3 => Becomes::Char(other()),
            4 => Becomes::Spaced(other()),
            5 => Becomes::Hangul,
            6 => Becomes::Several,
            _ => Becomes::Ordered,
        }
    }

    #[inline]
    fn packed(&self, c: char) -> u32 {
        let code = c as usize;
        // Every character has a page and a place in it; were one missing, the answer would only be slow.
        let Some(page) = self.pages.get(code / PAGE_CHARS) else { return self.work_out(c) };
        let page = page.get_or_init(|| (0..PAGE_CHARS).map(|_| AtomicU32::new(0)).collect());
        let Some(entry) = page.get(code % PAGE_CHARS) else { return self.work_out(c) };
        match entry.load(Ordering::Relaxed) {
            0 => {
                let packed = self.work_out(c);
                entry.store(packed, Ordering::Relaxed);
                packed
            }
            packed => packed,
        }
    }

    #[cold]
    fn work_out(&self, c: char) -> u32 {
        let alone = vec![(c, Source::default())];
        let ordered = self.rules.strip_accents
            && self.rules.decomposed(alone.clone()).iter().any(|(c, _)| canonical_combining_class(*c) != 0);
        let out: Vec<char> = self.rules.apply(alone).into_iter().map(|(c, _)| c).collect();
        let (number, other) = match out[..] {
            _ if ordered => (7, c),
            [] => (2, c),
            [one] if one == c => (1, c),
            [one] => (3, one),
            [' ', one, ' '] => (4, one),
            _ if hangul_parts(c).is_some_and(|(parts, count)| out == parts[..count]) => (5, c),
            _ => (6, c),
        };
        let class = match class_of(c) {
            Class::Word => 0,
            Class::Blank => 1,
            Class::Punctuation => 2,
        };
        u32::from(other) | number << BECOMES_SHIFT | class << CLASS_SHIFT
    }
}

/// The two or three parts of a Hangul syllable (Unicode, section 3.12) and how many they are.
pub(super) fn hangul_parts(c: char) -> Option<([char; 3], usize)> {
    const VOWELS: u32 = 21;
    const TAILS: u32 = 28;
    const SYLLABLES: u32 = 19 * VOWELS * TAILS;
    let index = u32::from(c).checked_sub(0xAC00).filter(|index| *index < SYLLABLES)?;
    let lead = char::from_u32(0x1100 + index / (VOWELS * TAILS))?;
    let vowel = char::from_u32(0x1161 + index / TAILS % VOWELS)?;
    let tail = char::from_u32(0x11A7 + index % TAILS)?;
    Some(([lead, vowel, tail], if index % TAILS == 0 { 2 } else { 3 }))
}

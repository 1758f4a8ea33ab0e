//! tokenizer.json files and texts to compare tokenizers on: made from lists and reproducible numbers.

use serde_json::{Value, json};

/// A small generator of reproducible numbers (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }

    fn scalar(&mut self, bound: u32) -> char {
        loop {
            if let Some(c) = char::from_u32(self.next() as u32 % bound) {
                return c;
            }
        }
    }
}

pub(crate) const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

pub(crate) fn added(content: &str, flags: [bool; 4], special: bool) -> Value {
    let [single_word, lstrip, rstrip, normalized] = flags;
    json!({"id": 0, "content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
        "normalized": normalized, "special": special})
}

pub(crate) fn bert_normalizer(clean: bool, chinese: bool, strip: Option<bool>, lower: bool) -> Value {
    json!({"type": "BertNormalizer", "clean_text": clean, "handle_chinese_chars": chinese, "strip_accents": strip,
        "lowercase": lower})
}

/// A tokenizer.json of the special tokens and these.
pub(crate) fn file<T: AsRef<str>>(tokens: impl IntoIterator<Item = T>) -> Value {
    let mut vocab = serde_json::Map::new();
    for token in SPECIAL {
        vocab.insert(token.to_owned(), vocab.len().into());
    }
    for token in tokens {
        let id = vocab.len();
        vocab.entry(token.as_ref().to_owned()).or_insert_with(|| id.into());
    }
    let added_tokens: Vec<Value> = SPECIAL.iter().map(|token| added(token, [false; 4], true)).collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens,
        "normalizer": bert_normalizer(true, true, None, true),
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}
            }
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab
        }
    })
}

/// Every character below `bound`, at the beginning of words and within: then a text's ids show what became of each.
pub(crate) fn characters(bound: u32) -> Vec<String> {
    (1..bound).filter_map(char::from_u32).flat_map(|c| [c.to_string(), format!("##{c}")]).collect()
}

/// Words and parts of words as a real vocabulary has them.
pub(crate) fn words() -> Vec<String> {
    let words = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they \
        which one you were her all she there would their we him been has when who will more no if out so said what up its \
        about into than them can only other new some could time these two may then do first any my now such like our over \
        man me even most made after also did many before must through back years where much your way well down should \
        because each just those people mr how too little state good very make world still own see men work long get here \
        between both life being under never day same another know while last might us great old year off come since \
        against go came right used take three tokenization embedding internationalization straightforwardness";
    let parts = "s ed ing er ly al tion ment ness able ible ful less est en y ers ations ize ized token embed un re dis";
    let letters =
        ('a'..='z').chain('0'..='9').chain("àéîõüßøąčłşžабвгдежзийклмнопрстуфхцчшщъыьэюяαβγδεζσς".chars());
    let punctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’–—…«»¿¡。、，！？";
    let mut all: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
    all.extend(parts.split_whitespace().flat_map(|part| [part.to_owned(), format!("##{part}")]));
    all.extend(letters.flat_map(|c| [c.to_string(), format!("##{c}")]));
    all.extend(punctuation.chars().map(|c| c.to_string()));
    all.extend("中文字符测试日本語東京한국어".chars().map(|c| c.to_string()));
    all
}

/// A text of random parts: words, accents, marks in any order, blanks, controls, emoji, names of special tokens, anything.
pub(crate) fn mixture(random: &mut Random, parts: usize) -> String {
    const SNIPPETS: &[&str] = &[
        "the",
        "The",
        "TOKENIZATION",
        "embeddings",
        "straightforwardness",
        "unembeddable",
        "zzz",
        "café",
        "naïve",
        "Ångström",
        "ĲSSELMEER",
        "ﬁn",
        "ß",
        "ẞ",
        "İstanbul",
        "ΣΊΣΥΦΟΣ",
        "Ǆ",
        "Москва",
        "ёлка",
        "Tiếng Việt",
        "中文",
        "字",
        "日本語",
        "東京",
        "豈",
        "丽",
        "한국어",
        "각",
        "가",
        "e\u{301}",
        "o\u{323}\u{302}",
        "a\u{302}\u{323}",
        "\u{344}",
        "\u{f73}\u{f71}",
        "\u{1d165}",
        "\u{1d16e}\u{1d165}",
        "\u{302e}",
        "\u{302f}\u{302a}",
        "\u{34f}",
        "\u{e01}\u{e33}",
        "कि",
        "क\u{94d}ष",
        "\u{9cb}",
        "\u{bca}",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "❤\u{fe0f}",
        "\u{200d}",
        "\u{200b}",
        "\u{feff}",
        "\u{ad}",
        "\u{fffd}",
        "\0",
        "\u{1}",
        "\u{7f}",
        "\u{85}",
        "\u{9f}",
        "\u{e000}",
        "\u{10ffff}",
        "\u{378}",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[UNK]",
        "[PAD]",
        "[cls]",
        "[MASK",
        "MASK]",
        "[[MASK]]",
        "##",
        "##s",
        "#",
        "=\u{338}",
        "≠",
        "\u{37e}",
        "\u{1fef}",
        "\u{212a}",
        "½",
        "②",
        "https://example.com/a?b=c&d=%20",
        "don't",
        "3.14",
        "—",
        "…",
        "“",
        "_",
        "$",
        "€",
    ];
    const BLANKS: &[&str] = &[
        " ", " ", " ", "  ", "\t", "\n", "\r\n", "\u{b}", "\u{c}", "\u{1c}", "\u{85}", "\u{a0}", "\u{1680}",
        "\u{2003}", "\u{2028}", "\u{2029}", "\u{202f}", "\u{205f}", "\u{3000}", "", "", "", "",
    ];
    let mut text = String::new();
    for _ in 0..parts {
        match random.below(8) {
            0 => text.push(random.scalar(0x80)),
            1 => text.push(random.scalar(0x3000)),
            2 => text.push(random.scalar(0x11_0000)),
            3 => text.push(random.scalar(0x70).max('\u{1}')),
            4 => text.push(char::from_u32(0x300 + random.next() as u32 % 0x70).unwrap_or('x')),
            _ => text.push_str(random.pick(SNIPPETS)),
        }
        text.push_str(random.pick(BLANKS));
    }
    text
}

/// All settings of the normalizer, and whether texts are lower-cased before it.
pub(crate) fn all_settings() -> Vec<(Value, bool)> {
    let mut settings = Vec::new();
    for bits in 0..16 {
        for strip in [None, Some(true), Some(false)] {
            let bit = |index: u32| bits >> index & 1 == 1;
            settings.push((bert_normalizer(bit(0), bit(1), strip, bit(2)), bit(3)));
        }
    }
    settings
}

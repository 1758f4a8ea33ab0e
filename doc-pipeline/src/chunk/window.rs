//! Windows over a run of tokens: where to cut, how much to repeat. Pure; knows no document and no model.

use std::ops::Range;

use crate::model::Span;

/// A window ends within its last quarter when a better cut than its very end is there.
const CUT_ZONE_DIVISOR: usize = 4;
/// Tokens by which an overlap may grow to begin at a word.
const OVERLAP_SNAP_TOKENS: usize = 8;

/// What windows may have.
#[derive(Debug, Clone, Copy)]
pub(super) struct WindowLimits {
    /// Most tokens; at least 1.
    pub(super) tokens: usize,
    /// Most bytes; a single token may pass it.
    pub(super) bytes: usize,
    /// Tokens that the next window repeats.
    pub(super) overlap: usize,
}

/// Token ranges that cover `spans`, each within the limits, each but the first beginning `overlap` tokens (up to
/// 8 more, to begin at a word; fewer, when bytes are what bounds) before the end of the one before it.
/// `breaks` are ascending byte offsets where blocks begin: the best places to cut.
pub(super) fn windows(
    text: &str,
    spans: &[Span],
    breaks: &[usize],
    limits: WindowLimits,
) -> Vec<Range<usize>> {
    let mut out = Vec::new();
    let mut start = 0;
    // Tokens before this one are in a window already; every window must reach past it.
    let mut covered = 0;
    while covered < spans.len() {
        let mut latest = longest(spans, start, limits);
        while latest <= covered {
            start += 1;
            latest = longest(spans, start, limits);
        }
        let end = if latest == spans.len() {
            latest
        } else {
            best_cut(text, spans, breaks, start, covered, latest)
        };
        out.push(start..end);
        covered = end;
        start = overlap_start(spans, start, end, limits);
    }
    out
}

/// The end of the longest window from `start`; at least one token.
fn longest(spans: &[Span], start: usize, limits: WindowLimits) -> usize {
    let mut end = spans.len().min(start + limits.tokens.max(1));
    while end > start + 1 && bytes(spans, start..end) > limits.bytes {
        end -= 1;
    }
    end
}

fn bytes(spans: &[Span], range: Range<usize>) -> usize {
    match (spans.get(range.start), range.end.checked_sub(1).and_then(|last| spans.get(last))) {
        (Some(first), Some(last)) => last.end.saturating_sub(first.start) as usize,
        _ => 0,
    }
}

/// Whether tokens `at - 1` and `at` share no character.
fn is_clean(spans: &[Span], at: usize) -> bool {
    spans[at - 1].end <= spans[at].start
}

/// The best end of a window from `start` in `covered + 1 ..= latest`; `latest` is less than the number of tokens.
fn best_cut(
    text: &str,
    spans: &[Span],
    breaks: &[usize],
    start: usize,
    covered: usize,
    latest: usize,
) -> usize {
    let earliest = (latest - (latest - start - 1) / CUT_ZONE_DIVISOR).max(covered + 1);
    let mut best: Option<(u8, usize)> = None;
    for at in (earliest..=latest).rev() {
        if let Some(rank) = cut_rank(text, spans, breaks, at)
            && best.is_none_or(|(best, _)| rank > best)
        {
            best = Some((rank, at));
        }
    }
    match best {
        Some((_, at)) => at,
        // All tokens of the zone share characters: the nearest clean cut before it, or a cut that repeats one.
        None => (covered + 1..earliest).rev().find(|at| is_clean(spans, *at)).unwrap_or(latest),
    }
}

/// How good a cut before token `at` is: 3 between blocks, 2 between sentences, 1 between words, 0 within one;
/// `None` within a character.
fn cut_rank(text: &str, spans: &[Span], breaks: &[usize], at: usize) -> Option<u8> {
    if !is_clean(spans, at) {
        return None;
    }
    let (before, after) = (spans[at - 1].end as usize, spans[at].start as usize);
    let next_break = breaks.partition_point(|offset| *offset < before);
    if breaks.get(next_break).is_some_and(|offset| *offset <= after && *offset > 0) {
        return Some(3);
    }
    let last = text.get(..before).and_then(|head| head.chars().next_back()).unwrap_or(' ');
    if "。！？".contains(last) || (after > before && ".!?…".contains(last)) {
        return Some(2);
    }
    Some(u8::from(after > before))
}

/// Where the window after `start..end` begins: always after `start`, so that windows advance.
fn overlap_start(spans: &[Span], start: usize, end: usize, limits: WindowLimits) -> usize {
    if limits.overlap == 0 {
        return end;
    }
    let mut asked = end.saturating_sub(limits.overlap).max(start + 1);
    while asked < end && bytes(spans, asked..end) > limits.bytes / 2 {
        asked += 1;
    }
    if asked >= end {
        return end;
    }
    let floor = asked.saturating_sub(OVERLAP_SNAP_TOKENS).max(start + 1);
    let word = (floor..=asked).rev().find(|at| spans[*at].start > spans[*at - 1].end);
    let clean = || (floor..=asked).rev().find(|at| is_clean(spans, *at));
    word.or_else(clean).unwrap_or(asked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tokens of at most four characters of a word: the shape of a subword tokenizer.
    fn tokens(text: &str) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        let mut in_word = 0;
        for (at, character) in text.char_indices() {
            let end = (at + character.len_utf8()) as u32;
            if character.is_whitespace() {
                in_word = 0;
            } else if in_word % 4 == 0 {
                spans.push(Span { start: at as u32, end });
                in_word += 1;
            } else if let Some(last) = spans.last_mut() {
                last.end = end;
                in_word += 1;
            }
        }
        spans
    }

    #[test]
    fn cuts_prefer_blocks_then_sentences() {
        let text = "aa bb cc dd ee. ff gg hh ii jj";
        let spans = tokens(text);
        let limits = WindowLimits { tokens: 8, bytes: 1000, overlap: 0 };
        // Token 5 ("." belongs to "ee.") ends a sentence, but is outside the last quarter of eight tokens.
        assert_eq!(windows(text, &spans, &[], limits), [0..8, 8..10]);
        let at = text.find("hh").expect("there");
        assert_eq!(windows(text, &spans, &[0, at], limits), [0..7, 7..10]);
        let text = "aa bb cc dd ee ff gg. hh ii jj";
        assert_eq!(windows(text, &tokens(text), &[], limits), [0..7, 7..10]);
    }

    proptest! {
        #[test]
        fn windows_cover_advance_and_overlap(
            text in "([a-z\u{e9}\u{1F980}]{1,12}[ .\n]{1,2}){0,80}", limit in 4_usize..40, overlap_share in 0_usize..34,
            byte_limit in prop_oneof![8_usize..400, Just(100_000)],
        ) {
            let spans = tokens(&text);
            let overlap = limit * overlap_share / 100;
            let limits = WindowLimits { tokens: limit, bytes: byte_limit, overlap };
            let windows = windows(&text, &spans, &[], limits);
            let mut covered = 0;
            for window in &windows {
                prop_assert!(window.start <= covered, "no token left out");
                prop_assert!(window.end > covered, "every window brings something new");
                prop_assert!(window.len() <= limit);
                prop_assert!(window.len() == 1 || bytes(&spans, window.clone()) <= byte_limit);
                if overlap == 0 {
                    prop_assert_eq!(window.start, covered);
                }
                covered = window.end;
            }
            prop_assert_eq!(covered, spans.len());
            if byte_limit == 100_000 {
                for pair in windows.windows(2) {
                    let shared = pair[0].end - pair[1].start;
                    prop_assert!(shared >= overlap.min(pair[0].len() - 1), "{} of {}", shared, overlap);
                    prop_assert!(shared <= overlap + OVERLAP_SNAP_TOKENS);
                }
            }
        }

        #[test]
        fn any_ascending_spans_are_covered(
            steps in proptest::collection::vec((0_u32..3, 0_u32..4), 0..120), limit in 1_usize..20, overlap in 0_usize..7,
        ) {
            // Overlapping, empty and touching spans, as byte-level tokenizers give for one character.
            let mut at = 0;
            let spans: Vec<Span> = steps.iter().map(|(step, length)| {
                at += step;
                Span { start: at, end: at + length }
            }).collect();
            let text = "x".repeat(at as usize + 4);
            let mut covered = 0;
            for window in windows(&text, &spans, &[3, 9], WindowLimits { tokens: limit, bytes: 50, overlap }) {
                prop_assert!(window.start <= covered && window.end > covered && window.len() <= limit);
                covered = window.end;
            }
            prop_assert_eq!(covered, spans.len());
        }
    }
}

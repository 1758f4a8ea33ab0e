//! Dealing texts out to threads. Pure.

use std::ops::Range;

/// Tokens that one thread takes through all layers at once: their activations stay in its cache, and weights are read once
/// for all of them.
const GROUP_TOKENS: usize = 192;
/// Tokens that a thread must have to itself for whole groups to be faster than sharing each step.
const MIN_THREAD_TOKENS: usize = 32;
/// Share of a thread's fair part that the largest group may exceed the mean by, before a team is faster: one in so many.
const UNEVEN_SHARE: usize = 8;

/// Texts in groups of about [`GROUP_TOKENS`], for threads that each take whole groups; `None` when threads should rather share
/// each step, because there is too little for all of them or it can't be dealt out evenly.
pub(super) fn groups(sequences: &[Range<usize>], threads: usize) -> Option<Vec<Range<usize>>> {
    let tokens = sequences.last()?.end;
    if threads > 1 && (sequences.len() < threads || tokens < threads * MIN_THREAD_TOKENS) {
        return None;
    }
    // As many rounds as it takes, all threads busy in each; fewer where long texts can't be dealt out evenly in so many.
    let rounds = tokens.div_ceil(GROUP_TOKENS * threads);
    (rounds.div_ceil(2)..=rounds).rev().find_map(|rounds| dealt(sequences, tokens, threads, rounds))
}

/// Texts in groups for so many rounds, if that is even enough.
fn dealt(
    sequences: &[Range<usize>],
    tokens: usize,
    threads: usize,
    rounds: usize,
) -> Option<Vec<Range<usize>>> {
    let count = (rounds * threads).min(sequences.len());
    let mut groups = Vec::with_capacity(count);
    let (mut start, mut largest) = (0, 0);
    for group in 1..=count {
        let until = tokens * group / count;
        // The text in the middle of which the border lies goes to the side where most of it is.
        let end = match group == count {
            true => sequences.len(),
            false => start + sequences[start..].partition_point(|s| s.start + s.end <= 2 * until),
        };
        if end > start {
            largest = largest.max(sequences[end - 1].end - sequences[start].start);
            groups.push(start..end);
        }
        start = end;
    }
    // A thread with the largest group ends after the others have done the rest; so much of a fair part may be lost.
    let fair = tokens / threads;
    let excess = largest.saturating_sub(tokens / count);
    let is_even = groups.len().is_multiple_of(threads) && excess <= fair / UNEVEN_SHARE;
    (threads <= 1 || is_even).then_some(groups)
}

#[cfg(test)]
mod tests {
    use super::super::tests::packed;
    use super::*;

    #[test]
    fn groups_hold_every_text_once_and_in_order() {
        let mut state = 7u64;
        let mut random = move |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        for _ in 0..2000 {
            let lengths: Vec<usize> = (0..1 + random(60))
                .map(|_| {
                    let longest = 1 << (1 + random(9));
                    1 + random(longest)
                })
                .collect();
            let sequences = packed(&lengths);
            for threads in [1, 2, 3, 8] {
                let Some(groups) = groups(&sequences, threads) else { continue };
                let texts: Vec<usize> = groups.iter().flat_map(Clone::clone).collect();
                assert_eq!(texts, (0..sequences.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_small_or_uneven_is_shared() {
        assert_eq!(groups(&packed(&[16]), 2), None);
        assert_eq!(groups(&packed(&[8, 8]), 2), None);
        assert_eq!(groups(&packed(&[512, 16, 16]), 2), None);
        assert_eq!(groups(&packed(&[128, 128]), 2).map(|groups| groups.len()), Some(2));
        assert_eq!(groups(&packed(&[256; 16]), 1).map(|groups| groups.len()), Some(16));
        assert_eq!(groups(&packed(&[16; 256]), 2).map(|groups| groups.len()), Some(22));
    }
}

//! Dealing texts out to threads. Pure.

use std::ops::Range;

/// Tokens that one thread takes through all layers at once: their activations stay in its cache, and weights are read once
/// for all of them.
const GROUP_TOKENS: usize = 192;
/// Tokens that a thread must have to itself for whole groups to be faster than sharing each step.
const MIN_THREAD_TOKENS: usize = 32;
/// What sharing each step costs over having texts to oneself, in percent: threads wait for each other.
const SHARED_COST_PERCENT: usize = 110;

/// Texts in groups for threads that each take whole groups, and the texts at the end of which all threads share each step: whatever
/// is done first, by the tokens that the busiest thread gets.
pub(super) fn deal(sequences: &[Range<usize>], threads: usize) -> (Vec<Range<usize>>, Range<usize>) {
    let Some(last) = sequences.last() else { return (Vec::new(), 0..0) };
    let (tokens, count) = (last.end, sequences.len());
    if threads <= 1 {
        return (grouped(sequences, tokens, tokens.div_ceil(GROUP_TOKENS)), count..count);
    }
    let shared_cost = |shared: usize| shared * SHARED_COST_PERCENT / (100 * threads);
    let mut best = (shared_cost(tokens), Vec::new(), 0);
    for end in (count.saturating_sub(threads)..=count).rev() {
        let dealt = sequences[..end].last().map_or(0, |last| last.end);
        if end < threads || dealt < threads * MIN_THREAD_TOKENS {
            continue;
        }
        // As many rounds as it takes, all threads busy in each; or fewer, where that is more even.
        let rounds = dealt.div_ceil(GROUP_TOKENS * threads);
        for rounds in (rounds.div_ceil(2)..=rounds).rev() {
            let groups = grouped(&sequences[..end], dealt, rounds * threads);
            let cost = busiest(&groups, sequences, threads) + shared_cost(tokens - dealt);
            if cost < best.0 {
                best = (cost, groups, end);
            }
        }
    }
    let (_, groups, end) = best;
    (groups, end..count)
}

/// Texts of so many tokens in up to `count` groups of about the same number of tokens.
fn grouped(sequences: &[Range<usize>], tokens: usize, count: usize) -> Vec<Range<usize>> {
    let count = count.min(sequences.len());
    let mut groups = Vec::with_capacity(count);
    let mut start = 0;
    for group in 1..=count {
        let until = tokens * group / count;
        // The text in the middle of which the border lies goes to the side where most of it is.
        let end = match group == count {
            true => sequences.len(),
            false => start + sequences[start..].partition_point(|s| s.start + s.end <= 2 * until),
        };
        if end > start {
            groups.push(start..end);
        }
        start = end;
    }
    groups
}

/// Tokens of the thread that has most when each takes the next group as soon as it is free.
fn busiest(groups: &[Range<usize>], sequences: &[Range<usize>], threads: usize) -> usize {
    let mut busy = vec![0; threads];
    for group in groups {
        let tokens = sequences[group.end - 1].end - sequences[group.start].start;
        if let Some(first_free) = busy.iter_mut().min() {
            *first_free += tokens;
        }
    }
    busy.into_iter().max().unwrap_or(0)
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
                let (groups, shared) = deal(&sequences, threads);
                let texts: Vec<usize> = groups.iter().flat_map(Clone::clone).chain(shared.clone()).collect();
                assert!(threads > 1 || shared.is_empty());
                assert_eq!(texts, (0..sequences.len()).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_is_small_or_uneven_is_shared() {
        let counts = |lengths: &[usize], threads| {
            let (groups, shared) = deal(&packed(lengths), threads);
            (groups.len(), shared)
        };
        assert_eq!(counts(&[16], 2), (0, 0..1));
        assert_eq!(counts(&[8, 8], 2), (0, 0..2));
        assert_eq!(counts(&[512, 16, 16], 2), (0, 0..3));
        assert_eq!(counts(&[128, 128], 2), (2, 2..2));
        assert_eq!(counts(&[128, 128, 128], 2), (2, 2..3));
        assert_eq!(counts(&[256; 16], 1), (16, 16..16));
        assert_eq!(counts(&[16; 256], 2), (20, 256..256));
        let (groups, shared) = deal(&packed(&[128; 11]), 2);
        assert_eq!((busiest(&groups, &packed(&[128; 11]), 2), shared), (5 * 128, 10..11));
    }
}

//! What changes logits before a token is chosen, and choosing by drawing. Pure.
//!
//! Order and formulas of what changes logits are those of transformers: repetition penalty, runs of tokens, least length. Drawing is
//! our own: logits are divided by the temperature; of the tokens sorted by falling logit (equal ones by rising id) the first `top_k`
//! stay, of these the fewest whose probabilities sum to `top_p` or more; a number in [0, 1) chosen by the seed and the token's
//! place in the answer takes the token in whose share of the remaining probability it falls. So a token depends on nothing but
//! its logits, the options and its place.

use super::options::GenerateOptions;

/// Changes logits of the token that follows `ids`, of which `output_tokens` were generated.
pub(super) fn process(
    logits: &mut [f32],
    ids: &[u32],
    output_tokens: usize,
    options: &GenerateOptions,
    end_tokens: &[u32],
) {
    if options.repetition_penalty != 1.0 {
        penalize(logits, ids, options.repetition_penalty);
    }
    if options.no_repeat_ngram_size > 0 {
        ban_runs(logits, ids, options.no_repeat_ngram_size);
    }
    if output_tokens < options.min_output_tokens {
        for id in end_tokens {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Divides positive and multiplies negative logits of tokens that occurred, each once.
fn penalize(logits: &mut [f32], ids: &[u32], penalty: f32) {
    let mut seen = ids.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for id in seen {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

/// Forbids each token that would complete a run of `size` tokens that occurred.
fn ban_runs(logits: &mut [f32], ids: &[u32], size: usize) {
    if ids.len() < size {
        return;
    }
    let last = &ids[ids.len() + 1 - size..];
    for run in ids.windows(size) {
        if &run[..size - 1] == last
            && let Some(logit) = logits.get_mut(run[size - 1] as usize)
        {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// The token with the largest logit, the first of equals.
pub(super) fn most_likely(logits: &[f32]) -> u32 {
    const LANES: usize = 16;
    let mut best = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for (best, logit) in best.iter_mut().zip(chunk) {
            *best = if *logit > *best { *logit } else { *best };
        }
    }
    let largest = best.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == largest).unwrap_or(0) as u32
}

/// Draws the token at `place` of an answer.
pub(super) fn draw(logits: &[f32], options: &GenerateOptions, place: usize) -> u32 {
    let most = if options.top_k == 0 { logits.len() } else { options.top_k.min(logits.len()) };
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let of = |id: u32| logits[id as usize];
    let falling = |a: &u32, b: &u32| of(*b).total_cmp(&of(*a)).then(a.cmp(b));
    if most < order.len() {
        order.select_nth_unstable_by(most, falling);
        order.truncate(most);
    }
    let largest = order.iter().map(|id| of(*id)).fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: u32| (f64::from(of(id) - largest) / f64::from(options.temperature)).exp();
    if options.top_p < 1.0 {
        // Tokens of no weight to speak of need not be sorted.
        let total: f64 = order.iter().map(|id| weight(*id)).sum();
        let least = total * 1e-9;
        order.retain(|id| weight(*id) >= least);
        order.sort_unstable_by(falling);
        let enough = f64::from(options.top_p) * total;
        let mut sum = 0.0;
        let kept = order.iter().position(|id| {
            sum += weight(*id);
            sum >= enough
        });
        order.truncate(kept.map_or(order.len(), |kept| kept + 1));
    } else {
        order.sort_unstable();
    }
    let total: f64 = order.iter().map(|id| weight(*id)).sum();
    let mut left = uniform(options.seed, place as u64) * total;
    for id in &order {
        left -= weight(*id);
        if left < 0.0 {
            return *id;
        }
    }
    order.last().copied().unwrap_or(0)
}

/// A number in [0, 1) for a seed and a place: two rounds of SplitMix64's finaliser.
fn uniform(seed: u64, place: u64) -> f64 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (mix(mix(seed) ^ place) >> 11) as f64 / (1u64 << 53) as f64
}

/// `logits` becomes the logarithms of the probabilities.
pub(super) fn log_softmax(logits: &mut [f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from((logit - largest).exp())).sum();
    let shift = largest + total.ln() as f32;
    for logit in logits {
        *logit -= shift;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn penalties_and_bans_are_those_of_transformers() {
        let mut logits = vec![1.0, -1.0, 2.0, 0.5];
        penalize(&mut logits, &[0, 1, 1, 9], 2.0);
        assert_eq!(logits, [0.5, -2.0, 2.0, 0.5]);
        let mut logits = vec![0.0; 4];
        ban_runs(&mut logits, &[1, 2, 3, 1, 2], 3);
        assert_eq!(logits, [0.0, 0.0, 0.0, f32::NEG_INFINITY]);
        let mut logits = vec![0.0; 3];
        ban_runs(&mut logits, &[1, 2], 1);
        assert_eq!(logits, [0.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_bounds() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        let count = |options: &GenerateOptions| {
            let mut counts = [0usize; 4];
            for place in 0..20_000 {
                counts[draw(&logits, options, place) as usize] += 1;
            }
            counts
        };
        let plain = GenerateOptions { do_sample: true, seed: 7, ..GenerateOptions::default() };
        let counts = count(&plain);
        for (count, wanted) in counts.iter().zip([10_000.0, 6_000.0, 3_000.0, 1_000.0]) {
            assert!((*count as f64 - wanted).abs() < 300.0, "{counts:?}");
        }
        assert_eq!(count(&GenerateOptions { top_k: 1, ..plain.clone() }), [20_000, 0, 0, 0]);
        assert_eq!(count(&GenerateOptions { top_k: 2, ..plain.clone() })[2..], [0, 0]);
        assert_eq!(count(&GenerateOptions { top_p: 0.7, ..plain.clone() })[2..], [0, 0]);
        assert_eq!(count(&GenerateOptions { top_p: 0.4, ..plain.clone() })[1..], [0, 0, 0]);
        assert_eq!(count(&GenerateOptions { temperature: 0.01, ..plain.clone() })[1..], [0, 0, 0]);
        assert_ne!(counts, count(&GenerateOptions { seed: 8, ..plain }));
    }

    #[test]
    fn the_first_of_equals_is_most_likely() {
        let mut logits = vec![0.0; 40];
        logits[21] = 1.0;
        logits[37] = 1.0;
        assert_eq!(most_likely(&logits), 21);
    }
}

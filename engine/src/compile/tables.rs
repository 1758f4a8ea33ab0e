//! Tables that an image holds ready for computing: rotary positions, and relative positions by distance. Pure.

/// Distance from which on all relative positions share a bucket, as transformers has it for MPNet.
const MAX_BUCKET_DISTANCE: f32 = 128.0;

/// Angles of rotary positions, `[positions, half]`, in the order of positions, given to `put` one position at a time.
///
/// As transformers computes them: `position · base^(-2i / head_dim)` in f32, for `i` below `half = head_dim / 2`.
pub(super) fn rotary_angles(base: f64, positions: usize, half: usize, mut put: impl FnMut(&[f32])) {
    let head_dim = 2 * half;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| {
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / base.powf(f64::from(exponent)) as f32
        })
        .collect();
    let mut angles = vec![0.0; half];
    for position in 0..positions {
        for (angle, frequency) in angles.iter_mut().zip(&frequencies) {
            *angle = position as f32 * frequency;
        }
        put(&angles);
    }
}

/// Bucket of the position `key - query`: T5's function for both directions, as transformers computes it for MPNet. Half of
/// the buckets are for keys behind the query; of each half the first half is for single distances, the rest grows by logarithm.
pub(super) fn bucket(distance: i64, buckets: usize) -> usize {
    let half = buckets / 2;
    let side = if distance > 0 { half } else { 0 };
    let distance = distance.unsigned_abs() as usize;
    let exact = half / 2;
    if distance < exact {
        return side + distance;
    }
    let share = (distance as f32 / exact as f32).ln() / (MAX_BUCKET_DISTANCE / exact as f32).ln();
    let large = exact + (share * (half - exact) as f32) as usize;
    side + large.min(half - 1)
}

/// `[heads, 2 * max_tokens - 1]`: what is added to a score, by head and by `key - query + max_tokens - 1`, from a table
/// `[buckets, heads]`.
pub(super) fn distance_bias(table: &[f32], buckets: usize, heads: usize, max_tokens: usize) -> Vec<f32> {
    let most = max_tokens as i64 - 1;
    let mut out = Vec::with_capacity(heads * (2 * max_tokens - 1));
    for head in 0..heads {
        out.extend((-most..=most).map(|distance| table[bucket(distance, buckets) * heads + head]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_those_of_transformers() {
        // MPNetEncoder.relative_position_bucket for distances key - query.
        let wanted = [
            (0, 0),
            (1, 17),
            (-1, 1),
            (7, 23),
            (-7, 7),
            (8, 24),
            (-8, 8),
            (11, 24),
            (12, 25),
            (16, 26),
            (-16, 10),
            (31, 27),
            (32, 28),
            (-64, 14),
            (90, 30),
            (91, 31),
            (127, 31),
            (-128, 15),
            (5000, 31),
        ];
        for (distance, bucket_wanted) in wanted {
            assert_eq!(bucket(distance, 32), bucket_wanted, "{distance}");
        }
    }

    #[test]
    fn a_bias_is_found_by_distance() {
        let table: Vec<f32> = (0..64).map(|value| value as f32).collect();
        let bias = distance_bias(&table, 32, 2, 4);
        assert_eq!(bias.len(), 14);
        // Head 1, key two behind the query: bucket 18.
        assert_eq!(bias[7 + 3 + 2], table[18 * 2 + 1]);
    }

    #[test]
    fn angles_are_positions_times_frequencies() {
        let mut rows = Vec::new();
        rotary_angles(10_000.0, 3, 2, |row| rows.push(row.to_vec()));
        assert_eq!(rows, [[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]]);
    }
}

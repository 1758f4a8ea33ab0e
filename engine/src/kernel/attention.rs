//! Attention over packed sequences of any lengths: no padding, so no mask. One task per sequence and head.

use super::matmul::{Place, matmul_strided};
use super::rows::{SharedFloats, par_tasks};
use super::vector::softmax_row;
use std::cell::RefCell;
use std::ops::Range;

/// Queries whose scores are in memory at once, per thread; bounds the scratch to this many rows of the longest sequence.
const QUERY_BLOCK_ROWS: usize = 128;

thread_local! {
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Shape of an attention block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    /// Width of the hidden state.
    pub(crate) hidden_dim: usize,
    /// Number of heads; divides `hidden_dim`.
    pub(crate) head_count: usize,
}

/// `context[t] = softmax(q[t] · kᵀ / √d) · v` inside each sequence. `qkv` is `[tokens, 3 * hidden_dim]` with queries, keys and
/// values side by side, `context` is `[tokens, hidden_dim]`; `sequences` are disjoint, ascending ranges of tokens.
///
/// # Panics
/// When lengths do not fit or sequences are not ascending and disjoint.
pub(crate) fn attention(
    threads: usize,
    context: &mut [f32],
    qkv: &[f32],
    sequences: &[Range<usize>],
    shape: AttentionShape,
) {
    let AttentionShape { hidden_dim, head_count } = shape;
    let tokens = context.len() / hidden_dim;
    assert!(context.len() == tokens * hidden_dim && qkv.len() == 3 * context.len());
    let mut end = 0;
    for sequence in sequences {
        assert!(sequence.start >= end && sequence.end >= sequence.start && sequence.end <= tokens);
        end = sequence.end;
    }
    let floats = context.len() * 4;
    let out = SharedFloats::new(context);
    par_tasks(threads, sequences.len() * head_count, floats, |task| {
        let sequence = &sequences[task / head_count];
        // SAFETY: a task writes the rows of its sequence in the columns of its head; sequences were asserted to be disjoint
        // and each (sequence, head) is one task, so no two tasks share an element.
        unsafe { one_head(&out, qkv, sequence, task % head_count, shape) };
    });
}

/// # Safety
/// No other thread may touch the columns of `head` in the rows of `sequence` of `out` while this runs.
unsafe fn one_head(
    out: &SharedFloats<'_>,
    qkv: &[f32],
    sequence: &Range<usize>,
    head: usize,
    AttentionShape { hidden_dim, head_count }: AttentionShape,
) {
    let head_dim = hidden_dim / head_count;
    let keys = sequence.len();
    let row = 3 * hidden_dim;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let at = |token: usize, part: usize| token * row + part * hidden_dim + head * head_dim;
    SCORES.with_borrow_mut(|scores| {
        let block_rows = keys.min(QUERY_BLOCK_ROWS);
        if scores.len() < block_rows * keys {
            scores.resize(block_rows * keys, 0.0);
        }
        for first in sequence.clone().step_by(QUERY_BLOCK_ROWS) {
            let queries = (sequence.end - first).min(QUERY_BLOCK_ROWS);
            let scores = &mut scores[..queries * keys];
            let score_place = Place { offset: 0, row_stride: 1, column_stride: keys };
            // SAFETY: `scores` is this thread's own.
            unsafe {
                // scoresᵀ [keys, queries] = k [keys, d] · qᵀ [d, queries]
                matmul_strided(
                    (keys, queries, head_dim),
                    &SharedFloats::new(scores),
                    score_place,
                    qkv,
                    Place { offset: at(sequence.start, 1), row_stride: row, column_stride: 1 },
                    qkv,
                    Place { offset: at(first, 0), row_stride: 1, column_stride: row },
                );
            }
            scores.chunks_exact_mut(keys).for_each(|row| softmax_row(row, scale));
            // SAFETY: the caller's promise: these columns of these rows are this task's.
            unsafe {
                // contextᵀ [d, queries] = vᵀ [d, keys] · scoresᵀ [keys, queries]
                matmul_strided(
                    (head_dim, queries, keys),
                    out,
                    Place {
                        offset: first * hidden_dim + head * head_dim,
                        row_stride: 1,
                        column_stride: hidden_dim,
                    },
                    qkv,
                    Place { offset: at(sequence.start, 2), row_stride: 1, column_stride: row },
                    scores,
                    score_place,
                );
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<f32> {
        let mut state = 12345u32;
        (0..len)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// Attention by its definition, in double precision.
    fn plain(qkv: &[f32], sequence: &Range<usize>, shape: AttentionShape, out: &mut [f64]) {
        let (width, head_dim) = (shape.hidden_dim, shape.hidden_dim / shape.head_count);
        let at = |token: usize, part: usize, column: usize| {
            f64::from(qkv[token * 3 * width + part * width + column])
        };
        for query in sequence.clone() {
            for head in 0..shape.head_count {
                let columns = head * head_dim..(head + 1) * head_dim;
                let scores: Vec<f64> = sequence
                    .clone()
                    .map(|key| columns.clone().map(|c| at(query, 0, c) * at(key, 1, c)).sum::<f64>())
                    .map(|score| (score / (head_dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = scores.iter().sum();
                for column in columns {
                    out[query * width + column] = sequence
                        .clone()
                        .zip(&scores)
                        .map(|(key, score)| score / total * at(key, 2, column))
                        .sum();
                }
            }
        }
    }

    #[test]
    fn packed_attention_is_attention_and_does_not_see_its_neighbours() {
        let shape = AttentionShape { hidden_dim: 24, head_count: 3 };
        let sequences = [0..2, 2..3, 3..140, 140..300, 300..317];
        let qkv = noise(317 * 72);
        let mut wanted = vec![0.0; 317 * 24];
        sequences.iter().for_each(|sequence| plain(&qkv, sequence, shape, &mut wanted));
        let mut together = vec![0.0; 317 * 24];
        attention(2, &mut together, &qkv, &sequences, shape);
        for (found, wanted) in together.iter().zip(&wanted) {
            assert!((f64::from(*found) - wanted).abs() < 2e-6, "{found} instead of {wanted}");
        }
        for sequence in &sequences {
            let mut alone = vec![0.0; sequence.len() * 24];
            attention(
                1,
                &mut alone,
                &qkv[sequence.start * 72..sequence.end * 72],
                std::slice::from_ref(&(0..sequence.len())),
                shape,
            );
            assert_eq!(alone, together[sequence.start * 24..sequence.end * 24], "{sequence:?} differs alone");
        }
    }
}

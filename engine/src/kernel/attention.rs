//! Attention over packed sequences of any lengths: no padding, so no mask. One task per sequence and head.
//!
//! Keys become panels of 32 keys and values panels of 32 columns, packed as weights are, so that both products are those of
//! `product`. In f32, or in bf16 with f32 sums and an f32 softmax.

use super::product::{Left, PANEL_COLUMNS, Precision, Right, TILE_ROWS, multiply};
use super::scratch::{Block, Place};
use super::team::Member;
use super::vector::{pair_rows, softmax_row, to_bf16, transpose_words};
use crate::packing::Packing;
use std::cell::RefCell;
use std::ops::Range;

/// Queries whose scores are in memory at once: whole tiles of every path.
const QUERY_BLOCK_ROWS: usize = 96;

/// Shape of an attention block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    /// Width of the hidden state.
    pub(crate) hidden_dim: usize,
    /// Number of heads; divides `hidden_dim`.
    pub(crate) head_count: usize,
}

/// Memory of one thread for one head of one sequence.
struct HeadScratch {
    capacity_bytes: [usize; 4],
    /// Queries in bf16.
    queries: Block,
    keys: Block,
    values: Block,
    /// Scores, and in bf16 probabilities behind them.
    scores: Block,
}

thread_local! {
    static SCRATCH: RefCell<Option<HeadScratch>> = const { RefCell::new(None) };
}

impl HeadScratch {
    fn with<T>(needed_bytes: [usize; 4], work: impl FnOnce(&mut HeadScratch) -> T) -> T {
        SCRATCH.with_borrow_mut(|kept| {
            let fits = |kept: &HeadScratch| {
                kept.capacity_bytes.iter().zip(needed_bytes).all(|(has, needs)| *has >= needs)
            };
            let scratch = match kept.take() {
                Some(scratch) if fits(&scratch) => scratch,
                old => {
                    let had = old.map_or([0; 4], |old| old.capacity_bytes);
                    let mut capacity_bytes = needed_bytes;
                    capacity_bytes.iter_mut().zip(had).for_each(|(bytes, had)| *bytes = had.max(*bytes));
                    let [queries, keys, values, scores] = capacity_bytes.map(Block::zeroed);
                    HeadScratch { capacity_bytes, queries, keys, values, scores }
                }
            };
            work(kept.insert(scratch))
        })
    }
}

/// Gives back this thread's memory.
pub(super) fn release_scratch() {
    SCRATCH.with_borrow_mut(|kept| *kept = None);
}

/// This member's heads of `context[t] = softmax(q[t] · kᵀ / √d) · v` inside each sequence. `qkv` is `[tokens, 3 * hidden_dim]`
/// with queries, keys and values side by side, `context` is `[tokens, hidden_dim]`; sequences count from `first_token`.
///
/// # Safety
/// Sequences must be disjoint and, less `first_token`, lie inside both places; nobody else writes `qkv`, or touches
/// `context`, but the other members of the team that call this with the same arguments.
pub(super) unsafe fn attention(
    member: &Member<'_>,
    context: Place,
    qkv: Place,
    sequences: &[Range<usize>],
    first_token: usize,
    shape: AttentionShape,
    precision: Precision,
) {
    for task in member.tasks(sequences.len() * shape.head_count) {
        let sequence = &sequences[task / shape.head_count];
        let sequence = sequence.start - first_token..sequence.end - first_token;
        let head = Head { context, qkv, sequence, head: task % shape.head_count, shape };
        // SAFETY: a task writes the rows of its sequence in the columns of its head, and each (sequence, head) is one task of
        // one member, so no two tasks share an element. The rest is the caller's promise.
        unsafe {
            match precision {
                Precision::F32 => head.in_f32(),
                _ => head.in_bf16(),
            }
        }
    }
}

struct Head {
    context: Place,
    qkv: Place,
    sequence: Range<usize>,
    head: usize,
    shape: AttentionShape,
}

impl Head {
    fn head_dim(&self) -> usize {
        self.shape.hidden_dim / self.shape.head_count
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    /// Index of the part (0 query, 1 key, 2 value) of a token, counted from the sequence's first.
    fn at(&self, token: usize, part: usize) -> usize {
        let width = self.shape.hidden_dim;
        (self.sequence.start + token) * 3 * width + part * width + self.head * self.head_dim()
    }

    /// The part (0 query, 1 key, 2 value) of a token, counted from the sequence's first.
    ///
    /// # Safety
    /// The token must be one of the sequence; nobody may write it meanwhile.
    unsafe fn part<'a>(&self, token: usize, part: usize) -> &'a [f32] {
        // SAFETY: the caller's promise; the slice is only read.
        unsafe { self.qkv.slice::<f32>(self.at(token, part), self.head_dim()) }
    }

    /// Writes a tile's rows into the columns of this head.
    ///
    /// # Safety
    /// As [`attention`].
    unsafe fn store(&self, tile: &[[f32; PANEL_COLUMNS]], first_query: usize, panel: usize) {
        let columns = (self.head_dim() - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
        let column = self.head * self.head_dim() + panel * PANEL_COLUMNS;
        for (row, values) in tile.iter().enumerate() {
            let token = self.sequence.start + first_query + row;
            // SAFETY: these columns of these rows are this task's.
            let out = unsafe { self.context.slice::<f32>(token * self.shape.hidden_dim + column, columns) };
            out.copy_from_slice(&values[..columns]);
        }
    }

    /// # Safety
    /// As [`attention`].
    unsafe fn in_f32(&self) {
        let (keys, head_dim) = (self.sequence.len(), self.head_dim());
        let padded_keys = keys.next_multiple_of(PANEL_COLUMNS);
        let (key_panels, value_panels) = (padded_keys / PANEL_COLUMNS, head_dim.div_ceil(PANEL_COLUMNS));
        let floats =
            [0, padded_keys * head_dim, value_panels * PANEL_COLUMNS * keys, QUERY_BLOCK_ROWS * padded_keys];
        HeadScratch::with(floats.map(|count| 4 * count), |scratch| {
            let [packed_keys, packed_values, scores] =
                [&mut scratch.keys, &mut scratch.values, &mut scratch.scores].map(Block::start);
            let row_bytes = 4 * 3 * self.shape.hidden_dim;
            // SAFETY: the scratch is this thread's, with room for all panels; queries, keys and values are those of this
            // sequence, which nobody writes now (the caller's promise).
            unsafe {
                for panel in 0..key_panels {
                    let first = panel * PANEL_COLUMNS;
                    let out = packed_keys.slice::<u32>(first * head_dim, PANEL_COLUMNS * head_dim);
                    let source = self.qkv.at::<u8>(4 * self.at(first, 1));
                    transpose_words(out, source, row_bytes, (keys - first).min(PANEL_COLUMNS));
                }
                for panel in 0..value_panels {
                    let columns = (head_dim - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
                    for key in 0..keys {
                        let out =
                            packed_values.slice::<f32>((panel * keys + key) * PANEL_COLUMNS, PANEL_COLUMNS);
                        out[..columns]
                            .copy_from_slice(&self.part(key, 2)[panel * PANEL_COLUMNS..][..columns]);
                        out[columns..].fill(0.0);
                    }
                }
                for first in (0..keys).step_by(QUERY_BLOCK_ROWS) {
                    let rows = (keys - first).min(QUERY_BLOCK_ROWS);
                    let start = self.qkv.at::<u8>(4 * self.at(first, 0));
                    let queries = Left { start, stride_bytes: row_bytes, rows };
                    let right =
                        Right { start: packed_keys.at(0), precision: Precision::F32, inputs: head_dim };
                    multiply(queries, right, 0..key_panels, |tile, rows, panel| {
                        for (row, values) in rows.clone().zip(tile.rows(rows.len())) {
                            let at = row * padded_keys + panel * PANEL_COLUMNS;
                            scores.slice::<f32>(at, PANEL_COLUMNS).copy_from_slice(values);
                        }
                    });
                    for row in 0..rows {
                        softmax_row(scores.slice::<f32>(row * padded_keys, keys), self.scale());
                    }
                    let left = Left { start: scores.at(0), stride_bytes: 4 * padded_keys, rows };
                    let right = Right { start: packed_values.at(0), precision: Precision::F32, inputs: keys };
                    multiply(left, right, 0..value_panels, |tile, rows, panel| {
                        self.store(tile.rows(rows.len()), first + rows.start, panel);
                    });
                }
            }
        });
    }

    /// # Safety
    /// As [`attention`].
    unsafe fn in_bf16(&self) {
        const BF16: Precision = Precision::Bf16;
        let (keys, head_dim) = (self.sequence.len(), self.head_dim());
        // Elements of a padded query and of a padded row of probabilities.
        let (inner, outer) = (BF16.padded(head_dim), BF16.padded(keys));
        let (key_panels, value_panels) = (outer / PANEL_COLUMNS, head_dim.div_ceil(PANEL_COLUMNS));
        let needed_bytes = [
            2 * (outer + TILE_ROWS) * inner,
            2 * outer * inner,
            2 * value_panels * PANEL_COLUMNS * outer,
            // Scores, then probabilities with the rows that a tile reads behind the last.
            4 * QUERY_BLOCK_ROWS * outer + 2 * (QUERY_BLOCK_ROWS + TILE_ROWS) * outer,
        ];
        HeadScratch::with(needed_bytes, |scratch| {
            let [queries, packed_keys, packed_values, scores] =
                [&mut scratch.queries, &mut scratch.keys, &mut scratch.values, &mut scratch.scores]
                    .map(Block::start);
            let probabilities_at = 2 * QUERY_BLOCK_ROWS * outer;
            // SAFETY: as in `in_f32`; all reads of 32 rows lie inside the scratch.
            unsafe {
                // Keys pass through the place of the queries: rows of pairs, then transposed as words.
                for part in [1, 0] {
                    for token in 0..keys {
                        let out = queries.slice::<u16>(token * inner, inner);
                        to_bf16(self.part(token, part), &mut out[..head_dim]);
                        out[head_dim..].fill(0);
                    }
                    if part == 1 {
                        for panel in 0..key_panels {
                            let first = panel * PANEL_COLUMNS;
                            let out = packed_keys.slice::<u32>(first * inner / 2, PANEL_COLUMNS * inner / 2);
                            let source = queries.at::<u16>(first * inner).cast::<u8>();
                            transpose_words(out, source, 2 * inner, (keys - first).min(PANEL_COLUMNS));
                        }
                    }
                }
                for panel in 0..value_panels {
                    let columns = (head_dim - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
                    for pair in 0..outer / 2 {
                        let at = (panel * outer / 2 + pair) * PANEL_COLUMNS;
                        let out = packed_values.slice::<u32>(at, PANEL_COLUMNS);
                        let value = |key: usize| match key < keys {
                            true => &self.part(key, 2)[panel * PANEL_COLUMNS..][..columns],
                            false => &[],
                        };
                        pair_rows(out, value(2 * pair), value(2 * pair + 1));
                    }
                }
                for first in (0..keys).step_by(QUERY_BLOCK_ROWS) {
                    let rows = (keys - first).min(QUERY_BLOCK_ROWS);
                    let left = Left {
                        start: queries.at::<u16>(first * inner).cast(),
                        stride_bytes: 2 * inner,
                        rows,
                    };
                    let right = Right { start: packed_keys.at(0), precision: BF16, inputs: inner };
                    multiply(left, right, 0..key_panels, |tile, rows, panel| {
                        for (row, values) in rows.clone().zip(tile.rows(rows.len())) {
                            let at = row * outer + panel * PANEL_COLUMNS;
                            scores.slice::<f32>(at, PANEL_COLUMNS).copy_from_slice(values);
                        }
                    });
                    for row in 0..rows {
                        let row_scores = scores.slice::<f32>(row * outer, keys);
                        softmax_row(row_scores, self.scale());
                        let out = scores.slice::<u16>(probabilities_at + row * outer, outer);
                        to_bf16(row_scores, &mut out[..keys]);
                        out[keys..].fill(0);
                    }
                    let start = scores.at::<u16>(probabilities_at).cast();
                    let left = Left { start, stride_bytes: 2 * outer, rows };
                    let right = Right { start: packed_values.at(0), precision: BF16, inputs: outer };
                    multiply(left, right, 0..value_panels, |tile, rows, panel| {
                        self.store(tile.rows(rows.len()), first + rows.start, panel);
                    });
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::{available, with_path};
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

    /// Attention on one thread or as a team of two.
    fn run(
        threads: usize,
        qkv: &[f32],
        sequences: &[Range<usize>],
        shape: AttentionShape,
        precision: Precision,
    ) -> Vec<f32> {
        let mut qkv = qkv.to_vec();
        let mut context = vec![0.0; qkv.len() / 3];
        let (context_place, qkv_place) = (Place::of(&mut context), Place::of(&mut qkv));
        super::super::team::with_team(threads, |member| {
            // SAFETY: both places are borrowed for this call only; sequences lie inside.
            unsafe {
                attention(member, context_place, qkv_place, sequences, sequences[0].start, shape, precision)
            };
        });
        context
    }

    #[test]
    fn packed_attention_is_attention_and_does_not_see_its_neighbours() {
        let sequences = [0..2, 2..3, 3..140, 140..300, 300..317];
        for (hidden_dim, head_count) in [(24, 3), (80, 2), (64, 1)] {
            let shape = AttentionShape { hidden_dim, head_count };
            let qkv = noise(317 * 3 * hidden_dim);
            let mut wanted = vec![0.0; 317 * hidden_dim];
            sequences.iter().for_each(|sequence| plain(&qkv, sequence, shape, &mut wanted));
            for path in available() {
                for (precision, tolerance) in [(Precision::F32, 2e-6), (Precision::Bf16, 2e-2)] {
                    with_path(path, || {
                        let together = run(1, &qkv, &sequences, shape, precision);
                        for (found, wanted) in together.iter().zip(&wanted) {
                            let error = (f64::from(*found) - wanted).abs();
                            assert!(error < tolerance, "{path:?} {precision:?}: {found} instead of {wanted}");
                        }
                        for sequence in &sequences {
                            let own = sequence.start * 3 * hidden_dim..sequence.end * 3 * hidden_dim;
                            let alone = run(
                                1,
                                &qkv[own],
                                std::slice::from_ref(&(0..sequence.len())),
                                shape,
                                precision,
                            );
                            let part = &together[sequence.start * hidden_dim..sequence.end * hidden_dim];
                            assert_eq!(alone, part, "{path:?} {precision:?}: {sequence:?} differs alone");
                        }
                    });
                }
            }
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            for precision in [Precision::F32, Precision::Bf16] {
                let two = pool.install(|| run(2, &qkv, &sequences, shape, precision));
                assert_eq!(two, run(1, &qkv, &sequences, shape, precision), "{precision:?}: two threads");
            }
        }
    }
}

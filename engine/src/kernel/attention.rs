//! Attention over packed sequences of any lengths: no padding, so no mask. One task per sequence and head.
//!
//! Keys become panels of 32 keys and values panels of 32 columns, packed as weights are, so that both products are those of
//! `product`. In f32, or in bf16 with f32 sums and an f32 softmax.

#[cfg(target_arch = "x86_64")]
use super::avx512::{scale_narrowly, softmax_narrowly};
use super::product::{Left, PANEL_COLUMNS, Precision, Right, TILE_ROWS, Target, multiply, multiply_into};
use super::scratch::{Block, Place};
use super::team::Member;
use super::vector::{pair_rows, softmax_row, transpose_words};
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

/// Where contexts go, `[tokens, hidden_dim]`.
#[derive(Clone, Copy)]
pub(super) enum Context {
    /// As f32.
    Float(Place),
    /// As bf16, rows so many elements apart; only from bf16.
    Narrow(Place, usize),
}

/// Texts of a team: ranges of tokens, and the token that is the first in its places.
#[derive(Clone, Copy)]
pub(super) struct Sequences<'a> {
    pub(super) all: &'a [Range<usize>],
    pub(super) first_token: usize,
}

/// Memory of one thread for one head of one sequence.
struct HeadScratch {
    capacity_bytes: [usize; 4],
    /// Queries whose width had to be padded.
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
/// with queries, keys and values side by side, f32 or bf16 as `precision` says. `between` is called after each head.
///
/// # Safety
/// Sequences must be disjoint and, less their `first_token`, lie inside both places, with [`TILE_ROWS`] readable rows behind the last
/// in `qkv`; nobody else writes `qkv`, or touches `context`, but the other members of the team that call this with the same
/// arguments. bf16 is for paths that have it.
pub(super) unsafe fn attention(
    member: &Member<'_>,
    context: Context,
    qkv: Place,
    sequences: Sequences<'_>,
    shape: AttentionShape,
    precision: Precision,
    between: &dyn Fn(),
) {
    for task in member.tasks(sequences.all.len() * shape.head_count) {
        let sequence = &sequences.all[task / shape.head_count];
        let sequence = sequence.start - sequences.first_token..sequence.end - sequences.first_token;
        let head = Head { context, qkv, sequence, head: task % shape.head_count, shape };
        // SAFETY: a task writes the rows of its sequence in the columns of its head, and each (sequence, head) is one task of
        // one member, so no two tasks share an element. The rest is the caller's promise.
        unsafe {
            match precision {
                #[cfg(target_arch = "x86_64")]
                Precision::Bf16 => head.in_bf16(),
                _ => head.in_f32(),
            }
        }
        between();
    }
}

struct Head {
    context: Context,
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
    /// The token must be one of the sequence; nobody may write it meanwhile; `T` must be what `qkv` holds.
    unsafe fn part<'a, T>(&self, token: usize, part: usize) -> &'a [T] {
        // SAFETY: the caller's promise; the slice is only read.
        unsafe { self.qkv.slice::<T>(self.at(token, part), self.head_dim()) }
    }

    /// Writes a tile's rows, each times its factor, into the columns of this head.
    ///
    /// # Safety
    /// As [`attention`].
    unsafe fn store(&self, tile: &[[f32; PANEL_COLUMNS]], factors: &[f32], first_query: usize, panel: usize) {
        let columns = (self.head_dim() - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
        let column = self.head * self.head_dim() + panel * PANEL_COLUMNS;
        for ((row, values), factor) in tile.iter().enumerate().zip(factors) {
            let token = self.sequence.start + first_query + row;
            // SAFETY: these columns of these rows are this task's; the path has bf16 where it is asked for.
            unsafe {
                match self.context {
                    Context::Float(place) => {
                        let out = place.slice::<f32>(token * self.shape.hidden_dim + column, columns);
                        out.iter_mut().zip(values).for_each(|(out, value)| *out = value * factor);
                    }
                    #[cfg(target_arch = "x86_64")]
                    Context::Narrow(place, stride) => {
                        scale_narrowly(values, *factor, place.slice::<u16>(token * stride + column, columns));
                    }
                    #[cfg(not(target_arch = "x86_64"))]
                    Context::Narrow(..) => unreachable!("no path has bf16"),
                }
            }
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
                            .copy_from_slice(&self.part::<f32>(key, 2)[panel * PANEL_COLUMNS..][..columns]);
                        out[columns..].fill(0.0);
                    }
                }
                for first in (0..keys).step_by(QUERY_BLOCK_ROWS) {
                    let rows = (keys - first).min(QUERY_BLOCK_ROWS);
                    let start = self.qkv.at::<u8>(4 * self.at(first, 0));
                    let queries = Left { start, stride_bytes: row_bytes, rows };
                    let right =
                        Right { start: packed_keys.at(0), precision: Precision::F32, inputs: head_dim };
                    let out = Target { start: scores.at::<f32>(0), stride: padded_keys };
                    multiply_into(queries, right, 0..key_panels, out);
                    let mut factors = [0.0; QUERY_BLOCK_ROWS];
                    for (row, factor) in factors[..rows].iter_mut().enumerate() {
                        *factor = softmax_row(scores.slice::<f32>(row * padded_keys, keys), self.scale());
                    }
                    let left = Left { start: scores.at(0), stride_bytes: 4 * padded_keys, rows };
                    let right = Right { start: packed_values.at(0), precision: Precision::F32, inputs: keys };
                    multiply(left, right, 0..value_panels, |tile, rows, panel| {
                        self.store(tile.rows(rows.len()), &factors[rows.clone()], first + rows.start, panel);
                    });
                }
            }
        });
    }

    /// # Safety
    /// As [`attention`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn in_bf16(&self) {
        const BF16: Precision = Precision::Bf16;
        let (keys, head_dim) = (self.sequence.len(), self.head_dim());
        // Elements of a padded query and of a padded row of probabilities.
        let (inner, outer) = (BF16.padded(head_dim), BF16.padded(keys));
        let (key_panels, value_panels) = (outer / PANEL_COLUMNS, head_dim.div_ceil(PANEL_COLUMNS));
        // A head of whole steps is read where it lies.
        let is_whole = inner == head_dim;
        let needed_bytes = [
            if is_whole { 0 } else { 2 * (outer + TILE_ROWS) * inner },
            2 * outer * inner,
            2 * value_panels * PANEL_COLUMNS * outer,
            // Scores, then probabilities with the rows that a tile reads behind the last.
            4 * QUERY_BLOCK_ROWS * outer + 2 * (QUERY_BLOCK_ROWS + TILE_ROWS) * outer,
        ];
        HeadScratch::with(needed_bytes, |scratch| {
            let [padded, packed_keys, packed_values, scores] =
                [&mut scratch.queries, &mut scratch.keys, &mut scratch.values, &mut scratch.scores]
                    .map(Block::start);
            let probabilities_at = 2 * QUERY_BLOCK_ROWS * outer;
            // SAFETY: as in `in_f32`; all reads of 32 rows lie inside the scratch, or inside `qkv` and what is behind it.
            unsafe {
                // First byte and distance of rows of queries or keys.
                let rows_of = |part: usize| {
                    if is_whole {
                        return (
                            self.qkv.at::<u16>(self.at(0, part)).cast::<u8>(),
                            6 * self.shape.hidden_dim,
                        );
                    }
                    for token in 0..keys {
                        let out = padded.slice::<u16>(token * inner, inner);
                        out[..head_dim].copy_from_slice(self.part(token, part));
                        out[head_dim..].fill(0);
                    }
                    (padded.at::<u8>(0), 2 * inner)
                };
                // Keys before queries: padded, both take the same place.
                let (source, stride_bytes) = rows_of(1);
                for panel in 0..key_panels {
                    let first = panel * PANEL_COLUMNS;
                    let out = packed_keys.slice::<u32>(first * inner / 2, PANEL_COLUMNS * inner / 2);
                    let rows = (keys - first).min(PANEL_COLUMNS);
                    transpose_words(out, source.add(first * stride_bytes), stride_bytes, rows);
                }
                for panel in 0..value_panels {
                    let columns = (head_dim - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
                    for pair in 0..outer / 2 {
                        let at = (panel * outer / 2 + pair) * PANEL_COLUMNS;
                        let out = packed_values.slice::<u32>(at, PANEL_COLUMNS);
                        let value = |key: usize| match key < keys {
                            true => &self.part::<u16>(key, 2)[panel * PANEL_COLUMNS..][..columns],
                            false => &[],
                        };
                        pair_rows(out, value(2 * pair), value(2 * pair + 1));
                    }
                }
                let (source, stride_bytes) = rows_of(0);
                for first in (0..keys).step_by(QUERY_BLOCK_ROWS) {
                    let rows = (keys - first).min(QUERY_BLOCK_ROWS);
                    let left = Left { start: source.add(first * stride_bytes), stride_bytes, rows };
                    let right = Right { start: packed_keys.at(0), precision: BF16, inputs: inner };
                    let out = Target { start: scores.at::<f32>(0), stride: outer };
                    multiply_into(left, right, 0..key_panels, out);
                    let mut factors = [0.0; QUERY_BLOCK_ROWS];
                    for (row, factor) in factors[..rows].iter_mut().enumerate() {
                        let out = scores.slice::<u16>(probabilities_at + row * outer, outer);
                        *factor = softmax_narrowly(scores.slice::<f32>(row * outer, keys), self.scale(), out);
                    }
                    let start = scores.at::<u16>(probabilities_at).cast();
                    let left = Left { start, stride_bytes: 2 * outer, rows };
                    let right = Right { start: packed_values.at(0), precision: BF16, inputs: outer };
                    multiply(left, right, 0..value_panels, |tile, rows, panel| {
                        self.store(tile.rows(rows.len()), &factors[rows.clone()], first + rows.start, panel);
                    });
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpu::{available, path, with_path};
    use super::super::vector::to_bf16;
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
        let width = shape.hidden_dim;
        let mut context = vec![0.0f32; qkv.len() / 3];
        let place = Place::of(&mut context);
        let mut words = Block::zeroed(4 * (qkv.len() + TILE_ROWS * 3 * width));
        let words = words.start();
        let mut halves = Block::zeroed(2 * context.len());
        let halves = halves.start();
        // SAFETY: all blocks have room for these elements, and nobody else has them yet.
        unsafe {
            match precision {
                Precision::F32 => words.slice::<f32>(0, qkv.len()).copy_from_slice(qkv),
                _ => to_bf16(qkv, words.slice::<u16>(0, qkv.len())),
            }
        }
        let sequences = Sequences { all: sequences, first_token: sequences[0].start };
        super::super::team::with_team(threads, |member| {
            // SAFETY: all places are borrowed for this call only; sequences lie inside.
            unsafe {
                attention(member, Context::Float(place), words, sequences, shape, precision, &|| {});
                if precision == Precision::Bf16 {
                    let narrow = Context::Narrow(halves, width);
                    attention(member, narrow, words, sequences, shape, precision, &|| {});
                }
            };
        });
        if precision == Precision::Bf16 {
            let mut wanted = vec![0; context.len()];
            to_bf16(&context, &mut wanted);
            // SAFETY: as above; the team is done.
            assert_eq!(unsafe { halves.slice::<u16>(0, context.len()) }, wanted);
        }
        context
    }

    #[test]
    fn packed_attention_is_attention_and_does_not_see_its_neighbours() {
        let sequences = [0..2, 2..3, 3..140, 140..300, 300..317];
        for (hidden_dim, head_count) in [(24, 3), (80, 2), (64, 1), (64, 2)] {
            let shape = AttentionShape { hidden_dim, head_count };
            let qkv = noise(317 * 3 * hidden_dim);
            let mut wanted = vec![0.0; 317 * hidden_dim];
            sequences.iter().for_each(|sequence| plain(&qkv, sequence, shape, &mut wanted));
            for path in available() {
                for (precision, tolerance) in [(Precision::F32, 2e-6), (Precision::Bf16, 2e-2)] {
                    if precision == Precision::Bf16 && !path.has_bf16() {
                        continue;
                    }
                    with_path(path, || {
                        let together = run(1, &qkv, &sequences, shape, precision);
                        for (found, wanted) in together.iter().zip(&wanted) {
                            let error = (f64::from(*found) - wanted).abs();
                            assert!(error < tolerance, "{path:?} {precision:?}: {found} instead of {wanted}");
                        }
                        for sequence in &sequences {
                            let own = sequence.start * 3 * hidden_dim..sequence.end * 3 * hidden_dim;
                            let whole = 0..sequence.len();
                            let alone = run(1, &qkv[own], std::slice::from_ref(&whole), shape, precision);
                            let part = &together[sequence.start * hidden_dim..sequence.end * hidden_dim];
                            assert_eq!(alone, part, "{path:?} {precision:?}: {sequence:?} differs alone");
                        }
                    });
                }
            }
            let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
            for precision in [Precision::F32, Precision::Bf16] {
                if precision == Precision::Bf16 && !path().has_bf16() {
                    continue;
                }
                let two = pool.install(|| run(2, &qkv, &sequences, shape, precision));
                assert_eq!(two, run(1, &qkv, &sequences, shape, precision), "{precision:?}: two threads");
            }
        }
    }
}

//! Attention over packed sequences of any lengths: no padding. One task per sequence and head of keys and values. Where tokens
//! do not see all others, panels of keys that none of a block's queries sees are left out.
//!
//! Keys become panels of 32 keys and values panels of 32 columns, packed as weights are, so that both products are those of
//! `product`. In f32, or in bf16 with f32 sums and an f32 softmax.

#[cfg(target_arch = "x86_64")]
use super::avx512::{scale_narrowly, softmax_narrowly};
use super::product::{Left, PANEL_COLUMNS, Precision, Right, TILE_ROWS, Target, multiply, multiply_into};
use super::scratch::{Block, Place};
use super::team::Member;
use super::vector::{add_scaled, pair_rows, softmax_row, transpose_words};
use crate::packing::Packing;
use std::cell::Cell;
use std::ops::Range;

/// Queries whose scores are in memory at once: whole tiles of every path.
const QUERY_BLOCK_ROWS: usize = 96;

/// Tokens of a text from which on a head takes too long to have a break only behind it.
const LONG_TOKENS: usize = 1024;

/// A score that no softmax sees, whatever the others are.
const MASKED: f32 = -1e30;

/// Shape of an attention block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    /// Number of heads.
    pub(crate) head_count: usize,
    /// Number of key and value heads; divides `head_count`, and so many heads share one.
    pub(crate) kv_head_count: usize,
    /// Width of a head.
    pub(crate) head_dim: usize,
}

impl AttentionShape {
    /// Width of all contexts side by side.
    pub(crate) fn context_dim(&self) -> usize {
        self.head_count * self.head_dim
    }

    /// Width of queries, keys and values side by side.
    pub(crate) fn qkv_dim(&self) -> usize {
        (self.head_count + 2 * self.kv_head_count) * self.head_dim
    }

    /// Whether there can be such a block.
    pub(crate) fn is_possible(&self) -> bool {
        self.head_dim > 0 && self.kv_head_count > 0 && self.head_count.is_multiple_of(self.kv_head_count)
    }
}

/// How far a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Tokens before itself.
    pub(crate) before: usize,
    /// Tokens behind itself.
    pub(crate) after: usize,
}

impl Reach {
    /// All tokens of the text.
    pub(crate) const ALL: Reach = Reach { before: usize::MAX, after: usize::MAX };

    /// Keys that a query sees.
    fn of(self, query: usize, keys: usize) -> Range<usize> {
        query.saturating_sub(self.before)..query.saturating_add(self.after).saturating_add(1).min(keys)
    }
}

/// What attention does besides products and softmax.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scores<'a> {
    /// How far tokens see.
    pub(super) reach: Reach,
    /// `[heads, 2 * positions - 1]`, added to the scaled scores by `key - query + positions - 1`; empty when nothing is.
    pub(super) distance_bias: &'a [f32],
}

/// Where contexts go, `[tokens, context_dim]`.
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
    static SCRATCH: Cell<Option<HeadScratch>> = const { Cell::new(None) };
}

impl HeadScratch {
    fn with<T>(needed_bytes: [usize; 4], work: impl FnOnce(&mut HeadScratch) -> T) -> T {
        // Taken out while it is used: in a break the thread computes something else, with memory of its own.
        let fits = |kept: &HeadScratch| {
            kept.capacity_bytes.iter().zip(needed_bytes).all(|(has, needs)| *has >= needs)
        };
        let mut scratch = match SCRATCH.take() {
            Some(scratch) if fits(&scratch) => scratch,
            old => {
                let had = old.map_or([0; 4], |old| old.capacity_bytes);
                let mut capacity_bytes = needed_bytes;
                capacity_bytes.iter_mut().zip(had).for_each(|(bytes, had)| *bytes = had.max(*bytes));
                let [queries, keys, values, scores] = capacity_bytes.map(Block::zeroed);
                HeadScratch { capacity_bytes, queries, keys, values, scores }
            }
        };
        let result = work(&mut scratch);
        SCRATCH.set(Some(scratch));
        result
    }
}

/// Gives back this thread's memory.
pub(super) fn release_scratch() {
    SCRATCH.set(None);
}

/// This member's heads of `context[t] = softmax(q[t] · kᵀ / √d + bias) · v` inside each sequence. `qkv` is `[tokens, qkv_dim]` with
/// queries, keys and values side by side, f32 or bf16 as `precision` says. `between` is called after each head,
/// and in long texts after each block of queries.
///
/// # Safety
/// Sequences must be disjoint and, less their `first_token`, lie inside both places, with [`TILE_ROWS`] readable rows behind the last
/// in `qkv`; nobody else writes `qkv`, or touches `context`, but the other members of the team that call this with the same
/// arguments. bf16 is for paths that have it. The shape must be possible, and a bias as long as the longest sequence needs.
#[allow(clippy::too_many_arguments, reason = "each is its own thing")]
pub(super) unsafe fn attention(
    member: &Member<'_>,
    context: Context,
    qkv: Place,
    sequences: Sequences<'_>,
    shape: AttentionShape,
    scores: Scores<'_>,
    precision: Precision,
    between: &dyn Fn(),
) {
    for task in member.tasks(sequences.all.len() * shape.kv_head_count) {
        let sequence = &sequences.all[task / shape.kv_head_count];
        let sequence = sequence.start - sequences.first_token..sequence.end - sequences.first_token;
        let heads = Heads { context, qkv, sequence, kv_head: task % shape.kv_head_count, shape, scores };
        // SAFETY: a task writes the rows of its sequence in the columns of its heads, and each (sequence, head) is one task of
        // one member, so no two tasks share an element. The rest is the caller's promise.
        unsafe {
            match precision {
                #[cfg(target_arch = "x86_64")]
                Precision::Bf16 => heads.in_bf16(between),
                _ => heads.in_f32(between),
            }
        }
        between();
    }
}

/// One head of keys and values of one sequence, with the heads of queries that share it.
struct Heads<'a> {
    context: Context,
    qkv: Place,
    sequence: Range<usize>,
    kv_head: usize,
    shape: AttentionShape,
    scores: Scores<'a>,
}

/// Queries of a block, and the keys that any of them sees, from a whole panel on.
struct QueryBlock {
    first: usize,
    rows: usize,
    seen: Range<usize>,
}

impl Heads<'_> {
    fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    /// Heads of queries that share these keys and values.
    fn query_heads(&self) -> Range<usize> {
        let share = self.shape.head_count / self.shape.kv_head_count;
        self.kv_head * share..(self.kv_head + 1) * share
    }

    fn query_blocks(&self) -> impl Iterator<Item = QueryBlock> + use<> {
        let (keys, reach) = (self.sequence.len(), self.scores.reach);
        (0..keys).step_by(QUERY_BLOCK_ROWS).map(move |first| {
            let rows = (keys - first).min(QUERY_BLOCK_ROWS);
            let start = reach.of(first, keys).start / PANEL_COLUMNS * PANEL_COLUMNS;
            QueryBlock { first, rows, seen: start..reach.of(first + rows - 1, keys).end }
        })
    }

    /// Adds the bias to a query's scores and takes out what it does not see; gives the factor that scores still lack. `row` are the
    /// scores of the keys in `seen`.
    #[inline]
    fn adjust(&self, row: &mut [f32], query: usize, seen: &Range<usize>, head: usize) -> f32 {
        let Scores { reach, distance_bias } = self.scores;
        let mut scale = self.scale();
        if !distance_bias.is_empty() {
            let of_head = distance_bias.len() / self.shape.head_count;
            let first = head * of_head + of_head / 2 + seen.start - query;
            add_scaled(row, scale, &distance_bias[first..first + row.len()]);
            scale = 1.0;
        }
        if reach != Reach::ALL {
            let own = reach.of(query, self.sequence.len());
            row[..own.start.saturating_sub(seen.start)].fill(MASKED);
            row[own.end - seen.start..].fill(MASKED);
        }
        scale
    }

    /// Index of the first number of a head of queries of a token, counted from the sequence's first.
    fn query_at(&self, token: usize, head: usize) -> usize {
        (self.sequence.start + token) * self.shape.qkv_dim() + head * self.head_dim()
    }

    /// Index of the first number of the keys (0) or values (1) of a token, counted from the sequence's first.
    fn at(&self, token: usize, part: usize) -> usize {
        let head = self.shape.head_count + part * self.shape.kv_head_count + self.kv_head;
        self.query_at(token, head)
    }

    /// Numbers of a head that begin at an index.
    ///
    /// # Safety
    /// They must be of a token of the sequence; nobody may write them meanwhile; `T` must be what `qkv` holds.
    unsafe fn numbers<'a, T>(&self, at: usize) -> &'a [T] {
        // SAFETY: the caller's promise; the slice is only read.
        unsafe { self.qkv.slice::<T>(at, self.head_dim()) }
    }

    /// Writes a tile's rows, each times its factor, into the columns of this head.
    ///
    /// # Safety
    /// As [`attention`].
    unsafe fn store(
        &self,
        tile: &[[f32; PANEL_COLUMNS]],
        factors: &[f32],
        first_query: usize,
        (head, panel): (usize, usize),
    ) {
        let columns = (self.head_dim() - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
        let column = head * self.head_dim() + panel * PANEL_COLUMNS;
        for ((row, values), factor) in tile.iter().enumerate().zip(factors) {
            let token = self.sequence.start + first_query + row;
            // SAFETY: these columns of these rows are this task's; the path has bf16 where it is asked for.
            unsafe {
                match self.context {
                    Context::Float(place) => {
                        let out = place.slice::<f32>(token * self.shape.context_dim() + column, columns);
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
    unsafe fn in_f32(&self, between: &dyn Fn()) {
        let (keys, head_dim) = (self.sequence.len(), self.head_dim());
        let padded_keys = keys.next_multiple_of(PANEL_COLUMNS);
        let (key_panels, value_panels) = (padded_keys / PANEL_COLUMNS, head_dim.div_ceil(PANEL_COLUMNS));
        let floats =
            [0, padded_keys * head_dim, value_panels * PANEL_COLUMNS * keys, QUERY_BLOCK_ROWS * padded_keys];
        HeadScratch::with(floats.map(|count| 4 * count), |scratch| {
            let [packed_keys, packed_values, scores] =
                [&mut scratch.keys, &mut scratch.values, &mut scratch.scores].map(Block::start);
            let row_bytes = 4 * self.shape.qkv_dim();
            // SAFETY: the scratch is this thread's, with room for all panels; queries, keys and values are those of this
            // sequence, which nobody writes now (the caller's promise).
            unsafe {
                for panel in 0..key_panels {
                    let first = panel * PANEL_COLUMNS;
                    let out = packed_keys.slice::<u32>(first * head_dim, PANEL_COLUMNS * head_dim);
                    let source = self.qkv.at::<u8>(4 * self.at(first, 0));
                    transpose_words(out, source, row_bytes, (keys - first).min(PANEL_COLUMNS));
                }
                for panel in 0..value_panels {
                    let columns = (head_dim - panel * PANEL_COLUMNS).min(PANEL_COLUMNS);
                    for key in 0..keys {
                        let out =
                            packed_values.slice::<f32>((panel * keys + key) * PANEL_COLUMNS, PANEL_COLUMNS);
                        let values = self.numbers::<f32>(self.at(key, 1));
                        out[..columns].copy_from_slice(&values[panel * PANEL_COLUMNS..][..columns]);
                        out[columns..].fill(0.0);
                    }
                }
                for head in self.query_heads() {
                    for QueryBlock { first, rows, seen } in self.query_blocks() {
                        let start = self.qkv.at::<u8>(4 * self.query_at(first, head));
                        let queries = Left { start, stride_bytes: row_bytes, rows };
                        let right = Right::whole(packed_keys.at(0), Precision::F32, head_dim);
                        let out = Target { start: scores.at::<f32>(0), stride: padded_keys };
                        let panels = seen.start / PANEL_COLUMNS..seen.end.div_ceil(PANEL_COLUMNS);
                        multiply_into(queries, right, panels, out);
                        let mut factors = [0.0; QUERY_BLOCK_ROWS];
                        for (row, factor) in factors[..rows].iter_mut().enumerate() {
                            let values = scores.slice::<f32>(row * padded_keys + seen.start, seen.len());
                            let scale = self.adjust(values, first + row, &seen, head);
                            *factor = softmax_row(values, scale);
                        }
                        let left = Left {
                            start: scores.at::<f32>(seen.start).cast(),
                            stride_bytes: 4 * padded_keys,
                            rows,
                        };
                        let right = Right {
                            start: packed_values.at::<f32>(seen.start * PANEL_COLUMNS).cast(),
                            precision: Precision::F32,
                            inputs: seen.len(),
                            panel_inputs: keys,
                        };
                        multiply(left, right, 0..value_panels, |tile, rows, panel| {
                            let tile = tile.rows(rows.len());
                            self.store(tile, &factors[rows.clone()], first + rows.start, (head, panel));
                        });
                        if keys > LONG_TOKENS {
                            between();
                        }
                    }
                }
            }
        });
    }

    /// # Safety
    /// As [`attention`].
    #[cfg(target_arch = "x86_64")]
    unsafe fn in_bf16(&self, between: &dyn Fn()) {
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
                // First byte and distance of rows of queries or keys, whose first number is at `at(token)`.
                let rows_of = |at: &dyn Fn(usize) -> usize| {
                    if is_whole {
                        return (self.qkv.at::<u16>(at(0)).cast::<u8>(), 2 * self.shape.qkv_dim());
                    }
                    for token in 0..keys {
                        let out = padded.slice::<u16>(token * inner, inner);
                        out[..head_dim].copy_from_slice(self.numbers(at(token)));
                        out[head_dim..].fill(0);
                    }
                    (padded.at::<u8>(0), 2 * inner)
                };
                // Keys before queries: padded, both take the same place.
                let (source, stride_bytes) = rows_of(&|token| self.at(token, 0));
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
                            true => &self.numbers::<u16>(self.at(key, 1))[panel * PANEL_COLUMNS..][..columns],
                            false => &[],
                        };
                        pair_rows(out, value(2 * pair), value(2 * pair + 1));
                    }
                }
                for head in self.query_heads() {
                    let (source, stride_bytes) = rows_of(&|token| self.query_at(token, head));
                    for QueryBlock { first, rows, seen } in self.query_blocks() {
                        let left = Left { start: source.add(first * stride_bytes), stride_bytes, rows };
                        let right = Right::whole(packed_keys.at(0), BF16, inner);
                        let out = Target { start: scores.at::<f32>(0), stride: outer };
                        let panels = seen.start / PANEL_COLUMNS..seen.end.div_ceil(PANEL_COLUMNS);
                        multiply_into(left, right, panels.clone(), out);
                        let padded_seen = panels.len() * PANEL_COLUMNS;
                        let mut factors = [0.0; QUERY_BLOCK_ROWS];
                        for (row, factor) in factors[..rows].iter_mut().enumerate() {
                            let at = row * outer + seen.start;
                            let out = scores.slice::<u16>(probabilities_at + at, padded_seen);
                            let values = scores.slice::<f32>(at, seen.len());
                            let scale = self.adjust(values, first + row, &seen, head);
                            *factor = softmax_narrowly(values, scale, out);
                        }
                        let start = scores.at::<u16>(probabilities_at + seen.start).cast();
                        let left = Left { start, stride_bytes: 2 * outer, rows };
                        let right = Right {
                            start: packed_values.at::<u32>(seen.start / 2 * PANEL_COLUMNS).cast(),
                            precision: BF16,
                            inputs: padded_seen,
                            panel_inputs: outer,
                        };
                        multiply(left, right, 0..value_panels, |tile, rows, panel| {
                            let tile = tile.rows(rows.len());
                            self.store(tile, &factors[rows.clone()], first + rows.start, (head, panel));
                        });
                        if keys > LONG_TOKENS {
                            between();
                        }
                    }
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

    const PLAIN: Scores<'static> = Scores { reach: Reach::ALL, distance_bias: &[] };

    fn shape(head_count: usize, kv_head_count: usize, head_dim: usize) -> AttentionShape {
        AttentionShape { head_count, kv_head_count, head_dim }
    }

    /// Attention by its definition, in double precision.
    fn plain(
        qkv: &[f32],
        sequence: &Range<usize>,
        shape: AttentionShape,
        scores: Scores<'_>,
        out: &mut [f64],
    ) {
        let (width, head_dim) = (shape.context_dim(), shape.head_dim);
        let share = shape.head_count / shape.kv_head_count;
        let at = |token: usize, head: usize, column: usize| {
            f64::from(qkv[token * shape.qkv_dim() + head * head_dim + column])
        };
        let of_head = scores.distance_bias.len() / shape.head_count;
        for query in sequence.clone() {
            for head in 0..shape.head_count {
                let (keys, values) =
                    (shape.head_count + head / share, shape.head_count + shape.kv_head_count + head / share);
                let weights: Vec<f64> = sequence
                    .clone()
                    .map(|key| {
                        let back = query.saturating_sub(key);
                        let on = key.saturating_sub(query);
                        if back > scores.reach.before || on > scores.reach.after {
                            return 0.0;
                        }
                        let score: f64 = (0..head_dim).map(|c| at(query, head, c) * at(key, keys, c)).sum();
                        let bias = match of_head {
                            0 => 0.0,
                            _ => scores.distance_bias[head * of_head + of_head / 2 + key - query].into(),
                        };
                        (score / (head_dim as f64).sqrt() + bias).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for column in 0..head_dim {
                    out[query * width + head * head_dim + column] = sequence
                        .clone()
                        .zip(&weights)
                        .map(|(key, weight)| weight / total * at(key, values, column))
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
        scores: Scores<'_>,
        precision: Precision,
    ) -> Vec<f32> {
        let width = shape.context_dim();
        let mut context = vec![0.0f32; qkv.len() / shape.qkv_dim() * width];
        let place = Place::of(&mut context);
        let mut words = Block::zeroed(4 * (qkv.len() + TILE_ROWS * shape.qkv_dim()));
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
                attention(member, Context::Float(place), words, sequences, shape, scores, precision, &|| {});
                if precision == Precision::Bf16 {
                    let narrow = Context::Narrow(halves, width);
                    attention(member, narrow, words, sequences, shape, scores, precision, &|| {});
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
        // Relative positions of up to 200 tokens.
        let bias = noise(2 * 399);
        let causal = Scores { reach: Reach { before: usize::MAX, after: 0 }, ..PLAIN };
        let window = Scores { reach: Reach { before: 40, after: 40 }, ..PLAIN };
        let narrow_window = Scores { reach: Reach { before: 3, after: 0 }, ..PLAIN };
        let relative = Scores { distance_bias: &bias, ..PLAIN };
        for (shape, scores) in [
            (shape(3, 3, 8), PLAIN),
            (shape(2, 2, 40), PLAIN),
            (shape(1, 1, 64), PLAIN),
            (shape(2, 2, 32), PLAIN),
            (shape(4, 2, 32), causal),
            (shape(3, 1, 24), causal),
            (shape(2, 2, 32), window),
            (shape(2, 1, 20), narrow_window),
            (shape(2, 2, 32), relative),
        ] {
            let (width, qkv_dim) = (shape.context_dim(), shape.qkv_dim());
            let qkv = noise(317 * qkv_dim);
            let mut wanted = vec![0.0; 317 * width];
            sequences.iter().for_each(|sequence| plain(&qkv, sequence, shape, scores, &mut wanted));
            for path in available() {
                for (precision, tolerance) in [(Precision::F32, 2e-6), (Precision::Bf16, 2e-2)] {
                    if precision == Precision::Bf16 && !path.has_bf16() {
                        continue;
                    }
                    with_path(path, || {
                        let together = run(1, &qkv, &sequences, shape, scores, precision);
                        for (found, wanted) in together.iter().zip(&wanted) {
                            let error = (f64::from(*found) - wanted).abs();
                            assert!(
                                error < tolerance,
                                "{path:?} {precision:?} {shape:?} {:?}: {found} instead of {wanted}",
                                scores.reach
                            );
                        }
                        for sequence in &sequences {
                            let own = sequence.start * qkv_dim..sequence.end * qkv_dim;
                            let whole = 0..sequence.len();
                            let whole = std::slice::from_ref(&whole);
                            let alone = run(1, &qkv[own], whole, shape, scores, precision);
                            let part = &together[sequence.start * width..sequence.end * width];
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
                let two = pool.install(|| run(2, &qkv, &sequences, shape, scores, precision));
                let one = run(1, &qkv, &sequences, shape, scores, precision);
                assert_eq!(two, one, "{precision:?}: two threads");
            }
        }
    }
}

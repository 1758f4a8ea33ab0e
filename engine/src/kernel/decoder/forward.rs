//! The layers of a stack, step by step, as one member of a team does them. Every step writes rows or columns that belong to one member.

use super::super::cpu::{CpuPath, path};
use super::super::scratch::Place;
use super::super::team::Member;
use super::super::vector::{exp, fma, gelu_tanh, per_cpu_unsafe};
use super::attention::{Heads, attend};
use super::product::{Left, Out, Places};
use super::weights::{Dense, Feed, Kept, Sees, StackLayer, StackWeights, Step};
use std::cell::RefCell;
use std::ops::Range;

/// Numbers that one step of a loop handles; sums keep this many partial sums whatever the CPU's width.
const LANES: usize = 16;

thread_local! {
    /// Scores of one row, kept between calls.
    static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Rows on their way through some layers.
pub(super) struct Pass<'a> {
    pub(super) stack: &'a StackWeights<'a>,
    pub(super) step: &'a Step<'a>,
    pub(super) kept: &'a [Kept<'a>],
    /// Where the sequences' caches lie.
    pub(super) caches: &'a [Place],
    pub(super) hidden: Place,
    pub(super) work: Places,
}

// SAFETY: the mutable borrows in `kept` are used through `caches` alone, at places that are disjoint for each member.
unsafe impl Sync for Pass<'_> {}

impl Pass<'_> {
    /// # Safety
    /// Everything must have been checked; hidden state, caches and scratch have room and are touched by nobody but the members
    /// of one team, which all call this.
    pub(super) unsafe fn run(&self, member: &Member<'_>) {
        let shape = &self.stack.shape;
        let rows = member.part(self.step.rows.len(), 1);
        for index in self.step.layers.clone() {
            let layer = &self.stack.layers[index];
            // SAFETY: each step writes rows or columns that `part`, `tasks` or the panels give to one member only, and reads what was
            // written before the last meeting, or what this member wrote itself.
            unsafe {
                self.normed(layer.norm, rows.clone());
                member.meet();
                self.products(member, &layer.qkv, shape.qkv_width());
                member.meet();
                self.place_keys(layer, index, rows.clone());
                member.meet();
                self.attention(member, index, shape.qkv_width());
                member.meet();
                self.add(member, &layer.output, rows.clone());
                if let Some(cross) = &layer.cross {
                    self.normed(cross.norm, rows.clone());
                    member.meet();
                    self.products(member, &[cross.query], shape.query_width());
                    member.meet();
                    self.cross_attention(member, index);
                    member.meet();
                    self.add(member, &cross.output, rows.clone());
                }
                self.normed(layer.wide_norm, rows.clone());
                member.meet();
                self.products(member, &layer.up, self.stack.up_width());
                member.meet();
                self.activate(rows.clone());
                self.add(member, &layer.down, rows.clone());
            }
        }
    }

    /// Normed rows of the hidden state as the next product's left side.
    ///
    /// # Safety
    /// The rows must be this member's.
    unsafe fn normed(&self, weight: &[f32], rows: Range<usize>) {
        let (width, eps) = (self.stack.shape.width, self.stack.shape.eps);
        for row in rows.clone() {
            // SAFETY: the caller's promise.
            unsafe {
                let out = self.work.floats.slice::<f32>(row * width, width);
                out.copy_from_slice(self.hidden.slice::<f32>(row * width, width));
                rms_row(out, weight, eps);
            }
        }
        // SAFETY: as above; these rows were just written by this member.
        unsafe { self.work.narrow(self.work.floats, width, rows) };
    }

    /// Products that read the same rows, side by side into the results.
    ///
    /// # Safety
    /// The left side must be complete.
    unsafe fn products(&self, member: &Member<'_>, list: &[Dense<'_>], stride: usize) {
        let mut column = 0;
        for dense in list {
            let left = Left { floats: self.work.floats, rows: self.step.rows.len() };
            let out = Out { place: self.work.results, stride, column, add: false };
            // SAFETY: the caller's promise; the results have room for the widest of lists.
            unsafe { self.work.product(member, dense, left, out) };
            column += dense.outputs;
        }
    }

    /// A product of what lies in `floats`, added to the hidden state; ends with a meeting.
    ///
    /// # Safety
    /// This member's rows of `floats` must be complete if it wrote them in the step before, all of them behind a meeting.
    unsafe fn add(&self, member: &Member<'_>, dense: &Dense<'_>, rows: Range<usize>) {
        // SAFETY: rows of one member each, then columns of one member each.
        unsafe {
            self.work.narrow(self.work.floats, dense.inputs, rows);
            member.meet();
            let left = Left { floats: self.work.floats, rows: self.step.rows.len() };
            let width = self.stack.shape.width;
            self.work.product(
                member,
                dense,
                left,
                Out { place: self.hidden, stride: width, column: 0, add: true },
            );
            member.meet();
        }
    }

    /// Norms and rotates queries and keys, and puts keys and values where their sequence keeps them.
    ///
    /// # Safety
    /// The rows must be this member's, and queries, keys and values complete.
    unsafe fn place_keys(&self, layer: &StackLayer<'_>, index: usize, rows: Range<usize>) {
        let shape = &self.stack.shape;
        let (head_dim, queries, keys) = (shape.head_dim, shape.query_width(), shape.key_width());
        for row in rows {
            // SAFETY: the caller's promise; slots of rows are distinct.
            let (qkv, kept) = unsafe {
                let at = self.step.rows[row];
                let slot =
                    self.layer_start(index, self.kept[at.sequence].slots) + at.slot * shape.slot_floats();
                (
                    self.work.results.slice::<f32>(row * shape.qkv_width(), shape.qkv_width()),
                    self.caches[at.sequence].slice::<f32>(slot, shape.slot_floats()),
                )
            };
            let angles = self.step.angles.get(row * head_dim..(row + 1) * head_dim);
            for (head, values) in qkv[..queries + keys].chunks_exact_mut(head_dim).enumerate() {
                if let Some((query_norm, key_norm)) = layer.head_norms {
                    rms_row(values, if head < shape.heads { query_norm } else { key_norm }, shape.eps);
                }
                if let Some(angles) = angles {
                    rotate(values, angles, shape.rotates_neighbours);
                }
            }
            kept.copy_from_slice(&qkv[queries..]);
        }
    }

    /// First float of a layer in a cache of so many slots.
    fn layer_start(&self, index: usize, slots: usize) -> usize {
        if self.stack.shape.keeps_layers { index * slots * self.stack.shape.slot_floats() } else { 0 }
    }

    /// # Safety
    /// Queries, and what the rows see, must be complete; contexts are nobody else's.
    unsafe fn attention(&self, member: &Member<'_>, index: usize, query_stride: usize) {
        let shape = &self.stack.shape;
        for task in member.tasks(self.step.rows.len() * shape.kv_heads) {
            let (row, head) = (task / shape.kv_heads, task % shape.kv_heads);
            let at = &self.step.rows[row];
            let start = self.layer_start(index, self.kept[at.sequence].slots);
            let bias = self.step.bias.map(|bias| {
                let span = bias.values.len() / shape.heads;
                &bias.values[head * span + bias.center - at.position..][..at.sees.count()]
            });
            // SAFETY: the start of a layer in a cache whose length was checked.
            let keys = unsafe { self.caches[at.sequence].at::<f32>(0).add(start) };
            // SAFETY: a task is one member's; slots were checked.
            unsafe { self.heads(row, head, keys, at.sees, query_stride, bias) };
        }
    }

    /// # Safety
    /// As [`Pass::attention`].
    unsafe fn cross_attention(&self, member: &Member<'_>, index: usize) {
        let shape = &self.stack.shape;
        for task in member.tasks(self.step.rows.len() * shape.kv_heads) {
            let (row, head) = (task / shape.kv_heads, task % shape.kv_heads);
            let Some(cross) = self.kept[self.step.rows[row].sequence].cross else { continue };
            let layer_floats = cross.len() / self.stack.layers.len();
            let keys = cross[index * layer_floats..].as_ptr();
            let sees = Sees::First(layer_floats / shape.slot_floats());
            // SAFETY: a task is one member's; the memory's length was checked.
            unsafe { self.heads(row, head, keys, sees, shape.query_width(), None) };
        }
    }

    /// # Safety
    /// `keys` must be the first slot of memory that has all slots that are seen.
    unsafe fn heads(
        &self,
        row: usize,
        head: usize,
        keys: *const f32,
        sees: Sees<'_>,
        query_stride: usize,
        bias: Option<&[f32]>,
    ) {
        let shape = &self.stack.shape;
        let count = shape.heads / shape.kv_heads;
        let first = head * count * shape.head_dim;
        SCORES.with_borrow_mut(|scores| {
            let needed = count * sees.count();
            if scores.len() < needed {
                scores.resize(needed, 0.0);
            }
            // SAFETY: the caller's promise; queries and contexts of a row and head lie inside the scratch.
            unsafe {
                let heads = Heads {
                    queries: self.work.results.at::<f32>(row * query_stride + first),
                    count,
                    head_dim: shape.head_dim,
                    keys: keys.add(head * shape.head_dim),
                    values: keys.add(shape.key_width() + head * shape.head_dim),
                    stride: shape.slot_floats(),
                    sees,
                    scale: shape.scale,
                    bias,
                    out: self.work.floats.at::<f32>(row * shape.query_width() + first),
                };
                attend(&heads, &mut scores[..needed]);
            }
        });
    }

    /// What the feed-forward block's first product gave, activated, as the next product's left side.
    ///
    /// # Safety
    /// The rows must be this member's and complete.
    unsafe fn activate(&self, rows: Range<usize>) {
        let (wide, up) = (self.stack.shape.wide, self.stack.up_width());
        for row in rows {
            // SAFETY: the caller's promise.
            unsafe {
                let source = self.work.results.slice::<f32>(row * up, up);
                let out = self.work.floats.slice::<f32>(row * wide, wide);
                activate_row(source, out, self.stack.shape.feed);
            }
        }
    }
}

/// Turns pairs of numbers by angles: cosines, then sines, half as many each as there are numbers.
fn rotate(values: &mut [f32], angles: &[f32], neighbours: bool) {
    let half = values.len() / 2;
    let (cosines, sines) = angles.split_at(half);
    if neighbours {
        for ((pair, cos), sin) in values.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
            *pair = [pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin];
        }
        return;
    }
    let (first, second) = values.split_at_mut(half);
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// # Safety
/// None.
#[inline(always)]
unsafe fn rms_body<const FMA: bool>(row: &mut [f32], weight: &[f32], eps: f32) {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = fma::<FMA>(*value, *value, *lane);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = fma::<FMA>(*value, *value, *lane);
    }
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    let scale = 1.0 / (lanes[0] / row.len() as f32 + eps).sqrt();
    for (value, weight) in row.iter_mut().zip(weight) {
        *value = weight * (*value * scale);
    }
}

/// # Safety
/// None.
#[inline(always)]
unsafe fn activate_body<const FMA: bool>(source: &[f32], out: &mut [f32], feed: Feed) {
    let (gate, value) = source.split_at(if source.len() > out.len() { out.len() } else { 0 });
    match feed {
        Feed::Relu => out.iter_mut().zip(source).for_each(|(out, x)| *out = x.max(0.0)),
        Feed::GatedGelu => {
            for ((out, gate), x) in out.iter_mut().zip(gate).zip(value) {
                *out = gelu_tanh::<FMA>(*gate) * x;
            }
        }
        Feed::GatedSilu => {
            for ((out, gate), x) in out.iter_mut().zip(gate).zip(value) {
                *out = gate / (1.0 + exp::<FMA>(-gate)) * x;
            }
        }
    }
}

per_cpu_unsafe! {
    /// [`rms_row`].
    ///
    /// # Safety
    /// None.
    unsafe fn rms(row: &mut [f32], weight: &[f32], eps: f32) = rms_body
}
per_cpu_unsafe! {
    /// [`activate_row`].
    ///
    /// # Safety
    /// None.
    unsafe fn activate(source: &[f32], out: &mut [f32], feed: Feed) = activate_body
}

/// `row = weight · row / √(mean of squares + eps)`.
pub(super) fn rms_row(row: &mut [f32], weight: &[f32], eps: f32) {
    // SAFETY: nothing is demanded.
    unsafe { rms(row, weight, eps) };
}

/// The feed-forward block's middle: `[gate, x]` or `[x]` gives as many numbers as `x` has.
fn activate_row(source: &[f32], out: &mut [f32], feed: Feed) {
    // SAFETY: nothing is demanded.
    unsafe { activate(source, out, feed) };
}

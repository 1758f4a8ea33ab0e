//! Attention of one row to what its sequence keeps: the query heads that share a head of keys and values together.

use super::super::cpu::{CpuPath, path};
use super::super::vector::{fma, per_cpu_unsafe, softmax_row};
use super::weights::Sees;

/// Numbers that one step of a loop handles; sums keep this many partial sums whatever the CPU's width.
const LANES: usize = 32;

/// One row's query heads that share a head of keys and values.
pub(super) struct Heads<'a> {
    /// Queries, one behind the other.
    pub(super) queries: *const f32,
    pub(super) count: usize,
    pub(super) head_dim: usize,
    /// Key and value of slot 0.
    pub(super) keys: *const f32,
    pub(super) values: *const f32,
    /// Distance of slots, floats.
    pub(super) stride: usize,
    pub(super) sees: Sees<'a>,
    pub(super) scale: f32,
    /// Added to the scores, one number for each key that is seen.
    pub(super) bias: Option<&'a [f32]>,
    /// Contexts, one behind the other.
    pub(super) out: *mut f32,
}

/// Sum of products; the order of additions depends on the length alone.
#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = fma::<FMA>(*a, *b, *lane);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = fma::<FMA>(*a, *b, *lane);
    }
    for half in [16, 8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// # Safety
/// As [`attend`].
#[inline(always)]
unsafe fn attend_body<const FMA: bool>(heads: &Heads<'_>, scores: &mut [f32]) {
    let Heads { queries, count, head_dim, keys, values, stride, sees, scale, bias, out } = *heads;
    let seen = sees.count();
    let slot = |index: usize| match sees {
        Sees::First(_) => index,
        Sees::Slots(slots) => slots[index] as usize,
    };
    // SAFETY: all slots that are seen exist (the caller's promise), and so do the row's queries and contexts.
    unsafe {
        let query = |head: usize| std::slice::from_raw_parts(queries.add(head * head_dim), head_dim);
        for index in 0..seen {
            let key = std::slice::from_raw_parts(keys.add(slot(index) * stride), head_dim);
            for head in 0..count {
                let score = dot::<FMA>(query(head), key) * scale;
                scores[head * seen + index] = score + bias.map_or(0.0, |bias| bias[index]);
            }
        }
        for head in 0..count {
            let scores = &mut scores[head * seen..(head + 1) * seen];
            let factor = softmax_row(scores, 1.0);
            let out = std::slice::from_raw_parts_mut(out.add(head * head_dim), head_dim);
            out.fill(0.0);
            for (index, score) in scores.iter().enumerate() {
                let value = std::slice::from_raw_parts(values.add(slot(index) * stride), head_dim);
                for (out, value) in out.iter_mut().zip(value) {
                    *out = fma::<FMA>(*score, *value, *out);
                }
            }
            for out in out {
                *out *= factor;
            }
        }
    }
}

per_cpu_unsafe! {
    /// `out[h] = softmax(scale · q[h] · kᵀ + bias) · v`; `scores` is scratch of `count · keys seen` floats.
    ///
    /// # Safety
    /// Queries and contexts of `count` heads, and keys and values of all slots that are seen must be readable; nobody else may touch
    /// the contexts or write the others.
    pub(super) unsafe fn attend(heads: &Heads<'_>, scores: &mut [f32]) = attend_body
}

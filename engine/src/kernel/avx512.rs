//! AVX-512 by hand: what follows a product, softmax and conversions, each in one pass that ends in the number format of the
//! next product. What ends in bf16 or int8 is accurate to that, not to f32.

use super::finish::{Dequantize, Finish, Out};
use super::gelu_table::{GELU_ERF, GELU_TANH, Gelu, LARGEST, Parabolas, Quartics, SEGMENTS_PER_UNIT};
use super::product::PANEL_COLUMNS;
use super::vector::silu;
use crate::config::Activation;
use std::arch::x86_64::*;

/// Adding it rounds to an integer in the low bits: 1.5 * 2^23.
const ROUNDING: f32 = 12_582_912.0;

/// Mask of the first `count` of 16 lanes; all when there are more.
fn first_lanes(count: usize) -> __mmask16 {
    if count >= 16 { 0xffff } else { (1u16 << count) - 1 }
}

/// The body of both functions that finish a tile: `$gelu(table)` makes the function that is applied, `$narrow(address, masks,
/// values)` stores as bf16.
macro_rules! finish_tile {
    ($tile:expr, $finish:expr, $gelu:expr, $narrow:expr) => {{
    let Finish { dequantize, bias, activation, out } = $finish;
    let masks = [first_lanes(bias.len()), first_lanes(bias.len().saturating_sub(16))];
    // SAFETY: masked lanes are not read, the others are inside the slices, which are of one length (the caller's promise).
    let both = |values: &[f32]| unsafe {
        [
            _mm512_maskz_loadu_ps(masks[0], values.as_ptr()),
            _mm512_maskz_loadu_ps(masks[1], values.as_ptr().wrapping_add(16)),
        ]
    };
    let bias = both(bias);
    let of_columns = dequantize.map(|all| [both(all.scales), both(all.sums)]);
    let biased = |row: usize| {
        // SAFETY: a row of a tile is 32 floats.
        let mut values = unsafe { [0, 16].map(|at| _mm512_loadu_ps($tile[row].as_ptr().add(at))) };
        if let (Some(Dequantize { rows, .. }), Some([scales, sums])) = (&dequantize, &of_columns) {
            let [scale, zero] = rows[row].map(|value| _mm512_set1_ps(value));
            for half in 0..2 {
                let product = _mm512_cvtepi32_ps(_mm512_castps_si512(values[half]));
                let weight = _mm512_mul_ps(scale, scales[half]);
                values[half] = _mm512_fmadd_ps(product, weight, _mm512_mul_ps(zero, sums[half]));
            }
        }
        [_mm512_add_ps(values[0], bias[0]), _mm512_add_ps(values[1], bias[1])]
    };
    let put = |row: usize, values: [__m512; 2]| {
        // SAFETY: the columns that are not masked are inside the target (the caller's promise).
        unsafe {
            match out {
                Out::Store(out) => {
                    let at = out.at(row);
                    _mm512_mask_storeu_ps(at, masks[0], values[0]);
                    _mm512_mask_storeu_ps(at.wrapping_add(16), masks[1], values[1]);
                }
                Out::Add(out) => {
                    for half in 0..2 {
                        let at = out.at(row).wrapping_add(16 * half);
                        let sum = _mm512_add_ps(_mm512_maskz_loadu_ps(masks[half], at), values[half]);
                        _mm512_mask_storeu_ps(at, masks[half], sum);
                    }
                }
                Out::Narrow(out) => $narrow(out.at(row), masks, values),
            }
        }
    };
        match activation {
            None => (0..$tile.len()).for_each(|row| put(row, biased(row))),
            Some(Activation::Relu) => {
                let zero = _mm512_setzero_ps();
                // Zero first: a NaN on the right is kept.
                (0..$tile.len()).for_each(|row| put(row, biased(row).map(|x| _mm512_max_ps(zero, x))));
            }
            Some(Activation::GeluErf) => {
                let gelu = $gelu(&GELU_ERF);
                (0..$tile.len()).for_each(|row| put(row, biased(row).map(&gelu)));
            }
            Some(Activation::GeluTanh) => {
                let gelu = $gelu(&GELU_TANH);
                (0..$tile.len()).for_each(|row| put(row, biased(row).map(&gelu)));
            }
            Some(Activation::Silu) => (0..$tile.len()).for_each(|row| put(row, biased(row).map(|x| silu_by_exp(x)))),
        }
    }};
}

/// Finishes a tile accurately to f32; nothing is stored as bf16.
///
/// # Safety
/// As [`super::finish::finish_exactly`]; and the CPU must have AVX-512 (F, BW, DQ, VL).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn finish_in_f32(tile: &[[f32; PANEL_COLUMNS]], finish: Finish<'_>) {
    let narrow = |_: *mut u16, _: [__mmask16; 2], _: [__m512; 2]| unreachable!("f32 stays f32");
    finish_tile!(tile, finish, |gelu: &'static Gelu| gelu_by_quartics(&gelu.quartics), narrow);
}

/// Finishes a tile; GELU is accurate to bf16.
///
/// # Safety
/// As [`super::finish::finish_exactly`]; and the CPU must have AVX-512 (F, BW, DQ, VL) and its bf16 instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn finish_narrowly(tile: &[[f32; PANEL_COLUMNS]], finish: Finish<'_>) {
    let narrow = |at: *mut u16, masks: [__mmask16; 2], values: [__m512; 2]| {
        let pairs = as_bits(_mm512_cvtne2ps_pbh(values[1], values[0]));
        let mask = u32::from(masks[0]) | u32::from(masks[1]) << 16;
        // SAFETY: what is not masked is inside the target (the caller's promise).
        unsafe { _mm512_mask_storeu_epi16(at.cast(), mask, pairs) };
    };
    finish_tile!(tile, finish, |gelu: &'static Gelu| gelu_by_parabolas(&gelu.parabolas), narrow);
}

/// `max(x, 0) - g(|x|)`, see `gelu_table`.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn gelu_by_parabolas(table: &Parabolas) -> impl Fn(__m512) -> __m512 + use<> {
    // SAFETY: a row of the table is 32 floats.
    let halves =
        unsafe { table.each_ref().map(|row| [0, 16].map(|at| _mm512_loadu_ps(row.as_ptr().add(at)))) };
    let (largest, per_unit, rounding) =
        (_mm512_set1_ps(LARGEST), _mm512_set1_ps(SEGMENTS_PER_UNIT), _mm512_set1_ps(ROUNDING));
    move |x| {
        let a = _mm512_min_ps(_mm512_abs_ps(x), largest);
        let segment = _mm512_castps_si512(_mm512_fmadd_ps(a, per_unit, rounding));
        let [c0, c1, c2] = halves.map(|[low, high]| _mm512_permutex2var_ps(low, segment, high));
        let g = _mm512_fmadd_ps(_mm512_fmadd_ps(c2, a, c1), a, c0);
        // Zero first: a NaN on the right is kept.
        _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), g)
    }
}

/// As [`gelu_by_parabolas`], to f32.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn gelu_by_quartics(table: &Quartics) -> impl Fn(__m512) -> __m512 + use<> {
    // SAFETY: a row of the table is 32 floats.
    let halves =
        unsafe { table.each_ref().map(|row| [0, 16].map(|at| _mm512_loadu_ps(row.as_ptr().add(at)))) };
    let (largest, per_unit, rounding) =
        (_mm512_set1_ps(LARGEST), _mm512_set1_ps(SEGMENTS_PER_UNIT), _mm512_set1_ps(ROUNDING));
    move |x| {
        let a = _mm512_min_ps(_mm512_abs_ps(x), largest);
        let shifted = _mm512_fmadd_ps(a, per_unit, rounding);
        let t = _mm512_fmsub_ps(a, per_unit, _mm512_sub_ps(shifted, rounding));
        let segment = _mm512_castps_si512(shifted);
        let [c0, c1, c2, c3, c4] = halves.map(|[low, high]| _mm512_permutex2var_ps(low, segment, high));
        let g = _mm512_fmadd_ps(_mm512_fmadd_ps(c4, t, c3), t, c2);
        let g = _mm512_fmadd_ps(_mm512_fmadd_ps(g, t, c1), t, c0);
        // Zero first: a NaN on the right is kept.
        _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), g)
    }
}

/// `x / (1 + e^-x)`, to f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn silu_by_exp(x: __m512) -> __m512 {
    let mut values = [0.0f32; 16];
    // SAFETY: 16 floats are written and read.
    unsafe { _mm512_storeu_ps(values.as_mut_ptr(), x) };
    values.iter_mut().for_each(|value| *value = silu::<true>(*value));
    // SAFETY: as above.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// The same bits.
fn as_bits(pairs: __m512bh) -> __m512i {
    // SAFETY: both are 64 bytes of any bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(pairs) }
}

/// Softmax of `scale * row` as bf16, less a factor that is the result; zeros in `out` behind the row's end. `2^r` is a polynomial
/// of degree 4, fitted by least squares at Chebyshev nodes of [-1/2, 1/2]; its error is 3e-6.
///
/// # Safety
/// The CPU must have AVX-512 (F, BW, DQ, VL) and its bf16 instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn softmax_narrowly(row: &[f32], scale: f32, out: &mut [u16]) -> f32 {
    assert!(out.len().is_multiple_of(32) && out.len() >= row.len(), "rows of probabilities are padded");
    let lowest = _mm512_set1_ps(f32::NEG_INFINITY);
    // SAFETY: lanes beyond the row are masked.
    let load = |at: usize| unsafe {
        let mask = first_lanes(row.len().saturating_sub(at));
        _mm512_mask_loadu_ps(lowest, mask, row.as_ptr().wrapping_add(at))
    };
    let mut largest = lowest;
    for at in (0..row.len()).step_by(16) {
        largest = _mm512_max_ps(largest, load(at));
    }
    let factor = scale * std::f32::consts::LOG2_E;
    let shift = _mm512_set1_ps(-_mm512_reduce_max_ps(largest) * factor);
    let factor = _mm512_set1_ps(factor);
    let rounding = _mm512_set1_ps(ROUNDING);
    let coefficients =
        [0.009_560_51, 0.055_917_04, 0.240_249_81, 0.693_121_97, 0.999_999_19].map(|c| _mm512_set1_ps(c));
    let power = |x: __m512| {
        let x = _mm512_fmadd_ps(x, factor, shift);
        let n = _mm512_sub_ps(_mm512_add_ps(x, rounding), rounding);
        let r = _mm512_sub_ps(x, n);
        let mut p = coefficients[0];
        for c in &coefficients[1..] {
            p = _mm512_fmadd_ps(p, r, *c);
        }
        _mm512_scalef_ps(p, n)
    };
    let mut sums = [_mm512_setzero_ps(); 2];
    for at in (0..out.len()).step_by(32) {
        let mut values = [_mm512_setzero_ps(); 2];
        for half in 0..2 {
            let first = at + 16 * half;
            if first < row.len() {
                let mask = first_lanes(row.len() - first);
                values[half] = _mm512_maskz_mov_ps(mask, power(load(first)));
                sums[half] = _mm512_add_ps(sums[half], values[half]);
            }
        }
        let pairs = as_bits(_mm512_cvtne2ps_pbh(values[1], values[0]));
        // SAFETY: 32 elements at `at` are inside `out`, whose length is a multiple of 32.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(at).cast(), pairs) };
    }
    1.0 / _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
}

/// The nearest bf16 of each number times `factor`; subnormal ones become zero.
///
/// # Safety
/// The CPU must have AVX-512 (F, BW, DQ, VL) and its bf16 instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn scale_narrowly(row: &[f32], factor: f32, out: &mut [u16]) {
    let len = row.len().min(out.len());
    let factor = _mm512_set1_ps(factor);
    for at in (0..len).step_by(32) {
        let masks = [first_lanes(len - at), first_lanes((len - at).saturating_sub(16))];
        // SAFETY: lanes beyond `len` are masked.
        unsafe {
            let start = row.as_ptr().add(at);
            let low = _mm512_mul_ps(_mm512_maskz_loadu_ps(masks[0], start), factor);
            let high = _mm512_mul_ps(_mm512_maskz_loadu_ps(masks[1], start.wrapping_add(16)), factor);
            let mask = u32::from(masks[0]) | u32::from(masks[1]) << 16;
            let pairs = as_bits(_mm512_cvtne2ps_pbh(high, low));
            _mm512_mask_storeu_epi16(out.as_mut_ptr().add(at).cast(), mask, pairs);
        }
    }
}

/// Quantises a row as [`super::vector::quantize_row`] does.
///
/// # Safety
/// The CPU must have AVX-512 (F, BW, DQ, VL).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn quantize_in_512(row: &[f32], out: &mut [u8], scale_and_zero: &mut [f32; 2]) {
    let len = row.len().min(out.len());
    // SAFETY: lanes beyond the row are masked.
    let load = |otherwise: __m512, at: usize| unsafe {
        _mm512_mask_loadu_ps(otherwise, first_lanes(len.saturating_sub(at)), row.as_ptr().wrapping_add(at))
    };
    let mut lows = [_mm512_set1_ps(f32::INFINITY); 2];
    let mut highs = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
    for at in (0..len).step_by(32) {
        for half in 0..2 {
            lows[half] = _mm512_min_ps(lows[half], load(lows[half], at + 16 * half));
            highs[half] = _mm512_max_ps(highs[half], load(highs[half], at + 16 * half));
        }
    }
    let low = _mm512_reduce_min_ps(_mm512_min_ps(lows[0], lows[1]));
    let high = _mm512_reduce_max_ps(_mm512_max_ps(highs[0], highs[1]));
    let scale = (high - low) / 255.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (first, factor) = (_mm512_set1_ps(low), _mm512_set1_ps(inverse));
    for at in (0..len).step_by(16) {
        let value = _mm512_mul_ps(_mm512_sub_ps(load(first, at), first), factor);
        // SAFETY: lanes beyond the row are masked.
        unsafe {
            let mask = first_lanes(len - at);
            _mm512_mask_cvtusepi32_storeu_epi8(
                out.as_mut_ptr().add(at).cast(),
                mask,
                _mm512_cvtps_epi32(value),
            );
        }
    }
    *scale_and_zero = [scale, low];
}

#[cfg(test)]
mod tests {
    use super::super::cpu::{CpuPath, available, with_path};
    use super::super::finish::finish_exactly;
    use super::super::product::Target;
    use super::super::vector::{quantize_row, softmax_row};
    use super::*;

    fn is_testable() -> bool {
        available().any(CpuPath::has_bf16)
    }

    fn widen(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[test]
    fn softmax_is_that_of_f32_to_bf16() {
        if !is_testable() {
            return;
        }
        for len in 1..150usize {
            let mut row: Vec<f32> = (0..len).map(|index| (index as f32 * 7.7).sin() * 30.0).collect();
            let mut out = vec![9u16; len.next_multiple_of(32)];
            // SAFETY: the CPU has what it takes.
            let factor = unsafe { softmax_narrowly(&row, 0.3, &mut out) };
            let wanted = softmax_row(&mut row, 0.3);
            for (found, value) in out.iter().zip(&row) {
                assert!((widen(*found) * factor - value * wanted).abs() < 0.005 * value * wanted + 1e-7);
            }
            assert!(out[len..].iter().all(|x| *x == 0), "{len}");
        }
    }

    #[test]
    fn tiles_are_finished_as_exactly_as_bf16_can_tell() {
        if !is_testable() {
            return;
        }
        let tile: [[f32; PANEL_COLUMNS]; 5] =
            std::array::from_fn(|row| std::array::from_fn(|column| (row * 32 + column) as f32 * 0.1 - 8.0));
        for columns in [1, 15, 16, 17, 31, 32] {
            let bias: Vec<f32> = (0..columns).map(|column| column as f32 * 0.01).collect();
            for activation in
                [None, Some(Activation::GeluErf), Some(Activation::GeluTanh), Some(Activation::Relu)]
            {
                let [mut exact, mut same, mut close] = [[1.0f32; 5 * 40]; 3];
                let mut halves = vec![1u16; 5 * 40];
                let stride = 40;
                let finish = |out| Finish { dequantize: None, bias: &bias, activation, out };
                // SAFETY: 32 columns of five rows of 40 lie inside the vectors; the CPU has what it takes.
                unsafe {
                    finish_exactly(
                        &mut tile.clone(),
                        finish(Out::Store(Target { start: exact.as_mut_ptr(), stride })),
                    );
                    finish_in_f32(&tile, finish(Out::Store(Target { start: same.as_mut_ptr(), stride })));
                    finish_narrowly(&tile, finish(Out::Store(Target { start: close.as_mut_ptr(), stride })));
                    finish_narrowly(
                        &tile,
                        finish(Out::Narrow(Target { start: halves.as_mut_ptr(), stride })),
                    );
                }
                for (exact, same) in exact.iter().zip(&same) {
                    assert!(
                        (exact - same).abs() < 1e-6 * exact.abs().max(1.0),
                        "{activation:?} {exact} {same}"
                    );
                }
                for ((exact, close), half) in exact.iter().zip(&close).zip(&halves) {
                    assert!((exact - close).abs() < 5e-5, "{activation:?} {exact} {close}");
                    assert!(*half == 1 || (exact - widen(*half)).abs() < 0.004 * exact.abs() + 5e-5);
                }
                assert!(halves.chunks(40).all(|row| row[columns..].iter().all(|x| *x == 1)));
                assert!(close.chunks(40).all(|row| row[columns..].iter().all(|x| *x == 1.0)));
            }
        }
    }

    #[test]
    fn rows_are_quantised_as_elsewhere() {
        if !available().any(|path| path >= CpuPath::Avx512) {
            return;
        }
        for len in [1, 15, 16, 17, 33, 384, 1537] {
            let row: Vec<f32> = (0..len).map(|index| (index as f32 * 1.7).sin() * 3.0 + 1.0).collect();
            let (mut found, mut wanted) = ((vec![0; len], [0.0; 2]), (vec![0; len], [0.0; 2]));
            // SAFETY: the CPU has what it takes.
            unsafe { quantize_in_512(&row, &mut found.0, &mut found.1) };
            with_path(CpuPath::Portable, || quantize_row(&row, &mut wanted.0, &mut wanted.1));
            assert_eq!(found, wanted, "{len}");
        }
    }

    #[test]
    fn a_number_that_is_none_stays_none() {
        if !is_testable() {
            return;
        }
        for activation in [Activation::GeluErf, Activation::GeluTanh, Activation::Relu] {
            let tile = [[f32::NAN; PANEL_COLUMNS]];
            let mut out = [0.0f32; PANEL_COLUMNS];
            let target = Out::Store(Target { start: out.as_mut_ptr(), stride: PANEL_COLUMNS });
            let finish = Finish {
                dequantize: None,
                bias: &[0.0; PANEL_COLUMNS],
                activation: Some(activation),
                out: target,
            };
            // SAFETY: one row of 32; the CPU has what it takes.
            unsafe { finish_narrowly(&tile, finish) };
            assert!(out.iter().all(|x| x.is_nan()), "{activation:?}");
        }
    }
}

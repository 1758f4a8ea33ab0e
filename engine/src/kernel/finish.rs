//! What follows a product, while its tile is in the cache: scales of int8, bias, activation, and where the result goes. The
//! variants for AVX-512 are in `avx512`; the one here serves all others.

use super::cpu::{CpuPath, path};
use super::product::{PANEL_COLUMNS, Target};
use super::vector::{bf16, fma, gelu_erf, gelu_tanh, per_cpu_unsafe, silu};
use crate::config::{Activation, GATED_BLOCK};

const _: () = assert!(2 * GATED_BLOCK == PANEL_COLUMNS, "a panel of a gated layer holds both halves");

/// How the integer sums of a tile become numbers: `scale * scales[c] * product + zero * sums[c]`.
#[derive(Clone, Copy)]
pub(super) struct Dequantize<'a> {
    /// `[scale, zero]` of each row.
    pub(super) rows: &'a [[f32; 2]],
    /// Scale of each column's weights.
    pub(super) scales: &'a [f32],
    /// Sum of each column's weights, times their scale.
    pub(super) sums: &'a [f32],
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) enum Out {
    /// They are stored.
    Store(Target<f32>),
    /// They are added to what is there.
    Add(Target<f32>),
    /// They are stored as bf16.
    Narrow(Target<u16>),
}

/// What follows a product.
#[derive(Clone, Copy)]
pub(super) struct Finish<'a> {
    pub(super) dequantize: Option<Dequantize<'a>>,
    /// One number for each column that is wanted, at most [`PANEL_COLUMNS`].
    pub(super) bias: &'a [f32],
    pub(super) activation: Option<Activation>,
    pub(super) out: Out,
}

/// Finishes a tile, whose numbers are used up.
///
/// # Safety
/// As many columns as there are biases of all the tile's rows must be inside `out` and nobody else's.
#[inline(always)]
unsafe fn exact_body<const FMA: bool>(tile: &mut [[f32; PANEL_COLUMNS]], finish: Finish<'_>) {
    let Finish { dequantize, bias, activation, out } = finish;
    let columns = bias.len();
    let padded = |values: &[f32]| {
        let mut padded = [0.0; PANEL_COLUMNS];
        padded[..columns].copy_from_slice(values);
        padded
    };
    if let Some(Dequantize { rows, scales, sums }) = dequantize {
        let (scales, sums) = (padded(scales), padded(sums));
        for (row, [scale, zero]) in tile.iter_mut().zip(rows) {
            for ((value, weight), sum) in row.iter_mut().zip(&scales).zip(&sums) {
                let product = value.to_bits() as i32 as f32;
                *value = fma::<FMA>(product, scale * weight, zero * sum);
            }
        }
    }
    // One step after the other over the tile: loops that the compiler makes vectors of, which it does not of all in one.
    #[inline(always)]
    fn each(tile: &mut [[f32; PANEL_COLUMNS]], bias: &[f32; PANEL_COLUMNS], f: impl Fn(f32) -> f32) {
        for row in tile {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value = f(*value + bias);
            }
        }
    }
    let bias = padded(bias);
    match activation {
        None => each(tile, &bias, |x| x),
        Some(Activation::GeluErf) => each(tile, &bias, gelu_erf::<FMA>),
        Some(Activation::GeluTanh) => each(tile, &bias, gelu_tanh::<FMA>),
        Some(Activation::Relu) => each(tile, &bias, |x| x.max(0.0)),
        Some(Activation::Silu) => each(tile, &bias, silu::<FMA>),
    }
    for (row, values) in tile.iter().enumerate() {
        let values = &values[..columns];
        // SAFETY: the caller's promise.
        unsafe {
            match out {
                Out::Store(out) => out.row(row, columns).copy_from_slice(values),
                Out::Add(out) => {
                    out.row(row, columns).iter_mut().zip(values).for_each(|(out, value)| *out += value);
                }
                Out::Narrow(out) => {
                    let out = out.row(row, columns).iter_mut();
                    out.zip(values).for_each(|(out, value)| *out = bf16(*value));
                }
            }
        }
    }
}

/// Finishes a tile of a gated layer: as [`exact_body`], then the first half of the columns is activated and multiplied with the
/// second, and half as many columns go out.
///
/// # Safety
/// As [`finish_gated`].
#[inline(always)]
unsafe fn gated_body<const FMA: bool>(tile: &mut [[f32; PANEL_COLUMNS]], finish: Finish<'_>) {
    let Finish { dequantize, bias, activation, out } = finish;
    let ([scales, sums], rows) = match dequantize {
        Some(Dequantize { rows, scales, sums }) => ([scales, sums], rows),
        None => ([bias, bias], [].as_slice()),
    };
    let (Some(bias), Some(scales), Some(sums)) =
        (bias.first_chunk::<PANEL_COLUMNS>(), scales.first_chunk::<PANEL_COLUMNS>(), sums.first_chunk())
    else {
        return;
    };
    let sums: &[f32; PANEL_COLUMNS] = sums;
    for (row, [scale, zero]) in tile.iter_mut().zip(rows) {
        for ((value, weight), sum) in row.iter_mut().zip(scales).zip(sums) {
            let product = value.to_bits() as i32 as f32;
            *value = fma::<FMA>(product, scale * weight, zero * sum);
        }
    }
    #[inline(always)]
    fn gate(tile: &mut [[f32; PANEL_COLUMNS]], bias: &[f32; PANEL_COLUMNS], f: impl Fn(f32) -> f32) {
        for row in tile {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
            let (activated, other) = row.split_at_mut(GATED_BLOCK);
            for (value, other) in activated.iter_mut().zip(other) {
                *value = f(*value) * *other;
            }
        }
    }
    match activation {
        None => gate(tile, bias, |x| x),
        Some(Activation::GeluErf) => gate(tile, bias, gelu_erf::<FMA>),
        Some(Activation::GeluTanh) => gate(tile, bias, gelu_tanh::<FMA>),
        Some(Activation::Relu) => gate(tile, bias, |x| x.max(0.0)),
        Some(Activation::Silu) => gate(tile, bias, silu::<FMA>),
    }
    for (row, values) in tile.iter().enumerate() {
        let values = &values[..GATED_BLOCK];
        // SAFETY: the caller's promise.
        unsafe {
            match out {
                Out::Store(out) => out.row(row, GATED_BLOCK).copy_from_slice(values),
                Out::Add(out) => {
                    let out = out.row(row, GATED_BLOCK).iter_mut();
                    out.zip(values).for_each(|(out, value)| *out += value);
                }
                Out::Narrow(out) => {
                    let out = out.row(row, GATED_BLOCK).iter_mut();
                    out.zip(values).for_each(|(out, value)| *out = bf16(*value));
                }
            }
        }
    }
}

per_cpu_unsafe! {
    /// Finishes a tile of a gated layer, whose numbers are used up: the first [`GATED_BLOCK`] columns are activated and multiplied
    /// with the others.
    ///
    /// # Safety
    /// [`GATED_BLOCK`] columns of all the tile's rows must be inside `out` and nobody else's; there are [`PANEL_COLUMNS`] biases, or
    /// nothing is done; `dequantize`, if any, has as many numbers for columns, and one entry for each row.
    pub(super) unsafe fn finish_gated(tile: &mut [[f32; PANEL_COLUMNS]], finish: Finish<'_>) = gated_body
}

per_cpu_unsafe! {
    /// Finishes a tile, whose numbers are used up.
    ///
    /// # Safety
    /// As many columns as there are biases of all the tile's rows must be inside `out` and nobody else's; `dequantize`, if any,
    /// has as many numbers for columns, and one entry for each row.
    pub(super) unsafe fn finish_exactly(tile: &mut [[f32; PANEL_COLUMNS]], finish: Finish<'_>) = exact_body
}

#[cfg(test)]
mod tests {
    use super::super::cpu::{available, with_path};
    use super::*;

    #[test]
    fn every_path_dequantises_adds_and_stores_the_wanted_columns_alone() {
        let mut sums_of = [[0.0f32; PANEL_COLUMNS]; 3];
        for (row, values) in sums_of.iter_mut().enumerate() {
            for (column, value) in values.iter_mut().enumerate() {
                *value = f32::from_bits((row as i32 * 100 - column as i32) as u32);
            }
        }
        let (scales, sums, bias) = ([0.5f32; 20], [2.0f32; 20], [1.0f32; 20]);
        let rows = [[2.0, 10.0], [4.0, 20.0], [8.0, 30.0]];
        for path in available() {
            with_path(path, || {
                let mut tile = sums_of;
                let mut out = [7.0f32; 3 * 24];
                let target = Target { start: out.as_mut_ptr(), stride: 24 };
                let dequantize = Some(Dequantize { rows: &rows, scales: &scales, sums: &sums });
                let finish = Finish { dequantize, bias: &bias, activation: None, out: Out::Add(target) };
                // SAFETY: 20 columns of three rows of 24 lie inside the array, which nobody else has.
                unsafe { finish_exactly(&mut tile, finish) };
                for (row, out) in out.chunks_exact(24).enumerate() {
                    let [scale, zero] = rows[row];
                    for (column, value) in out.iter().enumerate() {
                        let product = row as f32 * 100.0 - column as f32;
                        let wanted =
                            if column < 20 { 7.0 + product * scale * 0.5 + zero * 2.0 + 1.0 } else { 7.0 };
                        assert_eq!(*value, wanted, "{path:?} {row} {column}");
                    }
                }
            });
        }
    }
}

//! What follows a product, in one pass over its tile: scales of int8, bias, activation, and where the result goes. The variant
//! for CPUs with bf16 instructions is in `narrow`; this one is exact to f32 and serves all others.

use super::cpu::{CpuPath, path};
use super::product::{PANEL_COLUMNS, Target};
use super::vector::{bf16, fma, gelu_erf, gelu_tanh, per_cpu_unsafe};
use crate::config::Activation;

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

/// Finishes a tile exactly to f32.
///
/// # Safety
/// As many columns as there are biases of all the tile's rows must be inside `out` and nobody else's.
#[inline(always)]
unsafe fn exact_body<const FMA: bool>(tile: &[[f32; PANEL_COLUMNS]], finish: Finish<'_>) {
    let Finish { dequantize, bias, activation, out } = finish;
    let columns = bias.len();
    let padded = |values: &[f32]| {
        let mut padded = [0.0; PANEL_COLUMNS];
        padded[..columns].copy_from_slice(values);
        padded
    };
    let bias = padded(bias);
    let of_columns = dequantize.map(|all| (padded(all.scales), padded(all.sums)));
    for (row, values) in tile.iter().enumerate() {
        let mut values = *values;
        if let (Some(all), Some((scales, sums))) = (&dequantize, &of_columns) {
            let [scale, zero] = all.rows[row];
            for ((value, weight), sum) in values.iter_mut().zip(scales).zip(sums) {
                let product = value.to_bits() as i32 as f32;
                *value = fma::<FMA>(product, scale * weight, zero * sum);
            }
        }
        values.iter_mut().zip(&bias).for_each(|(value, bias)| *value += bias);
        match activation {
            None => {}
            Some(Activation::GeluErf) => values.iter_mut().for_each(|x| *x = gelu_erf::<FMA>(*x)),
            Some(Activation::GeluTanh) => values.iter_mut().for_each(|x| *x = gelu_tanh::<FMA>(*x)),
            Some(Activation::Relu) => values.iter_mut().for_each(|x| *x = x.max(0.0)),
        }
        // SAFETY: the caller's promise.
        unsafe {
            match out {
                Out::Store(out) => out.row(row, columns).copy_from_slice(&values[..columns]),
                Out::Add(out) => {
                    let out = out.row(row, columns).iter_mut();
                    out.zip(values).for_each(|(out, value)| *out += value);
                }
                Out::Narrow(out) => {
                    let out = out.row(row, columns).iter_mut();
                    out.zip(values).for_each(|(out, value)| *out = bf16(value));
                }
            }
        }
    }
}

per_cpu_unsafe! {
    /// Finishes a tile exactly to f32.
    ///
    /// # Safety
    /// As many columns as there are biases of all the tile's rows must be inside `out` and nobody else's; `dequantize`, if any,
    /// has as many numbers for columns, and one entry for each row.
    pub(super) unsafe fn finish_exactly(tile: &[[f32; PANEL_COLUMNS]], finish: Finish<'_>) = exact_body
}

#[cfg(test)]
mod tests {
    use super::super::cpu::{available, with_path};
    use super::*;

    #[test]
    fn every_path_dequantises_adds_and_stores_the_wanted_columns_alone() {
        let mut tile = [[0.0f32; PANEL_COLUMNS]; 3];
        for (row, values) in tile.iter_mut().enumerate() {
            for (column, value) in values.iter_mut().enumerate() {
                *value = f32::from_bits((row as i32 * 100 - column as i32) as u32);
            }
        }
        let (scales, sums, bias) = ([0.5f32; 20], [2.0f32; 20], [1.0f32; 20]);
        let rows = [[2.0, 10.0], [4.0, 20.0], [8.0, 30.0]];
        for path in available() {
            with_path(path, || {
                let mut out = [7.0f32; 3 * 24];
                let target = Target { start: out.as_mut_ptr(), stride: 24 };
                let dequantize = Some(Dequantize { rows: &rows, scales: &scales, sums: &sums });
                let finish = Finish { dequantize, bias: &bias, activation: None, out: Out::Add(target) };
                // SAFETY: 20 columns of three rows of 24 lie inside the array, which nobody else has.
                unsafe { finish_exactly(&tile, finish) };
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

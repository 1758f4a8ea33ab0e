//! Row kernels: bias, activations, layer norm, softmax, pooling. Plain loops, compiled once per CPU path.

use super::cpu::{CpuPath, path};
use crate::config::Activation;

/// Floats that one step of a loop handles; sums keep this many partial sums whatever the CPU's width.
const LANES: usize = 16;

/// Declares a function that runs `body::<FMA>` compiled for the CPU's best instructions.
macro_rules! per_cpu {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)? = $body:ident) => {
        $(#[$doc])*
        $visibility fn $name($($argument: $kind),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512($($argument: $kind),*) $(-> $result)? {
                $body::<true>($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($argument: $kind),*) $(-> $result)? {
                $body::<true>($($argument),*)
            }
            match path() {
                // SAFETY: `path` found these features on this CPU.
                #[cfg(target_arch = "x86_64")]
                CpuPath::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: `path` found these features on this CPU.
                #[cfg(target_arch = "x86_64")]
                CpuPath::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body::<false>($($argument),*),
            }
        }
    };
}

/// `a * b + c`, fused where the CPU does that in one instruction (elsewhere it would be a slow call).
#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x for x at most 0 up to about 88, to 2 units in the last place; 0 below -87.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = fma::<FMA>(n, -0.693_359_4, x);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    let power = (shifted.to_bits() as i32).wrapping_sub(MAGIC.to_bits() as i32);
    p * f32::from_bits((power.wrapping_add(127) << 23) as u32)
}

/// The error function to 3e-7: a rational approximation on [-4, 4], beyond which it is ±1.
#[inline(always)]
fn erf<const FMA: bool>(x: f32) -> f32 {
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let mut p = -2.726_142_4e-10;
    for c in [2.770_681_5e-8, -2.101_024e-6, -5.692_506_6e-5, -7.349_906_5e-4, -2.954_6e-3, -1.609_603_3e-2] {
        p = fma::<FMA>(p, square, c);
    }
    let mut q = -1.456_607_2e-5;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329_3e-3, -1.426_474e-2] {
        q = fma::<FMA>(q, square, c);
    }
    (x * p / q).clamp(-1.0, 1.0)
}

#[inline(always)]
fn gelu_erf<const FMA: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`, by way of the identity `(1 + tanh y)/2 = 1/(1 + e^-2y)`.
#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    let y = 0.797_884_6 * x * fma::<FMA>(0.044_715 * x, x, 1.0);
    x / (1.0 + exp::<FMA>(-2.0 * y))
}

#[inline(always)]
fn sum(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

/// Sum of `f` over a row; the order of additions depends on the row's length alone.
#[inline(always)]
fn sum_of(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f(*value);
    }
    sum(lanes)
}

#[inline(always)]
fn add_bias_body<const FMA: bool>(rows: &mut [f32], bias: &[f32]) {
    for row in rows.chunks_exact_mut(bias.len()) {
        for (value, bias) in row.iter_mut().zip(bias) {
            *value += bias;
        }
    }
}

#[inline(always)]
fn activate_body<const FMA: bool>(rows: &mut [f32], bias: &[f32], activation: Activation) {
    #[inline(always)]
    fn each(rows: &mut [f32], bias: &[f32], f: impl Fn(f32) -> f32) {
        for row in rows.chunks_exact_mut(bias.len()) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value = f(*value + bias);
            }
        }
    }
    match activation {
        Activation::GeluErf => each(rows, bias, gelu_erf::<FMA>),
        Activation::GeluTanh => each(rows, bias, gelu_tanh::<FMA>),
        Activation::Relu => each(rows, bias, |x| x.max(0.0)),
    }
}

#[inline(always)]
fn norm_body<const FMA: bool>(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) {
    let count = row.len() as f32;
    let mean = sum_of(row, |x| x) / count;
    let variance = sum_of(row, |x| (x - mean) * (x - mean)) / count;
    let scale = 1.0 / (variance + eps).sqrt();
    for ((value, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
        *value = fma::<FMA>((*value - mean) * scale, *weight, *bias);
    }
}

#[inline(always)]
fn add_norm_body<const FMA: bool>(
    row: &mut [f32],
    added: &[f32],
    added_bias: &[f32],
    norm: (&[f32], &[f32], f32),
) {
    for ((value, added), bias) in row.iter_mut().zip(added).zip(added_bias) {
        *value += added + bias;
    }
    norm_body::<FMA>(row, norm.0, norm.1, norm.2);
}

#[inline(always)]
fn embed_body<const FMA: bool>(
    row: &mut [f32],
    word: &[f32],
    kind: &[f32],
    position: &[f32],
    norm: (&[f32], &[f32], f32),
) {
    for (((value, word), kind), position) in row.iter_mut().zip(word).zip(kind).zip(position) {
        *value = (word + kind) + position;
    }
    norm_body::<FMA>(row, norm.0, norm.1, norm.2);
}

#[inline(always)]
fn softmax_body<const FMA: bool>(row: &mut [f32], scale: f32) {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = if *value > *lane { *value } else { *lane };
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max) * scale;
    for value in row.iter_mut() {
        *value = exp::<FMA>(fma::<FMA>(*value, scale, -largest));
    }
    let factor = 1.0 / sum_of(row, |x| x);
    for value in row.iter_mut() {
        *value *= factor;
    }
}

#[inline(always)]
fn sum_body<const FMA: bool>(out: &mut [f32], row: &[f32]) {
    for (out, value) in out.iter_mut().zip(row) {
        *out += value;
    }
}

#[inline(always)]
fn max_body<const FMA: bool>(out: &mut [f32], row: &[f32]) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = if *value > *out { *value } else { *out };
    }
}

#[inline(always)]
fn scale_body<const FMA: bool>(row: &mut [f32], factor: f32) {
    for value in row {
        *value *= factor;
    }
}

#[inline(always)]
fn unit_body<const FMA: bool>(row: &mut [f32]) {
    let norm = sum_of(row, |x| x * x).sqrt().max(1e-12);
    for value in row {
        *value /= norm;
    }
}

per_cpu! {
    /// Adds `bias` to every row.
    pub(crate) fn add_bias_rows(rows: &mut [f32], bias: &[f32]) = add_bias_body
}
per_cpu! {
    /// Adds `bias` to every row and applies the activation.
    pub(crate) fn activate_rows(rows: &mut [f32], bias: &[f32], activation: Activation) = activate_body
}
per_cpu! {
    /// `row = norm(row + added + added_bias)`; `norm` is weight, bias and epsilon of the layer norm.
    pub(crate) fn add_norm_row(row: &mut [f32], added: &[f32], added_bias: &[f32], norm: (&[f32], &[f32], f32)) = add_norm_body
}
per_cpu! {
    /// `row = norm(word + kind + position)`; `norm` is weight, bias and epsilon of the layer norm.
    pub(crate) fn embed_row(row: &mut [f32], word: &[f32], kind: &[f32], position: &[f32], norm: (&[f32], &[f32], f32)) = embed_body
}
per_cpu! {
    /// Softmax of `scale * row`.
    pub(super) fn softmax_row(row: &mut [f32], scale: f32) = softmax_body
}
per_cpu! {
    /// `out += row`.
    pub(crate) fn sum_row(out: &mut [f32], row: &[f32]) = sum_body
}
per_cpu! {
    /// `out = max(out, row)`.
    pub(crate) fn max_row(out: &mut [f32], row: &[f32]) = max_body
}
per_cpu! {
    /// `row *= factor`.
    pub(crate) fn scale_row(row: &mut [f32], factor: f32) = scale_body
}
per_cpu! {
    /// Divides the row by its Euclidean norm.
    pub(crate) fn unit_row(row: &mut [f32]) = unit_body
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::cpu::erf::erf_f64;

    fn steps(low: f64, high: f64) -> impl Iterator<Item = f32> {
        (0..=200_000).map(move |step| (low + (high - low) * f64::from(step) / 200_000.0) as f32)
    }

    #[test]
    fn exp_is_accurate() {
        for x in steps(-80.0, 80.0) {
            let wanted = f64::from(x).exp();
            for found in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(found) / wanted - 1.0).abs() < 3e-7, "exp({x}) = {found}, not {wanted}");
            }
        }
    }

    #[test]
    fn erf_is_accurate() {
        for x in steps(-6.0, 6.0) {
            let wanted = erf_f64(f64::from(x));
            for found in [erf::<true>(x), erf::<false>(x)] {
                assert!((f64::from(found) - wanted).abs() < 5e-7, "erf({x}) = {found}, not {wanted}");
            }
        }
    }

    #[test]
    fn gelus_are_accurate() {
        for x in steps(-12.0, 12.0) {
            let x64 = f64::from(x);
            let wanted = 0.5 * x64 * (1.0 + erf_f64(x64 / 2f64.sqrt()));
            assert!((f64::from(gelu_erf::<true>(x)) - wanted).abs() < 1e-6 * x64.abs().max(1.0), "gelu({x})");
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044715 * x64.powi(3));
            let wanted = 0.5 * x64 * (1.0 + y.tanh());
            assert!(
                (f64::from(gelu_tanh::<true>(x)) - wanted).abs() < 1e-6 * x64.abs().max(1.0),
                "gelu_tanh({x})"
            );
        }
    }

    #[test]
    fn softmax_sums_to_one_at_any_length_and_scale() {
        for len in 1..70usize {
            let mut row: Vec<f32> = (0..len).map(|index| (index as f32 * 7.7).sin() * 300.0).collect();
            softmax_row(&mut row, 0.3);
            let total: f32 = row.iter().sum();
            assert!((total - 1.0).abs() < 1e-5 && row.iter().all(|x| x.is_finite()), "{len}: {total}");
        }
    }

    #[test]
    fn norm_gives_mean_zero_and_variance_one() {
        let mut row: Vec<f32> = (0..37).map(|index| (index as f32).sin() * 5.0 + 3.0).collect();
        let zeros = vec![0.0; 37];
        add_norm_row(&mut row, &zeros, &zeros, (&[1.0; 37], &zeros, 1e-12));
        let mean: f32 = row.iter().sum::<f32>() / 37.0;
        let variance: f32 = row.iter().map(|x| x * x).sum::<f32>() / 37.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5, "{mean} {variance}");
    }
}

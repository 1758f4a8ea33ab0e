//! Row kernels: layer norm, softmax, quantisation, pooling, and the functions in them. Plain loops, compiled once per CPU path.

use super::cpu::{CpuPath, path};
use crate::packing::PANEL_COLUMNS;

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
                CpuPath::Avx512 | CpuPath::Avx512Vnni | CpuPath::Amx => unsafe { avx512($($argument),*) },
                // SAFETY: `path` found these features on this CPU.
                #[cfg(target_arch = "x86_64")]
                CpuPath::Avx2 => unsafe { avx2($($argument),*) },
                _ => $body::<false>($($argument),*),
            }
        }
    };
}

/// As [`per_cpu`], for bodies that are unsafe to call.
macro_rules! per_cpu_unsafe {
    ($(#[$doc:meta])* $visibility:vis unsafe fn $name:ident($($argument:ident: $kind:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $visibility unsafe fn $name($($argument: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            unsafe fn avx512($($argument: $kind),*) {
                // SAFETY: the caller's promise.
                unsafe { $body::<true>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            unsafe fn avx2($($argument: $kind),*) {
                // SAFETY: the caller's promise.
                unsafe { $body::<true>($($argument),*) }
            }
            // SAFETY: the caller's promise; and `path` found the features on this CPU.
            unsafe {
                match path() {
                    #[cfg(target_arch = "x86_64")]
                    CpuPath::Avx512 | CpuPath::Avx512Vnni | CpuPath::Amx => avx512($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    CpuPath::Avx2 => avx2($($argument),*),
                    _ => $body::<false>($($argument),*),
                }
            }
        }
    };
}

pub(super) use per_cpu_unsafe;

/// `a * b + c`, fused where the CPU does that in one instruction (elsewhere it would be a slow call).
#[inline(always)]
pub(super) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// e^x for x from -87 up to about 88, to 2 units in the last place; 0 below -87.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUNDING);
    let n = shifted - ROUNDING;
    let r = fma::<FMA>(n, -0.693_359_4, x);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = fma::<FMA>(p, r, c);
    }
    let p = fma::<FMA>(p, r * r, r) + 1.0;
    let power = (shifted.to_bits() as i32).wrapping_sub(ROUNDING.to_bits() as i32);
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
pub(super) fn gelu_erf<const FMA: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + erf::<FMA>(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// `x/2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`, by way of the identity `(1 + tanh y)/2 = 1/(1 + e^-2y)`.
#[inline(always)]
pub(super) fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    let y = 0.797_884_6 * x * fma::<FMA>(0.044_715 * x, x, 1.0);
    x / (1.0 + exp::<FMA>(-2.0 * y))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(super) fn silu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp::<FMA>(-x))
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

/// The nearest bf16, ties to even; the upper half of the f32's bits. NaN stays NaN when it is a quiet one.
#[inline(always)]
pub(super) fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

#[inline(always)]
fn to_bf16_body<const FMA: bool>(row: &[f32], out: &mut [u16]) {
    for (out, value) in out.iter_mut().zip(row) {
        *out = bf16(*value);
    }
}

#[inline(always)]
fn pair_rows_body<const FMA: bool>(out: &mut [u32], even: &[u16], odd: &[u16]) {
    if even.len() == PANEL_COLUMNS && odd.len() == PANEL_COLUMNS && out.len() == PANEL_COLUMNS {
        for ((out, even), odd) in out.iter_mut().zip(even).zip(odd) {
            *out = u32::from(*even) | u32::from(*odd) << 16;
        }
        return;
    }
    out.fill(0);
    for (out, value) in out.iter_mut().zip(even) {
        *out = u32::from(*value);
    }
    for (out, value) in out.iter_mut().zip(odd) {
        *out |= u32::from(*value) << 16;
    }
}

/// # Safety
/// `rows` rows of `out.len() / 32` words at `source`, `stride_bytes` apart, must be readable.
#[inline(always)]
unsafe fn transpose_body<const FMA: bool>(
    out: &mut [u32],
    source: *const u8,
    stride_bytes: usize,
    rows: usize,
) {
    let (out, _) = out.as_chunks_mut::<PANEL_COLUMNS>();
    if rows == PANEL_COLUMNS {
        for (column, out) in out.iter_mut().enumerate() {
            for (row, out) in out.iter_mut().enumerate() {
                // SAFETY: the caller's promise.
                *out = unsafe { source.add(row * stride_bytes + 4 * column).cast::<u32>().read() };
            }
        }
        return;
    }
    for (column, out) in out.iter_mut().enumerate() {
        for (row, out) in out[..rows].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *out = unsafe { source.add(row * stride_bytes + 4 * column).cast::<u32>().read() };
        }
        out[rows..].fill(0);
    }
}

/// Adding it rounds to an integer in the low bits: 1.5 * 2^23.
const ROUNDING: f32 = 12_582_912.0;

#[inline(always)]
fn quantize_body<const FMA: bool>(row: &[f32], out: &mut [u8], scale_and_zero: &mut [f32; 2]) {
    let mut low = [f32::INFINITY; LANES];
    let mut high = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for ((low, high), value) in low.iter_mut().zip(&mut high).zip(chunk) {
            *low = if *value < *low { *value } else { *low };
            *high = if *value > *high { *value } else { *high };
        }
    }
    for ((low, high), value) in low.iter_mut().zip(&mut high).zip(rest) {
        *low = if *value < *low { *value } else { *low };
        *high = if *value > *high { *value } else { *high };
    }
    let low = low.into_iter().fold(f32::INFINITY, f32::min);
    let high = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let scale = (high - low) / 255.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (out, value) in out.iter_mut().zip(row) {
        *out = ((*value - low) * inverse + ROUNDING).to_bits() as u8;
    }
    *scale_and_zero = [scale, low];
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
fn rms_norm_body<const FMA: bool>(row: &mut [f32], weight: &[f32], eps: f32) {
    let scale = 1.0 / (sum_of(row, |x| x * x) / row.len() as f32 + eps).sqrt();
    for (value, weight) in row.iter_mut().zip(weight) {
        *value = *value * scale * weight;
    }
}

#[inline(always)]
fn embed_body<const FMA: bool>(row: &mut [f32], word: &[f32], kind: &[f32], position: &[f32]) {
    match (kind.is_empty(), position.is_empty()) {
        (false, false) => {
            for (((value, word), kind), position) in row.iter_mut().zip(word).zip(kind).zip(position) {
                *value = (word + kind) + position;
            }
        }
        (true, true) => row.copy_from_slice(word),
        (none, _) => {
            let other = if none { position } else { kind };
            for ((value, word), other) in row.iter_mut().zip(word).zip(other) {
                *value = word + other;
            }
        }
    }
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(row: &mut [f32], scale: f32, bias: &[f32]) {
    for (value, bias) in row.iter_mut().zip(bias) {
        *value = fma::<FMA>(*value, scale, *bias);
    }
}

/// A number of queries, keys and values as they lie between products.
trait Number: Copy {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> f32 {
        value
    }
}

impl Number for u16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> u16 {
        bf16(value)
    }
}

/// Norm and rotation of one head: see [`turn_f32`].
#[inline(always)]
fn turn<T: Number>(row: &mut [T], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) {
    let half = row.len() / 2;
    if let Some((weight, eps)) = norm {
        let mut squares = [0.0; LANES];
        for (index, value) in row.iter().enumerate() {
            let value = value.widen();
            squares[index % LANES] += value * value;
        }
        let scale = 1.0 / (sum(squares) / row.len() as f32 + eps).sqrt();
        let (low, high) = row.split_at_mut(half);
        let (low_weight, high_weight) = weight.split_at(half);
        for ((((low, high), (low_weight, high_weight)), cos), sin) in
            low.iter_mut().zip(high).zip(low_weight.iter().zip(high_weight)).zip(cos).zip(sin)
        {
            let (a, b) = (low.widen() * scale * low_weight, high.widen() * scale * high_weight);
            *low = T::narrow(a * cos - b * sin);
            *high = T::narrow(b * cos + a * sin);
        }
        return;
    }
    let (low, high) = row.split_at_mut(half);
    for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        let (a, b) = (low.widen(), high.widen());
        *low = T::narrow(a * cos - b * sin);
        *high = T::narrow(b * cos + a * sin);
    }
}

#[inline(always)]
fn turn_f32_body<const FMA: bool>(row: &mut [f32], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) {
    turn(row, norm, cos, sin);
}

#[inline(always)]
fn turn_bf16_body<const FMA: bool>(row: &mut [u16], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) {
    turn(row, norm, cos, sin);
}

#[inline(always)]
fn softmax_body<const FMA: bool>(row: &mut [f32], scale: f32) -> f32 {
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
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *value = exp::<FMA>(fma::<FMA>(*value, scale, -largest));
            *lane += *value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *value = exp::<FMA>(fma::<FMA>(*value, scale, -largest));
        *lane += *value;
    }
    1.0 / sum(lanes)
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
    /// The nearest bf16 of each number.
    pub(super) fn to_bf16(row: &[f32], out: &mut [u16]) = to_bf16_body
}
per_cpu! {
    /// Pairs of 16-bit words, `even` in the lower halves; zeros where a row has ended.
    pub(super) fn pair_rows(out: &mut [u32], even: &[u16], odd: &[u16]) = pair_rows_body
}
per_cpu_unsafe! {
    /// `out[column][row] = source[row][column]` for up to 32 rows, zeros behind the last.
    ///
    /// # Safety
    /// `rows` rows of `out.len() / 32` words at `source`, `stride_bytes` apart, must be readable.
    pub(super) unsafe fn transpose_words(out: &mut [u32], source: *const u8, stride_bytes: usize, rows: usize) = transpose_body
}
per_cpu! {
    /// [`quantize_row`] where it is not done by hand.
    fn quantize_in_loops(row: &[f32], out: &mut [u8], scale_and_zero: &mut [f32; 2]) = quantize_body
}

/// Quantises a row to 0 ..= 255: `row ≈ scale * out + zero`. Writes `[scale, zero]`.
pub(super) fn quantize_row(row: &[f32], out: &mut [u8], scale_and_zero: &mut [f32; 2]) {
    #[cfg(target_arch = "x86_64")]
    if path() >= CpuPath::Avx512 {
        // SAFETY: `path` found AVX-512 on this CPU.
        return unsafe { super::avx512::quantize_in_512(row, out, scale_and_zero) };
    }
    quantize_in_loops(row, out, scale_and_zero);
}

per_cpu! {
    /// `row = norm(row)`: weight, bias and epsilon of the layer norm.
    pub(super) fn norm_row(row: &mut [f32], weight: &[f32], bias: &[f32], eps: f32) = norm_body
}
per_cpu! {
    /// `row = row / √(mean of squares + eps) · weight`.
    pub(super) fn rms_norm_row(row: &mut [f32], weight: &[f32], eps: f32) = rms_norm_body
}
per_cpu! {
    /// `row = word + kind + position`; empty ones are left out.
    pub(super) fn embed_row(row: &mut [f32], word: &[f32], kind: &[f32], position: &[f32]) = embed_body
}
per_cpu! {
    /// `row = row * scale + bias`.
    pub(super) fn add_scaled(row: &mut [f32], scale: f32, bias: &[f32]) = add_scaled_body
}
per_cpu! {
    /// A head of queries or keys: divided by the root of its mean square and weighed, if there is a norm (weight and epsilon), then
    /// turned by a position's angles, number `i` with number `i + head_dim / 2`.
    pub(super) fn turn_f32(row: &mut [f32], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) = turn_f32_body
}
per_cpu! {
    /// As [`turn_f32`], of bf16.
    pub(super) fn turn_bf16(row: &mut [u16], norm: Option<(&[f32], f32)>, cos: &[f32], sin: &[f32]) = turn_bf16_body
}
per_cpu! {
    /// Softmax of `scale * row`, less a factor that is the result: the rows of the next product are fewer numbers to multiply.
    pub(super) fn softmax_row(row: &mut [f32], scale: f32) -> f32 = softmax_body
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
            let factor = softmax_row(&mut row, 0.3);
            let total = factor * row.iter().sum::<f32>();
            assert!((total - 1.0).abs() < 1e-5 && row.iter().all(|x| x.is_finite()), "{len}: {total}");
        }
    }

    #[test]
    fn norm_gives_mean_zero_and_variance_one() {
        let mut row: Vec<f32> = (0..37).map(|index| (index as f32).sin() * 5.0 + 3.0).collect();
        let zeros = vec![0.0; 37];
        norm_row(&mut row, &[1.0; 37], &zeros, 1e-12);
        let mean: f32 = row.iter().sum::<f32>() / 37.0;
        let variance: f32 = row.iter().map(|x| x * x).sum::<f32>() / 37.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-5, "{mean} {variance}");
    }
}

//! GELU for bf16 and int8: a table of parabolas, found when the crate is compiled. No CPU instructions here.
//!
//! Both variants are `x · T(x)` with `T(-x) = 1 - T(x)`, hence `max(x, 0) - g(|x|)` with the bump `g(a) = a · (1 - T(a))`. Each
//! parabola agrees with `g` at the three Chebyshev nodes of its segment; the error is `(h/2)³/24 · max|g'''| < 3e-5`, a tenth of
//! what bf16 can tell apart where `g` is largest.

/// Parabolas of a table.
pub(super) const SEGMENTS: usize = 32;
/// Segments to a unit; segment `i` has its middle at `i / SEGMENTS_PER_UNIT`.
pub(super) const SEGMENTS_PER_UNIT: f32 = 5.0;
/// The last segment's middle: beyond it, `g` is taken for what it is there, which is below 1e-8.
pub(super) const LARGEST: f32 = (SEGMENTS - 1) as f32 / SEGMENTS_PER_UNIT;

/// Coefficients of 1, a and a², for each segment.
pub(super) type Table = [[f32; SEGMENTS]; 3];

/// `a · (1 - Φ(a))`, Φ being the normal distribution's function.
pub(super) static GELU_ERF: Table = table(true);
/// The same with `tanh(√(2/π) (a + 0.044715 a³))` in the place of `erf(a/√2)`.
pub(super) static GELU_TANH: Table = table(false);

const fn table(is_erf: bool) -> Table {
    let mut table = [[0.0; SEGMENTS]; 3];
    let width = 1.0 / SEGMENTS_PER_UNIT as f64;
    let mut segment = 0;
    while segment < SEGMENTS {
        let middle = segment as f64 * width;
        // cos(π/6) of half the width; the first segment's left half is the even continuation, never asked for.
        let offset = 0.866_025_403_784_438_6 * width / 2.0;
        let (left, right) = (middle - offset, middle + offset);
        let (at_left, at_middle, at_right) = (bump(left, is_erf), bump(middle, is_erf), bump(right, is_erf));
        let slope = (at_right - at_left) / (2.0 * offset);
        let curve = (at_right - 2.0 * at_middle + at_left) / (2.0 * offset * offset);
        // In powers of a instead of a - middle.
        table[0][segment] = (at_middle - slope * middle + curve * middle * middle) as f32;
        table[1][segment] = (slope - 2.0 * curve * middle) as f32;
        table[2][segment] = curve as f32;
        segment += 1;
    }
    table
}

const fn bump(a: f64, is_erf: bool) -> f64 {
    a * if is_erf { normal_tail(a) } else { tanh_tail(a) }
}

/// `1 - Φ(a)`: Φ by the series of its density's integral, `1/2 + φ(a) (a + a³/3 + a⁵/15 + …)`, all terms of one sign.
const fn normal_tail(a: f64) -> f64 {
    let square = a * a;
    let (mut term, mut total, mut odd) = (a, a, 1.0);
    while odd < 400.0 {
        odd += 2.0;
        term *= square / odd;
        total += term;
    }
    0.5 - 0.398_942_280_401_432_7 * exp(-square / 2.0) * total
}

/// `1 - (1 + tanh y)/2 = 1/(1 + e^2y)`.
const fn tanh_tail(a: f64) -> f64 {
    let y = 0.797_884_560_802_865_4 * (a + 0.044715 * a * a * a);
    1.0 / (1.0 + exp(2.0 * y))
}

/// e^x by its series at x/1024, squared ten times.
const fn exp(x: f64) -> f64 {
    let small = x / 1024.0;
    let (mut term, mut total, mut n) = (1.0, 1.0, 1.0);
    while n < 12.0 {
        term *= small / n;
        total += term;
        n += 1.0;
    }
    let mut squarings = 0;
    while squarings < 10 {
        total *= total;
        squarings += 1;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::cpu::erf::erf_f64;

    /// As the kernels evaluate it.
    fn gelu(table: &Table, x: f32) -> f32 {
        let a = x.abs().min(LARGEST);
        let segment = (a * SEGMENTS_PER_UNIT).round_ties_even() as usize;
        let g = table[2][segment].mul_add(a, table[1][segment]).mul_add(a, table[0][segment]);
        x.max(0.0) - g
    }

    #[test]
    fn tables_are_accurate_to_a_fraction_of_bf16() {
        for step in -120_000..=120_000 {
            let x = step as f32 / 10_000.0;
            let x64 = f64::from(x);
            let wanted = 0.5 * x64 * (1.0 + erf_f64(x64 / 2f64.sqrt()));
            assert!((f64::from(gelu(&GELU_ERF, x)) - wanted).abs() < 4e-5, "gelu({x})");
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044715 * x64.powi(3));
            let wanted = 0.5 * x64 * (1.0 + y.tanh());
            assert!((f64::from(gelu(&GELU_TANH, x)) - wanted).abs() < 4e-5, "gelu_tanh({x})");
        }
    }
}

//! GELU from tables of polynomials, found when the crate is compiled. No CPU instructions here.
//!
//! Both variants are `x · T(x)` with `T(-x) = 1 - T(x)`, hence `max(x, 0) - g(|x|)` with the bump `g(a) = a · (1 - T(a))`. Each
//! polynomial agrees with `g` at the Chebyshev nodes of its segment, of width h. Parabolas are for bf16 and int8: their error is
//! `(h/2)³/24 · max|d³g/da³| < 4e-5`, a tenth of what bf16 can tell apart where `g` is largest. Degree 4 is for f32: 3e-8.

/// Polynomials of a table.
pub(super) const SEGMENTS: usize = 32;
/// Segments to a unit; segment `i` has its middle at `i / SEGMENTS_PER_UNIT`.
pub(super) const SEGMENTS_PER_UNIT: f32 = 5.0;
/// The last segment's middle: beyond it, `g` is taken for what it is there, which is below 1e-8.
pub(super) const LARGEST: f32 = (SEGMENTS - 1) as f32 / SEGMENTS_PER_UNIT;

/// Coefficients of 1, a and a², for each segment.
pub(super) type Parabolas = [[f32; SEGMENTS]; 3];
/// Coefficients of 1, t … t⁴, for each segment; `t` is the distance from the segment's middle in segments, -1/2 to 1/2.
pub(super) type Quartics = [[f32; SEGMENTS]; 5];

/// Both tables of one function.
pub(super) struct Gelu {
    pub(super) parabolas: Parabolas,
    pub(super) quartics: Quartics,
}

/// `a · (1 - Φ(a))`, Φ being the normal distribution's function.
pub(super) static GELU_ERF: Gelu = tables(true);
/// The same with `tanh(√(2/π) (a + 0.044715 a³))` in the place of `erf(a/√2)`.
pub(super) static GELU_TANH: Gelu = tables(false);

/// Chebyshev's nodes of degree 3 and 5 on [-1/2, 1/2].
const NODES_3: [f64; 3] = [-0.433_012_701_892_219_3, 0.0, 0.433_012_701_892_219_3];
const NODES_5: [f64; 5] = [
    -0.475_528_258_147_576_8,
    -0.293_892_626_146_236_6,
    0.0,
    0.293_892_626_146_236_6,
    0.475_528_258_147_576_8,
];

const fn tables(is_erf: bool) -> Gelu {
    let mut gelu = Gelu { parabolas: [[0.0; SEGMENTS]; 3], quartics: [[0.0; SEGMENTS]; 5] };
    let per_unit = SEGMENTS_PER_UNIT as f64;
    let mut segment = 0;
    while segment < SEGMENTS {
        let middle = segment as f64;
        let [c0, c1, c2] = fit(NODES_3, middle, is_erf);
        // In powers of a instead of t = per_unit * a - middle.
        gelu.parabolas[0][segment] = (c0 - c1 * middle + c2 * middle * middle) as f32;
        gelu.parabolas[1][segment] = ((c1 - 2.0 * c2 * middle) * per_unit) as f32;
        gelu.parabolas[2][segment] = (c2 * per_unit * per_unit) as f32;
        let quartic = fit(NODES_5, middle, is_erf);
        let mut power = 0;
        while power < 5 {
            gelu.quartics[power][segment] = quartic[power] as f32;
            power += 1;
        }
        segment += 1;
    }
    gelu
}

/// Coefficients of the polynomial in `t` that agrees with `g` at `a = (middle + t) / SEGMENTS_PER_UNIT` for each node `t`, by
/// Newton's divided differences. Left of zero the even continuation of `g` is met, which nobody asks for.
const fn fit<const N: usize>(nodes: [f64; N], middle: f64, is_erf: bool) -> [f64; N] {
    let mut differences = [0.0; N];
    let mut node = 0;
    while node < N {
        differences[node] = bump((middle + nodes[node]) / SEGMENTS_PER_UNIT as f64, is_erf);
        node += 1;
    }
    let mut order = 1;
    while order < N {
        let mut node = N - 1;
        while node >= order {
            differences[node] =
                (differences[node] - differences[node - 1]) / (nodes[node] - nodes[node - order]);
            node -= 1;
        }
        order += 1;
    }
    // Horner's rule over the nodes, on polynomials: result = result * (t - node) + difference.
    let mut result = [0.0; N];
    let mut step = N;
    while step > 0 {
        step -= 1;
        let mut power = N - 1;
        while power > 0 {
            result[power] = result[power - 1] - nodes[step] * result[power];
            power -= 1;
        }
        result[0] = differences[step] - nodes[step] * result[0];
    }
    result
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

    /// As the kernels evaluate them.
    fn gelus(table: &Gelu, x: f32) -> [f32; 2] {
        let a = x.abs().min(LARGEST);
        let middle = (a * SEGMENTS_PER_UNIT).round_ties_even();
        let segment = middle as usize;
        let [c0, c1, c2] = table.parabolas.map(|row| row[segment]);
        let t = a.mul_add(SEGMENTS_PER_UNIT, -middle);
        let quartic = table.quartics.iter().rev().fold(0.0f32, |sum, row| sum.mul_add(t, row[segment]));
        [x.max(0.0) - c2.mul_add(a, c1).mul_add(a, c0), x.max(0.0) - quartic]
    }

    #[test]
    fn parabolas_are_accurate_to_a_fraction_of_bf16_and_quartics_to_f32() {
        for step in -120_000..=120_000 {
            let x = step as f32 / 10_000.0;
            let x64 = f64::from(x);
            let y = (2.0 / std::f64::consts::PI).sqrt() * (x64 + 0.044715 * x64.powi(3));
            let wanted = [
                (&GELU_ERF, 0.5 * x64 * (1.0 + erf_f64(x64 / 2f64.sqrt()))),
                (&GELU_TANH, 0.5 * x64 * (1.0 + y.tanh())),
            ];
            for (table, wanted) in wanted {
                let [close, closer] = gelus(table, x);
                assert!((f64::from(close) - wanted).abs() < 4e-5, "{close} for gelu({x}), not {wanted}");
                let allowed = 2e-7 * x64.abs().max(1.0);
                assert!((f64::from(closer) - wanted).abs() < allowed, "{closer} for gelu({x}), not {wanted}");
            }
        }
    }
}

//! bf16 tiles with f32 sums: `tile[r, c] = Σ a[r, k] · panel[k, c]`, `k` in pairs. One function per CPU path, nothing else.

use super::cpu::CpuPath;
use super::product::{PANEL_COLUMNS, Target, for_rows};

/// Bytes of a panel for one pair: 32 columns of two elements.
const PAIR_ROW_BYTES: usize = 4 * PANEL_COLUMNS;

/// Computes a tile of `rows` rows; `a` is the first row, rows are `stride_bytes` apart, `panel` is `[pairs, 32, 2]`.
///
/// # Safety
/// `2 * pairs` elements of each row and the whole panel must be readable, `rows` rows of 32 at `out` writable, and the CPU must have the path.
pub(super) unsafe fn tile(
    path: CpuPath,
    a: *const u8,
    stride_bytes: usize,
    rows: usize,
    panel: *const u8,
    pairs: usize,
    out: Target<f32>,
) {
    // SAFETY: the caller's promises; the target has room for all rows of the tile.
    unsafe {
        match path {
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512Vnni | CpuPath::Amx => {
                for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_bf16(a, stride_bytes, panel, pairs, out));
            }
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512 => {
                for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512(a, stride_bytes, panel, pairs, out));
            }
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 => for_rows!(rows, [1 2 3 4 5 6], avx2(a, stride_bytes, panel, pairs, out)),
            _ => portable(a, stride_bytes, rows, panel, pairs, out),
        }
    }
}

/// # Safety
/// As [`tile`], for `ROWS` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_bf16<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const u8,
    pairs: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    // SAFETY: indices stay below `pairs` and `ROWS`, which the caller promises to be readable; the target has room for `ROWS` rows.
    // The two vector types have the same size and take any bits.
    unsafe {
        let as_pairs = |bits: __m512i| std::mem::transmute::<__m512i, __m512bh>(bits);
        for pair in 0..pairs {
            let low = as_pairs(_mm512_loadu_si512(panel.add(PAIR_ROW_BYTES * pair).cast()));
            let high = as_pairs(_mm512_loadu_si512(panel.add(PAIR_ROW_BYTES * pair + 64).cast()));
            for (row, sums) in sums.iter_mut().enumerate() {
                let bits = a.add(row * stride_bytes + 4 * pair).cast::<i32>().read_unaligned();
                let value = as_pairs(_mm512_set1_epi32(bits));
                sums[0] = _mm512_dpbf16_ps(sums[0], value, low);
                sums[1] = _mm512_dpbf16_ps(sums[1], value, high);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            _mm512_storeu_ps(out.at(row), sums[0]);
            _mm512_storeu_ps(out.at(row).add(16), sums[1]);
        }
    }
}

/// # Safety
/// As [`tile`], for `ROWS` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const u8,
    pairs: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    // SAFETY: as in `avx512_bf16`. A bf16 is the upper half of the f32 of the same value.
    unsafe {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let first = |bits: __m512i| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
        let second = |bits: __m512i| _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
        for half in [0, 16] {
            let mut sums = [_mm512_setzero_ps(); ROWS];
            for pair in 0..pairs {
                let weights = _mm512_loadu_si512(panel.add(PAIR_ROW_BYTES * pair + 4 * half).cast());
                let (even, odd) = (first(weights), second(weights));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let bits = a.add(row * stride_bytes + 4 * pair).cast::<u32>().read_unaligned();
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(bits << 16)), even, *sum);
                    *sum = _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(bits & 0xffff_0000)), odd, *sum);
                }
            }
            let out = out.column(half);
            for (row, sum) in sums.iter().enumerate() {
                _mm512_storeu_ps(out.at(row), *sum);
            }
        }
    }
}

/// # Safety
/// As [`tile`], for `ROWS` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const u8,
    pairs: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    // SAFETY: as in `avx512`.
    unsafe {
        let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        let first = |bits: __m256i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits));
        let second = |bits: __m256i| _mm256_castsi256_ps(_mm256_and_si256(bits, upper));
        for quarter in [0, 8, 16, 24] {
            let mut sums = [_mm256_setzero_ps(); ROWS];
            for pair in 0..pairs {
                let weights = _mm256_loadu_si256(panel.add(PAIR_ROW_BYTES * pair + 4 * quarter).cast());
                let (even, odd) = (first(weights), second(weights));
                for (row, sum) in sums.iter_mut().enumerate() {
                    let bits = a.add(row * stride_bytes + 4 * pair).cast::<u32>().read_unaligned();
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(f32::from_bits(bits << 16)), even, *sum);
                    *sum = _mm256_fmadd_ps(_mm256_set1_ps(f32::from_bits(bits & 0xffff_0000)), odd, *sum);
                }
            }
            let out = out.column(quarter);
            for (row, sum) in sums.iter().enumerate() {
                _mm256_storeu_ps(out.at(row), *sum);
            }
        }
    }
}

/// # Safety
/// As [`tile`].
unsafe fn portable(
    a: *const u8,
    stride_bytes: usize,
    rows: usize,
    panel: *const u8,
    pairs: usize,
    out: Target<f32>,
) {
    for row in 0..rows {
        let mut sums = [0.0; PANEL_COLUMNS];
        for pair in 0..pairs {
            // SAFETY: as in `avx512_bf16`.
            let (bits, weights) = unsafe {
                (
                    a.add(row * stride_bytes + 4 * pair).cast::<u32>().read_unaligned(),
                    panel.add(PAIR_ROW_BYTES * pair).cast::<[u32; PANEL_COLUMNS]>().read_unaligned(),
                )
            };
            let (even, odd) = (f32::from_bits(bits << 16), f32::from_bits(bits & 0xffff_0000));
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += even * f32::from_bits(weight << 16);
                *sum += odd * f32::from_bits(weight & 0xffff_0000);
            }
        }
        // SAFETY: a row of the target.
        unsafe { out.row(row, PANEL_COLUMNS) }.copy_from_slice(&sums);
    }
}

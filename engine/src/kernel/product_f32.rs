//! Single-precision tiles: `tile[r, c] = Σ a[r, k] · panel[k, c]`. One function per CPU path, nothing else.

use super::cpu::CpuPath;
use super::product::{PANEL_COLUMNS, Target, for_rows};

/// Computes a tile of `rows` rows; `a` is the first row, rows are `stride_bytes` apart, `panel` is `[k, 32]`.
///
/// # Safety
/// `k` floats of each row and the whole panel must be readable, `rows` rows of 32 at `out` writable, and the CPU must have the path.
pub(super) unsafe fn tile(
    path: CpuPath,
    a: *const u8,
    stride_bytes: usize,
    rows: usize,
    panel: *const f32,
    k: usize,
    out: Target<f32>,
) {
    // SAFETY: the caller's promises; the target has room for all rows of the tile.
    unsafe {
        match path {
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512 | CpuPath::Avx512Vnni | CpuPath::Amx => {
                for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512(a, stride_bytes, panel, k, out));
            }
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 => for_rows!(rows, [1 2 3 4 5 6], avx2(a, stride_bytes, panel, k, out)),
            _ => portable(a, stride_bytes, rows, panel, k, out),
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
    panel: *const f32,
    k: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    // SAFETY: indices stay below `k` and `ROWS`, which the caller promises to be readable; the target has room for `ROWS` rows.
    unsafe {
        for step in 0..k {
            let low = _mm512_loadu_ps(panel.add(PANEL_COLUMNS * step));
            let high = _mm512_loadu_ps(panel.add(PANEL_COLUMNS * step + 16));
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(row * stride_bytes + 4 * step).cast::<f32>());
                sums[0] = _mm512_fmadd_ps(value, low, sums[0]);
                sums[1] = _mm512_fmadd_ps(value, high, sums[1]);
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
#[target_feature(enable = "avx2,fma")]
unsafe fn avx2<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const f32,
    k: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    // SAFETY: as in `avx512`.
    unsafe {
        for half in [0, 16] {
            let mut sums = [[_mm256_setzero_ps(); 2]; ROWS];
            for step in 0..k {
                let low = _mm256_loadu_ps(panel.add(PANEL_COLUMNS * step + half));
                let high = _mm256_loadu_ps(panel.add(PANEL_COLUMNS * step + half + 8));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let value = _mm256_set1_ps(*a.add(row * stride_bytes + 4 * step).cast::<f32>());
                    sums[0] = _mm256_fmadd_ps(value, low, sums[0]);
                    sums[1] = _mm256_fmadd_ps(value, high, sums[1]);
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                _mm256_storeu_ps(out.at(row).add(half), sums[0]);
                _mm256_storeu_ps(out.at(row).add(half + 8), sums[1]);
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
    panel: *const f32,
    k: usize,
    out: Target<f32>,
) {
    for row in 0..rows {
        let mut sums = [0.0; PANEL_COLUMNS];
        for step in 0..k {
            // SAFETY: as in `avx512`.
            let (value, weights) = unsafe {
                (
                    *a.add(row * stride_bytes + 4 * step).cast::<f32>(),
                    &*panel.add(PANEL_COLUMNS * step).cast::<[f32; PANEL_COLUMNS]>(),
                )
            };
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum += value * weight;
            }
        }
        // SAFETY: a row of the target.
        unsafe { out.row(row, PANEL_COLUMNS) }.copy_from_slice(&sums);
    }
}

//! Integer tiles: `tile[r, c] = Σ a[r, k] · panel[k, c]` with u8 rows, i8 panel and i32 sums, `k` in fours. Exact, so all
//! paths agree bit for bit. One function per CPU path, nothing else.

use super::cpu::CpuPath;
use super::product::{PANEL_COLUMNS, Target, for_rows};

/// Bytes of a panel for four elements of `k`: 32 columns of four.
const QUAD_ROW_BYTES: usize = 4 * PANEL_COLUMNS;

/// Computes a tile of `rows` rows; `a` is the first row, rows are `stride_bytes` apart, `panel` is `[quads, 32, 4]`. The tile
/// holds the bits of the sums.
///
/// # Safety
/// `4 * quads` bytes of each row and the whole panel must be readable, `rows` rows of 32 at `out` writable, and the CPU must have the path.
pub(super) unsafe fn tile(
    path: CpuPath,
    a: *const u8,
    stride_bytes: usize,
    rows: usize,
    panel: *const u8,
    quads: usize,
    out: Target<f32>,
) {
    // SAFETY: the caller's promises; the target has room for all rows of the tile.
    unsafe {
        match path {
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx512Vnni | CpuPath::Amx => {
                for_rows!(rows, [1 2 3 4 5 6 7 8 9 10 11 12], avx512_vnni(a, stride_bytes, panel, quads, out));
            }
            #[cfg(target_arch = "x86_64")]
            CpuPath::Avx2 | CpuPath::Avx512 => {
                for_rows!(rows, [1 2 3 4], avx2(a, stride_bytes, panel, quads, out));
            }
            _ => portable(a, stride_bytes, rows, panel, quads, out),
        }
    }
}

/// # Safety
/// As [`tile`], for `ROWS` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn avx512_vnni<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const u8,
    quads: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    let mut sums = [[_mm512_setzero_si512(); 2]; ROWS];
    // SAFETY: indices stay below `quads` and `ROWS`, which the caller promises to be readable; the target has room for `ROWS` rows.
    unsafe {
        for quad in 0..quads {
            let low = _mm512_loadu_si512(panel.add(QUAD_ROW_BYTES * quad).cast());
            let high = _mm512_loadu_si512(panel.add(QUAD_ROW_BYTES * quad + 64).cast());
            for (row, sums) in sums.iter_mut().enumerate() {
                let bits = a.add(row * stride_bytes + 4 * quad).cast::<i32>().read_unaligned();
                let value = _mm512_set1_epi32(bits);
                sums[0] = _mm512_dpbusd_epi32(sums[0], value, low);
                sums[1] = _mm512_dpbusd_epi32(sums[1], value, high);
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            _mm512_storeu_si512(out.at(row).cast(), sums[0]);
            _mm512_storeu_si512(out.at(row).add(16).cast(), sums[1]);
        }
    }
}

/// By 16-bit products, of which no sum of two overflows: the 8-bit instruction of AVX2 saturates.
///
/// # Safety
/// As [`tile`], for `ROWS` rows.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2<const ROWS: usize>(
    a: *const u8,
    stride_bytes: usize,
    panel: *const u8,
    quads: usize,
    out: Target<f32>,
) {
    use std::arch::x86_64::*;
    // SAFETY: as in `avx512_vnni`; a group is 4 columns, 16 bytes, of a panel's row.
    unsafe {
        for group in (0..PANEL_COLUMNS).step_by(8) {
            let mut sums = [[_mm256_setzero_si256(); 2]; ROWS];
            for quad in 0..quads {
                let at = panel.add(QUAD_ROW_BYTES * quad + 4 * group);
                let low = _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast()));
                let high = _mm256_cvtepi8_epi16(_mm_loadu_si128(at.add(16).cast()));
                for (row, sums) in sums.iter_mut().enumerate() {
                    let bits = a.add(row * stride_bytes + 4 * quad).cast::<i32>().read_unaligned();
                    let value = _mm256_cvtepu8_epi16(_mm_set1_epi32(bits));
                    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(value, low));
                    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(value, high));
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                // Neighbours are halves of one column's sum; the addition across lanes leaves columns 0 1 4 5 | 2 3 6 7.
                let both = _mm256_permute4x64_epi64::<0b1101_1000>(_mm256_hadd_epi32(sums[0], sums[1]));
                _mm256_storeu_si256(out.at(row).add(group).cast(), both);
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
    quads: usize,
    out: Target<f32>,
) {
    for row in 0..rows {
        let mut sums = [0i32; PANEL_COLUMNS];
        for quad in 0..quads {
            // SAFETY: as in `avx512_vnni`.
            let (values, weights) = unsafe {
                (
                    a.add(row * stride_bytes + 4 * quad).cast::<[u8; 4]>().read(),
                    panel.add(QUAD_ROW_BYTES * quad).cast::<[[i8; 4]; PANEL_COLUMNS]>().read(),
                )
            };
            for (sum, weights) in sums.iter_mut().zip(weights) {
                for (value, weight) in values.into_iter().zip(weights) {
                    *sum += i32::from(value) * i32::from(weight);
                }
            }
        }
        let bits = sums.map(|sum| f32::from_bits(sum as u32));
        // SAFETY: a row of the target.
        unsafe { out.row(row, PANEL_COLUMNS) }.copy_from_slice(&bits);
    }
}

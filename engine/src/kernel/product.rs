//! Products of rows with packed panels: which kernel takes how many rows, and where results go. The arithmetic is in
//! `product_f32`, `product_bf16`, `product_int8` and `amx`.
//!
//! Every element of a result is summed over `k` in ascending order by one accumulator, however many rows and panels there
//! are, so it is the same bit for bit in every product (on one CPU path).

use super::cpu::{CpuPath, path};
use super::{product_bf16, product_f32, product_int8};
use std::ops::Range;

use crate::packing::Packing;
pub(super) use crate::packing::{PANEL_COLUMNS, Precision};

/// Most rows of a tile.
pub(super) const TILE_ROWS: usize = 32;

/// Results of one kernel call: up to [`TILE_ROWS`] rows of one panel. For int8 the bits of `i32`.
#[repr(C, align(64))]
pub(super) struct Tile([[f32; PANEL_COLUMNS]; TILE_ROWS]);

impl Tile {
    pub(super) fn new() -> Tile {
        Tile([[0.0; PANEL_COLUMNS]; TILE_ROWS])
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr().cast()
    }

    /// The first `count` rows.
    pub(super) fn rows(&self, count: usize) -> &[[f32; PANEL_COLUMNS]] {
        &self.0[..count]
    }

    /// The first `count` rows, to write.
    pub(super) fn rows_mut(&mut self, count: usize) -> &mut [[f32; PANEL_COLUMNS]] {
        &mut self.0[..count]
    }
}

/// The left side of a product: rows in memory that other threads may write elsewhere.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// First byte of the first row.
    pub(super) start: *const u8,
    /// Distance of rows in bytes.
    pub(super) stride_bytes: usize,
    /// Number of rows.
    pub(super) rows: usize,
}

/// The right side of a product: packed panels of [`PANEL_COLUMNS`] columns, see [`crate::packing`].
#[derive(Clone, Copy)]
pub(super) struct Right {
    /// First byte of the first panel.
    pub(super) start: *const u8,
    /// Precision of both sides.
    pub(super) precision: Precision,
    /// Elements that are summed, padding included: [`Precision::padded`].
    pub(super) inputs: usize,
}

impl Right {
    fn panel_bytes(self) -> usize {
        self.inputs * PANEL_COLUMNS * self.precision.element_bytes()
    }
}

/// Rows that the path's kernel takes at once.
fn rows_at_once(path: CpuPath, precision: Precision) -> usize {
    match (path, precision) {
        (CpuPath::Amx, Precision::Bf16 | Precision::Int8) => TILE_ROWS,
        (CpuPath::Avx512 | CpuPath::Avx512Vnni | CpuPath::Amx, Precision::F32)
        | (CpuPath::Avx512 | CpuPath::Avx512Vnni, Precision::Bf16)
        | (CpuPath::Avx512Vnni, Precision::Int8) => 12,
        (CpuPath::Avx2, Precision::F32 | Precision::Bf16) => 6,
        _ => 4,
    }
}

/// Multiplies all rows of `left` with the panels in `panels` of `right` and hands each tile to `finish(tile, rows, panel)`.
///
/// # Safety
/// All rows of `left` must be readable for `right.inputs` elements, with 32 further rows behind the first one of any
/// tile where the path is AMX (their contents do not matter), and all of `panels` of `right`; nobody may write them meanwhile.
pub(super) unsafe fn multiply(
    left: Left,
    right: Right,
    panels: Range<usize>,
    mut finish: impl FnMut(&mut Tile, Range<usize>, usize),
) {
    if left.rows == 0 {
        return;
    }
    let path = path();
    let most = rows_at_once(path, right.precision);
    // Tiles of even height: a last one of a single row would cost as much as one of four.
    let tiles = left.rows.div_ceil(most);
    let height = if most == TILE_ROWS { TILE_ROWS } else { left.rows.div_ceil(tiles) };
    let mut tile = Tile::new();
    #[cfg(target_arch = "x86_64")]
    let session = (path == CpuPath::Amx && right.precision != Precision::F32).then(|| {
        // SAFETY: the path is AMX only where it was found to be usable.
        unsafe { super::amx::Session::start() }
    });
    for panel in panels {
        // SAFETY: the panel is one of `right` (the caller's promise).
        let weights = unsafe { right.start.add(panel * right.panel_bytes()) };
        for first in (0..left.rows).step_by(height) {
            let rows = (left.rows - first).min(height);
            // SAFETY: `first` is a row of `left`.
            let a = unsafe { left.start.add(first * left.stride_bytes) };
            #[cfg(target_arch = "x86_64")]
            if let Some(session) = &session {
                let steps = right.inputs * right.precision.element_bytes() / super::amx::STEP_BYTES;
                // SAFETY: `inputs` is padded to whole steps (`Precision::padded`), and 32 rows are readable (the caller).
                unsafe {
                    match right.precision {
                        Precision::Bf16 => session.bf16(a, left.stride_bytes, weights, steps, &mut tile),
                        _ => session.int8(a, left.stride_bytes, weights, steps, &mut tile),
                    }
                }
                finish(&mut tile, first..first + rows, panel);
                continue;
            }
            // SAFETY: `rows` rows at `a` and one panel at `weights` are readable; the path is one that this CPU has.
            unsafe {
                match right.precision {
                    Precision::F32 => {
                        product_f32::tile(
                            path,
                            a,
                            left.stride_bytes,
                            rows,
                            weights.cast(),
                            right.inputs,
                            &mut tile,
                        );
                    }
                    Precision::Bf16 => {
                        product_bf16::tile(
                            path,
                            a,
                            left.stride_bytes,
                            rows,
                            weights,
                            right.inputs / 2,
                            &mut tile,
                        );
                    }
                    Precision::Int8 => {
                        product_int8::tile(
                            path,
                            a,
                            left.stride_bytes,
                            rows,
                            weights,
                            right.inputs / 4,
                            &mut tile,
                        );
                    }
                }
            }
            finish(&mut tile, first..first + rows, panel);
        }
    }
}

/// Calls `$function::<ROWS>` for a number of rows known at run time only.
macro_rules! for_rows {
    ($rows:expr, [$($count:literal)*], $function:ident $arguments:tt) => {
        match $rows {
            $($count => $function::<$count> $arguments,)*
            rows => unreachable!("a tile of {rows} rows"),
        }
    };
}
pub(super) use for_rows;

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

    fn target(&mut self) -> Target<f32> {
        Target { start: self.0.as_mut_ptr().cast(), stride: PANEL_COLUMNS }
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

/// Where results go: the first element, and the distance of rows, both in elements of `T`.
#[derive(Clone, Copy)]
pub(super) struct Target<T> {
    pub(super) start: *mut T,
    pub(super) stride: usize,
}

impl<T> Target<T> {
    /// The first element of a row.
    ///
    /// # Safety
    /// The row must be inside the target.
    #[inline(always)]
    pub(super) unsafe fn at(self, row: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.start.add(row * self.stride) }
    }

    /// The target from a column on.
    ///
    /// # Safety
    /// The column must be inside the target.
    #[inline(always)]
    pub(super) unsafe fn column(self, column: usize) -> Target<T> {
        // SAFETY: the caller's promise.
        Target { start: unsafe { self.start.add(column) }, stride: self.stride }
    }

    /// The first `columns` elements of a row.
    ///
    /// # Safety
    /// They must be inside the target, initialised, and nobody else's while the slice lives.
    #[inline(always)]
    pub(super) unsafe fn row<'a>(self, row: usize, columns: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(row), columns) }
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
    /// Elements of a column in each panel: `inputs`, or more when only a part of each panel is multiplied.
    pub(super) panel_inputs: usize,
}

impl Right {
    /// Whole panels.
    pub(super) fn whole(start: *const u8, precision: Precision, inputs: usize) -> Right {
        Right { start, precision, inputs, panel_inputs: inputs }
    }

    fn panel_bytes(self) -> usize {
        self.panel_inputs * PANEL_COLUMNS * self.precision.element_bytes()
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

/// One way to compute tiles: what the CPU has, and what it needs while it computes.
struct Kernel {
    path: CpuPath,
    right: Right,
    stride_bytes: usize,
    #[cfg(target_arch = "x86_64")]
    session: Option<super::amx::Session>,
}

impl Kernel {
    fn new(right: Right, stride_bytes: usize) -> Kernel {
        let path = path();
        #[cfg(target_arch = "x86_64")]
        let session = (path == CpuPath::Amx && right.precision != Precision::F32).then(|| {
            // SAFETY: the path is AMX only where it was found to be usable.
            unsafe { super::amx::Session::start() }
        });
        Kernel {
            path,
            right,
            stride_bytes,
            #[cfg(target_arch = "x86_64")]
            session,
        }
    }

    /// Rows of each tile but the last.
    fn height(&self, rows: usize) -> usize {
        match rows_at_once(self.path, self.right.precision) {
            TILE_ROWS => TILE_ROWS,
            // Tiles of even height: a last one of a single row would cost as much as one of four.
            most => rows.div_ceil(rows.div_ceil(most)),
        }
    }

    /// Computes one tile: that of a panel and of part `part` of the rows.
    ///
    /// # Safety
    /// As [`multiply`] for these rows and this panel, whose first bytes these are; `out` has room for the tile, [`TILE_ROWS`]
    /// rows where the path is AMX.
    unsafe fn tile(&self, a: *const u8, rows: usize, (panel, part): (usize, usize), out: Target<f32>) {
        let Kernel { path, right, stride_bytes, .. } = *self;
        // SAFETY: the panel is one of `right` (the caller's promise).
        let weights = unsafe { right.start.add(panel * right.panel_bytes()) };
        #[cfg(target_arch = "x86_64")]
        if let Some(session) = &self.session {
            let steps = right.inputs * right.precision.element_bytes() / super::amx::STEP_BYTES;
            // Each tile of this panel fetches its part of the next one: weights come from far away.
            let next =
                weights.wrapping_add(right.panel_bytes() + part * steps * super::amx::STEP_PREFETCH_BYTES);
            // SAFETY: `inputs` is padded to whole steps (`Precision::padded`); 32 rows are readable and writable (the caller).
            unsafe {
                match right.precision {
                    Precision::Bf16 => session.bf16(a, stride_bytes, weights, steps, out, next),
                    _ => session.int8(a, stride_bytes, weights, steps, out, next),
                }
            }
            return;
        }
        // SAFETY: rows and panel are readable, the target writable (the caller); the path is one that this CPU has.
        unsafe {
            match right.precision {
                Precision::F32 => {
                    product_f32::tile(path, a, stride_bytes, rows, weights.cast(), right.inputs, out);
                }
                Precision::Bf16 => {
                    product_bf16::tile(path, a, stride_bytes, rows, weights, right.inputs / 2, out)
                }
                Precision::Int8 => {
                    product_int8::tile(path, a, stride_bytes, rows, weights, right.inputs / 4, out)
                }
            }
        }
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
    let kernel = Kernel::new(right, left.stride_bytes);
    let height = kernel.height(left.rows);
    let mut tile = Tile::new();
    for panel in panels {
        for first in (0..left.rows).step_by(height) {
            let rows = (left.rows - first).min(height);
            // SAFETY: `first` is a row of `left`; the rest is the caller's promise; a tile has room for a tile.
            unsafe {
                kernel.tile(
                    left.start.add(first * left.stride_bytes),
                    rows,
                    (panel, first / height),
                    tile.target(),
                );
            }
            finish(&mut tile, first..first + rows, panel);
        }
    }
}

/// As [`multiply`], written as it is to `out`, panel `p` at column `32 * p`.
///
/// # Safety
/// As [`multiply`]; `out` must have room for whole panels of all rows, and of a multiple of [`TILE_ROWS`] rows.
pub(super) unsafe fn multiply_into(left: Left, right: Right, panels: Range<usize>, out: Target<f32>) {
    if left.rows == 0 {
        return;
    }
    let kernel = Kernel::new(right, left.stride_bytes);
    let height = kernel.height(left.rows);
    for panel in panels {
        for first in (0..left.rows).step_by(height) {
            let rows = (left.rows - first).min(height);
            // SAFETY: `first` is a row of `left`; the rest is the caller's promise.
            unsafe {
                let out = Target { start: out.at(first), stride: out.stride }.column(PANEL_COLUMNS * panel);
                kernel.tile(left.start.add(first * left.stride_bytes), rows, (panel, first / height), out);
            }
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

//! Stacks of transformer layers over rows of several sequences with keys and values kept: what generators run. Public doors and
//! their checks; the loops are below.
//!
//! A row is one token of one sequence. Its result depends on the row and on what its sequence keeps, never on what other rows are
//! computed beside it or on how many threads there are.

mod attention;
mod blocks;
mod forward;
mod product;
#[cfg(test)]
mod tests;
mod weights;

pub(crate) use weights::{
    CrossWeights, Dense, DistanceBias, Feed, Kept, Matrix, Mismatch, Sees, StackLayer, StackShape,
    StackWeights, Step, StepRow,
};

use super::scratch::Place;
use super::team::with_team;
use crate::packing::Packing;
use forward::Pass;
use product::{Left, Out, Work};

/// Runs the `step.layers` of a stack over rows whose hidden states `hidden`, `[rows, width]`, are changed in place; their keys and
/// values are added to what the sequences keep.
///
/// # Errors
/// [`Mismatch`] when lengths, slots or weights do not belong together; nothing is computed then.
pub(crate) fn run_stack(
    threads: usize,
    stack: &StackWeights<'_>,
    step: &Step<'_>,
    kept: &mut [Kept<'_>],
    hidden: &mut [f32],
) -> Result<(), Mismatch> {
    stack.check(step, kept, hidden)?;
    let rows = step.rows.len();
    if rows == 0 {
        return Ok(());
    }
    let mut work = Work::take(
        stack.shape.precision,
        rows,
        stack.widest(),
        stack.shape.qkv_width().max(stack.up_width()),
    );
    let caches: Vec<Place> = kept.iter_mut().map(|kept| Place::of(kept.cache)).collect();
    let places = work.places();
    let pass = Pass { stack, step, kept, caches: &caches, hidden: Place::of(hidden), work: places };
    // SAFETY: all lengths and slots were checked, rows write distinct slots; the scratch has room for all rows.
    with_team(threads, |member| unsafe { pass.run(member) });
    work.keep();
    Ok(())
}

/// `out[row] = rows[row] · matrixᵀ` for all rows: `[rows, inputs]` gives `[rows, outputs]`.
///
/// # Errors
/// [`Mismatch`] when lengths do not belong together.
pub(crate) fn project(
    threads: usize,
    dense: &Dense<'_>,
    rows: &mut [f32],
    out: &mut [f32],
) -> Result<(), Mismatch> {
    if !dense.fits() || !rows.len().is_multiple_of(dense.inputs) {
        return Err(Mismatch("a matrix has the wrong length"));
    }
    let count = rows.len() / dense.inputs;
    if out.len() != count * dense.outputs {
        return Err(Mismatch("a product's result has the wrong length"));
    }
    let precision = dense.precision();
    let mut work = Work::take(precision, count, dense.inputs, 0);
    let (places, source, target) = (work.places(), Place::of(rows), Place::of(out));
    with_team(threads, |member| {
        // SAFETY: rows and columns are dealt out to one member each; lengths were checked.
        unsafe {
            places.narrow(source, dense.inputs, member.part(count, 1));
            member.meet();
            let left = Left { floats: source, rows: count };
            places.product(
                member,
                dense,
                left,
                Out { place: target, stride: dense.outputs, column: 0, add: false },
            );
        }
    });
    work.keep();
    Ok(())
}

/// Row `index` of a matrix as floats, of length [`Dense::inputs`].
///
/// # Errors
/// [`Mismatch`] when the matrix has no such row, or holds int8.
pub(crate) fn row_of(dense: &Dense<'_>, index: usize, out: &mut [f32]) -> Result<(), Mismatch> {
    if index >= dense.outputs || out.len() != dense.inputs || !dense.fits() {
        return Err(Mismatch("a row is not in its matrix"));
    }
    match dense.matrix {
        Matrix::Blocks { kind, bytes } => {
            let row_bytes = bytes.len() / dense.outputs;
            crate::blocks::dequantize(kind, &bytes[index * row_bytes..(index + 1) * row_bytes], out);
            Ok(())
        }
        Matrix::Packed { precision, panels, .. } => {
            let (element, group) = (precision.element_bytes(), precision.group());
            let columns = crate::packing::PANEL_COLUMNS;
            let panel_bytes = precision.padded(dense.inputs) * columns * element;
            let panel = &panels[index / columns * panel_bytes..][..panel_bytes];
            for (input, out) in out.iter_mut().enumerate() {
                let at = ((input / group * columns + index % columns) * group + input % group) * element;
                *out = match precision {
                    crate::packing::Precision::F32 => {
                        f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
                    }
                    crate::packing::Precision::Bf16 => {
                        f32::from_bits(u32::from(u16::from_le_bytes([panel[at], panel[at + 1]])) << 16)
                    }
                    crate::packing::Precision::Int8 => {
                        return Err(Mismatch("rows of int8 are not looked up"));
                    }
                };
            }
            Ok(())
        }
    }
}

/// `row = weight · row / √(mean of squares + eps)`.
pub(crate) fn rms_norm_row(row: &mut [f32], weight: &[f32], eps: f32) {
    forward::rms_row(row, weight, eps);
}

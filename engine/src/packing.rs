//! How matrices are packed in an image: panels of columns in the order in which every kernel reads them. Pure; the
//! kernels and the compiler share it.
//!
//! A `[outputs, inputs]` weight becomes panels of [`PANEL_COLUMNS`] outputs, zeros behind the last. Inside a panel, elements
//! of `inputs` that one instruction multiplies lie side by side for each output: one (f32), two (bf16) or four (int8):
//! `[panel][input / group][output][input % group]`. Panels suit AVX-512 and AVX2 registers and are AMX tiles as they lie.

use shm_layout::image::DType;
pub(crate) use shm_layout::image::Precision;

/// Outputs of a panel.
pub(crate) const PANEL_COLUMNS: usize = 32;

/// Bytes of a row that one step over AMX tiles takes; inputs are padded to whole steps.
const STEP_BYTES: usize = 64;
/// Most inputs of an int8 layer: so many products of 255 and 127 fit an `i32`.
pub(crate) const MAX_INT8_INPUTS: u64 = 66_000;
/// Largest magnitude of an int8 weight.
const INT8_MAX: f32 = 127.0;

/// Scale of the int8 weights of one output: `weight ≈ scale * integer`. 1 for a row of zeros.
pub(crate) fn weight_scale(row: &[f32]) -> f32 {
    let largest = row.iter().fold(0.0, |largest: f32, weight| largest.max(weight.abs()));
    if largest > 0.0 { largest / INT8_MAX } else { 1.0 }
}

/// Sum of the int8 weights of one output, times their scale.
pub(crate) fn weight_sum(row: &[f32]) -> f32 {
    let scale = weight_scale(row);
    let sum: i64 = row.iter().map(|weight| i64::from(quantize_weight(*weight, scale))).sum();
    scale * sum as f32
}

/// The integer nearest to `weight / scale`.
fn quantize_weight(weight: f32, scale: f32) -> i8 {
    (weight / scale).round_ties_even().clamp(-INT8_MAX, INT8_MAX) as i8
}

/// Packs up to [`PANEL_COLUMNS`] outputs, rows of `inputs` weights one behind the other, as one panel into `out`; outputs and
/// inputs that are not there are zero.
pub(crate) fn pack_panel(precision: Precision, rows: &[f32], inputs: usize, out: &mut Vec<u8>) {
    let (element_bytes, group) = (precision.element_bytes(), precision.group());
    out.clear();
    out.resize(precision.matrix_bytes(inputs, PANEL_COLUMNS), 0);
    for (output, row) in rows.chunks_exact(inputs).enumerate() {
        let scale = if precision == Precision::Int8 { weight_scale(row) } else { 1.0 };
        for (input, weight) in row.iter().enumerate() {
            let element = (input / group * PANEL_COLUMNS + output) * group + input % group;
            let at = &mut out[element * element_bytes..][..element_bytes];
            match precision {
                Precision::F32 => at.copy_from_slice(&weight.to_le_bytes()),
                Precision::Bf16 => at.copy_from_slice(&half::bf16::from_f32(*weight).to_le_bytes()),
                Precision::Int8 => at.copy_from_slice(&quantize_weight(*weight, scale).to_le_bytes()),
            }
        }
    }
}

/// What packing needs to know of a precision.
pub(crate) trait Packing: Copy {
    /// Bytes of an element.
    fn element_bytes(self) -> usize;
    /// Inputs that lie side by side for each output.
    fn group(self) -> usize;
    /// `inputs` with padding: whole steps of AMX tiles, 64 bytes.
    fn padded(self, inputs: usize) -> usize;
    /// Type of the elements in an image.
    fn dtype(self) -> DType;
    /// Shape of a packed matrix: panels, groups of inputs, outputs of a panel, inputs of a group.
    fn matrix_shape(self, inputs: u64, outputs: u64) -> [u64; 4];
    /// Bytes of all panels of a matrix.
    fn matrix_bytes(self, inputs: usize, outputs: usize) -> usize {
        outputs.div_ceil(PANEL_COLUMNS) * PANEL_COLUMNS * self.padded(inputs) * self.element_bytes()
    }
}

impl Packing for Precision {
    fn element_bytes(self) -> usize {
        match self {
            Precision::F32 => 4,
            Precision::Bf16 => 2,
            Precision::Int8 => 1,
        }
    }

    fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
            Precision::Int8 => DType::Int8,
        }
    }

    fn matrix_shape(self, inputs: u64, outputs: u64) -> [u64; 4] {
        let group = self.group() as u64;
        let padded = match self {
            Precision::F32 => inputs,
            _ => inputs.next_multiple_of(STEP_BYTES as u64 / self.element_bytes() as u64),
        };
        [outputs.div_ceil(PANEL_COLUMNS as u64), padded / group, PANEL_COLUMNS as u64, group]
    }

    fn group(self) -> usize {
        4 / self.element_bytes()
    }

    fn padded(self, inputs: usize) -> usize {
        match self {
            Precision::F32 => inputs,
            _ => inputs.next_multiple_of(STEP_BYTES / self.element_bytes()),
        }
    }
}

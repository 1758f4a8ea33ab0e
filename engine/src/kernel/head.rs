//! Layers behind the pooling: classifiers and Dense modules, in f32. A row for each text, so a thousandth of the encoder's work, on
//! one thread.

use super::encoder::{LinearWeights, NormWeights};
use super::finish::{Finish, Out, finish_exactly};
use super::product::{Left, PANEL_COLUMNS, Precision, Right, Target, multiply};
use super::vector::norm_row;
use crate::config::HeadActivation;

/// A linear layer, what is done to its result, and a layer norm behind that.
#[derive(Clone, Copy)]
pub(crate) struct HeadLayer<'a> {
    pub(crate) linear: LinearWeights<'a>,
    pub(crate) activation: HeadActivation,
    pub(crate) norm: Option<NormWeights<'a>>,
}

/// Rows `[count, inputs]` through a layer: `[count, outputs]`, or `None` when lengths do not belong together.
pub(crate) fn apply_head(layer: &HeadLayer<'_>, rows: &[f32]) -> Option<Vec<f32>> {
    let HeadLayer { linear, activation, norm } = layer;
    let (inputs, outputs) = (linear.inputs, linear.outputs);
    let norm_fits = |norm: &NormWeights<'_>| norm.weight.len() == outputs && norm.bias.len() == outputs;
    if inputs == 0
        || !rows.len().is_multiple_of(inputs)
        || !linear.fits(Precision::F32)
        || !norm.iter().all(norm_fits)
    {
        return None;
    }
    let mut out = vec![0.0f32; rows.len() / inputs * outputs];
    let start = out.as_mut_ptr();
    let left = Left { start: rows.as_ptr().cast(), stride_bytes: 4 * inputs, rows: rows.len() / inputs };
    let right = Right::whole(linear.panels.as_ptr(), Precision::F32, inputs);
    // SAFETY: rows and panels were checked against the dimensions; f32 rows are read exactly; the columns that are finished are
    // inside `out`, which nobody else has.
    unsafe {
        multiply(left, right, 0..outputs.div_ceil(PANEL_COLUMNS), |tile, rows, panel| {
            let first = panel * PANEL_COLUMNS;
            let bias = &linear.bias[first..outputs.min(first + PANEL_COLUMNS)];
            let target = Target { start: start.add(rows.start * outputs + first), stride: outputs };
            let finish = Finish { dequantize: None, bias, activation: None, out: Out::Store(target) };
            finish_exactly(tile.rows_mut(rows.len()), finish);
        });
    }
    for value in &mut out {
        *value = match activation {
            HeadActivation::Identity => *value,
            HeadActivation::Tanh => value.tanh(),
            HeadActivation::Relu => value.max(0.0),
            HeadActivation::Gelu => super::vector::gelu_erf::<false>(*value),
        };
    }
    if let Some(norm) = norm {
        out.chunks_exact_mut(outputs).for_each(|row| norm_row(row, norm.weight, norm.bias, norm.eps));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packing::pack_panel;

    #[test]
    fn a_layer_is_a_product_and_rows_do_not_see_each_other() {
        let (inputs, outputs) = (20, 37);
        let number = |index: usize| ((index * 7919 % 101) as f32 - 50.0) / 50.0;
        let weights: Vec<f32> = (0..inputs * outputs).map(number).collect();
        let bias: Vec<f32> = (0..outputs).map(|output| number(output + 3)).collect();
        let (mut panels, mut panel) = (Vec::new(), Vec::new());
        for rows in weights.chunks(PANEL_COLUMNS * inputs) {
            pack_panel(Precision::F32, rows, inputs, &mut panel);
            panels.extend_from_slice(&panel);
        }
        let linear = LinearWeights { panels: &panels, bias: &bias, scales: &[], sums: &[], inputs, outputs };
        let layer = HeadLayer { linear, activation: HeadActivation::Tanh, norm: None };
        let rows: Vec<f32> = (0..9 * inputs).map(|index| number(index + 11)).collect();
        let found = apply_head(&layer, &rows).expect("fits");
        for (row, found) in rows.chunks(inputs).zip(found.chunks(outputs)) {
            for (output, found) in found.iter().enumerate() {
                let products = row.iter().zip(&weights[output * inputs..]).map(|(a, b)| f64::from(a * b));
                let wanted = (products.sum::<f64>() + f64::from(bias[output])).tanh();
                assert!((f64::from(*found) - wanted).abs() < 1e-5, "{found} instead of {wanted}");
            }
            assert_eq!(apply_head(&layer, row).expect("fits"), found);
        }
        assert!(apply_head(&layer, &rows[1..]).is_none(), "half a row was taken");
    }
}

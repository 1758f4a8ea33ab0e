//! Products, row look-ups and checks against plain arithmetic, on every path of this CPU.

use super::super::cpu::{available, with_path};
use super::*;
use crate::blocks::BlockKind;
use crate::packing::{PANEL_COLUMNS, Precision, pack_panel, weight_scale, weight_sum};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|index| (((index * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0) * 0.7).collect()
}

fn packed(precision: Precision, weights: &[f32], inputs: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
    let (mut bytes, mut panel) = (Vec::new(), Vec::new());
    for rows in weights.chunks(PANEL_COLUMNS * inputs) {
        pack_panel(precision, rows, inputs, &mut panel);
        bytes.extend_from_slice(&panel);
    }
    if precision != Precision::Int8 {
        return (bytes, Vec::new(), Vec::new());
    }
    let rows = || weights.chunks_exact(inputs);
    (bytes, rows().map(weight_scale).collect(), rows().map(weight_sum).collect())
}

/// Largest difference of a product to one in double precision, over the norm of its sides.
fn error_of(dense: &Dense<'_>, weights: &[f32], rows: usize) -> f64 {
    let mut left = numbers(rows * dense.inputs, 3);
    let kept = left.clone();
    let mut out = vec![0.0; rows * dense.outputs];
    project(1, dense, &mut left, &mut out).expect("fits");
    let mut worst = 0.0f64;
    for (x, out) in kept.chunks_exact(dense.inputs).zip(out.chunks_exact(dense.outputs)) {
        for (w, found) in weights.chunks_exact(dense.inputs).zip(out) {
            let wanted: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let norm = |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            worst = worst.max((f64::from(*found) - wanted).abs() / (norm(x) * norm(w)));
        }
    }
    worst
}

#[test]
fn products_are_right_in_all_precisions_and_blocks() {
    let (inputs, outputs) = (512, 45);
    let weights = numbers(inputs * outputs, 1);
    for path in available() {
        with_path(path, || {
            for (precision, allowed) in
                [(Precision::F32, 3e-6), (Precision::Bf16, 1e-3), (Precision::Int8, 2e-3)]
            {
                let (panels, scales, sums) = packed(precision, &weights, inputs);
                let matrix = Matrix::Packed { precision, panels: &panels, scales: &scales, sums: &sums };
                let dense = Dense { matrix, inputs, outputs };
                for rows in [1, 5, 33] {
                    let error = error_of(&dense, &weights, rows);
                    assert!(error < allowed, "{path:?} {precision:?} {rows}: {error}");
                }
            }
            for (kind, theirs) in [
                (BlockKind::Q8_0, GgmlDType::Q8_0),
                (BlockKind::Q4_0, GgmlDType::Q4_0),
                (BlockKind::Q4K, GgmlDType::Q4K),
                (BlockKind::Q6K, GgmlDType::Q6K),
            ] {
                let tensor = Tensor::from_slice(&weights, (outputs, inputs), &Device::Cpu).expect("tensor");
                let quantized = QTensor::quantize(&tensor, theirs).expect("quantises");
                let exact: Vec<f32> = quantized
                    .dequantize(&Device::Cpu)
                    .and_then(|t| t.flatten_all()?.to_vec1())
                    .expect("numbers");
                let bytes = quantized.data().expect("bytes");
                let dense = Dense { matrix: Matrix::Blocks { kind, bytes: &bytes }, inputs, outputs };
                for rows in [1, 5, 33] {
                    let error = error_of(&dense, &exact, rows);
                    assert!(error < 3e-6, "{path:?} {kind:?} {rows}: {error}");
                }
                let mut row = vec![0.0; inputs];
                row_of(&dense, 44, &mut row).expect("a row");
                assert_eq!(row, exact[44 * inputs..]);
            }
        });
    }
}

#[test]
fn rows_are_found_in_panels() {
    let (inputs, outputs) = (70, 45);
    let weights = numbers(inputs * outputs, 1);
    for precision in [Precision::F32, Precision::Bf16] {
        let (panels, ..) = packed(precision, &weights, inputs);
        let matrix = Matrix::Packed { precision, panels: &panels, scales: &[], sums: &[] };
        let dense = Dense { matrix, inputs, outputs };
        let mut row = vec![0.0; inputs];
        for index in [0, 31, 32, 44] {
            row_of(&dense, index, &mut row).expect("a row");
            for (found, wanted) in row.iter().zip(&weights[index * inputs..]) {
                assert!((found - wanted).abs() <= if precision == Precision::F32 { 0.0 } else { 3e-3 });
            }
        }
        assert!(row_of(&dense, 45, &mut row).is_err());
        assert!(row_of(&Dense { outputs: 65, ..dense }, 0, &mut row).is_err());
    }
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let width = 32;
    let ones = vec![1.0f32; width];
    let weights = numbers(width * width * 4, 1);
    let (square, ..) = packed(Precision::F32, &weights[..width * width], width);
    let (triple, ..) = packed(Precision::F32, &weights[..3 * width * width], width);
    let dense = |panels, outputs| Dense {
        matrix: Matrix::Packed { precision: Precision::F32, panels, scales: &[], sums: &[] },
        inputs: width,
        outputs,
    };
    let shape = StackShape {
        width,
        heads: 2,
        kv_heads: 2,
        head_dim: 16,
        wide: width,
        eps: 1e-6,
        scale: 1.0,
        feed: Feed::Relu,
        precision: Precision::F32,
        rotates_neighbours: false,
        keeps_layers: true,
    };
    let layer = || StackLayer {
        norm: &ones,
        qkv: vec![dense(&triple, 3 * width)],
        head_norms: None,
        output: dense(&square, width),
        cross: None,
        wide_norm: &ones,
        up: vec![dense(&square, width)],
        down: dense(&square, width),
    };
    let stack = StackWeights { shape, layers: vec![layer()] };
    let run = |rows: &[StepRow<'_>], cache: usize, slots: usize, hidden: usize| {
        let (mut cache, mut hidden) = (vec![0.0; cache], vec![0.5; hidden]);
        let mut kept = [Kept { cache: &mut cache, slots, cross: None }];
        let step = Step { rows, angles: &[], bias: None, layers: 0..1 };
        run_stack(1, &stack, &step, &mut kept, &mut hidden).map(|()| hidden)
    };
    let row =
        |slot: usize, seen: usize| StepRow { sequence: 0, slot, position: slot, sees: Sees::First(seen) };
    let good = [row(0, 1), row(1, 2)];
    let alone = run(&good, 4 * 64, 4, 64).expect("fits");
    assert!(alone.iter().all(|value| value.is_finite()));
    // A team of two gives the same bits.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
    let (mut cache, mut hidden) = (vec![0.0; 4 * 64], vec![0.5; 64]);
    pool.install(|| {
        let mut kept = [Kept { cache: &mut cache, slots: 4, cross: None }];
        let step = Step { rows: &good, angles: &[], bias: None, layers: 0..1 };
        run_stack(2, &stack, &step, &mut kept, &mut hidden).expect("fits");
    });
    assert_eq!(alone, hidden);
    assert!(run(&good, 4 * 64 - 1, 4, 64).is_err());
    assert!(run(&good, 4 * 64, 4, 63).is_err());
    assert!(run(&[row(0, 1), row(0, 1)], 4 * 64, 4, 64).is_err());
    assert!(run(&[row(4, 1)], 4 * 64, 4, 32).is_err());
    assert!(run(&[row(0, 5)], 4 * 64, 4, 32).is_err());
    assert!(run(&[StepRow { sequence: 1, ..row(0, 1) }], 4 * 64, 4, 32).is_err());
    assert!(run(&[StepRow { sees: Sees::Slots(&[9]), ..row(0, 1) }], 4 * 64, 4, 32).is_err());
}

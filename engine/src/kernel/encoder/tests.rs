//! All paths, precisions and numbers of threads against each other.

use super::super::attention::{AttentionShape, Reach};
use super::super::cpu::{CpuPath, available, with_path};
use super::*;
use crate::config::{Activation, NormKind};
use crate::packing::{PANEL_COLUMNS, Precision};
use crate::packing::{weight_scale, weight_sum};

pub(super) fn packed(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    lengths
        .iter()
        .map(|length| {
            end += length;
            end - length..end
        })
        .collect()
}

const WIDTH: usize = 80;
const VOCABULARY: usize = 50;
const POSITIONS: usize = 300;

/// Kinds of encoders that differ in all that an encoder can differ in.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
    /// BERT.
    Plain,
    /// MPNet: what is added to scores depends on distance.
    Relative,
    /// ModernBERT: norms first, rotary positions, a window, gated blocks, no norm before the first layer.
    Windowed,
    /// Qwen3: norms first, shared keys, causal, normed heads, contexts wider than the hidden state.
    Causal,
}

const STYLES: [Style; 4] = [Style::Plain, Style::Relative, Style::Windowed, Style::Causal];

impl Style {
    fn shape(self) -> AttentionShape {
        match self {
            Style::Causal => AttentionShape { head_count: 4, kv_head_count: 2, head_dim: 24 },
            _ => AttentionShape { head_count: 2, kv_head_count: 2, head_dim: 40 },
        }
    }

    fn is_gated(self) -> bool {
        matches!(self, Style::Windowed | Style::Causal)
    }

    fn wide(self) -> usize {
        if self.is_gated() { 208 } else { 200 }
    }
}

/// An encoder of random weights; dimensions are no multiples of a panel or a step.
struct Weights {
    style: Style,
    tables: [Vec<f32>; 3],
    norm: Vec<f32>,
    zeros: Vec<f32>,
    distance_bias: Vec<f32>,
    rotary: [Vec<f32>; 2],
    /// `[outputs, inputs]` of the four linear layers, with their biases.
    linears: Vec<(Vec<f32>, Vec<f32>, usize, usize)>,
}

/// A linear layer as an image holds it: panels, scales, sums.
type PackedLinear = (Vec<u8>, Vec<f32>, Vec<f32>);

impl Weights {
    fn random(style: Style) -> Weights {
        let mut state = 99u32;
        let mut noise = move |len: usize, size: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * size
            };
            (0..len).map(|_| next()).collect()
        };
        let shape = style.shape();
        let (wide, inner) = (style.wide(), shape.context_dim());
        let first = if style.is_gated() { 2 * wide } else { wide };
        let tables = [VOCABULARY, 2, POSITIONS].map(|rows| noise(rows * WIDTH, 1.0));
        let linears = [(WIDTH, shape.qkv_dim()), (inner, WIDTH), (WIDTH, first), (wide, WIDTH)]
            .map(|(inputs, outputs)| (noise(inputs * outputs, 0.2), noise(outputs, 0.1), inputs, outputs));
        let half = shape.head_dim / 2;
        let angles = (0..POSITIONS * half).map(|at| (at / half) as f32 / (1.0 + (at % half) as f32));
        let (cos, sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        Weights {
            style,
            tables,
            norm: vec![1.0; WIDTH],
            zeros: vec![0.0; WIDTH],
            distance_bias: noise(shape.head_count * (2 * POSITIONS - 1), 1.0),
            rotary: [cos, sin],
            linears: linears.into(),
        }
    }

    fn pack(&self, precision: Precision) -> Vec<PackedLinear> {
        let packed = self.linears.iter().map(|(weights, _, inputs, outputs)| {
            let mut panels = Vec::new();
            let mut panel = Vec::new();
            for rows in weights.chunks(PANEL_COLUMNS * inputs) {
                crate::packing::pack_panel(precision, rows, *inputs, &mut panel);
                panels.extend_from_slice(&panel);
            }
            if precision != Precision::Int8 {
                return (panels, Vec::new(), Vec::new());
            }
            let rows = || weights.chunks_exact(*inputs).take(*outputs);
            (panels, rows().map(weight_scale).collect(), rows().map(weight_sum).collect())
        });
        packed.collect()
    }

    fn encode(
        &self,
        precision: Precision,
        threads: usize,
        tokens: &[Lookup],
        sequences: &[Range<usize>],
    ) -> Vec<f32> {
        let packed = self.pack(precision);
        let style = self.style;
        let shape = style.shape();
        let norm = match style {
            Style::Causal => NormWeights { kind: NormKind::Rms, weight: &self.norm, bias: &[], eps: 1e-6 },
            _ => NormWeights { kind: NormKind::Layer, weight: &self.norm, bias: &self.zeros, eps: 1e-12 },
        };
        let head_norm = NormWeights { weight: &self.norm[..shape.head_dim], ..norm };
        let linear = |index: usize| LinearWeights {
            panels: &packed[index].0,
            bias: &self.linears[index].1,
            scales: &packed[index].1,
            sums: &packed[index].2,
            inputs: self.linears[index].2,
            outputs: self.linears[index].3,
        };
        let [cos, sin] = &self.rotary;
        let layer = LayerWeights {
            qkv: linear(0),
            head_norms: (style == Style::Causal).then_some([head_norm; 2]),
            rotary: style.is_gated().then_some(RotaryTables { cos, sin }),
            reach: match style {
                Style::Windowed => Reach { before: 20, after: 20 },
                Style::Causal => Reach { before: usize::MAX, after: 0 },
                _ => Reach::ALL,
            },
            attention_output: linear(1),
            attention_norm: Some(norm),
            intermediate: linear(2),
            output: linear(3),
            output_norm: norm,
        };
        let [words, kinds, positions] = &self.tables;
        let first = LayerWeights { attention_norm: (style != Style::Windowed).then_some(norm), ..layer };
        let encoder = EncoderWeights {
            precision,
            width: WIDTH,
            shape,
            wide: style.wide(),
            activation: if style == Style::Causal { Activation::Silu } else { Activation::GeluErf },
            is_gated: style.is_gated(),
            is_pre_norm: style.is_gated(),
            embeddings: match style.is_gated() {
                false => EmbeddingWeights { words, kinds, positions, norm: Some(norm) },
                true => EmbeddingWeights { words, kinds: &[], positions: &[], norm: None },
            },
            distance_bias: if style == Style::Relative { &self.distance_bias } else { &[] },
            layers: vec![first, layer],
            final_norm: style.is_gated().then_some(norm),
        };
        let mut hidden = vec![0.0; tokens.len() * WIDTH];
        encode(threads, &encoder, tokens, sequences, &mut hidden, &|| {}).unwrap();
        hidden
    }
}

fn tokens(sequences: &[Range<usize>]) -> Vec<Lookup> {
    let of = |sequence: &Range<usize>| {
        let length = sequence.len();
        (0..length).map(move |at| Lookup {
            word: ((at * 7 + length) % VOCABULARY) as u32,
            kind: 0,
            position: at as u32,
        })
    };
    sequences.iter().flat_map(of).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

#[test]
fn every_path_and_precision_agrees_and_batches_change_no_bit() {
    for style in STYLES {
        every_path_agrees(&Weights::random(style));
    }
}

fn every_path_agrees(weights: &Weights) {
    let style = weights.style;
    let sequences = packed(&[1, 2, 17, 40, 33, 128, 5, 12, 200]);
    let tokens = tokens(&sequences);
    let exact = with_path(CpuPath::Portable, || weights.encode(Precision::F32, 1, &tokens, &sequences));
    for path in available() {
        for (precision, least_cosine) in
            [(Precision::F32, 0.999_999_9), (Precision::Bf16, 0.999_9), (Precision::Int8, 0.99)]
        {
            with_path(path, || {
                let together = weights.encode(precision, 1, &tokens, &sequences);
                for (found, wanted) in together.chunks_exact(WIDTH).zip(exact.chunks_exact(WIDTH)) {
                    let cosine = cosine(found, wanted);
                    assert!(cosine > least_cosine, "{style:?} {path:?} {precision:?}: cosine {cosine}");
                }
                for sequence in &sequences {
                    let alone = weights.encode(
                        precision,
                        1,
                        &tokens[sequence.clone()],
                        std::slice::from_ref(&(0..sequence.len())),
                    );
                    let part = &together[sequence.start * WIDTH..sequence.end * WIDTH];
                    assert!(alone == part, "{style:?} {path:?} {precision:?}: {sequence:?} differs alone");
                }
            });
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for style in STYLES {
        let weights = Weights::random(style);
        for lengths in [vec![9], vec![200], vec![30; 40], vec![250, 3, 3], vec![7; 5]] {
            let sequences = packed(&lengths);
            let tokens = tokens(&sequences);
            for precision in Precision::ALL {
                let one = weights.encode(precision, 1, &tokens, &sequences);
                for threads in [2, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    let many = pool.install(|| weights.encode(precision, threads, &tokens, &sequences));
                    assert!(one == many, "{style:?} {precision:?}, {threads} threads, {lengths:?}");
                }
            }
        }
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let weights = Weights::random(Style::Plain);
    let sequences = packed(&[3]);
    let mut tokens = tokens(&sequences);
    tokens[1].word = VOCABULARY as u32;
    let failed = std::panic::catch_unwind(|| weights.encode(Precision::F32, 1, &tokens, &sequences));
    assert!(failed.is_err(), "a word outside the table was looked up");
    tokens[1].word = 0;
    let failed = std::panic::catch_unwind(|| weights.encode(Precision::F32, 1, &tokens, &packed(&[2])));
    assert!(failed.is_err(), "a token outside all sequences was accepted");
    let far = packed(&[POSITIONS + 1]);
    for style in [Style::Relative, Style::Causal] {
        let weights = Weights::random(style);
        let mut tokens = self::tokens(&far);
        tokens.iter_mut().for_each(|token| token.position = token.position.min(POSITIONS as u32));
        let failed = std::panic::catch_unwind(|| weights.encode(Precision::F32, 1, &tokens, &far));
        assert!(failed.is_err(), "{style:?}: a text beyond the tables was computed");
    }
}

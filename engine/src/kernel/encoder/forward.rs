//! The layers, step by step, for texts that one team has. Every step writes rows or columns that belong to one member.

use super::super::attention::{Context, Scores, Sequences, attention};
#[cfg(target_arch = "x86_64")]
use super::super::avx512::{finish_in_f32, finish_narrowly, scale_narrowly};
use super::super::cpu::{CpuPath, path};
use super::super::finish::{Dequantize, Finish, Out, finish_exactly, finish_gated};
use super::super::product::{Left, PANEL_COLUMNS, Right, Target, Tile, multiply};
use super::super::scratch::Place;
use super::super::team::Member;
use super::super::vector::{embed_row, norm_row, quantize_row, rms_norm_row, to_bf16, turn_bf16, turn_f32};
use super::Breaks;
use super::scratch::Places;
use super::weights::{
    EmbeddingWeights, EncoderWeights, LayerWeights, LinearWeights, Lookup, NormWeights, RotaryTables,
};
use crate::config::{GATED_BLOCK, NormKind};
use crate::packing::{Packing, Precision};
use std::ops::Range;

/// Products of two numbers between two breaks within a step: a third of a millisecond in f32 on one core of today.
const BREAK_PRODUCTS: usize = 1 << 24;

/// Rows of a step that a member of a team takes at once.
const ROW_BLOCK: usize = 4;

/// Some texts on their way through all layers.
pub(super) struct Group<'a> {
    pub(super) encoder: &'a EncoderWeights<'a>,
    pub(super) tokens: &'a [Lookup],
    pub(super) sequences: &'a [Range<usize>],
    pub(super) first_token: usize,
    pub(super) hidden: Place,
    pub(super) scratch: Places,
    pub(super) breaks: Breaks<'a>,
}

/// What happens to a product, once its bias is added.
#[derive(Clone, Copy)]
enum Then {
    /// It is stored at the place, for attention.
    Store(Place, Precision),
    /// The hidden state is added and takes the sum.
    AddToHidden,
    /// The activation is applied; stored for the next product.
    Activate,
    /// One half is activated and multiplied with the other; stored for the next product.
    Gate,
}

impl Group<'_> {
    /// # Safety
    /// The encoder's weights and the group's tokens must have been checked; hidden state and scratch have room for the tokens
    /// and are touched by nobody but the members of one team, which all call this.
    pub(super) unsafe fn run(&self, member: &Member<'_>) {
        let encoder = self.encoder;
        let (width, inner) = (encoder.width(), encoder.shape.context_dim());
        let precision = encoder.precision;
        let attention_precision = if self.is_narrow() { Precision::Bf16 } else { Precision::F32 };
        let scratch = &self.scratch;
        let context_left = if inner == width { scratch.narrow_left } else { scratch.context_left };
        let context = match precision {
            // Goes into the next product as it is.
            Precision::Bf16 if self.is_narrow() => Context::Narrow(context_left, precision.padded(inner)),
            _ => Context::Float(scratch.context),
        };
        let rows = member.part(self.tokens.len(), ROW_BLOCK);
        // SAFETY: each step writes rows or columns that `part`, `tasks` or the panels give to one member only, and reads what
        // was written before the last meeting, or what this member wrote itself.
        unsafe {
            self.embed(rows.clone());
            for layer in &encoder.layers {
                let input = self.before(layer.attention_norm.as_ref(), rows.clone());
                self.narrow(input, scratch.narrow_left, width, rows.clone());
                member.meet();
                self.product(
                    member,
                    &layer.qkv,
                    self.left(input, scratch.narrow_left, width),
                    Then::Store(scratch.qkv, attention_precision),
                );
                member.meet();
                if let Some(tables) = layer.rotary {
                    self.turn(layer, tables, attention_precision, rows.clone());
                    member.meet();
                }
                attention(
                    member,
                    context,
                    scratch.qkv,
                    Sequences { all: self.sequences, first_token: self.first_token },
                    encoder.shape,
                    Scores { reach: layer.reach, distance_bias: encoder.distance_bias },
                    attention_precision,
                    &|| self.take_a_break(member),
                );
                member.meet();
                if precision != Precision::F32 && matches!(context, Context::Float(_)) {
                    self.narrow(scratch.context.at(0), context_left, inner, rows.clone());
                    member.meet();
                }
                self.product(
                    member,
                    &layer.attention_output,
                    self.left(scratch.context.at(0), context_left, inner),
                    Then::AddToHidden,
                );
                member.meet();
                self.after(layer.attention_norm.as_ref(), rows.clone());
                let input = self.before(Some(&layer.output_norm), rows.clone());
                self.narrow(input, scratch.narrow_left, width, rows.clone());
                member.meet();
                self.product(
                    member,
                    &layer.intermediate,
                    self.left(input, scratch.narrow_left, width),
                    if encoder.is_gated { Then::Gate } else { Then::Activate },
                );
                member.meet();
                if precision == Precision::Int8 {
                    self.narrow(scratch.wide.at(0), scratch.wide_left, encoder.wide, rows.clone());
                    member.meet();
                }
                self.product(
                    member,
                    &layer.output,
                    self.left(scratch.wide.at(0), scratch.wide_left, encoder.wide),
                    Then::AddToHidden,
                );
                member.meet();
                self.after(Some(&layer.output_norm), rows.clone());
            }
            if let Some(norm) = &encoder.final_norm {
                self.norm(norm, rows);
            }
        }
    }

    /// What a block reads: the hidden state, or in pre-norm models what a norm makes of it, of these rows.
    ///
    /// # Safety
    /// The rows must be this member's, and nobody may read them of `normed` any more.
    unsafe fn before(&self, norm: Option<&NormWeights<'_>>, rows: Range<usize>) -> *const f32 {
        let width = self.encoder.width();
        let Some(norm) = norm.filter(|_| self.encoder.is_pre_norm) else { return self.hidden_rows() };
        for row in rows {
            // SAFETY: the caller's promise.
            unsafe {
                let source = self.hidden.slice::<f32>((self.first_token + row) * width, width);
                let out = self.scratch.normed.slice::<f32>(row * width, width);
                out.copy_from_slice(source);
                norm_any(out, norm);
            }
        }
        self.scratch.normed.at(0)
    }

    /// The norm that follows a block, unless it is before it.
    ///
    /// # Safety
    /// The rows of the hidden state must be this member's.
    unsafe fn after(&self, norm: Option<&NormWeights<'_>>, rows: Range<usize>) {
        if let Some(norm) = norm.filter(|_| !self.encoder.is_pre_norm) {
            // SAFETY: the caller's promise.
            unsafe { self.norm(norm, rows) };
        }
    }

    /// Norms and turns the queries and keys of rows, head by head.
    ///
    /// # Safety
    /// These rows of `qkv` must be this member's.
    unsafe fn turn(
        &self,
        layer: &LayerWeights<'_>,
        tables: RotaryTables<'_>,
        precision: Precision,
        rows: Range<usize>,
    ) {
        let shape = self.encoder.shape;
        let half = shape.head_dim / 2;
        for row in rows {
            let position = self.tokens[row].position as usize;
            let at = position * half..(position + 1) * half;
            let (cos, sin) = (&tables.cos[at.clone()], &tables.sin[at]);
            for head in 0..shape.head_count + shape.kv_head_count {
                let norm = layer.head_norms.as_ref().map(|norms| {
                    let norm = &norms[usize::from(head >= shape.head_count)];
                    (norm.weight, norm.eps)
                });
                let start = row * shape.qkv_dim() + head * shape.head_dim;
                // SAFETY: the caller's promise.
                unsafe {
                    match precision {
                        Precision::F32 => {
                            turn_f32(self.scratch.qkv.slice(start, shape.head_dim), norm, cos, sin);
                        }
                        _ => turn_bf16(self.scratch.qkv.slice(start, shape.head_dim), norm, cos, sin),
                    }
                }
            }
        }
    }

    /// One member of a team has breaks; the others go on to where they wait for it.
    fn take_a_break(&self, member: &Member<'_>) {
        if member.is_first() {
            (self.breaks)();
        }
    }

    /// Whether what follows products need be no more accurate than bf16, and the CPU has instructions for it.
    fn is_narrow(&self) -> bool {
        self.encoder.precision != Precision::F32 && path().has_bf16()
    }

    /// The group's first row of the hidden state.
    fn hidden_rows(&self) -> *mut f32 {
        self.hidden.at(self.first_token * self.encoder.width())
    }

    /// # Safety
    /// The rows of the hidden state must be this member's.
    unsafe fn embed(&self, rows: Range<usize>) {
        let width = self.encoder.width();
        let EmbeddingWeights { words, kinds, positions, norm } = self.encoder.embeddings;
        let of = |table: &'_ [f32], index: u32| match table.is_empty() {
            true => 0..0,
            false => index as usize * width..(index as usize + 1) * width,
        };
        for row in rows {
            let token = self.tokens[row];
            // SAFETY: the caller's promise.
            let out = unsafe { self.hidden.slice::<f32>((self.first_token + row) * width, width) };
            embed_row(
                out,
                &words[of(words, token.word)],
                &kinds[of(kinds, token.kind)],
                &positions[of(positions, token.position)],
            );
            if let Some(norm) = &norm {
                norm_any(out, norm);
            }
        }
    }

    /// # Safety
    /// The rows of the hidden state must be this member's.
    unsafe fn norm(&self, norm: &NormWeights<'_>, rows: Range<usize>) {
        let width = self.encoder.width();
        for row in rows {
            // SAFETY: the caller's promise.
            let row = unsafe { self.hidden.slice::<f32>((self.first_token + row) * width, width) };
            norm_any(row, norm);
        }
    }

    /// Makes rows the left side of a product in the encoder's precision; nothing for f32.
    ///
    /// # Safety
    /// The rows must be readable, and written by nobody; those of `left` must be this member's.
    unsafe fn narrow(&self, source: *const f32, left: Place, width: usize, rows: Range<usize>) {
        let stride = self.encoder.precision.padded(width);
        for row in rows {
            // SAFETY: the caller's promise.
            unsafe {
                let values = std::slice::from_raw_parts(source.add(row * width), width);
                match self.encoder.precision {
                    Precision::F32 => {}
                    #[cfg(target_arch = "x86_64")]
                    Precision::Bf16 if self.is_narrow() => {
                        scale_narrowly(values, 1.0, left.slice(row * stride, width));
                    }
                    Precision::Bf16 => to_bf16(values, left.slice(row * stride, width)),
                    Precision::Int8 => {
                        let scales = &mut self.scratch.row_scales.slice::<[f32; 2]>(row, 1)[0];
                        quantize_row(values, left.slice(row * stride, width), scales);
                    }
                }
            }
        }
    }

    /// The left side of a product: `floats` as they are, or what [`Group::narrow`] made of them.
    fn left(&self, floats: *const f32, narrowed: Place, inputs: usize) -> Left {
        let rows = self.tokens.len();
        match self.encoder.precision {
            Precision::F32 => Left { start: floats.cast(), stride_bytes: 4 * inputs, rows },
            precision => Left {
                start: narrowed.at(0),
                stride_bytes: precision.padded(inputs) * precision.element_bytes(),
                rows,
            },
        }
    }

    /// This member's columns of a product.
    ///
    /// # Safety
    /// The left side must be complete; what the product writes must be touched by nobody but members that do the same step.
    unsafe fn product(&self, member: &Member<'_>, linear: &LinearWeights<'_>, left: Left, then: Then) {
        let precision = self.encoder.precision;
        let is_narrow = self.is_narrow();
        let right = Right::whole(linear.panels.as_ptr(), precision, precision.padded(linear.inputs));
        let panels = member.part(linear.outputs.div_ceil(PANEL_COLUMNS), 1);
        let done = |tile: &mut Tile, rows: Range<usize>, panel: usize| {
            let columns = panel * PANEL_COLUMNS..((panel + 1) * PANEL_COLUMNS).min(linear.outputs);
            let dequantize = (precision == Precision::Int8).then(|| Dequantize {
                // SAFETY: the left side is complete, so its scales are, and nobody writes them now.
                rows: unsafe { self.scratch.row_scales.slice::<[f32; 2]>(rows.start, rows.len()) },
                scales: &linear.scales[columns.clone()],
                sums: &linear.sums[columns.clone()],
            });
            let floats = |place: Place, first_row: usize, stride: usize| Target {
                start: place.at::<f32>((first_row + rows.start) * stride + columns.start),
                stride,
            };
            let halves = |place: Place, stride: usize| {
                let start = place.at::<u16>(rows.start * stride + columns.start);
                Out::Narrow(Target { start, stride })
            };
            let out = match then {
                Then::Store(place, Precision::F32) => Out::Store(floats(place, 0, linear.outputs)),
                Then::Store(place, _) => halves(place, linear.outputs),
                Then::AddToHidden => Out::Add(floats(self.hidden, self.first_token, self.encoder.width())),
                Then::Activate if precision == Precision::Bf16 => {
                    halves(self.scratch.wide_left, precision.padded(linear.outputs))
                }
                Then::Activate => Out::Store(floats(self.scratch.wide, 0, linear.outputs)),
                Then::Gate => {
                    let (wide, column) = (self.encoder.wide, panel * GATED_BLOCK);
                    if precision == Precision::Bf16 {
                        let stride = precision.padded(wide);
                        let start = self.scratch.wide_left.at::<u16>(rows.start * stride + column);
                        Out::Narrow(Target { start, stride })
                    } else {
                        let start = self.scratch.wide.at::<f32>(rows.start * wide + column);
                        Out::Store(Target { start, stride: wide })
                    }
                }
            };
            let activation = matches!(then, Then::Activate | Then::Gate).then_some(self.encoder.activation);
            let finish = Finish { dequantize, bias: &linear.bias[columns.clone()], activation, out };
            let tile = tile.rows_mut(rows.len());
            // SAFETY: these columns are this member's, and the places have room for all rows of all columns; the path has what
            // it is asked for, and f32 is not stored as bf16.
            unsafe {
                if matches!(then, Then::Gate) {
                    return finish_gated(tile, finish);
                }
                #[cfg(target_arch = "x86_64")]
                if is_narrow {
                    return finish_narrowly(tile, finish);
                } else if precision == Precision::F32 && path() >= CpuPath::Avx512 {
                    return finish_in_f32(tile, finish);
                }
                finish_exactly(tile, finish);
            }
        };
        // A break every so many panels, so that breaks come as often whatever the sizes.
        let at_once = (BREAK_PRODUCTS / (left.rows * right.inputs * PANEL_COLUMNS).max(1)).max(1);
        for first in panels.clone().step_by(at_once) {
            // SAFETY: panels were checked against the dimensions, rows of the left side have room behind them in the scratch;
            // f32 rows are read exactly.
            unsafe { multiply(left, right, first..(first + at_once).min(panels.end), done) };
            self.take_a_break(member);
        }
    }
}

/// A row by its kind of norm.
fn norm_any(row: &mut [f32], norm: &NormWeights<'_>) {
    match norm.kind {
        NormKind::Layer => norm_row(row, norm.weight, norm.bias, norm.eps),
        NormKind::Rms => rms_norm_row(row, norm.weight, norm.eps),
    }
}

//! Kernels: weights read where they lie, and the loops that compute. The only `unsafe` of this crate lives below here; no
//! tokenizer, no files, no allocation of weights.
//!
//! Every kernel's result for a row depends on that row alone, never on how many rows there are or on the number of
//! threads, so a text's vector is the same bit for bit alone and in any batch (on one CPU path).
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod cpu;
mod decoder;
mod encoder;
mod finish;
#[cfg(target_arch = "x86_64")]
mod gelu_table;
mod head;
mod product;
mod product_bf16;
mod product_f32;
mod product_int8;
mod scratch;
mod team;
mod vector;
mod weights;

pub(crate) use attention::{AttentionShape, Reach};
pub(crate) use cpu::path_name;
pub use cpu::{CPU_PATH_VARIABLE, has_native_bf16};
pub(crate) use decoder::{
    CrossWeights, Dense, DistanceBias, Feed, Kept, Matrix, Mismatch, Sees, StackLayer, StackShape,
    StackWeights, Step, StepRow, project, rms_norm_row, row_of, run_stack,
};
pub(crate) use encoder::{
    Breaks, EmbeddingWeights, EncoderWeights, LayerWeights, LinearWeights, Lookup, NormWeights, RotaryTables,
    encode, release_all_scratch,
};
pub(crate) use head::{HeadLayer, apply_head};
pub(crate) use vector::{max_row, scale_row, sum_row, unit_row};
pub(crate) use weights::WeightSlice;

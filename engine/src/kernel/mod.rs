//! Kernels: weights read where they lie, and the loops that compute. The only `unsafe` of this crate lives below here; no
//! model knowledge, no allocation of weights.
//!
//! Every kernel's result for a row depends on that row alone, never on how many rows there are or on the number of
//! threads, so a text's vector is the same bit for bit alone and in any batch (on one CPU path).
#![allow(unsafe_code)]

mod attention;
mod cpu;
mod matmul;
mod rows;
mod vector;
mod weights;

pub(crate) use attention::{AttentionShape, attention};
pub(crate) use cpu::path_name;
pub(crate) use matmul::matmul;
pub(crate) use rows::par_rows;
pub(crate) use vector::{
    activate_rows, add_bias_rows, add_norm_row, embed_row, max_row, scale_row, sum_row, unit_row,
};
pub(crate) use weights::WeightSlice;

//! What the fuzz targets run. No libFuzzer here: the same entry points are included by `shm-layout/tests/corpus.rs`,
//! `engine/tests/corpus.rs` and `settings/tests/corpus.rs`, which replay the saved inputs under plain `cargo test`.

#[allow(dead_code)]
#[path = "../../engine/src/config/mod.rs"]
mod config;
#[allow(dead_code)]
#[path = "../../engine/src/json.rs"]
mod json;

pub mod configuration;
pub mod layout;
pub mod model_files;
pub mod wordpiece;

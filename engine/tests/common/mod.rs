//! Helpers of the engine's tests: the stored checkpoints, copies of them to spoil, and comparisons.
#![allow(dead_code)] // each test binary uses its own part

use engine::compile::Precision;
use engine::{CompileError, CompileOptions, CompileSummary, Model, compile_folder};
use shm_layout::image::HeapImage;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A tensor of a safetensors file: name, dtype, shape, bytes.
pub(crate) type Tensor = (String, safetensors::Dtype, Vec<usize>, Vec<u8>);

/// The stored checkpoints; `tests/parity/make_tiny.py` made them.
pub(crate) const CHECKPOINTS: [&str; 10] = [
    "bert_mean",
    "bert_cls_sharded_f16",
    "bert_max_sqrt_bf16",
    "xlm_roberta",
    "bert_dense",
    "distilbert",
    "mpnet",
    "modernbert",
    "nomic_bert",
    "qwen3",
];

/// Stored classifiers.
pub(crate) const CLASSIFIERS: [&str; 7] = [
    "bert_reranker",
    "roberta_classifier",
    "xlm_roberta_reranker",
    "distilbert_classifier",
    "mpnet_classifier",
    "modernbert_reranker",
    "qwen3_classifier",
];

/// Folder of a stored checkpoint.
pub(crate) fn stored(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/parity/tiny").join(name)
}

/// A copy of a stored checkpoint in a temporary folder.
pub(crate) fn copy(name: &str) -> tempfile::TempDir {
    fn copy_into(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).expect("folder");
        for entry in std::fs::read_dir(from).expect("list") {
            let entry = entry.expect("entry");
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                copy_into(&entry.path(), &target);
            } else {
                std::fs::copy(entry.path(), target).expect("copy");
            }
        }
    }
    let folder = tempfile::tempdir().expect("temp dir");
    copy_into(&stored(name), folder.path());
    folder
}

/// The model of a stored checkpoint in a precision.
pub(crate) fn model_in(name: &str, precision: Precision) -> Model {
    let mut image = Vec::new();
    let options = CompileOptions { model_id: "test/model".into(), precision, ..CompileOptions::default() };
    compile_folder(&stored(name), &options, &mut image, &mut |_| {}).expect("compiles");
    Model::load(Arc::new(HeapImage::new(&image))).expect("loads")
}

/// Compiles a folder to memory.
pub(crate) fn compile(folder: &Path) -> Result<(Vec<u8>, CompileSummary), CompileError> {
    let mut image = Vec::new();
    let options = CompileOptions { model_id: "test/model".into(), ..CompileOptions::default() };
    let summary = compile_folder(folder, &options, &mut image, &mut |_| {})?;
    Ok((image, summary))
}

/// The error of compiling a folder, as text.
pub(crate) fn compile_error(folder: &Path) -> String {
    compile(folder).expect_err("the folder was accepted").to_string()
}

/// The model of a stored checkpoint.
pub(crate) fn model(name: &str) -> Model {
    let (image, _) = compile(&stored(name)).expect("compiles");
    Model::load(Arc::new(HeapImage::new(&image))).expect("loads")
}

/// The texts of a stored checkpoint.
pub(crate) fn texts(name: &str) -> Vec<String> {
    serde_json::from_slice(&std::fs::read(stored(name).join("texts.json")).expect("texts")).expect("JSON")
}

/// The vectors of sentence-transformers for those texts, one behind the other.
pub(crate) fn expected(name: &str) -> Vec<f32> {
    floats(name, "expected.f32")
}

/// Little-endian floats beside a stored checkpoint.
pub(crate) fn floats(name: &str, file: &str) -> Vec<f32> {
    let bytes = std::fs::read(stored(name).join(file)).expect("floats");
    bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect()
}

/// Borrows strings.
pub(crate) fn borrow(texts: &[String]) -> Vec<&str> {
    texts.iter().map(String::as_str).collect()
}

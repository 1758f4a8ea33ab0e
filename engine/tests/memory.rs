//! Weights are not copied: loading and computing add far less private memory than the image is long. Alone in its binary, so
//! that no other test's memory is counted.

mod common;

use engine::{CompileOptions, Model, compile_folder};
use shm_layout::image::{HeapImage, ImageBytes};
use std::sync::Arc;

/// Private anonymous memory of this process, bytes.
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("RssAnon");
    line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("number") * 1024
}

/// The small BERT with its word table stretched to `rows` rows: a model of tens of megabytes.
fn stretched(rows: usize) -> tempfile::TempDir {
    let folder = common::copy("bert_mean");
    let config = folder.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&config).expect("read")).expect("JSON");
    json["vocab_size"] = rows.into();
    std::fs::write(config, json.to_string()).expect("write");
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).expect("read");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let words = vec![60u8; rows * 32 * 4];
    let views = tensors.tensors().into_iter().map(|(name, view)| {
        let (shape, data) = match name.ends_with("word_embeddings.weight") {
            true => (vec![rows, 32], words.as_slice()),
            false => (view.shape().to_vec(), view.data()),
        };
        (name, safetensors::tensor::TensorView::new(view.dtype(), shape, data).expect("view"))
    });
    std::fs::write(&path, safetensors::serialize(views, None).expect("serializes")).expect("write");
    folder
}

#[test]
fn loading_and_computing_copy_no_weights() {
    const ROWS: usize = 400_000; // 51 MB of words
    let folder = stretched(ROWS);
    let file = tempfile::tempfile().expect("file");
    let mut sink = file.try_clone().expect("handle");
    let before = anonymous_bytes();
    let options = CompileOptions { model_id: "m".into(), ..CompileOptions::default() };
    let summary = compile_folder(folder.path(), &options, &mut sink, &mut |_| {}).expect("compiles");
    let compiled = anonymous_bytes().saturating_sub(before);
    assert!(summary.total_bytes > ROWS as u64 * 32 * 4);
    // What is left of compiling: buffers the allocator keeps.
    assert!(compiled < 40 << 20, "compiling left {compiled} bytes");
    let mut bytes = vec![0; summary.total_bytes as usize];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).expect("read");
    let image: Arc<dyn ImageBytes> = Arc::new(HeapImage::new(&bytes));
    drop(bytes);
    let before = anonymous_bytes();
    let model = Model::load(image).expect("loads");
    let texts: Vec<String> = (0..64).map(|index| format!("the cat {index} sat on the mat")).collect();
    model.embed(&common::borrow(&texts)).expect("embeds");
    let grown = anonymous_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "loading and computing took {grown} bytes of private memory");
}

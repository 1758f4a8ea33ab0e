//! Compiling good folders, and every way in which a folder, the disk or an image can be bad.

mod common;

use common::{CHECKPOINTS, CLASSIFIERS, compile, compile_error, copy, stored};
use engine::{CompileError, CompileOptions, ImageSink, Model, VerifyError, compile_folder, verify_image};
use proptest::prelude::*;
use shm_layout::image::{CheckedImage, HeapImage, PAGE_ALIGN_BYTES, Pooling};
use std::io;
use std::path::Path;
use std::sync::Arc;

fn edit_json(folder: &Path, name: &str, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join(name);
    let mut value = serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON");
    change(&mut value);
    std::fs::write(path, value.to_string()).expect("write");
}

/// Rewrites model.safetensors with other tensors.
fn edit_tensors(folder: &Path, change: impl FnOnce(&mut Vec<common::Tensor>)) {
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).expect("read");
    let mut tensors: Vec<_> = safetensors::SafeTensors::deserialize(&bytes)
        .expect("safetensors")
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name.clone(), safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).expect("view"))
    });
    std::fs::write(path, safetensors::serialize(views, None).expect("serializes")).expect("write");
}

#[test]
fn good_folders_compile_the_same_each_time_into_memory_and_files() {
    for name in CHECKPOINTS {
        let (image, summary) = compile(&stored(name)).expect(name);
        assert_eq!(summary.total_bytes, image.len() as u64);
        verify_image(&image).expect("hash");
        let file = tempfile::tempfile().expect("file");
        let mut sink = file.try_clone().expect("handle");
        let options = CompileOptions { model_id: "test/model".into(), ..CompileOptions::default() };
        let mut last = (0, 0);
        let again = compile_folder(&stored(name), &options, &mut sink, &mut |progress| {
            assert!(progress.done_bytes > last.0, "progress does not grow");
            last = (progress.done_bytes, progress.total_bytes);
        })
        .expect("compiles into a file");
        assert_eq!((again, last), (summary.clone(), (summary.total_bytes, summary.total_bytes)));
        let mut written = vec![0; image.len()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut written, 0).expect("read");
        assert_eq!(written, image, "{name}: file and memory differ");
        let checked = CheckedImage::new(&image).expect("structure");
        for tensor in checked.tensors().filter(|tensor| tensor.data.len() >= 4096) {
            assert!(
                tensor.data_offset.is_multiple_of(PAGE_ALIGN_BYTES),
                "{} is not page-aligned",
                tensor.name
            );
        }
    }
}

#[test]
fn settings_are_those_of_the_folder() {
    let (_, summary) = compile(&stored("bert_max_sqrt_bf16")).expect("compiles");
    assert_eq!(summary.pooling, Pooling::MAX.union(Pooling::MEAN_SQRT_LEN));
    assert_eq!((summary.output_dim, summary.max_seq_tokens, summary.normalize), (64, 40, true));
    let (_, summary) = compile(&stored("bert_cls_sharded_f16")).expect("compiles");
    assert_eq!((summary.pooling, summary.max_seq_tokens, summary.normalize), (Pooling::CLS, 48, false));
}

#[test]
fn a_plain_encoder_folder_takes_the_mean() {
    let folder = copy("bert_mean");
    std::fs::remove_file(folder.path().join("modules.json")).expect("remove");
    let (_, summary) = compile(folder.path()).expect("compiles");
    assert_eq!((summary.pooling, summary.normalize), (Pooling::MEAN, false));
}

#[test]
fn missing_files_are_named() {
    for (checkpoint, file, hint) in [
        ("bert_mean", "config.json", "config.json"),
        ("bert_mean", "tokenizer.json", "tokenizer.json"),
        ("bert_mean", "model.safetensors", "safetensors"),
        ("bert_mean", "1_Pooling/config.json", "1_Pooling/config.json"),
        ("bert_cls_sharded_f16", "model-00002-of-00002.safetensors", "model-00002"),
    ] {
        let folder = copy(checkpoint);
        std::fs::remove_file(folder.path().join(file)).expect("remove");
        let error = compile_error(folder.path());
        assert!(error.contains("no ") && error.contains(hint), "{file}: {error}");
    }
    assert!(matches!(compile(Path::new("/nonexistent/model")), Err(CompileError::Folder { .. })));
}

#[test]
fn lying_safetensors_are_refused() {
    let spoil = |change: &dyn Fn(&mut Vec<u8>)| {
        let folder = copy("bert_mean");
        let path = folder.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("read");
        change(&mut bytes);
        std::fs::write(path, bytes).expect("write");
        compile_error(folder.path())
    };
    for (what, error) in [
        ("truncated", spoil(&|bytes| bytes.truncate(bytes.len() - 1))),
        ("empty", spoil(&|bytes| bytes.clear())),
        ("longer", spoil(&|bytes| bytes.push(0))),
        ("header length", spoil(&|bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()))),
        ("short header", spoil(&|bytes| bytes[..8].copy_from_slice(&10u64.to_le_bytes()))),
        ("not JSON", spoil(&|bytes| bytes[8] = b'[')),
    ] {
        assert!(error.contains("model.safetensors"), "{what}: {error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let spoil = |change: &dyn Fn(&mut Vec<common::Tensor>)| {
        let folder = copy("bert_mean");
        edit_tensors(folder.path(), |tensors| change(tensors));
        compile(folder.path()).expect_err("accepted")
    };
    let name = "encoder.layer.1.output.dense.weight";
    let error = spoil(&|tensors| tensors.retain(|tensor| tensor.0 != name));
    assert!(matches!(&error, CompileError::MissingTensor { name: found } if found == name), "{error}");
    let error = spoil(&|tensors| {
        tensors.push(("encoder.layer.2.extra".into(), safetensors::Dtype::F32, vec![1], vec![0; 4]))
    });
    assert!(
        matches!(&error, CompileError::ExtraTensors { names, .. } if names.contains("layer.2.extra")),
        "{error}"
    );
    let at = |tensors: &[common::Tensor]| tensors.iter().position(|tensor| tensor.0 == name).expect("there");
    let error = spoil(&|tensors| {
        let index = at(tensors);
        tensors[index].2.reverse();
    });
    assert!(matches!(&error, CompileError::TensorShape { name: found, .. } if found == name), "{error}");
    let error = spoil(&|tensors| {
        let index = at(tensors);
        tensors[index].1 = safetensors::Dtype::I32;
    });
    assert!(matches!(&error, CompileError::TensorDtype { name: found, .. } if found == name), "{error}");
    let error = spoil(&|tensors| {
        let index = at(tensors);
        tensors[index].3[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(matches!(&error, CompileError::NotFinite { name: found } if found == name), "{error}");
}

#[test]
fn unused_heads_and_buffers_are_left_out() {
    let folder = copy("bert_mean");
    edit_tensors(folder.path(), |tensors| {
        for unused in ["pooler.dense.weight", "embeddings.position_ids", "cls.predictions.bias"] {
            tensors.push((unused.into(), safetensors::Dtype::I64, vec![2], vec![0; 16]));
        }
    });
    let (image, _) = compile(folder.path()).expect("compiles");
    assert_eq!(image.len(), compile(&stored("bert_mean")).expect("compiles").0.len());
}

#[test]
fn settings_that_are_not_supported_are_named() {
    for (file, pointer, value, hint) in [
        ("config.json", "/model_type", serde_json::json!("t5"), "t5"),
        ("config.json", "/num_attention_heads", serde_json::json!(0), "num_attention_heads"),
        ("config.json", "/hidden_size", serde_json::json!(4_000_000_000u64), "hidden_size"),
        ("config.json", "/vocab_size", serde_json::json!(7), "vocab_size"),
        ("modules.json", "/1/type", serde_json::json!("sentence_transformers.models.Dense"), "Dense"),
        ("modules.json", "/1/path", serde_json::json!("../other"), "relative"),
        ("modules.json", "/1/path", serde_json::json!("/etc"), "relative"),
        (
            "1_Pooling/config.json",
            "/word_embedding_dimension",
            serde_json::json!(31),
            "word_embedding_dimension",
        ),
        ("sentence_bert_config.json", "/max_seq_length", serde_json::json!(-1), "max_seq_length"),
        ("tokenizer.json", "/model/type", serde_json::json!("Magic"), "Magic"),
        ("tokenizer.json", "/model/vocab/the", serde_json::json!(100_000), "vocab_size"),
    ] {
        let folder = copy("bert_mean");
        edit_json(folder.path(), file, |json| *json.pointer_mut(pointer).expect(pointer) = value.clone());
        let error = compile_error(folder.path());
        assert!(error.contains(hint), "{file}{pointer} = {value}: {error}");
    }
}

/// A sink on a disk that is full, from the start or after some bytes.
struct FullDisk {
    left: u64,
}

impl ImageSink for FullDisk {
    fn reserve(&mut self, _: u64) -> io::Result<()> {
        if self.left == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn write_at(&mut self, _: u64, bytes: &[u8]) -> io::Result<()> {
        self.left = self.left.checked_sub(bytes.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        Ok(())
    }
}

/// Stored checkpoints of one file, with the names of the tensors of the first layer and of those outside of layers.
fn whole_checkpoints() -> impl Iterator<Item = (&'static str, Vec<String>)> {
    CHECKPOINTS.into_iter().chain(CLASSIFIERS).filter_map(|name| {
        let bytes = std::fs::read(stored(name).join("model.safetensors")).ok()?;
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        let names = tensors.names().into_iter().map(ToString::to_string);
        let later = |name: &String| {
            !["layer.1.", "layers.1.", "layers.2.", "layers.3."].iter().any(|l| name.contains(l))
        };
        // An embedder does not use BERT's pooler.
        let is_used = |tensor: &String| name.ends_with("reranker") || !tensor.contains("pooler.");
        Some((name, names.filter(later).filter(is_used).collect()))
    })
}

#[test]
fn no_tensor_of_any_family_can_be_missing_or_of_another_shape() {
    for (name, tensors) in whole_checkpoints() {
        for tensor in tensors {
            let folder = copy(name);
            edit_tensors(folder.path(), |all| all.retain(|(found, ..)| *found != tensor));
            let error = compile_error(folder.path());
            let bare = tensor.rsplit('.').take(2).collect::<Vec<_>>();
            assert!(bare.iter().all(|part| error.contains(part)), "{name} without {tensor}: {error}");
            let folder = copy(name);
            edit_tensors(folder.path(), |all| {
                let (_, _, shape, _) = all.iter_mut().find(|(found, ..)| *found == tensor).expect("there");
                *shape = vec![shape.iter().product(), 1];
            });
            let error = compile_error(folder.path());
            assert!(error.contains(&tensor) && error.contains("shape"), "{name} {tensor}: {error}");
        }
    }
}

#[test]
fn a_number_that_is_none_is_found_in_every_family() {
    for (name, tensors) in whole_checkpoints() {
        for tensor in tensors {
            let folder = copy(name);
            edit_tensors(folder.path(), |all| {
                let (_, dtype, _, data) = all.iter_mut().find(|(found, ..)| *found == tensor).expect("there");
                let nan: &[u8] =
                    if *dtype == safetensors::Dtype::F32 { &[0, 0, 0xc0, 0x7f] } else { &[0xc0, 0x7f] };
                let at = data.len() - nan.len();
                data[at..].copy_from_slice(nan);
            });
            let error = compile_error(folder.path());
            assert!(error.contains(&tensor) && error.contains("not finite"), "{name} {tensor}: {error}");
        }
    }
}

#[test]
fn what_is_around_an_encoder_must_fit_it() {
    let folder = copy("bert_dense");
    edit_json(folder.path(), "2_Dense/config.json", |config| config["in_features"] = 33.into());
    let error = compile_error(folder.path());
    assert!(error.contains("2_Dense") && error.contains("in_features is 33"), "{error}");
    let folder = copy("bert_dense");
    edit_json(folder.path(), "2_Dense/config.json", |config| {
        config["activation_function"] = "evil.Code".into()
    });
    assert!(compile_error(folder.path()).contains("evil.Code"));
    let folder = copy("bert_dense");
    std::fs::remove_file(folder.path().join("3_Dense/model.safetensors")).expect("remove");
    assert!(compile_error(folder.path()).contains("3_Dense/model.safetensors"));
    let folder = copy("bert_mean");
    edit_json(folder.path(), "1_Pooling/config.json", |config| config["include_prompt"] = false.into());
    assert!(compile_error(folder.path()).contains("include_prompt"));
    let folder = copy("bert_mean");
    edit_json(folder.path(), "modules.json", |modules| modules[0]["type"] = "custom_st.Transformer2".into());
    assert!(compile_error(folder.path()).contains("trust_remote_code can only be false"));
    // A cross-encoder's modules without a classifier would be an embedder without a pooling.
    let folder = copy("bert_mean");
    edit_json(folder.path(), "modules.json", |modules| *modules = serde_json::json!([modules[0]]));
    assert!(compile_error(folder.path()).contains("no Pooling module"));
    let folder = copy("bert_reranker");
    edit_json(folder.path(), "config.json", |config| {
        config["id2label"] = serde_json::json!({"0": "no", "1": "yes"});
    });
    let error = compile_error(folder.path());
    assert!(error.contains("classifier") && error.contains("shape"), "{error}");
}

#[test]
fn a_full_disk_is_said_with_the_room_that_is_needed() {
    let options = CompileOptions { model_id: "m".into(), ..CompileOptions::default() };
    for left in [0, 50_000] {
        let error = compile_folder(&stored("bert_mean"), &options, &mut FullDisk { left }, &mut |_| {});
        assert!(matches!(error, Err(CompileError::DiskFull { needed_bytes }) if needed_bytes > 50_000));
    }
}

#[test]
fn a_folder_that_changes_while_it_is_compiled_is_noticed() {
    for file in ["model.safetensors", "tokenizer.json", "config.json"] {
        let folder = copy("bert_mean");
        let options = CompileOptions { model_id: "m".into(), ..CompileOptions::default() };
        let mut image = Vec::new();
        let mut touched = false;
        let result = compile_folder(folder.path(), &options, &mut image, &mut |_| {
            if !touched {
                touched = true;
                let path = folder.path().join(file);
                let bytes = std::fs::read(&path).expect("read");
                std::fs::write(folder.path().join("new"), bytes).expect("write");
                std::fs::rename(folder.path().join("new"), path).expect("replace");
            }
        });
        assert!(matches!(&result, Err(CompileError::Changed { name }) if name == file), "{file}: {result:?}");
    }
}

#[test]
fn model_ids_are_bounded() {
    for id in [String::new(), "x".repeat(257), "a\nb".into()] {
        let options = CompileOptions { model_id: id, ..CompileOptions::default() };
        assert!(compile_folder(&stored("bert_mean"), &options, &mut Vec::new(), &mut |_| {}).is_err());
    }
}

#[test]
fn a_changed_byte_anywhere_fails_the_hash() {
    let (image, _) = compile(&stored("bert_max_sqrt_bf16")).expect("compiles");
    for position in (0..image.len()).step_by(997) {
        let mut spoiled = image.clone();
        spoiled[position] ^= 1;
        assert!(verify_image(&spoiled).is_err(), "byte {position} does not matter");
    }
    let mut spoiled = image;
    let last = spoiled.len() - 1;
    spoiled[last] ^= 1;
    assert_eq!(verify_image(&spoiled), Err(VerifyError::Hash));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to the files' bytes: an error or an image, never a panic.
    #[test]
    fn spoiled_folders_never_panic(
        file in prop::sample::select(vec![
            "config.json", "tokenizer.json", "model.safetensors", "modules.json", "1_Pooling/config.json",
            "sentence_bert_config.json", "tokenizer_config.json",
        ]),
        changes in prop::collection::vec((0usize..4000, any::<u8>()), 1..4),
    ) {
        let folder = copy("bert_mean");
        let path = folder.path().join(file);
        let mut bytes = std::fs::read(&path).expect("read");
        for (position, byte) in changes {
            let position = position % bytes.len();
            bytes[position] = byte;
        }
        std::fs::write(path, bytes).expect("write");
        if let Ok((image, _)) = compile(folder.path()) {
            let model = Model::load(Arc::new(HeapImage::new(&image))).expect("what compiles loads");
            let _ = model.embed(&["the cat", "é"]);
        }
    }

    /// An image that was spoiled after compiling may load, but neither loading nor computing panics.
    #[test]
    fn spoiled_images_never_panic(changes in prop::collection::vec((0usize..20_000, any::<u8>()), 1..6)) {
        let mut image = IMAGE.with(Clone::clone);
        for (position, byte) in changes {
            let position = position % image.len();
            image[position] = byte;
        }
        if let Ok(model) = Model::load(Arc::new(HeapImage::new(&image))) {
            let _ = model.embed(&["the cat", "é"]);
        }
    }
}

thread_local! {
    static IMAGE: Vec<u8> = compile(&stored("bert_mean")).expect("compiles").0;
}

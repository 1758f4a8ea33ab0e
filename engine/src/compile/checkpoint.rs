//! Safetensors files, foreign: header checks of our own and the directory of all shards. Reading of data lives in `write`.

use super::error::CompileError;
use super::folder::{ModelFolder, SourceFile};
use crate::json::{UniqueMap, shorten};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest safetensors header, bytes. A 335-million-parameter BERT's has 40 KB; a long one is a bomb, not a model.
const MAX_HEADER_BYTES: u64 = 1 << 20;
/// Most tensors in one file.
const MAX_FILE_TENSORS: usize = 16_384;
/// Most keys in a header or a shard index: the tensors and the metadata.
const MAX_KEYS: usize = MAX_FILE_TENSORS + 1;
/// Largest shard index, bytes.
const MAX_INDEX_BYTES: u64 = 8 << 20;
/// Most shards.
const MAX_SHARDS: usize = 256;
/// Most dimensions of a foreign tensor.
const MAX_FOREIGN_RANK: usize = 8;
/// Largest single dimension of a foreign tensor.
const MAX_FOREIGN_DIMENSION: u64 = 1 << 31;

/// One tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceTensor {
    /// Index into [`Checkpoint::files`].
    pub(crate) file: usize,
    /// safetensors dtype, for example `F32`.
    pub(crate) dtype: String,
    /// Dimensions, outermost first.
    pub(crate) shape: Vec<u64>,
    /// Offset of the data in the file, bytes.
    pub(crate) offset: u64,
}

/// All files of a checkpoint and the tensors in them.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// The open files.
    pub(crate) files: Vec<SourceFile>,
    /// Tensors by name.
    pub(crate) tensors: BTreeMap<String, SourceTensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: UniqueMap<String, MAX_KEYS>,
}

impl Checkpoint {
    /// Opens model.safetensors, or the shards that model.safetensors.index.json names, below `prefix` (empty or ending in `/`).
    pub(crate) fn open(folder: &mut ModelFolder, prefix: &str) -> Result<Self, CompileError> {
        let single = format!("{prefix}model.safetensors");
        if let Some(file) = folder.file(&single)? {
            let tensors = read_header(&file, 0)?;
            return Ok(Checkpoint { files: vec![file], tensors });
        }
        let index_name = format!("{prefix}model.safetensors.index.json");
        let Some(index) = folder.read(&index_name, MAX_INDEX_BYTES)? else {
            return Err(CompileError::Missing {
                name: single,
                fix: "only safetensors checkpoints are read: download that file, or convert pytorch_model.bin with \
                      save_pretrained(…, safe_serialization=True)",
            });
        };
        let bad = |reason: String| CompileError::Json { name: index_name.clone(), reason };
        let index: ShardIndex =
            serde_json::from_slice(&index).map_err(|error| bad(shorten(&error.to_string())))?;
        let weight_map = index.weight_map.0;
        let mut names: Vec<&String> = weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        if names.is_empty() || names.len() > MAX_SHARDS {
            return Err(bad(format!("names {} files, 1 to {MAX_SHARDS} are allowed", names.len())));
        }
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            if name.contains('/') || !name.ends_with(".safetensors") {
                return Err(bad(format!(
                    "shard {:?} is not a safetensors file beside the index",
                    shorten(name)
                )));
            }
            let path = format!("{prefix}{name}");
            let file = folder.file(&path)?.ok_or(CompileError::Missing {
                name: path,
                fix: "the shard index names it: download the model again",
            })?;
            for (tensor, place) in read_header(&file, checkpoint.files.len())? {
                if weight_map.get(&tensor) != Some(name) {
                    return Err(bad(format!(
                        "tensor {:?} lies in {name:?}, the index says otherwise",
                        shorten(&tensor)
                    )));
                }
                checkpoint.tensors.insert(tensor, place);
            }
            checkpoint.files.push(file);
        }
        if let Some(missing) = weight_map.keys().find(|name| !checkpoint.tensors.contains_key(*name)) {
            return Err(bad(format!("tensor {:?} is in no shard", shorten(missing))));
        }
        Ok(checkpoint)
    }

    /// Takes in another checkpoint's files; its tensors get `prefix` before their names.
    pub(crate) fn take_in(&mut self, prefix: &str, other: Checkpoint) {
        let first_file = self.files.len();
        self.files.extend(other.files);
        for (name, mut tensor) in other.tensors {
            tensor.file += first_file;
            self.tensors.insert(format!("{prefix}{name}"), tensor);
        }
    }
}

/// Bits of one element, for every dtype of the format.
fn dtype_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

fn read_header(file: &SourceFile, index: usize) -> Result<BTreeMap<String, SourceTensor>, CompileError> {
    let bad = |reason: String| CompileError::Safetensors { name: file.name().to_owned(), reason };
    let mut length = [0; 8];
    if file.len_bytes() < 8 {
        return Err(bad(format!("has {} bytes, too few for a header", file.len_bytes())));
    }
    file.read_at(&mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(bad(format!(
            "header says it has {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read"
        )));
    }
    if header_bytes > file.len_bytes() - 8 {
        return Err(bad(format!("header says it has {header_bytes} bytes, the file is shorter")));
    }
    let mut header = vec![0; header_bytes as usize];
    file.read_at(&mut header, 8)?;
    let entries = parse_header(&header, file.len_bytes() - 8 - header_bytes).map_err(bad)?;
    Ok(entries
        .into_iter()
        .map(|(name, entry)| {
            let offset = 8 + header_bytes + entry.data_offsets.0;
            (name, SourceTensor { file: index, dtype: entry.dtype, shape: entry.shape, offset })
        })
        .collect())
}

/// Checks a header's JSON against `data_bytes` bytes of data: unique names, known types, sane shapes, lengths that follow
/// from the shapes, and data without holes, overlap or rest. Unaligned data is fine here, it is read bytewise.
fn parse_header(header: &[u8], data_bytes: u64) -> Result<Vec<(String, HeaderEntry)>, String> {
    let map: UniqueMap<serde_json::Value, MAX_KEYS> =
        serde_json::from_slice(header).map_err(|error| format!("header: {}", shorten(&error.to_string())))?;
    let mut entries = Vec::with_capacity(map.0.len());
    for (name, value) in map.0 {
        if name == "__metadata__" {
            continue;
        }
        let shown = shorten(&name);
        let entry: HeaderEntry = serde_json::from_value(value)
            .map_err(|error| format!("tensor {shown:?}: {}", shorten(&error.to_string())))?;
        let bits = dtype_bits(&entry.dtype)
            .ok_or_else(|| format!("tensor {shown:?} has unknown dtype {:?}", shorten(&entry.dtype)))?;
        if entry.shape.len() > MAX_FOREIGN_RANK
            || entry.shape.iter().any(|size| *size > MAX_FOREIGN_DIMENSION)
        {
            return Err(format!("tensor {shown:?} has an absurd shape"));
        }
        let len_bits = entry.shape.iter().try_fold(bits, |product, size| product.checked_mul(*size));
        let (begin, end) = entry.data_offsets;
        let len_bytes = len_bits.filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        if begin > end || end > data_bytes {
            return Err(format!(
                "tensor {shown:?} lies outside the file: {begin} to {end} of {data_bytes} bytes"
            ));
        }
        if len_bytes != Some(end - begin) {
            return Err(format!(
                "tensor {shown:?} has {} bytes, its shape {:?} says otherwise",
                end - begin,
                entry.shape
            ));
        }
        entries.push((name, entry));
    }
    entries.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut covered = 0;
    for (name, entry) in &entries {
        if entry.data_offsets.0 != covered {
            return Err(format!("tensor {:?} leaves a hole or overlaps another", shorten(name)));
        }
        covered = entry.data_offsets.1;
    }
    if covered != data_bytes {
        return Err(format!("{} bytes behind the last tensor belong to none", data_bytes - covered));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn check(header: serde_json::Value, data_bytes: u64) -> Result<usize, String> {
        parse_header(header.to_string().as_bytes(), data_bytes).map(|entries| entries.len())
    }

    #[test]
    fn a_good_header_is_read() {
        let header = json!({
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "F16", "shape": [2], "data_offsets": [24, 28]}
        });
        assert_eq!(check(header, 28), Ok(2));
    }

    #[test]
    fn each_lie_is_named() {
        let one = |entry: serde_json::Value| check(json!({ "a": entry }), 24).expect_err("accepted");
        for (entry, hint) in [
            (json!({"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 28]}), "outside"),
            (json!({"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}), "outside"),
            (json!({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 24]}), "shape"),
            (json!({"dtype": "F32", "shape": [2, 3], "data_offsets": [-1, 23]}), "invalid"),
            (json!({"dtype": "Q4", "shape": [2, 3], "data_offsets": [0, 24]}), "dtype"),
            (json!({"dtype": "F32", "shape": [0, u64::MAX, u64::MAX], "data_offsets": [0, 0]}), "absurd"),
            (
                json!({"dtype": "F32", "shape": [2147483648u64, 2147483648u64, 8], "data_offsets": [0, 24]}),
                "shape",
            ),
            (json!({"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}), "hole"),
            (json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}), "belong to none"),
        ] {
            let error = one(entry.clone());
            assert!(error.contains(hint), "{entry}: {error}");
        }
        let overlap = json!({
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}
        });
        assert!(check(overlap, 24).expect_err("overlap").contains("overlaps"));
        let twice = br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
        assert!(parse_header(twice, 4).err().is_some_and(|error| error.contains("twice")));
    }

    #[test]
    fn a_header_of_too_many_tensors_is_refused() {
        let mut text = String::from("{");
        for index in 0..MAX_FILE_TENSORS + 2 {
            text.push_str(&format!(
                "\"{index}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}},"
            ));
        }
        text.push_str("\"z\":{}}");
        assert!(parse_header(text.as_bytes(), 0).err().is_some_and(|error| error.contains("more than")));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn noise_never_panics(header in prop::collection::vec(any::<u8>(), 0..256), data_bytes in any::<u64>()) {
            let _ = parse_header(&header, data_bytes);
        }

        #[test]
        fn numbers_never_panic(shape in prop::collection::vec(any::<u64>(), 0..10), begin in any::<u64>(), end in any::<u64>(), data in any::<u64>()) {
            let header = json!({"a": {"dtype": "F64", "shape": shape, "data_offsets": [begin, end]}});
            let _ = check(header, data);
        }
    }
}

//! What makes a model folder complete: pure logic over a [`Tree`], which may be a folder on disk or a listing on the
//! hub. No file is opened here and no URL built.

use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// Largest configuration file (config.json, modules.json, …), in bytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Largest index of shards, in bytes.
pub(crate) const MAX_INDEX_BYTES: u64 = 16 << 20;
/// Largest tokenizer.json, in bytes.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Most shards that an index may name.
pub(crate) const MAX_SHARDS: usize = 512;
/// Most modules that modules.json may name.
pub(crate) const MAX_MODULES: usize = 16;
/// Longest path of a file inside a model folder, in bytes.
pub(crate) const MAX_FILE_NAME_BYTES: usize = 200;
/// Most segments of such a path.
const MAX_FILE_NAME_SEGMENTS: usize = 4;

const MODULES: &str = "modules.json";
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// Files beside the transformer's config.json that are taken where they exist.
const OPTIONAL_BESIDE_CONFIG: [&str; 4] = [
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "generation_config.json",
];
/// Pickled and other weights that are never fetched or read; known only so that the error can name them.
const FOREIGN_WEIGHTS: [&str; 6] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.ckpt.index",
    "model.pt",
];

/// Why a folder or a hub listing is not a complete, usable model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FolderProblem {
    /// It does not exist, or is no folder.
    #[error("there is no such folder: check the path, or give a hub id such as org/name")]
    NoFolder,
    /// A file that every model needs is missing.
    #[error("{file} is missing: {needed_by}")]
    Missing {
        /// Path inside the folder.
        file: String,
        /// What asks for it, and what to do.
        needed_by: String,
    },
    /// There is no tokenizer.json.
    #[error(
        "{file} is missing{}: write it with python3 -c \"from transformers import AutoTokenizer; \
         AutoTokenizer.from_pretrained('MODEL').save_pretrained('FOLDER')\"",
        if *slow { " (only the slow tokenizer's tokenizer_config.json or vocab file is there)" } else { "" }
    )]
    NoTokenizer {
        /// Path inside the folder.
        file: String,
        /// Whether files of a slow tokenizer are there.
        slow: bool,
    },
    /// There are weights, but only in a format that is never read.
    #[error(
        "there are no safetensors weights, only {found}, and pickled or framework weights are never loaded: convert them \
         with python3 -c \"from sentence_transformers import SentenceTransformer; \
         SentenceTransformer('MODEL').save('FOLDER')\" (or transformers' AutoModel … save_pretrained('FOLDER')) \
         and give that folder"
    )]
    NoSafetensors {
        /// The file that was found instead.
        found: String,
    },
    /// A file names others in a way that is not allowed, or is not what it should be.
    #[error("{file} is not usable: {reason}")]
    BadFile {
        /// Path inside the folder.
        file: String,
        /// What is wrong.
        reason: String,
    },
    /// Something that should be a regular file is a folder, FIFO, socket or device.
    #[error("{file} is not a regular file: replace it by one (a link to a regular file is fine)")]
    NotRegular {
        /// Path inside the folder.
        file: String,
    },
    /// A link leads out of the folder that it must stay in.
    #[error("{file} is a link that leads outside of the cache that it belongs to: download the model again")]
    LinkOutside {
        /// Path inside the folder.
        file: String,
    },
    /// A file is shorter or longer than its own header says.
    #[error("{file} has {actual_bytes} bytes, but its header describes {expected_bytes}: fetch it again")]
    Truncated {
        /// Path inside the folder.
        file: String,
        /// Length by its header, in bytes.
        expected_bytes: u64,
        /// Length on disk, in bytes.
        actual_bytes: u64,
    },
    /// The system refused to read a file.
    #[error("cannot read {file}: {reason}")]
    Unreadable {
        /// Path inside the folder.
        file: String,
        /// The system's reason.
        reason: String,
    },
}

/// A set of files in which a model may lie.
pub(crate) trait Tree {
    /// What may go wrong in looking.
    type Error: From<FolderProblem>;
    /// Whether the file exists (as a usable one).
    fn has(&mut self, name: &str) -> Result<bool, Self::Error>;
    /// The whole of a small file. Longer than `limit_bytes` is an error.
    fn read(&mut self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, Self::Error>;
}

/// The files of a complete model, as far as they are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    /// All files, paths inside the folder, validated, without duplicates.
    pub(crate) files: BTreeSet<String>,
    /// Those of them that are safetensors.
    pub(crate) weights: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Module {
    #[serde(default)]
    path: String,
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

/// Says which files the model in `tree` consists of, or what is missing. `needs_modules`: a folder without modules.json
/// is incomplete (for repositories that are known to have one).
pub(crate) fn layout_of<T: Tree>(tree: &mut T, needs_modules: bool) -> Result<Layout, T::Error> {
    let mut files = BTreeSet::new();
    let mut weights = BTreeSet::new();
    let modules = read_modules(tree, needs_modules)?;
    if !modules.is_empty() {
        files.insert(MODULES.to_owned());
    }
    take_if_there(tree, "config_sentence_transformers.json", &mut files)?;

    let transformer = modules
        .iter()
        .find(|module| short_kind(&module.kind) == "Transformer")
        .map_or("", |m| m.path.as_str());
    let beside = |name: &str| join(transformer, name);
    require(tree, beside("config.json"), "it says what kind of model this is", &mut files)?;
    let tokenizer = beside("tokenizer.json");
    if !tree.has(&tokenizer)? {
        let mut slow = false;
        for name in
            ["tokenizer_config.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model"]
        {
            slow |= tree.has(&beside(name))?;
        }
        return Err(FolderProblem::NoTokenizer { file: tokenizer, slow }.into());
    }
    files.insert(tokenizer);
    for name in OPTIONAL_BESIDE_CONFIG {
        take_if_there(tree, &beside(name), &mut files)?;
    }
    weights_of(tree, transformer, &mut files, &mut weights)?;

    for module in modules.iter().filter(|module| !module.path.is_empty() && module.path != transformer) {
        let needed_by = format!("modules.json names the module {}: fetch the model again", module.path);
        let (config, module_weights) = (join(&module.path, "config.json"), join(&module.path, WEIGHTS));
        match short_kind(&module.kind) {
            "Normalize" => {}
            "Pooling" => require(tree, config, &needed_by, &mut files)?,
            "Dense" | "LayerNorm" => {
                require(tree, config, &needed_by, &mut files)?;
                let pickled = join(&module.path, "pytorch_model.bin");
                if !tree.has(&module_weights)? && tree.has(&pickled)? {
                    return Err(FolderProblem::NoSafetensors { found: pickled }.into());
                }
                require(tree, module_weights.clone(), &needed_by, &mut files)?;
                weights.insert(module_weights);
            }
            // Whether the engine knows such a module is for it to say; what belongs to it is brought along.
            _ => {
                take_if_there(tree, &config, &mut files)?;
                if take_if_there(tree, &module_weights, &mut files)? {
                    weights.insert(module_weights);
                }
            }
        }
    }
    Ok(Layout { files, weights })
}

fn read_modules<T: Tree>(tree: &mut T, needed: bool) -> Result<Vec<Module>, T::Error> {
    if !tree.has(MODULES)? {
        if needed {
            let needed_by =
                "models of sentence-transformers have one; without it pooling would be a guess".to_owned();
            return Err(FolderProblem::Missing { file: MODULES.to_owned(), needed_by }.into());
        }
        return Ok(Vec::new());
    }
    let bad = |reason: String| FolderProblem::BadFile { file: MODULES.to_owned(), reason };
    let bytes = tree.read(MODULES, MAX_CONFIG_BYTES)?;
    let modules: Vec<Module> = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
    if modules.is_empty() || modules.len() > MAX_MODULES {
        return Err(bad(format!("it must name 1 to {MAX_MODULES} modules")).into());
    }
    for module in &modules {
        if !module.path.is_empty() {
            check_file_name(&module.path).map_err(|reason| bad(format!("a module's path {reason}")))?;
        }
    }
    Ok(modules)
}

fn weights_of<T: Tree>(
    tree: &mut T,
    folder: &str,
    files: &mut BTreeSet<String>,
    weights: &mut BTreeSet<String>,
) -> Result<(), T::Error> {
    let whole = join(folder, WEIGHTS);
    if take_if_there(tree, &whole, files)? {
        weights.insert(whole);
        return Ok(());
    }
    let index = join(folder, WEIGHTS_INDEX);
    if !take_if_there(tree, &index, files)? {
        for name in FOREIGN_WEIGHTS {
            let found = join(folder, name);
            if tree.has(&found)? {
                return Err(FolderProblem::NoSafetensors { found }.into());
            }
        }
        let needed_by = "there are no weights at all; the download or copy may be incomplete".to_owned();
        return Err(FolderProblem::Missing { file: whole, needed_by }.into());
    }
    let bytes = tree.read(&index, MAX_INDEX_BYTES)?;
    for shard in shards_of(&bytes).map_err(|reason| FolderProblem::BadFile { file: index.clone(), reason })? {
        let shard = join(folder, &shard);
        require(tree, shard.clone(), &format!("{WEIGHTS_INDEX} names it; fetch the model again"), files)?;
        weights.insert(shard);
    }
    Ok(())
}

/// The shard names in an index: each a plain `*.safetensors` name beside it.
fn shards_of(index: &[u8]) -> Result<BTreeSet<String>, String> {
    let index: ShardIndex = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(format!("it must name 1 to {MAX_SHARDS} shards, and names {}", shards.len()));
    }
    for shard in &shards {
        check_file_name(shard).map_err(|reason| format!("a shard's name {reason}"))?;
        if shard.contains('/') || !shard.ends_with(".safetensors") {
            return Err("a shard must be a .safetensors file beside the index".to_owned());
        }
    }
    Ok(shards)
}

/// Whether `name` is a safe relative path: 1 to 4 segments of letters, digits, `.`, `_`, `-`, none beginning with a dot.
pub(crate) fn check_file_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() || name.len() > MAX_FILE_NAME_BYTES {
        return Err("is empty or too long");
    }
    if name.split('/').count() > MAX_FILE_NAME_SEGMENTS {
        return Err("is nested too deeply");
    }
    let plain = |segment: &str| {
        !segment.is_empty()
            && !segment.starts_with('.')
            && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    };
    if name.split('/').all(plain) {
        Ok(())
    } else {
        Err("has a part other than letters, digits, `.`, `_` and `-`")
    }
}

/// The most bytes that a file of this name may have, beside the limit on files as such.
pub(crate) fn max_bytes_of(name: &str) -> u64 {
    match name.rsplit('/').next().unwrap_or(name) {
        "tokenizer.json" => MAX_TOKENIZER_BYTES,
        WEIGHTS_INDEX => MAX_INDEX_BYTES,
        other if other.ends_with(".safetensors") => u64::MAX,
        _ => MAX_CONFIG_BYTES,
    }
}

fn short_kind(kind: &str) -> &str {
    kind.rsplit('.').next().unwrap_or(kind)
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

fn take_if_there<T: Tree>(tree: &mut T, name: &str, files: &mut BTreeSet<String>) -> Result<bool, T::Error> {
    let there = tree.has(name)?;
    if there {
        files.insert(name.to_owned());
    }
    Ok(there)
}

fn require<T: Tree>(
    tree: &mut T,
    file: String,
    needed_by: &str,
    files: &mut BTreeSet<String>,
) -> Result<(), T::Error> {
    if !take_if_there(tree, &file, files)? {
        return Err(FolderProblem::Missing { file, needed_by: needed_by.to_owned() }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Listing(BTreeMap<String, String>);

    impl Listing {
        fn of(files: &[(&str, &str)]) -> Listing {
            Listing(files.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect())
        }
    }

    impl Tree for Listing {
        type Error = FolderProblem;
        fn has(&mut self, name: &str) -> Result<bool, FolderProblem> {
            Ok(self.0.contains_key(name))
        }
        fn read(&mut self, name: &str, _limit: u64) -> Result<Vec<u8>, FolderProblem> {
            Ok(self.0[name].clone().into_bytes())
        }
    }

    const PLAIN: [(&str, &str); 3] =
        [("config.json", "{}"), ("tokenizer.json", "{}"), ("model.safetensors", "")];

    fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        PLAIN.iter().chain(more).copied().collect()
    }

    fn layout(files: &[(&str, &str)]) -> Result<Layout, FolderProblem> {
        layout_of(&mut Listing::of(files), false)
    }

    fn names(layout: &Layout) -> Vec<&str> {
        layout.files.iter().map(String::as_str).collect()
    }

    #[test]
    fn takes_what_is_needed_and_nothing_else() {
        let modules = r#"[{"idx":0,"name":"0","path":"","type":"sentence_transformers.models.Transformer"},
            {"idx":1,"name":"1","path":"1_Pooling","type":"sentence_transformers.models.Pooling"},
            {"idx":2,"name":"2","path":"2_Dense","type":"sentence_transformers.models.Dense"},
            {"idx":3,"name":"3","path":"3_Normalize","type":"sentence_transformers.models.Normalize"}]"#;
        let mut files = with(&[
            ("modules.json", modules),
            ("1_Pooling/config.json", "{}"),
            ("2_Dense/config.json", "{}"),
            ("pytorch_model.bin", ""),
            ("README.md", ""),
            ("tokenizer_config.json", "{}"),
            ("onnx/model.onnx", ""),
        ]);
        let missing = layout(&files).unwrap_err();
        assert!(
            matches!(&missing, FolderProblem::Missing { file, .. } if file == "2_Dense/model.safetensors")
        );
        files.push(("2_Dense/pytorch_model.bin", ""));
        assert!(matches!(layout(&files), Err(FolderProblem::NoSafetensors { .. })));
        files.push(("2_Dense/model.safetensors", ""));
        let whole = layout(&files).unwrap();
        assert_eq!(
            names(&whole),
            [
                "1_Pooling/config.json",
                "2_Dense/config.json",
                "2_Dense/model.safetensors",
                "config.json",
                "model.safetensors",
                "modules.json",
                "tokenizer.json",
                "tokenizer_config.json",
            ]
        );
        assert_eq!(whole.weights.len(), 2);
    }

    #[test]
    fn old_models_keep_their_transformer_in_a_folder() {
        let modules = r#"[{"path":"0_Transformer","type":"sentence_transformers.models.Transformer"}]"#;
        let files = [
            ("modules.json", modules),
            ("0_Transformer/config.json", "{}"),
            ("0_Transformer/tokenizer.json", "{}"),
            ("0_Transformer/model.safetensors", ""),
            ("config.json", "{}"),
        ];
        assert_eq!(names(&layout(&files).unwrap()).len(), 4);
    }

    #[test]
    fn says_what_is_missing() {
        for (drop, wanted) in [("config.json", "config.json"), ("model.safetensors", "model.safetensors")] {
            let files: Vec<_> = PLAIN.into_iter().filter(|(name, _)| *name != drop).collect();
            assert!(matches!(layout(&files), Err(FolderProblem::Missing { file, .. }) if file == wanted));
        }
        let slow = [("config.json", "{}"), ("model.safetensors", ""), ("vocab.txt", "")];
        let error = layout(&slow).unwrap_err();
        assert_eq!(error, FolderProblem::NoTokenizer { file: "tokenizer.json".into(), slow: true });
        assert!(error.to_string().contains("AutoTokenizer"));
        let pickled = [("config.json", "{}"), ("tokenizer.json", "{}"), ("pytorch_model.bin", "")];
        let error = layout(&pickled).unwrap_err();
        assert!(matches!(&error, FolderProblem::NoSafetensors { found } if found == "pytorch_model.bin"));
        assert!(error.to_string().contains("save("), "says how to convert");
        let error = layout_of(&mut Listing::of(&PLAIN), true).unwrap_err();
        assert!(matches!(error, FolderProblem::Missing { file, .. } if file == "modules.json"));
    }

    #[test]
    fn shards_must_be_plain_names_and_all_there() {
        let index = |map: &str| format!(r#"{{"metadata":{{}},"weight_map":{map}}}"#);
        let base = [("config.json", "{}"), ("tokenizer.json", "{}"), ("a-1.safetensors", "")];
        let run = |index: &str| {
            let mut files = base.to_vec();
            files.push(("model.safetensors.index.json", index));
            layout(&files)
        };
        assert_eq!(run(&index(r#"{"x":"a-1.safetensors","y":"a-1.safetensors"}"#)).unwrap().weights.len(), 1);
        assert!(matches!(run(&index(r#"{"x":"b.safetensors"}"#)), Err(FolderProblem::Missing { .. })));
        for map in [
            r#"{"x":"../a-1.safetensors"}"#,
            r#"{"x":"/etc/passwd"}"#,
            r#"{"x":"a-1.bin"}"#,
            r#"{"x":"d/a.safetensors"}"#,
            r#"{"x":".a.safetensors"}"#,
            r#"{"x":7}"#,
            "{}",
            "[]",
        ] {
            assert!(matches!(run(&index(map)), Err(FolderProblem::BadFile { .. })), "{map}");
        }
        let many: Vec<String> = (0..=MAX_SHARDS).map(|i| format!(r#""{i}":"s{i}.safetensors""#)).collect();
        assert!(matches!(
            run(&index(&format!("{{{}}}", many.join(",")))),
            Err(FolderProblem::BadFile { .. })
        ));
    }

    #[test]
    fn modules_cannot_lead_outside() {
        for path in ["../x", "/x", "a/../b", "a//b", "~/.ssh", "a b", "1/2/3/4/5", "x/"] {
            let modules = format!(r#"[{{"path":"{path}","type":"sentence_transformers.models.Pooling"}}]"#);
            let files = with(&[("modules.json", &modules)]);
            assert!(matches!(layout(&files), Err(FolderProblem::BadFile { .. })), "{path}");
        }
        for modules in ["[]", "{}", "nonsense", r#"[{"path":1,"type":"a"}]"#] {
            assert!(matches!(
                layout(&with(&[("modules.json", modules)])),
                Err(FolderProblem::BadFile { .. })
            ));
        }
    }
}

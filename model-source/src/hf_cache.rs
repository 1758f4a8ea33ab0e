//! Finds a model in the cache folder of the Hugging Face libraries. Only reads it; never repairs or adds.

use crate::error::{Attempt, Outcome, Place};
use crate::folder;
use crate::layout::FolderProblem;
use crate::reference::{RepoId, Revision, is_commit};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Longest ref file, in bytes: one commit and a newline fit many times.
const MAX_REF_BYTES: u64 = 256;

/// A snapshot that is complete.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) folder: PathBuf,
    /// The cache root, a real path: the links of the snapshot stay beneath it.
    pub(crate) root: PathBuf,
    pub(crate) commit: String,
}

/// Looks for `repo` in the cache folder `cache` (the one that holds `models--org--name`).
pub(crate) fn find(cache: &Path, repo: &RepoId, revision: Option<&Revision>) -> Result<Snapshot, Attempt> {
    let repo_dir = cache.join(format!("models--{}", repo.folder_name()));
    let attempt = |outcome, why: String| Attempt {
        place: Place::HuggingFaceCache,
        location: repo_dir.display().to_string(),
        outcome,
        why,
    };
    if !repo_dir.is_dir() {
        return Err(attempt(Outcome::Absent, "not there".to_owned()));
    }
    let root = cache.canonicalize().map_err(|error| attempt(Outcome::Unusable, error.to_string()))?;
    let name = revision.map_or("main", Revision::as_str);
    let commit = match revision.filter(|revision| revision.is_commit()) {
        Some(commit) => commit.as_str().to_owned(),
        // Validation of revisions has excluded `..` and absolute names; refs of the hub may be nested (`refs/pr/1`).
        None => read_ref(&repo_dir.join("refs").join(name))
            .ok_or_else(|| attempt(Outcome::Absent, format!("it knows no revision `{name}`")))?,
    };
    let folder = repo_dir.join("snapshots").join(&commit);
    // Someone may have fetched config and tokenizer only, or used the model without its pooling.
    let needs_modules = repo.org() == "sentence-transformers";
    match folder::check(&folder, Some(&root), needs_modules) {
        Ok(_) => Ok(Snapshot { folder, root, commit }),
        Err(FolderProblem::NoFolder) => {
            Err(attempt(Outcome::Absent, format!("no snapshot of revision `{name}` ({commit})")))
        }
        Err(problem) => {
            Err(attempt(Outcome::Unusable, format!("snapshot {commit} is incomplete: {problem}")))
        }
    }
}

fn read_ref(path: &Path) -> Option<String> {
    if !std::fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_REF_BYTES).read_to_string(&mut text).ok()?;
    let commit = text.trim();
    is_commit(commit).then(|| commit.to_owned())
}

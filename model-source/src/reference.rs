//! Model references: what users write, parsed and validated. Touches the disk only to see whether a folder exists.

use crate::error::{SourceError, printable};
use std::fmt;
use std::path::{Path, PathBuf};

/// Longest accepted reference, in bytes: a path may be as long as Linux allows.
pub(crate) const MAX_REFERENCE_BYTES: usize = 4096;
/// Longest repository id, in bytes: the hub's own limit.
pub(crate) const MAX_REPO_BYTES: usize = 96;
/// Longest revision, in bytes.
pub(crate) const MAX_REVISION_BYTES: usize = 128;
/// The organisation of models that are named without one, as sentence-transformers has it.
const DEFAULT_ORG: &str = "sentence-transformers";

/// A repository on the hub, `org/name`. Only made by validation, so it is safe in paths and URLs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RepoId(String);

impl RepoId {
    /// Validates `org/name`: letters, digits, `.`, `_`, `-`; at most 96 bytes; no `..` or `--`, no part that begins or
    /// ends with `.` or `-`, no `.git` at the end.
    ///
    /// # Errors
    /// [`SourceError::BadReference`] with the rule that was broken.
    pub fn new(id: &str) -> Result<RepoId, SourceError> {
        let bad = |reason: &str| SourceError::BadReference {
            reference: printable(id, 120),
            reason: reason.to_owned(),
        };
        if id.len() > MAX_REPO_BYTES {
            return Err(bad("a hub id has at most 96 characters"));
        }
        let Some((org, name)) = id.split_once('/') else {
            return Err(bad("a hub id has the form org/name"));
        };
        for part in [org, name] {
            if part.is_empty() || !part.bytes().all(is_id_byte) {
                return Err(bad("a hub id is org/name of letters, digits, `.`, `_` and `-`; \
                     a folder that does not exist yet or lies elsewhere begins with `./`, `/` or `~/`"));
            }
            if part.starts_with(['.', '-']) || part.ends_with(['.', '-']) {
                return Err(bad("the parts of a hub id don't begin or end with `.` or `-`"));
            }
        }
        if id.contains("..") || id.contains("--") || id.ends_with(".git") {
            return Err(bad("a hub id contains no `..` or `--` and does not end with `.git`"));
        }
        Ok(RepoId(id.to_owned()))
    }

    /// `org/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `org--name`: unambiguous as a folder name, for an id contains no `--`.
    pub(crate) fn folder_name(&self) -> String {
        self.0.replace('/', "--")
    }

    pub(crate) fn org(&self) -> &str {
        self.0.split('/').next().unwrap_or_default()
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A branch, tag or commit of a repository. Only made by validation.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Revision(String);

impl Revision {
    /// Validates a revision: letters, digits, `.`, `_`, `-`, `/`; at most 128 bytes; no empty part and none that begins
    /// with `.` or `-`.
    ///
    /// # Errors
    /// [`SourceError::BadReference`].
    pub fn new(revision: &str) -> Result<Revision, SourceError> {
        let fine = revision.len() <= MAX_REVISION_BYTES
            && !revision.contains("..")
            && revision.split('/').all(|part| {
                !part.is_empty() && !part.starts_with(['.', '-']) && part.bytes().all(is_id_byte)
            });
        if fine {
            Ok(Revision(revision.to_owned()))
        } else {
            Err(SourceError::BadReference {
                reference: printable(revision, 120),
                reason: "a revision is a branch, tag or commit of letters, digits, `.`, `_`, `-` and `/`"
                    .to_owned(),
            })
        }
    }

    /// The text as given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The revision as one path or URL segment. `%` is not among its characters, so this can't collide.
    pub(crate) fn segment(&self) -> String {
        self.0.replace('/', "%2F")
    }

    /// Whether this is a full commit hash, which needs no ref to find its snapshot.
    pub(crate) fn is_commit(&self) -> bool {
        is_commit(&self.0)
    }
}

/// Whether `text` is a git commit: 40 (SHA-1) or 64 (SHA-256) lower-case hex digits.
pub(crate) fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_id_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// A parsed model reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A local model folder, not yet looked into.
    Folder(PathBuf),
    /// A model known by its hub id, wherever it is then found.
    Hub {
        /// The repository.
        repo: RepoId,
        /// `None` means the main branch, or whatever of it a cache holds.
        revision: Option<Revision>,
    },
}

impl ModelRef {
    /// Parses what a user wrote: a path that begins with `.`, `/` or `~`, or an existing folder, is a folder; `org/name`
    /// or `org/name@revision` a hub id; a bare name such as `all-MiniLM-L6-v2` is short for `sentence-transformers/` and
    /// that name. Relative paths are taken from this process' working directory, so a client should send a broker
    /// absolute ones ([`canonical_id`] makes them).
    ///
    /// # Errors
    /// [`SourceError::BadReference`].
    pub fn parse(reference: &str) -> Result<ModelRef, SourceError> {
        let bad = |reason: String| SourceError::BadReference { reference: printable(reference, 120), reason };
        if reference.is_empty() || reference.len() > MAX_REFERENCE_BYTES {
            return Err(bad(format!("it is empty or longer than {MAX_REFERENCE_BYTES} bytes")));
        }
        if reference.chars().any(char::is_control) {
            return Err(bad("it contains a control character".to_owned()));
        }
        if reference.contains("://") {
            return Err(bad("no URL is ever fetched: give org/name, or the path of a folder".to_owned()));
        }
        if reference.starts_with('~') {
            let rest = match reference.strip_prefix("~/") {
                Some(rest) => rest,
                None if reference == "~" => "",
                None => return Err(bad("only ~/ is expanded, not ~user".to_owned())),
            };
            let home = std::env::home_dir()
                .filter(|home| home.is_absolute())
                .ok_or_else(|| bad("there is no home folder to expand ~ to: set HOME".to_owned()))?;
            return Ok(ModelRef::Folder(home.join(rest)));
        }
        if reference.starts_with(['.', '/']) || Path::new(reference).is_dir() {
            return Ok(ModelRef::Folder(PathBuf::from(reference)));
        }
        let (id, revision) = match reference.split_once('@') {
            Some((id, revision)) => (id, Some(Revision::new(revision)?)),
            None => (reference, None),
        };
        let repo =
            if id.contains('/') { RepoId::new(id)? } else { RepoId::new(&format!("{DEFAULT_ORG}/{id}"))? };
        Ok(ModelRef::Hub { repo, revision: revision.filter(|revision| revision.as_str() != "main") })
    }

    /// One name per model, for not loading a model twice: `org/name`, `org/name@revision`, or the real path of a folder.
    ///
    /// # Errors
    /// [`SourceError::Folder`] if the folder isn't there, [`SourceError::BadReference`] if its path isn't UTF-8.
    pub fn canonical_id(&self) -> Result<String, SourceError> {
        match self {
            ModelRef::Hub { repo, revision: None } => Ok(repo.to_string()),
            ModelRef::Hub { repo, revision: Some(revision) } => Ok(format!("{repo}@{}", revision.as_str())),
            ModelRef::Folder(path) => {
                let real = crate::folder::real_path(path)?;
                real.to_str().map(str::to_owned).ok_or_else(|| SourceError::BadReference {
                    reference: printable(&real.to_string_lossy(), 120),
                    reason: "the path is not UTF-8: rename the folder".to_owned(),
                })
            }
        }
    }
}

/// Parses `reference` and gives the one name of that model: see [`ModelRef::parse`] and [`ModelRef::canonical_id`].
///
/// # Errors
/// As those two.
pub fn canonical_id(reference: &str) -> Result<String, SourceError> {
    ModelRef::parse(reference)?.canonical_id()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(reference: &str) -> String {
        canonical_id(reference).unwrap_or_else(|error| panic!("{reference}: {error}"))
    }

    #[test]
    fn names_of_one_model_agree() {
        let full = "sentence-transformers/all-MiniLM-L6-v2";
        for reference in ["all-MiniLM-L6-v2", full, "all-MiniLM-L6-v2@main", &format!("{full}@main")] {
            assert_eq!(id(reference), full);
        }
        assert_eq!(id("BAAI/bge-small-en-v1.5@refs/pr/3"), "BAAI/bge-small-en-v1.5@refs/pr/3");
    }

    #[test]
    fn folders_are_known_by_their_real_path() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::fs::create_dir(real.join("m")).unwrap();
        std::os::unix::fs::symlink(real.join("m"), real.join("link")).unwrap();
        assert_eq!(id(real.join("link").to_str().unwrap()), real.join("m").to_str().unwrap());
        let detour = real.join("m/../m/.");
        assert_eq!(id(detour.to_str().unwrap()), real.join("m").to_str().unwrap());
        assert!(matches!(canonical_id("./no-such-folder"), Err(SourceError::Folder { .. })));
        assert_eq!(ModelRef::parse("./x").unwrap(), ModelRef::Folder("./x".into()));
        assert!(matches!(ModelRef::parse("~/x").unwrap(), ModelRef::Folder(path) if path.is_absolute()));
        assert_eq!(ModelRef::parse("src").unwrap(), ModelRef::Folder("src".into()), "exists in this crate");
    }

    #[test]
    fn bad_references_are_refused() {
        let long = format!("a/{}", "b".repeat(95));
        let huge = "x".repeat(5000);
        for reference in [
            "",
            "a/b/c",
            "a//b",
            "/../x\n",
            "a/..",
            "a/b..c",
            "a/-b",
            "a/b-",
            "a/b--c",
            "a/b.git",
            "a/b\0",
            "a b/c",
            "ü/b",
            "a\\b",
            "https://huggingface.co/a/b",
            "~root/x",
            "a/b@",
            "a/b@../x",
            "a/b@x//y",
            "a/b@-x",
            "a/b@x y",
            "@main",
            "a/.hidden",
            "a/",
            "%2e%2e/a",
            &long,
            &huge,
        ] {
            let result = ModelRef::parse(reference);
            assert!(matches!(result, Err(SourceError::BadReference { .. })), "{reference:?} gave {result:?}");
        }
    }

    #[test]
    fn every_accepted_id_is_one_plain_path_segment() {
        // Exhaustive over short ids of the tricky characters.
        let alphabet = ["a", ".", "-", "_", "/", "%", "@"];
        let mut words = vec![String::new()];
        for _ in 0..5 {
            words = words.iter().flat_map(|w| alphabet.iter().map(move |c| format!("{w}{c}"))).collect();
            for word in &words {
                if let Ok(repo) = RepoId::new(word) {
                    let folder = repo.folder_name();
                    assert!(
                        !folder.contains('/') && !folder.contains("..") && !folder.starts_with('.'),
                        "{folder}"
                    );
                    assert_eq!(folder.matches("--").count(), 1);
                }
                if let Ok(revision) = Revision::new(word) {
                    let segment = revision.segment();
                    assert!(!segment.contains('/') && !segment.contains("..") && !segment.starts_with('.'));
                }
            }
        }
    }
}

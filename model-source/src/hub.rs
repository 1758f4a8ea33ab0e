//! Fetches a model from the hub into a folder: listing, choice of files, download with resume and verification. HTTP
//! itself is in `http`, the cache in `cache`.

use crate::cache::{FileRecord, record};
use crate::error::{Outcome, SourceError, printable};
use crate::http::{Client, HttpError, Linked, body_reader, header, read_body};
use crate::layout::{FolderProblem, Tree, check_file_name, layout_of, max_bytes_of};
use crate::options::Limits;
use crate::progress::{Phase, Progress};
use crate::reference::{RepoId, Revision, is_commit};
use crate::store::{CopyError, Sink, is_sha256};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use ureq::http::StatusCode;

/// Largest listing of a repository, in bytes.
const MAX_LISTING_BYTES: u64 = 16 << 20;

/// How the hub did not yield a model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HubError {
    #[error("{0}")]
    Http(#[from] HttpError),
    #[error("it has no such model or revision: check the spelling")]
    NoSuchModel,
    #[error(
        "access denied ({status}): the model does not exist, or is private or gated: {}",
        if *had_token { "the token in HF_TOKEN does not open it" } else { "set HF_TOKEN to a token that may read it" }
    )]
    Denied { status: u16, had_token: bool },
    #[error("its listing of the model is not usable: {0}")]
    Listing(String),
    #[error("{0}")]
    Model(#[from] FolderProblem),
    #[error("{file}: SHA-256 is {actual}, not {expected}: not accepted")]
    WrongDigest { file: String, expected: String, actual: String },
    #[error("{file}: it has other than the announced {expected_bytes} bytes: not accepted")]
    WrongSize { file: String, expected_bytes: u64 },
    #[error("{file} has {bytes} bytes, over the limit of {limit_bytes}")]
    TooLarge { file: String, bytes: u64, limit_bytes: u64 },
    #[error("{file}: {source}")]
    File { file: String, source: HttpError },
    /// Our own disk failed: no other place will do better.
    #[error("{0}")]
    Local(#[from] SourceError),
}

impl HubError {
    pub(crate) fn outcome(&self) -> Outcome {
        match self {
            HubError::NoSuchModel => Outcome::Absent,
            HubError::Model(_) | HubError::Listing(_) => Outcome::Unusable,
            HubError::Http(HttpError::Redirect(_))
            | HubError::File { source: HttpError::Redirect(_), .. } => Outcome::Refused,
            HubError::Http(_) | HubError::File { .. } => Outcome::Unreachable,
            HubError::Denied { .. }
            | HubError::WrongDigest { .. }
            | HubError::WrongSize { .. }
            | HubError::TooLarge { .. }
            | HubError::Local(_) => Outcome::Refused,
        }
    }
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// What the listing says of one file.
#[derive(Debug, Default, Clone)]
struct Entry {
    size_bytes: Option<u64>,
    sha256: Option<String>,
}

/// A model that was fetched and verified.
pub(crate) struct Fetched {
    pub(crate) commit: String,
    pub(crate) files: Vec<FileRecord>,
    pub(crate) from: String,
}

/// Fetches the model's files into the folder `dest`, which need not exist yet.
pub(crate) fn fetch(
    client: &Client,
    repo: &RepoId,
    revision: Option<&Revision>,
    dest: &Path,
    limits: &Limits,
    progress: &mut dyn Progress,
) -> Result<Fetched, HubError> {
    let (commit, listing) = list(client, repo, revision, limits)?;
    let mut tree = HubTree { client, repo, commit: &commit, listing, dest, limits, done: BTreeMap::new() };
    let layout = layout_of(&mut tree, false)?;

    let mut total_bytes = Some(0_u64);
    for name in layout.files.iter().filter(|name| !tree.done.contains_key(*name)) {
        let entry = tree.listing.get(name).cloned().unwrap_or_default();
        tree.limit_of(name, entry.size_bytes)?;
        total_bytes = total_bytes.zip(entry.size_bytes).and_then(|(sum, size)| sum.checked_add(size));
    }
    if let Some(bytes) = total_bytes.filter(|bytes| *bytes > limits.max_model_bytes) {
        return Err(HubError::TooLarge {
            file: repo.to_string(),
            bytes,
            limit_bytes: limits.max_model_bytes,
        });
    }
    let what = format!("downloading {repo} ({} files)", layout.files.len());
    let mut phase = Phase::begin(progress, &what, total_bytes);
    for name in &layout.files {
        if !tree.done.contains_key(name) {
            tree.download(name, &mut |bytes| phase.advance(bytes))?;
            let sum = tree.done.values().fold(0_u64, |sum, file| sum.saturating_add(file.size_bytes));
            if sum > limits.max_model_bytes {
                let limit_bytes = limits.max_model_bytes;
                return Err(HubError::TooLarge { file: repo.to_string(), bytes: sum, limit_bytes });
            }
        }
    }
    drop(phase);
    let files = tree.done.into_values().filter(|file| layout.files.contains(&file.name)).collect();
    let from = client.endpoint.url(&format!("/{repo}"));
    Ok(Fetched { commit, files, from })
}

fn list(
    client: &Client,
    repo: &RepoId,
    revision: Option<&Revision>,
    limits: &Limits,
) -> Result<(String, BTreeMap<String, Entry>), HubError> {
    let segment = revision.map_or_else(|| "main".to_owned(), Revision::segment);
    let path = format!("/api/models/{repo}/revision/{segment}?blobs=true");
    let bytes = with_retries(limits, || {
        let (response, _) = client.get(&path, 0, None)?;
        read_body(response, MAX_LISTING_BYTES)
    })
    .map_err(|error| match error {
        HttpError::Status(404) => HubError::NoSuchModel,
        HttpError::Status(status @ (401 | 403)) => HubError::Denied { status, had_token: client.has_token() },
        other => HubError::Http(other),
    })?;
    let listing: Listing = serde_json::from_slice(&bytes)
        .map_err(|error| HubError::Listing(printable(&error.to_string(), 120)))?;
    if !is_commit(&listing.sha) {
        return Err(HubError::Listing("its revision is not a commit hash".to_owned()));
    }
    let mut entries = BTreeMap::new();
    for sibling in listing.siblings {
        // Names that we would not ask for may be anything.
        if check_file_name(&sibling.rfilename).is_err() {
            continue;
        }
        let (lfs_sha256, lfs_size) = sibling.lfs.map_or((None, None), |lfs| (lfs.sha256, lfs.size));
        if lfs_sha256.as_ref().is_some_and(|sha256| !is_sha256(sha256)) {
            return Err(HubError::Listing(format!("{} has a malformed SHA-256", sibling.rfilename)));
        }
        let entry = Entry { size_bytes: lfs_size.or(sibling.size), sha256: lfs_sha256 };
        entries.insert(sibling.rfilename, entry);
    }
    Ok((listing.sha, entries))
}

/// The hub's listing as a [`Tree`]: reading a file downloads it.
struct HubTree<'a> {
    client: &'a Client,
    repo: &'a RepoId,
    commit: &'a str,
    listing: BTreeMap<String, Entry>,
    dest: &'a Path,
    limits: &'a Limits,
    done: BTreeMap<String, FileRecord>,
}

impl Tree for HubTree<'_> {
    type Error = HubError;

    fn has(&mut self, name: &str) -> Result<bool, HubError> {
        Ok(self.listing.contains_key(name))
    }

    fn read(&mut self, name: &str, limit_bytes: u64) -> Result<Vec<u8>, HubError> {
        if !self.done.contains_key(name) {
            self.download(name, &mut |_| {})?;
        }
        let path = self.dest.join(name);
        let mut bytes = Vec::new();
        std::fs::File::open(&path)
            .and_then(|file| file.take(limit_bytes).read_to_end(&mut bytes))
            .map_err(|error| SourceError::io("read", &path, error))?;
        Ok(bytes)
    }
}

impl HubTree<'_> {
    /// The most bytes that a file may have, checked against its announced size.
    fn limit_of(&self, name: &str, size_bytes: Option<u64>) -> Result<u64, HubError> {
        let limit_bytes = max_bytes_of(name).min(self.limits.max_file_bytes);
        match size_bytes.filter(|bytes| *bytes > limit_bytes) {
            Some(bytes) => Err(HubError::TooLarge { file: name.to_owned(), bytes, limit_bytes }),
            None => Ok(limit_bytes),
        }
    }

    fn download(&mut self, name: &str, advance: &mut dyn FnMut(u64)) -> Result<(), HubError> {
        let mut expected = self.listing.get(name).cloned().unwrap_or_default();
        let mut sink = Sink::create(self.dest.join(name))?;
        // Bytes reported so far: a restart must not report them again.
        let mut reported = 0_u64;
        let mut stop: Option<HubError> = None;
        let path = format!("/{}/resolve/{}/{name}", self.repo, self.commit);
        with_retries(self.limits, || {
            let start = sink.written_bytes();
            let (response, linked) = self.client.get(&path, start, expected.sha256.as_deref())?;
            if let Err(error) = merge(name, &mut expected, linked) {
                stop = Some(error);
                return Ok(());
            }
            let limit_bytes = match self.limit_of(name, expected.size_bytes) {
                Ok(limit_bytes) => expected.size_bytes.unwrap_or(limit_bytes),
                Err(error) => {
                    stop = Some(error);
                    return Ok(());
                }
            };
            let resumed = response.status() == StatusCode::PARTIAL_CONTENT
                && header(response.headers(), "content-range")
                    .is_some_and(|range| range.starts_with(&format!("bytes {start}-")));
            if !resumed && let Err(error) = sink.restart() {
                stop = Some(error.into());
                return Ok(());
            }
            if !resumed && response.status() == StatusCode::PARTIAL_CONTENT {
                return Err(HttpError::Broken("it sent another part than was asked for".to_owned()));
            }
            let mut position = sink.written_bytes();
            let copied = sink.copy_from(&mut body_reader(response), limit_bytes, |bytes| {
                position = position.saturating_add(bytes);
                advance(position.saturating_sub(reported));
                reported = reported.max(position);
            });
            match copied {
                Ok(()) if expected.size_bytes.is_some_and(|size| sink.written_bytes() < size) => {
                    Err(HttpError::Broken(format!("it ended after {} bytes", sink.written_bytes())))
                }
                Ok(()) => Ok(()),
                Err(CopyError::Read(error)) => Err(HttpError::Broken(printable(&error.to_string(), 120))),
                Err(CopyError::TooLong) => {
                    stop = Some(match expected.size_bytes {
                        Some(expected_bytes) => HubError::WrongSize { file: name.to_owned(), expected_bytes },
                        None => HubError::TooLarge {
                            file: name.to_owned(),
                            bytes: limit_bytes.saturating_add(1),
                            limit_bytes,
                        },
                    });
                    Ok(())
                }
                Err(CopyError::Write(error)) => {
                    stop = Some(error.into());
                    Ok(())
                }
            }
        })
        .map_err(|source| HubError::File { file: name.to_owned(), source })?;
        if let Some(error) = stop {
            return Err(error);
        }
        let file = record(name, sink)?;
        if let Some(wanted) = expected.sha256.filter(|wanted| *wanted != file.sha256) {
            let file_name = name.to_owned();
            return Err(HubError::WrongDigest { file: file_name, expected: wanted, actual: file.sha256 });
        }
        self.done.insert(name.to_owned(), file);
        Ok(())
    }
}

/// Adds what the answer's headers say; a contradiction to the listing is an error.
fn merge(name: &str, expected: &mut Entry, linked: Linked) -> Result<(), HubError> {
    let contradicts =
        (linked.sha256.is_some() && expected.sha256.is_some() && linked.sha256 != expected.sha256)
            || (linked.size_bytes.is_some()
                && expected.size_bytes.is_some()
                && linked.size_bytes != expected.size_bytes);
    if contradicts {
        return Err(HubError::Listing(format!("its answer for {name} contradicts the listing")));
    }
    expected.sha256 = expected.sha256.take().or(linked.sha256);
    expected.size_bytes = expected.size_bytes.or(linked.size_bytes);
    Ok(())
}

/// Runs `ask` again after failures that may pass: a connection that broke off, 5xx, a short 429. A hub that can't be
/// reached at all is not waited for.
fn with_retries<T>(limits: &Limits, mut ask: impl FnMut() -> Result<T, HttpError>) -> Result<T, HttpError> {
    let mut pause = limits.retry_pause;
    let mut left = limits.retries;
    loop {
        let error = match ask() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let wait: Option<Duration> = match &error {
            HttpError::Broken(_) | HttpError::Status(500..=599) => Some(pause),
            HttpError::RateLimited { retry_after: Some(wait) } if *wait <= limits.max_retry_after => {
                Some(*wait)
            }
            HttpError::RateLimited { retry_after: None } => Some(pause),
            _ => None,
        };
        let Some(wait) = wait.filter(|_| left > 0) else { return Err(error) };
        tracing::debug!(%error, ?wait, "asking the hub again");
        std::thread::sleep(wait);
        left -= 1;
        pause = pause.saturating_mul(2);
    }
}

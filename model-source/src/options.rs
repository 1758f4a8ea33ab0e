//! Settings of a look-up, their defaults, and their reading from the environment. No look-up happens here.

use crate::error::SourceError;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The hub that is asked unless another is set.
pub(crate) const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Bounds on time and size. Every one of them ends in a named error.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Resolving a name plus connecting, each: so short that an unreachable hub costs seconds.
    pub connect: Duration,
    /// Longest silence of a server, headers or body.
    pub stall: Duration,
    /// How often a request that broke off is tried again.
    pub retries: u32,
    /// Pause before the first retry; doubled for each further one.
    pub retry_pause: Duration,
    /// Longest `Retry-After` that is waited for; a longer one is an error at once.
    pub max_retry_after: Duration,
    /// Largest single file, in bytes.
    pub max_file_bytes: u64,
    /// Largest model, all files together, in bytes.
    pub max_model_bytes: u64,
    /// Longest run of pip as a whole.
    pub pip: Duration,
    /// Longest run of Python when it is asked what it has installed.
    pub python_query: Duration,
    /// Longest wait for another process that fetches the same model.
    pub lock_wait: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connect: Duration::from_secs(4),
            stall: Duration::from_secs(30),
            retries: 2,
            retry_pause: Duration::from_millis(500),
            max_retry_after: Duration::from_secs(10),
            max_file_bytes: 32 << 30,
            max_model_bytes: 128 << 30,
            pip: Duration::from_secs(15 * 60),
            python_query: Duration::from_secs(20),
            lock_wait: Duration::from_secs(30 * 60),
        }
    }
}

/// How to reach pip: the Python interpreters whose `-m pip` is used, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipCommand {
    /// Interpreters, names to be found on `PATH` or absolute paths. Empty: no Python is ever started.
    pub pythons: Vec<PathBuf>,
}

impl Default for PipCommand {
    fn default() -> PipCommand {
        PipCommand { pythons: vec!["python3".into(), "python".into()] }
    }
}

/// Everything a look-up depends on. Tests and callers may fill it by hand; [`SourceOptions::from_env`] is the usual way.
#[derive(Clone)]
pub struct SourceOptions {
    /// Our cache folder; models lie in `models/` below it.
    pub cache_dir: PathBuf,
    /// No network: neither the hub nor pip is asked.
    pub offline: bool,
    /// The folder with `models--org--name` folders of the Hugging Face libraries; `None`: not looked at.
    pub hf_hub_cache: Option<PathBuf>,
    /// Base URL of the hub, `http://` or `https://`.
    pub hub_endpoint: String,
    /// Hosts, besides the hub's own, that its redirects may lead to (exact names). The public hub's content network is
    /// always allowed.
    pub hub_cdn_hosts: Vec<String>,
    /// Access token for private and gated models. Sent to the endpoint only, never across hosts, never in clear text
    /// except to this machine.
    pub token: Option<String>,
    /// PEM file with the certificate authorities to trust instead of the built-in ones.
    pub ca_bundle: Option<PathBuf>,
    /// How to reach pip.
    pub pip: PipCommand,
    /// Bounds on time and size.
    pub limits: Limits,
}

impl std::fmt::Debug for SourceOptions {
    // By hand, so that the token can't get into a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceOptions")
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("hf_hub_cache", &self.hf_hub_cache)
            .field("hub_endpoint", &self.hub_endpoint)
            .field("hub_cdn_hosts", &self.hub_cdn_hosts)
            .field("token", &self.token.as_ref().map(|_| "set"))
            .field("ca_bundle", &self.ca_bundle)
            .field("pip", &self.pip)
            .field("limits", &self.limits)
            .finish()
    }
}

type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl SourceOptions {
    /// Options with that cache folder and defaults for the rest; nothing is read from the environment.
    pub fn new(cache_dir: PathBuf) -> SourceOptions {
        SourceOptions {
            cache_dir,
            offline: false,
            hf_hub_cache: None,
            hub_endpoint: DEFAULT_ENDPOINT.to_owned(),
            hub_cdn_hosts: Vec::new(),
            token: None,
            ca_bundle: None,
            pip: PipCommand::default(),
            limits: Limits::default(),
        }
    }

    /// Reads `MODELBROKER_CACHE_DIR`, `MODEL_CACHE_DIR`, `XDG_CACHE_HOME`; `MODELBROKER_OFFLINE`, `HF_HUB_OFFLINE`;
    /// `HF_HUB_CACHE`, `HF_HOME`; `HF_ENDPOINT`; `HF_TOKEN`; `MODELBROKER_HUB_CDN_HOSTS` (comma-separated);
    /// `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`; `MODELBROKER_PYTHON`. The first that is set and not empty wins. Proxy
    /// variables (`HTTPS_PROXY`, `NO_PROXY`, …) are honoured by the HTTP client itself.
    ///
    /// # Errors
    /// [`SourceError::Setting`] if there is no folder for the cache, or a value isn't text where it must be.
    pub fn from_env() -> Result<SourceOptions, SourceError> {
        SourceOptions::from_lookup(&|key| std::env::var_os(key), std::env::home_dir())
    }

    fn from_lookup(env: Lookup<'_>, home: Option<PathBuf>) -> Result<SourceOptions, SourceError> {
        let path = |key: &str| env(key).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home = home.filter(|home| home.is_absolute());
        let mut options = SourceOptions::new(cache_dir_from(env, home.clone())?);
        options.offline = flag(env, "MODELBROKER_OFFLINE")? || flag(env, "HF_HUB_OFFLINE")?;
        options.hf_hub_cache = path("HF_HUB_CACHE")
            .or_else(|| path("HF_HOME").map(|dir| dir.join("hub")))
            .or_else(|| xdg_cache_home(env, home).map(|dir| dir.join("huggingface/hub")));
        if let Some(endpoint) = text(env, "HF_ENDPOINT")? {
            options.hub_endpoint = endpoint;
        }
        if let Some(hosts) = text(env, "MODELBROKER_HUB_CDN_HOSTS")? {
            options.hub_cdn_hosts = hosts
                .split(',')
                .map(|host| host.trim().to_ascii_lowercase())
                .filter(|h| !h.is_empty())
                .collect();
        }
        options.token = text(env, "HF_TOKEN")?.map(|token| token.trim().to_owned()).filter(|t| !t.is_empty());
        if options.token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err(SourceError::Setting {
                key: "HF_TOKEN",
                reason: "a token is printable ASCII without spaces".to_owned(),
            });
        }
        options.ca_bundle = path("SSL_CERT_FILE").or_else(|| path("REQUESTS_CA_BUNDLE"));
        if let Some(python) = path("MODELBROKER_PYTHON") {
            // A bare name is looked for on PATH; a relative path must not depend on where the child is started.
            let relative = python.components().count() > 1 && python.is_relative();
            options.pip.pythons = vec![if relative {
                std::path::absolute(&python).map_err(|error| SourceError::Setting {
                    key: "MODELBROKER_PYTHON",
                    reason: format!("cannot make it absolute: {error}"),
                })?
            } else {
                python
            }];
        }
        Ok(options)
    }
}

/// The cache folder that the environment asks for: `MODELBROKER_CACHE_DIR`, else `MODEL_CACHE_DIR`, else
/// `$XDG_CACHE_HOME/modelbroker`, else `~/.cache/modelbroker`. It need not exist yet.
///
/// # Errors
/// [`SourceError::Setting`] if none of them is set and there is no home folder.
pub fn default_cache_dir() -> Result<PathBuf, SourceError> {
    cache_dir_from(&|key| std::env::var_os(key), std::env::home_dir())
}

fn cache_dir_from(env: Lookup<'_>, home: Option<PathBuf>) -> Result<PathBuf, SourceError> {
    for key in ["MODELBROKER_CACHE_DIR", "MODEL_CACHE_DIR"] {
        if let Some(value) = env(key).filter(|value| !value.is_empty()) {
            // A later change of the working directory must not move the cache.
            return std::path::absolute(Path::new(&value)).map_err(|error| SourceError::Setting {
                key: "MODELBROKER_CACHE_DIR",
                reason: format!("cannot make it absolute: {error}"),
            });
        }
    }
    xdg_cache_home(env, home.filter(|home| home.is_absolute())).map(|dir| dir.join("modelbroker")).ok_or_else(
        || SourceError::Setting {
            key: "MODELBROKER_CACHE_DIR",
            reason: "there is no home folder to keep models in: set it to a folder".to_owned(),
        },
    )
}

fn xdg_cache_home(env: Lookup<'_>, home: Option<PathBuf>) -> Option<PathBuf> {
    // The XDG specification says that a relative value is to be ignored.
    env("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute())
        .or_else(|| home.map(|home| home.join(".cache")))
}

fn text(env: Lookup<'_>, key: &'static str) -> Result<Option<String>, SourceError> {
    match env(key).filter(|value| !value.is_empty()).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(_)) => Err(SourceError::Setting { key, reason: "its value is not UTF-8".to_owned() }),
    }
}

/// The truth values of the Hugging Face libraries, plus the usual noes; anything else is an error, not a silent no.
fn flag(env: Lookup<'_>, key: &'static str) -> Result<bool, SourceError> {
    let Some(value) = text(env, key)? else { return Ok(false) };
    match value.trim().to_ascii_uppercase().as_str() {
        "1" | "ON" | "YES" | "TRUE" => Ok(true),
        "" | "0" | "OFF" | "NO" | "FALSE" => Ok(false),
        _ => Err(SourceError::Setting { key, reason: "give 1 or 0".to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> Result<SourceOptions, SourceError> {
        let env = |key: &str| pairs.iter().find(|(k, _)| *k == key).map(|(_, v)| OsString::from(v));
        SourceOptions::from_lookup(&env, Some("/home/u".into()))
    }

    #[test]
    fn defaults_follow_xdg_and_hugging_face() {
        let plain = options(&[]).unwrap();
        assert_eq!(plain.cache_dir, Path::new("/home/u/.cache/modelbroker"));
        assert_eq!(plain.hf_hub_cache.as_deref(), Some(Path::new("/home/u/.cache/huggingface/hub")));
        assert_eq!((plain.hub_endpoint.as_str(), plain.offline), (DEFAULT_ENDPOINT, false));
        let xdg = options(&[("XDG_CACHE_HOME", "/x")]).unwrap();
        assert_eq!(xdg.cache_dir, Path::new("/x/modelbroker"));
        assert_eq!(xdg.hf_hub_cache.as_deref(), Some(Path::new("/x/huggingface/hub")));
        assert_eq!(options(&[("XDG_CACHE_HOME", "rel")]).unwrap().cache_dir, plain.cache_dir);
    }

    #[test]
    fn more_specific_variables_win_and_empty_ones_count_as_unset() {
        let all = options(&[
            ("MODELBROKER_CACHE_DIR", "/a"),
            ("MODEL_CACHE_DIR", "/b"),
            ("XDG_CACHE_HOME", "/c"),
            ("HF_HUB_CACHE", "/hub"),
            ("HF_HOME", "/hf"),
            ("HF_HUB_OFFLINE", "yes"),
            ("MODELBROKER_OFFLINE", "0"),
            ("HF_ENDPOINT", "http://mirror"),
            ("HF_TOKEN", " t \n"),
            ("MODELBROKER_PYTHON", "/py"),
            ("MODELBROKER_HUB_CDN_HOSTS", "A.example, b.example,"),
        ])
        .unwrap();
        assert_eq!(all.cache_dir, Path::new("/a"));
        assert_eq!(all.hf_hub_cache.as_deref(), Some(Path::new("/hub")));
        assert!(all.offline);
        assert_eq!(all.token.as_deref(), Some("t"));
        assert_eq!(all.hub_cdn_hosts, ["a.example", "b.example"]);
        assert_eq!(all.pip.pythons, [PathBuf::from("/py")]);
        assert!(!format!("{all:?}").contains("\"t\""), "the token stays out of debug output");
        let some =
            options(&[("MODELBROKER_CACHE_DIR", ""), ("MODEL_CACHE_DIR", "/b"), ("HF_HOME", "/hf")]).unwrap();
        assert_eq!(some.cache_dir, Path::new("/b"));
        assert_eq!(some.hf_hub_cache.as_deref(), Some(Path::new("/hf/hub")));
    }

    #[test]
    fn unusable_settings_are_named() {
        let error = options(&[("MODELBROKER_OFFLINE", "perhaps")]).unwrap_err();
        assert!(matches!(error, SourceError::Setting { key: "MODELBROKER_OFFLINE", .. }));
        assert!(options(&[("HF_TOKEN", "a b")]).is_err());
        let error = SourceOptions::from_lookup(&|_| None, None).unwrap_err();
        assert!(error.to_string().contains("MODELBROKER_CACHE_DIR"));
    }
}

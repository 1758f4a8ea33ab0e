//! From the command line and this process's environment to the configuration that holds. What the keys are and mean is the
//! crate `settings`'s affair.

use crate::args::{Arguments, ServeArgs};
use crate::failure::{Exit, Failure};
use settings::{ConfigFile, Effective, FlagValue, Problems, Sources, config_path, resolve};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What the command line says of the configuration; kept to read it again later.
#[derive(Debug, Clone, Default)]
pub(crate) struct CommandLine {
    config: Option<PathBuf>,
    flags: Vec<FlagValue>,
}

impl CommandLine {
    /// Of the options that every command has.
    ///
    /// # Errors
    /// [`Failure`] when one is no text.
    pub(crate) fn new(arguments: &Arguments) -> Result<CommandLine, Failure> {
        // A path that is not absolute would mean another file after a change of the working folder.
        let config = arguments.config.as_deref().map(std::path::absolute).transpose()?;
        let mut line = CommandLine { config, flags: Vec::new() };
        for (key, value) in &arguments.set {
            line.add("--set", key, value);
        }
        line.add_path("--socket", "serve.socket", arguments.socket.as_deref())?;
        Ok(line)
    }

    /// With the options of `serve`.
    ///
    /// # Errors
    /// [`Failure`] when one is no text.
    pub(crate) fn with_serve(mut self, args: &ServeArgs) -> Result<CommandLine, Failure> {
        self.add_some("--model", "serve.model", args.model.as_deref());
        self.add_path("--cache-dir", "serve.cache_dir", args.cache_dir.as_deref())?;
        self.add_some("--backing", "serve.backing", args.backing.map(|backing| backing.name()));
        self.add_some("--precision", "serve.precision", args.precision.map(|precision| precision.name()));
        self.add_some("--threads", "serve.threads", args.threads);
        self.add_some("--cache-entries", "embedding_cache.max_cache_size", args.cache_entries);
        self.add_some("--cache-ttl", "embedding_cache.ttl_seconds", args.cache_ttl);
        self.add_some("--memory-budget", "serve.memory_budget_bytes", args.memory_budget.as_deref());
        self.add_some("--unload-after", "sharing.unload_after_seconds", args.unload_after);
        self.add_some("--max-models", "sharing.max_shared_models", args.max_models);
        for (given, flag, key) in [
            (args.cache_persist, "--cache-persist", "embedding_cache.persist_to_disk"),
            (args.log_json, "--log-json", "serve.log_json"),
            (args.allow_other_users, "--allow-other-users", "serve.allow_other_users"),
        ] {
            self.add_some(flag, key, given.then_some(true));
        }
        if !args.started_by_client {
            self.add_some("--idle-exit", "serve.idle_exit_seconds", args.idle_exit);
            self.add_path("--log-file", "serve.log_file", args.log_file.as_deref())?;
        }
        Ok(self)
    }

    /// The same, with another file.
    pub(crate) fn with_file(self, path: &Path) -> CommandLine {
        CommandLine { config: Some(path.to_path_buf()), ..self }
    }

    fn add(&mut self, flag: &str, key: &str, value: &str) {
        self.flags.push(FlagValue { flag: flag.into(), key: key.into(), value: value.into() });
    }

    fn add_some(&mut self, flag: &str, key: &str, value: Option<impl ToString>) {
        if let Some(value) = value {
            self.add(flag, key, &value.to_string());
        }
    }

    fn add_path(&mut self, flag: &str, key: &str, path: Option<&Path>) -> Result<(), Failure> {
        let Some(path) = path else { return Ok(()) };
        let text = |path: &OsStr| path.to_str().map(str::to_owned);
        let text = text(path.as_os_str()).ok_or_else(|| {
            Failure::new(
                Exit::Usage,
                format!("{flag} {}: is not UTF-8 text; choose another path", path.display()),
            )
        })?;
        self.add(flag, key, &text);
        Ok(())
    }

    /// Where the configuration file is looked for, and whether it must be there.
    pub(crate) fn file(&self) -> Option<(PathBuf, bool)> {
        config_path(self.config.as_deref(), |name| std::env::var_os(name), std::env::home_dir().as_deref())
    }

    /// Reads everything.
    ///
    /// # Errors
    /// [`Problems`]: all that is wrong with it.
    pub(crate) fn load(&self) -> Result<Effective, Problems> {
        let mut sources = Sources {
            environment: std::env::vars_os().collect(),
            flags: self.flags.clone(),
            home: std::env::home_dir(),
            ..Sources::default()
        };
        if let Some((path, must_exist)) = self.file() {
            match ConfigFile::read(&path, must_exist) {
                Ok(file) => sources.file = file,
                Err(problem) => sources.unreadable = Some(*problem),
            }
        }
        resolve(&sources)
    }
}

/// `KEY=VALUE`.
pub(crate) fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => Ok((key.trim().to_owned(), value.to_owned())),
        _ => Err("give KEY=VALUE, for example sharing.unload_after_seconds=60".into()),
    }
}

//! `config`: what holds and where it comes from, what is wrong with it, its schema, a file to begin with.

use crate::args::{ConfigAction, ConfigArgs};
use crate::configuration::CommandLine;
use crate::failure::{Exit, Failure};
use crate::terminal::bold;
use serde_json::json;
use settings::{CONFIG_FILE_NAME, Problem, Problems, Value};
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Shows or checks the configuration, or writes a file to begin with.
pub(super) fn run(line: CommandLine, args: ConfigArgs) -> Result<(), Failure> {
    match args.action {
        None => show(&line, args.json),
        Some(ConfigAction::Check { file, json }) => check(line, file.as_deref(), json || args.json),
        Some(ConfigAction::Schema) => {
            println!("{:#}", settings::schema());
            Ok(())
        }
        Some(ConfigAction::Init { file }) => init(&line, file),
    }
}

fn show(line: &CommandLine, as_json: bool) -> Result<(), Failure> {
    let effective = line.load()?;
    if as_json {
        println!("{}", effective.to_json());
        return Ok(());
    }
    for (key, setting) in effective.entries() {
        let value = match &setting.value {
            Value::Unset => "unset".to_owned(),
            value => bold(&value.to_string()).to_string(),
        };
        println!("{key} = {value}  ({})", setting.origin);
    }
    Ok(())
}

fn problem_json(problem: &Problem) -> serde_json::Value {
    json!({
        "key": problem.key,
        "value": problem.value,
        "reason": problem.reason,
        "origin": problem.origin.to_string(),
        "nearest": problem.nearest,
    })
}

fn check(line: CommandLine, file: Option<&Path>, as_json: bool) -> Result<(), Failure> {
    let line = match file {
        Some(file) => line.with_file(&std::path::absolute(file)?),
        None => line,
    };
    let outcome: Result<_, Problems> = line.load();
    let looked_at = line.file().map(|(path, _)| path);
    let name = |path: &PathBuf| match path.is_file() {
        true => path.display().to_string(),
        false => format!("{} (not there: defaults)", path.display()),
    };
    if as_json {
        let problems: Vec<_> =
            outcome.as_ref().err().map(|p| p.list().iter().map(problem_json).collect()).unwrap_or_default();
        println!("{}", json!({ "ok": outcome.is_ok(), "file": looked_at, "problems": problems }));
    }
    match outcome {
        Ok(_) if as_json => Ok(()),
        Ok(_) => {
            let name = looked_at.as_ref().map_or_else(|| "no file".to_owned(), name);
            println!("{name}, environment and options: nothing is wrong");
            Ok(())
        }
        Err(_) if as_json => Err(Failure::told(Exit::Usage)),
        Err(problems) => Err(problems.into()),
    }
}

fn init(line: &CommandLine, file: Option<PathBuf>) -> Result<(), Failure> {
    let path = match file.or_else(|| line.file().map(|(path, _)| path)) {
        Some(path) => path,
        None => {
            let why = format!("there is no home folder for {CONFIG_FILE_NAME}: name the file");
            return Err(Failure::new(Exit::Usage, why));
        }
    };
    let failed = |what: &str, error: std::io::Error| {
        Failure::new(Exit::Failed, format!("{} cannot be {what}: {error}", path.display()))
    };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|e| failed("written", e))?;
    }
    // Never over a file that is there, not even when two do this at once.
    let mut opened = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            let why = format!(
                "{} is there already and is left as it is: move it away, or name another",
                path.display()
            );
            return Err(Failure::new(Exit::Failed, why));
        }
        Err(error) => return Err(failed("written", error)),
    };
    opened.write_all(settings::template().as_bytes()).map_err(|e| failed("written", e))?;
    println!("{} written; every line is commented out", path.display());
    Ok(())
}

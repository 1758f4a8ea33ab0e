//! The configuration file: where it is, reading it within its bound, and its TOML as flat keys with line numbers. Says
//! nothing about which keys there are.

use crate::limits::{MAX_FILE_BYTES, MAX_TABLE_DEPTH};
use crate::problem::{Origin, Problem, Problems};
use crate::value::Raw;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Read;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Environment variable that names the file.
pub const CONFIG_VARIABLE: &str = "MODELBROKER_CONFIG";
/// The file's place below `$XDG_CONFIG_HOME`.
pub const CONFIG_FILE_NAME: &str = "modelbroker/config.toml";

/// A configuration file that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFile {
    /// Where it lies.
    pub path: PathBuf,
    /// What it holds.
    pub text: String,
}

/// Where the file is looked for, and whether it must be there: what the command line names, else `MODELBROKER_CONFIG`,
/// else `modelbroker/config.toml` in `$XDG_CONFIG_HOME` or `~/.config`, which may be missing. `None`: there is no
/// such folder.
#[must_use]
pub fn config_path(
    named: Option<&Path>,
    variable: impl Fn(&str) -> Option<OsString>,
    home: Option<&Path>,
) -> Option<(PathBuf, bool)> {
    if let Some(path) = named {
        return Some((path.to_path_buf(), true));
    }
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set(CONFIG_VARIABLE) {
        return Some((path, true));
    }
    // The XDG specification says that a relative value is to be ignored.
    let folder = set("XDG_CONFIG_HOME").filter(|path| path.is_absolute());
    let folder =
        folder.or_else(|| home.filter(|home| home.is_absolute()).map(|home| home.join(".config")))?;
    Some((folder.join(CONFIG_FILE_NAME), false))
}

impl ConfigFile {
    /// Reads a file of at most [`MAX_FILE_BYTES`]. `Ok(None)`: it is not there and need not be.
    ///
    /// # Errors
    /// [`Problem`] when it cannot be read, is no regular file, is too large, or is not UTF-8.
    pub fn read(path: &Path, must_exist: bool) -> Result<Option<ConfigFile>, Box<Problem>> {
        let failed = |line, reason: String| Box::new(Problem::of_file(path.to_path_buf(), line, reason));
        // Looked at before it is opened: opening a pipe would wait for its writer.
        match std::fs::metadata(path) {
            Ok(state) if state.is_file() => {}
            Ok(_) => return Err(failed(0, "is not a regular file".into())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(None),
            Err(error) => {
                return Err(failed(
                    0,
                    format!(
                        "cannot be read: {error}; `modelbroker config init FILE` writes one with every key"
                    ),
                ));
            }
        }
        let read = OpenOptions::new().read(true).open(path).and_then(|file| {
            let mut bytes = Vec::new();
            file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
            Ok(bytes)
        });
        let bytes = read.map_err(|error| failed(0, format!("cannot be read: {error}")))?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            return Err(failed(
                0,
                format!("is larger than {MAX_FILE_BYTES} bytes: a configuration is short"),
            ));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(ConfigFile { path: path.to_path_buf(), text })),
            Err(error) => {
                let good = error.utf8_error().valid_up_to();
                let line = 1 + error.as_bytes()[..good].iter().filter(|byte| **byte == b'\n').count();
                Err(failed(line, "is not UTF-8 text".into()))
            }
        }
    }
}

/// One value of the file.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FileEntry {
    pub(crate) key: String,
    pub(crate) raw: Raw,
    pub(crate) line: usize,
}

/// Line numbers of byte offsets.
struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    fn of(text: &str) -> Lines {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1);
        Lines { starts: std::iter::once(0).chain(ends).collect() }
    }

    /// Counted from 1.
    fn at(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset).max(1)
    }
}

/// The file's values in the order of their lines, its tables as dotted keys. `None` when it is not TOML: then nothing of it
/// can be judged.
pub(crate) fn entries(file: &ConfigFile, problems: &mut Problems) -> Option<Vec<FileEntry>> {
    let lines = Lines::of(&file.text);
    let (table, errors) = DeTable::parse_recoverable(&file.text);
    if !errors.is_empty() {
        for error in errors {
            let line = error.span().map_or(0, |span| lines.at(span.start));
            let reason = format!("is not TOML: {}", error.message().trim().replace('\n', ", "));
            problems.push(Problem::of_file(file.path.clone(), line, reason));
        }
        return None;
    }
    let mut found = Flat { file, lines, entries: Vec::new(), problems };
    found.table("", table.get_ref(), 0);
    let Flat { mut entries, problems, .. } = found;
    entries.sort_by_key(|entry| entry.line);
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut again = Vec::new();
    for (at, entry) in entries.iter().enumerate() {
        match seen.get(entry.key.as_str()) {
            Some(first) => {
                let origin = Origin::File { path: file.path.clone(), line: entry.line };
                let reason = format!("was given in line {first} already");
                problems.push(Problem::new(&origin, &entry.key, reason).value(entry.raw.shown()));
                again.push(at);
            }
            None => {
                seen.insert(&entry.key, entry.line);
            }
        }
    }
    for at in again.into_iter().rev() {
        entries.remove(at);
    }
    Some(entries)
}

struct Flat<'a> {
    file: &'a ConfigFile,
    lines: Lines,
    entries: Vec<FileEntry>,
    problems: &'a mut Problems,
}

impl Flat<'_> {
    fn table(&mut self, prefix: &str, table: &DeTable<'_>, depth: usize) {
        for (name, value) in table {
            let key = match prefix {
                "" => name.get_ref().to_string(),
                _ => format!("{prefix}.{}", name.get_ref()),
            };
            let line = self.lines.at(name.span().start);
            let raw = match value.get_ref() {
                DeValue::Table(inner) if depth >= MAX_TABLE_DEPTH || inner.is_empty() => {
                    if !inner.is_empty() {
                        let origin = Origin::File { path: self.file.path.clone(), line };
                        let reason = format!("tables are nested more than {MAX_TABLE_DEPTH} deep");
                        self.problems.push(Problem::new(&origin, &key, reason));
                    }
                    continue;
                }
                DeValue::Table(inner) => {
                    self.table(&key, inner, depth + 1);
                    continue;
                }
                DeValue::String(text) => Raw::String(text.to_string()),
                DeValue::Boolean(on) => Raw::Switch(*on),
                DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
                    .map_or(Raw::Other("a number beyond all bounds"), Raw::Whole),
                DeValue::Float(number) => {
                    number.as_str().parse().map_or(Raw::Other("a number beyond all bounds"), Raw::Float)
                }
                DeValue::Datetime(_) => Raw::Other("a date"),
                DeValue::Array(_) => Raw::Other("an array"),
            };
            self.entries.push(FileEntry { key, raw, line });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Option<Vec<FileEntry>>, Problems) {
        let file = ConfigFile { path: "/c.toml".into(), text: text.into() };
        let mut problems = Problems::default();
        (entries(&file, &mut problems), problems)
    }

    #[test]
    fn tables_dots_and_quotes_are_one_flat_key() {
        let text = "enabled = true\n[sharing]\nrollout_percent = 5\n\n[models.embedding]\nname = 'x'\n[models]\n\
                    other.type = \"chat\"\n\"a.b\" = { preload = false }\n";
        let (found, problems) = read(text);
        assert_eq!(problems.count(), 0);
        let keys: Vec<(String, usize)> = found.unwrap().into_iter().map(|e| (e.key, e.line)).collect();
        let expected = [
            ("enabled", 1),
            ("sharing.rollout_percent", 3),
            ("models.embedding.name", 6),
            ("models.other.type", 8),
            ("models.a.b.preload", 9),
        ];
        assert_eq!(keys, expected.map(|(key, line)| (key.to_owned(), line)));
    }

    #[test]
    fn the_same_key_twice_is_named_with_both_lines() {
        let (found, problems) = read("[sharing]\nenabled = true\n[other]\n");
        assert_eq!((found.unwrap().len(), problems.count()), (1, 0));
        let (_, problems) = read("\"sharing.enabled\" = true\n\n[sharing]\nenabled = false\n");
        assert_eq!(
            problems.list()[0].to_string(),
            "file /c.toml:4: sharing.enabled = false: was given in line 1 already"
        );
        // TOML's own rule.
        let (found, problems) = read("enabled = true\nenabled = false\n");
        assert!(found.is_none());
        assert!(problems.list()[0].to_string().starts_with("file /c.toml:2: is not TOML: "), "{problems}");
    }

    #[test]
    fn what_is_not_toml_is_named_with_its_line() {
        let (found, problems) = read("enabled = true\nsharing.enabled = \n");
        assert!(found.is_none());
        assert!(problems.list()[0].to_string().starts_with("file /c.toml:2: is not TOML: "), "{problems}");
    }

    #[test]
    fn deep_nesting_is_refused() {
        let deep = vec!["a"; 200].join(".");
        let (_, problems) = read(&format!("{deep} = 1\n"));
        assert_eq!(problems.count(), 1, "{problems}");
        let (_, problems) = read(&format!("x = {}1{}\n", "[".repeat(100_000), "]".repeat(100_000)));
        assert!(problems.count() >= 1);
    }

    #[test]
    fn files_are_bounded_and_read_only_if_regular() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        assert_eq!(ConfigFile::read(&path, false), Ok(None));
        let said = ConfigFile::read(&path, true).unwrap_err().to_string();
        assert!(said.contains("cannot be read") && said.contains("c.toml"), "{said}");
        assert!(ConfigFile::read(folder.path(), false).unwrap_err().to_string().contains("regular"));
        std::fs::write(&path, b"ok = 1\n\xff").unwrap();
        assert!(ConfigFile::read(&path, true).unwrap_err().to_string().contains("c.toml:2: is not UTF-8"));
        std::fs::write(&path, vec![b'#'; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert!(ConfigFile::read(&path, true).unwrap_err().to_string().contains("larger than"));
    }

    #[test]
    fn the_first_place_that_is_named_counts() {
        let none = |_: &str| None;
        let home = Some(Path::new("/home/u"));
        let env = |name: &str| match name {
            CONFIG_VARIABLE => Some(OsString::from("/env.toml")),
            "XDG_CONFIG_HOME" => Some("/xdg".into()),
            _ => None,
        };
        let xdg = |name: &str| (name == "XDG_CONFIG_HOME").then(|| OsString::from("/xdg"));
        let relative = |name: &str| (name == "XDG_CONFIG_HOME").then(|| OsString::from("xdg"));
        let path = |p: &str, must| Some((PathBuf::from(p), must));
        assert_eq!(config_path(Some(Path::new("f.toml")), env, home), path("f.toml", true));
        assert_eq!(config_path(None, env, home), path("/env.toml", true));
        assert_eq!(config_path(None, xdg, home), path("/xdg/modelbroker/config.toml", false));
        assert_eq!(config_path(None, relative, home), path("/home/u/.config/modelbroker/config.toml", false));
        assert_eq!(config_path(None, none, None), None);
    }
}

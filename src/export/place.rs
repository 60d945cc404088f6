//! The folder that an export is written into.

use super::file;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// File by which an export is known as one.
const MARK: &str = "flowrl_export.json";

/// A folder that is whole or not there.
pub struct Place {
    out: PathBuf,
}

impl Place {
    /// The folder `out`, in which nothing is written yet.
    ///
    /// # Errors
    /// [`Error::Usage`]: it holds something, or with `replace` something else than an export.
    pub fn new(out: &Path, replace: bool) -> Result<Self> {
        let place = Self { out: out.to_path_buf() };
        let usage = |what: String| Err(Error::Usage(format!("--out {}: {what}", out.display())));
        if out.file_name().is_none() {
            return usage("is no folder's name; name a folder".into());
        }
        if let Some(file) = out.ancestors().find(|path| path.is_file()) {
            return usage(format!("{} is a file; name a folder", file.display()));
        }
        let held = names(out)?;
        let ours = holdings(out);
        match held.iter().find(|name| *name != MARK && !ours.contains(name)) {
            Some(other) => return usage(format!("holds {other}, which no export has written; name another folder")),
            None if !replace && !held.is_empty() => {
                return usage("holds an export already; name another folder, or replace it with --force".into());
            }
            None => {}
        }
        let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let made = fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
        made.map(|_| place).or_else(|e| usage(format!("cannot be written ({e}); name a folder where you may write")))
    }

    /// Lets `write` fill a folder beside this one, which then takes its name; returns the files that `write` names, by
    /// their paths. What a killed export leaves behind has a name with a dot, and goes with the next one.
    ///
    /// # Errors
    /// Those of `write`, and [`Error::Io`].
    pub(super) fn fill(&self, write: impl FnOnce(&Path) -> Result<Vec<String>>) -> Result<Vec<PathBuf>> {
        let (writing, replaced) = (self.beside("writing"), self.beside("replaced"));
        remove(&writing)?;
        fs::create_dir_all(&writing).map_err(Error::io(&writing))?;
        let written = write(&writing).and_then(|files| mark(&writing).map(|()| files));
        let files = written.inspect_err(|_| drop(remove(&writing)))?; // which may have filled the disk
        if self.out.exists() {
            remove(&replaced)?;
            fs::rename(&self.out, &replaced).map_err(Error::io(&self.out))?;
        }
        fs::rename(&writing, &self.out).map_err(Error::io(&self.out))?;
        remove(&replaced)?;
        Ok(files.into_iter().map(|file| self.out.join(file)).collect())
    }

    fn beside(&self, kind: &str) -> PathBuf {
        let name = self.out.file_name().unwrap_or_default().to_string_lossy();
        self.out.with_file_name(format!(".{kind}-{name}"))
    }
}

/// Says in an export that it is one, and what it holds.
fn mark(folder: &Path) -> Result<()> {
    let made_by = format!("flowrl-dist {}", env!("CARGO_PKG_VERSION"));
    file::write_json(&folder.join(MARK), &json!({ "made_by": made_by, "holds": names(folder)? }))
}

/// What an export says that it holds; nothing where there is none.
fn holdings(out: &Path) -> Vec<String> {
    let mark: Option<Value> = fs::read(out.join(MARK)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let holds = mark.and_then(|mark| serde_json::from_value(mark["holds"].clone()).ok());
    holds.unwrap_or_default()
}

/// The names in a folder, sorted; none where there is no folder.
fn names(folder: &Path) -> Result<Vec<String>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = entries.map(name).collect::<std::io::Result<_>>().map_err(Error::io(folder))?;
    names.sort();
    Ok(names)
}

/// Removes a folder of our own that a killed export has left.
fn remove(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_dir_all(path).map_err(Error::io(path)) } else { Ok(()) }
}

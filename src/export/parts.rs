//! The parts of a pipeline beside its transformer, which a merged model takes over as they are.

use super::file;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// File that names the parts of a pipeline.
const INDEX: &str = "model_index.json";

/// Folder of a transformer, as in a diffusers pipeline.
pub(super) const TRANSFORMER: &str = "transformer";

/// A pipeline in a folder, as diffusers writes it.
pub(super) struct Parts {
    /// Its folder.
    pub folder: PathBuf,
    /// [`INDEX`]: the class of each part, `[library, class]`.
    index: Map<String, Value>,
}

impl Parts {
    /// The pipeline in `folder`; none where there is no index of one.
    ///
    /// # Errors
    /// [`Error::File`]: the index cannot be read.
    pub fn of(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(INDEX);
        if !path.is_file() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(Error::io(&path))?;
        let message = |e| format!("is no index of a pipeline ({e}); download it again");
        let index = serde_json::from_slice(&text).map_err(|e| Error::File { path, message: message(e) })?;
        Ok(Some(Self { folder: folder.to_path_buf(), index }))
    }

    /// Refuses a pipeline of which a part is absent.
    ///
    /// # Errors
    /// [`Error::File`] that names the part.
    pub fn check(&self) -> Result<()> {
        match self.names().find(|name| !self.folder.join(name).is_dir()) {
            None => Ok(()),
            Some(name) => Err(Error::File {
                path: self.folder.clone(),
                message: format!(
                    "has no folder {name}, which its {INDEX} names; download it, or leave the parts beside the transformer \
                     out with --transformer-only"
                ),
            }),
        }
    }

    /// Copies the parts into the folder `out`, with an index that names the transformer, too; returns the names of the files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy(&self, out: &Path) -> Result<Vec<String>> {
        let mut files = vec![INDEX.to_owned()];
        for name in self.names() {
            copy_folder(&self.folder, out, name, &mut files)?;
        }
        let mut index = self.index.clone();
        index.insert(TRANSFORMER.into(), json!(["diffusers", "SD3Transformer2DModel"]));
        file::write_json(&out.join(INDEX), &Value::Object(index))?;
        Ok(files)
    }

    /// The names of the parts beside the transformer. An entry without a class is a part that was left out.
    fn names(&self) -> impl Iterator<Item = &str> {
        let parts = self.index.iter().filter(|(_, entry)| entry.get(1).is_some_and(Value::is_string));
        parts.map(|(name, _)| name.as_str()).filter(|name| *name != TRANSFORMER)
    }
}

/// Copies the files of the folder `name` in `from` into that in `to`, links as what they lead to, and adds their names.
fn copy_folder(from: &Path, to: &Path, name: &str, files: &mut Vec<String>) -> Result<()> {
    let (source, target) = (from.join(name), to.join(name));
    fs::create_dir(&target).map_err(Error::io(&target))?;
    let entries = fs::read_dir(&source).map_err(Error::io(&source))?;
    let entries = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut entries: Vec<String> = entries.collect::<std::io::Result<_>>().map_err(Error::io(&source))?;
    entries.sort();
    for entry in entries.into_iter().filter(|entry| !entry.starts_with('.')) {
        let path = format!("{name}/{entry}");
        match from.join(&path).is_dir() {
            true => copy_folder(from, to, &path, files)?,
            false => {
                file::copy(&from.join(&path), &to.join(&path))?;
                files.push(path);
            }
        }
    }
    Ok(())
}

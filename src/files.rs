//! Files that are there whole or not at all.

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// Writes `path`, in a folder that is made if absent: beside it first, then renamed, so that a process that is killed leaves
/// the file as it was and a reader never sees half of it. A pipe or a device of that name is written to as it is.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    if fs::metadata(path).is_ok_and(|data| !data.is_file()) {
        return fs::write(path, bytes).map_err(Error::io(path));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".writing-{name}"));
    fs::write(&unfinished, bytes).map_err(Error::io(&unfinished))?;
    fs::rename(&unfinished, path).map_err(Error::io(path))
}

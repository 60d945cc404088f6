//! Files that people and programs read while a run goes on.

use crate::error::{Error, Result};
use std::fs;
use std::path::Path;

/// Writes a file and makes its folder. The file takes its name when it is whole: a reader never sees half of it. A pipe or
/// a device of that name is written to as it is.
///
/// # Errors
/// [`Error::Io`]: the folder cannot be made, or the file cannot be written.
pub fn write_whole(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    if fs::metadata(path).is_ok_and(|data| !data.is_file()) {
        return fs::write(path, content).map_err(Error::io(path));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    fs::write(&temporary, content).map_err(Error::io(&temporary))?;
    fs::rename(&temporary, path).map_err(Error::io(path))
}

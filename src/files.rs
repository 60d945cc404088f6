//! Files: read where they are files, written whole or not at all.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Opens a file of the user's for reading. What is no file is refused: a named pipe would wait for its other end for ever,
/// and a device may have no end.
///
/// # Errors
/// [`Error::File`] if it is no file, [`Error::Io`] if it is not there or may not be read.
pub(crate) fn open(path: &Path) -> Result<File> {
    regular(path).map_err(|e| refused(path, e))
}

/// As [`open`], where the caller has words of its own for an error: one that is not the system's says what the path is.
pub(crate) fn regular(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    if !kind.is_file() {
        let is = if kind.is_dir() { "is a folder" } else { "is a pipe, a socket or a device" };
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{is}, not a file")));
    }
    File::open(path)
}

/// The bytes of a file: see [`regular`].
pub(crate) fn regular_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    regular(path)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a file: see [`regular`].
pub(crate) fn regular_text(path: &Path) -> io::Result<String> {
    String::from_utf8(regular_bytes(path)?).map_err(|e| {
        let place = e.utf8_error().valid_up_to();
        io::Error::new(io::ErrorKind::InvalidData, format!("is not in UTF-8 from byte {place} on"))
    })
}

/// The bytes of a file: see [`open`].
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    regular_bytes(path).map_err(|e| refused(path, e))
}

/// The text of a file: see [`open`].
///
/// # Errors
/// [`Error::File`] if it is not in UTF-8.
pub(crate) fn read_to_string(path: &Path) -> Result<String> {
    regular_text(path).map_err(|e| refused(path, e))
}

/// What the system refuses is its error; that the path is no file, or no text, is the user's.
fn refused(path: &Path, e: io::Error) -> Error {
    match e.raw_os_error() {
        None => Error::File { path: path.to_path_buf(), message: format!("{e}; name another") },
        Some(_) => Error::io(path)(e),
    }
}

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

//! Files: read where they are files, written whole or not at all, and appended to for days.

use crate::error::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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

/// A file that is appended to under its name: where a person removes or replaces it meanwhile, what is written goes into the
/// file that has the name then, not into one that nobody can read any more.
#[derive(Debug)]
pub(crate) struct Appended {
    path: PathBuf,
    /// The folder without which it is not made anew.
    within: PathBuf,
    file: File,
}

impl Appended {
    /// Opens or makes `path`, which is in the folder `within` or below it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(within: &Path, path: PathBuf) -> Result<Self> {
        let file = opened(&path).map_err(Error::io(&path))?;
        Ok(Self { path, within: within.to_path_buf(), file })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that has the name now; warns where that is another one than the last time.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&mut self) -> Result<&mut File> {
        if self.follow().map_err(Error::io(&self.path))? {
            let path = self.path.display();
            tracing::warn!(
                "{path}: was removed or replaced while the run writes it: what it wrote before is not in it"
            );
        }
        Ok(&mut self.file)
    }

    /// Opens or makes the file that has the name now; whether that is another one than the last time. Where the folder `within`
    /// is gone, nothing is made.
    fn follow(&mut self) -> io::Result<bool> {
        let own = self.file.metadata()?;
        let named = match fs::metadata(&self.path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            named => named.ok(),
        };
        if named.is_some_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino())) {
            return Ok(false);
        }
        fs::metadata(&self.within)?;
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        self.file = opened(&self.path)?;
        Ok(true)
    }
}

impl Write for Appended {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.follow()?; // without a warning: that would be written here
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn opened(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_goes_into_the_file_that_has_the_name() {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join("logs/a");
        fs::create_dir(out.path().join("logs")).unwrap();
        let mut file = Appended::open(out.path(), path.clone()).unwrap();
        let read = || fs::read_to_string(&path).unwrap();
        file.write_all(b"1").unwrap();
        file.write_all(b"2").unwrap();
        assert_eq!((read().as_str(), file.follow().unwrap()), ("12", false));
        fs::remove_dir_all(out.path().join("logs")).unwrap();
        file.write_all(b"3").unwrap();
        assert_eq!((read().as_str(), file.follow().unwrap()), ("3", false));
        write(&path, "an editor's, ").unwrap();
        assert!(file.follow().unwrap());
        file.write_all(b"4").unwrap();
        assert_eq!(read(), "an editor's, 4");
        fs::remove_dir_all(out.path()).unwrap();
        assert_eq!(file.write(b"5").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!out.path().exists());
    }
}

//! Files: read where they are files, written whole or not at all, and appended to for days.

use crate::error::{Error, Result};
use rustix::fs::OFlags;
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Whether something has this name, be it a link to nothing: what cannot be read is not what is not there.
pub(crate) fn is_named(path: &Path) -> bool {
    let is_nothing = |kind| matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory);
    !fs::symlink_metadata(path).is_err_and(|e| is_nothing(e.kind()))
}

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
    opened(path, OpenOptions::new().read(true))
}

/// Opens a file. What is no file is refused, also where it takes the file's place at this moment: then opening does not wait.
fn opened(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    match fs::metadata(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
        // Opened to be written, it would make a file somewhere else.
        Err(_) if is_named(path) => {
            return Err(io::Error::new(ErrorKind::InvalidInput, "is a link to nothing, not a file"));
        }
        found => found.ok().map_or(Ok(()), |found| check(found.file_type()))?,
    }
    let file = options.custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    check(file.metadata()?.file_type())?;
    Ok(file)
}

fn check(kind: FileType) -> io::Result<()> {
    let is = match kind {
        kind if kind.is_file() => return Ok(()),
        kind if kind.is_dir() => "is a folder",
        _ => "is a pipe, a socket or a device",
    };
    Err(io::Error::new(ErrorKind::InvalidInput, format!("{is}, not a file")))
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

/// Writes a file that the user has named, as [`write`] does; a pipe or a device of that name is written to as it is.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_out(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    match fs::metadata(path).is_ok_and(|data| !data.is_file()) {
        true => fs::write(path, bytes).map_err(Error::io(path)),
        false => write(path, bytes),
    }
}

/// Writes `path`, a file of the program's own, in a folder that is made if absent: beside it first, then renamed, so that a
/// process that is killed leaves the file as it was and a reader never sees half of it. What is no file is refused: a pipe
/// of that name would wait for a reader for ever.
///
/// # Errors
/// [`Error::File`] if it is no file, [`Error::Io`].
pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    if let Ok(found) = fs::metadata(path) {
        check(found.file_type()).map_err(|e| foreign(path, &e))?;
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".writing-{name}"));
    let written = opened(&unfinished, OpenOptions::new().write(true).create(true).truncate(true))
        .and_then(|mut file| file.write_all(bytes.as_ref()));
    written.map_err(|e| of_own(&unfinished, e))?;
    fs::rename(&unfinished, path).map_err(Error::io(path))
}

/// Refuses what is no folder where a run will have one of its own.
///
/// # Errors
/// [`Error::File`].
pub(crate) fn check_folder(path: &Path) -> Result<()> {
    match path.is_dir() || !is_named(path) {
        true => Ok(()),
        false => {
            let message = "is no folder, and the run writes into one of that name; move it away".to_owned();
            Err(Error::File { path: path.to_path_buf(), message })
        }
    }
}

/// What keeps a file of the program's own from being written.
fn of_own(path: &Path, e: io::Error) -> Error {
    if e.raw_os_error().is_none() { foreign(path, &e) } else { Error::io(path)(e) }
}

/// Something else has the name of a file of the program's own.
fn foreign(path: &Path, e: &io::Error) -> Error {
    Error::File { path: path.to_path_buf(), message: format!("{e}; move it away, the run writes a file of that name") }
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
    /// [`Error::File`] if it is no file, [`Error::Io`].
    pub fn open(within: &Path, path: PathBuf) -> Result<Self> {
        let file = appended(&path).map_err(|e| of_own(&path, e))?;
        Ok(Self { path, within: within.to_path_buf(), file })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that has the name now; warns where that is another one than the last time.
    ///
    /// # Errors
    /// As [`Appended::open`].
    pub fn file(&mut self) -> Result<&mut File> {
        if self.follow().map_err(|e| of_own(&self.path, e))? {
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
        self.file = appended(&self.path)?;
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

fn appended(path: &Path) -> io::Result<File> {
    opened(path, OpenOptions::new().append(true).create(true))
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

    /// A pipe without a reader or a writer would wait for ever; one that a user has named for an output is written to.
    #[test]
    fn what_is_no_file_is_refused_without_waiting_for_it() {
        let out = tempfile::tempdir().unwrap();
        let pipe = out.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        let folder = out.path().join("folder");
        fs::create_dir(&folder).unwrap();
        let refused = |done: Result<()>, path: &Path, is: &str| {
            let error = done.unwrap_err();
            let wanted = format!("{}: {is}, not a file; ", path.display());
            assert!(error.exit_code() == 2 && error.to_string().starts_with(&wanted), "{error}");
        };
        for (path, is) in [(&pipe, "is a pipe, a socket or a device"), (&folder, "is a folder")] {
            refused(write(path, "x"), path, is);
            refused(Appended::open(out.path(), path.clone()).map(drop), path, is);
            refused(open(path).map(drop), path, is);
            refused(read(path).map(drop), path, is);
        }
        let beside = out.path().join(".writing-a");
        fs::rename(&pipe, &beside).unwrap();
        refused(write(&out.path().join("a"), "x"), &beside, "is a pipe, a socket or a device");
        fs::rename(&beside, &pipe).unwrap();
        // A pipe that takes the file's place between the look and the opening.
        let raced = OpenOptions::new().append(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&pipe);
        assert_eq!(raced.unwrap_err().raw_os_error(), Some(rustix::io::Errno::NXIO.raw_os_error()));

        let mut file = Appended::open(out.path(), out.path().join("log")).unwrap();
        fs::rename(&pipe, out.path().join("log")).unwrap();
        refused(file.file().map(drop), &out.path().join("log"), "is a pipe, a socket or a device");
        assert!(file.write(b"x").is_err());
        write_out(Path::new("/dev/null"), "x").unwrap();
        write_out(&out.path().join("named"), "x").unwrap();
        assert_eq!(fs::read_to_string(out.path().join("named")).unwrap(), "x");
    }

    #[test]
    fn a_link_to_nothing_has_a_name() {
        let out = tempfile::tempdir().unwrap();
        let link = out.path().join("link");
        std::os::unix::fs::symlink(out.path().join("gone"), &link).unwrap();
        fs::write(out.path().join("file"), "x").unwrap();
        assert!(!is_named(&out.path().join("file/inside")));
        assert!(is_named(&link) && is_named(out.path()) && !is_named(&out.path().join("gone")));
        for done in [Appended::open(out.path(), link.clone()).map(drop), read(&link).map(drop)] {
            let error = done.unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("link: is a link to nothing"), "{error}");
        }
        assert!(!is_named(&out.path().join("gone")), "nothing is made where it leads");
    }

    #[test]
    fn what_has_the_name_of_a_folder_and_is_none_is_refused() {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join("samples");
        check_folder(&folder).unwrap();
        check_folder(out.path()).unwrap();
        let refused = || {
            let error = check_folder(&folder).unwrap_err();
            assert!(error.exit_code() == 2 && error.to_string().contains("samples: is no folder"), "{error}");
            fs::remove_file(&folder).unwrap();
        };
        fs::write(&folder, "x").unwrap();
        refused();
        std::os::unix::fs::symlink(out.path().join("gone"), &folder).unwrap();
        refused();
    }
}

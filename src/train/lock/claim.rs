//! An attempt to hold a run folder, step by step.

use super::{Holder, NAME, RunLock, STARTING, is_absent, name, unusable, write_sign};
use crate::error::{Error, Result};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time between two looks at the file of another.
const LOOK: Duration = Duration::from_millis(500);

/// An attempt to hold a folder.
pub(super) struct Claim {
    out: PathBuf,
    beat: Duration,
    patience: Duration,
    told: fn(&str),
    holder: Holder,
    next: Next,
    watched: Option<Watched>,
}

/// What is done next. Each is one operation on what others change as well, and anything may happen between two.
enum Next {
    Look,
    /// Take the free folder.
    Enter,
    /// Take the place of this file's holder, which has ended.
    Replace(String),
    /// Say who holds it now.
    Sign,
}

/// A holder that may have ended: what its file held at the first look, and since when it is watched.
struct Watched {
    file: String,
    held: Vec<u8>,
    since: Instant,
    /// Of the one whose place it took under our eyes.
    before: Option<String>,
}

/// What a step came to.
pub(super) enum Step {
    Held(RunLock),
    /// The next step may follow at once.
    Goes,
    /// Nothing changes for a while.
    Waits,
}

impl Claim {
    /// For the folder `out`, which is made if absent. What a person should know meanwhile is `told`.
    pub fn new(out: &Path, beat: Duration, patience: Duration, told: fn(&str)) -> Result<Self> {
        fs::create_dir_all(out).map_err(|e| unusable(out, &e))?;
        let (out, holder) = (out.to_path_buf(), Holder::this_process());
        Ok(Self { out, beat, patience, told, holder, next: Next::Look, watched: None })
    }

    /// The lock, if it can be had now; waits a little where it cannot.
    pub fn attempt(&mut self) -> Result<Option<RunLock>> {
        loop {
            match self.step()? {
                Step::Held(lock) => return Ok(Some(lock)),
                Step::Goes => {}
                Step::Waits => {
                    std::thread::sleep(LOOK.min(self.beat));
                    return Ok(None);
                }
            }
        }
    }

    /// Does what is next.
    pub(super) fn step(&mut self) -> Result<Step> {
        let failed = |e| unusable(&self.out, &e);
        match std::mem::replace(&mut self.next, Next::Look) {
            Next::Look => self.look(),
            Next::Enter => match self.enter().map_err(failed)? {
                true => self.held(),
                false => Ok(Step::Goes),
            },
            Next::Replace(file) => match fs::rename(self.running().join(file), self.own()) {
                Ok(()) => self.then(Next::Sign),
                Err(e) if is_absent(&e) => Ok(Step::Goes),
                Err(e) => Err(failed(e)),
            },
            Next::Sign => match write_sign(&self.own(), &self.holder) {
                Ok(()) => self.held(),
                Err(e) if is_absent(&e) => Ok(Step::Goes), // it took so long that another took this for an end
                Err(e) => Err(failed(e)),
            },
        }
    }

    /// Finds out whether the folder is free, held, or held by one that has ended.
    fn look(&mut self) -> Result<Step> {
        let failed = |e| unusable(&self.out, &e);
        match fs::symlink_metadata(self.running()) {
            Err(e) if is_absent(&e) => return self.then(Next::Enter),
            found if !found.as_ref().is_ok_and(fs::Metadata::is_dir) => {
                found.map_err(failed)?;
                return Err(self.foreign("is no folder"));
            }
            _ => {}
        }
        let files = match files(&self.running()) {
            Err(e) if is_absent(&e) => return Ok(Step::Goes),
            files => files.map_err(failed)?,
        };
        let [file] = &files[..] else {
            return if files.is_empty() {
                self.then(Next::Enter)
            } else {
                Err(self.foreign("holds more than one file"))
            };
        };
        if *file == self.holder.file_name() {
            return self.then(Next::Sign); // a network file system may do an operation and say that it failed
        }
        let path = self.running().join(file);
        let held = match fs::symlink_metadata(&path) {
            Ok(data) if !data.is_file() => return Err(self.foreign(&format!("holds {file}, which is no file"))),
            _ => fs::read(&path),
        };
        match held {
            Err(e) if is_absent(&e) => Ok(Step::Goes), // given up or taken meanwhile
            held => self.judge(file, held.map_err(failed)?),
        }
    }

    /// What is to be done about the holder with this file.
    fn judge(&mut self, file: &str, held: Vec<u8>) -> Result<Step> {
        let holder = Holder::parse(&held);
        // One that has just taken over has not written its word yet: in its file stands its predecessor's.
        let signed = holder.as_ref().filter(|holder| holder.file_name() == file);
        if signed.is_some_and(Holder::is_gone) {
            return self.then(Next::Replace(file.into()));
        }
        let (out, who) = (self.out.display(), name(signed));
        match &self.watched {
            Some(watched) if watched.file == file && watched.held == held => {
                let waited = watched.since.elapsed();
                if holder.is_none() {
                    return Err(self.foreign(&format!("holds {file}, which no run has written")));
                }
                if waited >= self.patience { self.then(Next::Replace(file.into())) } else { Ok(Step::Waits) }
            }
            Some(Watched { file: watched, before, .. }) if watched == file && signed.is_some() => {
                let how =
                    before.as_ref().map_or(String::new(), |before| format!(" since it took the place of {before}"));
                Err(Error::Usage(format!(
                    "run folder {out}: {who} is training in it{how}; end that run, wait for its end, or pass another --out"
                )))
            }
            earlier => {
                let seconds = self.patience.as_secs();
                (self.told)(&format!(
                    "{out} was last used by {who}: looking for up to {seconds} s whether it still is"
                ));
                let before = earlier.as_ref().filter(|earlier| earlier.file != file);
                let before = before.map(|earlier| name(Holder::parse(&earlier.held).as_ref()));
                self.watched = Some(Watched { file: file.into(), held, since: Instant::now(), before });
                Ok(Step::Waits)
            }
        }
    }

    /// Makes a folder with the own file the lock; false where somebody else's is there.
    fn enter(&self) -> io::Result<bool> {
        let own = self.holder.file_name();
        let starting = self.out.join(format!("{STARTING}{own}"));
        fs::create_dir(&starting)?;
        fs::write(starting.join(own), self.holder.encoded().map_err(io::Error::other)?)?;
        let entered = fs::rename(&starting, self.running());
        if entered.is_err() {
            let _ = fs::remove_dir_all(&starting);
        }
        match entered {
            // One who holds the folder clears away what others have prepared.
            Err(e) if was_taken(&e) || is_absent(&e) => Ok(false),
            entered => entered.map(|()| true),
        }
    }

    /// The lock, now that it is had; and what those who were killed while they prepared for it have left goes.
    fn held(&mut self) -> Result<Step> {
        for left in fs::read_dir(&self.out).into_iter().flatten().flatten() {
            if left.file_name().to_string_lossy().starts_with(STARTING) {
                let _ = fs::remove_dir_all(left.path());
            }
        }
        RunLock::new(self.own(), self.holder.clone(), self.beat).map(Step::Held)
    }

    fn then(&mut self, next: Next) -> Result<Step> {
        self.next = next;
        Ok(Step::Goes)
    }

    fn running(&self) -> PathBuf {
        self.out.join(NAME)
    }

    fn own(&self) -> PathBuf {
        self.running().join(self.holder.file_name())
    }

    fn foreign(&self, what: &str) -> Error {
        let path = self.running();
        let path = path.display();
        Error::Usage(format!("{path}: {what}, and not what a run leaves there; remove it, or pass another --out"))
    }
}

/// The names in the folder, without those that NFS gives to removed files that are still open.
fn files(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| !name.starts_with(".nfs"));
    Ok(names)
}

/// Whether a folder could not be renamed because another stands in its place.
fn was_taken(e: &io::Error) -> bool {
    use io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
    matches!(e.kind(), AlreadyExists | DirectoryNotEmpty | NotADirectory)
}

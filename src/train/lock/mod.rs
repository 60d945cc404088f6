//! One run at a time in a run folder: rank 0 holds it, and gives a sign of life in it every few seconds.
//!
//! `OUT/.running` is a folder with one file, named after its holder as no other is ([`Holder::file_name`]); where it is not
//! there, or empty, nobody holds. It changes by three operations, each of which a file system does whole or not at all and
//! for one process only, network file systems too, because it is a rename or a removal of a name that is there once:
//!
//! | from | to | operation |
//! |---|---|---|
//! | free | held by A | `rename(.starting-A, .running)`, a folder with A's file: refused where `.running` holds anything |
//! | held by D, which has ended | held by A | `rename(.running/D, .running/A)`: succeeds for one process, as D is there once |
//! | held by A | free | removal of `.running/A`, then of the empty folder |
//!
//! So whatever a process saw before, however old that is by now, it cannot take what somebody else has taken meanwhile.
//!
//! Clocks of hosts are not compared: whoever finds a holder watches its file. One that gives a sign of life holds the folder.
//! One whose process is seen to be gone, or that gives no sign for [`PATIENCE`], has ended, whatever ended it, and its place
//! is taken: at once where a killed run is started again on the same machine, after that time where its node died.

mod claim;
mod holder;
#[cfg(test)]
mod tests;

use crate::comm::{World, exchange};
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use crate::observe::logging::say;
use claim::Claim;
use holder::{Holder, name};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

const NAME: &str = ".running";
const STARTING: &str = ".starting-";

/// Time between signs of life.
const BEAT: Duration = Duration::from_secs(5);

/// A holder without a sign of life for so long has ended. Network file systems may show a change late.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of waiting for a run folder.
pub(super) enum Held {
    /// It is this run's; the lock is rank 0's.
    Here(Option<RunLock>),
    /// A signal asked a rank to leave.
    Interrupted,
}

/// Takes the run folder, which is made if absent; on rank 0, the others wait. Collective.
///
/// # Errors
/// [`Error::Usage`] where the folder cannot be made or written, and where another run holds it.
pub(super) fn hold(out: &Path, interrupt: &Interrupt, world: &World) -> Result<Held> {
    let mut claim = (world.rank() == 0).then(|| Claim::new(out, BEAT, PATIENCE, say)).transpose()?;
    loop {
        let lock = claim.as_mut().map_or(Ok(None), Claim::attempt)?;
        // In rounds: a collective that waited for all of it could outlast the deadline.
        let ranks = exchange(&*world.host, &(lock.is_some(), interrupt.requested().is_some()))?;
        if ranks[0].0 {
            return Ok(Held::Here(lock));
        }
        if ranks.iter().any(|&(_, leaves)| leaves) {
            return Ok(Held::Interrupted);
        }
    }
}

/// A run folder that this process holds, until it is dropped.
pub(super) struct RunLock {
    /// `OUT/.running/NAME`.
    file: PathBuf,
    /// Dropped, it ends the thread that gives the signs of life.
    running: Option<Sender<()>>,
    beating: Option<JoinHandle<()>>,
}

impl RunLock {
    /// Of a holder whose file is there.
    fn new(file: PathBuf, mut holder: Holder, beat: Duration) -> Result<Self> {
        let (running, ended) = channel();
        let path = file.clone();
        let work = move || {
            while ended.recv_timeout(beat) == Err(RecvTimeoutError::Timeout) {
                holder.sign();
                let _ = write_sign(&path, &holder); // one that cannot be written is no harm
            }
        };
        let beating = std::thread::Builder::new().name("sign of life".into()).spawn(work);
        let beating =
            beating.map_err(|e| Error::Failed(format!("the thread of the signs of life could not be started: {e}")))?;
        Ok(Self { file, running: Some(running), beating: Some(beating) })
    }

    /// Whether this process still holds the folder: one that was stopped for long has lost it, and so has one whose folder
    /// was removed or moved.
    ///
    /// # Errors
    /// [`Error::Failed`] that names the new holder, or says that the folder is not there.
    pub fn check(&self) -> Result<()> {
        match File::open(&self.file) {
            Err(e) if is_absent(&e) => Err(Error::Failed(self.loss())),
            _ => Ok(()), // a file system may be away for a while
        }
    }

    /// What became of a folder that this process no longer holds.
    fn loss(&self) -> String {
        let folder = self.file.parent().unwrap_or(&self.file);
        let out = folder.parent().unwrap_or(folder).display();
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        match files.map(|file| file.path()).next() {
            Some(file) => {
                let holder = fs::read(file).ok().as_deref().and_then(Holder::parse);
                let who = name(holder.as_ref());
                format!(
                    "run folder {out}: {who} took it over while this process gave no sign of life; this run ends and saves \
                     nothing more"
                )
            }
            None => format!(
                "run folder {out}: was removed or moved while this run wrote into it; this run ends and saves nothing more. \
                 Where it was moved, move it back, and the same command continues from its newest checkpoint"
            ),
        }
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(beating) = self.beating.take() {
            let _ = beating.join();
        }
        // What is left of it is taken over by the next run; a folder in which another's file stands stays.
        if fs::remove_file(&self.file).is_ok() {
            let _ = self.file.parent().map(fs::remove_dir);
        }
    }
}

/// Writes a holder's word into its file, if that is still there: another's place is not made again.
fn write_sign(file: &Path, holder: &Holder) -> io::Result<()> {
    let bytes = holder.encoded().map_err(io::Error::other)?;
    let file = OpenOptions::new().write(true).open(file)?;
    file.write_all_at(&bytes, 0) // and closed, which is when network file systems send it
}

/// Whether a path leads nowhere, for certain.
fn is_absent(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::StaleNetworkFileHandle)
}

fn unusable(out: &Path, e: &io::Error) -> Error {
    Error::Usage(format!(
        "run folder {}: cannot be made or written ({e}); name one that can with --out or run.out",
        out.display()
    ))
}

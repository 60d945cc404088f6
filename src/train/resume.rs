//! Where a run begins: at the start, or where a checkpoint stands.

use super::lock::{self, Held, RunLock};
use crate::checkpoint::{self, Resume};
use crate::comm::{World, exchange};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::interrupt::Interrupt;
use std::path::{Path, PathBuf};

/// Where a run begins, with its folder held.
pub(super) struct Begin {
    /// On rank 0.
    pub lock: Option<RunLock>,
    pub checkpoint: Option<PathBuf>,
}

/// Holds the run folder and finds the checkpoint to continue from: rank 0 does, and tells all; none where a signal came
/// first. Collective.
///
/// # Errors
/// [`Error::Usage`] where another run holds the folder or the history in it would be mixed with another;
/// [`Error::Checkpoint`] where there is no such checkpoint, or one of a program with other random numbers. An error of
/// rank 0 is rank 0's alone.
pub(super) fn begin(
    config: &RunConfig,
    resume: &Resume,
    interrupt: &Interrupt,
    world: &World,
) -> Result<Option<Begin>> {
    let root = checkpoint::root(&config.run.out);
    if world.rank() == 0 {
        choose(&root, resume)?; // before anything is written
    }
    let Held::Here(lock) = lock::hold(&config.run.out, interrupt, world)? else { return Ok(None) };
    let mut chosen = None;
    if world.rank() == 0 {
        if root.exists() {
            checkpoint::clear_unfinished(&root)?; // which may bring a checkpoint's name back
        }
        chosen = choose(&root, resume)?;
    }
    Ok(Some(Begin { lock, checkpoint: exchange(&*world.host, &chosen)?.swap_remove(0) }))
}

/// The checkpoint to continue from.
fn choose(root: &Path, resume: &Resume) -> Result<Option<PathBuf>> {
    let found = checkpoint::find(resume, root)?;
    let newest = checkpoint::newest(root)?;
    let update = |path: &Path| checkpoint::open(path).map(|r| r.state().update);
    if let Some(path) = &found {
        checkpoint::open(path)?.check_streams()?;
    }
    match (&found, newest) {
        // Later saves would stand beside checkpoints of another history, and `auto` would take the wrong one.
        (None, Some(newest)) => Err(Error::Usage(format!(
            "--resume never: {} holds a run already, at update {}; pass another --out or delete it",
            root.display(),
            newest.update
        ))),
        (Some(path), Some(newest)) if newest.path != *path && newest.update > update(path)? => {
            Err(Error::Usage(format!(
                "--resume {}: {} holds a later checkpoint, of update {}; pass another --out or delete the later ones",
                path.display(),
                root.display(),
                newest.update
            )))
        }
        _ => Ok(found),
    }
}

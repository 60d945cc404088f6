//! Where a run begins: at the start, or where a checkpoint stands.

use super::lock::{self, RunLock};
use crate::checkpoint::{self, Resume};
use crate::comm::{World, exchange};
use crate::config::{RUN_CONFIG, RunConfig};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Holds the run folder and finds the checkpoint to continue from: rank 0 does, and tells all. Collective.
///
/// # Errors
/// [`Error::Usage`] where another run holds the folder or the history in it would be mixed with another;
/// [`Error::Checkpoint`] where there is no such checkpoint. An error of rank 0 is rank 0's alone.
pub(super) fn begin(config: &RunConfig, resume: &Resume, world: &World) -> Result<(Option<RunLock>, Option<PathBuf>)> {
    let root = checkpoint::root(&config.run.out);
    if world.rank() == 0 {
        choose(&root, resume)?; // before anything is written
    }
    let lock = lock::hold(&config.run.out, world)?;
    let mut chosen = None;
    if world.rank() == 0 {
        if root.exists() {
            checkpoint::clear_unfinished(&root)?; // which may bring a checkpoint's name back
        }
        chosen = choose(&root, resume)?;
    }
    Ok((lock, exchange(&*world.host, &chosen)?.swap_remove(0)))
}

/// The checkpoint to continue from.
fn choose(root: &Path, resume: &Resume) -> Result<Option<PathBuf>> {
    let found = checkpoint::find(resume, root)?;
    let newest = checkpoint::newest(root)?;
    let update = |path: &Path| checkpoint::open(path).map(|r| r.state().update);
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

/// What has changed since the run that wrote a checkpoint, by the config.toml of its run folder; nothing where that cannot be
/// read.
pub(super) fn changes(config: &RunConfig, checkpoint: &Path) -> Vec<String> {
    let written = checkpoint.ancestors().nth(2).map(|out| out.join(RUN_CONFIG));
    let text = written.and_then(|path| std::fs::read_to_string(path).ok());
    let earlier: Option<RunConfig> = text.and_then(|text| toml::from_str(&text).ok());
    earlier.and_then(|earlier| config.changes_since(&earlier).ok()).unwrap_or_default()
}

//! The folder of checkpoints: names, which one to resume from, which ones to delete.
//!
//! A name that begins with a dot is work in progress or its leftover:
//! `.writing-update_N-G` is being saved, `.replaced-update_N-G` makes room for a new save of the same update,
//! `.deleting-*` is on its way out.

use super::error;
use super::manifest::{COMPLETE, MANIFEST};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

const WRITING: &str = ".writing-";
const REPLACED: &str = ".replaced-";
const DELETING: &str = ".deleting-";
const BEST: &str = "BEST";

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Optimizer steps taken.
    pub update: u64,
    /// Its folder.
    pub path: PathBuf,
}

/// What to resume from: the value of `--resume`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// The newest complete checkpoint of this run, if there is one.
    Auto,
    /// Nothing: start anew.
    Never,
    /// A checkpoint, or the newest one of a run folder.
    From(PathBuf),
}

impl FromStr for Resume {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "" => Err(Error::Usage("--resume needs auto, never or the folder of a checkpoint".into())),
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            path => Ok(Self::From(path.into())),
        }
    }
}

/// The complete checkpoints in `root` (`OUT/checkpoints`), oldest first; none if there is no such folder.
pub fn list(root: &Path) -> Result<Vec<Found>> {
    let names = names(root)?;
    let mut all: Vec<Found> = names
        .iter()
        .filter_map(|name| Some(Found { update: update_of(name)?, path: root.join(name) }))
        .filter(|found| is_complete(&found.path))
        .collect();
    // A save of an update that was there already was killed before its rename: then the one set aside still counts.
    for name in names.iter().filter(|name| name.starts_with(REPLACED)) {
        let (path, original) = (root.join(name), original(name));
        if let Some(update) = update_of(original)
            && is_complete(&path)
            && !is_complete(&root.join(original))
        {
            all.push(Found { update, path });
        }
    }
    all.sort_by(|a, b| (a.update, &a.path).cmp(&(b.update, &b.path)));
    all.dedup_by_key(|found| found.update);
    Ok(all)
}

/// The complete checkpoint with the largest update number in `root`.
pub fn newest(root: &Path) -> Result<Option<Found>> {
    Ok(list(root)?.pop())
}

/// The folder to resume from, or none to start anew; `root` is this run's `OUT/checkpoints`.
///
/// # Errors
/// [`Resume::From`] names something that is not a complete checkpoint and has none in it.
pub fn find(resume: &Resume, root: &Path) -> Result<Option<PathBuf>> {
    match resume {
        Resume::Never => Ok(None),
        Resume::Auto => {
            let found = newest(root)?;
            if found.is_none() && root.is_dir() {
                tracing::warn!("{}: no complete checkpoint in this folder, the run starts anew", root.display());
            }
            Ok(found.map(|found| found.path))
        }
        Resume::From(path) => named(path).map(Some),
    }
}

/// The checkpoint that the user named, directly or by its run.
fn named(path: &Path) -> Result<PathBuf> {
    const WANTED: &str = "give a checkpoint (OUT/checkpoints/update_00000100) or a run folder (OUT)";
    if !path.exists() {
        return Err(error(path, format!("there is nothing at this path; {WANTED}")));
    }
    if path.ends_with(BEST) && path.is_file() {
        let best = crate::fs::read_to_string(path)?;
        let Some(update) = update_of(best.trim()) else {
            return Err(error(path, format!("names {:?}, which is no checkpoint; {WANTED}", best.trim())));
        };
        return named(&path.with_file_name(folder_name(update)));
    }
    if is_complete(path) {
        return Ok(path.to_path_buf());
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if path.join(MANIFEST).exists() || update_of(&name).is_some() || name.starts_with(WRITING) {
        let beside = newest(path.parent().unwrap_or(path))?;
        let remedy = beside.map_or("there is no complete one beside it".into(), |found| {
            format!("the newest complete one beside it is {}", found.path.display())
        });
        return Err(error(path, format!("has no file {COMPLETE}, so its saving was cut short; {remedy}")));
    }
    let inside = path.join("checkpoints");
    for root in [inside.as_path(), path] {
        if root.is_dir()
            && let Some(found) = newest(root)?
        {
            return Ok(found.path);
        }
    }
    if inside.is_dir() || path.ends_with("checkpoints") {
        return Err(error(path, "there is no complete checkpoint in this run; start it anew with --resume never"));
    }
    Err(error(path, format!("is neither a checkpoint nor a run folder; {WANTED}")))
}

/// Deletes the oldest complete checkpoints of `root` until `keep_last` are left and the `best`, and returns what it
/// deleted.
///
/// The newest is never deleted, so 0 keeps one too. Called by one rank. A killed call leaves no checkpoint that looks
/// whole and is not.
pub fn prune(root: &Path, keep_last: usize, best: Option<u64>) -> Result<Vec<PathBuf>> {
    let all = list(root)?;
    let surplus = all.len().saturating_sub(keep_last.max(1));
    let mut deleted = Vec::with_capacity(surplus);
    for found in all.into_iter().take(surplus).filter(|found| Some(found.update) != best) {
        discard(&found.path)?;
        deleted.push(found.path);
    }
    Ok(deleted)
}

/// Writes the name of the best checkpoint into `root`, for people and scripts; the run itself does not read it.
pub fn set_best(root: &Path, update: u64) -> Result<()> {
    crate::fs::write(&root.join(BEST), format!("{}\n", folder_name(update)))
}

/// Removes from `root` what killed saves and deletions left behind. Called by rank 0, while no save is under way.
pub fn clear_unfinished(root: &Path) -> Result<()> {
    for name in names(root)? {
        let path = root.join(&name);
        if name.starts_with(DELETING) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        } else if name.starts_with(WRITING) && path.is_file() {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        } else if name.starts_with(WRITING) {
            // Moved first: a rank of an earlier life that still writes would make new files in it meanwhile.
            discard(&path)?;
        } else if name.starts_with(REPLACED) {
            let original = root.join(original(&name));
            if is_complete(&original) {
                discard(&path)?;
            } else if !original.exists() {
                fs::rename(&path, &original).map_err(Error::io(&path))?;
            }
        }
    }
    Ok(())
}

/// Moves a complete checkpoint out of sight, then deletes it: half-deleted it must not look whole.
pub(super) fn discard(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let doomed = path.with_file_name(format!("{DELETING}{name}"));
    if doomed.exists() {
        fs::remove_dir_all(&doomed).map_err(Error::io(&doomed))?;
    }
    fs::rename(path, &doomed).map_err(Error::io(path))?;
    // Not a crash of the machine either may bring the old name back over half of the files.
    if let Some(root) = path.parent() {
        sync_folder(root)?;
    }
    fs::remove_dir_all(&doomed).map_err(Error::io(&doomed))
}

pub(super) fn is_complete(path: &Path) -> bool {
    path.join(COMPLETE).is_file()
}

pub(super) fn folder_name(update: u64) -> String {
    format!("update_{update:08}")
}

pub(super) fn writing_name(update: u64, generation: u64) -> String {
    format!("{WRITING}{}-{generation}", folder_name(update))
}

pub(super) fn replaced_name(update: u64, generation: u64) -> String {
    format!("{REPLACED}{}-{generation}", folder_name(update))
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(Error::io(path))
}

/// `update_00000100` of `.replaced-update_00000100-7`.
fn original(name: &str) -> &str {
    let name = name.strip_prefix(REPLACED).unwrap_or(name);
    name.split_once('-').map_or(name, |(original, _)| original)
}

/// The number in `update_00000100`; none for every other name.
fn update_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("update_")?;
    digits.parse().ok().filter(|&update| folder_name(update) == name)
}

/// The names in `root`, none if there is no such folder.
fn names(root: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io(root))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        // A name that is not text is not ours.
        names.extend(entry.map_err(Error::io(root))?.file_name().into_string());
    }
    Ok(names)
}

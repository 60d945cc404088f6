//! The paths in a configuration: which keys hold them, and what they are relative to.
//!
//! What a file names to be read (models, prompts, adapters) is found from that file's folder, so a file means the same
//! wherever the program is started. What is written (run folder, prompt cache), and all that `--set` names, is relative to
//! the working folder. Once a configuration is loaded, every path in it is relative to the working folder.

use crate::data::PromptSet;
use crate::error::Error;
use crate::reward::{RewardKind, RewardSettings};
use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use toml::{Table, Value};

/// Keys of what is read, in a run's configuration and in that of pretraining, beside those of the rewards; a list stands for
/// each of its sections.
const READ: [&str; 8] =
    ["model.path", "model.transformer", "model.lora.path", "data.train", "data.eval", "stage.train", "data", "init"];

/// Keys of what is written.
const WRITTEN: [&str; 2] = ["run.out", "model.prompt_cache"];

/// All keys of what is read, each once.
fn read() -> BTreeSet<String> {
    let of_rewards = RewardKind::ALL.iter().flat_map(|&kind| RewardSettings::of(kind).files());
    READ.iter().map(|key| key.to_string()).chain(of_rewards.map(|key| format!("reward.{key}"))).collect()
}

/// Makes what is read, which the file in `folder` names, relative to the working folder.
pub(super) fn of_file_in(folder: &Path, table: &mut Table) {
    each(read(), table, &|path| join(folder, path));
}

/// Makes the paths those of a file in `folder`, found from any working folder: absolute, but relative to `folder` where what
/// is read lies in it, so that the folder can be moved as a whole.
pub(super) fn for_file_in(folder: &Path, table: &mut Table) -> Result<(), Error> {
    let here = std::env::current_dir().map_err(Error::io("."))?;
    let folder = join(&here, folder);
    each(WRITTEN, table, &|path| join(&here, path));
    each(read(), table, &|path| {
        let path = join(&here, path);
        path.strip_prefix(&folder).map(Path::to_path_buf).unwrap_or(path)
    });
    Ok(())
}

/// Leaves of what is read its name alone: where it lies changes nothing.
pub(super) fn names_only(table: &mut Table) {
    each(read(), table, &|path| file_name(path).into());
}

/// The last part of a path, which stays where a file is moved.
pub(crate) fn file_name(path: &Path) -> &std::ffi::OsStr {
    path.file_name().unwrap_or(path.as_os_str())
}

/// `path` from `folder`, without the `..` that can be taken back.
pub(super) fn join(folder: &Path, path: &Path) -> PathBuf {
    let mut joined = folder.to_path_buf();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir if matches!(joined.components().next_back(), Some(Component::Normal(_))) => {
                joined.pop();
            }
            part => joined.push(part),
        }
    }
    if joined.as_os_str().is_empty() { ".".into() } else { joined }
}

/// Replaces every path that one of the `keys` holds.
fn each<K: AsRef<str>>(keys: impl IntoIterator<Item = K>, table: &mut Table, change: &impl Fn(&Path) -> PathBuf) {
    for key in keys {
        at(key.as_ref(), table, change);
    }
}

fn at(key: &str, table: &mut Table, change: &impl Fn(&Path) -> PathBuf) {
    let (section, rest) = key.split_once('.').unwrap_or((key, ""));
    match table.get_mut(section) {
        Some(Value::String(path)) if rest.is_empty() && !path.is_empty() && !PromptSet::is_embedded(path) => {
            *path = change(Path::new(path.as_str())).to_string_lossy().into_owned();
        }
        Some(Value::Table(section)) => at(rest, section, change),
        Some(Value::Array(sections)) => {
            sections.iter_mut().filter_map(Value::as_table_mut).for_each(|section| at(rest, section, change));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_joined_without_the_parents_that_can_be_taken_back() {
        for (folder, path, joined) in [
            ("configs/sd35/methods", "../prompts/signs.txt", "configs/sd35/prompts/signs.txt"),
            ("configs", "../models/./a", "models/a"),
            ("", "a.txt", "a.txt"),
            ("", "../a.txt", "../a.txt"),
            ("..", "../a.txt", "../../a.txt"),
            ("a", "..", "."),
            ("/a", "../../b", "/../b"),
            ("configs", "/data/b", "/data/b"),
        ] {
            assert_eq!(join(Path::new(folder), Path::new(path)), Path::new(joined), "{folder} {path}");
        }
    }
}

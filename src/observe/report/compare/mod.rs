//! Several runs side by side: a table and a picture. Runs of the same name are the seeds of one method.

mod method;
mod picture;
mod table;

use super::run::Run;
use crate::error::{Error, Result};
use crate::fs;
use method::Method;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What [`compare`] wrote.
#[derive(Debug)]
pub struct Comparison {
    /// The table in Markdown, with the notes below it.
    pub table: String,
    /// `comparison.md` and `comparison.svg`.
    pub files: [PathBuf; 2],
}

/// Writes `comparison.md` and `comparison.svg` about these run folders into `out`, else into their common parent.
///
/// With a `baseline`, the name of one of the methods, the others are timed to its best reward. Fails, and writes
/// nothing, if the runs have no main reward in common, if one was never evaluated, and if no run is named `baseline`.
pub fn compare(folders: &[PathBuf], out: Option<&Path>, baseline: Option<&str>) -> Result<Comparison> {
    let folders: Vec<PathBuf> =
        folders.iter().map(|path| path.canonicalize().map_err(Error::io(path))).collect::<Result<_>>()?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = folders.iter().find(|folder| !seen.insert(*folder)) {
        return Err(Error::Usage(format!("{}: is given twice; give every run folder once", twice.display())));
    }
    let runs: Vec<Run> = folders.iter().map(|folder| Run::read(folder)).collect();
    let reward = common_reward(&folders, &runs)?;
    let methods = methods(&runs, &reward)?;
    let baseline = baseline.map(|name| find(&methods, name)).transpose()?;
    let out = match out {
        Some(out) => out.to_path_buf(),
        None => common_parent(&folders)?,
    };

    let colour_is_rewarded = runs.iter().any(|run| run.rewards().contains(&"colour"));
    let table = table::render(&methods, &reward, baseline, colour_is_rewarded);
    let document = format!("# Comparison\n\n![Held-out reward {reward} of every method](comparison.svg)\n\n{table}");
    let files = ["comparison.md", "comparison.svg"].map(|name| out.join(name));
    fs::write_out(&files[0], document)?;
    fs::write_out(&files[1], picture::render(&methods, &reward))?;
    Ok(Comparison { table, files })
}

/// The main reward: the one that the first `[[reward]]` of every run names. Refuses a run without an evaluation of it.
fn common_reward(folders: &[PathBuf], runs: &[Run]) -> Result<String> {
    let mut common: Option<(&Path, &str)> = None;
    for (folder, run) in folders.iter().zip(runs) {
        let shown = folder.display();
        let Some(reward) = run.rewards().first().copied() else {
            let message = format!("{shown}: no [[reward]] in its config.toml; give the --out of a run");
            return Err(Error::Usage(message));
        };
        if let Some((first, other)) = common.filter(|(_, other)| *other != reward) {
            return Err(Error::Usage(format!(
                "{shown}: its first reward is {reward:?}, that of {} is {other:?}; compare runs with the same first reward",
                first.display()
            )));
        }
        if method::held_out(run, reward).is_empty() {
            return Err(Error::Usage(format!(
                "{shown}: has no evaluation of {reward:?} (eval.reward.{reward}.mean) in metrics.jsonl; leave this run \
                 out, or let it reach its first evaluation"
            )));
        }
        common.get_or_insert((folder, reward));
    }
    let (_, reward) = common.ok_or_else(|| Error::Usage("no run folder to compare; give two or more".into()))?;
    Ok(reward.to_owned())
}

/// The runs by their names, in the order in which these first appear.
fn methods(runs: &[Run], reward: &str) -> Result<Vec<Method>> {
    let mut groups: Vec<(&str, Vec<&Run>)> = Vec::new();
    for run in runs {
        match groups.iter_mut().find(|(name, _)| *name == run.name) {
            Some((_, seeds)) => seeds.push(run),
            None => groups.push((&run.name, vec![run])),
        }
    }
    if groups.len() > picture::MOST_METHODS {
        let (count, most) = (groups.len(), picture::MOST_METHODS);
        return Err(Error::Usage(format!("{count} methods: one picture shows at most {most}; give fewer at a time")));
    }
    groups.iter().map(|(name, seeds)| Method::new(name, seeds, reward)).collect()
}

fn find<'a>(methods: &'a [Method], name: &str) -> Result<&'a Method> {
    methods.iter().find(|method| method.name == name).ok_or_else(|| {
        let names: Vec<_> = methods.iter().map(|method| format!("{:?}", method.name)).collect();
        Error::Usage(format!("--baseline {name:?}: no run has this name; give one of {}", names.join(", ")))
    })
}

/// The deepest folder that all the others are in.
fn common_parent(folders: &[PathBuf]) -> Result<PathBuf> {
    let first = folders.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let parent = first.ancestors().skip(1).find(|parent| folders.iter().all(|f| f != parent && f.starts_with(parent)));
    // Nobody wants files in the root of the file system.
    parent.filter(|parent| parent.parent().is_some()).map(Path::to_path_buf).ok_or_else(|| {
        Error::Usage("the run folders have no parent in common but the root; say with --out DIR where to write".into())
    })
}

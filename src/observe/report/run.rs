//! What a run folder holds, as far as it can be read.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Numbers by update; an update that was written twice counts once, as written last.
type Records = BTreeMap<u64, Map<String, Value>>;

/// Update and value; NaN where a value was not finite.
pub type Points = Vec<(f64, f64)>;

/// One run, read from its folder.
pub struct Run {
    /// The run's name, else the folder's.
    pub name: String,
    /// The resolved configuration.
    pub config: toml::Table,
    /// Training updates.
    pub updates: Records,
    /// Evaluations.
    pub evaluations: Records,
    /// Sample grids with an update in their names, in its order.
    pub grids: Vec<(u64, PathBuf)>,
    /// Other pictures among the samples, by name.
    pub pictures: Vec<PathBuf>,
}

impl Run {
    /// Reads what is there.
    pub fn read(folder: &Path) -> Self {
        let config: toml::Table = own(folder, "config.toml").and_then(|text| text.parse().ok()).unwrap_or_default();
        let folder_name = folder.canonicalize().ok().and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let name = lookup(&config, "run", "name").or(folder_name).unwrap_or_else(|| "run".into());

        let (mut updates, mut evaluations) = (Records::new(), Records::new());
        let text = own(folder, "metrics.jsonl").unwrap_or_default();
        for line in text.lines() {
            let Ok(Value::Object(object)) = serde_json::from_str(line) else { continue };
            let Some(update) = object.get("update").and_then(Value::as_u64) else { continue };
            let is_evaluation = object.keys().any(|name| name.starts_with("eval."));
            if is_evaluation { &mut evaluations } else { &mut updates }.insert(update, object);
        }

        let mut run = Self { name, config, updates, evaluations, grids: vec![], pictures: vec![] };
        for path in pngs(&folder.join("samples")) {
            match update_in(&path) {
                Some(update) => run.grids.push((update, path)),
                None => run.pictures.push(path),
            }
        }
        run.grids.sort();
        run
    }

    /// Images sampled and seconds trained until after `update`, without the evaluations.
    pub fn spent(&self, update: u64) -> (f64, f64) {
        // What belongs to an iteration stands in each of its updates: it counts once.
        let mut counted = BTreeSet::new();
        let (mut images, mut seconds) = (0.0, 0.0);
        for record in self.updates.range(..=update).map(|(_, record)| record) {
            let number = |name| record.get(name).and_then(Value::as_f64).unwrap_or(0.0);
            if record.get("iteration").and_then(Value::as_u64).is_none_or(|iteration| counted.insert(iteration)) {
                images += number("images");
                seconds += number("time.total");
            }
        }
        (images, seconds)
    }

    /// For each stage after the first the update with which it begins, and its number.
    pub fn stages(&self) -> Points {
        let of_updates = points(&self.updates, "stage");
        of_updates.windows(2).filter(|pair| pair[0].1 != pair[1].1).map(|pair| pair[1]).collect()
    }

    /// The names of the rewards it is trained on; the first is the main one.
    pub fn rewards(&self) -> Vec<&str> {
        let sections = self.config.get("reward").and_then(toml::Value::as_array).into_iter().flatten();
        sections.filter_map(label).collect()
    }

    /// A value of the configuration as text.
    pub fn setting(&self, table: &str, key: &str) -> Option<String> {
        lookup(&self.config, table, key)
    }
}

/// The names in `records`, in order of first appearance.
pub fn names(records: &Records) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for record in records.values() {
        // The usual record brings nothing new and has the same order.
        for name in record.keys().map(String::as_str).filter(|name| !matches!(*name, "update" | "iteration")) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// The values of one name over the updates.
pub fn points(records: &Records, name: &str) -> Points {
    let value = |value: &Value| if value.is_null() { Some(f64::NAN) } else { value.as_f64() };
    records.iter().filter_map(|(update, record)| Some((*update as f64, value(record.get(name)?)?))).collect()
}

/// The sum of the finite values of one name.
pub fn sum(records: &Records, name: &str) -> f64 {
    points(records, name).iter().map(|(_, value)| value).filter(|value| value.is_finite()).sum()
}

/// The name of a reward in the metrics: of a remote one the server's.
fn label(section: &toml::Value) -> Option<&str> {
    match section.get("name")?.as_str()? {
        "remote" => section.get("reward")?.as_str(),
        name => Some(name),
    }
}

fn lookup(config: &toml::Table, table: &str, key: &str) -> Option<String> {
    match config.get(table)?.get(key)? {
        toml::Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

/// The text of a file of the run; nothing where it is no file of its own, or none at all. A link would take the page's
/// reader out of the run, and a pipe or a device in its place may have no end.
fn own(folder: &Path, name: &str) -> Option<String> {
    let path = folder.join(name);
    let bytes = is_own_file(&path).then(|| fs::read(path).ok())??;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether a file lies here itself, not a link to one.
fn is_own_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|data| data.is_file())
}

/// The PNG files of a folder of the run, by name.
fn pngs(folder: &Path) -> Vec<PathBuf> {
    if !fs::symlink_metadata(folder).is_ok_and(|data| data.is_dir()) {
        return Vec::new();
    }
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_png = |path: &PathBuf| path.extension().is_some_and(|ext| ext == "png") && is_own_file(path);
    let mut paths: Vec<_> = entries.filter(is_png).collect();
    paths.sort();
    paths
}

/// The update of a sample grid, the number at the end of its name (`update_00000060.png`); none for a comparison
/// (`before_...`).
fn update_in(path: &Path) -> Option<u64> {
    let stem = path.file_stem()?.to_str()?;
    let digits = stem.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    if stem.starts_with("before") { None } else { digits.parse().ok() }
}

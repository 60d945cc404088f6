//! What differs between two configurations, key by key.

use super::{RUN_CONFIG, RunConfig};
use crate::error::Error;
use serde::Serialize;
use std::path::Path;
use toml::Value;

impl RunConfig {
    /// The configuration of the run that wrote a checkpoint, by the config.toml of its run folder; nothing where that cannot
    /// be read.
    pub fn of_run(checkpoint: &Path) -> Option<Self> {
        let out = checkpoint.ancestors().nth(2)?;
        toml::from_str(&std::fs::read_to_string(out.join(RUN_CONFIG)).ok()?).ok()
    }

    /// What decides what an update does and is not as in `earlier`: `optim.lr 0.0002 -> 0.001`, one a key.
    ///
    /// # Errors
    /// A configuration cannot be written as TOML.
    pub fn changes_since(&self, earlier: &Self) -> Result<Vec<String>, Error> {
        differences("", &earlier.deciding()?, &self.deciding()?)
    }

    /// What decides how a model is evaluated and is not as in `earlier`: evaluations before and after do not compare.
    ///
    /// # Errors
    /// As [`RunConfig::changes_since`].
    pub fn evaluation_changes_since(&self, earlier: &Self) -> Result<Vec<String>, Error> {
        differences("eval", &earlier.eval, &self.eval)
    }
}

fn differences<T: Serialize>(key: &str, earlier: &T, now: &T) -> Result<Vec<String>, Error> {
    let table = |values: &T| {
        Value::try_from(values).map_err(|e| Error::Failed(format!("the configuration cannot be written: {e}")))
    };
    let mut changes = Vec::new();
    compare(key.to_owned(), Some(&table(earlier)?), Some(&table(now)?), &mut changes);
    Ok(changes)
}

fn compare(key: String, old: Option<&Value>, new: Option<&Value>, changes: &mut Vec<String>) {
    match (old, new) {
        (Some(Value::Table(old)), Some(Value::Table(new))) => {
            let added = new.keys().filter(|name| !old.contains_key(*name));
            for name in old.keys().chain(added) {
                let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
                compare(path, old.get(name), new.get(name), changes);
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) if old.len() == new.len() => {
            let pairs = old.iter().zip(new).enumerate();
            pairs.for_each(|(i, (old, new))| compare(format!("{key}[{i}]"), Some(old), Some(new), changes));
        }
        (old, new) if old == new => {}
        (old, new) => {
            let text = |value: Option<&Value>| value.map_or("(not set)".into(), |value| value.to_string());
            changes.push(format!("{key} {} -> {}", text(old), text(new)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(before: &[&str], now: &[&str]) -> Vec<String> {
        let config = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(|setting| setting.to_string()).collect();
            RunConfig::load(None, &set).unwrap()
        };
        config(now).changes_since(&config(before)).unwrap()
    }

    #[test]
    fn what_changed_is_named_by_its_key() {
        assert_eq!(changes(&["optim.lr=2e-4"], &["optim.lr=1e-3"]), ["optim.lr 0.0002 -> 0.001"]);
        assert_eq!(changes(&[], &["old_policy.rate=0.25"]), ["old_policy.rate (not set) -> 0.25"]);
        let reward = |weight: f64| format!("reward=[{{name=\"ocr\"}}, {{name=\"colour\", weight={weight}}}]");
        assert_eq!(changes(&[&reward(0.5)], &[&reward(0.0)]), ["reward[1].weight 0.5 -> 0.0"]);
        assert_eq!(changes(&["run.seed=1", "batch.prompts=4"], &["run.seed=2", "batch.prompts=5"]).len(), 2);
    }

    #[test]
    fn what_decides_nothing_may_change() {
        let now = ["run.updates=7", "run.keep_last=9", "eval.prompts=3", "parallel.shard=none", "log.level=info"];
        assert!(changes(&[], &now).is_empty());
    }

    #[test]
    fn what_changes_evaluations_is_named_too() {
        let config = |set: &str| RunConfig::load(None, &[set.to_owned()]).unwrap();
        let changes = config("eval.seed=7").evaluation_changes_since(&config("optim.lr=1e-3")).unwrap();
        assert_eq!(changes, ["eval.seed 42 -> 7"]);
    }
}

//! What differs between two configurations, key by key.

use super::RunConfig;
use super::written::as_toml;
use crate::error::Error;
use std::path::Path;
use toml::{Table, Value};

impl RunConfig {
    /// The configuration of the run that wrote a checkpoint, by the config.toml of its run folder; nothing where that cannot
    /// be read.
    pub fn of_run(checkpoint: &Path) -> Option<Self> {
        Self::of_run_folder(checkpoint.ancestors().nth(2)?)
    }

    /// What decides what an update does and is not as in `earlier`: `optim.lr 0.0002 -> 0.001`, one a key.
    ///
    /// # Errors
    /// A configuration cannot be written as TOML.
    pub fn changes_since(&self, earlier: &Self) -> Result<Vec<String>, Error> {
        Ok(differences("", &earlier.deciding()?, &self.deciding()?))
    }

    /// What decides how a model is evaluated and is not as in `earlier`: evaluations before and after do not compare.
    ///
    /// # Errors
    /// As [`RunConfig::changes_since`].
    pub fn evaluation_changes_since(&self, earlier: &Self) -> Result<Vec<String>, Error> {
        let table = |config: &Self| as_toml(Table::try_from(&config.eval));
        Ok(differences("eval", &table(earlier)?, &table(self)?))
    }
}

fn differences(key: &str, earlier: &Table, now: &Table) -> Vec<String> {
    let (earlier, now) = (Value::Table(earlier.clone()), Value::Table(now.clone()));
    let mut changes = Vec::new();
    compare(key.to_owned(), Some(&earlier), Some(&now), &mut changes);
    changes
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
        assert_eq!(changes(&[], &["old_policy.rate=0.25"]), ["old_policy.rate 0.001 -> 0.25"]);
        let reward = |weight: f64| format!("reward=[{{name=\"ocr\"}}, {{name=\"colour\", weight={weight}}}]");
        assert_eq!(changes(&[&reward(0.5)], &[&reward(0.0)]), ["reward[1].weight 0.5 -> 0.0"]);
        assert_eq!(changes(&["run.seed=1", "batch.prompts=4"], &["run.seed=2", "batch.prompts=5"]).len(), 2);
    }

    /// A default of an earlier program's, which its configuration has written down, does not go unnoticed.
    #[test]
    fn a_default_that_is_another_today_is_a_change() {
        let now = RunConfig::load(None, &[]).unwrap();
        for (section, key, then, change) in [
            ("optim", "weight_decay", Value::Float(0.01), "optim.weight_decay 0.01 -> 0.0001"),
            ("method", "kl_coef", Value::Float(0.01), "method.kl_coef 0.01 -> 0.0001"),
            ("method", "adaptive_scale", Value::Boolean(false), "method.adaptive_scale false -> true"),
            ("advantage", "temperature", Value::Float(2.0), "advantage.temperature 2.0 -> 1.0"),
            ("old_policy", "max", Value::Float(0.9), "old_policy.max 0.9 -> 0.5"),
            ("sampler", "shift", Value::Float(1.0), "sampler.shift 1.0 -> 3.0"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut earlier: Table = now.to_toml().unwrap().parse().unwrap();
            let today = earlier[section].as_table_mut().unwrap().insert(key.to_owned(), then);
            assert!(today.is_some(), "{section}.{key} is not written");
            std::fs::write(folder.path().join(crate::config::RUN_CONFIG), earlier.to_string()).unwrap();
            let earlier = RunConfig::of_run_folder(folder.path()).unwrap();
            assert_eq!(now.changes_since(&earlier).unwrap(), [change]);
            assert_ne!(now.digest().unwrap(), earlier.digest().unwrap());
        }
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

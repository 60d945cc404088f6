//! The configuration as it is written: every key that has an effect, with its value, and none that has not.
//!
//! What a run leaves to its program's defaults, its method or its model is written down as well, so that the file stays what
//! ran when any of them changes.

use super::{RUN_CONFIG, RunConfig, load, paths};
use crate::data::PromptSet;
use crate::error::Error;
use crate::flow::Solver;
use crate::fs;
use crate::objective::AdvantageConfig;
use crate::optim::OldPolicyDecay;
use crate::params::Trainable;
use std::path::Path;
use toml::{Table, Value};

/// What the digests of this program are taken of: those of an earlier form say nothing about these.
const FORM: &str = "effective";

/// Keys of a run that decide nothing about an update: how long it is, how often it is looked at, where and on what it runs.
const NOT_DECIDING: [&str; 11] = [
    "run.name",
    "run.updates",
    "run.out",
    "run.eval_every",
    "run.checkpoint_every",
    "run.keep_last",
    "run.keep_best",
    "model.prompt_cache",
    "eval",
    "parallel",
    "log",
];

impl RunConfig {
    /// The configuration as TOML, as it is written.
    ///
    /// # Errors
    /// It cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String, Error> {
        as_toml(toml::to_string(&self.effective()?))
    }

    /// Writes `config.toml` into the run folder `out`. It means the same wherever it is read from, and where `out` is moved,
    /// what lies in it is still found.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, out: &Path) -> Result<(), Error> {
        let mut table = self.effective()?;
        paths::for_file_in(out, &mut table)?;
        fs::write(&out.join(RUN_CONFIG), as_toml(toml::to_string(&table))?)
    }

    /// The configuration that a run folder holds, unchecked; nothing where it cannot be read.
    pub fn of_run_folder(out: &Path) -> Option<Self> {
        load::unchecked(&fs::read_to_string(&out.join(RUN_CONFIG)).ok()?)
    }

    /// Digest of everything that decides what an update does: not where it is written, where files lie, how long the run
    /// is or how often it is looked at.
    ///
    /// # Errors
    /// It cannot be written as TOML.
    pub fn digest(&self) -> Result<String, Error> {
        let text = as_toml(toml::to_string(&self.deciding()?))?;
        Ok(format!("{}:{FORM}", crate::digest::of(text.as_bytes())))
    }

    /// What decides what an update does, with the names alone of the files that do.
    pub(super) fn deciding(&self) -> Result<Table, Error> {
        let mut table = self.effective()?;
        NOT_DECIDING.iter().for_each(|key| remove(key, &mut table));
        paths::names_only(&mut table);
        let sections = table.get_mut("reward").and_then(Value::as_array_mut).into_iter().flatten();
        for (reward, section) in self.reward.iter().zip(sections.filter_map(Value::as_table_mut)) {
            reward.settings.not_deciding().iter().for_each(|key| remove(key, section));
        }
        Ok(table)
    }

    /// The keys that have an effect.
    pub(super) fn effective(&self) -> Result<Table, Error> {
        let mut table = as_toml(Table::try_from(self.resolved()))?;
        self.without_effect().into_iter().for_each(|key| remove(key, &mut table));
        Ok(table)
    }

    /// With what it leaves open written down, as far as it is known before anything runs.
    fn resolved(&self) -> Self {
        let mut all = self.clone();
        all.batch.timesteps = Some(self.timesteps());
        all.sampler.shift = Some(self.sampler.shift());
        if self.eval.solver != Solver::Sde {
            // Evaluations have steps of their own: left out, all of them would be meant.
            all.sampler.sde.window = Some(self.sampler.sde.count(self.sampler.steps));
        }
        all.method.resolve();
        all.advantage = AdvantageConfig::of(&self.advantage.resolve(&self.method));
        let OldPolicyDecay { delay: _, rate, max } = self.old_policy_decay();
        (all.old_policy.rate, all.old_policy.max) = (Some(rate), Some(max));
        all.model.lora.targets = self.model.adapters().map(|adapters| adapters.targets);
        all
    }

    /// Keys and sections that nothing reads beside the values of the others.
    fn without_effect(&self) -> Vec<&'static str> {
        let mut keys = self.model.without_effect();
        if self.sampler.solver != Solver::Sde && self.eval.solver != Solver::Sde {
            keys.push("sampler.sde");
        }
        if self.model.trainable != Trainable::Lora {
            keys.push("model.lora");
        }
        let stages = self.stage.iter().filter_map(|stage| stage.train.as_ref());
        if stages.chain([&self.data.train, &self.data.eval]).all(|source| PromptSet::is_embedded(source)) {
            keys.push("data.format");
        }
        keys
    }
}

/// Takes a key, or a section, out of a table.
fn remove(key: &str, table: &mut Table) {
    match key.split_once('.') {
        None => drop(table.remove(key)),
        Some((section, rest)) => {
            if let Some(Value::Table(section)) = table.get_mut(section) {
                remove(rest, section);
            }
        }
    }
}

/// What TOML makes of something.
pub(super) fn as_toml<T>(written: Result<T, toml::ser::Error>) -> Result<T, Error> {
    written.map_err(|e| Error::Failed(format!("the configuration cannot be written: {e}")))
}

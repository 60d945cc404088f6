//! The checkpoints of a run: written beside training, the last ones and the best one kept.

use super::Trainer;
use super::inputs::PROMPTS;
use super::run::Run;
use crate::checkpoint::{self, STAGES, Saved, TrainState};
use crate::comm::phase;
use crate::error::{Error, Result};
use crate::fs;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The entry of a checkpoint that tells whether the evaluation that was due at its update is still to be done.
pub(super) const UNEVALUATED: &str = "unevaluated";

/// The entry of a checkpoint that tells whether the old policy was last set to the policy's values.
pub(super) const OLD_IS_POLICY: &str = "old_is_policy";

/// An evaluation, by its main reward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Scored {
    pub update: u64,
    pub reward: f64,
}

/// What the run knows of good checkpoints.
#[derive(Debug, Default)]
pub(super) struct Best {
    /// The last evaluation.
    pub evaluated: Option<Scored>,
    /// The best of those that were saved.
    pub saved: Option<Scored>,
}

impl Best {
    /// The best of all after a save of `update`.
    fn with(&self, update: u64) -> Option<Scored> {
        let new = self.evaluated.filter(|e| e.update == update);
        match (self.saved, new) {
            (Some(old), Some(new)) if new.reward > old.reward => Some(new),
            (old, new) => old.or(new),
        }
    }

    /// What a checkpoint tells of it.
    pub fn of_checkpoint(state: &TrainState) -> Self {
        Self { evaluated: None, saved: serde_json::from_value(state.extra["best"].clone()).ok() }
    }
}

impl Run<'_> {
    /// Begins a checkpoint of this update; training goes on while it is written.
    pub(super) fn save(&mut self) -> Result<()> {
        self.check_lock()?;
        self.await_saved()?;
        self.check_lock()?; // that may have taken long
        self.keep_config()?;
        phase("checkpoint");
        self.progress.aside("checkpoint");
        let update = self.trainer.state.update;
        let Trainer { skipped, stages, policies, .. } = &self.trainer;
        let extra = json!({
            "best": self.best.with(update),
            "skipped": skipped,
            STAGES: stages.begun(),
            UNEVALUATED: self.unevaluated,
            OLD_IS_POLICY: policies.old_is_policy,
            PROMPTS: self.prompts,
        });
        let state = TrainState { update, iteration: self.iteration, extra };
        let shard = self.trainer.state.snapshot()?;
        let begun = self.saver.begin(&state, shard, &*self.trainer.world.host);
        self.tolerate(begun.map(|()| None))
    }

    /// Writes the configuration again if it was removed meanwhile: checkpoints are used with it. By rank 0.
    fn keep_config(&self) -> Result<()> {
        let path = self.config.run.out.join("config.toml");
        if self.world().rank() != 0 || path.exists() {
            return Ok(());
        }
        tracing::warn!("{}: was removed while the run goes on: it is written again", path.display());
        fs::write(&path, self.config.to_toml()?)
    }

    /// Completes a checkpoint that has been written meanwhile.
    pub(super) fn look_after_saving(&mut self) -> Result<()> {
        let saved = self.saver.poll(&*self.trainer.world.host);
        self.tolerate(saved)
    }

    fn await_saved(&mut self) -> Result<()> {
        phase("checkpoint");
        let saved = self.saver.finish(&*self.trainer.world.host);
        self.tolerate(saved)
    }

    /// Prepares to end the run with an error that all ranks share: waits for the save in progress and, after a failed reward,
    /// which is no fault of the run's, saves the present state as well.
    pub(super) fn ended_by(&mut self, error: Error) -> Error {
        let saved = match error {
            Error::NotFinite(_) => self.await_saved(),
            Error::Reward { .. } => self.save().and_then(|()| self.saved_at_last()),
            _ => return error,
        };
        match (saved, error) {
            (Ok(()), Error::Reward { name, message }) => {
                let update = self.trainer.state.update;
                let saved = format!("saved update {update}: the same command continues once that is mended");
                Error::Reward { name, message: format!("{message}; {saved}") }
            }
            (Ok(()), error) => error,
            (Err(e), error) => {
                tracing::warn!("{e}");
                error
            }
        }
    }

    /// Waits for the last checkpoint; now there is no later chance.
    pub(super) fn saved_at_last(&mut self) -> Result<()> {
        self.await_saved()?;
        match self.unsaved.take() {
            Some(e) => Err(e),
            None => Ok(()),
        }
    }

    /// A checkpoint that could not be written does not end the run: a later one may succeed.
    fn tolerate(&mut self, saved: Result<Option<Saved>>) -> Result<()> {
        match saved {
            Ok(None) => Ok(()),
            Ok(Some(saved)) => {
                tracing::debug!("saved {}", saved.path.display());
                self.unsaved = None;
                self.best.saved = Best::of_checkpoint(&saved.state).saved;
                if let Err(e) = self.keep(saved.state.update) {
                    tracing::warn!("{e}; older checkpoints are not deleted");
                }
                Ok(())
            }
            Err(e @ Error::NotSaved { .. }) => {
                tracing::warn!("{e}; training goes on, and the next checkpoint may succeed");
                self.unsaved = Some(e);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Names the best checkpoint and deletes those that are neither that nor new. By rank 0, after a save of `update`.
    fn keep(&self, update: u64) -> Result<()> {
        if self.world().rank() != 0 {
            return Ok(());
        }
        let run = &self.config.run;
        let root = checkpoint::root(&run.out);
        let best = self.best.saved.map(|best| best.update);
        if best == Some(update) {
            checkpoint::set_best(&root, update)?;
        }
        checkpoint::prune(&root, run.keep_last, best.filter(|_| run.keep_best)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_best_of_what_was_both_evaluated_and_saved() {
        let scored = |update, reward| Some(Scored { update, reward });
        let mut best = Best::default();
        assert_eq!(best.with(10), None);
        best.evaluated = scored(10, 0.5);
        assert_eq!(best.with(10), scored(10, 0.5));
        assert_eq!(best.with(15), None, "this update was not evaluated");
        best.saved = scored(10, 0.5);
        best.evaluated = scored(20, 0.4);
        assert_eq!(best.with(20), scored(10, 0.5));
        best.evaluated = scored(30, 0.6);
        assert_eq!(best.with(30), scored(30, 0.6));
        let state = TrainState { update: 30, iteration: 30, extra: json!({ "best": best.with(30) }) };
        assert_eq!(Best::of_checkpoint(&state).saved, scored(30, 0.6));
        assert_eq!(Best::of_checkpoint(&TrainState { extra: serde_json::Value::Null, ..state }).saved, None);
    }
}

//! Where a run stands: what a checkpoint keeps of it beside the vectors of the optimizer.

use super::inputs::Digests;
use super::stages::BegunStage;
use crate::checkpoint::TrainState;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The state of a run after an update. Its fields but the first two are the `extra` of a
/// checkpoint's [`TrainState`].
///
/// Every program that drew the present random numbers ([`crate::rng::STREAMS`]) wrote all of them,
/// and no run goes on from a checkpoint with others, so none has a default: a field that is absent
/// or unknown is an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RunState {
    /// Optimizer steps taken.
    #[serde(skip)]
    pub update: u64,
    /// Rollout rounds finished.
    #[serde(skip)]
    pub iteration: u64,
    /// The best evaluation of all checkpoints up to this one.
    #[serde(deserialize_with = "Option::deserialize")] // null where there is none; absent is an error
    pub best: Option<Evaluated>,
    /// Updates and iterations that were left out because something was not finite.
    pub skipped: u64,
    /// The stages that have begun, the first one at least.
    pub stages: Vec<BegunStage>,
    /// Whether the evaluation that was due at this update is still to be done.
    pub unevaluated: bool,
    /// Whether the old policy was last set to the policy's values.
    pub old_is_policy: bool,
    /// Digests of the prompt sets, by what they were read from.
    pub prompts: Digests,
}

/// An evaluation, by its main reward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Evaluated {
    pub update: u64,
    pub reward: f64,
}

impl RunState {
    /// What a checkpoint tells; the error is without the checkpoint's path.
    pub fn of_checkpoint(state: &TrainState) -> std::result::Result<Self, String> {
        let read: Self = serde_path_to_error::deserialize(&state.extra).map_err(|e| {
            format!("does not tell where its run stood: state.extra: {e}; use the program that wrote it")
        })?;
        Ok(Self { update: state.update, iteration: state.iteration, ..read })
    }

    /// What a checkpoint is to tell.
    pub fn to_checkpoint(&self) -> Result<TrainState> {
        let extra = serde_json::to_value(self)
            .map_err(|e| Error::Failed(format!("the state of the run cannot be written as JSON: {e}")))?;
        Ok(TrainState { update: self.update, iteration: self.iteration, extra })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of a run that has just begun.
    pub fn fresh() -> RunState {
        RunState {
            update: 0,
            iteration: 0,
            best: None,
            skipped: 0,
            stages: Vec::new(),
            unevaluated: true,
            old_is_policy: true,
            prompts: Digests::new(),
        }
    }

    #[test]
    fn a_state_comes_back_from_its_checkpoint() {
        let best = Some(Evaluated { update: 10, reward: 0.1 + 0.2 });
        let prompts = Digests::from([("data.train = \"a\"".to_owned(), "1".to_owned())]);
        for state in [fresh(), RunState { update: 20, iteration: 7, best, skipped: 3, prompts, ..fresh() }] {
            assert_eq!(RunState::of_checkpoint(&state.to_checkpoint().unwrap()), Ok(state));
        }
    }

    #[test]
    fn a_field_that_is_absent_or_unknown_is_named() {
        let whole = fresh().to_checkpoint().unwrap();
        let fields: Vec<String> = whole.extra.as_object().unwrap().keys().cloned().collect();
        assert_eq!(fields, ["best", "skipped", "stages", "unevaluated", "old_is_policy", "prompts"]);
        let refused = |change: &dyn Fn(&mut serde_json::Map<String, serde_json::Value>)| {
            let mut changed = whole.clone();
            change(changed.extra.as_object_mut().unwrap());
            RunState::of_checkpoint(&changed).unwrap_err()
        };
        for field in &fields {
            let message = refused(&|extra| drop(extra.remove(field)));
            assert!(message.contains(&format!("missing field `{field}`")), "{message}");
        }
        let message = refused(&|extra| drop(extra.insert("momentum".into(), 1.into())));
        assert!(message.contains("unknown field `momentum`"), "{message}");
        let message = refused(&|extra| drop(extra.insert("best".into(), serde_json::json!({ "update": 1 }))));
        assert!(message.contains("best: missing field `reward`"), "{message}");
        let message = refused(&|extra| drop(extra.insert("skipped".into(), (-1).into())));
        assert!(message.contains("skipped: invalid value"), "{message}");
    }
}

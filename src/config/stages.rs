//! `[[stage]]`: how the weights of the rewards and the prompts change in the course of a run.
//!
//! A pure function of the configuration and of how many updates are taken. (The stages of a model, between which
//! gradients are cut, are others.)

use super::{RunConfig, paths};
use crate::data::{PromptSet, Split};
use crate::error::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// `[[stage]]`: a section for each change of weights or prompts in the course of the run; what it
/// leaves out stays. Every reward is scored and reported in every stage: a server must take the
/// prompts of all. A stage that has begun cannot be changed when a run is resumed; later ones can.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageConfig {
    /// It begins with the first iteration after this many updates; each later than the one before.
    pub at_update: u64,
    /// Prompts to train on from then on, as `data.train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train: Option<String>,
    /// Weights from then on, by the reward's name (remote: its "reward"); 0: it is only watched.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weights: BTreeMap<String, f64>,
}

/// A stage of a run, with what it took over from the one before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStage {
    /// 0: what `[[reward]]` and `[data]` say; then one for each `[[stage]]`.
    pub number: usize,
    /// Updates that are taken before it.
    pub at_update: u64,
    /// The weight of every reward by its name in the metrics; 0: it is scored and reported only.
    pub weights: BTreeMap<String, f64>,
    /// The prompts that are trained on.
    pub train: String,
    /// The stage that brought these prompts: a change of weights alone goes on with their order.
    pub prompts_of: usize,
}

impl RunStage {
    /// The weight of a reward; 0 for one that the run did not have.
    pub fn weight(&self, reward: &str) -> f64 {
        self.weights.get(reward).copied().unwrap_or(0.0)
    }

    /// The key that names its prompts, with the name of their file: `data.train = "prompts.txt"`.
    pub fn source(&self) -> String {
        let file = paths::file_name(Path::new(&self.train));
        match self.prompts_of {
            0 => format!("data.train = {file:?}"),
            number => format!("stage[{}].train = {file:?}", number - 1),
        }
    }

    /// Whether it begins where `other` does, with the same weights and the same prompts, wherever these lie.
    pub fn is_same(&self, other: &Self) -> bool {
        let mut rewards = self.weights.keys().chain(other.weights.keys());
        let prompts = |stage: &Self| paths::file_name(Path::new(&stage.train)).to_owned();
        (self.at_update, prompts(self), self.prompts_of) == (other.at_update, prompts(other), other.prompts_of)
            && rewards.all(|reward| self.weight(reward) == other.weight(reward))
    }

    /// The first iteration that belongs to it where none is left out.
    pub fn first_iteration(&self, updates_per_iteration: usize) -> u64 {
        self.at_update.div_ceil(updates_per_iteration as u64)
    }
}

/// `stage 1 from update 200 on: ocr 0, pick-score 1; prompts/pickscore.txt`
impl fmt::Display for RunStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weights: Vec<String> = self.weights.iter().map(|(reward, weight)| format!("{reward} {weight}")).collect();
        write!(f, "stage {} from update {} on: {}; {}", self.number, self.at_update, weights.join(", "), self.train)
    }
}

impl RunConfig {
    /// The stages of the run in their order, at least one.
    pub fn stages(&self) -> Vec<RunStage> {
        let weights = self.reward.iter().map(|reward| (reward.label().to_owned(), reward.weight)).collect();
        let mut now = RunStage { number: 0, at_update: 0, weights, train: self.data.train.clone(), prompts_of: 0 };
        let mut stages = vec![now.clone()];
        for stage in &self.stage {
            (now.number, now.at_update) = (now.number + 1, stage.at_update);
            now.weights.extend(stage.weights.clone());
            if let Some(train) = &stage.train {
                (now.train, now.prompts_of) = (train.clone(), now.number);
            }
            stages.push(now.clone());
        }
        stages
    }

    /// The prompts that are trained on, a set for each stage; stages with the same prompts share one.
    pub fn train_prompts(&self) -> Result<Vec<Arc<PromptSet>>, Error> {
        let mut sets: Vec<Arc<PromptSet>> = Vec::new();
        for stage in self.stages() {
            let set = match sets.get(stage.prompts_of) {
                Some(set) => set.clone(),
                None => Arc::new(PromptSet::load(&stage.train, Split::Train, self.data.format)?),
            };
            sets.push(set);
        }
        Ok(sets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(stages: &str) -> RunConfig {
        let rewards = "reward=[{name=\"ocr\"}, {name=\"colour\", weight=0.5}]";
        RunConfig::load(None, &[rewards.into(), format!("stage={stages}")]).unwrap()
    }

    fn weights(stage: &RunStage) -> (f64, f64) {
        (stage.weight("ocr"), stage.weight("colour"))
    }

    #[test]
    fn a_stage_takes_over_what_it_does_not_change() {
        let config = config(
            "[{at_update=3, weights={ocr=0.0}}, {at_update=5, train=\"glyphs-4\"}, \
             {at_update=9, weights={colour=-1.0, ocr=2.0}}, {at_update=10, train=\"glyphs\"}]",
        );
        let stages = config.stages();
        let expected = [
            (0, (1.0, 0.5), "glyphs", 0),
            (3, (0.0, 0.5), "glyphs", 0),
            (5, (0.0, 0.5), "glyphs-4", 2),
            (9, (2.0, -1.0), "glyphs-4", 2),
            (10, (2.0, -1.0), "glyphs", 4),
        ];
        assert_eq!(stages.len(), expected.len());
        for (number, (stage, (at_update, of, train, prompts_of))) in stages.iter().zip(expected).enumerate() {
            assert_eq!((stage.number, stage.at_update, stage.prompts_of), (number, at_update, prompts_of));
            assert_eq!((weights(stage), stage.train.as_str()), (of, train), "stage {number}");
        }
        assert_eq!(stages[1].to_string(), "stage 1 from update 3 on: colour 0.5, ocr 0; glyphs");
    }

    #[test]
    fn stages_with_the_same_prompts_share_a_set() {
        let config = config("[{at_update=1, train=\"glyphs-4\"}, {at_update=2, weights={ocr=3.0}}]");
        let sets = config.train_prompts().unwrap();
        assert_eq!(sets.len(), 3);
        assert!(!Arc::ptr_eq(&sets[0], &sets[1]) && Arc::ptr_eq(&sets[1], &sets[2]));
        assert_eq!(*sets[1], PromptSet::train("glyphs-4").unwrap());
    }

    #[test]
    fn an_iteration_of_several_updates_is_not_cut() {
        let config = config("[{at_update=3, weights={ocr=0.0}}, {at_update=4, weights={ocr=1.0}}]");
        let first = |stage: usize, updates| config.stages()[stage].first_iteration(updates);
        assert_eq!([first(0, 2), first(1, 2), first(2, 2)], [0, 2, 2]);
        assert_eq!([first(1, 1), first(2, 1)], [3, 4]);
    }

    #[test]
    fn a_reward_that_was_added_and_only_watched_changes_nothing() {
        let one = config("[{at_update=3, weights={ocr=0.0}}]").stages().remove(1);
        let mut other = one.clone();
        other.weights.insert("hps".into(), 0.0);
        assert!(one.is_same(&other) && other.is_same(&one));
        other.weights.insert("hps".into(), 0.1);
        assert!(!one.is_same(&other) && !other.is_same(&one));
        assert!(!one.is_same(&RunStage { train: "glyphs-4".into(), ..one.clone() }));
        let stage = |train: &str| RunStage { train: train.into(), ..one.clone() };
        assert!(stage("prompts/a.txt").is_same(&stage("/moved/a.txt")), "the same file somewhere else");
        assert!(!one.is_same(&RunStage { at_update: 4, ..one.clone() }));
    }
}

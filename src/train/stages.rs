//! The stages of a run as they begin, and the prompts that they draw.

use super::own::OwnReward;
use crate::config::{RunConfig, RunStage};
use crate::data::{Prompt, PromptSet};
use crate::error::{Error, Result};
use crate::optim::NotFinite;
use crate::plan::PlannedStage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The stages of a run and which have begun; the same on every rank.
pub(super) struct Stages {
    all: Vec<RunStage>,
    /// What each draws from.
    prompts: Vec<Arc<PromptSet>>,
    /// The first iteration of each stage that has begun, one at least.
    since: Vec<u64>,
    seed: u64,
    updates_per_iteration: u64,
    /// Whether updates that are not finite are left out, so that there are more iterations than planned.
    leaves_out: bool,
}

/// Iterations more than planned that a run may need which leaves out updates: so many and a tenth of the planned ones.
const SPARE: u64 = 20;

/// A stage that has begun, as checkpoints tell it: a [`RunStage`] with its first iteration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BegunStage {
    number: usize,
    at_update: u64,
    weights: BTreeMap<String, f64>,
    train: String,
    prompts_of: usize,
    iteration: u64,
}

impl BegunStage {
    fn new(stage: &RunStage, iteration: u64) -> Self {
        let RunStage { number, at_update, weights, train, prompts_of } = stage.clone();
        Self { number, at_update, weights, train, prompts_of, iteration }
    }

    fn stage(&self) -> RunStage {
        let Self { number, at_update, weights, train, prompts_of, .. } = self.clone();
        RunStage { number, at_update, weights, train, prompts_of }
    }
}

impl Stages {
    /// Those of a run that begins. The caller's `own` rewards are there in the place of the configuration's, each with its
    /// weight from the first stage to the last.
    ///
    /// # Errors
    /// [`Error::Usage`]: a stage changes the weight of a reward that the caller's own are in the place of.
    pub fn new(config: &RunConfig, own: &[OwnReward]) -> Result<Self> {
        let mut all = config.stages();
        if !own.is_empty() {
            if let Some(number) = config.stage.iter().position(|stage| !stage.weights.is_empty()) {
                return Err(Error::Usage(format!(
                    "stage[{number}].weights: are of the configuration's rewards, which the caller's own are in the place \
                     of; leave them out"
                )));
            }
            let weights: BTreeMap<String, f64> =
                own.iter().map(|own| (own.reward.name().to_owned(), own.weight)).collect();
            all.iter_mut().for_each(|stage| stage.weights = weights.clone());
        }
        Ok(Self {
            all,
            prompts: config.train_prompts()?,
            since: vec![0],
            seed: config.run.seed,
            updates_per_iteration: config.batch.updates_per_iteration as u64,
            leaves_out: config.optim.not_finite == NotFinite::Skip,
        })
    }

    /// The stage in force.
    pub fn now(&self) -> &RunStage {
        &self.all[self.since.len() - 1]
    }

    /// Whether there is more than one.
    pub fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// Begins with this iteration what is due after `update` updates; tells whether another stage is in force now.
    pub fn begin(&mut self, update: u64, iteration: u64) -> bool {
        let before = self.since.len();
        let due = self.all.iter().filter(|stage| stage.at_update <= update).count();
        self.since.resize(due.max(before), iteration);
        self.since.len() > before
    }

    /// The `count` prompts of an iteration of the stage in force. A set is gone through from its own first iteration on.
    pub fn draw(&self, iteration: u64, count: usize) -> Vec<Prompt> {
        let RunStage { number, prompts_of, .. } = *self.now();
        self.prompts[number].draw(self.seed, prompts_of, iteration - self.since[prompts_of], count)
    }

    /// The stages that bring prompts, with those.
    pub fn sources(&self) -> impl Iterator<Item = (&RunStage, &PromptSet)> {
        let all = self.all.iter().zip(&self.prompts);
        all.filter(|(stage, _)| stage.prompts_of == stage.number).map(|(stage, set)| (stage, &**set))
    }

    /// The prompts that a run of these stages draws, `count` an iteration, and may draw beyond what is planned.
    pub fn drawn(&self, planned: &[PlannedStage], count: usize) -> Vec<&Prompt> {
        let drawn = self.prompts.iter().enumerate().flat_map(|(number, set)| {
            let on_it = planned.iter().filter(|planned| planned.stage.prompts_of == number);
            let planned: u64 = on_it.map(|planned| planned.iterations).sum();
            let spare = if self.leaves_out && planned > 0 { SPARE + planned / 10 } else { 0 };
            set.drawn(self.seed, number, planned + spare, count)
        });
        drawn.collect()
    }

    /// What a checkpoint tells: the stages that have begun.
    pub fn begun(&self) -> Vec<BegunStage> {
        let begun = self.all.iter().zip(&self.since);
        begun.map(|(stage, &iteration)| BegunStage::new(stage, iteration)).collect()
    }

    /// Goes on where a checkpoint of `update` stands, of what has begun there.
    ///
    /// # Errors
    /// What has begun there is not what this run says; without the checkpoint's path.
    pub fn restore(&mut self, begun: &[BegunStage], update: u64) -> std::result::Result<(), String> {
        const REMEDY: &str = "what a stage did cannot be changed later: put it back, or pass another --out";
        if begun.is_empty() {
            return Err("tells of no stage that has begun".into());
        }
        // The weights and prompts of the first stage are [[reward]] and [data], keys like all the others.
        for (number, old) in begun.iter().map(BegunStage::stage).enumerate().skip(1) {
            match self.all.get(number) {
                Some(new) if new.is_same(&old) => {}
                Some(new) => return Err(format!("went through {old}, and this run has {new}; {REMEDY}")),
                None => return Err(format!("went through {old}, which this run lacks; {REMEDY}")),
            }
        }
        self.since = begun.iter().map(|begun| begun.iteration).collect();
        self.refuse_missed(update)
    }

    /// Refuses a stage that would have begun before the last iteration.
    fn refuse_missed(&self, update: u64) -> std::result::Result<(), String> {
        match self.all.get(self.since.len()) {
            Some(missed) if missed.at_update + self.updates_per_iteration <= update => Err(format!(
                "is of update {update} and went there without {missed}; let stage[{}].at_update be {update} or more, or \
                 resume from an earlier checkpoint",
                missed.number - 1
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;
    use std::collections::BTreeSet;

    const SET: &str = "stage=[{at_update=3, weights={ocr=2.0}}, {at_update=5, train=\"glyphs-4\"}, \
                          {at_update=7, train=\"glyphs\", weights={colour=1.0}}]";

    fn config(set: &[&str]) -> RunConfig {
        let set = [&["reward=[{name=\"ocr\"}, {name=\"colour\", weight=0.0}]", "batch.prompts=5"], set].concat();
        RunConfig::load(None, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>()).unwrap()
    }

    fn stages(set: &[&str]) -> Stages {
        Stages::new(&config(set), &[]).unwrap()
    }

    /// Number of the stage and the prompts of each iteration from `first` on, `updates` updates an iteration.
    fn run(stages: &mut Stages, first: u64, updates: u64) -> Vec<(usize, Vec<Prompt>)> {
        let iteration = |i: u64| {
            stages.begin(i * updates, i);
            (stages.now().number, stages.draw(i, 5))
        };
        (first..10).map(iteration).collect()
    }

    #[test]
    fn prompts_that_stay_go_on_in_their_order_and_new_ones_begin() {
        let whole = run(&mut stages(&[SET]), 0, 1);
        assert_eq!(whole.iter().map(|(stage, _)| *stage).collect::<Vec<_>>(), [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]);
        let [three, four] = ["glyphs", "glyphs-4"].map(|name| PromptSet::train(name).unwrap());
        for (i, (_, drawn)) in whole.iter().enumerate() {
            let i = i as u64;
            let expected = match i {
                0..5 => three.draw(42, 0, i, 5),
                5..7 => four.draw(42, 2, i - 5, 5),
                _ => three.draw(42, 3, i - 7, 5),
            };
            assert_eq!(*drawn, expected, "iteration {i}");
        }
        assert_ne!(whole[7].1, whole[0].1, "a set that comes back comes in another order");
    }

    #[test]
    fn a_resumed_run_draws_what_the_unbroken_one_does() {
        for updates in [1, 2] {
            let set = [SET, &format!("batch.updates_per_iteration={updates}")];
            let whole = run(&mut stages(&set), 0, updates);
            for stop in 0..10 {
                let mut stopped = stages(&set);
                for i in 0..stop {
                    stopped.begin(i * updates, i);
                }
                let mut resumed = stages(&set);
                resumed.restore(&stopped.begun(), stop * updates).unwrap();
                assert!(run(&mut resumed, stop, updates) == whole[stop as usize..], "resumed at {stop}");
            }
        }
    }

    /// A run that left out updates changes its stage by the updates that it took.
    #[test]
    fn iterations_without_an_update_belong_to_the_stage_too() {
        let mut stages = stages(&[SET]);
        let updates = [0, 1, 1, 1, 2, 3, 3, 7, 8];
        let numbers = updates.iter().zip(0..).map(|(&update, iteration)| {
            stages.begin(update, iteration);
            assert_eq!(stages.draw(iteration, 5).len(), 5);
            stages.now().number
        });
        assert_eq!(numbers.collect::<Vec<_>>(), [0, 0, 0, 0, 0, 1, 1, 3, 3]);
        assert_eq!(stages.since, [0, 5, 7, 7]);
    }

    #[test]
    fn all_prompts_that_a_run_draws_are_known_beforehand() {
        for updates in ["9", "20", "2"] {
            let set = [SET, &format!("run.updates={updates}"), "batch.updates_per_iteration=2"];
            let mut stages = stages(&set);
            let plan = Plan::of(&config(&set), 1).unwrap();
            let known: BTreeSet<String> =
                stages.drawn(&plan.stages, 5).into_iter().map(|prompt| prompt.text.to_string()).collect();
            let mut drawn = BTreeSet::new();
            for i in 0..plan.iterations {
                stages.begin(2 * i, i);
                drawn.extend(stages.draw(i, 5).into_iter().map(|prompt| prompt.text.to_string()));
            }
            assert_eq!(known, drawn);
        }
    }

    #[test]
    fn a_run_that_leaves_out_updates_knows_more_prompts_than_planned() {
        let set = [SET, "optim.not_finite='skip'"];
        let mut stages = stages(&set);
        let plan = Plan::of(&config(&set), 1).unwrap();
        let known: BTreeSet<String> =
            stages.drawn(&plan.stages, 5).into_iter().map(|prompt| prompt.text.to_string()).collect();
        for i in 0..5 + SPARE {
            stages.begin(0, i); // never an update, so never another set than the first, which is planned for 5 of them
            assert!(stages.draw(i, 5).iter().all(|prompt| known.contains(&*prompt.text)), "iteration {i}");
        }
    }

    #[test]
    fn what_stages_did_cannot_be_changed_and_what_they_will_do_can() {
        let at = |update: u64| {
            let mut there = stages(&[SET]);
            for i in 0..update {
                there.begin(i, i);
            }
            there.begun()
        };
        let resume = |update: u64, set: &str| stages(&[set]).restore(&at(update), update);
        let changed = |from: &str, to: &str| SET.replace(from, to);
        let [weight, prompts, begin] = [("2.0", "3.0"), ("glyphs-4", "glyphs"), ("at_update=5", "at_update=6")]
            .map(|(from, to)| changed(from, to));
        assert_eq!((resume(3, &weight), resume(4, &prompts), resume(4, &begin)), (Ok(()), Ok(()), Ok(())));
        for (update, set, words) in [
            (4, &weight, "went through stage 1 from update 3 on: colour 0, ocr 2; glyphs, and this run has stage 1 "),
            (9, &prompts, "went through stage 2 from update 5 on: colour 0, ocr 2; glyphs-4, and this run has stage 2"),
            (6, &begin, "put it back, or pass another --out"),
            (9, &"stage=[]".to_owned(), "which this run lacks"),
            (4, &changed("at_update=3", "at_update=2"), "this run has stage 1 from update 2 on"),
        ] {
            let message = resume(update, set).expect_err(words);
            assert!(message.contains(words), "{message}");
        }

        // What a run of one stage has saved.
        let plain = stages(&[]).begun();
        assert_eq!(stages(&[SET]).restore(&plain, 3), Ok(()));
        let missed = stages(&[SET]).restore(&plain, 5).expect_err("missed");
        assert!(missed.contains("update 5 ") && missed.contains("let stage[0].at_update be 5 or more"), "{missed}");
        // Its rewards and prompts may change as ever, in the first stage too.
        assert_eq!(stages(&[SET, "data.train=glyphs-4"]).restore(&at(3), 3), Ok(()));
    }
}

//! How long the stages of a run are.

use crate::config::{RunConfig, RunStage};
use crate::error::{Error, Result};
use serde::Serialize;
use std::fmt;

/// A stage with what comes of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedStage {
    /// What is in force.
    #[serde(flatten)]
    pub stage: RunStage,
    /// Iterations of it; 0: the run ends before.
    pub iterations: u64,
    /// Prompts of its set.
    pub prompts: usize,
    /// Iterations until every prompt of its set was drawn once.
    pub iterations_per_epoch: usize,
}

/// The stages of a run of `iterations` iterations, with `prompt_counts` prompts each.
///
/// # Errors
/// [`Error::Usage`] for a set that is too small for an iteration.
pub(super) fn planned(config: &RunConfig, iterations: u64, prompt_counts: &[usize]) -> Result<Vec<PlannedStage>> {
    let stages = config.stages();
    let wanted = config.batch.prompts;
    let begin = |number: usize| {
        let first = stages.get(number).map(|stage| stage.first_iteration(config.batch.updates_per_iteration));
        first.unwrap_or(iterations).min(iterations)
    };
    let plan = |(stage, &prompts): (&RunStage, &usize)| {
        if wanted > prompts {
            return Err(Error::Usage(format!(
                "batch.prompts = {wanted} but {} holds {prompts} prompts to train on; use batch.prompts = {prompts} or \
                 more prompts",
                stage.train
            )));
        }
        Ok(PlannedStage {
            stage: stage.clone(),
            iterations: begin(stage.number + 1) - begin(stage.number),
            prompts,
            iterations_per_epoch: prompts / wanted,
        })
    };
    stages.iter().zip(prompt_counts).map(plan).collect()
}

/// `stage 1 from update 200 on: ocr 0, pick-score 1; prompts/pick.txt: 960 prompts, 20 iterations an epoch; 300 iterations`
impl fmt::Display for PlannedStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { stage, iterations, prompts, iterations_per_epoch } = self;
        write!(f, "{stage}: {prompts} prompts, {iterations_per_epoch} iterations an epoch")?;
        match iterations {
            0 => write!(f, "; after the run's end"),
            n => write!(f, "; {n} iterations"),
        }
    }
}

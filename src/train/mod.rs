//! Training: the iteration, and the run around it.
//!
//! An iteration in three verbs, [`Trainer::iteration`]: rollout -> update -> advance the old
//! policy.

mod batch;
mod checkpoints;
mod gather;
mod gradients;
mod inputs;
mod lock;
mod meter;
mod outlook;
mod own;
mod preflight;
mod records;
mod replicas;
mod resume;
mod run;
mod sample;
mod stages;
mod start;
mod state;
pub mod step;

pub use own::{Own, OwnReward};
pub use start::{Outcome, train};

use crate::advantage::{Advantages, group_advantages};
use crate::comm::{World, agreed};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::objective::Objective;
use crate::observe::Metrics;
use crate::optim::{NotFinite, Sharded};
use crate::params::Layout;
use crate::pipeline::Pipeline;
use crate::policy::Policies;
use crate::reward::{Rewards, describe_scalings};
use crate::rollout::Samples;
use batch::{Batches, Rollouts};
use meter::Meter;
use stages::Stages;

/// Prompts in the picture of before and after.
const COMPARED: usize = 12;

/// Everything an iteration works on.
pub struct Trainer {
    world: World,
    config: RunConfig,
    pipeline: Pipeline,
    stages: Stages,
    rewards: Rewards,
    objective: Box<dyn Objective>,
    batches: Batches,
    layout: Layout,
    state: Sharded,
    policies: Policies,
    /// Updates and iterations that were left out because something was not finite.
    skipped: u64,
}

impl Trainer {
    /// Samples with the old policy, scores the images and takes the iteration's optimizer updates.
    /// One set of metrics per update, the same on every rank. `on_phase` is told each phase as it
    /// begins.
    pub fn iteration(&mut self, iteration: u64, on_phase: &mut dyn FnMut(&'static str)) -> Result<Vec<Metrics>> {
        let mut meter = Meter::new(&self.world, on_phase);
        self.begin_stage(iteration, &mut meter.shared);

        let rollouts = self.rollout(iteration, &mut meter)?;
        for update in 0..self.batches.updates {
            let metrics = self.update(update, &rollouts, &mut meter)?;
            meter.end_update(metrics);
        }
        self.advance_old_policy(&mut meter)?;

        meter.shared.set("skipped", self.skipped as f64);
        meter.finish(iteration, &self.pipeline.device) // collective: the ranks' metrics, joined
    }

    /// Images of the iteration's prompts, their scores, and what these say of each image: its
    /// advantage.
    fn rollout(&self, iteration: u64, meter: &mut Meter) -> Result<Rollouts> {
        // prompts -> conditioning -> samples -> images -> scores      (this rank's share of the N
        // images)
        let requests = self.requests(iteration);
        let (samples, scores) = self.sample_and_score(iteration, &requests, meter)?;

        // scores -> advantages      (every rank computes all N from the same numbers, then keeps
        // its own)
        meter.phase("gather");
        let scores = agreed(scores, &*self.world.host)?; // collective: an error of one rank is all ranks'
        let all = self.gather(&scores)?; // collective: all-gather
        let map = self.config.advantage.resolve(&self.config.method);
        let advantages = group_advantages(&all.rewards, &all.groups, &map)?; // [N]
        all.describe(&advantages, &mut meter.shared);
        describe_scalings(&self.rewards, "reward", &mut meter.shared);

        let Samples { x0, trajectory } = samples;
        let Advantages { values, dropped, .. } = advantages;
        Ok(Rollouts { iteration, requests, x0, trajectory, advantages: values[self.share()].to_vec(), dropped })
    }

    /// One optimizer step on the mean loss over the update's training batch; no metrics where it
    /// was left out because something was not finite.
    fn update(&mut self, update: usize, rollouts: &Rollouts, meter: &mut Meter) -> Result<Option<Metrics>> {
        // (x0, eps, t) -> velocities -> losses -> gradients      (of this rank's part of the
        // training batch)
        meter.phase("train");
        let (reduction, mut metrics) = self.gradients(update, rollouts)?;
        meter.phase("reduce");
        let gradient = reduction.finish()?; // [S]; collective: the sum over the ranks, reduce-scatter or all-reduce

        // gradients -> AdamW on this rank's shard -> parameters
        meter.phase("optimizer");
        let lr = self.config.optim.lr;
        let step = self.state.step(&gradient, &self.config.optim, lr, &*self.world.device); // collective: the norm
        let report = match step {
            Err(Error::NotFinite(what)) if self.config.optim.not_finite == NotFinite::Skip => {
                self.skip(&what);
                return Ok(None);
            }
            report => report?,
        };
        self.state.update_ema(self.config.ema.decay)?;
        self.policies.refresh_policy(&self.state)?; // collective: all-gather, now or when the parameters are used
        metrics.set("grad_norm", report.norm);
        metrics.set("lr", lr);
        Ok(Some(metrics))
    }

    /// Lets the old policy, which samples the next iteration, follow the policy.
    fn advance_old_policy(&mut self, meter: &mut Meter) -> Result<()> {
        meter.phase("old_policy");
        let decay = self.state.update_old(self.config.old_policy_decay())?;
        self.policies.refresh_old(&self.state, decay)?; // collective, as the policy's
        meter.shared.set("old_policy.eta", decay);
        Ok(())
    }

    /// Begins the stage that is due, of which the metrics tell where a run has several.
    fn begin_stage(&mut self, iteration: u64, metrics: &mut Metrics) {
        if self.stages.begin(self.state.update, iteration) {
            tracing::info!("{}", self.stages.now());
        }
        if self.stages.are_several() {
            metrics.set("stage", self.stages.now().number as f64);
        }
    }

    /// Counts what is left out because it is not finite; the same on every rank.
    fn skip(&mut self, what: &str) {
        self.skipped += 1;
        tracing::warn!("left out ({} so far): {what}", self.skipped);
    }
}

#[cfg(test)]
mod tests;

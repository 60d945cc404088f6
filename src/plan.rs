//! Every derived count of a run: nothing else divides.

use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::evaluate::share;
use crate::params::{Layout, Role};
use crate::shard::Partition;
use serde::Serialize;
use std::fmt;

/// The geometry of a run on R ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// R.
    pub ranks: usize,
    /// P.
    pub prompts: usize,
    /// K.
    pub images_per_prompt: usize,
    /// N = P K.
    pub images: usize,
    /// Smallest and largest number of images a rank samples.
    pub images_per_rank: (usize, usize),
    /// B.
    pub micro_batch: usize,
    /// Micro-batches of the busiest rank's rollout.
    pub rollout_micro_batches: usize,
    /// Solver steps T of a rollout.
    pub solver_steps: usize,
    /// Timesteps an image is trained at.
    pub timesteps: usize,
    /// Optimizer updates of an iteration.
    pub updates_per_iteration: usize,
    /// Iterations of the whole run.
    pub iterations: u64,
    /// Training points (image and timestep) of each update of an iteration, over all ranks.
    pub points: Vec<usize>,
    /// Iterations until every prompt was drawn once.
    pub iterations_per_epoch: usize,
    /// Parameters of the model, with its adapters.
    pub parameters: usize,
    /// Trainable parameters.
    pub trainable: usize,
    /// S.
    pub shard: usize,
    /// Bytes of weights on each rank: base, policy and old policy.
    pub weight_bytes: usize,
    /// Bytes of optimizer state on each rank: master, two moments, old policy, EMA.
    pub state_bytes: usize,
    /// Bytes of the gradient sum on each rank.
    pub gradient_bytes: usize,
    /// Bytes that a rank sends for an update: reduce-scatter of gradients, all-reduce of their norm, all-gather of
    /// parameters; or one all-reduce of the gradients, where nothing is shared out.
    pub update_bytes: usize,
    /// Bytes that a rank sends for an iteration beside its updates: all-gather of the old policy.
    pub old_policy_bytes: usize,
    /// Bytes that data-parallel training with one all-reduce a backward pass would send instead.
    pub unaccumulated_bytes: usize,
}

impl Plan {
    /// The geometry of `config` on `ranks` ranks with `prompt_count` training prompts.
    ///
    /// # Errors
    /// [`Error::Usage`] for what cannot work, with the nearest settings that can.
    pub fn new(config: &RunConfig, ranks: usize, prompt_count: usize) -> Result<Self> {
        let b = &config.batch;
        let images = b.prompts * b.images_per_prompt;
        let usage = |message: String| Err(Error::Usage(message));
        if ranks == 0 {
            return usage("ranks = 0: use at least 1".into());
        }
        if ranks > images {
            return usage(format!(
                "{ranks} ranks for batch.prompts * batch.images_per_prompt = {images} images: some would have none; \
                 use at most {images} ranks or batch.prompts = {}",
                ranks.div_ceil(b.images_per_prompt)
            ));
        }
        if b.prompts > prompt_count {
            return usage(format!(
                "batch.prompts = {} but data.train holds {prompt_count} prompts; use batch.prompts = {prompt_count} or \
                 more prompts",
                b.prompts
            ));
        }
        let timesteps = config.timesteps();
        let model = config.model.build()?;
        let specs = model.specs();
        let layout = Layout::new(&specs, config.model.trainable);
        let count = |role: Role| -> usize {
            specs
                .iter()
                .flat_map(|s| s.iter())
                .filter(|s| s.role == role)
                .map(|s| s.shape.iter().product::<usize>())
                .sum()
        };
        let (base, adapters) = (count(Role::Base), count(Role::Adapter));
        let partition = Partition::new(&layout, config.parallel.shard.parts(ranks));
        let shard = partition.shard_len();
        let sizes = (0..ranks).map(|r| share(images, r, ranks).len());
        let largest = sizes.clone().max().unwrap_or(0);
        let points: Vec<usize> = (0..b.updates_per_iteration)
            .map(|u| b.prompts * images_of_update(b.images_per_prompt, b.updates_per_iteration, u) * timesteps)
            .collect();
        // Ring collectives: each rank sends (R - 1) shards for a reduce-scatter and as many for an all-gather, or both for an
        // all-reduce where every rank holds everything.
        let pieces = |parts: usize| Partition::new(&layout, parts).shard_len();
        let once = (ranks - 1) * pieces(ranks) * 4;
        let (gather, norm) = if partition.parts() == ranks { (once, 2 * (ranks - 1) * 8) } else { (0, 0) };
        let ring = 2 * once;
        let backward_passes = (largest * timesteps).div_ceil(b.micro_batch);
        Ok(Self {
            ranks,
            prompts: b.prompts,
            images_per_prompt: b.images_per_prompt,
            images,
            images_per_rank: (sizes.min().unwrap_or(0), largest),
            micro_batch: b.micro_batch,
            rollout_micro_batches: largest.div_ceil(b.micro_batch),
            solver_steps: config.sampler.steps,
            timesteps,
            updates_per_iteration: b.updates_per_iteration,
            iterations: config.run.updates.div_ceil(b.updates_per_iteration as u64),
            points,
            iterations_per_epoch: prompt_count / b.prompts,
            parameters: base + adapters,
            trainable: layout.total,
            shard,
            weight_bytes: 4 * (base + adapters + 2 * layout.total),
            state_bytes: 5 * 4 * shard,
            gradient_bytes: 4 * partition.padded_len(),
            update_bytes: ring + norm,
            old_policy_bytes: gather,
            unaccumulated_bytes: ring * backward_passes.div_ceil(b.updates_per_iteration),
        })
    }
}

/// Images of a group of `images` that update `update` of `updates` trains on.
pub fn images_of_update(images: usize, updates: usize, update: usize) -> usize {
    (images + updates - 1 - update) / updates
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
        let (least, most) = self.images_per_rank;
        let per_rank = if least == most { format!("{most}") } else { format!("{least} to {most}") };
        let rows = [
            ("ranks", self.ranks.to_string()),
            ("images an iteration", format!("{} = {} prompts x {}", self.images, self.prompts, self.images_per_prompt)),
            ("images a rank", per_rank),
            (
                "rollout",
                format!(
                    "{} solver steps, {} micro-batches of {}",
                    self.solver_steps, self.rollout_micro_batches, self.micro_batch
                ),
            ),
            (
                "training points",
                format!("{:?} an iteration's updates, {} timesteps an image", self.points, self.timesteps),
            ),
            (
                "iterations",
                format!("{} in the run, {} an epoch of the prompts", self.iterations, self.iterations_per_epoch),
            ),
            ("parameters", format!("{} ({} trained, {} a shard)", self.parameters, self.trainable, self.shard)),
            (
                "memory a rank",
                format!(
                    "{} weights, {} optimizer shard, {} gradients, and activations",
                    mib(self.weight_bytes),
                    mib(self.state_bytes),
                    mib(self.gradient_bytes)
                ),
            ),
            (
                "sent a rank and update",
                format!(
                    "{} (with an all-reduce a backward pass: {}), and {} an iteration for the old policy",
                    mib(self.update_bytes),
                    mib(self.unaccumulated_bytes),
                    mib(self.old_policy_bytes)
                ),
            ),
        ];
        for (name, value) in rows {
            writeln!(f, "{name:>24}  {value}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(set: &[&str]) -> RunConfig {
        let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
        RunConfig::load(None, &set).expect("a valid configuration")
    }

    #[test]
    fn counts_add_up_when_nothing_divides() {
        let config = config(&[
            "batch.prompts=3",
            "batch.images_per_prompt=5",
            "batch.updates_per_iteration=2",
            "batch.timesteps=4",
        ]);
        let plan = Plan::new(&config, 4, 100).expect("a plan");
        assert_eq!((plan.images, plan.images_per_rank), (15, (3, 4)));
        assert_eq!(plan.points, [3 * 3 * 4, 3 * 2 * 4]);
        assert!(
            plan.shard * 4 >= plan.trainable && (plan.shard - 8) * 4 < plan.trainable,
            "one element a stage at most"
        );
        assert_eq!(plan.update_bytes, 2 * 3 * plan.shard * 4 + 2 * 3 * 8);
    }

    #[test]
    fn impossible_geometries_name_the_nearest_possible_one() {
        let config = config(&["batch.prompts=2", "batch.images_per_prompt=4"]);
        let error = |ranks, prompts| Plan::new(&config, ranks, prompts).expect_err("refused").to_string();
        assert!(error(9, 100).contains("at most 8 ranks or batch.prompts = 3"), "{}", error(9, 100));
        assert!(error(2, 1).contains("batch.prompts = 1"), "{}", error(2, 1));
        assert!(error(0, 100).contains("at least 1"));
    }

    #[test]
    fn updates_share_a_group_evenly() {
        for (images, updates) in [(24, 2), (5, 3), (7, 7)] {
            let counts: Vec<usize> = (0..updates).map(|u| images_of_update(images, updates, u)).collect();
            assert_eq!(counts.iter().sum::<usize>(), images);
            assert!(counts.iter().all(|&c| c > 0));
        }
    }
}

//! Every derived count of a run; no other module works out shares or micro-batches.

mod cost;
mod display;
pub mod prompts;
mod stages;

pub use cost::{Item, Sent, Traffic};
pub use stages::PlannedStage;

use crate::batching::{images_of_update, max_images_per_rank, share};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::params::{Layout, Role};
use cost::Cost;
use serde::Serialize;

/// The geometry of a run on R ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Ranks (R).
    pub ranks: usize,
    /// Prompts per iteration (P).
    pub prompts: usize,
    /// Images per prompt (K).
    pub images_per_prompt: usize,
    /// Images per iteration (N = P K).
    pub images: usize,
    /// Smallest and largest number of images a rank samples.
    pub images_per_rank: (usize, usize),
    /// Groups that a rank has images of, least and most.
    pub groups_per_rank: (usize, usize),
    /// Samples that go through the model at once (B).
    pub micro_batch: usize,
    /// Micro-batches of the busiest rank's rollout.
    pub rollout_micro_batches: usize,
    /// Solver steps of a rollout (T).
    pub solver_steps: usize,
    /// Timesteps an image is trained at.
    pub timesteps: usize,
    /// Optimizer updates of an iteration.
    pub updates_per_iteration: usize,
    /// Iterations of the whole run.
    pub iterations: u64,
    /// Training points (image and timestep) of each update of an iteration, over all ranks.
    pub points: Vec<usize>,
    /// Iterations until every prompt was drawn once, in the first stage.
    pub iterations_per_epoch: usize,
    /// The stages of the run, one at least.
    pub stages: Vec<PlannedStage>,
    /// Parameters of the model, with its adapters.
    pub parameters: usize,
    /// Trainable parameters.
    pub trainable: usize,
    /// Elements of a rank's shard of the trainable parameters (S).
    pub shard: usize,
    /// What each rank holds beside activations.
    pub memory: Vec<Item>,
    /// What a rank sends for an iteration's rollouts: the model's weights, where they are shared out.
    pub rollout_sent: Traffic,
    /// Micro-batches of each update of an iteration on the busiest rank; where weights are shared out, on every rank.
    pub training_micro_batches: Vec<usize>,
    /// Share of the model's blocks that run again in the backward pass.
    pub blocks_again: f64,
    /// What a rank sends for each update of an iteration, by collective: weights for forward and backward passes; the sum of
    /// gradients over ranks and its norm; the new parameters. In iterations that begin with an old policy equal to the policy,
    /// the first of a run at least, the first update sends less: nothing for the old policy's velocities.
    pub update_sent: Vec<Vec<Sent>>,
    /// What a rank sends for an iteration beside its updates: all-gather of the old policy.
    pub old_policy_sent: Traffic,
    /// What a rank sends for an evaluation: the EMA, or the weights in parts.
    pub eval_sent: Traffic,
    /// Bytes that data-parallel training with one all-reduce a backward pass would send instead.
    pub unaccumulated_bytes: usize,
    /// What is to be known before time is spent, a line each: prompts to which a reward does not apply, what has no effect.
    pub notes: Vec<String>,
}

impl Plan {
    /// The geometry of the run of `config` on `ranks` ranks, and what is to be told of its prompts.
    ///
    /// # Errors
    /// [`Error::Usage`] for what cannot work, [`Error::File`] for prompts that cannot be read.
    pub fn of(config: &RunConfig, ranks: usize) -> Result<Self> {
        let (train, eval) = (config.train_prompts()?, config.eval_prompts()?);
        let mut notes = prompts::run(config, &train, &eval)?;
        notes.extend(config.shift_note());
        let counts: Vec<usize> = train.iter().map(|set| set.len()).collect();
        Ok(Self { notes, ..Self::new(config, ranks, &counts, eval.len())? })
    }

    /// The geometry of `config` on `ranks` ranks, without notes; `prompt_counts`: training prompts of each stage;
    /// `eval_prompts`: prompts that there are to evaluate.
    ///
    /// # Errors
    /// [`Error::Usage`] for what cannot work, with the nearest settings that can.
    pub fn new(config: &RunConfig, ranks: usize, prompt_counts: &[usize], eval_prompts: usize) -> Result<Self> {
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
        let iterations = config.run.updates.div_ceil(b.updates_per_iteration as u64);
        let stages = stages::planned(config, iterations, prompt_counts)?;
        let timesteps = config.timesteps();
        let model = config.model.build()?;
        let specs = model.specs();
        let parameters = specs.iter().flat_map(|s| s.iter()).filter(|s| s.role != Role::Buffer);
        let cost = Cost::new(config, &model, ranks);
        let sizes = (0..ranks).map(|r| share(images, r, ranks).len());
        let largest = sizes.clone().max().unwrap_or(0);
        let groups = (0..ranks).map(|rank| {
            let images = share(images, rank, ranks);
            images.end.div_ceil(b.images_per_prompt) - images.start / b.images_per_prompt
        });
        let points: Vec<usize> = (0..b.updates_per_iteration)
            .map(|u| b.prompts * images_of_update(b.images_per_prompt, b.updates_per_iteration, u) * timesteps)
            .collect();
        let rollout_micro_batches = largest.div_ceil(b.micro_batch);
        let training_micro_batches: Vec<usize> = (0..b.updates_per_iteration)
            .map(|u| max_images_per_rank(b.prompts, b.images_per_prompt, b.updates_per_iteration, u, ranks) * timesteps)
            .map(|points| points.div_ceil(b.micro_batch))
            .collect();
        let evaluated = config.eval.count(eval_prompts);
        let eval_micro_batches = (evaluated * config.eval.images_per_prompt).div_ceil(ranks).div_ceil(b.micro_batch);
        let backward_passes = (largest * timesteps).div_ceil(b.micro_batch);
        Ok(Self {
            ranks,
            prompts: b.prompts,
            images_per_prompt: b.images_per_prompt,
            images,
            images_per_rank: (sizes.min().unwrap_or(0), largest),
            groups_per_rank: (groups.clone().min().unwrap_or(0), groups.max().unwrap_or(0)),
            micro_batch: b.micro_batch,
            rollout_micro_batches,
            solver_steps: config.sampler.steps,
            timesteps,
            updates_per_iteration: b.updates_per_iteration,
            iterations,
            points,
            iterations_per_epoch: stages.first().map_or(0, |stage| stage.iterations_per_epoch),
            stages,
            parameters: parameters.map(|s| s.shape.iter().product::<usize>()).sum(),
            trainable: Layout::new(&specs, config.model.trainable).total,
            shard: cost.shard(),
            memory: cost.memory(),
            rollout_sent: rollout_micro_batches * (config.sampler.steps * cost.velocity()),
            update_sent: training_micro_batches.iter().enumerate().map(|(update, &n)| cost.update(update, n)).collect(),
            training_micro_batches,
            blocks_again: cost.blocks_again(),
            old_policy_sent: cost.gather_set(),
            eval_sent: cost.gather_set() + eval_micro_batches * (config.eval.steps * cost.velocity()),
            unaccumulated_bytes: cost.all_reduce() * backward_passes.div_ceil(b.updates_per_iteration),
            notes: Vec::new(),
        })
    }
}

impl Plan {
    /// What a rank sends for each update of an iteration.
    pub fn updates_sent(&self) -> impl Iterator<Item = Traffic> {
        self.update_sent.iter().map(|update| update.iter().map(|sent| sent.traffic).sum())
    }

    /// What a rank sends in an iteration.
    pub fn iteration_sent(&self) -> Traffic {
        self.rollout_sent + self.updates_sent().sum() + self.old_policy_sent
    }

    /// Bytes that a rank holds beside activations.
    pub fn held(&self) -> usize {
        self.memory.iter().map(|item| item.bytes).sum()
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
        let plan = Plan::new(&config, 4, &[100], 100).expect("a plan");
        assert_eq!((plan.images, plan.images_per_rank), (15, (3, 4)));
        assert_eq!(plan.points, [3 * 3 * 4, 3 * 2 * 4]);
        assert!(
            plan.shard * 4 >= plan.trainable && (plan.shard - 8) * 4 < plan.trainable,
            "one element a stage at most"
        );
        let updates: Vec<Traffic> = plan.updates_sent().collect();
        // Gradients and new parameters stage by stage, and the norm.
        let calls = 2 * config.model.build().expect("a model").stages.len() + 1;
        assert_eq!(updates, [Traffic { bytes: 2 * 3 * plan.shard * 4 + 2 * 3 * 8, calls }; 2]);
    }

    #[test]
    fn impossible_geometries_name_the_nearest_possible_one() {
        let config = config(&["batch.prompts=2", "batch.images_per_prompt=4"]);
        let error = |ranks, prompts| Plan::new(&config, ranks, &[prompts], 100).expect_err("refused").to_string();
        assert!(error(9, 100).contains("at most 8 ranks or batch.prompts = 3"), "{}", error(9, 100));
        assert!(error(2, 1).contains("batch.prompts = 1"), "{}", error(2, 1));
        assert!(error(0, 100).contains("at least 1"));
    }

    #[test]
    fn shared_weights_are_held_in_parts_and_sent_when_they_are_used() {
        let plan = |set: &[&str], ranks| Plan::new(&config(set), ranks, &[100], 100).expect("a plan");
        for trainable in ["model.trainable=full", "model.trainable=lora"] {
            let [none, full] = ["none", "full"].map(|shard| plan(&[trainable, &format!("parallel.shard={shard}")], 4));
            assert!(full.held() < none.held());
            assert_eq!(none.rollout_sent, Traffic::default());
            assert!(full.rollout_sent.bytes > 0 && full.old_policy_sent == Traffic::default());
            let half = plan(&[trainable, "parallel.shard=full", "model.dtype=bf16"], 4);
            // Adapters travel in f32, whatever the model is in.
            let passes = half.rollout_micro_batches * half.solver_steps;
            let adapters = if trainable == "model.trainable=lora" { passes * 3 * half.shard * 4 } else { 0 };
            assert_eq!((half.rollout_sent.bytes - adapters) * 2, full.rollout_sent.bytes - adapters);
            assert_eq!(
                (half.rollout_sent.calls, half.memory[0].bytes * 2),
                (full.rollout_sent.calls, full.memory[0].bytes)
            );
        }
    }

    /// Whatever makes eta 0 for good: then the old policy is the policy, and nothing is sent for velocities of its own.
    #[test]
    fn on_policy_nothing_is_sent_for_the_old_policys_velocities() {
        let sent = |more: &str| -> Vec<Traffic> {
            let set = ["parallel.shard=full", "batch.updates_per_iteration=2", more];
            Plan::new(&config(&set), 4, &[100], 100).expect("a plan").updates_sent().collect()
        };
        let lagging = sent("old_policy.schedule=1");
        for setting in ["old_policy.schedule=0", "old_policy.rate=0.0", "old_policy.max=0.0"] {
            let on_policy = sent(setting);
            assert!(on_policy[0].bytes < lagging[0].bytes && on_policy[0].calls < lagging[0].calls, "{setting}");
            assert_eq!(on_policy[1], lagging[1], "{setting}: the first update moves the policy away");
        }
    }
}

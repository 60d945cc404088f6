//! Supervised pretraining of an embedded task's base model, on pictures drawn by the renderer.
//!
//! Rectified-flow regression (Liu et al., arXiv 2209.03003): `|v(x_t, t, c) - (eps - x0)|^2`. It stops once the model is
//! readable but far from good, so that reinforcement learning has something to improve.

mod example;
mod regression;
mod state;
mod task;

pub use regression::{Examples, Regression};
pub use task::Task;

use crate::batching::{micro_batches, share};
use crate::comm::World;
use crate::data::PromptSet;
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::flow::SamplerConfig;
use crate::fs;
use crate::observe::{Metrics, Progress, grid};
use crate::optim::OptimConfig;
use crate::params::{Entry, Layout, ParamSet, Trainable};
use crate::pipeline::{ModelConfig, Pipeline};
use crate::reward::{Overlap, Rewards};
use crate::rng::{Purpose, Stream};
use crate::shard::Sharding;
use candle_core::Device;
use example::{Point, examples};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Pictures in a row of the grid that a look writes.
const COLUMNS: usize = 8;
/// What they are enlarged by.
const SCALE: u32 = 3;

/// The configuration of `flowrl-dist pretrain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    /// What the model is for.
    pub task: Task,
    /// Seed of parameters, pictures, times and noise.
    pub seed: u64,
    /// Prompts, as `data.train` of a run; nothing: the task's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// Share of the examples that are shown without their text, so that guidance has something to lead away from.
    pub dropout: f64,
    /// Share of the pictures that show one fact of their prompt wrong (shapes), as captions of the web do: the model then
    /// draws clean pictures with wrong counts, colours and places, which reinforcement learning can put right.
    pub wrong_facts: f64,
    /// Weights to go on from; nothing: random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Largest number of updates.
    pub steps: u64,
    /// Pictures of an update, over all ranks.
    pub batch: usize,
    /// Pictures that go through the model at once.
    pub micro_batch: usize,
    /// Updates over which the learning rate rises from 0.
    pub warmup: u64,
    /// Last updates, over which the learning rate falls to 0 along a cosine.
    pub decay: u64,
    /// Decay of the average of the weights, which is what is kept.
    pub ema: f64,
    /// Updates between looks at the reward.
    pub eval_every: u64,
    /// Training prompts looked at.
    pub eval_prompts: usize,
    /// Stop when the mean of the task's first reward over these prompts reaches this.
    pub stop_at_reward: f64,
    /// Where the weights go, at each look, and beside them a picture (`.png`) and the state (`.state`) that an interrupted
    /// pretraining goes on from.
    pub out: PathBuf,
    /// AdamW.
    pub optim: OptimConfig,
    /// The sampler of the looks.
    pub sampler: SamplerConfig,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            task: Task::Glyphs,
            seed: 1,
            data: None,
            dropout: 0.0,
            wrong_facts: 0.0,
            init: None,
            steps: 4000,
            batch: 64,
            micro_batch: 32,
            warmup: 100,
            decay: 0,
            ema: 0.995,
            eval_every: 100,
            eval_prompts: 64,
            stop_at_reward: 0.5,
            out: "runs/pretrain/base.safetensors".into(),
            optim: OptimConfig { lr: 1e-3, weight_decay: 0.0, ..OptimConfig::default() },
            sampler: SamplerConfig::default(),
        }
    }
}

impl PretrainConfig {
    /// Refuses what cannot work.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("steps", self.steps as usize),
            ("batch", self.batch),
            ("micro_batch", self.micro_batch),
            ("eval_every", self.eval_every as usize),
            ("eval_prompts", self.eval_prompts),
            ("sampler.steps", self.sampler.steps),
        ];
        if let Some((key, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Usage(format!("{key} = 0: must be at least 1")));
        }
        for (key, share) in [("dropout", self.dropout), ("wrong_facts", self.wrong_facts)] {
            if !(0.0..1.0).contains(&share) {
                return Err(Error::Usage(format!("{key} = {share}: must be at least 0 and below 1")));
            }
        }
        if self.wrong_facts > 0.0 && !self.task.has_facts() {
            return Err(Error::Usage(format!(
                "wrong_facts = {}: belongs to task = \"shapes\"; remove it",
                self.wrong_facts
            )));
        }
        if !(self.optim.lr.is_finite() && self.optim.lr > 0.0) {
            return Err(Error::Usage(format!("optim.lr = {}: must be a finite number above 0", self.optim.lr)));
        }
        Ok(())
    }

    /// The learning rate of an update, counted from 1.
    fn lr(&self, step: u64) -> f64 {
        let rising = (step as f64 / self.warmup.max(1) as f64).min(1.0);
        let late = step.saturating_sub(self.steps.saturating_sub(self.decay)) as f64 / (self.decay + 1) as f64;
        self.optim.lr * rising * 0.5 * (1.0 + libm::cos(std::f64::consts::PI * late))
    }
}

/// Trains the task's base model and writes it, in half precision, to `config.out`. Returns the digest of the file.
pub fn pretrain(config: &PretrainConfig, world: &World, rewards: &Rewards, progress: &mut Progress) -> Result<String> {
    let kind = config.task.kind();
    let model = ModelConfig { kind, trainable: Trainable::Full, path: config.init.clone(), ..ModelConfig::default() };
    let pipeline = match &config.init {
        Some(_) => Pipeline::load(&model, config.seed, &Device::Cpu)?,
        None => Pipeline::random(kind, config.seed, &Device::Cpu)?,
    };
    let mut training = Regression::new(&pipeline, Sharding::Optimizer, &*world.device)?;
    state::restore(config, &training.layout, &mut training.state)?;
    training.refresh(&*world.device)?;
    let before = training.state.update;
    if before >= config.steps {
        return Err(Error::Usage(format!(
            "steps = {}: {} holds update {before}; raise it, or remove the file to begin anew",
            config.steps,
            state::path(config).display()
        )));
    }
    if before > 0 {
        progress.resume_at(before);
        progress.note(&format!("goes on from update {before} in {}", state::path(config).display()));
    }
    let prompts = PromptSet::train(config.data.as_deref().unwrap_or(config.task.name()))?.prompts;
    let chosen = Stream::new(config.seed, Purpose::PretrainLooks, [0; 4]).permutation(prompts.len());
    let looked_at: Vec<_> = chosen.iter().take(config.eval_prompts).map(|&i| prompts[i].clone()).collect();

    for step in before + 1..=config.steps {
        let mut metrics = Metrics::default();
        let mine = share(config.batch, world.rank(), world.world_size());
        let examples = micro_batches(mine.len(), config.micro_batch, 0).map(|batch| {
            let points =
                batch.places().map(|i| Point::draw(config, &prompts, step, mine.start + i)).collect::<Result<_>>()?;
            examples(&pipeline, points, batch.len)
        });
        let lr = config.lr(step);
        let (loss, report) = training.step(examples, config.batch, &config.optim, lr, &*world.device)?;
        training.state.update_ema(config.ema)?;
        metrics.add_mean("loss", loss / mine.len() as f64, mine.len() as f64);
        metrics.set("grad_norm", report.norm);
        metrics.reduce(&*world.host)?;
        progress.update(step, &metrics);

        if step % config.eval_every == 0 || step == config.steps {
            let ema = training.state.gather_ema(&*world.device)?;
            let averaged = training.params.with_flat(&training.layout, &ema)?;
            let evaluation = Evaluation {
                prompts: &looked_at,
                images_per_prompt: 1,
                sampler: &config.sampler,
                micro_batch: config.micro_batch,
                seed: config.seed,
                overlap: Overlap::Auto,
            };
            let (metrics, gallery) = evaluation.run(&pipeline, &averaged, rewards, world)?;
            progress.evaluation(step, &metrics);
            let digest = write(config, world, &training.layout, &averaged, step)?;
            if world.rank() == 0 {
                let picture = grid::image_grid(&gallery.images, &gallery.captions, COLUMNS, SCALE)?;
                grid::save_png(&picture, &config.out.with_extension("png"))?;
            }
            state::save(config, &training.state, world)?;
            let reached = metrics.reward().is_some_and(|(_, mean)| mean >= config.stop_at_reward);
            if reached || step == config.steps {
                return Ok(digest);
            }
        }
    }
    Err(Error::Failed("pretraining ended without a look at the reward".into()))
}

fn write(config: &PretrainConfig, world: &World, layout: &Layout, params: &ParamSet, step: u64) -> Result<String> {
    let tensor = |e: &Entry| -> Result<_> {
        let tensor = params.stage(e.stage).of(e)?.detach();
        Ok((e.name.clone(), tensor.to_dtype(candle_core::DType::F16)?))
    };
    let tensors = layout.entries.iter().map(tensor).collect::<Result<Vec<_>>>()?;
    let made = format!("flowrl-dist pretrain, seed {}, {step} updates of {} pictures", config.seed, config.batch);
    let metadata = [("made_by".to_owned(), made)].into();
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|e| Error::Failed(format!("the weights cannot be encoded: {e}")))?;
    if world.rank() == 0 {
        fs::write_out(&config.out, &bytes)?;
    }
    world.host.barrier()?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;
    use crate::observe::Terminal;
    use crate::reward::build;

    fn digest(config: &PretrainConfig, ranks: usize) -> Result<String> {
        let digests = ThreadGroup::run(ranks, |world| {
            let rewards = build(&config.task.rewards(), 1)?.into();
            pretrain(config, &world, &rewards, &mut Progress::new(config.steps, false, &Terminal::default()))
        })?;
        assert!(digests.iter().all(|digest| *digest == digests[0]));
        let bytes = std::fs::read(&config.out).unwrap();
        assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digests[0]);
        Ok(digests[0].clone())
    }

    /// Four pictures an update.
    fn small(steps: u64, out: PathBuf) -> PretrainConfig {
        let sampler = SamplerConfig { steps: 2, ..SamplerConfig::default() };
        PretrainConfig {
            steps,
            batch: 4,
            micro_batch: 2,
            warmup: 1,
            eval_prompts: 2,
            sampler,
            out,
            ..Default::default()
        }
    }

    /// A rank's micro-batches are added up in the order of the pictures, as the ranks' sums are: the same bits.
    #[test]
    fn the_weights_do_not_depend_on_the_number_of_ranks() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let of = |ranks: usize| {
            let out = folder.path().join(format!("{ranks}/base.safetensors"));
            digest(&PretrainConfig { dropout: 0.5, ..small(2, out) }, ranks)
        };
        assert_eq!(of(1)?, of(2)?);
        Ok(())
    }

    /// On another number of ranks, too; a state that cannot be gone on from is refused.
    #[test]
    fn an_interrupted_pretraining_goes_on_as_if_it_had_not_been() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let shapes = |steps: u64, out: &str| PretrainConfig {
            task: Task::Shapes,
            wrong_facts: 0.5,
            ..small(steps, folder.path().join(out).join("base.safetensors"))
        };
        let whole = digest(&shapes(3, "whole"), 1)?;
        let half = digest(&shapes(2, "parts"), 2)?;
        assert_ne!(half, whole);
        let refused = digest(&shapes(2, "parts"), 1).unwrap_err().to_string();
        assert!(refused.starts_with("steps = 2: ") && refused.contains("holds update 2; raise it"), "{refused}");
        assert_eq!(digest(&shapes(3, "parts"), 1)?, whole);
        assert!(folder.path().join("parts/base.png").is_file());

        let glyphs = PretrainConfig { task: Task::Glyphs, wrong_facts: 0.0, ..shapes(4, "parts") };
        let refused = digest(&glyphs, 1).unwrap_err().to_string();
        assert!(refused.contains("base.state: is of another model: "), "{refused}");
        Ok(())
    }

    #[test]
    fn the_learning_rate_rises_stays_and_falls() {
        let optim = OptimConfig { lr: 2.0, ..OptimConfig::default() };
        let config = PretrainConfig { steps: 100, warmup: 10, decay: 19, optim, ..PretrainConfig::default() };
        let rates = [1, 5, 10, 50, 81, 91, 100].map(|step| config.lr(step));
        // Half of the cosine at 10 of 20, at 19 of 20 (1 + cos(0.95 pi)) / 2 = 0.00615583.
        for (rate, expected) in rates.into_iter().zip([0.2, 1.0, 2.0, 2.0, 2.0, 1.0, 2.0 * 0.006_155_829_7]) {
            assert!((rate - expected).abs() < 1e-9, "{rates:?}");
        }
        assert_eq!(PretrainConfig { decay: 0, ..config }.lr(100), 2.0);
    }

    #[test]
    fn wrong_facts_need_a_task_that_has_facts() {
        let config = |task, wrong_facts| PretrainConfig { task, wrong_facts, ..PretrainConfig::default() };
        let refused = |config: PretrainConfig| config.check().unwrap_err().to_string();
        assert_eq!(refused(config(Task::Glyphs, 0.5)), "wrong_facts = 0.5: belongs to task = \"shapes\"; remove it");
        assert!(refused(config(Task::Shapes, 1.0)).starts_with("wrong_facts = 1: must be at least 0 and below 1"));
        assert!(config(Task::Shapes, 0.5).check().is_ok());
    }
}

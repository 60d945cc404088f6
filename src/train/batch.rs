//! The training batch of an update: which sample is trained at which timestep with which noise.

use crate::batching::{MicroBatch, images_of_update, max_images_per_rank};
use crate::config::RunConfig;
use crate::data::Prompt;
use crate::error::Result;
use crate::flow::{SamplerConfig, interpolate};
use crate::objective::{Point, Target};
use crate::pipeline::Pipeline;
use crate::rng::{Purpose, Stream};
use crate::rollout::{Request, Trajectory, normals};
use candle_core::{Device, Tensor};
use std::collections::BTreeSet;

/// This rank's samples of an iteration, with what training needs of them.
pub struct Rollouts {
    /// The iteration that they belong to.
    pub iteration: u64,
    /// What was sampled.
    pub requests: Vec<Request>,
    /// Samples, `[n, C, H, W]`.
    pub x0: Tensor,
    /// How a stochastic solver went there.
    pub trajectory: Option<Trajectory>,
    /// One per image.
    pub advantages: Vec<f64>,
    /// Groups that are not trained on because a score of theirs is unavailable; the same on every
    /// rank.
    pub dropped: BTreeSet<usize>,
}

/// The numbers that decide what is trained when.
#[derive(Debug, Clone)]
pub struct Batches {
    /// Seed of the run.
    pub seed: u64,
    /// K.
    pub images_per_prompt: usize,
    /// Groups over all ranks, P.
    pub prompts: usize,
    /// Updates of an iteration.
    pub updates: usize,
    /// Timesteps an image is trained at.
    pub timesteps: usize,
    /// The rollout's solver: its grid, and its stochastic steps.
    pub sampler: SamplerConfig,
    /// Whether rollout steps are trained, not samples and noise.
    pub reverse: bool,
}

/// A sample of this rank, and the place of its timestep on the rollout's grid.
type SampleAndStep = (usize, usize);

/// What an update trains on.
pub struct TrainingBatch {
    /// This rank's part, in the order of the samples.
    pub own: Vec<SampleAndStep>,
    /// How many there are over all ranks: what a mean over them divides by.
    pub global: usize,
    /// How many a rank has at most, however they are drawn.
    pub max_per_rank: usize,
}

/// One micro-batch of a training batch as tensors.
pub struct MicroBatchTensors {
    /// Where the velocities are asked for, and the advantages.
    pub point: Point,
    /// The prompts, B of them.
    pub prompts: Vec<Prompt>,
    /// What each loss counts in the mean over the training batch; nothing for the padding. `[B]`.
    pub weights: Tensor,
}

impl Batches {
    /// Those of a configuration. `reverse`: the objective is trained on rollout steps.
    pub fn new(config: &RunConfig, reverse: bool) -> Self {
        Self {
            seed: config.run.seed,
            images_per_prompt: config.batch.images_per_prompt,
            prompts: config.batch.prompts,
            updates: config.batch.updates_per_iteration,
            timesteps: config.timesteps(),
            sampler: config.sampler.clone(),
            reverse,
        }
    }

    /// The training batch of update `update` of an iteration, without the groups that were dropped;
    /// `ranks` share it.
    pub fn of_update(&self, update: usize, rollouts: &Rollouts, ranks: usize) -> TrainingBatch {
        let Rollouts { iteration, requests, dropped, .. } = rollouts;
        let images = images_of_update(self.images_per_prompt, self.updates, update);
        let max_images = max_images_per_rank(self.prompts, self.images_per_prompt, self.updates, update, ranks);
        let mut own = self.drawn(*iteration, update, requests);
        own.retain(|&(sample, _)| !dropped.contains(&requests[sample].prompt.index));
        TrainingBatch {
            own,
            global: (self.prompts - dropped.len()) * images * self.timesteps,
            max_per_rank: max_images * self.timesteps,
        }
    }

    /// This rank's samples in update `update`: each image in one update, drawn within its group so
    /// that every update sees every group, at `timesteps` different times of the rollout's grid:
    /// drawn for each image, or, of the stochastic steps, the first ones.
    fn drawn(&self, iteration: u64, update: usize, requests: &[Request]) -> Vec<SampleAndStep> {
        let steps = self.sampler.steps;
        let mut drawn = Vec::new();
        for (sample, Request { prompt, image }) in requests.iter().enumerate() {
            let stream = |purpose, image| Stream::new(self.seed, purpose, [iteration, prompt.index as u64, image, 0]);
            let order = stream(Purpose::TrainOrder, 0).permutation(self.images_per_prompt);
            if order[*image] % self.updates != update {
                continue;
            }
            let times = match self.reverse {
                true => self.sampler.sde.window(steps, iteration).collect(),
                false => stream(Purpose::TrainTimesteps, *image as u64).permutation(steps),
            };
            drawn.extend(times.into_iter().take(self.timesteps).map(|time| (sample, time)));
        }
        drawn
    }

    /// One micro-batch of a training batch; where that has nothing left for this rank, any sample
    /// stands in with weight 0.
    pub fn micro_batch(
        &self,
        pipeline: &Pipeline,
        rollouts: &Rollouts,
        batch: &TrainingBatch,
        part: MicroBatch,
    ) -> Result<MicroBatchTensors> {
        let window = self.sampler.sde.window(self.sampler.steps, rollouts.iteration);
        let any = (0, if self.reverse { window.start } else { 0 });
        let own: Vec<SampleAndStep> = part.places().map(|i| batch.own.get(i).copied().unwrap_or(any)).collect();
        let point = match &rollouts.trajectory {
            Some(trajectory) if self.reverse => self.reverse_point(trajectory, rollouts, &own, &pipeline.device)?,
            _ => self.forward_point(pipeline, rollouts, &own)?,
        };
        Ok(MicroBatchTensors {
            point,
            prompts: own.iter().map(|&(sample, _)| rollouts.requests[sample].prompt.clone()).collect(),
            weights: weights(part, batch.global, &pipeline.device)?,
        })
    }

    /// Samples and fresh noise: `x_t = (1 - t) x0 + t eps`.
    fn forward_point(&self, pipeline: &Pipeline, rollouts: &Rollouts, own: &[SampleAndStep]) -> Result<Point> {
        let device = &pipeline.device;
        let sigmas = self.sampler.sigmas();
        let rows = Tensor::from_vec(own.iter().map(|of| of.0 as u32).collect(), own.len(), device)?;
        let x0 = rollouts.x0.index_select(&rows, 0)?;
        let noise = own.iter().map(|&(sample, time)| {
            let Request { prompt, image } = &rollouts.requests[sample];
            let name = [rollouts.iteration, prompt.index as u64, *image as u64, time as u64];
            Stream::new(self.seed, Purpose::TrainNoise, name)
        });
        let eps = normals(pipeline, noise)?;
        let t = column(own, device, |(_, time)| sigmas[time])?;
        let advantage = column(own, device, |(sample, _)| rollouts.advantages[sample])?;
        Ok(Point { x_t: interpolate(&x0, &eps, &t)?, t, advantage, target: Target::Forward { x0, eps } })
    }

    /// Steps of stochastic rollouts: from one state to the next.
    fn reverse_point(
        &self,
        trajectory: &Trajectory,
        rollouts: &Rollouts,
        own: &[SampleAndStep],
        device: &Device,
    ) -> Result<Point> {
        let sigmas = self.sampler.sigmas();
        let step = |time: usize| self.sampler.sde.step(&sigmas, time);
        let here = trajectory.rows(own)?;
        let samples = rollouts.requests.len() as u32;
        let ahead = Tensor::from_vec(here.iter().map(|row| row + samples).collect(), own.len(), device)?;
        let here = Tensor::from_vec(here, own.len(), device)?;
        let target = Target::Reverse {
            next: trajectory.states.index_select(&ahead, 0)?,
            log_prob: trajectory.log_probs.index_select(&here, 0)?,
            x_factor: column(own, device, |(_, time)| step(time).x)?,
            v_factor: column(own, device, |(_, time)| step(time).v)?,
            std: column(own, device, |(_, time)| step(time).std)?,
            rate: column(own, device, |(_, time)| step(time).rate)?,
        };
        Ok(Point {
            x_t: trajectory.states.index_select(&here, 0)?,
            t: column(own, device, |(_, time)| self.sampler.model_time(sigmas[time]))?,
            advantage: column(own, device, |(sample, _)| rollouts.advantages[sample])?,
            target,
        })
    }
}

/// A number for each, `[B]`.
fn column(own: &[SampleAndStep], device: &Device, value: impl Fn(SampleAndStep) -> f64) -> Result<Tensor> {
    let values = own.iter().map(|&of| value(of) as f32).collect();
    Ok(Tensor::from_vec(values, own.len(), device)?)
}

/// Weight of each place of a micro-batch in a mean over `global` of them: nothing for the padding.
/// `[B]`.
fn weights(part: MicroBatch, global: usize, device: &Device) -> Result<Tensor> {
    let weight = (1.0 / global as f64) as f32;
    let values = (0..part.size).map(|i| if i < part.len { weight } else { 0.0 }).collect();
    Ok(Tensor::from_vec(values, part.size, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_in_one_update_at_different_times() -> Result<()> {
        let sampler = SamplerConfig::default();
        let batches =
            Batches { seed: 3, images_per_prompt: 5, prompts: 2, updates: 2, timesteps: 4, sampler, reverse: false };
        let requests: Vec<Request> =
            (0..10).map(|i| Request { prompt: Prompt::new(i / 5, ""), image: i % 5 }).collect();
        let rollouts = |requests: &[Request]| -> Result<Rollouts> {
            Ok(Rollouts {
                iteration: 7,
                requests: requests.to_vec(),
                x0: Tensor::zeros(requests.len(), candle_core::DType::F32, &Device::Cpu)?,
                trajectory: None,
                advantages: vec![0.0; requests.len()],
                dropped: BTreeSet::new(),
            })
        };
        let all = rollouts(&requests)?;
        let updates: Vec<TrainingBatch> = (0..2).map(|update| batches.of_update(update, &all, 1)).collect();
        let mut seen = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        for TrainingBatch { own, global, .. } in &updates {
            assert_eq!(own.len(), *global);
            own.iter().for_each(|(sample, time)| seen.entry(*sample).or_default().push(*time));
        }
        assert_eq!(seen.len(), 10);
        for times in seen.values_mut() {
            times.sort_unstable();
            times.dedup();
            assert!(times.len() == 4 && times[3] < 10);
        }
        // What an image is trained at does not depend on which other images this rank has.
        let alone = batches.of_update(0, &rollouts(&requests[3..4])?, 1).own;
        let together: Vec<usize> = updates[0].own.iter().filter(|of| of.0 == 3).map(|of| of.1).collect();
        assert_eq!(alone.iter().map(|of| of.1).collect::<Vec<_>>(), together);
        Ok(())
    }
}

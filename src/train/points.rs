//! Training points: which image is trained at which time with which noise, in which update.

use crate::batching::{MicroBatch, images_of_update, max_images_per_rank};
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
    /// What was sampled.
    pub requests: Vec<Request>,
    /// Samples, `[n, C, H, W]`.
    pub x0: Tensor,
    /// How a stochastic solver went there.
    pub trajectory: Option<Trajectory>,
    /// One an image.
    pub advantages: Vec<f64>,
    /// Groups that are not trained on because a score of theirs could not be had; the same on every rank.
    pub dropped: BTreeSet<usize>,
}

/// The numbers that decide which points there are.
#[derive(Debug, Clone)]
pub struct Points {
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

/// A sample of this rank and the place of its time on the rollout's grid.
type Place = (usize, usize);

impl Points {
    /// The points of a configuration.
    pub fn new(config: &crate::config::RunConfig) -> Self {
        Self {
            seed: config.run.seed,
            images_per_prompt: config.batch.images_per_prompt,
            prompts: config.batch.prompts,
            updates: config.batch.updates_per_iteration,
            timesteps: config.timesteps(),
            sampler: config.sampler.clone(),
            reverse: config.objective().requirements().trajectory,
        }
    }

    /// This rank's points of update `update` of an iteration: each image in one update, drawn within its group so that
    /// every update sees every group, at `timesteps` different times of the rollout's grid: drawn for each image, or, of
    /// the stochastic steps, the first ones.
    pub fn of_update(&self, iteration: u64, update: usize, requests: &[Request]) -> Vec<Place> {
        let steps = self.sampler.steps;
        let mut points = Vec::new();
        for (sample, request) in requests.iter().enumerate() {
            let at =
                |purpose, image| Stream::new(self.seed, purpose, [iteration, request.prompt.index as u64, image, 0]);
            let order = at(Purpose::TrainOrder, 0).permutation(self.images_per_prompt);
            if order[request.image] % self.updates == update {
                let times = match self.reverse {
                    true => self.sampler.sde.window(steps, iteration).collect(),
                    false => at(Purpose::TrainTimesteps, request.image as u64).permutation(steps),
                };
                points.extend(times.into_iter().take(self.timesteps).map(|time| (sample, time)));
            }
        }
        points
    }

    /// Points of the update over all ranks, without those of the dropped groups: what a mean over them divides by.
    pub fn global_count(&self, update: usize, dropped: usize) -> usize {
        (self.prompts - dropped) * images_of_update(self.images_per_prompt, self.updates, update) * self.timesteps
    }

    /// Points of the update that a rank has at most, however they are drawn.
    pub fn max_per_rank(&self, update: usize, ranks: usize) -> usize {
        max_images_per_rank(self.prompts, self.images_per_prompt, self.updates, update, ranks) * self.timesteps
    }

    /// The tensors of one micro-batch of points, and the prompts of its places; of none, those of any point.
    pub fn micro_batch(
        &self,
        pipeline: &Pipeline,
        rollouts: &Rollouts,
        iteration: u64,
        points: &[Place],
        batch: MicroBatch,
    ) -> Result<(Point, Vec<Prompt>)> {
        let any = (0, if self.reverse { self.sampler.sde.window(self.sampler.steps, iteration).start } else { 0 });
        let places: Vec<Place> = batch.places().map(|i| points.get(i).copied().unwrap_or(any)).collect();
        let size = places.len();
        let device = &pipeline.device;
        let column = |value: &dyn Fn(&Place) -> f64| {
            Tensor::from_vec(places.iter().map(|p| value(p) as f32).collect(), size, device)
        };
        let rows = Tensor::from_vec(places.iter().map(|p| p.0 as u32).collect(), size, device)?;
        let advantage = column(&|p| rollouts.advantages[p.0])?;
        let sigmas = self.sampler.sigmas();
        let (x_t, t, target) = match &rollouts.trajectory {
            Some(trajectory) if self.reverse => {
                let step = |p: &Place| self.sampler.sde.step(&sigmas, p.1);
                let here = trajectory.rows(&places)?;
                let samples = rollouts.requests.len() as u32;
                let ahead = Tensor::from_vec(here.iter().map(|row| row + samples).collect(), size, device)?;
                let here = Tensor::from_vec(here, size, device)?;
                let target = Target::Reverse {
                    next: trajectory.states.index_select(&ahead, 0)?,
                    log_prob: trajectory.log_probs.index_select(&here, 0)?,
                    x_factor: column(&|p| step(p).x)?,
                    v_factor: column(&|p| step(p).v)?,
                    std: column(&|p| step(p).std)?,
                    rate: column(&|p| step(p).rate)?,
                };
                (trajectory.states.index_select(&here, 0)?, column(&|p| self.sampler.model_time(sigmas[p.1]))?, target)
            }
            _ => {
                let x0 = rollouts.x0.index_select(&rows, 0)?;
                let stream = |&(sample, time): &Place| {
                    let r = &rollouts.requests[sample];
                    let name = [iteration, r.prompt.index as u64, r.image as u64, time as u64];
                    Stream::new(self.seed, Purpose::TrainNoise, name)
                };
                let eps = normals(pipeline, places.iter().map(stream))?;
                let t = column(&|p| sigmas[p.1])?;
                (interpolate(&x0, &eps, &t)?, t, Target::Forward { x0, eps })
            }
        };
        let prompts = places.iter().map(|place| rollouts.requests[place.0].prompt.clone()).collect();
        Ok((Point { x_t, t, advantage, target }, prompts))
    }
}

/// Weight of each place of a micro-batch in a mean over `global` points: nothing for the padding. `[B]`.
pub fn weights(batch: MicroBatch, global: usize, device: &Device) -> Result<Tensor> {
    let weight = (1.0 / global as f64) as f32;
    let values: Vec<f32> = (0..batch.size).map(|i| if i < batch.len { weight } else { 0.0 }).collect();
    Ok(Tensor::from_vec(values, batch.size, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_is_in_one_update_at_different_times() {
        let sampler = SamplerConfig::default();
        let points =
            Points { seed: 3, images_per_prompt: 5, prompts: 2, updates: 2, timesteps: 4, sampler, reverse: false };
        let requests: Vec<Request> =
            (0..10).map(|i| Request { prompt: Prompt::new(i / 5, ""), image: i % 5 }).collect();
        let updates: Vec<Vec<Place>> = (0..2).map(|u| points.of_update(7, u, &requests)).collect();
        let mut seen = std::collections::BTreeMap::<usize, Vec<usize>>::new();
        for (update, places) in updates.iter().enumerate() {
            assert_eq!(places.len(), points.global_count(update, 0));
            places.iter().for_each(|(sample, time)| seen.entry(*sample).or_default().push(*time));
        }
        assert_eq!(seen.len(), 10);
        for times in seen.values_mut() {
            times.sort_unstable();
            times.dedup();
            assert!(times.len() == 4 && times[3] < 10);
        }
        // What an image is trained at does not depend on which other images this rank has.
        let alone = points.of_update(7, 0, &requests[3..4]);
        let together: Vec<usize> = updates[0].iter().filter(|p| p.0 == 3).map(|p| p.1).collect();
        assert_eq!(alone.iter().map(|p| p.1).collect::<Vec<_>>(), together);
    }
}

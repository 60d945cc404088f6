//! Samples of the old policy, or of any other set of parameters.

use crate::batching::{MicroBatch, in_step, micro_batches};
use crate::data::Prompt;
use crate::engine::{self, Pass};
use crate::error::Result;
use crate::flow::sde::{Path, solve_sde};
use crate::flow::{Ode, SamplerConfig, Solver, guide, solve};
use crate::pipeline::Pipeline;
use crate::rng::{Purpose, Stream};
use crate::shard::Weights;
use candle_core::Tensor;
use std::ops::Range;

/// One image to be sampled: the `image`-th of its prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its prompt.
    pub prompt: Prompt,
    /// Its number among the images of the prompt, `0..K`.
    pub image: usize,
}

/// One latent of normal numbers a stream, `[n, C, H, W]`.
pub fn normals(pipeline: &Pipeline, streams: impl Iterator<Item = Stream>) -> Result<Tensor> {
    let (c, h, w) = pipeline.model.latent;
    let mut values = Vec::new();
    for stream in streams {
        values.extend(stream.normals(c * h * w));
    }
    Ok(Tensor::from_vec(values, ((), c, h, w), &pipeline.device)?)
}

/// How requests are sampled. A sample depends on seed, purpose, iteration, prompt and image number only.
pub struct Sampling<'a> {
    /// The model.
    pub pipeline: &'a Pipeline,
    /// Its parameters.
    pub params: &'a dyn Weights,
    /// The solver.
    pub sampler: &'a SamplerConfig,
    /// Samples that go through the model at once, B.
    pub micro_batch: usize,
    /// Seed of the run.
    pub seed: u64,
    /// What the samples are for.
    pub purpose: Purpose,
    /// The iteration that they belong to.
    pub iteration: u64,
}

/// What was sampled.
pub struct Samples {
    /// The samples, `[n, C, H, W]`.
    pub x0: Tensor,
    /// How a stochastic solver went there.
    pub trajectory: Option<Trajectory>,
}

impl Samples {
    /// The first sample with a number that is not finite.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`].
    pub fn first_not_finite(&self) -> Result<Option<usize>> {
        let sums = self.x0.flatten_from(1)?.abs()?.sum(1)?.to_vec1::<f32>()?; // [n]
        Ok(sums.iter().position(|sum| !sum.is_finite()))
    }
}

/// The stochastic steps of n samples.
pub struct Trajectory {
    /// The steps of the solver that were stochastic, W of them.
    pub window: Range<usize>,
    /// The states before each step and after the last one, `[(W + 1) n, C, H, W]`, step by step.
    pub states: Tensor,
    /// Log-probability of each step, mean over dimensions, `[W n]`, step by step.
    pub log_probs: Tensor,
}

impl Trajectory {
    /// Joins the micro-batches' paths.
    fn join(window: Range<usize>, paths: &[Path]) -> Result<Self> {
        let stack = |count: usize, of: fn(&Path) -> &[Tensor]| -> Result<Tensor> {
            let steps = (0..count).flat_map(|i| paths.iter().map(move |path| of(path)[i].clone()));
            Ok(Tensor::cat(&steps.collect::<Vec<_>>(), 0)?)
        };
        let states = stack(window.len() + 1, |path| &path.states)?;
        let log_probs = stack(window.len(), |path| &path.log_probs)?;
        Ok(Self { window, states, log_probs })
    }

    /// The rows of `states` and `log_probs` for (sample, step of the solver).
    pub fn rows(&self, places: &[(usize, usize)]) -> Result<Vec<u32>> {
        let samples = self.log_probs.dim(0)? / self.window.len();
        Ok(places.iter().map(|&(sample, step)| ((step - self.window.start) * samples + sample) as u32).collect())
    }
}

impl Sampling<'_> {
    /// Samples the requests, at least one. `max_per_rank`: requests of the rank that has most; where running the model is a
    /// collective call, this rank runs it as often as that one.
    pub fn run(&self, requests: &[Request], max_per_rank: usize) -> Result<Samples> {
        self.run_with(requests, max_per_rank, &mut |_, _| Ok(()))
    }

    /// As [`Self::run`], and hands over the samples `[n, C, H, W]` of each micro-batch, with their places among the requests,
    /// before the next is begun.
    pub fn run_with(
        &self,
        requests: &[Request],
        max_per_rank: usize,
        on_samples: &mut dyn FnMut(Range<usize>, &Tensor) -> Result<()>,
    ) -> Result<Samples> {
        let sigmas = self.sampler.sigmas();
        let window = match self.sampler.solver {
            Solver::Sde => self.sampler.sde.window(self.sampler.steps, self.iteration),
            Solver::Euler | Solver::Dpm2 => 0..0,
        };
        let (mut x0, mut paths) = (Vec::new(), Vec::new());
        for batch in micro_batches(requests.len(), self.micro_batch, in_step(self.params.is_collective(), max_per_rank))
        {
            let prompts: Vec<Prompt> = batch.places().map(|place| requests[place].prompt.clone()).collect();
            let conditioning = self.pipeline.encode(&prompts)?; // of these alone: a run's may not fit into memory
            let guided = self.sampler.is_guided();
            let negative = guided.then(|| self.pipeline.negative(&prompts)).transpose()?;
            let velocity = |x: &Tensor, t: f64| {
                let t = Tensor::full(self.sampler.model_time(t) as f32, self.micro_batch, &self.pipeline.device)?; // [B]
                self.velocity(x, &t, &conditioning, negative.as_deref())
            };
            let noise = self.normals(requests, batch, 0)?;
            let own = |x: Tensor| Ok(x.narrow(0, 0, batch.len)?);
            let solved = match self.sampler.solver {
                Solver::Euler => solve(Ode::Euler, &sigmas, &noise, velocity)?,
                Solver::Dpm2 => solve(Ode::Dpm2, &sigmas, &noise, velocity)?,
                Solver::Sde => {
                    let normals = |step: usize| self.normals(requests, batch, 1 + step as u64);
                    let path = solve_sde(&self.sampler.sde, &sigmas, window.clone(), &noise, velocity, normals)?;
                    let all = |tensors: Vec<Tensor>| tensors.into_iter().map(own).collect::<Result<Vec<_>>>();
                    let x0 = path.x0.clone();
                    paths.push(Path { x0: path.x0, states: all(path.states)?, log_probs: all(path.log_probs)? });
                    x0
                }
            };
            let samples = own(solved)?;
            if batch.len > 0 {
                on_samples(batch.start..batch.start + batch.len, &samples)?;
            }
            x0.push(samples);
        }
        let trajectory = (!paths.is_empty()).then(|| Trajectory::join(window, &paths)).transpose()?;
        Ok(Samples { x0: Tensor::cat(&x0, 0)?, trajectory })
    }

    /// The velocity at x `[B, C, H, W]` and t `[B]`, guided away from `negative` where there is one.
    fn velocity(&self, x: &Tensor, t: &Tensor, conditioning: &[Tensor], negative: Option<&[Tensor]>) -> Result<Tensor> {
        let model = &self.pipeline.model;
        let Some(negative) = negative else { return engine::velocity(model, self.params, x, t, conditioning) };
        let passes = [conditioning, negative].map(|conditioning| Pass::new(self.params, x, t, conditioning));
        let velocities = engine::velocities(model, passes.into())?;
        guide(&velocities[0], &velocities[1], self.sampler.guidance)
    }

    /// The starting noise (index 0) or that of stochastic step `index - 1`, `[B, C, H, W]`.
    fn normals(&self, requests: &[Request], batch: MicroBatch, index: u64) -> Result<Tensor> {
        let stream = |place: usize| {
            let Request { prompt, image } = &requests[place];
            Stream::new(self.seed, self.purpose, [self.iteration, prompt.index as u64, *image as u64, index])
        };
        normals(self.pipeline, batch.places().map(stream))
    }
}

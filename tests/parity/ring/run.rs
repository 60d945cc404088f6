//! Reinforcement learning of one method on the ring: the iteration of the trainer, on one rank and without prompts.

use super::law::{Look, SEED};
use super::model::layout;
use candle_core::{Device, Tensor};
use flowrl_dist::Result;
use flowrl_dist::advantage::{AdvantageMap, Scores, group_advantages};
use flowrl_dist::comm::World;
use flowrl_dist::data::Prompt;
use flowrl_dist::engine::Checkpointing;
use flowrl_dist::flow::sde::SdeConfig;
use flowrl_dist::flow::{SamplerConfig, Solver, interpolate};
use flowrl_dist::objective::{AdvantageConfig, MethodConfig, Objective, Point, Target};
use flowrl_dist::optim::{OldPolicyDecay, OptimConfig, Sharded};
use flowrl_dist::params::{Layout, Trainable};
use flowrl_dist::pipeline::Pipeline;
use flowrl_dist::policy::Policies;
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::rollout::{Request, Samples, Sampling, Trajectory, normals};
use flowrl_dist::shard::{Gradients, Reduction, Sharding, Weights};
use flowrl_dist::train::step::{self, Conditioning};

/// Groups, all of the same empty prompt.
const PROMPTS: usize = 8;
const IMAGES_PER_PROMPT: usize = 16;
const TIMESTEPS: usize = 4;
/// Of Euler's or the stochastic solver: ten of the second-order one spread points of so few dimensions too wide.
const STEPS: usize = 40;
/// The published linear schedule, which takes 500 updates to its end, in a run of a tenth of that.
const OLD_POLICY: OldPolicyDecay = OldPolicyDecay { delay: 0, rate: 0.01, max: 0.5 };

/// The stochastic steps are the first half, where the modes are decided: towards the data the gradient of a step's
/// log-probability grows as 1 / std, and training all steps on so few samples is mostly that noise, which leads off the ring.
fn sampler(solver: Solver) -> SamplerConfig {
    let sde = SdeConfig { window: Some(STEPS / 2), ..SdeConfig::default() };
    SamplerConfig { solver, steps: STEPS, shift: Some(1.0), sde, ..SamplerConfig::default() }
}

fn requests(prompts: usize, images: usize) -> Vec<Request> {
    let prompt = |index| Prompt::new(index, r#""7" in red on yellow"#); // the model does not look at it
    (0..prompts * images).map(|i| Request { prompt: prompt(i / images), image: i % images }).collect()
}

fn sample(
    pipeline: &Pipeline,
    params: &dyn Weights,
    solver: Solver,
    requests: &[Request],
    purpose: Purpose,
    iteration: u64,
) -> Result<Samples> {
    let sampler = &sampler(solver);
    Sampling { pipeline, params, sampler, micro_batch: requests.len(), seed: SEED, purpose, iteration }
        .run(requests, requests.len())
}

/// What samples of these parameters look like.
pub fn look(pipeline: &Pipeline, params: &dyn Weights) -> Result<Look> {
    let requests = requests(1, 4096);
    Look::new(&sample(pipeline, params, Solver::Euler, &requests, Purpose::Evaluation, 0)?.x0)
}

/// The advantages of a reward.
pub fn advantages(map: &AdvantageMap, rewards: Vec<f64>, groups: &[usize]) -> Result<Vec<f64>> {
    Ok(group_advantages(&[Scores::new("angle", 1.0, rewards)], groups, map)?.values)
}

/// One method's run.
pub struct Run<'a> {
    pipeline: &'a Pipeline,
    objective: Box<dyn Objective>,
    pub map: AdvantageMap,
    optim: OptimConfig,
    layout: Layout,
    state: Sharded,
    policies: Policies,
    world: World,
}

impl<'a> Run<'a> {
    pub fn new(pipeline: &'a Pipeline, method: &MethodConfig, lr: f64) -> Result<Self> {
        let map = AdvantageConfig::default().resolve(method);
        let (world, layout) = (World::solo(), layout(pipeline));
        let state = Sharded::new(&*pipeline.base, &layout, Sharding::None, &*world.device)?;
        let policies = Policies::new(&*pipeline.base, &pipeline.model.specs(), Trainable::Full, &state, true, &world)?;
        let optim = OptimConfig { lr, weight_decay: 0.0, ..OptimConfig::default() };
        Ok(Self { pipeline, objective: method.objective(&map), map, optim, layout, state, policies, world })
    }

    pub fn iterations(&mut self, count: u64, reward: &dyn Fn(&Tensor) -> Result<Vec<f64>>) -> Result<()> {
        (0..count).try_for_each(|iteration| self.iteration(iteration, reward))
    }

    fn iteration(&mut self, iteration: u64, reward: &dyn Fn(&Tensor) -> Result<Vec<f64>>) -> Result<()> {
        let required = self.objective.requirements();
        let solver = if required.trajectory { Solver::Sde } else { Solver::Euler };
        let params = if required.on_policy { &*self.policies.policy } else { &*self.policies.old };
        let requests = requests(PROMPTS, IMAGES_PER_PROMPT);
        let samples = sample(self.pipeline, params, solver, &requests, Purpose::Rollout, iteration)?;

        let groups: Vec<usize> = requests.iter().map(|r| r.prompt.index).collect();
        let advantages = advantages(&self.map, reward(&samples.x0)?, &groups)?;

        let point = self.point(iteration, &requests, &samples, &advantages)?;
        let gradients = self.gradients(&point)?;
        self.state.step(&gradients, &self.optim, self.optim.lr, &*self.world.device)?;
        self.policies.refresh_policy(&self.state)?;
        let eta = self.state.update_old(OLD_POLICY)?;
        self.policies.refresh_old(&self.state, eta)
    }

    /// Each image at a few times of the grid, all of them in one micro-batch.
    fn point(&self, iteration: u64, requests: &[Request], samples: &Samples, advantages: &[f64]) -> Result<Point> {
        let steps = samples.trajectory.as_ref().map_or(STEPS, |trajectory| trajectory.window.len());
        let stream = |purpose, sample: usize, time: usize| {
            let Request { prompt, image } = &requests[sample];
            Stream::new(SEED, purpose, [iteration, prompt.index as u64, *image as u64, time as u64])
        };
        let times = |sample| stream(Purpose::TrainTimesteps, sample, 0).permutation(steps).into_iter().take(TIMESTEPS);
        let places: Vec<(usize, usize)> =
            (0..requests.len()).flat_map(|sample| times(sample).map(move |time| (sample, time))).collect();
        let column = |value: &dyn Fn((usize, usize)) -> f64| {
            let values: Vec<f32> = places.iter().map(|&place| value(place) as f32).collect();
            Tensor::from_vec(values, places.len(), &Device::Cpu)
        };
        let sigmas = sampler(Solver::Euler).sigmas();
        let t = column(&|(_, time)| sigmas[time])?;
        let advantage = column(&|(sample, _)| advantages[sample])?;
        if let Some(trajectory) = &samples.trajectory {
            let (x_t, target) = reverse(trajectory, &places, requests.len(), &sigmas, column)?;
            return Ok(Point { x_t, t, advantage, target });
        }
        let rows = Tensor::from_vec(places.iter().map(|p| p.0 as u32).collect(), places.len(), &Device::Cpu)?;
        let x0 = samples.x0.index_select(&rows, 0)?;
        let noise = places.iter().map(|&(sample, time)| stream(Purpose::TrainNoise, sample, time));
        let eps = normals(self.pipeline, noise)?;
        Ok(Point { x_t: interpolate(&x0, &eps, &t)?, t, advantage, target: Target::Forward { x0, eps } })
    }

    /// Of the mean loss over the points.
    fn gradients(&self, point: &Point) -> Result<Tensor> {
        let (model, partition) = (&self.pipeline.model, self.state.partition());
        let unconditional = Conditioning { prompts: &[], guidance: None };
        // The first stage runs again in the backward pass, the second keeps its graph.
        let again = Checkpointing(2);
        let required = self.objective.requirements();
        let (velocities, tape) = step::velocities(model, &self.policies, required, point, unconditional, again)?;
        let samples = point.t.dim(0)?;
        let mean = Tensor::full(1.0 / samples as f32, samples, &Device::Cpu)?;
        let (_, dv) = step::differentiate(&*self.objective, point, &velocities, &mean)?;
        let gradients = Gradients::zeros(&self.layout, partition, &Device::Cpu)?;
        let mut reduction = Reduction::new(gradients, partition, &*self.world.device);
        step::accumulate(model, &*self.policies.policy, tape, &dv, &mut reduction, true)?;
        reduction.finish()
    }

    /// What samples of the policy look like.
    pub fn look(&self) -> Result<Look> {
        look(self.pipeline, &*self.policies.policy)
    }

    /// The policy's parameters.
    pub fn parameters(&self) -> Result<Vec<f32>> {
        Ok(self.state.gather_policy(&*self.world.device)?.to_vec1()?)
    }
}

/// The rollout's steps at the places.
fn reverse(
    trajectory: &Trajectory,
    places: &[(usize, usize)],
    samples: usize,
    sigmas: &[f64],
    column: impl Fn(&dyn Fn((usize, usize)) -> f64) -> candle_core::Result<Tensor>,
) -> Result<(Tensor, Target)> {
    let config = sampler(Solver::Sde).sde;
    let step = |(_, time): (usize, usize)| config.step(sigmas, time);
    let here = trajectory.rows(places)?;
    let ahead: Vec<u32> = here.iter().map(|row| row + samples as u32).collect();
    let (here, ahead) =
        (Tensor::from_vec(here, places.len(), &Device::Cpu)?, Tensor::from_vec(ahead, places.len(), &Device::Cpu)?);
    let target = Target::Reverse {
        next: trajectory.states.index_select(&ahead, 0)?,
        log_prob: trajectory.log_probs.index_select(&here, 0)?,
        x_factor: column(&|place| step(place).x)?,
        v_factor: column(&|place| step(place).v)?,
        std: column(&|place| step(place).std)?,
        rate: column(&|place| step(place).rate)?,
    };
    Ok((trajectory.states.index_select(&here, 0)?, target))
}

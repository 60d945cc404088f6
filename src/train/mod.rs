//! Training: the iteration, and the run around it.

mod points;
mod run;

pub use run::{Outcome, train};

use crate::advantage::{Advantages, group_advantages};
use crate::comm::{World, phase};
use crate::config::RunConfig;
use crate::data::{Prompt, PromptSet};
use crate::engine::{self, Gradients};
use crate::error::{Error, Result};
use crate::evaluate::share;
use crate::objective::{Frozen, Objective, Point, Terms};
use crate::observe::Metrics;
use crate::optim::Sharded;
use crate::params::Layout;
use crate::pipeline::Pipeline;
use crate::policy::Policies;
use crate::reward::{Reward, RewardScores, combine};
use crate::rng::Purpose;
use crate::rollout::{Request, micro_batches, noise, sample};
use candle_core::{DType, Device, Tensor, Var};
use points::{Points, Rollouts, weights};
use std::time::Instant;

/// Everything an iteration works on.
pub struct Trainer {
    world: World,
    config: RunConfig,
    pipeline: Pipeline,
    prompts: PromptSet,
    rewards: Vec<Box<dyn Reward>>,
    objective: Objective,
    points: Points,
    layout: Layout,
    state: Sharded,
    policies: Policies,
}

impl Trainer {
    /// Samples with the old policy, scores the images and takes the iteration's optimizer updates. One set of metrics
    /// an update, the same on every rank.
    pub fn iteration(&mut self, iteration: u64, on_phase: &mut dyn FnMut(&'static str)) -> Result<Vec<Metrics>> {
        let mut clock = Clock::new(on_phase);
        let mut shared = Metrics::default();

        // prompts -> conditioning -> samples -> images -> rewards      (this rank's share of the N images)
        clock.start("sample");
        let requests = self.requests(iteration);
        let prompts: Vec<Prompt> = requests.iter().map(|r| r.prompt.clone()).collect();
        let conditioning = self.pipeline.encode(&prompts)?;
        let noise = noise(&self.pipeline, &requests, self.config.run.seed, Purpose::Rollout, iteration)?;
        let micro_batch = self.config.batch.micro_batch;
        let x0 = sample(&self.pipeline, &self.policies.old, &self.config.sampler, &conditioning, &noise, micro_batch)?;
        check_finite(&x0, &requests, iteration)?;
        clock.start("decode");
        let images = self.pipeline.decode(&x0)?; // [n, 3, H, W]
        clock.start("reward");
        let scores = self.score(&images, &prompts)?;

        // rewards -> advantages      (every rank computes all N from the same numbers, then keeps its own)
        clock.start("gather");
        let gathered = self.gather(&scores, &prompts)?;
        let all = group_advantages(&gathered.rewards, &gathered.groups, &self.advantage_map())?;
        gathered.describe(&all, &mut shared);
        let advantages = all.values[self.share()].to_vec();
        let rollouts = Rollouts { requests, x0, conditioning, advantages };

        let mut updates = Vec::new();
        for update in 0..self.points.updates {
            // (x0, eps, t) -> velocities -> loss -> gradients
            clock.start("train");
            let mut metrics = Metrics::default();
            let gradients = self.gradients(iteration, update, &rollouts, &mut metrics)?;
            // gradients -> shard -> AdamW -> parameters
            clock.start("optimizer");
            let lr = self.config.optim.lr;
            let report = self.state.step(&gradients, &self.config.optim, lr, &*self.world.device)?;
            self.state.update_ema(self.config.ema.decay)?;
            self.policies.refresh_policy(&self.state, &self.world)?;
            metrics.set("grad_norm", report.norm);
            metrics.set("lr", lr);
            updates.push(metrics);
        }
        clock.start("old_policy");
        let eta = self.state.update_old(self.config.old_policy.schedule)?;
        self.policies.refresh_old(&self.state, eta, &self.world)?;
        shared.set("old_policy.eta", eta);
        clock.report(&mut shared);
        self.finish(iteration, updates, &shared)
    }

    /// The images that this rank samples.
    fn requests(&self, iteration: u64) -> Vec<Request> {
        let batch = &self.config.batch;
        let groups = self.prompts.draw(self.config.run.seed, iteration, batch.prompts);
        let request = |i: usize| Request {
            prompt: groups[i / batch.images_per_prompt].clone(),
            image: i % batch.images_per_prompt,
        };
        self.share().map(request).collect()
    }

    /// The part of the N images that this rank does.
    fn share(&self) -> std::ops::Range<usize> {
        let batch = &self.config.batch;
        share(batch.prompts * batch.images_per_prompt, self.world.rank(), self.world.world_size())
    }

    fn advantage_map(&self) -> crate::advantage::AdvantageMap {
        self.config.advantage.resolve(self.config.method.name)
    }

    fn score(&self, images: &Tensor, prompts: &[Prompt]) -> Result<Vec<RewardScores>> {
        let mut all = Vec::with_capacity(self.rewards.len());
        for (reward, config) in self.rewards.iter().zip(&self.config.reward) {
            let scores = reward.score(images, prompts)?;
            all.push(RewardScores { name: reward.name().to_owned(), weight: config.weight, scores });
        }
        Ok(all)
    }

    /// All ranks' scores, by one all-gather of rows (prompt, summed reward, each reward's score), in f64. A score that
    /// does not apply travels as NaN; one that is not finite was refused before.
    fn gather(&self, scores: &[RewardScores], prompts: &[Prompt]) -> Result<Gathered> {
        let sums = combine(scores, prompts)?;
        let width = 2 + scores.len();
        let ranks = self.world.world_size();
        let count = self.config.batch.prompts * self.config.batch.images_per_prompt;
        let sizes: Vec<usize> = (0..ranks).map(|r| share(count, r, ranks).len()).collect();
        let largest = sizes.iter().copied().max().unwrap_or(0);
        let mut rows = vec![0.0; largest * width];
        for (i, row) in rows.chunks_exact_mut(width).take(prompts.len()).enumerate() {
            row[0] = prompts[i].index as f64;
            row[1] = sums[i];
            scores.iter().zip(&mut row[2..]).for_each(|(s, cell)| *cell = s.scores[i].unwrap_or(f64::NAN));
        }
        let all = self.world.host.all_gather(&Tensor::from_vec(rows, largest * width, &Device::Cpu)?)?;
        let all = all.to_vec1::<f64>()?;
        let rows: Vec<&[f64]> = all
            .chunks_exact(largest * width)
            .zip(&sizes)
            .flat_map(|(rank, &size)| rank.chunks_exact(width).take(size))
            .collect(); // [N]
        Ok(Gathered {
            groups: rows.iter().map(|r| r[0] as usize).collect(),
            rewards: rows.iter().map(|r| r[1]).collect(),
            scores: (0..scores.len())
                .map(|k| (scores[k].name.clone(), rows.iter().map(|r| r[2 + k]).collect()))
                .collect(),
        })
    }

    /// This rank's sum of gradients for an update, `[R S]`: local over all micro-batches and timesteps, reduced once.
    fn gradients(&self, iteration: u64, update: usize, rollouts: &Rollouts, metrics: &mut Metrics) -> Result<Tensor> {
        let device = &self.pipeline.device;
        let points = self.points.of_update(iteration, update, &rollouts.requests);
        let global = self.points.global_count(update);
        let mut gradients = Gradients::zeros(&self.layout, self.state.padded_len(), device)?;
        for name in ["loss", "loss.policy", "loss.kl"] {
            metrics.add_mean(name, 0.0, 0.0); // known on every rank, even without points
        }
        for batch in micro_batches(points.len(), self.config.batch.micro_batch) {
            let (point, conditioning) = self.points.micro_batch(&self.pipeline, rollouts, iteration, &points, batch)?;
            let (v, tape) =
                engine::forward(&self.pipeline.model, &self.policies.policy, &point.x_t, &point.t, &conditioning)?;
            let frozen = self.frozen(&point, &conditioning, &v)?;
            let (terms, dv) = self.differentiate(&point, &v, &frozen, &weights(batch, global, device)?)?;
            engine::backward(&self.pipeline.model, &self.policies.policy, tape, &dv, &mut gradients)?;
            for (name, values) in [("loss", &terms.loss), ("loss.policy", &terms.policy), ("loss.kl", &terms.kl)] {
                let values = values.narrow(0, 0, batch.len)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                values.into_iter().for_each(|value| metrics.add_mean(name, value, 1.0));
            }
        }
        gradients.finish(!points.is_empty())
    }

    /// The velocities that the objective needs beside the policy's `v`.
    fn frozen(&self, point: &Point, conditioning: &[Tensor], v: &Tensor) -> Result<Frozen> {
        let of = |params| engine::velocity(&self.pipeline.model, params, &point.x_t, &point.t, conditioning);
        let needs = self.objective.needs();
        let old = match (needs.old, self.policies.old_is_policy) {
            (false, _) => None,
            (true, true) => Some(v.clone()), // the same parameters give the same velocity
            (true, false) => Some(of(&self.policies.old)?),
        };
        let reference = needs.reference.then(|| of(&self.policies.reference)).transpose()?;
        Ok(Frozen { old, reference })
    }

    /// The losses `[B]` and the gradient of their weighted sum with respect to the velocity.
    fn differentiate(&self, point: &Point, v: &Tensor, frozen: &Frozen, weights: &Tensor) -> Result<(Terms, Tensor)> {
        let v = Var::from_tensor(v)?;
        let terms = self.objective.terms(point, v.as_tensor(), frozen)?;
        let loss = (&terms.loss * weights)?.sum_all()?;
        let dv = loss.backward()?.remove(v.as_tensor());
        let dv = dv.ok_or_else(|| Error::Failed("the objective gives the velocity no gradient".into()))?;
        Ok((terms, dv))
    }

    /// Joins the ranks' metrics: what belongs to the iteration stands in each of its updates.
    fn finish(&self, iteration: u64, updates: Vec<Metrics>, shared: &Metrics) -> Result<Vec<Metrics>> {
        let mut shared = shared.clone();
        shared.reduce(&*self.world.host)?;
        let joined = |mut metrics: Metrics| -> Result<Metrics> {
            metrics.reduce(&*self.world.host)?;
            let mut all = Metrics::default();
            all.set("iteration", iteration as f64);
            shared.iter().chain(metrics.iter()).for_each(|(name, value)| all.set(name, value));
            Ok(all)
        };
        updates.into_iter().map(joined).collect()
    }
}

/// Refuses samples that are not finite: the policy has diverged, and no reward could be computed.
fn check_finite(x0: &Tensor, requests: &[Request], iteration: u64) -> Result<()> {
    let sums = x0.flatten_from(1)?.abs()?.sum(1)?.to_vec1::<f32>()?; // [n]
    match sums.iter().position(|sum| !sum.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite(format!(
            "iteration {iteration}: the sample of prompt {} {:?}, image {}, is not finite: the policy has diverged; start \
             again from an earlier checkpoint with a smaller optim.lr",
            requests[i].prompt.index, requests[i].prompt.text, requests[i].image
        ))),
    }
}

/// All ranks' rewards of an iteration, in the order of the images.
struct Gathered {
    groups: Vec<usize>,
    rewards: Vec<f64>,
    /// Each reward's scores; NaN where it does not apply.
    scores: Vec<(String, Vec<f64>)>,
}

impl Gathered {
    fn describe(&self, advantages: &Advantages, metrics: &mut Metrics) {
        for (name, scores) in &self.scores {
            let known: Vec<f64> = scores.iter().copied().filter(|s| !s.is_nan()).collect();
            let count = known.len().max(1) as f64;
            let mean = known.iter().sum::<f64>() / count;
            let variance = known.iter().map(|s| (s - mean) * (s - mean)).sum::<f64>() / count;
            metrics.set(&format!("reward.{name}.mean"), mean);
            metrics.set(&format!("reward.{name}.std"), variance.sqrt());
        }
        metrics.set("advantage.zero_groups", advantages.zero_groups);
        metrics.set("advantage.clipped", advantages.clipped);
        metrics.set("advantage.effective", advantages.effective);
        metrics.set("images", self.rewards.len() as f64);
    }
}

/// Seconds of each phase; of several ranks, the slowest one's.
struct Clock<'a> {
    on_phase: &'a mut dyn FnMut(&'static str),
    begun: Instant,
    current: Option<(&'static str, Instant)>,
    seconds: Vec<(&'static str, f64)>,
}

impl<'a> Clock<'a> {
    fn new(on_phase: &'a mut dyn FnMut(&'static str)) -> Self {
        Self { on_phase, begun: Instant::now(), current: None, seconds: Vec::new() }
    }

    /// Ends the phase before and begins this one: on the clock, on the bar and in what a watchdog would say.
    fn start(&mut self, name: &'static str) {
        self.stop();
        phase(name);
        (self.on_phase)(name);
        self.current = Some((name, Instant::now()));
    }

    fn stop(&mut self) {
        if let Some((name, since)) = self.current.take() {
            let seconds = since.elapsed().as_secs_f64();
            match self.seconds.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sum)) => *sum += seconds,
                None => self.seconds.push((name, seconds)),
            }
        }
    }

    fn report(mut self, metrics: &mut Metrics) {
        self.stop();
        self.seconds.iter().for_each(|(name, s)| metrics.max(&format!("time.{name}"), *s));
        metrics.max("time.total", self.begun.elapsed().as_secs_f64());
    }
}

//! Training: the iteration, and the run around it.

mod clock;
mod gather;
mod inputs;
mod lock;
mod outlook;
mod points;
mod preflight;
mod records;
mod resume;
mod run;
mod saving;
mod stages;

pub use run::{Outcome, train};

use crate::batching::{in_step, micro_batches, share};
use crate::comm::{World, agreed, exchange};
use crate::config::RunConfig;
use crate::data::Prompt;
use crate::device;
use crate::engine::{self, Pass, Tape};
use crate::error::{Error, Result};
use crate::evaluate::describe_scalings;
use crate::flow::guide;
use crate::objective::{Losses, Objective, Point, TargetVelocities};
use crate::observe::Metrics;
use crate::optim::{NotFinite, Sharded};
use crate::params::Layout;
use crate::pipeline::Pipeline;
use crate::policy::Policies;
use crate::reward::{Rewards, Scoring};
use crate::rng::Purpose;
use crate::rollout::{Request, Samples, Sampling};
use crate::shard::{Gradients, Reduction, Sharding};
use candle_core::{DType, Tensor, Var};
use clock::Clock;
use points::{Points, Rollouts, weights};
use stages::Stages;
use std::ops::Range;

/// Everything an iteration works on.
pub struct Trainer {
    world: World,
    config: RunConfig,
    pipeline: Pipeline,
    stages: Stages,
    rewards: Rewards,
    objective: Box<dyn Objective>,
    points: Points,
    layout: Layout,
    state: Sharded,
    policies: Policies,
    /// Updates and iterations that were left out because something was not finite.
    skipped: u64,
}

impl Trainer {
    /// Samples with the old policy, scores the images and takes the iteration's optimizer updates. One set of metrics
    /// an update, the same on every rank.
    pub fn iteration(&mut self, iteration: u64, on_phase: &mut dyn FnMut(&'static str)) -> Result<Vec<Metrics>> {
        let mut clock = Clock::new(on_phase);
        let mut shared = Metrics::default();
        self.begin_stage(iteration, &mut shared);

        // prompts -> conditioning -> samples -> images -> rewards      (this rank's share of the N images)
        clock.start("sample");
        let requests = self.requests(iteration);
        let prompts: Vec<Prompt> = requests.iter().map(|r| r.prompt.clone()).collect();
        let sent = self.world.sent();
        let mut scoring = Scoring::new(&self.rewards, self.config.parallel.reward_overlap, &self.pipeline.device)?;
        let mut finite = Ok(());
        let sampling = self.sampling(iteration);
        let on_samples = &mut |places: Range<usize>, x0: &Tensor| {
            if finite.is_ok() {
                finite = check_finite(x0, &requests[places.clone()], iteration);
            }
            if finite.is_ok() {
                clock.start("decode");
                scoring.add(places.start, &self.pipeline.decode(x0)?, &prompts[places])?; // [B, 3, H, W]
                clock.start("sample");
            }
            Ok(())
        };
        let Samples { x0, trajectory } = sampling.run_with(&requests, self.max_per_rank(), on_samples)?;
        shared.set("sent.rollout", (self.world.sent() - sent) as f64);
        clock.start("reward");
        let scores = finite.and_then(|()| self.scored(scoring, &prompts, &mut shared));

        // rewards -> advantages      (every rank computes all N from the same numbers, then keeps its own)
        clock.start("gather");
        let gathered = self.gather(&agreed(scores, &*self.world.host)?, &prompts)?;
        let all = gathered.advantages(&self.config.advantage.resolve(&self.config.method))?;
        gathered.describe(&all, &mut shared);
        describe_scalings(&self.rewards, "reward", &mut shared);
        let advantages = all.values[self.share()].to_vec();
        let dropped = gathered.dropped;
        let rollouts = Rollouts { requests, x0, trajectory, advantages, dropped };

        let mut updates = Vec::new();
        for update in 0..self.points.updates {
            // (x0, eps, t) -> velocities -> loss -> gradients
            clock.start("train");
            let mut metrics = Metrics::default();
            let sent = self.world.sent();
            let reduction = self.gradients(iteration, update, &rollouts, &mut metrics)?;
            clock.start("reduce");
            let gradient = reduction.finish()?; // [S]
            // gradients -> shard -> AdamW -> parameters
            clock.start("optimizer");
            let lr = self.config.optim.lr;
            let report = match self.state.step(&gradient, &self.config.optim, lr, &*self.world.device) {
                Err(Error::NotFinite(what)) if self.config.optim.not_finite == NotFinite::Skip => {
                    self.skip(&what);
                    continue;
                }
                report => report?,
            };
            self.state.update_ema(self.config.ema.decay)?;
            self.policies.refresh_policy(&self.state)?;
            metrics.set("sent.update", (self.world.sent() - sent) as f64);
            metrics.set("grad_norm", report.norm);
            metrics.set("lr", lr);
            updates.push(metrics);
        }
        clock.start("old_policy");
        let sent = self.world.sent();
        let eta = self.state.update_old(self.config.old_policy_decay())?;
        self.policies.refresh_old(&self.state, eta)?;
        shared.set("sent.old_policy", (self.world.sent() - sent) as f64);
        shared.set("old_policy.eta", eta);
        shared.set("skipped", self.skipped as f64);
        clock.report(&mut shared);
        if let Some(gigabytes) = device::memory(&self.pipeline.device)? {
            shared.max("memory.gpu_gb", gigabytes);
        }
        self.finish(iteration, updates, &shared)
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

    /// How an iteration's images are sampled: by the old policy, or by the policy itself where the objective asks for it.
    fn sampling(&self, iteration: u64) -> Sampling<'_> {
        Sampling {
            pipeline: &self.pipeline,
            params: if self.objective.requirements().on_policy { &*self.policies.policy } else { &*self.policies.old },
            sampler: &self.config.sampler,
            micro_batch: self.config.batch.micro_batch,
            seed: self.config.run.seed,
            purpose: Purpose::Rollout,
            iteration,
        }
    }

    /// Compares what must be the same on every rank: the policy and the old policy, and the optimizer's state where
    /// nothing is shared out. Where all is in parts no rank holds what another one does.
    ///
    /// # Errors
    /// The ranks that differ from rank 0: memory, a device or the network gave wrong numbers.
    fn check_replicas(&self) -> Result<()> {
        if self.world.host.world_size() == 1 || self.state.sharding() == Sharding::Full {
            return Ok(());
        }
        let digests = exchange(&*self.world.host, &(self.policies.digest()?, self.state.digest()?))?;
        let what = match digests.iter().all(|(parameters, _)| *parameters == digests[0].0) {
            true => "masters, moments or EMA",
            false => "parameters",
        };
        let differing = (1..digests.len()).filter(|&rank| digests[rank] != digests[0]);
        let differing: Vec<String> = differing.map(|rank| rank.to_string()).collect();
        if differing.is_empty() {
            return Ok(());
        }
        Err(Error::Failed(format!(
            "update {}: the {what} of rank {} differ from rank 0's, which must be equal to the bit: a fault of memory, \
             device or network; start again with --resume auto, on other nodes if it comes back",
            self.state.update,
            differing.join(", ")
        )))
    }

    /// Counts what is left out because it is not finite; the same on every rank.
    fn skip(&mut self, what: &str) {
        self.skipped += 1;
        tracing::warn!("left out ({} so far): {what}", self.skipped);
    }

    /// The images that this rank samples.
    fn requests(&self, iteration: u64) -> Vec<Request> {
        let batch = &self.config.batch;
        let groups = self.stages.draw(iteration, batch.prompts);
        let request = |i: usize| Request {
            prompt: groups[i / batch.images_per_prompt].clone(),
            image: i % batch.images_per_prompt,
        };
        self.share().map(request).collect()
    }

    /// The part of the N images that this rank does.
    fn share(&self) -> Range<usize> {
        let batch = &self.config.batch;
        share(batch.prompts * batch.images_per_prompt, self.world.rank(), self.world.world_size())
    }

    /// The images of the rank that has most.
    fn max_per_rank(&self) -> usize {
        let batch = &self.config.batch;
        (batch.prompts * batch.images_per_prompt).div_ceil(self.world.world_size())
    }

    /// The gradients of an update: summed here over all micro-batches and timesteps, and then over the ranks, each stage
    /// as soon as the last micro-batch is through it.
    fn gradients(
        &self,
        iteration: u64,
        update: usize,
        rollouts: &Rollouts,
        metrics: &mut Metrics,
    ) -> Result<Reduction<'_>> {
        let device = &self.pipeline.device;
        let mut points = self.points.of_update(iteration, update, &rollouts.requests);
        points.retain(|&(sample, _)| !rollouts.dropped.contains(&rollouts.requests[sample].prompt.index));
        let global = self.points.global_count(update, rollouts.dropped.len());
        let partition = self.state.partition();
        let gradients = Gradients::zeros(&self.layout, partition, device)?;
        let mut reduction = Reduction::new(gradients, partition, &*self.world.device);
        for name in ["loss", "loss.policy", "loss.kl"] {
            metrics.add_mean(name, 0.0, 0.0); // known on every rank, even without points
        }
        let policy = &*self.policies.policy;
        let max_per_rank = in_step(policy.is_collective(), self.points.max_per_rank(update, self.world.world_size()));
        let mut batches = micro_batches(points.len(), self.config.batch.micro_batch, max_per_rank);
        let mut losses = Vec::new();
        while let Some(batch) = batches.next() {
            let last = batches.len() == 0;
            let (point, prompts) = self.points.micro_batch(&self.pipeline, rollouts, iteration, &points, batch)?;
            let (v, others, tape) = self.velocities(&point, &prompts)?;
            let (terms, dv) = self.differentiate(&point, &v, &others, &weights(batch, global, device)?)?;
            engine::backward(&self.pipeline.model, policy, tape, &dv, |stage, gradients| {
                reduction.add(stage, gradients)?;
                if last { reduction.begin(stage) } else { Ok(()) }
            })?;
            if batch.len > 0 {
                losses.push(([terms.loss, terms.policy, terms.kl].map(|values| values.detach()), batch.len));
            }
        }
        // Only now: a GPU would stand still while each micro-batch's numbers are waited for and the next one is prepared.
        for (terms, len) in &losses {
            for (name, values) in ["loss", "loss.policy", "loss.kl"].into_iter().zip(terms) {
                let values = values.narrow(0, 0, *len)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                values.into_iter().for_each(|value| metrics.add_mean(name, value, 1.0));
            }
        }
        Ok(reduction)
    }

    /// The policy's velocity, those that the objective needs beside it, and what the policy's backward pass needs.
    fn velocities(&self, point: &Point, prompts: &[Prompt]) -> Result<(Tensor, Others, Tape)> {
        let Policies { policy, old, reference, old_is_policy, .. } = &self.policies;
        let needs = self.objective.requirements();
        // Rollout steps are trained with the guidance that they were sampled with; samples and noise know of none.
        let guidance = if needs.trajectory { self.config.sampler.guidance } else { 1.0 };
        let conditioning = &*self.pipeline.encode(prompts)?;
        let negative = (guidance != 1.0).then(|| self.pipeline.negative(prompts)).transpose()?;
        let pass = |params, conditioning| Pass::new(params, &point.x_t, &point.t, conditioning);

        let old = (needs.old && !old_is_policy).then_some(&**old);
        let reference = needs.reference.then_some(&**reference);
        let mut passes = Vec::new();
        for params in old.into_iter().chain(reference) {
            passes.push(pass(params, conditioning));
            passes.extend(negative.iter().map(|negative| pass(params, negative)));
        }
        passes.extend(negative.iter().map(|negative| pass(&**policy, negative)));
        let checkpointing = self.config.parallel.checkpoint_activations;
        let own = pass(&**policy, conditioning);
        let (v, velocities, tape) = engine::forward_beside(&self.pipeline.model, own, passes, checkpointing)?;

        let mut velocities = velocities.into_iter();
        let mut next = || velocities.next().ok_or_else(|| Error::Failed("a pass has no velocity".into()));
        let mut guided = || match negative {
            None => next(),
            Some(_) => guide(&next()?, &next()?, guidance),
        };
        let old = match old {
            Some(_) => Some(guided()?),
            None => needs.old.then(|| v.clone()), // the same parameters give the same velocity
        };
        let reference = reference.map(|_| guided()).transpose()?;
        let negative = negative.is_some().then(next).transpose()?.map(|v| (v, guidance));
        Ok((v, Others { frozen: TargetVelocities { old, reference }, negative }, tape))
    }

    /// The losses `[B]` and the gradient of their weighted sum with respect to the velocity.
    fn differentiate(&self, point: &Point, v: &Tensor, others: &Others, weights: &Tensor) -> Result<(Losses, Tensor)> {
        let v = Var::from_tensor(v)?;
        let guided = match &others.negative {
            None => v.as_tensor().clone(),
            Some((negative, guidance)) => guide(&v, negative, *guidance)?,
        };
        let terms = self.objective.losses(point, &guided, &others.frozen)?;
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

/// The velocities beside the policy's own.
struct Others {
    frozen: TargetVelocities,
    /// The policy's without a prompt, and the guidance, where the rollouts were guided; no gradient flows through it.
    negative: Option<(Tensor, f64)>,
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

#[cfg(test)]
mod failing_rewards;
#[cfg(test)]
mod overlap;
#[cfg(test)]
mod tests;

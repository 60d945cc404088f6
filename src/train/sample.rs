//! The images of an iteration: this rank's share, scored while the next ones are sampled.

use super::Trainer;
use super::gather::ScoreTable;
use super::meter::Meter;
use crate::batching::share;
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::reward::Scoring;
use crate::rng::Purpose;
use crate::rollout::{Request, Samples, Sampling};
use candle_core::Tensor;
use std::ops::Range;

impl Trainer {
    /// The images that this rank samples.
    pub(super) fn requests(&self, iteration: u64) -> Vec<Request> {
        let batch = &self.config.batch;
        let groups = self.stages.draw(iteration, batch.prompts);
        let request = |i: usize| Request {
            prompt: groups[i / batch.images_per_prompt].clone(),
            image: i % batch.images_per_prompt,
        };
        self.share().map(request).collect()
    }

    /// The part of the N images that this rank does.
    pub(super) fn share(&self) -> Range<usize> {
        let batch = &self.config.batch;
        share(batch.prompts * batch.images_per_prompt, self.world.rank(), self.world.world_size())
    }

    /// The images of the rank that has most.
    fn max_per_rank(&self) -> usize {
        let batch = &self.config.batch;
        (batch.prompts * batch.images_per_prompt).div_ceil(self.world.world_size())
    }

    /// How an iteration's images are sampled: by the old policy, or by the policy itself where the
    /// objective asks for it.
    pub(super) fn sampling(&self, iteration: u64) -> Sampling<'_> {
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

    /// Samples this rank's requests and scores the images of each micro-batch while the next one is
    /// sampled. Scores, or why there are none, are this rank's alone; the samples' error is every
    /// rank's.
    pub(super) fn sample_and_score(
        &self,
        iteration: u64,
        requests: &[Request],
        meter: &mut Meter,
    ) -> Result<(Samples, Result<ScoreTable>)> {
        let prompts: Vec<Prompt> = requests.iter().map(|request| request.prompt.clone()).collect();
        meter.phase("sample");
        let mut scoring = Scoring::new(&self.rewards, self.config.parallel.reward_overlap, &self.pipeline.device)?;
        let mut finite = Ok(());
        let on_samples = &mut |places: Range<usize>, x0: &Tensor| {
            if finite.is_ok() {
                finite = check_finite(x0, &requests[places.clone()], iteration);
            }
            if finite.is_ok() {
                meter.phase("decode");
                scoring.add(places.start, &self.pipeline.decode(x0)?, &prompts[places])?; // [B, 3, H, W]
                meter.phase("sample");
            }
            Ok(())
        };
        let samples = self.sampling(iteration).run_with(requests, self.max_per_rank(), on_samples)?;
        meter.phase("reward");
        let scores = finite.and_then(|()| self.own_scores(scoring, &prompts, meter));
        Ok((samples, scores))
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

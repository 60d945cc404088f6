//! Scores of fixed prompts on fixed noise: what a run is judged by.

use crate::advantage::Score;
use crate::batching::{in_step, micro_batches, share};
use crate::comm::{Communicator, ReduceOp, World, agreed, exchange};
use crate::config::RunConfig;
use crate::data::Prompt;
use crate::error::Result;
use crate::flow::SamplerConfig;
use crate::observe::Metrics;
use crate::pipeline::Pipeline;
use crate::reward::{Overlap, Reward, RewardConfig, Rewards, ScoreResult, Scoring, describe_scalings};
use crate::rng::Purpose;
use crate::rollout::{Request, Sampling};
use crate::shard::Weights;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// What an evaluation reports: the rewards of the run, and those that its base model is always judged by.
pub fn evaluated(config: &RunConfig) -> Vec<RewardConfig> {
    let mut all = config.reward.clone();
    for &name in config.model.kind.eval_rewards() {
        if all.iter().all(|reward| reward.kind() != name) {
            all.push(RewardConfig::new(name));
        }
    }
    all
}

/// The images of an evaluation that a person looks at.
pub struct Gallery {
    /// `[n, 3, H, W]` in [0, 1], large ones made smaller.
    pub images: Tensor,
    /// Their prompts, each with the image's score by the first reward before it.
    pub captions: Vec<String>,
}

/// What is evaluated, the same each time.
pub struct Evaluation<'a> {
    /// The prompts.
    pub prompts: &'a [Prompt],
    /// Images of each prompt.
    pub images_per_prompt: usize,
    /// The solver and its grid.
    pub sampler: &'a SamplerConfig,
    /// Samples that go through the model at once.
    pub micro_batch: usize,
    /// Seed of the noise.
    pub seed: u64,
    /// Whether images are scored while the next ones are sampled.
    pub overlap: Overlap,
}

/// Images that the gallery shows, one for each of the first prompts.
const GALLERY: usize = 24;
/// Their longest side in pixels: every rank gets them all.
const SIDE: usize = 256;
/// Images that a rank has at once, or a micro-batch if that is more: memory does not grow with the number of prompts.
const AT_ONCE: usize = 32;

impl Evaluation<'_> {
    /// `eval.reward.NAME.mean` for every reward, `eval.exact` (share of texts that OCR read without a fault) and
    /// `eval.images`, the same on every rank; and the gallery. Each image is sampled once, by one rank.
    ///
    /// If scores could not be computed and the configuration allows the run to go on, `eval.failed` is their number and
    /// `eval.reward.NAME.scored` the number of images behind a mean; otherwise neither is there.
    pub fn run(
        &self,
        pipeline: &Pipeline,
        params: &dyn Weights,
        rewards: &Rewards,
        world: &World,
    ) -> Result<(Metrics, Gallery)> {
        let count = self.prompts.len() * self.images_per_prompt;
        let mine = share(count, world.rank(), world.world_size());
        let max_per_rank = count.div_ceil(world.world_size());
        let request = |i: usize| Request {
            prompt: self.prompts[i / self.images_per_prompt].clone(),
            image: i % self.images_per_prompt,
        };
        let sampling = Sampling {
            pipeline,
            params,
            sampler: self.sampler,
            micro_batch: self.micro_batch,
            seed: self.seed,
            purpose: Purpose::Evaluation,
            iteration: 0,
        };
        let mut scores: Result<Vec<ScoreResult>> = Ok(vec![ScoreResult::default(); rewards.len()]);
        let (height, width) = pipeline.picture();
        let shrink = height.max(width).div_ceil(SIDE);
        let size = (3, height / shrink, width / shrink);
        let pixels = 3 * size.1 * size.2;
        let shown = self.prompts.len().min(GALLERY);
        let mut gallery = vec![0; shown * pixels]; // this rank's pictures in their places
        let at_once = AT_ONCE.next_multiple_of(self.micro_batch);
        let batches = micro_batches(mine.len(), at_once, in_step(params.is_collective(), max_per_rank));
        for (index, batch) in batches.enumerate() {
            let own = mine.start + batch.start..mine.start + batch.start + batch.len;
            // Running the model can be collective: a rank without images samples one all the same, and throws it away.
            let sampled = if own.is_empty() { 0..1 } else { own.clone() };
            let requests: Vec<Request> = sampled.map(request).collect();
            let prompts: Vec<Prompt> = requests.iter().map(|r| r.prompt.clone()).collect();
            let mut scoring = Scoring::new(rewards, self.overlap, &pipeline.device)?;
            let on_samples = &mut |places: Range<usize>, x0: &Tensor| {
                if own.is_empty() {
                    return Ok(());
                }
                let images = pipeline.decode(x0)?;
                if scores.is_ok() {
                    scoring.add(places.start, &images, &prompts[places.clone()])?;
                }
                for (i, request) in requests[places.clone()].iter().enumerate() {
                    let place = (own.start + places.start + i) / self.images_per_prompt;
                    if request.image == 0 && place < shown {
                        let small = images.narrow(0, i, 1)?.avg_pool2d(shrink)?;
                        let bytes = ((small * 255.0)?.round()?).to_dtype(DType::U8)?;
                        let bytes = bytes.flatten_all()?.to_vec1::<u8>()?;
                        gallery[place * pixels..(place + 1) * pixels].copy_from_slice(&bytes);
                    }
                }
                Ok(())
            };
            sampling.run_with(&requests, at_once.min(max_per_rank - index * at_once), on_samples)?;
            scores = scores.and_then(|mut scores| {
                let (results, _) = scoring.finish()?;
                results.into_iter().zip(&mut scores).for_each(|(result, all)| all.append(result));
                Ok(scores)
            });
        }
        let all = exchange(&*world.host, &agreed(scores, &*world.host)?)?;
        let mut metrics = summary(rewards, &all, count);
        if let (0, Some(failed)) = (world.rank(), metrics.get("eval.failed")) {
            tracing::warn!(
                "evaluation: {failed} scores could not be had: the means are of the others, and it names no best checkpoint"
            );
        }
        describe_scalings(rewards, "eval.reward", &mut metrics);
        // The ranks' parts follow each other, so these are the images in their order.
        let first: Vec<Score> = all.iter().filter_map(|rank| rank.first()).flat_map(|a| a.scores.clone()).collect();
        let caption =
            |(place, prompt): (usize, &Prompt)| match (rewards.first(), first.get(place * self.images_per_prompt)) {
                (Some(reward), Some(Score::Value(score))) => format!("{} {score:.2}: {}", reward.name(), prompt.text),
                _ => prompt.text.to_string(),
            };
        let captions = self.prompts[..shown].iter().enumerate().map(caption).collect();
        Ok((metrics, Gallery { images: joined(gallery, size, &*world.host)?, captions }))
    }
}

/// What an evaluation of `count` images reports; `all`: rank, reward.
fn summary(rewards: &[Box<dyn Reward>], all: &[Vec<ScoreResult>], count: usize) -> Metrics {
    let mut metrics = Metrics::default();
    let mut all_failed = 0;
    for (index, reward) in rewards.iter().enumerate() {
        let of_reward = || all.iter().flat_map(|rank| &rank[index].scores);
        let scores: Vec<f64> = of_reward().filter_map(|score| score.value()).collect();
        let failed = of_reward().filter(|&&score| score == Score::Failed).count();
        if failed > 0 {
            metrics.set(&format!("eval.reward.{}.scored", reward.name()), scores.len() as f64);
            all_failed += failed;
        }
        if scores.is_empty() {
            continue;
        }
        metrics.set(&format!("eval.reward.{}.mean", reward.name()), mean(&scores));
        if reward.name() == "ocr" {
            let exact = scores.iter().filter(|&&s| s == 1.0).count();
            metrics.set("eval.exact", exact as f64 / scores.len() as f64);
        }
    }
    if all_failed > 0 {
        metrics.set("eval.failed", all_failed as f64);
    }
    metrics.set("eval.images", count as f64);
    metrics
}

/// The number that evaluations are compared by: the mean of the run's `first` reward. None if a score could not be computed,
/// because the mean would be over fewer images than in other evaluations.
pub fn main_reward(first: &str, metrics: &Metrics) -> Option<f64> {
    match metrics.get("eval.failed") {
        Some(_) => None,
        None => metrics.get(&format!("eval.reward.{first}.mean")),
    }
}

/// The pictures `[n, 3, H, W]` of all ranks in [0, 1], each of which is one rank's, and black on the others.
fn joined(own: Vec<u8>, size: (usize, usize, usize), comm: &dyn Communicator) -> Result<Tensor> {
    let len = own.len();
    // A sum of bytes sends each picture once, however many ranks there are.
    let all = comm.all_reduce(&Tensor::from_vec(own, len, &Device::Cpu)?, ReduceOp::Sum)?;
    let (channels, height, width) = size;
    Ok((all.to_dtype(DType::F32)?.reshape(((), channels, height, width))? / 255.0)?)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::{RewardKind, build};

    /// Two ranks with two images each, of which the server could not score some.
    #[test]
    fn an_evaluation_with_missing_scores_is_not_compared_with_whole_ones() -> Result<()> {
        let kinds = [RewardKind::JpegCompressibility, RewardKind::Colour];
        let mut config = RunConfig::load(None, &[])?;
        config.reward = kinds.map(RewardConfig::new).to_vec();
        let rewards = build(&config.reward, 1)?;
        let whole = |scores: [f64; 2]| ScoreResult { scores: scores.map(Score::Value).to_vec(), unavailable: false };
        let colours = [whole([0.0, 1.0]), whole([1.0, 1.0])];
        let of = |first: [ScoreResult; 2]| {
            let all: Vec<Vec<ScoreResult>> = first.into_iter().zip(colours.clone()).map(|(a, b)| vec![a, b]).collect();
            summary(&rewards, &all, 4)
        };
        let metrics = of([whole([1.0, 2.0]), whole([3.0, 4.0])]);
        assert_eq!(main_reward("jpeg-compressibility", &metrics), Some(2.5));
        let expected =
            [("eval.reward.jpeg-compressibility.mean", 2.5), ("eval.reward.colour.mean", 0.75), ("eval.images", 4.0)];
        assert_eq!(metrics.iter().collect::<Vec<_>>(), expected);

        let half = ScoreResult { scores: vec![Score::Value(9.0), Score::Failed], unavailable: false };
        let metrics = of([half, whole([3.0, 4.0])]);
        assert_eq!(main_reward("jpeg-compressibility", &metrics), None);
        let names = ["eval.reward.jpeg-compressibility.scored", "eval.failed", "eval.images"];
        assert_eq!(names.map(|name| metrics.get(name)), [Some(3.0), Some(1.0), Some(4.0)]);

        // Not even where another reward was scored in full.
        let none = || ScoreResult { scores: vec![Score::Failed; 2], unavailable: true };
        let metrics = of([none(), none()]);
        assert_eq!(main_reward("jpeg-compressibility", &metrics), None);
        assert_eq!(names.map(|name| metrics.get(name)), [Some(0.0), Some(4.0), Some(4.0)]);
        Ok(())
    }
}

//! Scores of fixed prompts on fixed noise: what a run is judged by.

use crate::comm::{Communicator, ReduceOp, World, agreed, exchange};
use crate::config::RunConfig;
use crate::data::Prompt;
use crate::error::Result;
use crate::flow::SamplerConfig;
use crate::observe::Metrics;
use crate::pipeline::{Kind, Pipeline};
use crate::plan::share;
use crate::reward::{Overlap, Reward, RewardConfig, RewardKind, Rewards, Scoring};
use crate::rng::Purpose;
use crate::rollout::{Request, Sampling, busiest, micro_batches};
use crate::shard::Weights;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// What an evaluation reports: the rewards that are trained, and the embedded task's checks that never are.
pub fn evaluated(config: &RunConfig) -> Vec<RewardConfig> {
    let mut all = config.reward.clone();
    let checks: &[RewardKind] = match config.model.kind {
        Kind::Glyphs => &[RewardKind::Ocr, RewardKind::Colour],
        Kind::Sd35Medium => &[],
    };
    for &name in checks {
        if all.iter().all(|r| r.name != name) {
            all.push(RewardConfig::new(name));
        }
    }
    all
}

/// The images of an evaluation that a person looks at.
pub struct Gallery {
    /// `[n, 3, H, W]` in [0, 1], large ones made smaller.
    pub images: Tensor,
    /// Their prompts.
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
    pub fn run(
        &self,
        pipeline: &Pipeline,
        params: &dyn Weights,
        rewards: &Rewards,
        world: &World,
    ) -> Result<(Metrics, Gallery)> {
        let count = self.prompts.len() * self.images_per_prompt;
        let mine = share(count, world.rank(), world.world_size());
        let images_per_rank = count.div_ceil(world.world_size());
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
        let mut scores: Result<Vec<Vec<Option<f64>>>> = Ok(vec![Vec::new(); rewards.len()]);
        let (height, width) = pipeline.picture();
        let shrink = height.max(width).div_ceil(SIDE);
        let size = (3, height / shrink, width / shrink);
        let pixels = 3 * size.1 * size.2;
        let shown = self.prompts.len().min(GALLERY);
        let mut gallery = vec![0; shown * pixels]; // this rank's pictures in their places
        let at_once = AT_ONCE.next_multiple_of(self.micro_batch);
        let batches = micro_batches(mine.len(), at_once, busiest(params, images_per_rank));
        for (index, batch) in batches.enumerate() {
            let own = mine.start + batch.start..mine.start + batch.start + batch.len;
            // A rank that has none left samples any, because others need it for theirs, and throws it away.
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
            sampling.run_with(&requests, at_once.min(images_per_rank - index * at_once), on_samples)?;
            scores = scores.and_then(|mut scores| {
                let (attempts, _) = scoring.finish()?;
                attempts.into_iter().zip(&mut scores).for_each(|(attempt, scores)| scores.extend(attempt.scores));
                Ok(scores)
            });
        }
        let all = exchange(&*world.host, &agreed(scores, &*world.host)?)?;
        let mut metrics = self.summary(rewards, &all, count);
        describe_scalings(rewards, "eval.reward", &mut metrics);
        let captions = self.prompts[..shown].iter().map(|prompt| prompt.text.clone()).collect();
        Ok((metrics, Gallery { images: joined(gallery, size, &*world.host)?, captions }))
    }

    /// `all`: rank, reward, image.
    fn summary(&self, rewards: &[Box<dyn Reward>], all: &[Vec<Vec<Option<f64>>>], count: usize) -> Metrics {
        let mut metrics = Metrics::default();
        for (index, reward) in rewards.iter().enumerate() {
            let scores: Vec<f64> = all.iter().flat_map(|rank| rank[index].iter().flatten().copied()).collect();
            if scores.is_empty() {
                continue;
            }
            metrics.set(&format!("eval.reward.{}.mean", reward.name()), mean(&scores));
            if reward.name() == "ocr" {
                let exact = scores.iter().filter(|&&s| s == 1.0).count();
                metrics.set("eval.exact", exact as f64 / scores.len() as f64);
            }
        }
        metrics.set("eval.images", count as f64);
        metrics
    }
}

/// Adds what the rewards' means are in the other units that they are quoted in: `PREFIX.NAME.UNIT.mean` beside
/// `PREFIX.NAME.mean`.
pub fn describe_scalings(rewards: &[Box<dyn Reward>], prefix: &str, metrics: &mut Metrics) {
    for reward in rewards {
        let name = reward.name();
        for (unit, factor) in reward.scalings() {
            if let Some(mean) = metrics.get(&format!("{prefix}.{name}.mean")) {
                metrics.set(&format!("{prefix}.{name}.{unit}.mean"), factor * mean);
            }
        }
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

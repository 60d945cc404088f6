//! Supervised pretraining of the embedded task's base model, on pictures drawn by the renderer.
//!
//! Rectified-flow regression (Liu et al., arXiv 2209.03003): `|v(x_t, t, c) - (eps - x0)|^2`. It stops once the model is
//! readable but far from good, so that reinforcement learning has something to improve.

use crate::batching::{micro_batches, share};
use crate::comm::{Communicator, World};
use crate::data::render::{HEIGHT, Style, WIDTH, render};
use crate::data::{Prompt, PromptSet, glyphs::GlyphPrompt};
use crate::engine::{self, Checkpointing};
use crate::error::{Error, Result};
use crate::evaluate::Evaluation;
use crate::flow::{SamplerConfig, interpolate};
use crate::fs;
use crate::model::Model;
use crate::observe::{Metrics, Progress};
use crate::optim::{OptimConfig, Sharded, StepReport};
use crate::params::{Entry, Layout, ParamSet, Trainable, Values as _};
use crate::pipeline::{self, ModelConfig, Pipeline};
use crate::reward::{Overlap, Rewards};
use crate::rng::{Purpose, Stream};
use crate::shard::{Gradients, Reduction, Sharding};
use crate::train::step;
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The configuration of `flowrl-dist pretrain`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PretrainConfig {
    /// Seed of parameters, pictures, times and noise.
    pub seed: u64,
    /// Prompts, as `data.train` of a run.
    pub data: String,
    /// Share of the examples that are shown without their text, so that guidance has something to lead away from.
    pub dropout: f64,
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
    /// Decay of the average of the weights, which is what is kept.
    pub ema: f64,
    /// Updates between looks at the reward.
    pub eval_every: u64,
    /// Training prompts looked at.
    pub eval_prompts: usize,
    /// Stop when the mean OCR reward of training prompts reaches this.
    pub stop_at_reward: f64,
    /// Where the weights go.
    pub out: PathBuf,
    /// AdamW.
    pub optim: OptimConfig,
    /// The sampler of the looks.
    pub sampler: SamplerConfig,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            data: "glyphs".into(),
            dropout: 0.0,
            init: None,
            steps: 4000,
            batch: 64,
            micro_batch: 32,
            warmup: 100,
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
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::Usage(format!("dropout = {}: must be at least 0 and below 1", self.dropout)));
        }
        if !(self.optim.lr.is_finite() && self.optim.lr > 0.0) {
            return Err(Error::Usage(format!("optim.lr = {}: must be a finite number above 0", self.optim.lr)));
        }
        Ok(())
    }
}

/// Trains the glyphs base model and writes it, in half precision, to `config.out`. Returns the digest of the file.
pub fn pretrain(config: &PretrainConfig, world: &World, rewards: &Rewards, progress: &mut Progress) -> Result<String> {
    let model = ModelConfig { trainable: Trainable::Full, path: config.init.clone(), ..ModelConfig::default() };
    let pipeline = match &config.init {
        Some(_) => Pipeline::load(&model, config.seed, &Device::Cpu)?,
        None => Pipeline::random(model.kind, config.seed, &Device::Cpu)?,
    };
    let mut training = Regression::new(&pipeline, Sharding::Optimizer, &*world.device)?;
    let prompts = PromptSet::train(&config.data)?.prompts;
    let chosen = Stream::new(config.seed, Purpose::PretrainLooks, [0; 4]).permutation(prompts.len());
    let looked_at: Vec<_> = chosen.iter().take(config.eval_prompts).map(|&i| prompts[i].clone()).collect();

    for step in 1..=config.steps {
        let mut metrics = Metrics::default();
        let mine = share(config.batch, world.rank(), world.world_size());
        let examples = micro_batches(mine.len(), config.micro_batch, 0).map(|batch| {
            let points =
                batch.places().map(|i| Point::draw(config, &prompts, step, mine.start + i)).collect::<Result<_>>()?;
            examples(&pipeline, points, batch.len)
        });
        let lr = config.optim.lr * (step as f64 / config.warmup.max(1) as f64).min(1.0);
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
            let (metrics, _) = evaluation.run(&pipeline, &averaged, rewards, world)?;
            progress.evaluation(step, &metrics);
            if metrics.reward().is_some_and(|(_, mean)| mean >= config.stop_at_reward) || step == config.steps {
                return write(config, world, &training.layout, &averaged, step);
            }
        }
    }
    Err(Error::Failed("pretraining ended without a look at the reward".into()))
}

/// One training example.
struct Point {
    prompt: crate::data::Prompt,
    /// Whether the model is told the text.
    told: bool,
    picture: Vec<f32>,
    t: f32,
    noise: Vec<f32>,
}

impl Point {
    /// Example `index` of update `step`: a function of the seed and these two only.
    fn draw(config: &PretrainConfig, prompts: &[crate::data::Prompt], step: u64, index: usize) -> Result<Self> {
        let stream = Stream::new(config.seed, Purpose::Pretrain, [step, index as u64, 0, 0]);
        let prompt = prompts[stream.below(0, prompts.len())].clone();
        let picture = render(&GlyphPrompt::parse(&prompt.text)?, &Style::from_bits(stream.word(1)));
        // Half the times as in SD3 (logit-normal), half on the shifted grid that rollouts use.
        let noise = Stream::new(config.seed, Purpose::Pretrain, [step, index as u64, 1, 0]);
        let t = if stream.uniform(2) < 0.5 {
            1.0 / (1.0 + libm::exp(-f64::from(noise.normals(1)[0])))
        } else {
            let u = stream.uniform(3);
            config.sampler.shift() * u / (1.0 + (config.sampler.shift() - 1.0) * u)
        };
        let normals = Stream::new(config.seed, Purpose::Pretrain, [step, index as u64, 2, 0]).normals(picture.len());
        let told = stream.uniform(4) >= config.dropout;
        Ok(Self { prompt, told, picture, t: t as f32, noise: normals })
    }
}

/// A micro-batch of training examples.
pub struct Examples {
    /// Data `[B, C, H, W]`.
    pub x0: Tensor,
    /// Noise `[B, C, H, W]`.
    pub eps: Tensor,
    /// Times `[B]`.
    pub t: Tensor,
    /// What the model is told, each `[B, ...]`.
    pub conditioning: Vec<Tensor>,
    /// Examples that count; those after them are padding.
    pub count: usize,
}

/// A model whose parameters are all trained by rectified-flow regression.
pub struct Regression<'a> {
    model: &'a Model,
    layout: Layout,
    state: Sharded,
    /// The parameters after the last step.
    params: ParamSet,
}

impl<'a> Regression<'a> {
    /// Starts from the pipeline's base weights.
    pub fn new(pipeline: &'a Pipeline, sharding: Sharding, comm: &dyn Communicator) -> Result<Self> {
        let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
        let state = Sharded::new(&*pipeline.base, &layout, sharding, comm)?;
        let params = pipeline.params()?.with_flat(&layout, &state.gather_policy(comm)?)?;
        Ok(Self { model: &pipeline.model, layout, state, params })
    }

    /// The parameters after the last step.
    pub fn params(&self) -> &ParamSet {
        &self.params
    }

    /// One AdamW step on the mean loss over `global` examples, of which `batches` are this rank's. Returns the sum of these
    /// examples' losses, each a mean over dimensions. Collective.
    ///
    /// # Errors
    /// [`Error::NotFinite`], and what making an example fails with.
    pub fn step(
        &mut self,
        batches: impl IntoIterator<Item = Result<Examples>>,
        global: usize,
        config: &OptimConfig,
        lr: f64,
        comm: &dyn Communicator,
    ) -> Result<(f64, StepReport)> {
        let partition = self.state.partition();
        let gradients = Gradients::zeros(&self.layout, partition, &self.params.device())?;
        let mut reduction = Reduction::new(gradients, partition, comm);
        let mut loss = 0.0;
        for examples in batches {
            loss += self.accumulate(&examples?, global, &mut reduction)?;
        }
        let gradient = reduction.finish()?; // [S]; collective
        let report = self.state.step(&gradient, config, lr, comm)?;
        self.params = self.params.with_flat(&self.layout, &self.state.gather_policy(comm)?)?;
        Ok((loss, report))
    }

    /// Adds the gradient of the mean loss over `global` examples; returns the sum of these examples' losses.
    fn accumulate(&self, examples: &Examples, global: usize, reduction: &mut Reduction) -> Result<f64> {
        let Examples { x0, eps, t, conditioning, count } = examples;
        let x_t = interpolate(x0, eps, t)?;
        let (v, tape) = engine::forward(self.model, &self.params, &x_t, t, conditioning, Checkpointing(0))?;
        let difference = (v - (eps - x0)?)?; // [B, C, H, W]
        // The padding at the end counts for nothing.
        let size = x0.dim(0)?;
        let weights: Vec<f32> = (0..size).map(|i| if i < *count { 1.0 } else { 0.0 }).collect();
        let weights = Tensor::from_vec(weights, (size, 1, 1, 1), x0.device())?;
        let difference = difference.broadcast_mul(&weights)?;
        let dims = (x0.elem_count() / size) as f64;
        let dv = (&difference * (2.0 / (dims * global as f64)))?;
        let last = false; // of how many there are nobody says: the sum goes over the ranks when all are done
        step::accumulate(self.model, &self.params, tape, &dv, reduction, last)?;
        Ok(f64::from(difference.sqr()?.sum_all()?.to_scalar::<f32>()?) / dims)
    }
}

/// The first `count` points as examples, the others as padding.
fn examples(pipeline: &Pipeline, points: Vec<Point>, count: usize) -> Result<Examples> {
    let stack = |f: fn(&Point) -> &Vec<f32>| -> Result<Tensor> {
        let values: Vec<f32> = points.iter().flat_map(f).copied().collect();
        Ok(Tensor::from_vec(values, (points.len(), 3, HEIGHT, WIDTH), &pipeline.device)?)
    };
    let prompts: Vec<_> = points.iter().map(|p| p.prompt.clone()).collect();
    Ok(Examples {
        x0: pipeline::encode_pictures(&stack(|p| &p.picture)?)?,
        eps: stack(|p| &p.noise)?,
        t: Tensor::from_vec(points.iter().map(|p| p.t).collect(), points.len(), &pipeline.device)?,
        conditioning: without_text(pipeline, &prompts, &points)?,
        count,
    })
}

/// The conditioning of the points' prompts, with that of an empty text where the text is not told.
fn without_text(pipeline: &Pipeline, prompts: &[Prompt], points: &[Point]) -> Result<Vec<Tensor>> {
    let conditioning = pipeline.encode(prompts)?;
    if points.iter().all(|p| p.told) {
        return Ok(conditioning);
    }
    let negative = pipeline.negative(prompts)?;
    let told: Vec<u8> = points.iter().map(|p| u8::from(p.told)).collect();
    let told = Tensor::from_vec(told, (points.len(), 1), &pipeline.device)?;
    let chosen =
        |(with, without): (Tensor, Tensor)| Ok(told.broadcast_as(with.shape())?.where_cond(&with, &without)?);
    conditioning.into_iter().zip(negative).map(chosen).collect()
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
        fs::write(&config.out, &bytes)?;
    }
    world.host.barrier()?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::ThreadGroup;
    use crate::observe::Terminal;
    use crate::reward::{RewardConfig, RewardKind, build};

    /// Two updates on four pictures. A rank's micro-batches are added up in the order of the pictures, as the ranks' sums are:
    /// the same bits.
    #[test]
    fn the_weights_do_not_depend_on_the_number_of_ranks() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let digest = |ranks: usize| -> Result<String> {
            let config = PretrainConfig {
                steps: 2,
                batch: 4,
                micro_batch: 2,
                warmup: 1,
                dropout: 0.5,
                eval_prompts: 2,
                sampler: SamplerConfig { steps: 2, ..SamplerConfig::default() },
                out: folder.path().join(format!("{ranks}/base.safetensors")),
                ..PretrainConfig::default()
            };
            let digests = ThreadGroup::run(ranks, |world| {
                let rewards = build(&[RewardConfig::new(RewardKind::Ocr)], 1)?.into();
                pretrain(&config, &world, &rewards, &mut Progress::new(config.steps, false, &Terminal::default()))
            })?;
            assert!(digests.iter().all(|digest| *digest == digests[0]));
            let bytes = std::fs::read(&config.out).unwrap();
            assert_eq!(blake3::hash(&bytes).to_hex().as_str(), digests[0]);
            Ok(digests[0].clone())
        };
        assert_eq!(digest(1)?, digest(2)?);
        Ok(())
    }
}

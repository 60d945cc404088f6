//! Supervised pretraining of the embedded task's base model, on pictures drawn by the renderer.
//!
//! Rectified-flow regression (Liu et al., arXiv 2209.03003): `|v(x_t, t, c) - (eps - x0)|^2`. It stops once the model is
//! readable but far from good, so that reinforcement learning has something to improve.

use crate::comm::World;
use crate::data::render::{HEIGHT, Style, WIDTH, render};
use crate::data::{PromptSet, glyphs::GlyphPrompt};
use crate::engine::{self, Checkpointing};
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, share};
use crate::flow::{SamplerConfig, interpolate};
use crate::observe::{Metrics, Progress};
use crate::optim::{OptimConfig, Sharded};
use crate::params::{Layout, ParamSet, Trainable};
use crate::pipeline::{self, ModelConfig, Pipeline};
use crate::reward::{Overlap, Rewards};
use crate::rng::{Purpose, Stream};
use crate::rollout::micro_batches;
use crate::shard::{Gradients, Reduction, Sharding};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

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
        None => pipeline::random(config.seed, &Device::Cpu)?,
    };
    let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
    let mut state = Sharded::new(&*pipeline.base, &layout, Sharding::Optimizer, &*world.device)?;
    let mut params = pipeline.params()?.with_flat(&layout, &state.gather_policy(&*world.device)?)?;
    let prompts = PromptSet::train(&config.data)?.prompts;
    let chosen = Stream::new(config.seed, Purpose::Pretrain, [u64::MAX, 0, 0, 0]).permutation(prompts.len());
    let looked_at: Vec<_> = chosen.iter().take(config.eval_prompts).map(|&i| prompts[i].clone()).collect();

    for step in 1..=config.steps {
        let mut metrics = Metrics::default();
        let mut gradients = Gradients::zeros(&layout, state.partition(), &pipeline.device)?;
        let mine = share(config.batch, world.rank(), world.world_size());
        for batch in micro_batches(mine.len(), config.micro_batch, 0) {
            let points: Vec<Point> =
                batch.places().map(|i| Point::draw(config, &prompts, step, mine.start + i)).collect::<Result<_>>()?;
            let loss = accumulate(&pipeline, &params, &points, batch.len, config.batch, &mut gradients)?;
            metrics.add_mean("loss", loss, batch.len as f64);
        }
        let lr = config.optim.lr * (step as f64 / config.warmup.max(1) as f64).min(1.0);
        let gradient = Reduction::new(gradients, state.partition(), &*world.device).finish()?; // [S]
        let report = state.step(&gradient, &config.optim, lr, &*world.device)?;
        state.update_ema_fixed(config.ema.min((1.0 + step as f64) / (10.0 + step as f64)))?;
        params = params.with_flat(&layout, &state.gather_policy(&*world.device)?)?;
        metrics.set("grad_norm", report.norm);
        metrics.reduce(&*world.host)?;
        progress.update(step, &metrics);

        if step % config.eval_every == 0 || step == config.steps {
            let averaged = params.with_flat(&layout, &state.gather_ema(&*world.device)?)?;
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
                return write(config, world, &pipeline, &layout, &averaged, step);
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
            config.sampler.shift * u / (1.0 + (config.sampler.shift - 1.0) * u)
        };
        let normals = Stream::new(config.seed, Purpose::Pretrain, [step, index as u64, 2, 0]).normals(picture.len());
        let told = stream.uniform(4) >= config.dropout;
        Ok(Self { prompt, told, picture, t: t as f32, noise: normals })
    }
}

/// Adds the gradient of the mean loss over `global` examples for the first `count` points; returns their mean loss.
fn accumulate(
    pipeline: &Pipeline,
    params: &ParamSet,
    points: &[Point],
    count: usize,
    global: usize,
    gradients: &mut Gradients,
) -> Result<f64> {
    let stack = |f: fn(&Point) -> &Vec<f32>| -> Result<Tensor> {
        let values: Vec<f32> = points.iter().flat_map(f).copied().collect();
        Ok(Tensor::from_vec(values, (points.len(), 3, HEIGHT, WIDTH), &pipeline.device)?)
    };
    let x0 = pipeline::encode_pictures(&stack(|p| &p.picture)?)?;
    let eps = stack(|p| &p.noise)?;
    let t = Tensor::from_vec(points.iter().map(|p| p.t).collect(), points.len(), &pipeline.device)?;
    let prompts: Vec<_> = points.iter().map(|p| p.prompt.clone()).collect();
    let conditioning = without_text(pipeline, pipeline.encode(&prompts)?, points)?;
    let x_t = interpolate(&x0, &eps, &t)?;
    let (v, tape) = engine::forward(&pipeline.model, params, &x_t, &t, &conditioning, Checkpointing(0))?;
    let difference = (v - (eps - x0)?)?; // [B, C, H, W]
    // The padding at the end counts for nothing.
    let weights: Vec<f32> = (0..points.len()).map(|i| if i < count { 1.0 } else { 0.0 }).collect();
    let weights = Tensor::from_vec(weights, (points.len(), 1, 1, 1), &pipeline.device)?;
    let difference = difference.broadcast_mul(&weights)?;
    let dims = (3 * HEIGHT * WIDTH) as f64;
    let dv = (&difference * (2.0 / (dims * global as f64)))?;
    engine::backward(&pipeline.model, params, tape, &dv, |stage, of_stage| gradients.add(stage, of_stage))?;
    Ok(f64::from(difference.sqr()?.sum_all()?.to_scalar::<f32>()?) / (dims * count as f64))
}

/// The conditioning with that of an empty text where the text is not told.
fn without_text(pipeline: &Pipeline, conditioning: Vec<Tensor>, points: &[Point]) -> Result<Vec<Tensor>> {
    if points.iter().all(|p| p.told) {
        return Ok(conditioning);
    }
    let negative = pipeline.negative(&conditioning)?;
    let told: Vec<u8> = points.iter().map(|p| u8::from(p.told)).collect();
    let told = Tensor::from_vec(told, (points.len(), 1), &pipeline.device)?;
    let chosen =
        |(with, without): (Tensor, Tensor)| Ok(told.broadcast_as(with.shape())?.where_cond(&with, &without)?);
    conditioning.into_iter().zip(negative).map(chosen).collect()
}

fn write(
    config: &PretrainConfig,
    world: &World,
    pipeline: &Pipeline,
    layout: &Layout,
    params: &ParamSet,
    step: u64,
) -> Result<String> {
    let specs = pipeline.model.specs();
    let mut tensors = Vec::new();
    for e in &layout.entries {
        let (_, tensor) = params
            .stage(e.stage)
            .iter()
            .find(|(slot, _)| *slot == e.slot)
            .ok_or_else(|| Error::Failed(format!("{} is absent", specs[e.stage][e.slot].name)))?;
        tensors.push((e.name.clone(), tensor.detach().to_dtype(candle_core::DType::F16)?));
    }
    let made = format!("flowrl-dist pretrain, seed {}, {step} updates of {} pictures", config.seed, config.batch);
    let metadata = [("made_by".to_owned(), made)].into();
    let bytes = safetensors::serialize(tensors, Some(metadata))
        .map_err(|e| Error::Failed(format!("the weights cannot be encoded: {e}")))?;
    let digest = blake3::hash(&bytes).to_hex().to_string();
    if world.rank() == 0 {
        write_file(&config.out, &bytes)?;
    }
    world.host.barrier()?;
    Ok(digest)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    std::fs::write(path, bytes).map_err(Error::io(path))
}

//! What pretraining shows the model: prompts, their pictures, times and noise.

use super::{Examples, PretrainConfig};
use crate::data::Prompt;
use crate::error::Result;
use crate::pipeline::{self, Pipeline};
use crate::rng::{Purpose, Stream};
use candle_core::Tensor;

/// One training example.
pub(super) struct Point {
    prompt: Prompt,
    /// Whether the model is told the text.
    told: bool,
    picture: Vec<f32>,
    t: f32,
    noise: Vec<f32>,
}

impl Point {
    /// Example `index` of update `step`: a function of the seed and these two only.
    pub(super) fn draw(config: &PretrainConfig, prompts: &[Prompt], step: u64, index: usize) -> Result<Self> {
        let stream = Stream::new(config.seed, Purpose::Pretrain, [step, index as u64, 0, 0]);
        let prompt = prompts[stream.below(0, prompts.len())].clone();
        let wrong = (stream.uniform(5) < config.wrong_facts).then(|| stream.word(6));
        let picture = config.task.draw(&prompt.text, stream.word(1), wrong)?;
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

/// The first `count` points as examples, the others as padding.
pub(super) fn examples(pipeline: &Pipeline, points: Vec<Point>, count: usize) -> Result<Examples> {
    let (height, width) = pipeline.picture();
    let stack = |f: fn(&Point) -> &Vec<f32>| -> Result<Tensor> {
        let values: Vec<f32> = points.iter().flat_map(f).copied().collect();
        Ok(Tensor::from_vec(values, (points.len(), 3, height, width), &pipeline.device)?)
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

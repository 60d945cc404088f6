//! Samples of the old policy, or of any other set of parameters.

use crate::data::Prompt;
use crate::engine;
use crate::error::Result;
use crate::flow::{SamplerConfig, sigmas, solve};
use crate::params::ParamSet;
use crate::pipeline::Pipeline;
use crate::rng::{Purpose, Stream};
use candle_core::{Device, Tensor};

/// One image to be sampled: the `image`-th of its prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its prompt.
    pub prompt: Prompt,
    /// Its number among the images of the prompt, `0..K`.
    pub image: usize,
}

/// Starting noise `[n, C, H, W]`: an image's depends on seed, purpose, iteration, prompt and image number only.
pub fn noise(pipeline: &Pipeline, requests: &[Request], seed: u64, purpose: Purpose, iteration: u64) -> Result<Tensor> {
    let streams =
        requests.iter().map(|r| Stream::new(seed, purpose, [iteration, r.prompt.index as u64, r.image as u64, 0]));
    normals(pipeline, streams)
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

/// Samples x0 `[n, C, H, W]` for the conditioning (n rows) and the noise `[n, C, H, W]`, without guidance and without a
/// graph.
pub fn sample(
    pipeline: &Pipeline,
    params: &ParamSet,
    sampler: &SamplerConfig,
    conditioning: &[Tensor],
    noise: &Tensor,
    micro_batch: usize,
) -> Result<Tensor> {
    let sigmas = sigmas(sampler.steps, sampler.shift);
    let mut samples = Vec::new();
    for batch in micro_batches(noise.dim(0)?, micro_batch) {
        let rows = batch.rows(&pipeline.device)?;
        let conditioning: Vec<Tensor> =
            conditioning.iter().map(|c| Ok(c.index_select(&rows, 0)?)).collect::<Result<_>>()?;
        let x = solve(sampler.solver, &sigmas, &noise.index_select(&rows, 0)?, |x, t| {
            let t = Tensor::full(t as f32, micro_batch, &pipeline.device)?; // [B]
            engine::velocity(&pipeline.model, params, x, &t, &conditioning)
        })?;
        samples.push(x.narrow(0, 0, batch.len)?);
    }
    Ok(Tensor::cat(&samples, 0)?)
}

/// A micro-batch: `len` samples from `start`, padded to `size` by repeating the last one.
///
/// Every micro-batch goes through the model with the same shape, so that a sample's value does not depend on how many
/// samples this rank has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatch {
    /// First sample.
    pub start: usize,
    /// Samples that count.
    pub len: usize,
    /// Samples with padding, B.
    pub size: usize,
}

impl MicroBatch {
    /// The sample at each of the B places.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        let (start, last) = (self.start, self.start + self.len - 1);
        (0..self.size).map(move |i| (start + i).min(last))
    }

    /// The same as an index tensor `[B]`.
    pub fn rows(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.places().map(|i| i as u32).collect(), self.size, device)?)
    }
}

/// Cuts `count` samples into micro-batches of `size`.
pub fn micro_batches(count: usize, size: usize) -> impl Iterator<Item = MicroBatch> {
    (0..count).step_by(size).map(move |start| MicroBatch { start, len: size.min(count - start), size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn micro_batches_cover_every_sample_once_and_repeat_the_last() {
        let batches: Vec<_> = micro_batches(7, 3).collect();
        let places: Vec<Vec<usize>> = batches.iter().map(|b| b.places().collect()).collect();
        assert_eq!(places, [[0, 1, 2], [3, 4, 5], [6, 6, 6]]);
        assert_eq!(batches.iter().map(|b| b.len).sum::<usize>(), 7);
        assert_eq!(micro_batches(0, 3).count(), 0);
    }
}

//! The model of the task `shapes`: the blocks of [`super::glyphs`] between a stem that reads words and a head that says what
//! the clean picture is.
//!
//! The head's answer D is an estimate of x0, and the velocity is (x_t - D) / t: patches of a clean picture are simple, those of
//! its noise are not (Li and He, "Back to basics: let denoising generative models denoise", arXiv 2511.13720).

use super::glyphs::Block;
use super::patch::{patchify, unpatchify};
use super::{Linear, Model, Stage, TimeEmbedding};
use crate::error::{Error, Result};
use crate::flow::column;
use crate::ops;
use crate::params::{Init, LoraConfig, Slot, Spec, SpecList, StageParams};
use candle_core::{DType, Tensor};

/// Sizes of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Model width D.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Blocks.
    pub depth: usize,
    /// Side of a patch, in pixels.
    pub patch: usize,
    /// Side of a picture, in pixels.
    pub side: usize,
    /// Words of a prompt, padded.
    pub words: usize,
    /// Different words, with the padding.
    pub vocabulary: usize,
}

impl Config {
    /// Floating-point operations of a forward pass for one sample: matrix products only, a multiplication and an addition
    /// counted as two; without adapters.
    pub fn flops(&self) -> f64 {
        let (width, depth) = (self.width as f64, self.depth as f64);
        let (image, tokens) = (self.image_tokens() as f64, (self.image_tokens() + self.words) as f64);
        let square = 2.0 * width * width; // a token through a matrix of the model's width
        let block = square * (12.0 * tokens + 6.0) + 4.0 * width * tokens * tokens;
        let patches = 2.0 * 2.0 * self.patch_dim() as f64 * width * image; // in and out
        depth * block + patches + square * (2.0 + 2.0) + 2.0 * FREQUENCIES as f64 * width
    }

    /// Patches of a picture.
    pub fn image_tokens(&self) -> usize {
        (self.side / self.patch) * (self.side / self.patch)
    }

    /// Values of a patch.
    fn patch_dim(&self) -> usize {
        3 * self.patch * self.patch
    }
}

/// Sines and cosines of the time.
const FREQUENCIES: usize = 128;
/// The least time that x_t - D is divided by.
const LEAST_TIME: f64 = 0.1;
/// Inside the norm's square root.
const EPS: f64 = 1e-6;

/// The model's stages. Its conditioning is `[words [B, words] u32]`.
pub fn model(config: &Config, lora: Option<&LoraConfig>) -> Model {
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Stem::new(config, lora))];
    for index in 0..config.depth {
        stages.push(Box::new(Block::new(config.width, config.heads, index, lora)));
    }
    stages.push(Box::new(Head::new(config, lora)));
    Model { stages, latent: (3, config.side, config.side) }
}

/// Patches, words and the modulation vector.
struct Stem {
    config: Config,
    specs: Vec<Spec>,
    patches: Linear,
    positions: Slot,
    words: Slot,
    places: Slot,
    time: TimeEmbedding,
    pooled: Linear,
}

impl Stem {
    fn new(config: &Config, lora: Option<&LoraConfig>) -> Self {
        let width = config.width;
        let mut specs = SpecList::new("", lora);
        let small = Init::Normal(0.5);
        Self {
            patches: Linear::scaled(&mut specs, "pos_embed.proj", config.patch_dim(), width),
            positions: specs.base("pos_embed.pos_embed", &[config.image_tokens(), width], small),
            words: specs.base("context_embedder.words", &[config.vocabulary, width], small),
            places: specs.base("context_embedder.places", &[config.words, width], small),
            time: TimeEmbedding::new(&mut specs, "time_text_embed.timestep_embedder", FREQUENCIES, width),
            pooled: Linear::scaled(&mut specs, "time_text_embed.text_embedder", config.words * width, width),
            specs: specs.finish(),
            config: config.clone(),
        }
    }
}

impl Stage for Stem {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (x_t, t, words) -> (tokens `[B, image + words, D]`, modulation `[B, D]`, x_t, t).
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, t, words] = inputs else {
            return Err(Error::Failed(format!("the shapes model takes 3 inputs, not {}", inputs.len())));
        };
        let dtype = self.patches.dtype(params)?;
        let patches = self.patches.forward(params, &patchify(&x.to_dtype(dtype)?, self.config.patch)?)?;
        let image = patches.broadcast_add(params.get(self.positions)?)?; // [B, image, D]
        let (batch, count) = words.dims2()?;
        let rows = params.get(self.words)?.index_select(&words.flatten_all()?, 0)?;
        let rows = rows.reshape((batch, count, self.config.width))?;
        let condition = rows.broadcast_add(params.get(self.places)?)?; // [B, words, D]
        let pooled = self.pooled.forward(params, &condition.reshape((batch, count * self.config.width))?)?;
        let modulation = (self.time.forward(params, t)? + pooled)?;
        Ok(vec![Tensor::cat(&[image, condition], 1)?, modulation, x.clone(), t.clone()])
    }
}

/// The image tokens' estimate of x0, and the velocity that follows from it.
struct Head {
    config: Config,
    specs: Vec<Spec>,
    modulation: Linear,
    out: Linear,
}

impl Head {
    fn new(config: &Config, lora: Option<&LoraConfig>) -> Self {
        let mut specs = SpecList::new("", lora);
        Self {
            modulation: Linear::new(&mut specs, "norm_out.linear", config.width, 2 * config.width, Init::Zeros),
            out: Linear::new(&mut specs, "proj_out", config.width, config.patch_dim(), Init::Zeros),
            specs: specs.finish(),
            config: config.clone(),
        }
    }
}

impl Stage for Head {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (tokens, modulation, x_t, t) -> velocity `[B, C, H, W]`, f32.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [tokens, modulation, x_t, t] = inputs else {
            return Err(Error::Failed(format!("the head takes 4 inputs, not {}", inputs.len())));
        };
        let image = tokens.narrow(1, 0, self.config.image_tokens())?.contiguous()?;
        let chunks = ops::chunk(&self.modulation.forward(params, &ops::silu(modulation)?)?, 2)?;
        let h = ops::layer_norm_modulate(&image, &chunks[0], &chunks[1], EPS)?;
        let patches = self.out.forward(params, &h)?; // [B, image, 3 patch^2]
        let side = self.config.side;
        let x0 = unpatchify(&patches, self.config.patch, (side, side))?.to_dtype(DType::F32)?;
        let t = column(t)?.clamp(LEAST_TIME, 1.0)?;
        Ok(vec![(x_t - x0)?.broadcast_div(&t)?])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine;
    use crate::params::ParamSet;
    use candle_core::Device;

    /// A fresh head answers D = 0: v = x_t / t, and at small times x_t / [`LEAST_TIME`].
    #[test]
    fn the_velocity_leads_to_the_head_s_estimate() -> Result<()> {
        let config = Config { width: 16, heads: 2, depth: 1, patch: 4, side: 8, words: 2, vocabulary: 5 };
        let model = model(&config, None);
        let params = ParamSet::init(&model.specs(), 1, &Device::Cpu)?;
        let times = [1.0f32, 0.5, 0.25, 0.01];
        let x_t = Tensor::arange(0f32, 4.0 * 192.0, &Device::Cpu)?.reshape((4, 3, 8, 8))?;
        let words = Tensor::new(&[[0u32, 1], [2, 3], [4, 4], [1, 0]], &Device::Cpu)?;
        let v = engine::velocity(&model, &params, &x_t, &Tensor::new(&times, &Device::Cpu)?, &[words])?;
        let (v, x_t) = (v.flatten_from(1)?.to_vec2::<f32>()?, x_t.flatten_from(1)?.to_vec2::<f32>()?);
        for ((v, x), t) in v.iter().zip(&x_t).zip([1.0, 0.5, 0.25, 0.1]) {
            assert!(v.iter().zip(x).all(|(v, x)| (v - x / t).abs() <= 1e-5 * x / t), "t = {t}");
        }
        Ok(())
    }
}

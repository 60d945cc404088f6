//! The embedded task's model: a small diffusion transformer in pixel space (Peebles and Xie, arXiv 2212.09748) that
//! reads its prompt as characters and two colours.
//!
//! Image tokens (patches of 6 x 6 pixels) and condition tokens go through the same blocks; the time and the mean of
//! the condition tokens modulate them (adaLN-zero). The model computes in the type of its parameters and answers in f32.

use super::patch::{patchify, unpatchify};
use super::{Linear, Model, Stage, TimeEmbedding};
use crate::error::Result;
use crate::ops::{self, Wanted};
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
    /// Picture height and width, in pixels.
    pub picture: (usize, usize),
    /// Characters of a prompt, padded.
    pub characters: usize,
    /// Different characters, with the padding.
    pub alphabet: usize,
    /// Different colours.
    pub colours: usize,
}

impl Config {
    /// Sizes of the model that is kept in the repository: 3.0 M parameters.
    pub fn base(characters: usize, alphabet: usize, colours: usize) -> Self {
        Self { width: 160, heads: 4, depth: 6, patch: 6, picture: (24, 48), characters, alphabet, colours }
    }

    /// Floating-point operations of a forward pass for one sample: matrix products only, a multiplication and an addition
    /// counted as two; without adapters.
    pub fn flops(&self) -> f64 {
        let (width, depth) = (self.width as f64, self.depth as f64);
        let (image, tokens) = (self.image_tokens() as f64, (self.image_tokens() + self.condition_tokens()) as f64);
        let square = 2.0 * width * width; // a token through a matrix of the model's width
        let block = square * (12.0 * tokens + 6.0) + 4.0 * width * tokens * tokens;
        let patches = 2.0 * 2.0 * self.patch_dim() as f64 * width * image; // in and out
        depth * block + patches + square * (2.0 + 2.0) + 2.0 * 128.0 * width
    }

    /// Patches of a picture.
    pub fn image_tokens(&self) -> usize {
        (self.picture.0 / self.patch) * (self.picture.1 / self.patch)
    }

    /// Values of a patch.
    fn patch_dim(&self) -> usize {
        3 * self.patch * self.patch
    }

    /// Characters, ink and ground.
    fn condition_tokens(&self) -> usize {
        self.characters + 2
    }
}

/// The model's stages. Its conditioning is `[characters [B, characters] u32, colours [B, 2] u32 (ink, ground)]`.
pub fn model(config: &Config, lora: Option<&LoraConfig>) -> Model {
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Stem::new(config, lora))];
    for index in 0..config.depth {
        stages.push(Box::new(Block::new(config.width, config.heads, index, lora)));
    }
    stages.push(Box::new(Head::new(config, lora)));
    Model { stages, latent: (3, config.picture.0, config.picture.1) }
}

/// Patches, condition tokens and the modulation vector.
struct Stem {
    config: Config,
    specs: Vec<Spec>,
    patches: Linear,
    positions: Slot,
    characters: Slot,
    colours: Slot,
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
            characters: specs.base("context_embedder.characters", &[config.alphabet, width], small),
            colours: specs.base("context_embedder.colours", &[config.colours, width], small),
            places: specs.base("context_embedder.places", &[config.condition_tokens(), width], small),
            time: TimeEmbedding::new(&mut specs, "time_text_embed.timestep_embedder", 128, width),
            pooled: Linear::scaled(&mut specs, "time_text_embed.text_embedder", width, width),
            specs: specs.finish(),
            config: config.clone(),
        }
    }
}

impl Stage for Stem {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (x_t, t, characters, colours) -> (tokens `[B, image + condition, D]`, modulation `[B, D]`).
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, t, characters, colours] = inputs else {
            return Err(crate::Error::Failed(format!("the glyphs model takes 4 inputs, not {}", inputs.len())));
        };
        let dtype = self.patches.dtype(params)?;
        let patches = self.patches.forward(params, &patchify(&x.to_dtype(dtype)?, self.config.patch)?)?; // [B, image, D]
        let image = patches.broadcast_add(params.get(self.positions)?)?;
        let rows = |table: Slot, ids: &Tensor| -> Result<Tensor> {
            let (batch, count) = ids.dims2()?;
            let rows = params.get(table)?.index_select(&ids.flatten_all()?, 0)?;
            Ok(rows.reshape((batch, count, self.config.width))?)
        };
        let condition = Tensor::cat(&[rows(self.characters, characters)?, rows(self.colours, colours)?], 1)?;
        let condition = condition.broadcast_add(params.get(self.places)?)?; // [B, condition, D]
        let pooled = condition.to_dtype(DType::F32)?.mean(1)?.to_dtype(dtype)?;
        let modulation = (self.time.forward(params, t)? + self.pooled.forward(params, &pooled)?)?;
        Ok(vec![Tensor::cat(&[image, condition], 1)?, modulation])
    }
}

/// Attention and feed-forward, each modulated and gated.
pub(super) struct Block {
    heads: usize,
    specs: Vec<Spec>,
    modulation: Linear,
    query: Linear,
    key: Linear,
    value: Linear,
    query_norm: Slot,
    key_norm: Slot,
    out: Linear,
    up: Linear,
    down: Linear,
}

/// Inside every norm's square root.
const EPS: f64 = 1e-6;

impl Block {
    pub(super) fn new(width: usize, heads: usize, index: usize, lora: Option<&LoraConfig>) -> Self {
        let mut specs = SpecList::new(format!("transformer_blocks.{index}."), lora);
        let s = &mut specs;
        Self {
            heads,
            modulation: Linear::new(s, "norm1.linear", width, 6 * width, Init::Zeros),
            query: Linear::scaled(s, "attn.to_q", width, width),
            key: Linear::scaled(s, "attn.to_k", width, width),
            value: Linear::scaled(s, "attn.to_v", width, width),
            query_norm: s.base("attn.norm_q.weight", &[width / heads], Init::Ones),
            key_norm: s.base("attn.norm_k.weight", &[width / heads], Init::Ones),
            out: Linear::scaled(s, "attn.to_out.0", width, width),
            up: Linear::scaled(s, "ff.net.0.proj", width, 4 * width),
            down: Linear::scaled(s, "ff.net.2", 4 * width, width),
            specs: specs.finish(),
        }
    }
}

impl Stage for Block {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (tokens `[B, T, D]`, modulation `[B, D]`, what goes through..) -> the same.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.run(params, inputs, Wanted::Value)
    }

    fn graph(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        self.run(params, inputs, Wanted::Gradient)
    }
}

impl Block {
    fn run(&self, params: &StageParams, inputs: &[Tensor], wanted: Wanted) -> Result<Vec<Tensor>> {
        let [x, modulation, through @ ..] = inputs else {
            return Err(crate::Error::Failed(format!("a block takes at least 2 inputs, not {}", inputs.len())));
        };
        let (batch, tokens, width) = x.dims3()?;
        let chunks = ops::chunk(&self.modulation.forward(params, &ops::silu(modulation)?)?, 6)?; // 6 x [B, D]
        let by_head = |y: Tensor| ops::reshape(&y, (batch, tokens, self.heads, width / self.heads));

        let h = ops::layer_norm_modulate(x, &chunks[0], &chunks[1], EPS)?;
        let q = ops::rms_norm(&by_head(self.query.forward(params, &h)?)?, params.get(self.query_norm)?, EPS)?;
        let k = ops::rms_norm(&by_head(self.key.forward(params, &h)?)?, params.get(self.key_norm)?, EPS)?;
        let v = by_head(self.value.forward(params, &h)?)?;
        let h = ops::reshape(&ops::attention(&q, &k, &v)?, (batch, tokens, width))?;
        let x = ops::gated_residual(x, &chunks[2], &self.out.forward(params, &h)?)?;

        let h = ops::layer_norm_modulate(&x, &chunks[3], &chunks[4], EPS)?;
        let x = self.up.feed_forward_onto(&self.down, params, (&x, &chunks[5]), &h, wanted)?;
        Ok([x, modulation.clone()].into_iter().chain(through.iter().cloned()).collect())
    }
}

/// The image tokens' velocities.
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

    /// (tokens, modulation) -> velocity `[B, C, H, W]`, f32.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, modulation] = inputs else {
            return Err(crate::Error::Failed(format!("the head takes 2 inputs, not {}", inputs.len())));
        };
        let image = x.narrow(1, 0, self.config.image_tokens())?.contiguous()?;
        let chunks = ops::chunk(&self.modulation.forward(params, &ops::silu(modulation)?)?, 2)?;
        let h = ops::layer_norm_modulate(&image, &chunks[0], &chunks[1], EPS)?;
        let patches = self.out.forward(params, &h)?; // [B, image, 3 patch^2]
        Ok(vec![unpatchify(&patches, self.config.patch, self.config.picture)?.to_dtype(DType::F32)?])
    }
}

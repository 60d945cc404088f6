//! The transformer of Stable Diffusion 3 and 3.5, MMDiT (3 and 3.5 Large) and MMDiT-X (Medium; Esser et al., arXiv 2403.03206; diffusers
//! `SD3Transformer2DModel`, models/transformers/transformer_sd3.py of v0.33.1), as stages.
//!
//! Two streams of tokens, the latent's patches and the text, each with weights of its own, meet in the attention of every
//! block; the time and the pooled text modulate both. Parameters have the names and shapes of the diffusers checkpoint,
//! its fixed table of positions included. The model computes in the type of its parameters, f32 or bf16, and answers in
//! f32; norms and softmax are f32 in either.

mod attention;
mod block;
mod config;
mod embed;
mod releases;

pub use config::{Config, QkNorm};
pub use releases::{LARGE, MEDIUM, RELEASES, Release, SD3_MEDIUM};

use super::{Linear, Model, Stage};
use crate::error::{Error, Result};
use crate::ops;
use crate::params::{LoraConfig, SpecList, StageParams};
use block::Block;
use candle_core::Tensor;
use embed::{Head, Stem};

/// The linear layers that DiffusionNFT adapts, by the end of the name: the attention of both streams. The second
/// attention of the image stream is called `attn2` and is none of them, so that Medium has 191 adapters; Large has 303.
pub const LORA_TARGETS: [&str; 8] = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
];

/// Inside every norm's square root.
const EPS: f64 = 1e-6;

/// The model's stages for latents of `latent` = (height, width). Its conditioning is
/// `[text [B, L, joint_attention_dim], pooled text [B, pooled_projection_dim]]`.
///
/// # Errors
/// [`Error::Usage`] if the latent is no whole number of patches or larger than the table of positions.
pub fn model(config: &Config, latent: (usize, usize), lora: Option<&LoraConfig>) -> Result<Model> {
    let (height, width) = latent;
    let (patch, largest) = (config.patch_size, config.patch_size * config.pos_embed_max_size);
    if [height, width].iter().any(|&side| side == 0 || !side.is_multiple_of(patch) || side > largest) {
        return Err(Error::Usage(format!(
            "a latent of {height} x {width} does not fit the model; take multiples of {patch} up to {largest}"
        )));
    }
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Stem::new(config, latent, lora))];
    for index in 0..config.num_layers {
        stages.push(Box::new(Block::new(config, index, lora)));
    }
    stages.push(Box::new(Head::new(config, latent, lora)));
    Ok(Model { stages, latent: (config.in_channels, height, width) })
}

/// Linear, an activation, linear.
#[derive(Debug, Clone, Copy)]
struct Mlp {
    first: Linear,
    second: Linear,
}

impl Mlp {
    /// Declares the layers `names` from `in_dim` over `hidden` to `out_dim` features.
    fn new(specs: &mut SpecList, names: [&str; 2], (in_dim, hidden, out_dim): (usize, usize, usize)) -> Self {
        Self {
            first: Linear::scaled(specs, names[0], in_dim, hidden),
            second: Linear::scaled(specs, names[1], hidden, out_dim),
        }
    }

    /// x `[.., in]` to `[.., out]`.
    fn forward(
        &self,
        params: &StageParams,
        x: &Tensor,
        activation: fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        self.second.forward(params, &activation(&self.first.forward(params, x)?)?)
    }
}

/// The modulation vectors of a stage: `count` of `[B, D]` from the conditioning vector `[B, D]` after its SiLU.
fn modulations(linear: Linear, params: &StageParams, activated: &Tensor, count: usize) -> Result<Vec<Tensor>> {
    Ok(ops::chunk(&linear.forward(params, activated)?, count)?)
}

/// LayerNorm of x `[B, T, D]`, modulated by `[scale, shift]`, each `[B, D]`: the order of diffusers
/// `AdaLayerNormContinuous` (models/normalization.py of v0.33.1) is not that of its other adaptive norms.
fn norm_continuous(x: &Tensor, modulations: &[Tensor]) -> Result<Tensor> {
    match modulations {
        [scale, shift] => Ok(ops::layer_norm_modulate(x, shift, scale, EPS)?),
        other => Err(Error::Failed(format!("a continuous norm takes 2 modulations, not {}", other.len()))),
    }
}

/// `N` inputs of a stage.
fn exactly<'a, const N: usize>(inputs: &'a [Tensor], stage: &str) -> Result<&'a [Tensor; N]> {
    inputs.try_into().map_err(|_| Error::Failed(format!("the {stage} takes {N} inputs, not {}", inputs.len())))
}

#[cfg(test)]
mod tests;

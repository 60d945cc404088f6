//! The tower of pictures.

use super::block::{Block, Sizes};
use super::config::VisionConfig;
use crate::error::{Error, Result};
use crate::model::frozen::LayerNorm;
use crate::model::patch::patchify;
use crate::ops;
use crate::params::{Init, Slot, SpecList, StageParams};
use candle_core::Tensor;

/// The tower's structure; its parameters are given to it.
#[derive(Debug)]
pub(super) struct VisionTower {
    config: VisionConfig,
    class: Slot,
    patches: Slot,
    positions: Slot,
    norm_in: LayerNorm,
    blocks: Vec<Block>,
    norm_out: LayerNorm,
    projection: Slot,
}

impl VisionTower {
    /// Declares `vision_model.*` and `visual_projection.weight`.
    pub fn new(specs: &mut SpecList, config: &VisionConfig, features: usize) -> Self {
        let (width, patch, eps) = (config.hidden_size, config.patch_size, config.layer_norm_eps);
        let sizes = Sizes {
            width,
            hidden: config.intermediate_size,
            heads: config.num_attention_heads,
            activation: config.hidden_act,
            eps,
        };
        let mut table = |name: &str, shape: &[usize]| {
            let inputs: usize = shape[1..].iter().product();
            specs.base(name, shape, Init::Normal((inputs as f64).powf(-0.5)))
        };
        Self {
            config: config.clone(),
            class: table("vision_model.embeddings.class_embedding", &[width]),
            patches: table(
                "vision_model.embeddings.patch_embedding.weight",
                &[width, config.num_channels, patch, patch],
            ),
            positions: table("vision_model.embeddings.position_embedding.weight", &[config.patches() + 1, width]),
            projection: table("visual_projection.weight", &[features, width]),
            // Spelled like this in every file.
            norm_in: LayerNorm::new(specs, "vision_model.pre_layrnorm", width, eps),
            blocks: (0..config.num_hidden_layers).map(|i| Block::new(specs, "vision_model", i, sizes)).collect(),
            norm_out: LayerNorm::new(specs, "vision_model.post_layernorm", width, eps),
        }
    }

    /// Pictures `[B, C, H, W]` of the configured size to features `[B, projection_dim]`, not normalised.
    pub fn forward(&self, params: &StageParams, pixels: &Tensor) -> Result<Tensor> {
        let VisionConfig { num_channels, image_size, patch_size, .. } = self.config;
        let (batch, channels, height, width) = pixels.dims4()?;
        if (channels, height, width) != (num_channels, image_size, image_size) {
            return Err(Error::Failed(format!(
                "pictures of {channels} x {height} x {width} do not fit a model of {num_channels} x {image_size} x \
                 {image_size}"
            )));
        }
        // A convolution whose stride is its size is a linear layer on patches.
        let kernel = params.get(self.patches)?.flatten_from(1)?; // [D, C p p]
        let side = height / patch_size * patch_size;
        let pixels = pixels.to_dtype(kernel.dtype())?.narrow(2, 0, side)?.narrow(3, 0, side)?.contiguous()?;
        let patches = ops::linear(&patchify(&pixels, patch_size)?, &kernel, None)?; // [B, T, D]
        let class = params.get(self.class)?.reshape((1, 1, ()))?.broadcast_as((batch, 1, self.config.hidden_size))?;
        let x = Tensor::cat(&[&class.contiguous()?, &patches], 1)?.broadcast_add(params.get(self.positions)?)?;
        let mut x = self.norm_in.forward(params, &x)?; // [B, 1 + T, D]
        for block in &self.blocks {
            x = block.forward(params, &x, None)?;
        }
        let class = self.norm_out.forward(params, &x.narrow(1, 0, 1)?.squeeze(1)?)?; // [B, D]
        Ok(ops::linear(&class, params.get(self.projection)?, None)?)
    }
}

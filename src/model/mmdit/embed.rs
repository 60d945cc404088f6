//! What lies before and behind the blocks (diffusers `PatchEmbed` and `CombinedTimestepTextProjEmbeddings`,
//! models/embeddings.py of v0.33.1, and the end of `SD3Transformer2DModel`).

use super::{Config, Mlp, exactly, modulations, norm_continuous};
use crate::error::Result;
use crate::model::patch::{patchify, unpatchify};
use crate::model::{Linear, Stage, TimeEmbedding};
use crate::ops;
use crate::params::{Init, LoraConfig, Slot, Spec, SpecList, StageParams};
use candle_core::{DType, Tensor};

/// Sines and cosines of the time.
const FREQUENCIES: usize = 256;

/// Image tokens, text tokens and the conditioning vector.
pub(super) struct Stem {
    config: Config,
    latent: (usize, usize),
    specs: Vec<Spec>,
    patch_weight: Slot,
    patch_bias: Slot,
    positions: Slot,
    time: TimeEmbedding,
    pooled: Mlp,
    text: Linear,
}

impl Stem {
    pub fn new(config: &Config, latent: (usize, usize), lora: Option<&LoraConfig>) -> Self {
        let (width, patch, side) = (config.width(), config.patch_size, config.pos_embed_max_size);
        let mut specs = SpecList::new("", lora);
        let s = &mut specs;
        // A convolution that steps by its own size: a linear layer on patches, in the shape of the checkpoints.
        let scaled = Init::Normal((config.patch_dim() as f64).powf(-0.5));
        let patch_weight = s.base("pos_embed.proj.weight", &[width, config.in_channels, patch, patch], scaled);
        let text_embedder = ["time_text_embed.text_embedder.linear_1", "time_text_embed.text_embedder.linear_2"];
        Self {
            patch_weight,
            patch_bias: s.base("pos_embed.proj.bias", &[width], Init::Zeros),
            positions: s.buffer(
                "pos_embed.pos_embed",
                &[1, side * side, width],
                Init::Grid { base: config.base_size() },
            ),
            time: TimeEmbedding::new(s, "time_text_embed.timestep_embedder", FREQUENCIES, width),
            pooled: Mlp::new(s, text_embedder, (config.pooled_projection_dim, width, width)),
            text: Linear::scaled(s, "context_embedder", config.joint_attention_dim, width),
            specs: specs.finish(),
            config: config.clone(),
            latent,
        }
    }

    /// The middle of the table of positions, `[T, D]`.
    pub fn positions(&self, params: &StageParams, dtype: DType) -> Result<Tensor> {
        let (patch, side) = (self.config.patch_size, self.config.pos_embed_max_size);
        let (rows, columns) = (self.latent.0 / patch, self.latent.1 / patch);
        let table = params.get(self.positions)?.reshape((side, side, ()))?;
        let crop = table.narrow(0, (side - rows) / 2, rows)?.narrow(1, (side - columns) / 2, columns)?;
        Ok(crop.contiguous()?.flatten_to(1)?.to_dtype(dtype)?)
    }
}

impl Stage for Stem {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (x_t `[B, C, H, W]`, t `[B]`, text `[B, L, joint]`, pooled text `[B, pooled]`) -> (image `[B, T, D]`, text
    /// `[B, L, D]`, conditioning vector `[B, D]`).
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [x, t, text, pooled] = exactly(inputs, "stem")?;
        let (weight, bias) = (params.get(self.patch_weight)?, params.get(self.patch_bias)?);
        let dtype = weight.dtype();
        let patches = patchify(&x.to_dtype(dtype)?, self.config.patch_size)?; // [B, T, C p p]
        let patches = ops::linear(&patches, &weight.flatten_from(1)?, Some(bias))?; // [B, T, D]
        let image = patches.broadcast_add(&self.positions(params, dtype)?)?;
        let text = self.text.forward(params, &text.to_dtype(dtype)?)?;
        let pooled = self.pooled.forward(params, &pooled.to_dtype(dtype)?, ops::silu)?;
        let vector = (self.time.forward(params, t)? + pooled)?;
        Ok(vec![image, text, vector])
    }
}

/// The image tokens' velocities.
pub(super) struct Head {
    patch: usize,
    latent: (usize, usize),
    specs: Vec<Spec>,
    modulation: Linear,
    out: Linear,
}

impl Head {
    pub fn new(config: &Config, latent: (usize, usize), lora: Option<&LoraConfig>) -> Self {
        let width = config.width();
        let mut specs = SpecList::new("", lora);
        Self {
            patch: config.patch_size,
            latent,
            modulation: Linear::new(&mut specs, "norm_out.linear", width, 2 * width, Init::Zeros),
            out: Linear::new(&mut specs, "proj_out", width, config.patch_dim(), Init::Zeros),
            specs: specs.finish(),
        }
    }
}

impl Stage for Head {
    fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// (image `[B, T, D]`, conditioning vector `[B, D]`) -> velocity `[B, C, H, W]`, f32.
    fn forward(&self, params: &StageParams, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [image, vector] = exactly(inputs, "head")?;
        let m = modulations(self.modulation, params, &ops::silu(vector)?, 2)?;
        let patches = self.out.forward(params, &norm_continuous(image, &m)?)?; // [B, T, p p C]
        // The channels vary fastest here, but slowest in the patches that came in.
        let (batch, tokens, dim) = patches.dims3()?;
        let pixels = self.patch * self.patch;
        let patches = patches.reshape((batch, tokens, pixels, dim / pixels))?.transpose(2, 3)?.contiguous()?;
        let velocity = unpatchify(&patches.flatten_from(2)?, self.patch, self.latent)?;
        Ok(vec![velocity.to_dtype(DType::F32)?])
    }
}

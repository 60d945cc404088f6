//! The transformer of Stable Diffusion 3.5 from any layout.

use super::folder::open_part;
use super::{Format, Weights};
use crate::error::{Error, Result};
use crate::fs;
use crate::model::mmdit::{self, Config, QkNorm};
use crate::model::{Model, StartingParams};
use crate::params::{LoraConfig, ParamSet, Role, Spec};
use candle_core::{DType, Device};
use std::path::Path;

/// The transformer's sizes and its weights, opened and not read.
#[derive(Debug, Clone)]
pub struct Transformer {
    /// Sizes: of its `config.json`, or inferred from the shapes where there is none.
    pub config: Config,
    /// The tensors, by diffusers' names.
    pub weights: Weights,
}

/// A transformer that can be run.
pub struct Loaded {
    /// Its stages.
    pub model: Model,
    /// The base weights, and fresh adapters if adapters are wanted.
    pub base: StartingParams,
    /// [`Weights::digest`] of the base weights.
    pub digest: String,
}

impl Loaded {
    /// All parameters, read whole.
    pub fn params(&self) -> Result<ParamSet> {
        ParamSet::read(&self.model.specs(), &self.base)
    }
}

impl Transformer {
    /// Opens the transformer of a diffusers pipeline's folder, a folder or file with the transformer alone, or the
    /// authors' single file.
    ///
    /// # Errors
    /// Nothing of this kind is there; a shard is missing; the model is another one than Stable Diffusion 3.5,
    /// in which case everything that differs is listed.
    pub fn open(path: &Path) -> Result<Self> {
        let format = Format::of(path)?;
        let config = match format {
            Format::Pipeline => Some(path.join("transformer/config.json")),
            Format::Transformer => Some(path.join("config.json")).filter(|config| fs::is_named(config)),
            Format::SingleFile => None,
            other => {
                let message = format!(
                    "is a {}, not a transformer; give the diffusers folder of Stable Diffusion 3.5 or its \
                     authors' single file, such as sd3.5_medium.safetensors",
                    other.describe()
                );
                return Err(Error::File { path: path.to_path_buf(), message });
            }
        };
        let weights = open_part(path, "transformer")?;
        let config = match config {
            Some(config) => Config::read(&config)?,
            None => infer(&weights)?,
        };
        let transformer = Self { config, weights };
        let side = transformer.config.patch_size;
        transformer.check(&mmdit::model(&transformer.config, (side, side), None)?)?;
        Ok(transformer)
    }

    /// The model for latents of `latent` = (height, width) with its base weights in `dtype`, which are read from the mapped
    /// files when they are asked for; adapters are drawn with `seed`.
    ///
    /// # Errors
    /// The latent does not fit.
    pub fn load(
        &self,
        lora: Option<&LoraConfig>,
        latent: (usize, usize),
        dtype: DType,
        seed: u64,
        device: &Device,
    ) -> Result<Loaded> {
        let model = mmdit::model(&self.config, latent, lora)?;
        let base = StartingParams::new(&model, self.weights.clone(), dtype, seed, device);
        Ok(Loaded { model, base, digest: self.weights.digest() })
    }

    fn check(&self, model: &Model) -> Result<()> {
        let specs = model.specs();
        let expected = |spec: &'_ Spec| spec.role != Role::Adapter;
        let specs = specs.iter().flat_map(|specs| specs.iter()).filter(|spec| expected(spec));
        self.weights.check(specs.map(|spec| (spec.name.as_str(), spec.shape.as_slice())), |_| false)
    }
}

/// The sizes of a transformer from the shapes of its tensors. Of the unit of position, which no shape tells, and of the
/// heads where q and k have no norm, it takes those of the published models; the file holds the table of positions itself.
fn infer(weights: &Weights) -> Result<Config> {
    let shape = |name: &str| match weights.shape(name) {
        Some(shape) => Ok(shape),
        None => Err(weights.error(format!("lacks {name}; give the files of Stable Diffusion 3.5"))),
    };
    let dim = |name: &str, axis: usize| -> Result<usize> {
        let shape = shape(name)?;
        let problem = || weights.error(format!("{name} is {shape:?}; give the files of Stable Diffusion 3.5"));
        shape.get(axis).copied().filter(|&d| d > 0).ok_or_else(problem)
    };
    let patch = "pos_embed.proj.weight";
    let norms = ["norm_q", "norm_k"].map(|norm| format!("transformer_blocks.0.attn.{norm}.weight"));
    let is_normed = norms.iter().any(|name| weights.contains(name));
    let usual = Config::sd35_medium();
    let (width, head) = (dim(patch, 0)?, if is_normed { dim(&norms[0], 0)? } else { usual.attention_head_dim });
    if !width.is_multiple_of(head) {
        return Err(weights.error(format!("is {width} wide, which makes no heads of {head} features")));
    }
    let number = |name: &str| name.strip_prefix("transformer_blocks.")?.split('.').next()?.parse::<usize>().ok();
    let depth = weights.names().filter_map(number).max().map_or(0, |last| last + 1);
    let is_dual = |index: &usize| weights.contains(&format!("transformer_blocks.{index}.attn2.to_q.weight"));
    Ok(Config {
        patch_size: dim(patch, 2)?,
        in_channels: dim(patch, 1)?,
        num_layers: depth,
        attention_head_dim: head,
        num_attention_heads: width / head,
        joint_attention_dim: dim("context_embedder.weight", 1)?,
        caption_projection_dim: width,
        pooled_projection_dim: dim("time_text_embed.text_embedder.linear_1.weight", 1)?,
        sample_size: usual.sample_size,
        pos_embed_max_size: dim("pos_embed.pos_embed", 1)?.isqrt(),
        dual_attention_layers: (0..depth).filter(is_dual).collect(),
        qk_norm: is_normed.then_some(QkNorm::RmsNorm),
    })
}

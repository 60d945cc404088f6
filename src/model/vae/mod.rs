//! The autoencoder of Stable Diffusion 3 and 3.5 (Rombach et al., arXiv 2112.10752; diffusers `AutoencoderKL`,
//! models/autoencoders/autoencoder_kl.py of v0.33.1): pictures from latents and back. It is never trained.
//!
//! Weights have the names of the diffusers checkpoint. Inside, channels come last, so that a convolution gathers whole
//! runs of memory and a pixel is a token. One picture is computed at a time: its value does not depend on its neighbours.

mod coder;
mod config;
mod layers;
mod tiling;

pub use config::Config;

use super::Stage;
use super::files::Weights;
use crate::error::{Error, Result};
use crate::params::{ParamSet, Spec};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Side of a tile in latent pixels unless the caller chooses: 1024 pixels of the picture.
pub const TILE: usize = 128;

/// Names of the attention's layers today, and in files written before diffusers 0.15.
const OLD_NAMES: [(&str, &str); 4] = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")];

/// Encoder and decoder with their weights.
pub struct Vae {
    /// Sizes and scales.
    pub config: Config,
    /// Pictures `[B, H, W, 3]` in [-1, 1] to mean and log variance `[B, h, w, 2 latent_channels]`.
    pub encoder: Coder,
    /// Latents `[B, h, w, latent_channels]` to pictures `[B, H, W, 3]`.
    pub decoder: Coder,
    tile: usize,
    dtype: DType,
}

/// One half: stages that run one after the other, and their weights.
pub struct Coder {
    /// The stages, each from one tensor `[B, H, W, C]` to one.
    pub stages: Vec<Box<dyn Stage>>,
    /// Their weights; those of convolutions lie as `[k, k, in, out]`.
    pub params: ParamSet,
}

impl Coder {
    fn new(stages: Vec<Box<dyn Stage>>, weight: impl Fn(&Spec) -> Result<Tensor>) -> Result<Self> {
        let specs: Vec<&[Spec]> = stages.iter().map(|s| s.specs()).collect();
        let params = ParamSet::build(&specs, |spec| match weight(spec)? {
            kernel if kernel.rank() == 4 => Ok(kernel.permute((2, 3, 1, 0))?.contiguous()?),
            other => Ok(other),
        })?;
        Ok(Self { stages, params })
    }

    /// x `[1, C, H, W]` through all stages, `[1, C', H', W']` in f32.
    fn forward(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let mut io = vec![x.to_dtype(dtype)?.permute((0, 2, 3, 1))?.contiguous()?];
        for (index, stage) in self.stages.iter().enumerate() {
            io = stage.forward(self.params.stage(index), &io)?;
        }
        Ok(io[0].to_dtype(DType::F32)?.permute((0, 3, 1, 2))?.contiguous()?)
    }
}

impl Vae {
    /// The autoencoder of a folder with `config.json` and the weights, as in the `vae` folder of a diffusers checkpoint.
    ///
    /// # Errors
    /// [`Error::File`] where the configuration is not supported or the weights do not fit it: what is missing, too much
    /// or of another shape, by name.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        Self::with_weights(Config::read(&folder.join("config.json"))?, &Weights::open(folder)?, dtype, device)
    }

    /// Whether [`Vae::load`] finds all that it needs in `folder`; no tensor is read.
    ///
    /// # Errors
    /// As there.
    pub fn check_files(folder: &Path) -> Result<()> {
        fits(&specs(&Config::read(&folder.join("config.json"))?), &Weights::open(folder)?)
    }

    /// The autoencoder with weights of the diffusers names.
    ///
    /// # Errors
    /// [`Error::File`] where the weights do not fit.
    pub fn with_weights(config: Config, weights: &Weights, dtype: DType, device: &Device) -> Result<Self> {
        let stages = [coder::encoder(&config), coder::decoder(&config)];
        let name = |spec: &Spec| stored_name(weights, &spec.name);
        fits(&specs(&config), weights)?;
        Self::build(config, stages, dtype, |spec| weights.tensor(&name(spec), dtype, device))
    }

    /// The autoencoder with random weights, to measure it.
    pub fn random(config: Config, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let stages = [coder::encoder(&config), coder::decoder(&config)];
        Self::build(config, stages, dtype, |spec| Ok(spec.initial(seed, device)?.to_dtype(dtype)?))
    }

    fn build(
        config: Config,
        [encoder, decoder]: [Vec<Box<dyn Stage>>; 2],
        dtype: DType,
        weight: impl Fn(&Spec) -> Result<Tensor>,
    ) -> Result<Self> {
        let (encoder, decoder) = (Coder::new(encoder, &weight)?, Coder::new(decoder, &weight)?);
        Ok(Self { config, encoder, decoder, tile: TILE, dtype })
    }

    /// The same autoencoder with tiles of `side` latent pixels: a latent with a longer side is decoded in tiles, each a
    /// norm of its own, so that pictures differ a little from those decoded whole.
    ///
    /// # Errors
    /// [`Error::Usage`] if the side is no multiple of 4.
    pub fn with_tile(self, side: usize) -> Result<Self> {
        if side == 0 || !side.is_multiple_of(tiling::OVERLAP) {
            let message =
                format!("a tile of {side} latent pixels has no quarters; take a multiple of {}", tiling::OVERLAP);
            return Err(Error::Usage(message));
        }
        Ok(Self { tile: side, ..self })
    }

    /// Pictures `[B, 3, H, W]` in [0, 1], f32, of samples x0 `[B, latent_channels, h, w]` of the velocity model.
    ///
    /// # Errors
    /// [`Error::Failed`] for another shape.
    pub fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.check(x0, self.config.latent_channels, 1, "samples")?;
        let latent = (x0.to_dtype(DType::F32)? / self.config.scaling_factor)?;
        let latent = (latent + self.config.shift_factor)?;
        each(&latent, |latent| {
            let decode = |tile: &Tensor| self.decoder.forward(tile, self.dtype);
            let picture = tiling::tiled(latent, (self.tile, self.config.scale()), decode)?;
            Ok(picture.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
        })
    }

    /// The inverse of [`Vae::decode`]: the means of the latents of pictures `[B, 3, H, W]` in [0, 1], scaled for the
    /// velocity model.
    ///
    /// # Errors
    /// As [`Vae::moments`].
    pub fn encode(&self, pictures: &Tensor) -> Result<Tensor> {
        let (mean, _) = self.moments(pictures)?;
        Ok(((mean - self.config.shift_factor)? * self.config.scaling_factor)?)
    }

    /// Means and log variances of the latents of pictures `[B, 3, H, W]` in [0, 1]: each `[B, latent_channels, h, w]`.
    ///
    /// # Errors
    /// [`Error::Failed`] for another shape, or sides that are no multiples of the scale.
    pub fn moments(&self, pictures: &Tensor) -> Result<(Tensor, Tensor)> {
        self.check(pictures, 3, self.config.scale(), "pictures")?;
        let moments = each(&pictures.to_dtype(DType::F32)?.affine(2.0, -1.0)?, |picture| {
            self.encoder.forward(picture, self.dtype)
        })?;
        let channels = self.config.latent_channels;
        Ok((moments.narrow(1, 0, channels)?, moments.narrow(1, channels, channels)?.clamp(-30f32, 20f32)?))
    }

    fn check(&self, x: &Tensor, channels: usize, multiple: usize, what: &str) -> Result<()> {
        match x.dims() {
            &[count, c, height, width]
                if count > 0
                    && c == channels
                    && [height, width].iter().all(|&n| n > 0 && n.is_multiple_of(multiple)) =>
            {
                Ok(())
            }
            other => Err(Error::Failed(format!(
                "{what} have shape {other:?}; they must be [B, {channels}, H, W] with sides of multiples of {multiple}"
            ))),
        }
    }
}

/// The tensors of an autoencoder of these sizes.
pub fn specs(config: &Config) -> Vec<Spec> {
    let stages = [coder::encoder(config), coder::decoder(config)];
    stages.iter().flatten().flat_map(|stage| stage.specs()).cloned().collect()
}

/// Whether the weights are those of a model with these tensors.
fn fits(specs: &[Spec], weights: &Weights) -> Result<()> {
    let names: Vec<String> = specs.iter().map(|spec| stored_name(weights, &spec.name)).collect();
    weights.check(names.iter().map(String::as_str).zip(specs.iter().map(|s| s.shape.as_slice())), |_| false)
}

/// `f` of each of a batch's pictures or latents alone.
fn each(batch: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let parts = (0..batch.dim(0)?).map(|i| f(&batch.narrow(0, i, 1)?)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// The name under which the file has a parameter: its own, or an attention layer's older one.
fn stored_name(weights: &Weights, name: &str) -> String {
    let old = OLD_NAMES.iter().find_map(|(new, old)| {
        let (head, tail) = name.split_once(&format!(".attentions.0.{new}."))?;
        Some(format!("{head}.attentions.0.{old}.{tail}"))
    });
    old.filter(|old| !weights.contains(name) && weights.contains(old)).unwrap_or_else(|| name.to_owned())
}

#[cfg(test)]
mod tests;

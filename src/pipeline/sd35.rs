//! Stable Diffusion 3.5: prompts through three text encoders, pictures through the decoder.

use super::{ModelConfig, Pipeline, Task, is_there};
use crate::comm::Communicator;
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::model::files::{self, Adapter, Format, Loaded, Transformer};
use crate::model::text::{Encoding, Filled, PromptCache};
use crate::model::vae::{self, Vae};
use crate::model::{Model, mmdit};
use crate::params::{Layout, LoraConfig, Precision};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Tokens of a prompt that the CLIP encoders read.
const CLIP_TOKENS: usize = 77;

/// What guidance leads away from where a prompt says nothing else.
const NEGATIVE: &str = "";

/// The velocity model, of the sizes that the files say; of Stable Diffusion 3.5 Medium's where there are none yet.
pub(super) fn model(config: &ModelConfig, lora: Option<&LoraConfig>) -> Result<Model> {
    let sizes = sizes(config)?;
    mmdit::model(&sizes, latent(config, &sizes)?, lora)
}

/// Floating-point operations of a forward pass for one sample.
pub(super) fn flops(config: &ModelConfig) -> Result<f64> {
    let sizes = sizes(config)?;
    Ok(sizes.flops(latent(config, &sizes)?, CLIP_TOKENS + config.t5_tokens))
}

/// Patches of a picture.
pub(super) fn tokens(config: &ModelConfig) -> Result<usize> {
    let sizes = sizes(config)?;
    Ok(sizes.image_tokens(latent(config, &sizes)?))
}

fn sizes(config: &ModelConfig) -> Result<mmdit::Config> {
    match config.transformer() {
        Some(path) if path.exists() => Ok(Transformer::open(path)?.config),
        _ => Ok(mmdit::Config::sd35_medium()),
    }
}

/// Height and width of a latent of `config.resolution` pixels.
///
/// # Errors
/// [`Error::Usage`]: the model cannot draw pictures of that size.
fn latent(config: &ModelConfig, sizes: &mmdit::Config) -> Result<(usize, usize)> {
    let file = config.path.as_deref().map(|path| path.join("vae/config.json"));
    let vae = match file.filter(|file| file.is_file()) {
        Some(file) => vae::Config::read(&file)?,
        None => vae::Config::sd3(),
    };
    let (pixels, patch) = (config.resolution, vae.scale() * sizes.patch_size);
    let largest = patch * sizes.pos_embed_max_size;
    if pixels == 0 || !pixels.is_multiple_of(patch) || pixels > largest {
        return Err(Error::Usage(format!(
            "model.resolution = {pixels}: this model draws pictures of {patch} to {largest} pixels in steps of {patch}; use one \
             of these"
        )));
    }
    Ok((pixels / vae.scale(), pixels / vae.scale()))
}

/// Refuses a folder that lacks a part, before any time is spent.
///
/// # Errors
/// [`Error::File`]: everything that is absent or cannot be read.
pub(super) fn check(config: &ModelConfig) -> Result<()> {
    let path = folder(config)?;
    let download = "download the model (README.md, \"Download the weights\")";
    is_there("model.path", path, download)?;
    let others = [("model.transformer", &config.transformer), ("model.lora.path", &config.lora.path)];
    for (key, path) in others.into_iter().filter_map(|(key, path)| Some((key, path.as_deref()?))) {
        is_there(key, path, "give an existing file or folder")?;
    }
    let (format, parts) = files::parts(path)?;
    let error = |message: String| Err(Error::File { path: path.to_path_buf(), message });
    if format != Format::Pipeline {
        return error(format!(
            "is a {}; model.path is the folder of the whole pipeline as diffusers writes it, with text encoders and VAE, and \
             model.transformer another transformer",
            format.describe()
        ));
    }
    let own_transformer = config.transformer.is_none();
    let needed = |name: &str| name != "scheduler" && (own_transformer || name != "transformer");
    let missing = parts.iter().filter(|part| needed(&part.name));
    let missing: Vec<String> =
        missing.filter_map(|part| Some(format!("{} {}", part.name, part.problem.as_ref()?))).collect();
    if !missing.is_empty() {
        return error(format!("{}; download the folder again, whole", missing.join("; ")));
    }
    if let Some(path) = &config.lora.path {
        Adapter::open(path)?;
    }
    let Some(path) = &config.transformer else { return Ok(()) };
    Transformer::open(path).map(drop)
}

/// Sees to it that the cache holds the encodings of `prompts` and of what guidance leads away from; every rank does its
/// share, and all return when all is there.
pub(super) fn encode_prompts(
    config: &ModelConfig,
    prompts: &[&str],
    device: &Device,
    comm: &dyn Communicator,
) -> Result<Filled> {
    let all: Vec<&str> = prompts.iter().copied().chain([NEGATIVE]).collect();
    cache(config)?.fill(&all, comm, device)
}

fn cache(config: &ModelConfig) -> Result<PromptCache> {
    let folder = folder(config)?.to_path_buf();
    let encoding = Encoding { folder, t5_tokens: config.t5_tokens, dtype: config.dtype.dtype() };
    PromptCache::open(&config.prompt_cache, encoding)
}

fn folder(config: &ModelConfig) -> Result<&Path> {
    let missing = || Error::Usage("model.path is missing: name the folder of Stable Diffusion 3.5 Medium".into());
    config.path.as_deref().ok_or_else(missing)
}

/// The transformer, the decoder, and the cache of encoded prompts.
pub(super) fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline> {
    let path = folder(config)?;
    let transformer = Transformer::open(config.transformer().unwrap_or(path))?;
    let vae = Vae::load(&path.join("vae"), pixels(config, device), device)?;
    if let Some((part, misfit)) = files::misfits(path, &transformer.config).into_iter().next() {
        return Err(Error::File { path: path.join(part), message: misfit });
    }
    let latent = latent(config, &transformer.config)?;
    let Loaded { model, mut base, digest } =
        transformer.load(config.adapters().as_ref(), latent, config.dtype.dtype(), seed, device)?;
    if let (Some(path), Some(lora)) = (&config.lora.path, config.adapters()) {
        let layout = Layout::new(&model.specs(), config.trainable);
        let flat = Adapter::open(path)?.flat(&layout, &lora, device)?;
        base = base.with_adapters(layout, flat);
    }
    let parts = Parts { prompts: cache(config)?, vae, device: device.clone() };
    Ok(Pipeline {
        model,
        base: Box::new(base),
        base_digest: digest,
        device: device.clone(),
        task: Task::Sd35(Box::new(parts)),
    })
}

/// What pictures are decoded in.
fn pixels(config: &ModelConfig, device: &Device) -> DType {
    // A CPU computes in f32 and rounds: there bf16 would save nothing.
    let usual = || if device.is_cuda() { config.dtype.dtype() } else { DType::F32 };
    config.vae_dtype.map_or_else(usual, Precision::dtype)
}

/// What stands before and behind the transformer.
pub struct Parts {
    prompts: PromptCache,
    vae: Vae,
    device: Device,
}

impl Parts {
    /// Text `[n, L, joint_attention_dim]` and pooled text `[n, pooled_projection_dim]` of prompts in the cache.
    pub(super) fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.text.as_str()).collect();
        self.of(&texts)
    }

    /// The prompts' negative ones, or the empty one.
    pub(super) fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.negative.as_deref().unwrap_or(NEGATIVE)).collect();
        self.of(&texts)
    }

    fn of(&self, texts: &[&str]) -> Result<Vec<Tensor>> {
        let embeddings = self.prompts.get(texts, &self.device)?;
        Ok(vec![embeddings.context, embeddings.pooled])
    }

    /// Pictures of samples.
    pub(super) fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.vae.decode(x0)
    }

    /// Pixels of a picture on a side of a latent's pixel.
    pub(super) fn scale(&self) -> usize {
        self.vae.config.scale()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The position table has 384 patches, each of 2 x 2 pixels of a latent, and those 8 x 8 of a picture.
    #[test]
    fn a_resolution_that_does_not_fit_is_told_in_pixels() {
        let side =
            |resolution| model(&ModelConfig { resolution, ..ModelConfig::default() }, None).map(|model| model.latent);
        assert_eq!(side(6144).unwrap(), (16, 768, 768));
        for resolution in [0, 520, 6160] {
            let message = side(resolution).err().unwrap().to_string();
            let expected = format!("model.resolution = {resolution}: this model draws pictures of 16 to 6144 pixels");
            assert!(message.starts_with(&expected), "{message}");
        }
    }

    #[test]
    fn pictures_are_decoded_in_what_was_asked_for() {
        let on_cpu =
            |dtype, vae_dtype| pixels(&ModelConfig { dtype, vae_dtype, ..ModelConfig::default() }, &Device::Cpu);
        assert_eq!(on_cpu(Precision::Bf16, None), DType::F32);
        assert_eq!(on_cpu(Precision::Bf16, Some(Precision::F32)), DType::F32);
        assert_eq!(on_cpu(Precision::F32, Some(Precision::Bf16)), DType::BF16);
    }
}

//! Stable Diffusion 3.5, and 3: prompts through three text encoders, pictures through the decoder.

use super::prompt_cache::{Filled, PromptCache};
use super::{BaseFiles, BaseModel, Codec, ModelConfig, Pipeline, is_there};
use crate::checks::{Check, within};
use crate::comm::Communicator;
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::files::{self, Adapter, Format, Loaded, Transformer};
use crate::model::mmdit::{self, Release};
use crate::model::text::{Encoding, MOST_T5_TOKENS};
use crate::model::vae::{self, Vae};
use crate::params::{Layout, LoraConfig, Precision};
use candle_core::{DType, Device, Tensor};
use std::path::{Path, PathBuf};

/// Tokens of a prompt that the CLIP encoders read.
const CLIP_TOKENS: usize = 77;

/// What guidance leads away from where a prompt says nothing else.
const NEGATIVE: &str = "";

/// A published model of the architecture, or a smaller one of its layout.
pub(super) struct Sd35(pub &'static Release);

impl BaseModel for Sd35 {
    fn name(&self) -> &'static str {
        self.0.kind
    }

    fn keys(&self) -> &'static [&'static str] {
        &[
            "model.transformer",
            "model.resolution",
            "model.t5_tokens",
            "model.prompt_cache",
            "model.vae_dtype",
            "model.lora.path",
        ]
    }

    fn check(&self, config: &ModelConfig) -> Check {
        let kind = self.name();
        if config.path.is_none() {
            return Err(format!("model.kind = {kind:?}: needs model.path; name the folder with the model"));
        }
        within("model.t5_tokens", config.t5_tokens as u64, 1, MOST_T5_TOKENS as u64)?;
        match config.resolution {
            pixels if pixels == 0 || !pixels.is_multiple_of(16) => {
                Err(format!("model.resolution = {pixels}: use a multiple of 16, such as 512"))
            }
            _ => Ok(()),
        }
    }

    fn owns(&self, path: &Path) -> bool {
        let release = Transformer::open(path).ok().and_then(|transformer| transformer.config.release());
        release.is_some_and(|release| release.kind == self.0.kind)
    }

    fn check_files(&self, config: &ModelConfig) -> Result<()> {
        check_files(self.0, config)
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        &mmdit::LORA_TARGETS
    }

    fn build(&self, config: &ModelConfig) -> Result<Model> {
        let sizes = self.sizes(config)?;
        mmdit::model(&sizes, latent(config, &sizes)?, config.adapters().as_ref())
    }

    fn flops(&self, config: &ModelConfig) -> Result<f64> {
        let sizes = self.sizes(config)?;
        Ok(sizes.flops(latent(config, &sizes)?, CLIP_TOKENS + config.t5_tokens))
    }

    fn image_tokens(&self, config: &ModelConfig) -> Result<usize> {
        let sizes = self.sizes(config)?;
        Ok(sizes.image_tokens(latent(config, &sizes)?))
    }

    fn scheduler(&self, config: &ModelConfig) -> Option<PathBuf> {
        Some(config.path.as_ref()?.join("scheduler/scheduler_config.json"))
    }

    fn prompt_cache<'a>(&self, config: &'a ModelConfig) -> Option<&'a Path> {
        Some(&config.prompt_cache)
    }

    /// Sees to it that the cache holds the encodings of `texts` and of what guidance leads away
    /// from; every rank does its share, and all return when all is there.
    fn prepare(&self, config: &ModelConfig, texts: &[&str], on: &Device, comm: &dyn Communicator) -> Result<()> {
        let all: Vec<&str> = texts.iter().copied().chain([NEGATIVE]).collect();
        let Filled { found, encoded } = cache(config, folder(self.0, config)?)?.fill(&all, comm, on)?;
        tracing::info!("rank {}: {encoded} prompts encoded, {found} were in the cache", comm.rank());
        Ok(())
    }

    fn open(&self, config: &ModelConfig) -> Result<BaseFiles> {
        let path = config.transformer().ok_or_else(|| no_folder(self.0))?;
        let key = if config.transformer.is_some() { "model.transformer" } else { "model.path" };
        is_there(key, path, "give the folder or file of the base model")?;
        BaseFiles::transformer(path, config.adapters().as_ref())
    }

    fn load(&self, config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline> {
        load(config, folder(self.0, config)?, seed, device)
    }
}

impl Sd35 {
    /// Those that the files say; those of the published model where there are none yet.
    fn sizes(&self, config: &ModelConfig) -> Result<mmdit::Config> {
        match config.transformer() {
            Some(path) if path.exists() => Ok(Transformer::open(path)?.config),
            _ => Ok((self.0.sizes)()),
        }
    }
}

impl BaseFiles {
    /// A transformer of Stable Diffusion 3.5 in any layout, with the adapters `lora` beside it.
    ///
    /// # Errors
    /// As [`Transformer::open`].
    pub fn transformer(path: &Path, lora: Option<&LoraConfig>) -> Result<Self> {
        let Transformer { config, weights } = Transformer::open(path)?;
        // Names and shapes are those of every size of latent.
        let model = mmdit::model(&config, (config.patch_size, config.patch_size), lora)?;
        Ok(Self { model, weights, transformer: Some(config) })
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

/// Refuses a folder that lacks a part.
fn check_files(release: &Release, config: &ModelConfig) -> Result<()> {
    let path = folder(release, config)?;
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

/// The cache of prompts encoded by the encoders in `folder`.
fn cache(config: &ModelConfig, folder: &Path) -> Result<PromptCache> {
    let encoding = Encoding { folder: folder.to_path_buf(), t5_tokens: config.t5_tokens, dtype: config.dtype.dtype() };
    PromptCache::open(&config.prompt_cache, encoding)
}

fn folder<'a>(release: &Release, config: &'a ModelConfig) -> Result<&'a Path> {
    config.path.as_deref().ok_or_else(|| no_folder(release))
}

fn no_folder(release: &Release) -> Error {
    Error::Usage(format!("model.path is missing: name the folder of {}", release.title))
}

/// The transformer, the decoder, and the cache of encoded prompts.
fn load(config: &ModelConfig, path: &Path, seed: u64, device: &Device) -> Result<Pipeline> {
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
    let codec = Box::new(LatentCodec { prompts: cache(config, path)?, vae, device: device.clone() });
    Ok(Pipeline { model, base: Box::new(base), base_digest: digest, device: device.clone(), codec })
}

/// What pictures are decoded in.
fn pixels(config: &ModelConfig, device: &Device) -> DType {
    // A CPU computes in f32 and rounds: there bf16 would save nothing.
    let usual = || if device.is_cuda() { config.dtype.dtype() } else { DType::F32 };
    config.vae_dtype.map_or_else(usual, Precision::dtype)
}

/// Prompts by the cache, pictures by the decoder.
struct LatentCodec {
    prompts: PromptCache,
    vae: Vae,
    device: Device,
}

impl Codec for LatentCodec {
    /// Text `[n, L, joint_attention_dim]` and pooled text `[n, pooled_projection_dim]` of prompts
    /// in the cache.
    fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| &*prompt.text).collect();
        self.of(&texts)
    }

    /// The prompts' negative ones, or the empty one.
    fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let texts: Vec<&str> = prompts.iter().map(|prompt| prompt.negative.as_deref().unwrap_or(NEGATIVE)).collect();
        self.of(&texts)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.vae.decode(x0)
    }

    fn scale(&self) -> usize {
        self.vae.config.scale()
    }
}

impl LatentCodec {
    fn of(&self, texts: &[&str]) -> Result<Vec<Tensor>> {
        let embeddings = self.prompts.get(texts, &self.device)?;
        Ok(vec![embeddings.context, embeddings.pooled])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The position table has 384 patches, each of 2 x 2 pixels of a latent, and those 8 x 8 of a
    /// picture.
    #[test]
    fn a_resolution_that_does_not_fit_is_told_in_pixels() {
        let side = |resolution| {
            let config = ModelConfig { resolution, ..ModelConfig::default() };
            Sd35(&mmdit::MEDIUM).build(&config).map(|model| model.latent)
        };
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

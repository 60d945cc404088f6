//! `[model]`: which base model, where its files are, and what of it is trained.

use super::{glyphs, sd35};
use crate::error::{Error, Result};
use crate::model::{Model, mmdit};
use crate::params::{self, LoraConfig, Precision, Trainable};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The embedded task's model, in pixel space.
    #[serde(rename = "glyphs")]
    Glyphs,
    /// Stable Diffusion 3.5 Medium, or a smaller model of its architecture.
    #[serde(rename = "sd35-medium")]
    Sd35Medium,
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Base model: "glyphs", the embedded task's transformer in pixel space; "sd35-medium": Stable
    /// Diffusion 3.5 Medium, or a smaller model of its architecture.
    pub kind: Kind,
    /// glyphs: weights (safetensors) instead of those that are part of the program. sd35: the
    /// folder as diffusers writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// sd35: another transformer than that folder's: a folder or file of diffusers, or the authors'
    /// single file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transformer: Option<PathBuf>,
    /// sd35: side of a picture, pixels.
    pub resolution: usize,
    /// sd35: tokens of a prompt that T5 reads (DiffusionNFT: 128; diffusers: 256); CLIP reads 77.
    pub t5_tokens: usize,
    /// sd35: folder of encoded prompts; runs and ranks share it.
    pub prompt_cache: PathBuf,
    /// What weights and activations are: "f32" or "bf16"; adapters, master weights and the
    /// optimizer are f32 in either.
    pub dtype: Precision,
    /// sd35: what pictures are decoded in, "f32" or "bf16"; left out: as dtype on a GPU, f32 on a
    /// CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae_dtype: Option<Precision>,
    /// "full": every weight of the base model; "lora": adapters beside it.
    pub trainable: Trainable,
    /// The adapters, if they are what is trained.
    pub lora: LoraSection,
}

/// `[model.lora]`: counts if `trainable = "lora"` (arXiv 2106.09685).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraSection {
    /// Rank of the update.
    pub rank: usize,
    /// Scale: the update is multiplied by alpha / rank.
    pub alpha: f64,
    /// Layers that get an adapter, by the end of their name; left out: glyphs: attn.to_q, to_k,
    /// to_v, to_out.0, ff.net.0.proj, ff.net.2; sd35: DiffusionNFT's, all of attn.*, none of
    /// attn2.*.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<String>>,
    /// sd35: a LoRA to start from, of PEFT, diffusers or kohya, or with ComfyUI's names; left out:
    /// random A, zero B.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl Default for LoraSection {
    fn default() -> Self {
        Self { rank: 32, alpha: 64.0, targets: None, path: None }
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            kind: Kind::Glyphs,
            path: None,
            transformer: None,
            resolution: 512,
            t5_tokens: 128,
            prompt_cache: "cache/prompts".into(),
            dtype: Precision::default(),
            vae_dtype: None,
            trainable: Trainable::Full,
            lora: LoraSection::default(),
        }
    }
}

impl Kind {
    /// The linear layers that can have an adapter, and have one where the configuration names none.
    pub fn lora_targets(self) -> &'static [&'static str] {
        match self {
            Kind::Glyphs => &params::LORA_TARGETS,
            Kind::Sd35Medium => &mmdit::LORA_TARGETS,
        }
    }
}

impl ModelConfig {
    /// The adapters, if they are what is trained.
    pub fn adapters(&self) -> Option<LoraConfig> {
        let LoraSection { rank, alpha, targets, path: _ } = &self.lora;
        let usual = || self.kind.lora_targets().iter().map(|t| t.to_string()).collect();
        let targets = targets.clone().unwrap_or_else(usual);
        (self.trainable == Trainable::Lora).then_some(LoraConfig { rank: *rank, alpha: *alpha, targets })
    }

    /// Where the transformer's files are.
    pub fn transformer(&self) -> Option<&Path> {
        self.transformer.as_deref().or(self.path.as_deref())
    }

    /// Refuses files that are not there or not whole, before any time is spent.
    ///
    /// # Errors
    /// [`crate::Error::File`]: everything that is absent or cannot be read.
    pub fn check_files(&self) -> Result<()> {
        match self.kind {
            Kind::Glyphs => glyphs::check(self),
            Kind::Sd35Medium => sd35::check(self),
        }
    }

    /// The velocity model, without weights.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if the pictures do not fit the model, or what is wrong with the files that give its sizes.
    pub fn build(&self) -> Result<Model> {
        let adapters = self.adapters();
        match self.kind {
            Kind::Glyphs => Ok(glyphs::model(adapters.as_ref())),
            Kind::Sd35Medium => sd35::model(self, adapters.as_ref()),
        }
    }

    /// Floating-point operations of the velocity model's forward pass for one sample.
    ///
    /// # Errors
    /// What is wrong with the files that give the model's sizes.
    pub fn flops(&self) -> Result<f64> {
        match self.kind {
            Kind::Glyphs => Ok(glyphs::sizes().flops()),
            Kind::Sd35Medium => sd35::flops(self),
        }
    }

    /// Tokens of a picture, each of which goes through most of the linear layers.
    ///
    /// # Errors
    /// What is wrong with the files that give the model's sizes.
    pub fn tokens(&self) -> Result<usize> {
        match self.kind {
            Kind::Glyphs => Ok(glyphs::sizes().image_tokens()),
            Kind::Sd35Medium => sd35::tokens(self),
        }
    }
}

/// Refuses the path that `key` names where there is nothing.
pub(crate) fn is_there(key: &str, path: &Path, remedy: &str) -> Result<()> {
    match path.exists() {
        true => Ok(()),
        false => Err(Error::Usage(format!(
            "{key} = {path:?}: there is nothing at this path; {remedy}, or name another place with --set {key}=PATH"
        ))),
    }
}

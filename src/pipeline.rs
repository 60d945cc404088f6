//! What lies between a prompt and a picture: conditioning, velocity model, decoder; and the base model's weights.

use crate::data::Prompt;
use crate::data::glyphs::{Colour, GlyphPrompt, MAX_TEXT};
use crate::error::{Error, Result};
use crate::model::{Model, glyphs};
use crate::params::{LoraConfig, ParamSet, Precision, Role, Trainable};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The embedded task's model, in pixel space.
    #[serde(rename = "glyphs")]
    Glyphs,
}

/// `[model]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// Which base model.
    pub kind: Kind,
    /// Its weights; nothing: those that are part of the program (glyphs only).
    pub path: Option<PathBuf>,
    /// What it computes in.
    pub dtype: Precision,
    /// What is trained.
    pub trainable: Trainable,
    /// The adapters, if they are what is trained.
    pub lora: LoraConfig,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            kind: Kind::Glyphs,
            path: None,
            dtype: Precision::default(),
            trainable: Trainable::Full,
            lora: LoraConfig::default(),
        }
    }
}

/// The weights of the glyphs base model; `configs/glyphs/pretrain.toml` and docs/LOG.md say how they were made.
static GLYPHS_BASE: &[u8] = include_bytes!("../assets/glyphs/base.safetensors");

/// A text-to-image model with its base weights.
pub struct Pipeline {
    /// The velocity model.
    pub model: Model,
    /// The base weights, and fresh adapters if adapters are trained.
    pub base: ParamSet,
    /// Digest of the base weights.
    pub base_digest: String,
    /// Where the tensors lie.
    pub device: Device,
}

impl Pipeline {
    /// The model of the configuration with its weights; `seed` draws the adapters.
    pub fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        match &config.path {
            None => Self::with_weights(config, seed, device, GLYPHS_BASE, Path::new("the embedded base model")),
            Some(path) => {
                let bytes = std::fs::read(path).map_err(|e| Error::File {
                    path: path.clone(),
                    message: format!("model.path cannot be read ({e}); give a safetensors file of base weights"),
                })?;
                Self::with_weights(config, seed, device, &bytes, path)
            }
        }
    }

    /// The model with random weights, to be pretrained.
    pub fn random(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        let model = build(config);
        let dtype = config.dtype.dtype();
        let base = ParamSet::build(&model.specs(), |spec| Ok(spec.initial(seed, device)?.to_dtype(dtype)?))?;
        Ok(Self { model, base, base_digest: String::new(), device: device.clone() })
    }

    fn with_weights(config: &ModelConfig, seed: u64, device: &Device, bytes: &[u8], path: &Path) -> Result<Self> {
        let (model, dtype) = (build(config), config.dtype.dtype());
        let file = |message: String| Error::File { path: path.to_path_buf(), message };
        let weights = SafeTensors::deserialize(bytes).map_err(|e| file(format!("is no safetensors file: {e}")))?;
        let specs = model.specs();
        let base_names =
            |name: &str| specs.iter().flat_map(|s| s.iter()).any(|s| s.role == Role::Base && s.name == name);
        if let Some(extra) = weights.names().into_iter().find(|name| !base_names(name)) {
            return Err(file(format!("holds {extra}, which this model does not have; is it of another model?")));
        }
        let base = ParamSet::build(&specs, |spec| {
            if spec.role == Role::Adapter {
                return Ok(spec.initial(seed, device)?.to_dtype(dtype)?);
            }
            let view = weights.tensor(&spec.name).map_err(|_| file(format!("lacks {}", spec.name)))?;
            if view.shape() != spec.shape {
                return Err(file(format!("{} has shape {:?}, not {:?}", spec.name, view.shape(), spec.shape)));
            }
            Ok(candle_core::safetensors::Load::load(&view, device)?.to_dtype(dtype)?)
        })?;
        Ok(Self { model, base, base_digest: blake3::hash(bytes).to_hex().to_string(), device: device.clone() })
    }

    /// Conditioning of the prompts, tensors with a row a prompt.
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let mut characters = Vec::with_capacity(prompts.len() * MAX_TEXT);
        let mut colours = Vec::with_capacity(prompts.len() * 2);
        for prompt in prompts {
            let glyph = GlyphPrompt::parse(&prompt.text)?;
            characters.extend(character_ids(&glyph.text));
            colours.extend([glyph.ink as u32, glyph.ground as u32]);
        }
        Ok(vec![
            Tensor::from_vec(characters, (prompts.len(), MAX_TEXT), &self.device)?,
            Tensor::from_vec(colours, (prompts.len(), 2), &self.device)?,
        ])
    }

    /// What guidance leads away from, in the shape of `conditioning`: the same colours without a text.
    pub fn negative(&self, conditioning: &[Tensor]) -> Result<Vec<Tensor>> {
        match conditioning {
            [characters, colours] => Ok(vec![characters.zeros_like()?, colours.clone()]),
            other => Err(Error::Failed(format!("a glyphs conditioning has 2 tensors, not {}", other.len()))),
        }
    }

    /// Pictures `[B, 3, H, W]` in [0, 1] of samples x0 `[B, C, H, W]`.
    pub fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        Ok(x0.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
    }

    /// The inverse of [`Pipeline::decode`] for pictures in [0, 1].
    pub fn encode_pictures(&self, pictures: &Tensor) -> Result<Tensor> {
        Ok(pictures.affine(2.0, -1.0)?)
    }
}

/// Padding, ten digits and 26 letters.
const ALPHABET: usize = 37;

/// Different colours.
const COLOURS: usize = Colour::Sky as usize + 1;

fn character_ids(text: &str) -> [u32; MAX_TEXT] {
    let mut ids = [0; MAX_TEXT];
    for (id, c) in ids.iter_mut().zip(text.chars()) {
        *id = c.to_digit(36).map_or(0, |d| d + 1);
    }
    ids
}

/// The velocity model of a configuration, without weights.
pub fn build(config: &ModelConfig) -> Model {
    let lora = (config.trainable == Trainable::Lora).then_some(&config.lora);
    match config.kind {
        Kind::Glyphs => glyphs::model(&glyphs::Config::base(MAX_TEXT, ALPHABET, COLOURS), lora),
    }
}

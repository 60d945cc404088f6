//! The embedded task: prompts as characters and colours, pictures as they are.

use super::{ModelConfig, Pipeline, Task};
use crate::data::Prompt;
use crate::data::glyphs::{Colour, GlyphPrompt, MAX_TEXT};
use crate::error::{Error, Result};
use crate::model::{Model, glyphs};
use crate::params::{LoraConfig, ParamSet, Role};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use std::path::Path;

/// The weights of the base model; `configs/glyphs/pretrain.toml` and docs/LOG.md say how they were made.
static BASE: &[u8] = include_bytes!("../../assets/glyphs/base.safetensors");

/// Padding, ten digits and 26 letters.
const ALPHABET: usize = 37;

/// Different colours.
const COLOURS: usize = Colour::Sky as usize + 1;

/// Sizes of the velocity model.
pub(super) fn sizes() -> glyphs::Config {
    glyphs::Config::base(MAX_TEXT, ALPHABET, COLOURS)
}

/// The velocity model.
pub(super) fn model(lora: Option<&LoraConfig>) -> Model {
    glyphs::model(&sizes(), lora)
}

/// The model with the weights of `config.path`, or the embedded ones.
pub(super) fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline> {
    match &config.path {
        None => with_weights(config, seed, device, BASE, Path::new("the embedded base model")),
        Some(path) => {
            let bytes = std::fs::read(path).map_err(|e| Error::File {
                path: path.clone(),
                message: format!("model.path cannot be read ({e}); give a safetensors file of base weights"),
            })?;
            with_weights(config, seed, device, &bytes, path)
        }
    }
}

/// The embedded task's model with random weights, to be pretrained.
pub fn random(seed: u64, device: &Device) -> Result<Pipeline> {
    let model = model(None);
    let base = ParamSet::init(&model.specs(), seed, device)?;
    Ok(Pipeline { model, base, base_digest: String::new(), device: device.clone(), task: Task::Glyphs })
}

fn with_weights(config: &ModelConfig, seed: u64, device: &Device, bytes: &[u8], path: &Path) -> Result<Pipeline> {
    let model = model(config.adapters().as_ref());
    let file = |message: String| Error::File { path: path.to_path_buf(), message };
    let weights = SafeTensors::deserialize(bytes).map_err(|e| file(format!("is no safetensors file: {e}")))?;
    let specs = model.specs();
    let base_names = |name: &str| specs.iter().flat_map(|s| s.iter()).any(|s| s.role == Role::Base && s.name == name);
    if let Some(extra) = weights.names().into_iter().find(|name| !base_names(name)) {
        return Err(file(format!("holds {extra}, which this model does not have; is it of another model?")));
    }
    let base = ParamSet::build(&specs, |spec| {
        if spec.role == Role::Adapter {
            return spec.initial(seed, device);
        }
        let view = weights.tensor(&spec.name).map_err(|_| file(format!("lacks {}", spec.name)))?;
        if view.shape() != spec.shape {
            return Err(file(format!("{} has shape {:?}, not {:?}", spec.name, view.shape(), spec.shape)));
        }
        Ok(candle_core::safetensors::Load::load(&view, device)?.to_dtype(DType::F32)?)
    })?;
    let base_digest = blake3::hash(bytes).to_hex().to_string();
    Ok(Pipeline { model, base, base_digest, device: device.clone(), task: Task::Glyphs })
}

/// Characters `[n, MAX_TEXT]` and colours `[n, 2]` of the prompts.
pub(super) fn encode(prompts: &[Prompt], device: &Device) -> Result<Vec<Tensor>> {
    let mut characters = Vec::with_capacity(prompts.len() * MAX_TEXT);
    let mut colours = Vec::with_capacity(prompts.len() * 2);
    for prompt in prompts {
        let glyph = GlyphPrompt::parse(&prompt.text)?;
        characters.extend(character_ids(&glyph.text));
        colours.extend([glyph.ink as u32, glyph.ground as u32]);
    }
    Ok(vec![
        Tensor::from_vec(characters, (prompts.len(), MAX_TEXT), device)?,
        Tensor::from_vec(colours, (prompts.len(), 2), device)?,
    ])
}

/// The same colours without a text.
pub(super) fn negative(conditioning: &[Tensor]) -> Result<Vec<Tensor>> {
    match conditioning {
        [characters, colours] => Ok(vec![characters.zeros_like()?, colours.clone()]),
        other => Err(Error::Failed(format!("a glyphs conditioning has 2 tensors, not {}", other.len()))),
    }
}

/// Pixel values in [-1, 1] to [0, 1].
pub(super) fn decode(x0: &Tensor) -> Result<Tensor> {
    Ok(x0.affine(0.5, 0.5)?.clamp(0f32, 1f32)?)
}

/// Samples x0 of the embedded task from its pictures in [0, 1]: the inverse of [`Pipeline::decode`].
pub fn encode_pictures(pictures: &Tensor) -> Result<Tensor> {
    Ok(pictures.affine(2.0, -1.0)?)
}

fn character_ids(text: &str) -> [u32; MAX_TEXT] {
    let mut ids = [0; MAX_TEXT];
    for (id, c) in ids.iter_mut().zip(text.chars()) {
        *id = c.to_digit(36).map_or(0, |d| d + 1);
    }
    ids
}

//! The embedded task: prompts as characters and colours, pictures as they are.

use super::{ModelConfig, Pipeline, Task, is_there};
use crate::data::Prompt;
use crate::data::glyphs::{Colour, GlyphPrompt, MAX_TEXT};
use crate::error::Result;
use crate::model::files::Weights;
use crate::model::{BaseModel, Model, glyphs};
use crate::params::{LoraConfig, ParamSet, Role, Spec};
use candle_core::{Device, Tensor};
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

/// Refuses weights that are not there.
pub(super) fn check(config: &ModelConfig) -> Result<()> {
    config.path.as_deref().map_or(Ok(()), |path| is_there("model.path", path, "give a safetensors file"))
}

/// The weights of `config.path`, or the embedded ones, of a model that declares `specs`.
///
/// # Errors
/// The file cannot be read, or does not fit the model.
pub fn weights(config: &ModelConfig, specs: &[&[Spec]]) -> Result<Weights> {
    let weights = match &config.path {
        Some(path) => Weights::open(path)?,
        None => Weights::embedded(Path::new("the embedded base model"), BASE)?,
    };
    let base = specs.iter().flat_map(|specs| specs.iter()).filter(|spec| spec.role != Role::Adapter);
    weights.check(base.map(|spec| (spec.name.as_str(), spec.shape.as_slice())), |_| false)?;
    Ok(weights)
}

/// The model with its weights.
pub(super) fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline> {
    let model = model(config.adapters().as_ref());
    let weights = weights(config, &model.specs())?;
    let base_digest = weights.digest();
    let base = Box::new(BaseModel::new(&model, weights, config.dtype.dtype(), seed, device));
    Ok(Pipeline { model, base, base_digest, device: device.clone(), task: Task::Glyphs })
}

/// The embedded task's model with random weights, to be pretrained.
pub fn random(seed: u64, device: &Device) -> Result<Pipeline> {
    let model = model(None);
    let base = Box::new(ParamSet::init(&model.specs(), seed, device)?);
    Ok(Pipeline { model, base, base_digest: String::new(), device: device.clone(), task: Task::Glyphs })
}

/// Characters `[n, MAX_TEXT]` and colours `[n, 2]` of the prompts.
pub(super) fn encode(prompts: &[Prompt], device: &Device) -> Result<Vec<Tensor>> {
    let glyphs = prompts.iter().map(|prompt| GlyphPrompt::parse(&prompt.text)).collect::<Result<Vec<_>>>()?;
    tensors(&glyphs, device)
}

/// The prompts' negative ones, or the prompts' colours without a text.
pub(super) fn negative(prompts: &[Prompt], device: &Device) -> Result<Vec<Tensor>> {
    let glyph = |prompt: &Prompt| match &prompt.negative {
        Some(negative) => GlyphPrompt::parse(negative),
        None => Ok(GlyphPrompt { text: String::new(), ..GlyphPrompt::parse(&prompt.text)? }),
    };
    tensors(&prompts.iter().map(glyph).collect::<Result<Vec<_>>>()?, device)
}

fn tensors(glyphs: &[GlyphPrompt], device: &Device) -> Result<Vec<Tensor>> {
    let characters: Vec<u32> = glyphs.iter().flat_map(|glyph| character_ids(&glyph.text)).collect();
    let colours: Vec<u32> = glyphs.iter().flat_map(|glyph| [glyph.ink as u32, glyph.ground as u32]).collect();
    Ok(vec![
        Tensor::from_vec(characters, (glyphs.len(), MAX_TEXT), device)?,
        Tensor::from_vec(colours, (glyphs.len(), 2), device)?,
    ])
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

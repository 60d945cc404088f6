//! The embedded task: prompts as characters and colours, pictures as they are.

use super::{BaseFiles, BaseModel, Codec, ModelConfig, Pipeline, is_there, pixels};
use crate::data::Prompt;
use crate::data::glyphs::{Colour, GlyphPrompt, MAX_TEXT};
use crate::error::Result;
use crate::model::files::{self, Format};
use crate::model::{Model, glyphs};
use crate::params::{self, LoraConfig};
use crate::reward::RewardKind;
use candle_core::{Device, Tensor};
use std::path::Path;

/// The weights of the base model; `configs/glyphs/pretrain.toml` and docs/LOG.md say how they were
/// made.
static BASE: &[u8] = include_bytes!("../../assets/glyphs/base.safetensors");

/// Padding, ten digits and 26 letters.
const ALPHABET: usize = 37;

/// Different colours.
const COLOURS: usize = Colour::Sky as usize + 1;

/// The embedded task's model, in pixel space.
pub(super) struct Glyphs;

impl BaseModel for Glyphs {
    fn name(&self) -> &'static str {
        "glyphs"
    }

    fn check_prompt(&self, text: &str) -> Result<()> {
        GlyphPrompt::parse(text).map(drop)
    }

    fn owns(&self, path: &Path) -> bool {
        Format::of(path).is_ok_and(|format| format == Format::Embedded(files::GLYPHS))
    }

    fn check_files(&self, config: &ModelConfig) -> Result<()> {
        config.path.as_deref().map_or(Ok(()), |path| is_there("model.path", path, "give a safetensors file"))
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        &params::LORA_TARGETS
    }

    fn eval_rewards(&self) -> &'static [RewardKind] {
        &[RewardKind::Ocr, RewardKind::Colour]
    }

    fn draws_one_line(&self) -> bool {
        true
    }

    fn build(&self, config: &ModelConfig) -> Result<Model> {
        Ok(model(config.adapters().as_ref()))
    }

    fn flops(&self, _config: &ModelConfig) -> Result<f64> {
        Ok(sizes().flops())
    }

    fn image_tokens(&self, _config: &ModelConfig) -> Result<usize> {
        Ok(sizes().image_tokens())
    }

    fn open(&self, config: &ModelConfig) -> Result<BaseFiles> {
        self.check_files(config)?;
        pixels::open(config, self.build(config)?, BASE)
    }

    fn load(&self, config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline> {
        Ok(pixels::pipeline(self.open(config)?, codec(device), config, seed, device))
    }

    fn random(&self, seed: u64, device: &Device) -> Result<Pipeline> {
        pixels::random(model(None), codec(device), seed, device)
    }
}

/// Sizes of the velocity model.
fn sizes() -> glyphs::Config {
    glyphs::Config::base(MAX_TEXT, ALPHABET, COLOURS)
}

/// The velocity model.
fn model(lora: Option<&LoraConfig>) -> Model {
    glyphs::model(&sizes(), lora)
}

fn codec(device: &Device) -> Box<dyn Codec> {
    Box::new(GlyphCodec { device: device.clone() })
}

/// Prompts as characters `[n, MAX_TEXT]` and colours `[n, 2]`.
struct GlyphCodec {
    device: Device,
}

impl Codec for GlyphCodec {
    fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let glyphs = prompts.iter().map(|prompt| GlyphPrompt::parse(&prompt.text)).collect::<Result<Vec<_>>>()?;
        tensors(&glyphs, &self.device)
    }

    /// The prompts' negative ones, or the prompts' colours without a text.
    fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let glyph = |prompt: &Prompt| match &prompt.negative {
            Some(negative) => GlyphPrompt::parse(negative),
            None => Ok(GlyphPrompt { text: String::new(), ..GlyphPrompt::parse(&prompt.text)? }),
        };
        tensors(&prompts.iter().map(glyph).collect::<Result<Vec<_>>>()?, &self.device)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        pixels::decode(x0)
    }
}

fn tensors(glyphs: &[GlyphPrompt], device: &Device) -> Result<Vec<Tensor>> {
    let characters: Vec<u32> = glyphs.iter().flat_map(|glyph| character_ids(&glyph.text)).collect();
    let colours: Vec<u32> = glyphs.iter().flat_map(|glyph| [glyph.ink as u32, glyph.ground as u32]).collect();
    Ok(vec![
        Tensor::from_vec(characters, (glyphs.len(), MAX_TEXT), device)?,
        Tensor::from_vec(colours, (glyphs.len(), 2), device)?,
    ])
}

fn character_ids(text: &str) -> [u32; MAX_TEXT] {
    let mut ids = [0; MAX_TEXT];
    for (id, c) in ids.iter_mut().zip(text.chars()) {
        *id = c.to_digit(36).map_or(0, |d| d + 1);
    }
    ids
}

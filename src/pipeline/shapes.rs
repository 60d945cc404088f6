//! The embedded task of shapes: prompts as words in fixed places, pictures as they are.

use super::{BaseFiles, BaseModel, Codec, ModelConfig, Pipeline, is_there, pixels};
use crate::data::Prompt;
use crate::data::shapes::{COUNTS, Colour, Group, Relation, SIDE, Shape, ShapesPrompt};
use crate::error::{Error, Result};
use crate::model::files::{self, Format};
use crate::model::{Model, shapes};
use crate::params::{self, LoraConfig};
use crate::reward::RewardKind;
use candle_core::{Device, Tensor};
use std::path::Path;

/// The weights of the base model; `configs/shapes/pretrain.toml` and docs/LOG.md say how they were
/// made.
static BASE: &[u8] = include_bytes!("../../assets/shapes/base.safetensors");

/// Count, colour and shape of a group, the relation, and those of the other group.
const WORDS: usize = 7;
/// First word of each kind; 0 is the padding.
const COLOURS: u32 = 1 + COUNTS.len() as u32;
const SHAPES: u32 = COLOURS + Colour::ALL.len() as u32;
const RELATIONS: u32 = SHAPES + Shape::ALL.len() as u32;
const VOCABULARY: u32 = RELATIONS + Relation::ALL.len() as u32;

/// The model of the task, in pixel space.
pub(super) struct Shapes;

impl BaseModel for Shapes {
    fn name(&self) -> &'static str {
        "shapes"
    }

    fn check_prompt(&self, text: &str) -> Result<()> {
        ShapesPrompt::parse(text).map(drop)
    }

    fn owns(&self, path: &Path) -> bool {
        Format::of(path).is_ok_and(|format| format == Format::Embedded(files::SHAPES))
    }

    fn check_files(&self, config: &ModelConfig) -> Result<()> {
        match &config.path {
            Some(path) => is_there("model.path", path, "give a safetensors file"),
            None if BASE.is_empty() => Err(Error::Usage(
                "model.kind = \"shapes\": this program has no weights for it yet; make them (flowrl-dist pretrain --config \
                 configs/shapes/pretrain.toml) and name the file as model.path"
                    .into(),
            )),
            None => Ok(()),
        }
    }

    fn lora_targets(&self) -> &'static [&'static str] {
        &params::LORA_TARGETS
    }

    fn eval_rewards(&self) -> &'static [RewardKind] {
        &[RewardKind::Shapes, RewardKind::ShapesStrict]
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

/// Sizes of the velocity model: 3.8 M parameters.
fn sizes() -> shapes::Config {
    let vocabulary = VOCABULARY as usize;
    shapes::Config { width: 192, heads: 4, depth: 5, patch: 8, side: SIDE, words: WORDS, vocabulary }
}

/// The velocity model.
fn model(lora: Option<&LoraConfig>) -> Model {
    shapes::model(&sizes(), lora)
}

fn codec(device: &Device) -> Box<dyn Codec> {
    Box::new(ShapesCodec { device: device.clone() })
}

/// Prompts as words `[n, WORDS]`.
struct ShapesCodec {
    device: Device,
}

impl Codec for ShapesCodec {
    fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let words = prompts.iter().map(|prompt| Ok(Some(ShapesPrompt::parse(&prompt.text)?))).collect::<Result<_>>()?;
        tensor(words, &self.device)
    }

    /// Words of the prompts' negative ones, or none.
    fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        let words = |prompt: &Prompt| prompt.negative.as_deref().map(ShapesPrompt::parse).transpose();
        tensor(prompts.iter().map(words).collect::<Result<_>>()?, &self.device)
    }

    fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        pixels::decode(x0)
    }
}

fn tensor(prompts: Vec<Option<ShapesPrompt>>, device: &Device) -> Result<Vec<Tensor>> {
    let count = prompts.len();
    let ids: Vec<u32> = prompts.into_iter().flat_map(|prompt| prompt.map_or([0; WORDS], ids)).collect();
    Ok(vec![Tensor::from_vec(ids, (count, WORDS), device)?])
}

/// The words of a prompt, each kind in its place.
fn ids(prompt: ShapesPrompt) -> [u32; WORDS] {
    let of_group = |group: Group| {
        [group.count as u32, group.colour.map_or(0, |colour| COLOURS + colour as u32), SHAPES + group.shape as u32]
    };
    let [count, colour, shape] = of_group(prompt.first);
    match prompt.second {
        None => [count, colour, shape, 0, 0, 0, 0],
        Some((relation, second)) => {
            let [second_count, second_colour, second_shape] = of_group(second);
            [count, colour, shape, RELATIONS + relation as u32, second_count, second_colour, second_shape]
        }
    }
}

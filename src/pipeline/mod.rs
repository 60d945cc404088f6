//! What lies between a prompt and a picture: conditioning, velocity model, decoder; and the base model's weights.

mod config;
mod glyphs;
mod scheduler;
mod sd35;

pub(crate) use config::is_there;
pub use config::{Kind, LoraSection, ModelConfig};
pub use glyphs::{encode_pictures, random, weights as glyphs_weights};
pub use sd35::Parts as Sd35Parts;

use crate::comm::Communicator;
use crate::data::Prompt;
use crate::error::Result;
use crate::model::Model;
use crate::model::text::Filled;
use crate::params::{ParamSet, Values};
use candle_core::{Device, Tensor};

/// A text-to-image model with its base weights.
pub struct Pipeline {
    /// The velocity model.
    pub model: Model,
    /// The base weights, and fresh adapters if adapters are trained: read when they are asked for.
    pub base: Box<dyn Values>,
    /// Digest of the base weights.
    pub base_digest: String,
    /// Where the tensors lie.
    pub device: Device,
    /// How prompts become conditioning and samples pictures.
    pub task: Task,
}

/// What differs between the base models beside the velocity model.
pub enum Task {
    /// Prompts as characters and colours, pictures as they are.
    Glyphs,
    /// Prompts through text encoders, pictures through a decoder.
    Sd35(Box<Sd35Parts>),
}

impl Pipeline {
    /// The model of the configuration with its weights; `seed` draws the adapters.
    pub fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        match config.kind {
            Kind::Glyphs => glyphs::load(config, seed, device),
            Kind::Sd35Medium => sd35::load(config, seed, device),
        }
    }

    /// The base weights and adapters, read whole.
    pub fn params(&self) -> Result<ParamSet> {
        ParamSet::read(&self.model.specs(), &*self.base)
    }

    /// Hands over the base weights and adapters; the pipeline keeps none. Their files are closed when the value is dropped.
    pub fn take_base(&mut self) -> Box<dyn Values> {
        std::mem::replace(&mut self.base, Box::new(ParamSet::default()))
    }

    /// Prepares texts for [`Pipeline::encode`] and [`Pipeline::negative`]. Every rank calls it once, with all of the run.
    pub fn prepare(config: &ModelConfig, texts: &[&str], device: &Device, comm: &dyn Communicator) -> Result<()> {
        match config.kind {
            Kind::Glyphs => Ok(()),
            Kind::Sd35Medium => {
                let Filled { found, encoded } = sd35::encode_prompts(config, texts, device, comm)?;
                tracing::info!("rank {}: {encoded} prompts encoded, {found} were in the cache", comm.rank());
                Ok(())
            }
        }
    }

    /// Conditioning of the prompts, tensors with a row a prompt.
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        match &self.task {
            Task::Glyphs => glyphs::encode(prompts, &self.device),
            Task::Sd35(parts) => parts.encode(prompts),
        }
    }

    /// What guidance leads away from: each prompt's negative one, or what the model usually does; as [`Self::encode`].
    pub fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        match &self.task {
            Task::Glyphs => glyphs::negative(prompts, &self.device),
            Task::Sd35(parts) => parts.negative(prompts),
        }
    }

    /// Pictures `[B, 3, H, W]` in [0, 1] of samples x0 `[B, C, H, W]`.
    pub fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        match &self.task {
            Task::Glyphs => glyphs::decode(x0),
            Task::Sd35(parts) => parts.decode(x0),
        }
    }

    /// Height and width of a picture.
    pub fn picture(&self) -> (usize, usize) {
        let (_, height, width) = self.model.latent;
        match &self.task {
            Task::Glyphs => (height, width),
            Task::Sd35(parts) => (height * parts.scale(), width * parts.scale()),
        }
    }
}

//! What lies between a prompt and a picture: conditioning, velocity model, decoder; and the base
//! model's weights.

mod base;
mod config;
mod glyphs;
mod kind;
mod parts;
mod pixels;
mod prompt_cache;
mod scheduler;
mod sd35;
mod shapes;

pub use base::{BaseFiles, BaseModel, Codec};
pub(crate) use config::is_there;
pub use config::{LoraSection, ModelConfig};
pub use kind::Kind;
pub use pixels::encode_pictures;
pub use prompt_cache::{Filled, PromptCache};

use crate::comm::Communicator;
use crate::data::Prompt;
use crate::error::Result;
use crate::model::Model;
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
    pub codec: Box<dyn Codec>,
}

impl Pipeline {
    /// The model of the configuration with its weights; `seed` draws the adapters.
    ///
    /// # Errors
    /// Files are absent, cannot be read, or are of another model.
    pub fn load(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        config.base()?.load(config, seed, device)
    }

    /// The model of this kind with random weights, to be pretrained.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] for a model whose weights are only read.
    pub fn random(kind: Kind, seed: u64, device: &Device) -> Result<Self> {
        kind.random(seed, device)
    }

    /// The base weights and adapters, read whole.
    pub fn params(&self) -> Result<ParamSet> {
        ParamSet::read(&self.model.specs(), &*self.base)
    }

    /// Hands over the base weights and adapters; the pipeline keeps none. Their files are closed
    /// when the value is dropped.
    pub fn take_base(&mut self) -> Box<dyn Values> {
        std::mem::replace(&mut self.base, Box::new(ParamSet::default()))
    }

    /// Prepares texts for [`Pipeline::encode`] and [`Pipeline::negative`]. Every rank calls it
    /// once, with all of the run.
    pub fn prepare(config: &ModelConfig, texts: &[&str], device: &Device, comm: &dyn Communicator) -> Result<()> {
        config.kind.prepare(config, texts, device, comm)
    }

    /// [`Codec::encode`].
    pub fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        self.codec.encode(prompts)
    }

    /// [`Codec::negative`].
    pub fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>> {
        self.codec.negative(prompts)
    }

    /// [`Codec::decode`].
    pub fn decode(&self, x0: &Tensor) -> Result<Tensor> {
        self.codec.decode(x0)
    }

    /// Height and width of a picture.
    pub fn picture(&self) -> (usize, usize) {
        let ((_, height, width), scale) = (self.model.latent, self.codec.scale());
        (height * scale, width * scale)
    }
}

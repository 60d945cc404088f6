//! What differs from one base model to another. Whoever needs to know asks here and matches on no
//! name.

use super::{ModelConfig, Pipeline};
use crate::checks::Check;
use crate::comm::Communicator;
use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::model::files::Weights;
use crate::model::{Model, mmdit};
use crate::reward::RewardKind;
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};

/// A base model: what its configuration means, and what a pipeline of it is made of. A further one
/// implements this in a file of its own and has its line in `kind.rs`.
pub trait BaseModel: Sync {
    /// `model.kind`.
    fn name(&self) -> &'static str;

    /// The keys that it reads beside those of `[model]` that every model has, such as `model.resolution`.
    fn keys(&self) -> &'static [&'static str] {
        &[]
    }

    /// Refuses values of its keys that cannot be meant, without a look at files.
    ///
    /// # Errors
    /// One line: key, value, remedy.
    fn check(&self, _config: &ModelConfig) -> Check {
        Ok(())
    }

    /// Refuses a prompt that it cannot read.
    ///
    /// # Errors
    /// [`crate::Error::Usage`]: what is wrong with the prompt.
    fn check_prompt(&self, _text: &str) -> Result<()> {
        Ok(())
    }

    /// Whether the weights that lie at `path` are its own.
    fn owns(&self, path: &Path) -> bool;

    /// Refuses files that are not there or not whole, before any time is spent.
    ///
    /// # Errors
    /// [`crate::Error::File`]: everything that is absent or cannot be read.
    fn check_files(&self, config: &ModelConfig) -> Result<()>;

    /// The linear layers that can have an adapter, and have one where the configuration names none.
    fn lora_targets(&self) -> &'static [&'static str];

    /// The rewards that an evaluation reports even if they are not among those of the run.
    fn eval_rewards(&self) -> &'static [RewardKind] {
        &[]
    }

    /// Whether a picture is one line of text, which the OCR reward reads without a detector.
    fn draws_one_line(&self) -> bool {
        false
    }

    /// The velocity model, without weights.
    ///
    /// # Errors
    /// [`crate::Error::Usage`] if the pictures do not fit the model, or what is wrong with the
    /// files that give its sizes.
    fn build(&self, config: &ModelConfig) -> Result<Model>;

    /// Floating-point operations of the velocity model's forward pass for one sample.
    ///
    /// # Errors
    /// What is wrong with the files that give the model's sizes.
    fn flops(&self, config: &ModelConfig) -> Result<f64>;

    /// Tokens of a picture, each of which goes through most of the linear layers.
    ///
    /// # Errors
    /// What is wrong with the files that give the model's sizes.
    fn image_tokens(&self, config: &ModelConfig) -> Result<usize>;

    /// The file of its scheduler, where there is one.
    fn scheduler(&self, _config: &ModelConfig) -> Option<PathBuf> {
        None
    }

    /// The folder of encoded prompts, of which each rank encodes its share for all.
    fn prompt_cache<'a>(&self, _config: &'a ModelConfig) -> Option<&'a Path> {
        None
    }

    /// Prepares texts for the pipeline's [`Codec`]; collective.
    ///
    /// # Errors
    /// What keeps the texts from being encoded.
    fn prepare(&self, _config: &ModelConfig, _texts: &[&str], _on: &Device, _comm: &dyn Communicator) -> Result<()> {
        Ok(())
    }

    /// The base weights, opened and not read.
    ///
    /// # Errors
    /// Files are absent, cannot be read, or do not fit the model.
    fn open(&self, config: &ModelConfig) -> Result<BaseFiles>;

    /// The pipeline; `seed` draws the adapters.
    ///
    /// # Errors
    /// As [`BaseModel::open`].
    fn load(&self, config: &ModelConfig, seed: u64, device: &Device) -> Result<Pipeline>;

    /// The pipeline with random weights, to be pretrained.
    ///
    /// # Errors
    /// [`Error::Usage`] for a model whose weights are only read.
    fn random(&self, _seed: u64, _device: &Device) -> Result<Pipeline> {
        let name = self.name();
        Err(Error::Usage(format!("{name} is not pretrained here: its weights are read from files")))
    }
}

/// A base model's weights, opened and not read, and its stages for their names and shapes.
pub struct BaseFiles {
    /// The stages.
    pub model: Model,
    /// The weights.
    pub weights: Weights,
    /// Sizes of a transformer that diffusers keeps in a folder; none: the weights are one file.
    pub transformer: Option<mmdit::Config>,
}

/// What stands before and behind a velocity model.
pub trait Codec: Send + Sync {
    /// Conditioning of the prompts, tensors with a row for each prompt.
    ///
    /// # Errors
    /// A prompt cannot be read, or was not prepared.
    fn encode(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>>;

    /// What guidance leads away from: each prompt's negative one, or what the model usually does;
    /// as [`Codec::encode`].
    ///
    /// # Errors
    /// As [`Codec::encode`].
    fn negative(&self, prompts: &[Prompt]) -> Result<Vec<Tensor>>;

    /// Pictures `[B, 3, H, W]` in [0, 1] of samples x0 `[B, C, H / scale, W / scale]`.
    ///
    /// # Errors
    /// The samples are none of the model's.
    fn decode(&self, x0: &Tensor) -> Result<Tensor>;

    /// Pixels of a picture along a side of a latent's pixel.
    fn scale(&self) -> usize {
        1
    }
}

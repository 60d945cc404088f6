//! The base model of a run, opened for an export.

use crate::error::{Error, Result};
use crate::model::files::{Transformer, Weights};
use crate::model::{Model, mmdit};
use crate::params::LoraConfig;
use crate::pipeline::{self, Kind, ModelConfig};
use std::path::Path;

/// A base model with its weights, which are read tensor by tensor.
pub struct Base {
    /// Its stages, for names and shapes.
    pub model: Model,
    /// Its weights.
    pub weights: Weights,
    /// Digest of the weights, as checkpoints hold it.
    pub digest: String,
    /// Sizes of a transformer of Stable Diffusion 3.5; none for the embedded task's model.
    pub(super) transformer: Option<mmdit::Config>,
}

impl Base {
    /// The base model of a run.
    ///
    /// # Errors
    /// Its files cannot be read or are of another model.
    pub fn of(config: &ModelConfig) -> Result<Self> {
        match (config.kind, config.transformer()) {
            (Kind::Glyphs, _) => {
                let model = config.build()?;
                let weights = pipeline::glyphs_weights(config, &model.specs())?;
                Ok(Self { digest: weights.digest(), model, weights, transformer: None })
            }
            (Kind::Sd35Medium, Some(path)) => Self::transformer(path, config.adapters().as_ref()),
            (Kind::Sd35Medium, None) => Err(Error::Usage("model.path is missing: name the folder of the model".into())),
        }
    }

    /// A transformer of Stable Diffusion 3.5 in any layout, with the adapters `lora` beside it.
    ///
    /// # Errors
    /// As [`Transformer::open`].
    pub fn transformer(path: &Path, lora: Option<&LoraConfig>) -> Result<Self> {
        let Transformer { config, weights } = Transformer::open(path)?;
        // Names and shapes are those of every size of latent.
        let model = mmdit::model(&config, (config.patch_size, config.patch_size), lora)?;
        Ok(Self { digest: weights.digest(), model, weights, transformer: Some(config) })
    }
}

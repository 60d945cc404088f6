//! The base model of a run, opened for an export.

use crate::error::Result;
use crate::model::files::{Transformer, Weights};
use crate::model::{Model, mmdit};
use crate::params::{LoraConfig, Role, Trainable};
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
        match config.kind {
            Kind::Glyphs => Self::glyphs(config),
        }
    }

    fn glyphs(config: &ModelConfig) -> Result<Self> {
        let weights = match &config.path {
            Some(path) => Weights::open(path)?,
            None => Weights::embedded(Path::new("the embedded base model"), pipeline::GLYPHS_BASE)?,
        };
        let model = pipeline::build(config);
        let specs = model.specs();
        let base = specs.iter().flat_map(|specs| specs.iter()).filter(|spec| spec.role != Role::Adapter);
        weights.check(base.map(|spec| (spec.name.as_str(), spec.shape.as_slice())), |_| false)?;
        Ok(Self { digest: weights.digest(), model, weights, transformer: None })
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

    /// The adapters of a run, if they are what it trains.
    pub fn lora(config: &ModelConfig) -> Option<LoraConfig> {
        (config.trainable == Trainable::Lora).then(|| config.lora.clone())
    }
}

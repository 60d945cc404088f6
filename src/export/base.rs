//! The base model of a run, opened for an export.

use super::Options;
use super::parts::Parts;
use crate::error::Result;
use crate::model::files::Weights;
use crate::model::{Model, mmdit};
use crate::params::LoraConfig;
use crate::pipeline::{BaseFiles, ModelConfig};
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
    /// The pipeline that the transformer is a part of, where its folder is there.
    pub(super) pipeline: Option<Parts>,
}

impl Base {
    /// The base model of a run.
    ///
    /// # Errors
    /// Its files are absent, cannot be read or are of another model.
    pub fn of(config: &ModelConfig) -> Result<Self> {
        let pipeline = config.path.as_deref().map(Parts::of).transpose()?.flatten();
        Ok(Self { pipeline, ..Self::new(config.open()?) })
    }

    /// Refuses a pipeline of which a part is absent, before a long checkpoint is read.
    ///
    /// # Errors
    /// [`crate::Error::File`] that names the part.
    pub fn check_parts(&self, options: &Options) -> Result<()> {
        self.parts(options).map_or(Ok(()), Parts::check)
    }

    /// The pipeline whose parts are written beside the transformer.
    pub(super) fn parts(&self, options: &Options) -> Option<&Parts> {
        self.pipeline.as_ref().filter(|_| !options.transformer_only)
    }

    /// How diffusers loads this model merged in the folder `out`; none for the embedded task's.
    pub fn loaded_by(&self, out: &Path, options: &Options) -> Option<String> {
        self.transformer.as_ref()?;
        let out = out.display();
        if self.parts(options).is_some() {
            return Some(format!("a whole pipeline: StableDiffusion3Pipeline.from_pretrained(\"{out}\")"));
        }
        let folder = self.pipeline.as_ref().map_or(Path::new("FOLDER_OF_A_WHOLE_PIPELINE"), |parts| &parts.folder);
        Some(format!(
            "transformer only: StableDiffusion3Pipeline.from_pretrained(\"{}\", \
             transformer=SD3Transformer2DModel.from_pretrained(\"{out}\", subfolder=\"transformer\"))",
            folder.display()
        ))
    }

    /// A transformer of Stable Diffusion 3.5 in any layout, with the adapters `lora` beside it.
    ///
    /// # Errors
    /// As [`BaseFiles::transformer`].
    pub fn transformer(path: &Path, lora: Option<&LoraConfig>) -> Result<Self> {
        BaseFiles::transformer(path, lora).map(Self::new)
    }

    fn new(files: BaseFiles) -> Self {
        let BaseFiles { model, weights, transformer } = files;
        Self { digest: weights.digest(), model, weights, transformer, pipeline: None }
    }
}

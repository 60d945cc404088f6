//! What a model's scheduler says of the times that pictures are sampled at.

use super::ModelConfig;
use crate::error::Result;
use crate::fs;
use crate::model::files::read_shift;
use std::path::PathBuf;

impl ModelConfig {
    /// The file of the model's scheduler, if there is one: a link to nothing is one, which cannot be read.
    pub fn scheduler(&self) -> Option<PathBuf> {
        let file = self.kind.scheduler(self)?;
        let is_cut_off = file.parent().is_some_and(|folder| fs::is_named(folder) && !folder.is_dir());
        (is_cut_off || fs::is_named(&file)).then_some(file)
    }

    /// The timestep shift that the model is meant to be sampled with, by its scheduler; nothing where it says none.
    ///
    /// # Errors
    /// As [`read_shift`].
    pub fn shift(&self) -> Result<Option<f64>> {
        Ok(self.scheduler().map(|file| read_shift(&file)).transpose()?.flatten())
    }
}

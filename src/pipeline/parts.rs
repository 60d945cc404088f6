//! What a run depends on in a model's folder beside the transformer.

use super::ModelConfig;
use crate::error::Result;
use crate::model::files::{self, Format};
use std::collections::BTreeMap;

impl ModelConfig {
    /// The digests of what pictures and conditioning come from beside the transformer, by the parts' names: the VAE, the text
    /// encoders and their tokenizers; none of a model that is one file, or part of the program.
    ///
    /// # Errors
    /// [`crate::Error::File`]: a part is absent or cannot be read.
    pub fn part_digests(&self) -> Result<BTreeMap<String, String>> {
        match &self.path {
            Some(path) if Format::of(path)? == Format::Pipeline => {
                Ok(files::digests(path)?.into_iter().map(|(name, digest)| (name.to_owned(), digest)).collect())
            }
            _ => Ok(BTreeMap::new()),
        }
    }
}

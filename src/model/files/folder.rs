//! What lies at a path: a pipeline of diffusers, a transformer alone, the authors' single file, an adapter.

use super::format::EMBEDDED;
use super::index::INDEX;
use super::{Format, Weights, find, lora_names, sai};
use crate::error::{Error, Result};
use crate::fs;
use std::path::Path;

impl Format {
    /// The layout of what lies at `path`.
    ///
    /// # Errors
    /// There is nothing that can be read, or it is of no known layout.
    pub fn of(path: &Path) -> Result<Self> {
        if fs::is_named(&path.join(INDEX)) || path.join("transformer").is_dir() {
            return Ok(Self::Pipeline);
        }
        if fs::is_named(&path.join("adapter_config.json")) {
            return Ok(Self::PeftAdapter);
        }
        let weights = Weights::open(path)?;
        let has = |name: &str| weights.contains(name);
        if lora_names::is_adapter(&weights) {
            return Ok(lora_names::format(&weights));
        }
        if let Some((_, model)) = EMBEDDED.into_iter().find(|(own, _)| has(own)) {
            return Ok(Self::Embedded(model));
        }
        if sai::transformer(&weights)?.is_some() {
            return Ok(Self::SingleFile);
        }
        if has("pos_embed.proj.weight") && has("context_embedder.weight") {
            return Ok(Self::Transformer);
        }
        let first = weights.names().next().unwrap_or("no tensor").to_owned();
        Err(weights.error(format!(
            "is of no layout that is known here (it begins with {first}); give a diffusers folder of Stable Diffusion \
             3.5, its authors' single file, such as sd3.5_medium.safetensors, or a LoRA"
        )))
    }
}

/// A part of what lies at a path.
#[derive(Debug)]
pub struct Part {
    /// Its name, as the folder of a pipeline is called.
    pub name: String,
    /// Its tensors, by diffusers' names; none for a part without weights.
    pub weights: Option<Weights>,
    /// What is absent or cannot be read.
    pub problem: Option<String>,
}

/// The weights of the part `name` of what lies at `path`: a pipeline's folder, the authors' single file (transformer and
/// VAE only), or the part's own folder or file. By diffusers' names.
///
/// # Errors
/// The part is not there, or cannot be read.
pub fn open_part(path: &Path, name: &str) -> Result<Weights> {
    if fs::is_named(&path.join(INDEX)) || path.join(name).is_dir() {
        let folder = path.join(name);
        if !folder.is_dir() {
            let there: Vec<_> = find::names(path)?.into_iter().filter(|entry| path.join(entry).is_dir()).collect();
            let message = format!("has no folder {name}, only {there:?}; download the pipeline with all its folders");
            return Err(Error::File { path: path.to_path_buf(), message });
        }
        return Weights::open(&folder);
    }
    let weights = Weights::open(path)?;
    let renamed = match name {
        "transformer" => sai::transformer(&weights)?,
        "vae" => sai::vae(&weights)?,
        _ => None,
    };
    Ok(renamed.unwrap_or(weights))
}

//! What was trained, as files that diffusers and PEFT read.
//!
//! A LoRA for diffusers has alpha / rank multiplied into B: diffusers 0.33 knows no alpha in a file, later ones need
//! none then. PEFT's configuration holds only keys that every version from 0.10 on knows. A merged model is the whole
//! base model with the update added, with copies of the other parts of its pipeline.

mod adapter;
mod base;
mod file;
mod merged;
mod parts;
mod place;

pub use adapter::no_adapter;
pub use base::Base;
pub use place::Place;

use crate::error::Result;
use crate::params::{Entry, Layout, LoraConfig};
use adapter::Style;
use candle_core::{DType, Tensor};
use std::path::{Path, PathBuf};

/// What is written.
pub enum Form<'a> {
    /// `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`.
    Diffusers,
    /// `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`.
    Peft,
    /// This whole model with the update in its weights, for `StableDiffusion3Pipeline.from_pretrained`.
    Merged(&'a Base),
}

/// How it is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// Type of the tensors; none: f32 for an adapter, that of the base model's files for a merged model.
    pub dtype: Option<DType>,
    /// Of a merged model the transformer alone, without the other parts of the pipeline.
    pub transformer_only: bool,
    /// Largest length of a file of a merged model in bytes; a larger model is written in shards.
    pub shard_bytes: usize,
}

/// Shards as diffusers cuts them, at 10 GB.
impl Default for Options {
    fn default() -> Self {
        Self { dtype: None, transformer_only: false, shard_bytes: 10_000_000_000 }
    }
}

/// Trained parameters.
pub struct Trained {
    /// The adapters' rank and scale, if they are what was trained; none: the whole model was.
    pub lora: Option<LoraConfig>,
    /// Where the parameters lie in `flat`.
    pub layout: Layout,
    /// The parameters `[total]`, f32.
    pub flat: Tensor,
}

impl Trained {
    /// Writes an export, which is whole or not there, and returns its files.
    ///
    /// # Errors
    /// An adapter is asked of a run that trained the whole model, or a file cannot be written.
    pub fn write(&self, form: &Form, place: &Place, options: &Options) -> Result<Vec<PathBuf>> {
        let adapter = |out: &Path, style| adapter::write(self, out, style, options.dtype.unwrap_or(DType::F32));
        place.fill(|out| match form {
            Form::Diffusers => adapter(out, Style::Diffusers),
            Form::Peft => adapter(out, Style::Peft),
            Form::Merged(base) => merged::write(self, base, out, options),
        })
    }

    /// A trained parameter.
    fn value(&self, entry: &Entry) -> Result<Tensor> {
        Ok(self.flat.narrow(0, entry.offset, entry.len)?.reshape(entry.shape.as_slice())?)
    }

    /// The trained parameter of this name, if it was trained.
    fn find(&self, name: &str) -> Option<&Entry> {
        self.layout.entries.iter().find(|entry| entry.name == name)
    }
}

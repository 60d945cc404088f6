//! What was trained, as files that diffusers and PEFT read.
//!
//! A LoRA for diffusers has alpha / rank multiplied into B: diffusers 0.33 knows no alpha in a file, later ones need
//! none then. PEFT's configuration holds only keys that every version from 0.10 on knows. A merged model is the whole
//! base model with the update added.

mod adapter;
mod base;
mod file;
mod merged;

pub use base::Base;

use crate::error::{Error, Result};
use crate::params::{Entry, Layout, LoraConfig};
use candle_core::{DType, Tensor};
use clap::ValueEnum;
use std::fs;
use std::path::{Path, PathBuf};

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`
    Diffusers,
    /// `adapter_config.json` and `adapter_model.safetensors`, for `PeftModel.from_pretrained`
    Peft,
    /// The whole model with the update in its weights
    Merged,
}

/// How it is written.
#[derive(Debug, Clone)]
pub struct Options {
    /// What.
    pub format: Format,
    /// Type of the tensors; none: f32 for an adapter, that of the base model's files for a merged model.
    pub dtype: Option<DType>,
    /// Whether an earlier export in the same place is replaced.
    pub force: bool,
    /// Largest length of a file of a merged model in bytes; a larger model is written in shards.
    pub shard_bytes: usize,
}

impl Options {
    /// The usual ones; shards as diffusers cuts them, at 10 GB.
    pub fn of(format: Format) -> Self {
        Self { format, dtype: None, force: false, shard_bytes: 10_000_000_000 }
    }
}

/// Trained parameters and the model that they belong to.
pub struct Trained {
    /// The base model.
    pub base: Base,
    /// The adapters' rank and scale, if they are what was trained; none: the whole model was.
    pub lora: Option<LoraConfig>,
    /// Where the parameters lie in `flat`.
    pub layout: Layout,
    /// The parameters `[total]`, f32.
    pub flat: Tensor,
}

impl Trained {
    /// Writes an export into the folder `out`, which is whole or not there, and returns its files.
    ///
    /// # Errors
    /// `out` is there already, an adapter is asked of a run that trained the whole model, or a file cannot be written.
    pub fn write(&self, out: &Path, options: &Options) -> Result<Vec<PathBuf>> {
        check_place(out, options.force)?;
        let name =
            out.file_name().ok_or_else(|| Error::Usage(format!("--out {}: is no folder's name", out.display())))?;
        let beside = |kind: &str| out.with_file_name(format!(".{kind}-{}", name.to_string_lossy()));
        let (writing, replaced) = (beside("writing"), beside("replaced"));
        remove(&writing)?;
        fs::create_dir_all(&writing).map_err(Error::io(&writing))?;
        let files = match options.format {
            Format::Merged => merged::write(self, &writing, options)?,
            format => adapter::write(self, &writing, format, options.dtype.unwrap_or(DType::F32))?,
        };
        if out.exists() {
            remove(&replaced)?;
            fs::rename(out, &replaced).map_err(Error::io(out))?;
        }
        fs::rename(&writing, out).map_err(Error::io(out))?;
        remove(&replaced)?;
        Ok(files.into_iter().map(|file| out.join(file)).collect())
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

/// Files and folders that an export can hold.
const OURS: [&str; 5] = [adapter::DIFFUSERS, adapter::PEFT, adapter::PEFT_CONFIG, merged::TRANSFORMER, merged::GLYPHS];

/// Refuses a place that holds something, or with `force` something else than an export.
fn check_place(out: &Path, force: bool) -> Result<()> {
    if !out.exists() {
        return Ok(());
    }
    let usage = |what: &str| Err(Error::Usage(format!("--out {}: {what}", out.display())));
    if !out.is_dir() {
        return usage("is a file; name a folder");
    }
    let names: Vec<_> = fs::read_dir(out)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(Error::io(out))?;
    match names.iter().find(|name| !OURS.iter().any(|ours| **name == **ours)) {
        _ if names.is_empty() => Ok(()),
        Some(other) => usage(&format!("holds {}, which no export writes; name another folder", other.display())),
        None if !force => usage("holds an export already; name another folder, or replace it with --force"),
        None => Ok(()),
    }
}

/// Removes a folder of our own that a killed export has left.
fn remove(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_dir_all(path).map_err(Error::io(path)) } else { Ok(()) }
}

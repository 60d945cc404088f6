//! `flowrl-dist export`.

use super::checkpoint::{Opened, Source, Which};
use super::print;
use crate::config::Use;
use crate::error::{EXIT_DONE, Error, Result};
use crate::export::{Base, Form, Options, Place, Trained, no_adapter};
use crate::observe::logging;
use crate::params::Layout;
use candle_core::{DType, Device};
use clap::ValueEnum;
use std::path::PathBuf;

/// What is exported, and where to.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    flowrl-dist export --checkpoint runs/a/checkpoints/update_00000300 --format diffusers --out lora\n  \
    flowrl-dist export --checkpoint runs/a --format merged --which policy --dtype bf16 --out model\n\n\
    Then, in Python, with diffusers and PEFT:\n  \
    pipeline.load_lora_weights(\"lora\")\n  \
    PeftModel.from_pretrained(transformer, \"lora\")\n  \
    StableDiffusion3Pipeline.from_pretrained(\"model\")")]
pub struct Arguments {
    /// The checkpoint, or the folder of a run, of which the newest is taken, or its checkpoints/BEST
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// What is written
    #[arg(long)]
    format: Format,
    /// The folder that is made
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Which of the three sets of parameters
    #[arg(long, default_value = "ema")]
    which: Which,
    /// The run's configuration [default: config.toml of the run's folder]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides one key of the configuration; may be repeated: --set model.path=MOVED
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Type of the tensors [default: of an adapter f32, of a merged model that of the base model]
    #[arg(long)]
    dtype: Option<Type>,
    /// merged: writes the transformer alone, without copies of the pipeline's other parts
    #[arg(long)]
    transformer_only: bool,
    /// Replaces an earlier export
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// An adapter: pytorch_lora_weights.safetensors, for pipeline.load_lora_weights
    Diffusers,
    /// An adapter: adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained
    Peft,
    /// The whole model with the update in its weights, for StableDiffusion3Pipeline.from_pretrained
    Merged,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Type {
    F32,
    Bf16,
    F16,
}

impl From<Type> for DType {
    fn from(of: Type) -> Self {
        match of {
            Type::F32 => Self::F32,
            Type::Bf16 => Self::BF16,
            Type::F16 => Self::F16,
        }
    }
}

/// Exports and says which files there are.
pub fn run(arguments: &Arguments) -> Result<i32> {
    logging::init(0, None, "info")?;
    let Arguments { format, which, transformer_only, out, .. } = arguments;
    if *transformer_only && *format != Format::Merged {
        return Err(Error::Usage("--transformer-only: belongs to --format merged; leave it out".into()));
    }
    let place = Place::new(out, arguments.force)?;
    let source = Source::checkpoint(&arguments.checkpoint, arguments.config.as_deref());
    let opened = source.open(&arguments.set, Use::Model)?;
    let dtype = arguments.dtype.map(DType::from);
    let options = Options { dtype, transformer_only: *transformer_only, ..Options::default() };
    let files = match format {
        Format::Diffusers => adapter(&opened, *which)?.write(&Form::Diffusers, &place, &options)?,
        Format::Peft => adapter(&opened, *which)?.write(&Form::Peft, &place, &options)?,
        Format::Merged => {
            let base = Base::of(&opened.config.model)?;
            base.check_parts(&options)?;
            let files = merged(&opened, *which, &base)?.write(&Form::Merged(&base), &place, &options)?;
            if let Some(words) = base.loaded_by(out, &options) {
                tracing::info!("{words}");
            }
            files
        }
    };
    let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    print(&files.join("\n"));
    Ok(EXIT_DONE)
}

/// The adapters of the checkpoint, for which it needs no base model.
fn adapter(opened: &Opened, which: Which) -> Result<Trained> {
    let lora = opened.config.model.adapters().ok_or_else(no_adapter)?;
    let (layout, flat) = opened.trained(which, None, &Device::Cpu)?.ok_or_else(no_checkpoint)?;
    Ok(Trained { lora: Some(lora), layout, flat })
}

/// The parameters of the checkpoint, which is of the base model.
fn merged(opened: &Opened, which: Which, base: &Base) -> Result<Trained> {
    let model = &opened.config.model;
    let layout = Layout::new(&base.model.specs(), model.trainable);
    let trained = opened.trained(which, Some((&base.digest, &layout)), &Device::Cpu)?;
    let (layout, flat) = trained.ok_or_else(no_checkpoint)?;
    Ok(Trained { lora: model.adapters(), layout, flat })
}

fn no_checkpoint() -> Error {
    Error::Usage("--checkpoint: names none".into())
}

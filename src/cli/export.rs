//! `flowrl-dist export`.

use super::checkpoint::{Source, Which};
use super::print;
use crate::error::{EXIT_DONE, Error, Result};
use crate::export::{Base, Format, Options, Trained};
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
    SD3Transformer2DModel.from_pretrained(\"model\", subfolder=\"transformer\")")]
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
    /// Type of the tensors [default: of an adapter f32, of a merged model that of the base model]
    #[arg(long)]
    dtype: Option<Type>,
    /// Replaces an earlier export
    #[arg(long)]
    force: bool,
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
    let options =
        Options { dtype: arguments.dtype.map(DType::from), force: arguments.force, ..Options::of(arguments.format) };
    let files = trained(arguments)?.write(&arguments.out, &options)?;
    let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    print(&files.join("\n"));
    Ok(EXIT_DONE)
}

/// The parameters of the checkpoint with their base model.
fn trained(arguments: &Arguments) -> Result<Trained> {
    let opened = Source::checkpoint(&arguments.checkpoint, arguments.config.as_deref()).open()?;
    let model = &opened.config.model;
    let base = Base::of(model)?;
    let layout = Layout::new(&base.model.specs(), model.trainable);
    let flat = opened.flat(arguments.which, &base.digest, &layout, &Device::Cpu)?;
    let flat = flat.ok_or_else(|| Error::Usage("--checkpoint: names none".into()))?;
    Ok(Trained { lora: model.adapters(), base, layout, flat })
}

//! `flowrl-dist export`.

use super::print;
use crate::checkpoint::{self, Identity, Resume};
use crate::config::RunConfig;
use crate::error::{EXIT_DONE, Error, Result};
use crate::export::{Base, Format, Options, Trained};
use crate::params::Layout;
use candle_core::{DType, Device, Tensor};
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// What is exported, and where to.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    flowrl-dist export --checkpoint runs/a/checkpoints/update_00000300 --format diffusers --out lora\n  \
    flowrl-dist export --checkpoint runs/a --format merged --which policy --dtype bf16 --out model\n\n\
    Then, in Python:\n  \
    pipeline.load_lora_weights(\"lora\")                                                  # --format diffusers\n  \
    PeftModel.from_pretrained(transformer, \"lora\")                                      # --format peft\n  \
    SD3Transformer2DModel.from_pretrained(\"model\", subfolder=\"transformer\")             # --format merged")]
pub struct Arguments {
    /// The checkpoint, or the folder of a run, of which the newest is taken
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

/// A set of parameters in a checkpoint.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Which {
    /// The trained parameters
    Policy,
    /// Their moving average, which is what evaluations look at
    Ema,
    /// The slow copy that samples
    Old,
}

impl Which {
    /// Its vector in a checkpoint.
    fn vector(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Ema => "ema",
            Self::Old => "old",
        }
    }
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
    let options =
        Options { dtype: arguments.dtype.map(DType::from), force: arguments.force, ..Options::of(arguments.format) };
    let files = trained(arguments)?.write(&arguments.out, &options)?;
    let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
    print(&files.join("\n"));
    Ok(EXIT_DONE)
}

/// The parameters of the checkpoint with their base model.
fn trained(arguments: &Arguments) -> Result<Trained> {
    let given = Resume::From(arguments.checkpoint.clone());
    let path = checkpoint::find(&given, Path::new(""))?.unwrap_or_else(|| arguments.checkpoint.clone());
    let reader = checkpoint::open(&path)?;
    let config = RunConfig::load(Some(&config_file(arguments, &path)?), &[])?;
    let base = Base::of(&config.model)?;
    let layout = Layout::new(&base.model.specs(), config.model.trainable);
    let identity = Identity {
        config_digest: config.digest()?,
        base_digest: base.digest.clone(),
        layout_digest: layout.digest(),
        total: layout.total,
        seed: config.run.seed,
    };
    for warning in reader.check_identity(&identity)? {
        eprintln!("flowrl-dist: {warning}");
    }
    let name = arguments.which.vector();
    let mut shard = reader.read_vectors(&[name], std::slice::from_ref(&(0..layout.total)))?;
    let flat = shard.vectors.remove(name).unwrap_or_default();
    let flat = Tensor::from_vec(flat, layout.total, &Device::Cpu)?;
    Ok(Trained { base, lora: config.model.adapters(), layout, flat })
}

/// The configuration of the run that wrote the checkpoint: OUT/config.toml of OUT/checkpoints/update_N.
fn config_file(arguments: &Arguments, checkpoint: &Path) -> Result<PathBuf> {
    if let Some(config) = &arguments.config {
        return Ok(config.clone());
    }
    let checkpoint = std::path::absolute(checkpoint).map_err(Error::io(checkpoint))?;
    let config = checkpoint.parent().and_then(Path::parent).map(|run| run.join("config.toml"));
    config.filter(|config| config.is_file()).ok_or_else(|| {
        let path = checkpoint.display();
        Error::Usage(format!("{path}: there is no config.toml two folders above it; give it with --config"))
    })
}

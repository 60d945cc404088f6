//! What a command takes a trained model from: a configuration, or a checkpoint and the configuration of its run.

use crate::checkpoint::{self, Identity, Reader, Resume};
use crate::comm::World;
use crate::config::{RUN_CONFIG, RunConfig, Use};
use crate::device;
use crate::error::{Error, Result};
use crate::params::{Layout, ParamSet};
use crate::pipeline::Pipeline;
use candle_core::{Device, Tensor};
use clap::ValueEnum;
use std::path::{Path, PathBuf};

/// Which model: that of a checkpoint, or the base model of a configuration.
#[derive(clap::Args)]
#[group(required = true, multiple = true)]
pub struct Source {
    /// The checkpoint, or the folder of a run, of which the newest is taken, or its checkpoints/BEST
    #[arg(long, value_name = "DIR")]
    checkpoint: Option<PathBuf>,
    /// The configuration [default: config.toml of the checkpoint's run]; without a checkpoint its base model is taken
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// A set of parameters in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Which {
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

/// A checkpoint or none, with the configuration.
pub struct Opened {
    /// The configuration.
    pub config: RunConfig,
    config_digest: String,
    /// What of the configuration is not as the checkpoint's run had it, as far as that is known.
    changes: Vec<String>,
    reader: Option<Reader>,
}

impl Source {
    /// A checkpoint, whose run's configuration counts where none is given.
    pub fn checkpoint(checkpoint: &Path, config: Option<&Path>) -> Self {
        Self { checkpoint: Some(checkpoint.to_path_buf()), config: config.map(Path::to_path_buf) }
    }

    /// Finds the checkpoint, and the configuration under the settings `set` with the prompts that `purpose` needs; no tensor
    /// is read.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is no complete checkpoint, [`Error::Usage`] where there is no configuration or
    /// it is wrong.
    pub fn open(&self, set: &[String], purpose: Use) -> Result<Opened> {
        let find = |given: &PathBuf| checkpoint::find(&Resume::From(given.clone()), Path::new(""));
        let path = self.checkpoint.as_ref().map(find).transpose()?.flatten();
        let reader = path.as_deref().map(checkpoint::open).transpose()?;
        let config = match (&self.config, &path) {
            (None, Some(path)) => Some(config_of_run(path)?),
            (config, _) => config.clone(),
        };
        let mut config = RunConfig::load_for(purpose, config.as_deref(), set)?;
        let config_digest = config.digest()?;
        let of_run = path.as_deref().and_then(RunConfig::of_run);
        let changes = of_run.map_or(Ok(Vec::new()), |of_run| config.changes_since(&of_run))?;
        if reader.is_some() {
            config.model.lora.path = None; // what the run began with, which the checkpoint has moved on from
        }
        Ok(Opened { config, config_digest, changes, reader })
    }
}

impl Opened {
    /// The parameters `which` of the checkpoint on `device`, with their layout; none where there is no checkpoint. `base` is the
    /// digest of the base model and the layout on it, where they are to be compared with the checkpoint's; without it the base
    /// model need not be there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the checkpoint is damaged or of another model than `base`.
    pub fn trained(
        &self,
        which: Which,
        base: Option<(&str, &Layout)>,
        device: &Device,
    ) -> Result<Option<(Layout, Tensor)>> {
        let Some(reader) = &self.reader else { return Ok(None) };
        let (config_digest, seed) = (self.config_digest.clone(), self.config.run.seed);
        let (identity, layout) = match base {
            Some((digest, layout)) => (Identity::new(config_digest, digest.to_owned(), layout, seed), layout.clone()),
            None => {
                let built =
                    || Ok::<_, Error>(Layout::new(&self.config.model.build()?.specs(), self.config.model.trainable));
                let layout = reader.layout().map_or_else(built, Ok)?;
                let base_digest = reader.manifest().identity.base_digest.clone();
                (Identity::new(config_digest, base_digest, &layout, seed), layout)
            }
        };
        for warning in reader.check_identity(&identity, &self.changes)? {
            tracing::warn!("{warning}");
        }
        let whole = 0..layout.total;
        let mut shard = reader.read_vectors(&[which.vector()], std::slice::from_ref(&whole))?;
        let flat = shard.vectors.remove(which.vector()).unwrap_or_default();
        let flat = Tensor::from_vec(flat, layout.total, device)?;
        Ok(Some((layout, flat)))
    }

    /// The configuration's device for this rank.
    pub fn device(&self, world: &World) -> Result<Device> {
        let place = world.place();
        let (device, why) = device::select(self.config.parallel.device, place.local_rank, place.ranks_on_host)?;
        tracing::debug!("rank {} on {why}", world.rank());
        Ok(device)
    }

    /// The model with its base weights on `device`, ready for `prompts`, and the parameters: `which` of the checkpoint, else
    /// the base model's. Every rank of `world` calls it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the checkpoint is damaged or of another model than the configuration's.
    pub fn load(&self, which: Which, prompts: &[&str], device: &Device, world: &World) -> Result<(Pipeline, ParamSet)> {
        Pipeline::prepare(&self.config.model, prompts, device, &*world.host)?;
        let pipeline = Pipeline::load(&self.config.model, self.config.run.seed, device)?;
        if let Some(reader) = &self.reader {
            reader.check_parts(&self.config.model.part_digests()?)?;
        }
        let layout = Layout::new(&pipeline.model.specs(), self.config.model.trainable);
        let base = (pipeline.base_digest.as_str(), &layout);
        let params = match self.trained(which, Some(base), &pipeline.device)? {
            Some((layout, flat)) => pipeline.params()?.with_flat(&layout, &flat)?,
            None => pipeline.params()?,
        };
        Ok((pipeline, params))
    }
}

/// The configuration of the run that wrote a checkpoint: OUT/config.toml of OUT/checkpoints/update_N.
fn config_of_run(checkpoint: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(checkpoint).map_err(Error::io(checkpoint))?;
    let config = absolute.parent().and_then(Path::parent).map(|run| run.join(RUN_CONFIG));
    config.filter(|config| config.is_file()).ok_or_else(|| {
        let path = checkpoint.display();
        Error::Usage(format!("{path}: there is no config.toml two folders above it; give it with --config"))
    })
}

//! `flowrl-dist [train]`.

use super::{launch, on_ranks, print};
use crate::checkpoint::{self, Resume};
use crate::comm::launched_ranks;
use crate::config::{RUN_CONFIG, RunConfig, file_in_the_way};
use crate::error::{EXIT_DONE, EXIT_RESTART, Error, Result};
use crate::observe::logging::say;
use crate::plan::Plan;
use crate::train::{Outcome, Own, train};
use std::path::{Path, PathBuf};

/// What a run is given.
#[derive(clap::Args)]
pub struct Arguments {
    /// Configuration file (TOML); without it the embedded glyphs task
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides one key; may be repeated: --set optim.lr=1e-4
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Run folder; overrides run.out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// auto: continue from the newest checkpoint of the run folder, if any; never: start anew; or a checkpoint to continue
    /// from. Where the configuration is another than before, a warning names the keys; another base model, other trained
    /// parameters or a changed stage that has begun are refused
    #[arg(long, value_name = "auto|never|CHECKPOINT", default_value = "auto")]
    resume: String,
}

impl Arguments {
    /// The checked configuration.
    pub fn config(&self) -> Result<RunConfig> {
        let mut config = RunConfig::load(self.config.as_deref(), &self.set)?;
        if let Some(out) = &self.out {
            if let Some(file) = file_in_the_way(out) {
                let (out, file) = (out.display(), file.display());
                return Err(Error::Usage(format!("--out {out}: {file} is a file; name a folder")));
            }
            config.run.out = out.clone();
        }
        self.refuse_moved(&config.run.out)?;
        Ok(config)
    }

    /// Refuses the configuration of a run folder that is not `out`, where nobody has said which of the two is meant.
    fn refuse_moved(&self, out: &Path) -> Result<()> {
        let is_out = |setting: &String| setting.split('=').next().is_some_and(|key| key.trim() == "run.out");
        let Some(file) = self.config.as_deref().filter(|file| file.ends_with(RUN_CONFIG)) else { return Ok(()) };
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let is_same = || folder.canonicalize().ok().is_some_and(|folder| out.canonicalize().ok() == Some(folder));
        if self.out.is_some() || self.set.iter().any(is_out) || !checkpoint::root(folder).is_dir() || is_same() {
            return Ok(());
        }
        let (file, folder, out) = (file.display(), folder.display(), out.display());
        Err(Error::Usage(format!(
            "{file}: run.out = {out}, and the run lies in {folder}: it was moved or copied; go on here with --out {folder}, or \
             name another --out"
        )))
    }
}

/// Trains.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let config = arguments.config();
    let launch = launch(config.as_ref().ok());
    let prepared = config.and_then(|config| prepare(arguments, config));
    on_ranks(&launch, prepared, |(config, resume), world| {
        let first = world.rank() == 0;
        match train(config, Own::default(), resume, world)? {
            Outcome::Done(line) => {
                if first {
                    print(&line);
                }
                Ok(EXIT_DONE)
            }
            Outcome::Interrupted(line) => {
                if first {
                    say(&line);
                }
                Ok(EXIT_RESTART)
            }
        }
    })
}

/// Checks what can be before the ranks meet.
fn prepare(arguments: &Arguments, config: RunConfig) -> Result<(RunConfig, Resume)> {
    let resume = arguments.resume.parse()?;
    if let Some(ranks) = launched_ranks()? {
        Plan::of(&config, ranks)?;
    }
    config.check_files()?;
    Ok((config, resume))
}

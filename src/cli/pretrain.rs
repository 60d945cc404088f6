//! `flowrl-dist pretrain`.

use super::{DEADLINE, on_ranks, print};
use crate::comm::{Backend, Launch};
use crate::error::{EXIT_DONE, Result};
use crate::observe::{Progress, logging};
use crate::pretrain::{PretrainConfig, pretrain};
use crate::reward::build;
use std::path::PathBuf;

/// What pretraining is given.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  mpirun -n 2 flowrl-dist pretrain --config configs/glyphs/pretrain.toml")]
pub struct Arguments {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Overrides one key; may be repeated: --set optim.lr=1e-3
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Pretrains and says where the weights are.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let check = |config: &PretrainConfig| config.check().map_err(|e| e.to_string());
    let config = crate::config::read(&arguments.config, &arguments.set, check);
    on_ranks(&Launch::new(Backend::Auto, DEADLINE), config, |config, world| {
        let terminal = logging::init(world.rank(), None, "info")?;
        let rewards = build(&config.task.rewards(), candle_core::utils::get_num_threads())?.into();
        let mut progress = Progress::new(config.steps, world.rank() == 0, &terminal);
        progress.note(&world.describe());
        let digest = pretrain(config, world, &rewards, &mut progress)?;
        progress.finish();
        if world.rank() == 0 {
            print(&format!("{} blake3 {digest}", config.out.display()));
        }
        Ok(EXIT_DONE)
    })
}

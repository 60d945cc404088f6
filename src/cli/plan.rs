//! `flowrl-dist plan`.

use super::print;
use crate::config::RunConfig;
use crate::error::{EXIT_DONE, Error, Result};
use std::path::PathBuf;

/// What a plan is asked for.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  flowrl-dist plan --config configs/glyphs/flow-awr.toml --ranks 8")]
pub struct Arguments {
    /// Configuration file (TOML); without it the embedded glyphs task
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Overrides one key, as often as wanted
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Ranks of the run
    #[arg(long, default_value_t = 1)]
    ranks: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints the geometry of a run, or what makes it impossible.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let config = RunConfig::load(arguments.config.as_deref(), &arguments.set)?;
    let plan = config.plan(arguments.ranks)?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&plan).map_err(|e| Error::Failed(format!("no JSON: {e}")))?,
        false => plan.to_string(),
    };
    print(&text);
    Ok(EXIT_DONE)
}

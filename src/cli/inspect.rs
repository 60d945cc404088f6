//! `flowrl-dist inspect`.

use super::print;
use crate::checkpoint;
use crate::error::{EXIT_DONE, Error, Result};
use std::path::PathBuf;

/// Which checkpoint.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  flowrl-dist inspect runs/glyphs/checkpoints/update_00000050")]
pub struct Arguments {
    /// The checkpoint's folder
    checkpoint: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Verifies every checksum, then prints.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let description = checkpoint::describe(&arguments.checkpoint)?;
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&description).map_err(|e| Error::Failed(format!("no JSON: {e}")))?,
        false => description.to_string(),
    };
    print(&text);
    Ok(EXIT_DONE)
}

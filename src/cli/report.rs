//! `flowrl-dist report`.

use super::print;
use crate::error::{EXIT_DONE, Error, Result};
use std::path::PathBuf;

/// Which run.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  flowrl-dist report runs/glyphs")]
pub struct Arguments {
    /// The run folder
    run: PathBuf,
}

/// Writes the page and says where it is.
pub fn run(arguments: &Arguments) -> Result<i32> {
    if !arguments.run.join("metrics.jsonl").is_file() {
        let run = arguments.run.display();
        return Err(Error::Usage(format!("{run}: is no run folder (no metrics.jsonl in it); give the --out of a run")));
    }
    print(&crate::observe::report::write(&arguments.run)?.display().to_string());
    Ok(EXIT_DONE)
}

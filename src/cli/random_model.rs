//! `flowrl-dist random-model`.

use super::print;
use crate::error::{EXIT_DONE, Result};
use crate::model::random::{Size, write};
use std::path::PathBuf;

/// What is written.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  flowrl-dist random-model --size tiny --out models/sd35-tiny\n  \
    mpirun -n 2 flowrl-dist --config configs/sd35/tiny.toml")]
pub struct Arguments {
    /// Size of the model
    #[arg(long, value_enum, default_value = "tiny")]
    size: Size,
    /// The folder, which must not be there yet
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seed of the weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Writes the folder and says so.
pub fn run(arguments: &Arguments) -> Result<i32> {
    write(arguments.size, arguments.seed, &arguments.out)?;
    print(&format!("{}: a model with random weights", arguments.out.display()));
    Ok(EXIT_DONE)
}

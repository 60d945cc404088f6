//! `flowrl-dist random-model`.

use super::print;
use crate::error::{EXIT_DONE, Result};
use crate::model::random::{Size, Written, write};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

const BAR: &str = "{msg:>14} [{wide_bar}] {bytes} of {total_bytes}, {eta} left";

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
    // Where stderr is no terminal nothing is drawn.
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::default_bar().template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar()));
    let on_written = |written: Written| {
        bar.set_length(written.of);
        bar.set_message(written.part.to_owned());
        bar.set_position(written.bytes);
    };
    write(arguments.size, arguments.seed, &arguments.out, &on_written)?;
    bar.finish_and_clear();
    print(&format!("{}: a model with random weights", arguments.out.display()));
    Ok(EXIT_DONE)
}

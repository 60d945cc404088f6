//! `flowrl-dist bench`.

mod comm;

use super::{on_ranks, print};
use crate::comm::Backend;
use crate::error::{EXIT_DONE, Error, Result};
use crate::forecast::calibrate;
use std::path::PathBuf;

/// What is measured.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  mpirun -n 4 flowrl-dist bench comm\n  \
    flowrl-dist bench machine --run runs/short --out configs/machines/here.toml")]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Bandwidth of the collectives by size, beside a bare exchange between two ranks
    Comm {
        /// Largest message, MiB
        #[arg(long, default_value_t = 64)]
        most: usize,
    },
    /// A machine file for plan, from the phase times of a short run
    Machine {
        /// Run folder
        #[arg(long, value_name = "DIR")]
        run: PathBuf,
        /// GPUs, or cores, of a node
        #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
        devices: usize,
        /// Memory of each, GiB
        #[arg(long, default_value_t = 4.0)]
        memory_gib: f64,
        /// Where the machine file goes; without it to the terminal
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
}

/// Measures and prints.
pub fn run(arguments: &Arguments) -> Result<i32> {
    match &arguments.what {
        What::Comm { most } => on_ranks(Backend::Auto, 600, |world| {
            let table = comm::measure(world, most << 20)?;
            if world.rank() == 0 {
                print(&table);
            }
            Ok(EXIT_DONE)
        }),
        What::Machine { run, devices, memory_gib, out } => {
            let machine = calibrate(run, (*devices).max(1), *memory_gib)?;
            let text = toml::to_string(&machine).map_err(|e| Error::Failed(format!("no TOML: {e}")))?;
            match out {
                Some(path) => std::fs::write(path, text).map_err(Error::io(path))?,
                None => print(&text),
            }
            Ok(EXIT_DONE)
        }
    }
}

//! `flowrl-dist bench`.

mod comm;

use super::{DEADLINE, check_out, on_ranks, print};
use crate::checkpoint;
use crate::comm::{Backend, Launch};
use crate::error::{EXIT_DONE, Error, Result};
use crate::forecast::calibrate;
use crate::fs;
use std::path::{Path, PathBuf};

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
        What::Comm { most } => on_ranks(&Launch::new(Backend::Auto, DEADLINE), Ok(()), |(), world| {
            let table = comm::measure(world, most << 20)?;
            if world.rank() == 0 {
                print(&table);
            }
            Ok(EXIT_DONE)
        }),
        What::Machine { run, devices, memory_gib, out } => {
            if let Some(path) = out {
                check_out("--out", path)?;
            }
            let text = machine(run, (*devices).max(1), *memory_gib)?;
            match out {
                Some(path) => {
                    fs::write_out(path, text)?;
                    print(&format!("{}: give it to plan with --machine", path.display()));
                }
                None => print(&text),
            }
            Ok(EXIT_DONE)
        }
    }
}

/// The machine file of a run, in which what the run could not measure is called a guess.
fn machine(run: &Path, devices: usize, memory_gib: f64) -> Result<String> {
    if !run.join("config.toml").is_file() {
        let message = "is no run folder (no config.toml in it); give the --out of a run";
        return Err(Error::Usage(format!("--run {}: {message}", run.display())));
    }
    let machine = calibrate(run, devices, memory_gib)?;
    let text = toml::to_string(&machine).map_err(|e| Error::Failed(format!("no TOML: {e}")))?;
    let newest = checkpoint::newest(&checkpoint::root(run))?;
    let ranks = newest.map(|found| Ok::<_, Error>(checkpoint::open(&found.path)?.manifest().world_size)).transpose()?;
    let guesses = match ranks {
        Some(2..) => "inter_gb_s, here intra_gb_s, and latency_us are guesses: the run was on one node.",
        _ => "All three are guesses: one rank sends nothing. `mpirun -n RANKS flowrl-dist bench comm` measures them.",
    };
    Ok(text.replace("[network]\n", &format!("[network]\n# {guesses}\n")))
}

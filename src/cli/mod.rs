//! The command line: one file a command.

mod advice;
mod bench;
mod checkpoint;
mod eval;
mod export;
mod inspect;
mod plan;
mod pretrain;
mod prompts;
mod random_model;
mod report;
mod sample;
mod serve_reward;
mod train;

use crate::comm::{Launch, World, peers_wait};
use crate::config::RunConfig;
use crate::error::{EXIT_DONE, EXIT_USAGE, Error, Result};
use crate::observe::logging::say;
use crate::plain;
use clap::{Parser, Subcommand};
use std::path::Path;
use std::time::Duration;

/// Online RL post-training of rectified-flow text-to-image models on many ranks.
///
/// Without a command it trains; without a configuration it trains the embedded glyphs task.
#[derive(Parser)]
#[command(name = "flowrl-dist", version, max_term_width = 110, args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:\n  flowrl-dist\n  mpirun -n 2 flowrl-dist --out runs/first\n  \
    mpirun -n 8 flowrl-dist --config configs/glyphs/advantage-flow.toml --set run.seed=7\n\n\
    Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 saved and wants to be started again.")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: train::Arguments,
}

#[derive(Subcommand)]
enum Command {
    /// Train: from the start, or on from the newest checkpoint of the run folder
    #[command(
        after_help = "Example:\n  mpirun -n 2 flowrl-dist train --config configs/glyphs/flow-awr.toml --out runs/a"
    )]
    Train(train::Arguments),
    /// Print what a run would do, on how many ranks: no GPU, no MPI
    Plan(plan::Arguments),
    /// Sample pictures of prompts, with a checkpoint or the base model
    Sample(sample::Arguments),
    /// Score a checkpoint on the prompts of the run's evaluations, or on others
    Eval(eval::Arguments),
    /// Make the base model of an embedded task, by supervised training
    Pretrain(pretrain::Arguments),
    /// Write a model folder with random weights, to try a machine or a queue with
    RandomModel(random_model::Arguments),
    /// Write the report page of a run folder, or compare several
    Report(report::Arguments),
    /// Write a prompt file
    #[command(after_help = "Example:\n  flowrl-dist prompts geneval --out train_metadata.jsonl -n 50000 --without \
        test_metadata.jsonl")]
    Prompts(prompts::Arguments),
    /// Serve rewards to training runs over HTTP
    #[command(
        after_help = "Example:\n  flowrl-dist serve-reward --reward ocr jpeg-compressibility --listen 127.0.0.1:8000\n\n\
        In the run's configuration: [[reward]] name = \"remote\", url = \"http://127.0.0.1:8000\", reward = \"ocr\""
    )]
    ServeReward(serve_reward::Arguments),
    /// Write what was trained as files that diffusers and PEFT read
    Export(export::Arguments),
    /// Verify a checkpoint, or a model's files, and print what they hold
    Inspect(inspect::Arguments),
    /// Measure this machine: its collectives, or the speeds that plan predicts times with
    Bench(bench::Arguments),
}

/// Runs the program; returns its exit code.
pub fn run() -> i32 {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(e) => {
            let command = std::env::args_os().nth(1).unwrap_or_default();
            match advice::line(&e, &command.to_string_lossy()) {
                Some(line) => say(&line),
                None => tell_usage(&e),
            }
            return if e.use_stderr() { EXIT_USAGE } else { EXIT_DONE };
        }
    };
    let result = match arguments.command {
        None => train::run(&arguments.train),
        Some(Command::Train(arguments)) => train::run(&arguments),
        Some(Command::Plan(arguments)) => plan::run(&arguments),
        Some(Command::Sample(arguments)) => sample::run(&arguments),
        Some(Command::Eval(arguments)) => eval::run(&arguments),
        Some(Command::Pretrain(arguments)) => pretrain::run(&arguments),
        Some(Command::RandomModel(arguments)) => random_model::run(&arguments),
        Some(Command::Prompts(arguments)) => prompts::run(&arguments),
        Some(Command::Report(arguments)) => report::run(&arguments),
        Some(Command::ServeReward(arguments)) => serve_reward::run(&arguments),
        Some(Command::Export(arguments)) => export::run(&arguments),
        Some(Command::Inspect(arguments)) => inspect::run(&arguments),
        Some(Command::Bench(arguments)) => bench::run(&arguments),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            // An error that every rank hits is printed once: rank 0 exits first, which ends the others before they print.
            if crate::comm::launched_rank() > 0 {
                std::thread::sleep(Duration::from_secs(2));
            }
            say(&e.to_string());
            e.exit_code()
        }
    }
}

/// The longest that a collective may wait where no configuration says it.
const DEADLINE: Duration = Duration::from_secs(600);

/// A rank that cannot begin waits so long for the others, to tell them.
const TELLING: Duration = Duration::from_secs(30);

/// How the ranks of a run are joined; where its configuration could not be read, in whatever way they can be.
fn launch(config: Option<&RunConfig>) -> Launch {
    match config {
        None => Launch { backend: None, deadline: DEADLINE, settings: None },
        Some(config) => Launch {
            backend: Some(config.parallel.backend),
            deadline: Duration::from_secs(config.parallel.deadline_s),
            settings: config.to_toml().ok(),
        },
    }
}

/// Runs `work` on the ranks that the launcher started, with what each of them has prepared. An error of one rank ends all of
/// them at once: returning from main would wait for peers that wait for this rank.
fn on_ranks<T>(launch: &Launch, prepared: Result<T>, work: impl FnOnce(&T, &World) -> Result<i32>) -> Result<i32> {
    let prepared = match choose_threads().and(prepared) {
        Err(e) if !peers_wait() => return Err(e),
        prepared => prepared,
    };
    if let Err(e) = &prepared {
        end_later(e);
    }
    let world = match World::from_environment(launch) {
        Ok(world) => world,
        Err(other) => return Err(prepared.err().unwrap_or(other)),
    };
    let prepared = match world.all_ready(prepared) {
        Ok(prepared) => prepared,
        Err(e) if world.rank() == 0 || matches!(e, Error::Peer(_)) => return Err(e),
        Err(e) => return Ok(e.exit_code()), // rank 0 says it
    };
    match work(&prepared, &world) {
        Ok(code) => Ok(code),
        Err(e) if world.world_size() == 1 => Err(e),
        Err(e @ Error::Usage(_)) if world.rank() > 0 => {
            std::thread::sleep(Duration::from_secs(2)); // as above
            world.abort(e.exit_code(), &format!("flowrl-dist: {e}"))
        }
        Err(e) => world.abort(e.exit_code(), &format!("flowrl-dist: {e}")),
    }
}

/// A rank that cannot begin tells its peers, which would wait for it until the deadline; it does not wait that long for
/// them.
fn end_later(e: &Error) {
    let (line, code) = (e.to_string(), e.exit_code());
    let end = move || {
        std::thread::sleep(TELLING);
        say(&line);
        signal_hook::low_level::exit(code)
    };
    // Without the thread the launcher and the others' deadline still end the job.
    let _ = std::thread::Builder::new().name("telling".into()).spawn(end);
}

/// Gives each rank of a host its share of the cores, or as many as the user chose with RAYON_NUM_THREADS, and starts them.
///
/// # Errors
/// [`Error::Usage`]: the variable is no number of threads, or the system gives this process no more.
fn choose_threads() -> Result<()> {
    const VARIABLE: &str = "RAYON_NUM_THREADS";
    const MOST: usize = 4096;
    let threads = match std::env::var_os(VARIABLE) {
        Some(given) => match given.to_str().and_then(|text| text.parse().ok()) {
            Some(threads) if (1..=MOST).contains(&threads) => threads,
            _ => return Err(Error::Usage(format!("{VARIABLE} = {given:?}: must be a whole number, 1 to {MOST}"))),
        },
        None => crate::comm::threads_per_rank(),
    };
    // candle asks the variable, too.
    // SAFETY: nothing else runs yet: MPI, rayon and the watchdog start after this.
    unsafe { std::env::set_var(VARIABLE, threads.to_string()) };
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().map_err(|e| {
        Error::Usage(format!(
            "{threads} threads cannot be started ({e}): raise the limit (ulimit -u, the job's or container's), or set \
             {VARIABLE} to fewer"
        ))
    })
}

/// Sees to it that a file can be written at `path`, the value of `option`, before time is spent: makes its folder.
fn check_out(option: &str, path: &Path) -> Result<()> {
    let usage = |message: String| Error::Usage(format!("{option} {}: {message}", path.display()));
    match std::fs::metadata(path) {
        Ok(data) if data.is_dir() => return Err(usage("is a folder; name a file".into())),
        Ok(data) if !data.is_file() => return Ok(()), // a pipe
        _ => {}
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = std::fs::create_dir_all(folder).and_then(|()| tempfile::tempfile_in(folder));
    made.map(drop).map_err(|e| usage(format!("cannot be written ({e}); name a file in a folder that you may write to")))
}

/// Prints clap's help, or what it says of a wrong command line, which quotes the arguments.
fn tell_usage(error: &clap::Error) {
    let text = error.render().to_string();
    match plain::short_lines(&text) {
        plain if plain != text => eprint!("{plain}"),
        _ => drop(error.print()), // with its colours
    }
}

/// Prints a result on stdout; a closed pipe is the reader's choice.
fn print(text: &str) {
    use std::io::Write;
    writeln!(std::io::stdout(), "{}", plain::lines(text.trim_end())).ok();
}

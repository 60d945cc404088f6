//! `flowrl-dist prompts`.

use super::{check_out, print};
use crate::data::{Format, PromptSet, geneval};
use crate::error::{EXIT_DONE, Result};
use crate::fs;
use std::path::PathBuf;

/// What is to be written.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Prompts in the manner of GenEval, with what must be seen: objects, numbers, colours, positions
    Geneval(Geneval),
}

#[derive(clap::Args)]
struct Geneval {
    /// The file to write, JSON lines
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// How many prompts
    #[arg(short = 'n', long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Seed of the draw
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Prompt files whose prompts are left out, such as the benchmark's own
    #[arg(long, value_name = "FILE")]
    without: Vec<PathBuf>,
}

/// Writes the prompt file.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let What::Geneval(geneval) = &arguments.what;
    check_out("--out", &geneval.out)?;
    let mut without = Vec::new();
    for path in &geneval.without {
        without.extend(PromptSet::from_file(path, Format::Auto)?.prompts);
    }
    let mut text = String::new();
    for record in geneval::train_records(geneval.count as usize, geneval.seed, &without)? {
        text.push_str(&record.line()?);
        text.push('\n');
    }
    fs::write_out(&geneval.out, text)?;
    print(&format!("{} prompts in {}", geneval.count, geneval.out.display()));
    Ok(EXIT_DONE)
}

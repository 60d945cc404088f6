//! `flowrl-dist report`.

use super::print;
use crate::error::{EXIT_DONE, Error, Result};
use crate::observe::report;
use std::path::PathBuf;

/// Which runs.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  flowrl-dist report runs/glyphs\n  \
    flowrl-dist report runs/*/ --baseline nft\n\n\
    Runs with the same run.name are the seeds of one method.")]
pub struct Arguments {
    /// The run folder; with two or more also a comparison of the runs
    #[arg(required = true, value_name = "RUN_DIR")]
    runs: Vec<PathBuf>,
    /// Where the comparison goes [default: the folders' common parent]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The run.name of the method whose best reward the others are timed to
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
}

/// Writes a page for every run and the comparison, and says where they are.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let Arguments { runs, out, baseline } = arguments;
    for run in runs {
        if !run.join("metrics.jsonl").is_file() {
            let run = run.display();
            let message = format!("{run}: is no run folder (no metrics.jsonl in it); give the --out of a run");
            return Err(Error::Usage(message));
        }
    }
    if let Some(file) = out.as_ref().filter(|out| out.is_file()) {
        return Err(Error::Usage(format!("--out {}: is a file; name a folder", file.display())));
    }
    let comparison = match runs.as_slice() {
        [_] if out.is_some() || baseline.is_some() => {
            let option = if out.is_some() { "--out" } else { "--baseline" };
            return Err(Error::Usage(format!("{option}: belongs to a comparison; give two run folders or more")));
        }
        [_] => None,
        // Before the pages: it refuses what does not compare, and then nothing is written.
        runs => Some(report::compare(runs, out.as_deref(), baseline.as_deref())?),
    };
    let pages = runs.iter().map(|run| report::write(run)).collect::<Result<Vec<_>>>()?;
    let files = comparison.iter().flat_map(|comparison| &comparison.files).chain(&pages);
    let files: Vec<String> = files.map(|file| file.display().to_string()).collect();
    let table = comparison.as_ref().map(|comparison| format!("{}\n", comparison.table)).unwrap_or_default();
    print(&(table + &files.join("\n")));
    Ok(EXIT_DONE)
}

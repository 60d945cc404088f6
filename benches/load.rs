//! How long a transformer takes to open and load, and the memory that it takes meanwhile:
//! `cargo bench --bench load -- PATH [RANKS [RANK]]`, for example of `flowrl-dist random-model --size medium --out PATH`.
//! With RANKS: the part that one of so many ranks keeps, as with parallel.shard = "full".

use candle_core::{DType, Device};
use flowrl_dist::Error;
use flowrl_dist::error::Result;
use flowrl_dist::model::files::Transformer;
use flowrl_dist::params::Layout;
use flowrl_dist::shard::Partition;
use std::path::Path;
use std::time::Instant;

/// Lines of /proc/self/status about memory.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let wanted = |line: &&str| ["VmHWM", "RssAnon", "RssFile"].iter().any(|key| line.starts_with(key));
    status.lines().filter(wanted).map(|line| line.replace('\t', " ")).collect::<Vec<_>>().join(", ")
}

/// Runs `work` and prints how long it took and the memory after it.
fn timed<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let since = Instant::now();
    let result = work()?;
    eprintln!("{what:<14} {:7.2} s   {}", since.elapsed().as_secs_f64(), memory());
    Ok(result)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let number = |at: usize, otherwise: usize| match arguments.get(at) {
        Some(text) => text.parse().map_err(|_| Error::Usage(format!("{text} is no number"))),
        None => Ok(otherwise),
    };
    let Some(path) = arguments.first() else {
        return Err(Error::Usage("name the model: cargo bench --bench load -- PATH [RANKS [RANK]]".into()));
    };
    let (ranks, rank) = (number(1, 1)?, number(2, 0)?);
    // The second time the files are in the page cache.
    for round in 1..=2 {
        eprintln!("round {round}");
        let transformer = timed("open", || Transformer::open(Path::new(path)))?;
        timed("digest", || Ok(transformer.weights.digest()))?;
        let loaded = timed("load, bf16", || {
            let loaded = transformer.load(None, (64, 64), DType::BF16, 0, &Device::Cpu)?;
            let layout = Layout::all(&loaded.model.specs());
            Partition::new(&layout, ranks).read(&loaded.base, &layout, rank, DType::BF16)
        })?;
        timed("close files", || {
            drop(transformer);
            Ok(())
        })?;
        drop(loaded);
    }
    Ok(())
}

//! How long a transformer takes to open and load, and the memory that it takes meanwhile:
//! `cargo bench --bench load -- PATH`, for example of `flowrl-dist random-model --size medium --out PATH`.

use candle_core::{DType, Device};
use flowrl_dist::Error;
use flowrl_dist::error::Result;
use flowrl_dist::model::files::Transformer;
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
    let [path] = arguments.as_slice() else {
        return Err(Error::Usage("name the model: cargo bench --bench load -- PATH".into()));
    };
    // The second time the files are in the page cache.
    for round in 1..=2 {
        eprintln!("round {round}");
        let transformer = timed("open", || Transformer::open(Path::new(path)))?;
        timed("digest", || Ok(transformer.weights.digest()))?;
        let loaded = timed("load, bf16", || transformer.load(None, (64, 64), DType::BF16, 0, &Device::Cpu)?.params())?;
        timed("close files", || {
            drop(transformer);
            Ok(())
        })?;
        drop(loaded);
    }
    Ok(())
}

//! Bandwidth of saving and loading beside `dd` on the same disk: `cargo bench --bench checkpoint -- FOLDER MIB`
//! (default: the current folder, 512 MiB of state).
//!
//! In turns, so that a change of the disk's mood meets both; the medians and their ratio are printed, nothing is asserted.

use flowrl_dist::checkpoint::{self, Identity, Saver, Shard, TrainState};
use flowrl_dist::comm::Solo;
use flowrl_dist::error::Result;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

const REPETITIONS: usize = 5;
const VECTORS: [&str; 5] = ["policy", "exp_avg", "exp_avg_sq", "old", "ema"];

fn seconds(work: impl FnOnce() -> Result<()>) -> f64 {
    let since = Instant::now();
    work().expect("the measured work");
    since.elapsed().as_secs_f64()
}

fn dd(arguments: &[String]) -> Result<()> {
    let output = Command::new("dd").args(arguments).output().expect("dd");
    assert!(output.status.success(), "dd {arguments:?}");
    Ok(())
}

/// Has the kernel drop the folder's files from its cache.
fn forget(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(flowrl_dist::Error::io(folder))? {
        let path = entry.map_err(flowrl_dist::Error::io(folder))?.path();
        if path.is_file() {
            dd(&[format!("if={}", path.display()), "iflag=nocache".into(), "count=0".into(), "status=none".into()])?;
        }
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let folder = arguments.first().map_or(".", String::as_str);
    let mib: usize = arguments.get(1).map_or(512, |mib| mib.parse().expect("a number of MiB"));
    let total = mib * (1 << 20) / 4 / VECTORS.len();
    let values: Vec<f32> = (0..total).map(|i| (i as f32).sin()).collect();
    let whole = 0..total;
    let shard =
        Shard { ranges: vec![whole.clone()], vectors: VECTORS.map(|name| (name.to_owned(), values.clone())).into() };
    let identity = Identity {
        config_digest: String::new(),
        base_digest: String::new(),
        layout_digest: String::new(),
        total,
        seed: 0,
        parameters: Vec::new(),
        parts: Default::default(),
    };
    let place = tempfile::tempdir_in(folder).map_err(flowrl_dist::Error::io(folder))?;
    let root = place.path().join("checkpoints");
    let file = place.path().join("dd");
    let (mut save, mut stall, mut write) = (vec![], vec![], vec![]);
    let (mut load, mut read, mut cold_load, mut cold_read) = (vec![], vec![], vec![], vec![]);
    for repetition in 0..REPETITIONS as u64 {
        let state = TrainState { update: repetition, iteration: repetition, extra: serde_json::Value::Null };
        let mut saver = Saver::new(&root, identity.clone(), repetition);
        let copy = shard.clone();
        let since = Instant::now();
        saver.begin(&state, copy, &Solo)?;
        stall.push(since.elapsed().as_secs_f64());
        saver.finish(&Solo)?;
        save.push(since.elapsed().as_secs_f64());
        let out = format!("of={}", file.display());
        let count = format!("count={mib}");
        write.push(seconds(|| dd(&["if=/dev/zero".into(), out, "bs=1M".into(), count, "conv=fsync".into()])));
        let newest = checkpoint::newest(&root)?.expect("a checkpoint").path;
        let from = format!("if={}", file.display());
        let dd_read = || dd(&[from.clone(), "of=/dev/null".into(), "bs=1M".into()]);
        let read_back = || checkpoint::open(&newest)?.read(std::slice::from_ref(&whole)).map(drop);
        load.push(seconds(read_back));
        read.push(seconds(dd_read));
        forget(&newest)?;
        cold_load.push(seconds(read_back));
        forget(place.path())?;
        cold_read.push(seconds(dd_read));
        checkpoint::prune(Path::new(&root), 1, None)?;
    }
    let rate = |seconds: Vec<f64>| mib as f64 / median(seconds);
    eprintln!("{mib} MiB, medians of {REPETITIONS}");
    for (name, ours, peer, dd) in [
        ("save", save, "dd with fsync", write),
        ("load, from the page cache", load, "dd", read),
        ("load, from the disk", cold_load, "dd", cold_read),
    ] {
        let (ours, dd) = (rate(ours), rate(dd));
        eprintln!("{name:>25}  {ours:7.0} MiB/s   {peer:>13}  {dd:7.0} MiB/s   ratio {:.2}", ours / dd);
    }
    eprintln!("training waits {:.1} ms for a save to begin", 1e3 * median(stall));
    Ok(())
}

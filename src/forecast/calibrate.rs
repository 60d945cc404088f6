//! The present machine's speeds, from a run that it did.

use super::Work;
use super::machine::{Compute, Machine, Network};
use crate::checkpoint;
use crate::config::{RUN_CONFIG, RunConfig, Use};
use crate::error::{Error, Result};
use crate::observe::report::Run;
use crate::plan::Plan;
use std::path::Path;

/// The machine that did the run in `folder` on one node with `devices` devices of `memory_gib`: counted work over the
/// medians of the phases' times. The first iteration is left out: its old policy is still the policy.
///
/// # Errors
/// The folder holds no run with a checkpoint (which says on how many ranks it ran) and two iterations at least.
pub fn calibrate(folder: &Path, devices: usize, memory_gib: f64) -> Result<Machine> {
    let config = RunConfig::load_for(Use::Model, Some(&folder.join(RUN_CONFIG)), &[])?;
    let missing = |what: &str| {
        Error::Usage(format!("{}: {what}; give the folder of a run of a few iterations that ended", folder.display()))
    };
    let newest = checkpoint::newest(&checkpoint::root(folder))?.ok_or_else(|| missing("there is no checkpoint"))?;
    let ranks = checkpoint::open(&newest.path)?.manifest().world_size;
    // The work of an iteration is the same whatever its prompts are: as if there were those of one.
    let prompts = vec![config.batch.prompts; config.stages().len()];
    let plan = Plan::new(&config, ranks, &prompts, 0)?;
    let work = Work::new(&config, &plan)?;
    let run = Run::read(folder);
    let median = |name: &str| -> Result<f64> {
        let later = run.updates.values().filter(|update| update.get("iteration").and_then(|i| i.as_u64()) > Some(0));
        let mut times: Vec<f64> = later.filter_map(|update| update.get(name)?.as_f64()).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().ok_or_else(|| missing("it has less than two iterations"))
    };
    let share = (devices as f64 / ranks as f64).min(1.0);
    let speed = |work: f64, unit: f64, name: &str| Ok::<_, Error>(work / unit / share / median(name)?.max(1e-9));
    let sending = median("time.reduce")? + median("time.old_policy")?;
    Ok(Machine {
        name: format!("{devices} of {}", crate::hostname::hostname()),
        devices,
        memory_gib,
        compute: Compute {
            sample_tflops: speed(work.sample, 1e12, "time.sample")?,
            train_tflops: speed(work.train, 1e12, "time.train")?,
            decode_s: median("time.decode")? / work.images * share,
            reward_s: median("time.reward")? / work.images * share,
            optimizer_gb_s: speed(work.optimizer, 1e9, "time.optimizer")?,
        },
        network: match ranks {
            // Nothing was sent: a guess, and the same to every rank.
            1 => Network { intra_gb_s: 1.0, inter_gb_s: 1.0, latency_us: 50.0 },
            _ => {
                let bandwidth = work.sent / 1e9 / sending.max(1e-9);
                Network { intra_gb_s: bandwidth, inter_gb_s: bandwidth, latency_us: 50.0 }
            }
        },
    })
}

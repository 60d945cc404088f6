//! What each way of sharing holds and how long an update takes: `RAYON_NUM_THREADS=1 cargo bench --bench sharding`.
//!
//! 12 blocks, 384 wide, all of it trained, in f32; ranks are threads of this process, so that eight ranks on two cores take
//! four times as long as two. An update is one micro-batch of one sample a rank: forward by policy and old policy, backward,
//! reduction, AdamW and the new parameters. Memory is counted, of a rank: held between updates, and the most of one update
//! above that, activations included. Nothing is asserted.
//!
//! `cargo bench --bench sharding -- large-counts`: broadcast and all-reduce of 2^31 + 5 bytes between two MPI ranks of 4 GiB
//! each, every value checked.

#[path = "../tests/memory/blocks/mod.rs"]
mod blocks;
#[path = "../tests/memory/counting/mod.rs"]
mod counting;
mod counts;

use blocks::{Inputs, inputs, model, training_pass};
use candle_core::{Device, Tensor};
use counting::{Counting, mib};
use flowrl_dist::Result;
use flowrl_dist::comm::{ThreadGroup, World};
use flowrl_dist::model::Model;
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, ParamSet, Trainable};
use flowrl_dist::policy::Policies;
use flowrl_dist::shard::{Gradients, Reduction, Sharding};
use std::time::Instant;

// The program's allocator, counted.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

const UPDATES: usize = 3;

/// Of a rank, in MiB and seconds.
struct Measured {
    held: f64,
    peak: f64,
    seconds: Vec<f64>,
    /// Sent for an update.
    sent: f64,
}

/// One rank's updates. Every rank has weights of its own, as processes do.
fn rank(world: &World, model: &Model, set: &ParamSet, sharding: Sharding, inputs: &Inputs) -> Result<Measured> {
    let (specs, ranks) = (model.specs(), world.world_size() as f64);
    let layout = Layout::new(&specs, Trainable::Full);
    let meet = || world.host.barrier();
    meet()?;
    let before = counting::now();
    meet()?;
    let own = ParamSet::build(&specs, |_| Ok(Tensor::zeros(0, candle_core::DType::F32, &Device::Cpu)?))?;
    let own = own.with_flat(&layout, &set.flatten(&layout)?)?;
    let mut state = Sharded::new(&own, &layout, sharding, &*world.device)?;
    let mut policies = Policies::new(&own, &specs, Trainable::Full, &state, false, world)?;
    drop(own);
    meet()?;
    let held = counting::restart();
    meet()?;
    let mut seconds = Vec::new();
    let sent = world.sent();
    for _ in 0..UPDATES {
        let since = Instant::now();
        let partition = state.partition();
        let gradients = Gradients::zeros(&layout, partition, &Device::Cpu)?;
        let mut reduction = Reduction::new(gradients, partition, &*world.device);
        training_pass(model, &*policies.policy, &[&*policies.old], inputs, |stage, gradients| {
            reduction.add(stage, gradients)?;
            reduction.begin(stage)
        })?;
        let gradient = reduction.finish()?;
        state.step(&gradient, &OptimConfig::default(), 1e-6, &*world.device)?;
        policies.refresh_policy(&state)?;
        seconds.push(since.elapsed().as_secs_f64());
    }
    let sent = mib((world.sent() - sent) as usize / UPDATES);
    meet()?;
    let peak = counting::peak() - held;
    seconds.sort_by(f64::total_cmp);
    Ok(Measured { held: mib(held - before) / ranks, peak: mib(peak) / ranks, seconds, sent })
}

fn main() -> Result<()> {
    if std::env::args().any(|argument| argument == counts::NAME) {
        return counts::run();
    }
    flowrl_dist::allocator::keep_freed_memory();
    let (model, inputs) = (model(None), inputs()?.first()?);
    let set = ParamSet::init(&model.specs(), 1, &Device::Cpu)?;
    let weights = mib(4 * Layout::new(&model.specs(), Trainable::Full).total);
    eprintln!("{weights:.0} MiB of weights, {} threads, {UPDATES} updates", candle_core::utils::get_num_threads());
    eprintln!(
        "{:>10} {:>6} {:>10} {:>10} {:>10} {:>20}",
        "shared out", "ranks", "held MiB", "peak MiB", "sent MiB", "s"
    );
    for ranks in [1, 2, 4, 8] {
        for sharding in [Sharding::None, Sharding::Optimizer, Sharding::Full] {
            let all = ThreadGroup::run(ranks, |world| rank(&world, &model, &set, sharding, &inputs))?;
            let Measured { held, peak, seconds, sent } = &all[0];
            let (least, median, most) = (seconds[0], seconds[UPDATES / 2], seconds[UPDATES - 1]);
            eprintln!(
                "{:>10} {ranks:>6} {held:>10.1} {peak:>10.1} {sent:>10.1} {:>20}",
                format!("{sharding:?}").to_lowercase(),
                format!("{median:.2} [{least:.2} - {most:.2}]")
            );
        }
    }
    Ok(())
}

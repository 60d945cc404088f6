//! Sampling and training with a small Stable Diffusion 3.5 (`tests/fixtures/sd3_tiny`: 6 layers, 384 wide, 34 M parameters; 256
//! image and 32 text tokens, batch 8, f32): `RAYON_NUM_THREADS=1 cargo bench --bench transformer [-- lora | full]`. Beside it,
//! the same work by diffusers and PEFT: `tests/peers/bench_transformer.py`. Prints medians and the peak of resident memory;
//! nothing is asserted.

mod sd3_tiny;

use flowrl_dist::Result;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::params::Trainable;
use sd3_tiny::{BATCH, Training, objective};
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const STEPS: usize = 10;
const REPETITIONS: usize = 3;

/// The most memory that this process has had resident, MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

fn measure(name: &str, mut work: impl FnMut() -> Result<()>) -> Result<()> {
    let mut seconds = Vec::new();
    for repetition in 0..=REPETITIONS {
        let since = Instant::now();
        work()?;
        if repetition > 0 {
            seconds.push(since.elapsed().as_secs_f64()); // the first one is for warmth
        }
    }
    seconds.sort_by(f64::total_cmp);
    let (least, median, most) = (seconds[0], seconds[REPETITIONS / 2], seconds[REPETITIONS - 1]);
    let (rate, peak) = (BATCH as f64 / median, peak());
    eprintln!("{name:>40}  {median:6.2} s [{least:.2} - {most:.2}]  {rate:6.2} a second  {peak:6.0} MiB peak so far");
    Ok(())
}

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    eprintln!("{} threads, batch {BATCH}, median [range] of {REPETITIONS}", candle_core::utils::get_num_threads());
    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let both = [("lora", Trainable::Lora), ("full", Trainable::Full)];
    for (_, trainable) in both.into_iter().filter(|(name, _)| asked.is_empty() || asked.iter().any(|a| a == name)) {
        let mut training = Training::new(trainable)?;
        measure(&format!("{trainable:?}: {STEPS} steps of sampling"), || {
            let Training { model, policies, point, conditioning, .. } = &training;
            let mut x = point.x_t.clone();
            for _ in 0..STEPS {
                let v = engine::velocity(model, &*policies.old, &x, &point.t, conditioning)?;
                x = (x - (v / STEPS as f64)?)?;
            }
            Ok(())
        })?;
        for kl_coef in [0.0, 1e-4] {
            let objective = objective(kl_coef);
            let with = if kl_coef > 0.0 { "old policy and base model" } else { "old policy" };
            for checkpointing in [Checkpointing::EACH, Checkpointing(0)] {
                let kept = if checkpointing == Checkpointing::EACH { ", checkpoints" } else { "" };
                measure(&format!("{trainable:?}: update, {with}{kept}"), || {
                    let forward = training.forward(kl_coef > 0.0, checkpointing)?;
                    let gradient = training.backward(&*objective, forward)?;
                    training.step(&gradient)
                })?;
            }
        }
    }
    Ok(())
}

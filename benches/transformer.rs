//! Sampling and training with a small Stable Diffusion 3.5 (`tests/fixtures/sd3_tiny`: 6 layers, 384 wide, 34 M parameters; 256
//! image and 32 text tokens, batch 8, f32): `RAYON_NUM_THREADS=1 cargo bench --bench transformer [-- lora | full]`. Beside it,
//! the same work by diffusers and PEFT: `tests/peers/bench_transformer.py`. Prints medians and the peak of resident memory;
//! nothing is asserted.

use candle_core::{Device, Tensor, Var};
use flowrl_dist::Result;
use flowrl_dist::comm::World;
use flowrl_dist::engine::{self, Checkpointing, Pass};
use flowrl_dist::flow::interpolate;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::objective::{AdvantageConfig, Frozen, Method, MethodConfig, Objective, Point, Target};
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Trainable};
use flowrl_dist::policy::Policies;
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::{Gradients, Reduction, Sharding};
use std::path::Path;
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 8;
const SIDE: usize = 32;
const TEXT: usize = 32;
const STEPS: usize = 10;
const REPETITIONS: usize = 3;

fn normals(id: u64, shape: &[usize]) -> Result<Tensor> {
    let values = Stream::new(1, Purpose::Pretrain, [id, 0, 0, 0]).normals(shape.iter().product());
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

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
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sd3_tiny/config.json");
    let config = Config::read(&file)?;
    let x0 = normals(0, &[BATCH, config.in_channels, SIDE, SIDE])?;
    let eps = normals(1, x0.dims())?;
    let conditioning =
        [normals(2, &[BATCH, TEXT, config.joint_attention_dim])?, normals(3, &[BATCH, config.pooled_projection_dim])?];
    let t = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;
    let x_t = interpolate(&x0, &eps, &t)?;
    let advantage = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;
    let point = Point { x_t: x_t.clone(), t: t.clone(), advantage, target: Target::Forward { x0, eps } };
    let world = World::solo();

    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let both = [("lora", Trainable::Lora), ("full", Trainable::Full)];
    for (_, trainable) in both.into_iter().filter(|(name, _)| asked.is_empty() || asked.iter().any(|a| a == name)) {
        let targets = mmdit::LORA_TARGETS.iter().map(|target| target.to_string()).collect();
        let lora = (trainable == Trainable::Lora).then_some(LoraConfig { rank: 32, alpha: 64.0, targets });
        let model = mmdit::model(&config, (SIDE, SIDE), lora.as_ref())?;
        let specs = model.specs();
        let layout = Layout::new(&specs, trainable);
        let base = ParamSet::init(&specs, 1, &Device::Cpu)?;
        let mut state = Sharded::new(&base, &layout, Sharding::Optimizer, &*world.device)?;
        let mut policies = Policies::new(&base, &specs, trainable, &state, false, &world)?;
        drop(base);
        measure(&format!("{trainable:?}: {STEPS} steps of sampling"), || {
            let mut x = x_t.clone();
            for _ in 0..STEPS {
                let v = engine::velocity(&model, &*policies.old, &x, &t, &conditioning)?;
                x = (x - (v / STEPS as f64)?)?;
            }
            Ok(())
        })?;
        for kl_coef in [0.0, 1e-4] {
            let method = MethodConfig { kl_coef: Some(kl_coef), ..MethodConfig::of(Method::DiffusionNft) };
            let objective = Objective::new(&method, &AdvantageConfig::default().resolve(&method));
            let with = if kl_coef > 0.0 { "old policy and base model" } else { "old policy" };
            for checkpointing in [Checkpointing::EACH, Checkpointing(0)] {
                let kept = if checkpointing == Checkpointing::EACH { ", checkpoints" } else { "" };
                measure(&format!("{trainable:?}: update, {with}{kept}"), || {
                    let pass = |weights| Pass::new(weights, &x_t, &t, &conditioning);
                    let mut others = vec![pass(&*policies.old)];
                    others.extend((kl_coef > 0.0).then(|| pass(&*policies.reference)));
                    let (v, others, tape) =
                        engine::forward_beside(&model, pass(&*policies.policy), others, checkpointing)?;
                    let v = Var::from_tensor(&v)?;
                    let mut others = others.into_iter();
                    let frozen = Frozen { old: others.next(), reference: others.next() };
                    let loss = objective.terms(&point, v.as_tensor(), &frozen)?.loss.mean_all()?;
                    let mut gradients = loss.backward()?;
                    let dv = gradients.remove(v.as_tensor()).expect("the loss depends on v");
                    let partition = state.partition();
                    let gradients = Gradients::zeros(&layout, partition, &Device::Cpu)?;
                    let mut reduction = Reduction::new(gradients, partition, &*world.device);
                    engine::backward(&model, &*policies.policy, tape, &dv, |stage, gradients| {
                        reduction.add(stage, gradients)?;
                        reduction.begin(stage)
                    })?;
                    let gradient = reduction.finish()?;
                    state.step(&gradient, &OptimConfig::default(), 1e-6, &*world.device)?;
                    policies.refresh_policy(&state)
                })?;
            }
        }
    }
    Ok(())
}

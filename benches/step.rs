//! Where an iteration's time goes: `RAYON_NUM_THREADS=1 cargo bench --bench step [-- glyphs | tiny]`.
//!
//! `glyphs`: parts of an iteration on the embedded task (objectives on latents of 512 pixels), each with its rate. `tiny`: a
//! block and a whole step with a small Stable Diffusion 3.5 (`sd3_tiny`), with the number of allocations and the most memory
//! above weights and state. Prints the median and range of repeated measurements; nothing is asserted. Figures with machine
//! and date go into docs/LOG.md.

#[path = "../tests/memory/counting/mod.rs"]
mod counting;
mod sd3_tiny;

use candle_core::{Device, Tensor, Var};
use counting::{Counting, mib};
use flowrl_dist::Result;
use flowrl_dist::comm::Solo;
use flowrl_dist::data::PromptSet;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::flow::{SamplerConfig, interpolate};
use flowrl_dist::objective::{Method, MethodConfig, Point, Target, TargetVelocities};
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, Trainable};
use flowrl_dist::pipeline::{ModelConfig, Pipeline};
use flowrl_dist::reward::{Ocr, Reward};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::rollout::{Request, Sampling, normals};
use flowrl_dist::shard::{Gradients, Partition, Sharding};
use sd3_tiny::Training;
use std::time::Instant;

// The program's allocator, counted.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

const BATCH: usize = 16;
const REPETITIONS: usize = 7;

/// Runs `work` once for warmth, then measures it; prints seconds and `count` per second.
fn measure(name: &str, count: usize, unit: &str, mut work: impl FnMut() -> Result<()>) {
    let mut seconds: Vec<f64> = (0..=REPETITIONS)
        .map(|_| {
            let since = Instant::now();
            work().expect("the measured work");
            since.elapsed().as_secs_f64()
        })
        .skip(1)
        .collect();
    seconds.sort_by(f64::total_cmp);
    let (median, least, most) = (seconds[REPETITIONS / 2], seconds[0], seconds[REPETITIONS - 1]);
    let rate = count as f64 / median;
    eprintln!("{name:>24}  {:8.2} ms [{:.2} - {:.2}]  {rate:9.1} {unit}/s", 1e3 * median, 1e3 * least, 1e3 * most);
}

/// One part of a step, measured with each step.
#[derive(Default)]
struct Part {
    seconds: Vec<f64>,
    allocations: usize,
    peak: usize,
}

impl Part {
    /// Measures `work`, the memory above `before` bytes.
    fn measure<T>(&mut self, before: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        counting::restart();
        let (allocations, since) = (counting::allocations(), Instant::now());
        let value = work()?;
        self.seconds.push(since.elapsed().as_secs_f64());
        self.allocations = counting::allocations() - allocations;
        self.peak = self.peak.max(counting::peak() - before);
        Ok(value)
    }

    /// What came of all but the first, which was for warmth.
    fn print(&self, name: &str) {
        let mut seconds = self.seconds[1..].to_vec();
        seconds.sort_by(f64::total_cmp);
        let (median, least, most) = (seconds[seconds.len() / 2], seconds[0], seconds[seconds.len() - 1]);
        let Self { allocations, peak, .. } = self;
        let range = format!("[{least:.4} - {most:.4}]");
        eprintln!("{name:>50}  {median:8.4} s {range:>19}  {allocations:6} allocations  {:7.1} MiB", mib(*peak));
    }
}

/// A block without a second attention, which has neighbours on both sides.
const BLOCK: usize = 4;

/// The rows of a small Stable Diffusion 3.5, all of it or its adapters trained.
fn tiny(trainable: Trainable) -> Result<()> {
    let mut training = Training::new(trainable)?;
    let held = mib(counting::now());
    eprintln!("{trainable:?}: {held:.0} MiB of weights and state, {} trained parameters", training.layout.total);
    let inputs = training.inputs_of(BLOCK)?;
    let (mut forward, mut both) = (Part::default(), Part::default());
    for _ in 0..=REPETITIONS {
        forward.measure(counting::now(), || training.stage(BLOCK, &inputs).map(drop))?;
        both.measure(counting::now(), || training.stage_and_back(BLOCK, &inputs))?;
    }
    forward.print("a block, forward");
    both.print("a block, forward and backward");
    drop(inputs);
    let objective = sd3_tiny::objective(0.0);
    for (name, checkpointing) in [("no checkpoints", Checkpointing(0)), ("each block again", Checkpointing::EACH)] {
        let [mut forward, mut backward, mut optimizer, mut whole] = std::array::from_fn(|_| Part::default());
        for _ in 0..=REPETITIONS {
            let (before, allocations, since) = (counting::now(), counting::allocations(), Instant::now());
            let velocities = forward.measure(before, || training.forward(false, checkpointing))?;
            let gradient = backward.measure(before, || training.backward(&*objective, velocities))?;
            optimizer.measure(before, || training.step(&gradient))?;
            whole.seconds.push(since.elapsed().as_secs_f64());
            whole.allocations = counting::allocations() - allocations;
        }
        whole.peak = forward.peak.max(backward.peak).max(optimizer.peak);
        forward.print(&format!("{name}: policy and old policy, forward"));
        backward.print(&format!("{name}: loss and backward"));
        optimizer.print(&format!("{name}: clip, AdamW, new parameters"));
        whole.print(&format!("{name}: the whole step"));
    }
    Ok(())
}

fn main() -> Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    let threads = candle_core::utils::get_num_threads();
    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |name| asked.is_empty() || asked.iter().any(|a| a == name);
    if wanted("glyphs") {
        glyphs(threads)?;
    }
    if wanted("tiny") {
        eprintln!("{threads} threads, batch {}, median [range] of {REPETITIONS}", sd3_tiny::BATCH);
        tiny(Trainable::Lora)?;
        tiny(Trainable::Full)?;
    }
    Ok(())
}

/// The rows of the embedded task.
fn glyphs(threads: usize) -> Result<()> {
    eprintln!("{threads} threads, batch {BATCH}, median [range] of {REPETITIONS}");
    let pipeline = Pipeline::load(&ModelConfig::default(), 1, &Device::Cpu)?;
    let layout = Layout::new(&pipeline.model.specs(), Trainable::Full);
    let base = pipeline.params()?;
    let flat = base.flatten(&layout)?;
    let params = base.with_flat(&layout, &flat)?;
    let prompts = PromptSet::eval("glyphs")?.prompts;
    let requests: Vec<Request> = prompts.iter().take(BATCH).map(|p| Request { prompt: p.clone(), image: 0 }).collect();
    let prompts = prompts[..BATCH].to_vec();
    let x = normals(&pipeline, (0..BATCH as u64).map(|i| Stream::new(1, Purpose::Evaluation, [i, 0, 0, 0])))?;
    let conditioning = pipeline.encode(&prompts)?;
    let t = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;

    measure("forward", BATCH, "samples", || {
        engine::velocity(&pipeline.model, &params, &x, &t, &conditioning).map(drop)
    });
    for (name, checkpointing) in [("checkpointing each block", 1), ("checkpointing none", 0)] {
        measure(&format!("forward and backward, {name}"), BATCH, "samples", || {
            let (v, tape) =
                engine::forward(&pipeline.model, &params, &x, &t, &conditioning, Checkpointing(checkpointing))?;
            let mut gradients = Gradients::zeros(&layout, &Partition::new(&layout, 1), &Device::Cpu)?;
            engine::backward(&pipeline.model, &params, tape, &v, |stage, of_stage| gradients.add(stage, of_stage))
        });
    }
    let noise = |id| Stream::new(1, Purpose::TrainNoise, [id, 0, 0, 0]).normals(BATCH * 16 * 64 * 64);
    let latent = |id| Tensor::from_vec(noise(id), (BATCH, 16, 64, 64), &Device::Cpu);
    let (x0, eps, v) = (latent(0)?, latent(1)?, Var::from_tensor(&latent(2)?)?);
    let frozen = TargetVelocities { old: Some(latent(3)?), reference: Some(latent(4)?) };
    let advantage = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;
    let point = Point { x_t: interpolate(&x0, &eps, &t)?, t, advantage, target: Target::Forward { x0, eps } };
    for method in [Method::FlowAwr, Method::DiffusionNft] {
        let config = MethodConfig::of(method);
        let objective = config.objective(&config.map());
        measure(&format!("{method:?} of 512 pixels"), BATCH, "samples", || {
            let terms = objective.losses(&point, v.as_tensor(), &frozen)?;
            drop(terms.loss.sum_all()?.backward()?);
            Ok(())
        });
    }
    let sampler = SamplerConfig::default();
    let sampling = Sampling {
        pipeline: &pipeline,
        params: &params,
        sampler: &sampler,
        micro_batch: BATCH,
        seed: 1,
        purpose: Purpose::Rollout,
        iteration: 0,
    };
    measure("rollout, 10 steps", BATCH, "images", || sampling.run(&requests, BATCH).map(drop));
    let images = pipeline.decode(&sampling.run(&requests, BATCH)?.x0)?;
    let ocr = Ocr::new(threads)?;
    measure("OCR reward", BATCH, "images", || ocr.score(&images, &prompts).map(drop));
    let mut state = Sharded::new(&flat, &layout, Sharding::None, &Solo)?;
    measure("clip and AdamW", layout.total, "parameters", || {
        state.step(&flat, &OptimConfig::default(), 1e-6, &Solo).map(drop)
    });
    Ok(())
}

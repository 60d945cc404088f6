//! Where an iteration's time goes, on the embedded task (objectives on latents of 512 pixels): `cargo bench --bench step`
//! (RAYON_NUM_THREADS chooses threads).
//!
//! Prints the median and range of repeated measurements of each part, with its rate; nothing is asserted. Figures with
//! machine and date go into docs/LOG.md.

use candle_core::{Device, Tensor, Var};
use flowrl_dist::comm::Solo;
use flowrl_dist::data::PromptSet;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::flow::{SamplerConfig, interpolate};
use flowrl_dist::objective::{AdvantageConfig, Frozen, Method, MethodConfig, Objective, Point, Target};
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, Trainable};
use flowrl_dist::pipeline::{ModelConfig, Pipeline};
use flowrl_dist::reward::{Ocr, Reward};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::rollout::{Request, Sampling, normals};
use flowrl_dist::shard::{Gradients, Partition, Sharding};
use std::time::Instant;

// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 16;
const REPETITIONS: usize = 7;

/// Runs `work` once for warmth, then measures it; prints seconds and `count` per second.
fn measure(name: &str, count: usize, unit: &str, mut work: impl FnMut() -> flowrl_dist::Result<()>) {
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

fn main() -> flowrl_dist::Result<()> {
    flowrl_dist::allocator::keep_freed_memory();
    let threads = candle_core::utils::get_num_threads();
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
    let frozen = Frozen { old: Some(latent(3)?), reference: Some(latent(4)?) };
    let advantage = Tensor::full(0.5f32, BATCH, &Device::Cpu)?;
    let point = Point { x_t: interpolate(&x0, &eps, &t)?, t, advantage, target: Target::Forward { x0, eps } };
    for method in [Method::FlowAwr, Method::DiffusionNft] {
        let config = MethodConfig::of(method);
        let objective = Objective::new(&config, &AdvantageConfig::default().resolve(&config));
        measure(&format!("{method:?} of 512 pixels"), BATCH, "samples", || {
            let terms = objective.terms(&point, v.as_tensor(), &frozen)?;
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

//! Stable Diffusion 3.5 Medium at full size with random weights, on one GPU: what a rollout and a training step cost.
//!
//! `cargo bench --features cuda --bench gpu` prints a table and, as the last line, the same as JSON for
//! launch/gpu-check.sh. Latents of 64 x 64 (pictures of 512 x 512) and 205 text tokens, bf16. Utilisation counts the
//! products that the gradients need, once each, whatever runs again: of a linear layer one forward and two back, one where
//! its weight is frozen; of attention two and four. The rate is over that of a product of 8192 x 8192 matrices, measured here.
//!
//! `cargo bench --features cuda --bench gpu -- profile` takes three training steps with adapters and nothing else, for a
//! profiler: `ncu --clock-control none --metrics gpu__time_duration.sum --csv ...`.

use candle_core::cuda_backend::cudarc::driver::{CudaContext, result};
use candle_core::{DType, Device, Tensor, Var};
use flowrl_dist::comm::Solo;
use flowrl_dist::device::{DeviceChoice, select};
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::model::Model;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::ops;
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Role, Spec, Trainable};
use flowrl_dist::rng::{Purpose, Stream};
use flowrl_dist::shard::{Gradients, Partition, Sharding};
use flowrl_dist::{Error, Result};
use std::sync::Arc;
use std::time::Instant;

const LATENT: usize = 64;
const TEXT: usize = 205;
/// Samples of a micro-batch in the rollout and in training.
const ROLLOUT: usize = 16;
const TRAINING: usize = 8;
/// Solver steps of an image.
const STEPS: usize = 10;
const REPETITIONS: usize = 5;
/// Of the matrices whose product tells the GPU's rate.
const SIDE: usize = 8192;

fn main() -> Result<()> {
    let (device, why) = select(DeviceChoice::Auto, 0, 1)?;
    let Device::Cuda(gpu) = &device else {
        eprintln!("SKIPPED, NOTHING WAS MEASURED: {why}");
        return Ok(());
    };
    let mut bench = Bench { context: gpu.cuda_stream().context().clone(), device: device.clone(), peak: f64::INFINITY };
    if std::env::args().any(|argument| argument == "profile") {
        return bench.profile();
    }
    bench.peak = bench.product()?;
    eprintln!("{why}; latents {LATENT} x {LATENT}, {TEXT} text tokens, bf16; median [range] of {REPETITIONS}");
    eprintln!("a product of {SIDE} x {SIDE} matrices: {:.0} TFLOP/s, the peak of what follows", bench.peak / 1e12);
    bench.attention()?;
    let mut rows = Vec::new();
    bench.model(Trainable::Lora, &mut rows)?;
    bench.model(Trainable::Full, &mut rows)?;
    eprintln!("{:<44} {:>26} {:>14} {:>9} {:>8}", "phase", "ms [range]", "rate", "memory", "of peak");
    for row in &rows {
        let Row { name, seconds: (median, least, most), rate, unit, gigabytes, utilisation } = row;
        let times = format!("{:.1} [{:.1} - {:.1}]", 1e3 * median, 1e3 * least, 1e3 * most);
        let share = utilisation.map_or("-".into(), |share| format!("{:.1} %", 100.0 * share));
        eprintln!("{name:<44} {times:>26} {rate:>8.2} {unit}/s {gigabytes:>6.1} GB {share:>8}");
    }
    let json = |row: &Row| serde_json::json!({"phase": row.name, "ms": 1e3 * row.seconds.0, "rate": row.rate, "gb": row.gigabytes});
    eprintln!("{}", serde_json::Value::from(rows.iter().map(json).collect::<Vec<_>>()));
    Ok(())
}

struct Row {
    name: String,
    /// Median, least, most.
    seconds: (f64, f64, f64),
    rate: f64,
    unit: &'static str,
    gigabytes: f64,
    utilisation: Option<f64>,
}

/// x_t, t and the conditioning.
type Inputs = (Tensor, Tensor, Vec<Tensor>);

struct Bench {
    device: Device,
    context: Arc<CudaContext>,
    /// Operations a second.
    peak: f64,
}

impl Bench {
    /// Runs `work` once for warmth, then measures it: `count` units, `flops` operations.
    fn measure(
        &self,
        name: String,
        (count, unit): (f64, &'static str),
        flops: Option<f64>,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<Row> {
        self.trim()?;
        let mut seconds = Vec::new();
        for repetition in 0..=REPETITIONS {
            let since = Instant::now();
            work()?;
            self.device.synchronize()?;
            if repetition > 0 {
                seconds.push(since.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let median = seconds[REPETITIONS / 2];
        // Memory that was given back stays with the process until `trim`: what is held now is the most that was.
        let (free, total) = self.context.mem_get_info().map_err(driver)?;
        Ok(Row {
            name,
            seconds: (median, seconds[0], seconds[REPETITIONS - 1]),
            rate: count / median,
            unit,
            gigabytes: (total - free) as f64 / 1e9,
            utilisation: flops.map(|flops| flops / median / self.peak),
        })
    }

    /// Gives the driver what nothing holds.
    fn trim(&self) -> Result<()> {
        self.device.synchronize()?;
        // SAFETY: the device is the context's; nothing that is in use is given back.
        unsafe {
            let device = result::device::get(self.context.ordinal() as i32).map_err(driver)?;
            let pool = result::device::get_default_mem_pool(device).map_err(driver)?;
            result::mem_pool::trim_to(pool, 0).map_err(driver)
        }
    }
}

fn driver(e: candle_core::cuda_backend::cudarc::driver::DriverError) -> Error {
    Error::Failed(format!("the GPU: {e:?}"))
}

impl Bench {
    fn normals(&self, id: u64, shape: &[usize]) -> Result<Tensor> {
        let values = Stream::new(1, Purpose::Pretrain, [id, 0, 0, 0]).normals(shape.iter().product());
        Ok(Tensor::from_vec(values, shape, &self.device)?.to_dtype(DType::BF16)?)
    }

    /// Operations a second of a large product of random numbers.
    fn product(&self) -> Result<f64> {
        let matrix = |id| self.normals(id, &[SIDE, SIDE]);
        let (a, b, times) = (matrix(1)?, matrix(2)?, 10);
        let row = self
            .measure(String::new(), (1.0, ""), None, || (0..times).try_for_each(|_| Ok(a.matmul(&b).map(drop)?)))?;
        Ok((times * 2) as f64 * (SIDE as f64).powi(3) / row.seconds.0)
    }

    /// Training steps for a profiler.
    fn profile(&self) -> Result<()> {
        let lora = adapters();
        let model = mmdit::model(&Config::sd35_medium(), (LATENT, LATENT), Some(&lora))?;
        let specs = model.specs();
        let params = ParamSet::build(&specs, |spec| self.parameter(spec, Trainable::Lora))?;
        let layout = Layout::new(&specs, Trainable::Lora);
        let inputs = self.inputs(TRAINING)?;
        (0..3).try_for_each(|_| self.training_step(&model, &params, &layout, &inputs, 0))?;
        Ok(self.device.synchronize()?)
    }

    /// The attention of a joint block alone, forward and back.
    fn attention(&self) -> Result<()> {
        let (tokens, heads) = (LATENT * LATENT / 4 + TEXT, 24);
        let shape = [TRAINING, tokens, heads, 64];
        let qkv = (0..3).map(|id| Ok(Var::from_tensor(&self.normals(id, &shape)?)?)).collect::<Result<Vec<_>>>()?;
        let products = 2.0 * (TRAINING * heads * 64) as f64 * (tokens * tokens) as f64;
        let fixed = qkv.iter().map(|var| var.as_tensor().detach()).collect::<Vec<_>>();
        let forward = self.measure("attention, forward".into(), (1.0, "call"), Some(2.0 * products), || {
            Ok(ops::attention(&fixed[0], &fixed[1], &fixed[2]).map(drop)?)
        })?;
        let gradient = self.normals(9, &shape)?;
        let both = self.measure("attention, forward and back".into(), (1.0, "call"), Some(6.0 * products), || {
            let out = ops::attention(&qkv[0], &qkv[1], &qkv[2])?;
            Ok(ops::seed(&out, &gradient)?.backward().map(drop)?)
        })?;
        for row in [forward, both] {
            let share = row.utilisation.map_or("-".into(), |share| format!("{:.1} % of peak", 100.0 * share));
            eprintln!("{} of {TRAINING} x {tokens} x {heads} x 64: {:.2} ms, {share}", row.name, 1e3 * row.seconds.0);
        }
        Ok(())
    }

    /// Rollout, training step and optimizer.
    fn model(&self, trainable: Trainable, rows: &mut Vec<Row>) -> Result<()> {
        let lora = adapters();
        let lora = (trainable == Trainable::Lora).then_some(&lora);
        let config = Config::sd35_medium();
        let model = mmdit::model(&config, (LATENT, LATENT), lora)?;
        let specs = model.specs();
        let layout = Layout::new(&specs, trainable);
        let params = ParamSet::build(&specs, |spec| self.parameter(spec, trainable))?;
        let (linear, attention) = forward_flops(&config, &specs);
        let forward = linear + attention;
        let step = if lora.is_some() { 2.0 * linear + 3.0 * attention } else { 3.0 * forward };
        let kind = if lora.is_some() { "LoRA" } else { "full" };

        let (x, t, conditioning) = self.inputs(ROLLOUT)?;
        rows.push(self.measure(
            format!("{kind}: rollout, {STEPS} steps, batch {ROLLOUT}"),
            (ROLLOUT as f64, "images"),
            Some((STEPS * ROLLOUT) as f64 * forward),
            || (0..STEPS).try_for_each(|_| engine::velocity(&model, &params, &x, &t, &conditioning).map(drop)),
        )?);
        let training = self.inputs(TRAINING)?;
        for each in [1, 0] {
            let way = if each == 1 { "each block again" } else { "keeping activations" };
            let name = format!("{kind}: forward, backward, batch {TRAINING}, {way}");
            rows.push(self.measure(name, (TRAINING as f64, "samples"), Some(TRAINING as f64 * step), || {
                self.training_step(&model, &params, &layout, &training, each)
            })?);
        }
        drop((x, t, conditioning, training, params));
        rows.push(self.optimizer(kind, &layout)?);
        Ok(())
    }

    /// Random weights of this size in bf16, adapters in f32, and trainable ones as leaves. They are drawn on the GPU: their values do
    /// not matter here, and two thousand million on the CPU take minutes.
    #[allow(clippy::disallowed_methods, reason = "nothing is compared with another rank or run")]
    fn parameter(&self, spec: &Spec, trainable: Trainable) -> Result<Tensor> {
        let fan_in = spec.shape.iter().skip(1).product::<usize>().max(1);
        let std = if spec.shape.len() < 2 { 0.1 } else { (fan_in as f64).powf(-0.5) };
        let tensor = Tensor::randn(0f32, std as f32, spec.shape.as_slice(), &self.device)?;
        let tensor = tensor.to_dtype(spec.role.dtype(DType::BF16))?;
        Ok(if spec.role == trainable.role() { Var::from_tensor(&tensor)?.into_inner() } else { tensor })
    }

    /// x_t, t and the conditioning of `batch` samples.
    fn inputs(&self, batch: usize) -> Result<Inputs> {
        let config = Config::sd35_medium();
        let x = self.normals(1, &[batch, config.in_channels, LATENT, LATENT])?.to_dtype(DType::F32)?;
        let text = self.normals(2, &[batch, TEXT, config.joint_attention_dim])?;
        let pooled = self.normals(3, &[batch, config.pooled_projection_dim])?;
        Ok((x, Tensor::full(0.5f32, batch, &self.device)?, vec![text, pooled]))
    }

    fn training_step(
        &self,
        model: &Model,
        params: &ParamSet,
        layout: &Layout,
        (x, t, conditioning): &Inputs,
        each: usize,
    ) -> Result<()> {
        let (v, tape) = engine::forward(model, params, x, t, conditioning, Checkpointing(each))?;
        let mut gradients = Gradients::zeros(layout, &Partition::new(layout, 1), &self.device)?;
        engine::backward(model, params, tape, &v, |stage, of| gradients.add(stage, of))?;
        gradients.check()
    }

    /// Clipping, AdamW and the slow copies.
    fn optimizer(&self, kind: &str, layout: &Layout) -> Result<Row> {
        let flat = Tensor::ones(layout.total, DType::F32, &self.device)?;
        let gradient = (&flat * 1e-3)?;
        let mut state = Sharded::new(&flat, layout, Sharding::Optimizer, &Solo)?;
        drop(flat);
        let name = format!("{kind}: AdamW on {:.2} G parameters, EMA", layout.total as f64 / 1e9);
        self.measure(name, (1.0, "updates"), None, || {
            state.step(&gradient, &OptimConfig::default(), 1e-5, &Solo)?;
            state.update_ema(0.9)
        })
    }
}

/// Those of DiffusionNFT.
fn adapters() -> LoraConfig {
    LoraConfig { targets: mmdit::LORA_TARGETS.map(String::from).to_vec(), ..LoraConfig::default() }
}

/// Operations of the products of one sample's forward pass: each weight times the tokens that meet it, and attention.
fn forward_flops(config: &Config, specs: &[&[Spec]]) -> (f64, f64) {
    let image = LATENT * LATENT / config.patch_size.pow(2);
    let tokens = |name: &str| match name {
        _ if name.contains("norm1") || name.contains("norm_out") || name.contains("time_text_embed") => 1,
        _ if name.contains("context") || name.contains("add_") => TEXT,
        _ => image,
    };
    let matrices = specs.iter().flat_map(|stage| stage.iter()).filter(|s| s.role != Role::Buffer && s.shape.len() > 1);
    let linear: f64 = matrices.map(|s| 2.0 * s.shape.iter().product::<usize>() as f64 * tokens(&s.name) as f64).sum();
    let pairs = |tokens: usize| 4.0 * (config.width() * tokens * tokens) as f64;
    let second = config.dual_attention_layers.len() as f64 * pairs(image);
    (linear, config.num_layers as f64 * pairs(image + TEXT) + second)
}

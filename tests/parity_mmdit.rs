//! The transformer of Stable Diffusion 3.5 against recorded values of diffusers and PEFT (tests/fixtures/sd3_*: each
//! meta.json says how they were made). FLOWRL_FIXTURES names another folder of the same form.
//!
//! `cargo test --release --test parity_mmdit -- --nocapture` prints the errors.

use candle_core::{DType, Device, Tensor, Var};
use flowrl_dist::advantage::AdvantageMap;
use flowrl_dist::comm::Solo;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::model::Model;
use flowrl_dist::model::mmdit::{self, Config, LORA_TARGETS};
use flowrl_dist::objective::{Frozen, Method, MethodConfig, Objective, Point, Target};
use flowrl_dist::optim::{OptimConfig, Sharded};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Role, Spec, Trainable};
use flowrl_dist::shard::{Gradients, Partition, Sharding};
use flowrl_dist::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

type Tensors = HashMap<String, Tensor>;

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).expect("the fixture")
}

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name)).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

/// Values in [-1, 1) by the name: splitmix64 seeded with FNV-1a of it, its upper 24 bits.
fn uniform(name: &str, len: usize) -> Vec<f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    let value = |i: u64| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32
    };
    (1..=len as u64).map(value).collect()
}

/// The weights of a fixture without a weight file: matrices scaled by their inputs, a power of two, norms about 1.
fn hashed(spec: &Spec) -> Result<Tensor> {
    if spec.role == Role::Buffer {
        return spec.initial(0, &Device::Cpu);
    }
    let values = uniform(&spec.name, spec.shape.iter().product());
    let values = Tensor::from_vec(values, spec.shape.as_slice(), &Device::Cpu)?;
    let fan_in: usize = spec.shape[1..].iter().product();
    Ok(match spec.shape.len() {
        1 if spec.name.contains("norm") && spec.name.ends_with(".weight") => values.affine(0.25, 1.0)?,
        1 => (values * 0.0625)?,
        _ => (values * (-((fan_in as f64).log2() / 2.0).floor()).exp2())?,
    })
}

/// A recorded model with its inputs, outputs, losses and gradients.
struct Case {
    name: &'static str,
    model: Model,
    /// Leaves of the trainable parameters.
    params: ParamSet,
    layout: Layout,
    io: Tensors,
    meta: Value,
}

impl Case {
    /// The whole model, trained.
    fn full(name: &'static str) -> Result<Self> {
        let io = tensors(&format!("{name}/io.safetensors"));
        let model = build(name, &io, None)?;
        let specs = model.specs();
        let base = ParamSet::build(&specs, weights(name, &specs))?;
        Self::of(name, io, model, base, Trainable::Full)
    }

    fn of(name: &'static str, io: Tensors, model: Model, base: ParamSet, trainable: Trainable) -> Result<Self> {
        let layout = Layout::new(&model.specs(), trainable);
        let params = base.with_flat(&layout, &base.flatten(&layout)?)?;
        Ok(Self { name, model, params, layout, io, meta: json(&format!("{name}/meta.json")) })
    }

    fn get(&self, name: &str) -> &Tensor {
        self.io.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// Times in [0, 1], rounded once: the recorded ones are 1000 times these.
    fn times(&self) -> Result<Tensor> {
        Ok((self.get("in.timestep").to_dtype(DType::F64)? / 1000.0)?.to_dtype(DType::F32)?)
    }

    fn conditioning(&self) -> Vec<Tensor> {
        vec![self.get("in.encoder_hidden_states").clone(), self.get("in.pooled").clone()]
    }

    fn velocity(&self, params: &ParamSet) -> Result<Tensor> {
        engine::velocity(&self.model, params, self.get("in.xt"), &self.times()?, &self.conditioning())
    }

    /// The loss of DiffusionNFT at the velocity `v`, mean over samples, and its gradient.
    fn loss(&self, v: &Tensor, mix: f64, kl_coef: f64, frozen: [&str; 2]) -> Result<(f64, Tensor)> {
        let config = MethodConfig { mix: Some(mix), kl_coef: Some(kl_coef), ..MethodConfig::of(Method::DiffusionNft) };
        let point = Point {
            x_t: self.get("in.xt").clone(),
            t: self.times()?,
            advantage: self.get("in.advantage").clone(),
            target: Target::Forward { x0: self.get("in.x0").clone(), eps: self.get("in.noise").clone() },
        };
        let [old, reference] = frozen.map(|name| Some(self.get(name).clone()));
        let v = Var::from_tensor(v)?;
        let terms =
            Objective::new(&config, &AdvantageMap::DIFFUSION_NFT).terms(&point, &v, &Frozen { old, reference })?;
        let loss = terms.loss.mean_all()?;
        let store = loss.backward()?;
        Ok((f64::from(loss.to_scalar::<f32>()?), store.get(&v).expect("a gradient").clone()))
    }

    /// Velocity and flat gradient, block by block, given the gradient of the velocity.
    fn gradient(&self, checkpointing: usize, dv: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<f32>> {
        let (x_t, t, conditioning) = (self.get("in.xt"), self.times()?, self.conditioning());
        let (v, tape) =
            engine::forward(&self.model, &self.params, x_t, &t, &conditioning, Checkpointing(checkpointing))?;
        let mut gradients = Gradients::zeros(&self.layout, &Partition::new(&self.layout, 1), &Device::Cpu)?;
        engine::backward(&self.model, &self.params, tape, &dv(&v)?, |stage, of| gradients.add(stage, of))?;
        gradients.check()?;
        Ok(gradients.sum().to_vec1()?)
    }

    /// Largest relative error of the recorded gradients, by norm, and how many of them there are.
    fn check_gradients(&self, flat: &[f32], tolerance: f64) -> Result<(f64, usize)> {
        let (mut worst, mut count) = ((0.0, String::new()), 0);
        for e in &self.layout.entries {
            let Some(recorded) = self.io.get(&format!("grad.{}", e.name)) else { continue };
            assert_eq!(recorded.dims(), e.shape, "{}", e.name);
            let error = relative_norm(&flat[e.offset..][..e.len], &recorded.flatten_all()?.to_vec1::<f32>()?);
            assert!(error <= tolerance, "{}: gradient of {} is off by {error:.1e}", self.name, e.name);
            count += 1;
            if error > worst.0 {
                worst = (error, e.name.clone());
            }
        }
        let recorded = self.io.keys().filter(|k| k.starts_with("grad.")).count();
        assert_eq!(count, recorded, "{}: recorded gradients of parameters that the model lacks", self.name);
        eprintln!(
            "{}: {count} gradients of {}, worst {:.1e} at {}",
            self.name,
            self.layout.entries.len(),
            worst.0,
            worst.1
        );
        Ok((worst.0, count))
    }
}

fn build(name: &str, io: &Tensors, lora: Option<&LoraConfig>) -> Result<Model> {
    let config = Config::read(&fixture(&format!("{name}/config.json")))?;
    let (_, _, height, width) = io["in.xt"].dims4()?;
    mmdit::model(&config, (height, width), lora)
}

/// The base weights of a fixture: of its file, which then holds the model's parameters and no others, or by hash.
fn weights(name: &str, specs: &[&[Spec]]) -> impl Fn(&Spec) -> Result<Tensor> + use<> {
    let file = format!("{name}/diffusion_pytorch_model.safetensors");
    let file = fixture(&file).exists().then(|| tensors(&file));
    if let Some(file) = &file {
        let base = specs.iter().flat_map(|s| s.iter()).filter(|s| s.role != Role::Adapter);
        let ours: BTreeSet<(&str, &[usize])> = base.map(|s| (s.name.as_str(), s.shape.as_slice())).collect();
        assert_eq!(ours, file.iter().map(|(name, t)| (name.as_str(), t.dims())).collect());
    }
    move |spec| match &file {
        Some(file) => {
            file.get(&spec.name).cloned().ok_or_else(|| Error::Failed(format!("the file lacks {}", spec.name)))
        }
        None => hashed(spec),
    }
}

/// Norm of the difference over the norm of the recorded values; where these are all zero, ours have to be.
fn relative_norm(ours: &[f32], recorded: &[f32]) -> f64 {
    assert_eq!(ours.len(), recorded.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let scale = norm(&mut recorded.iter().map(|&x| f64::from(x)));
    let error = norm(&mut ours.iter().zip(recorded).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    if error == 0.0 { 0.0 } else { error / scale }
}

/// Largest difference over the largest recorded value.
fn max_error(ours: &Tensor, recorded: &Tensor) -> Result<f64> {
    assert_eq!(ours.dims(), recorded.dims());
    let recorded = recorded.to_dtype(DType::F64)?;
    let largest = |t: &Tensor| -> Result<f64> { Ok(t.abs()?.flatten_all()?.max(0)?.to_scalar()?) };
    Ok(largest(&(ours.to_dtype(DType::F64)? - &recorded)?)? / largest(&recorded)?)
}

/// Compares what every stage hands on with what diffusers recorded there; prints and bounds the errors.
fn check_forward(case: &Case, params: &ParamSet, tolerance: f64) -> Result<()> {
    let mut io = [&[case.get("in.xt").clone(), case.times()?], case.conditioning().as_slice()].concat();
    let last = case.model.stages.len() - 1;
    let mut report = Vec::new();
    for (index, stage) in case.model.stages.iter().enumerate() {
        io = stage.forward(&params.stage(index).detached(), &io)?;
        let names = match index {
            0 => vec!["pos_embed".into(), "context_embedder".into(), "time_text_embed".into()],
            _ if index == last => vec!["v".into()],
            _ => vec![format!("block.{}.img", index - 1), format!("block.{}.ctx", index - 1)],
        };
        for (name, ours) in names.iter().zip(&io) {
            // The last block's second output is the conditioning vector; of some blocks nothing was recorded.
            if let Some(recorded) = case.io.get(&format!("out.{name}")) {
                report.push((max_error(ours, recorded)?, name.clone()));
            }
        }
    }
    let text: Vec<_> = report.iter().map(|(error, name)| format!("{name} {error:.1e}")).collect();
    let dtypes: BTreeSet<_> = params.stage(0).iter().map(|(_, t)| t.dtype().as_str()).collect();
    eprintln!("{} {dtypes:?}: {}", case.name, text.join(", "));
    assert!(report.len() >= 9, "{}: only {} outputs were compared", case.name, report.len());
    for (error, name) in report {
        assert!(error <= tolerance, "{}: {name} is off by {error:.1e}", case.name);
    }
    Ok(())
}

const CASES: [&str; 2] = ["sd3_micro", "sd3_tiny"];

#[test]
fn parity_of_hashed_weights() -> Result<()> {
    let case = Case::full("sd3_tiny")?;
    let checks = case.meta["hash_check"].as_object().expect("an object");
    for (name, recorded) in checks {
        let e = case.layout.entries.iter().find(|e| e.name == *name).expect("a parameter of this name");
        let (_, tensor) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let first: Vec<f64> = values[..3].iter().map(|&x| f64::from(x)).collect();
        let sum: f64 = values.iter().map(|&x| f64::from(x)).sum();
        for (ours, recorded) in first.iter().chain([&sum]).zip(recorded.as_array().expect("a list")) {
            let recorded = recorded.as_f64().expect("a number");
            assert!((ours - recorded).abs() <= 1e-9 * recorded.abs().max(1.0), "{name}: {ours} {recorded}");
        }
    }
    assert_eq!(case.layout.total as u64, case.meta["params"].as_u64().expect("a number"));
    Ok(())
}

#[test]
fn parity_of_the_table_of_positions_with_diffusers() -> Result<()> {
    let config = Config::read(&fixture("sd3_micro/config.json"))?;
    let model = mmdit::model(&config, (8, 8), None)?;
    let spec = model.stages[0].specs().iter().find(|s| s.role == Role::Buffer).expect("the table");
    let file = tensors("sd3_micro/diffusion_pytorch_model.safetensors");
    let error = max_error(&spec.initial(0, &Device::Cpu)?, &file[&spec.name])?;
    assert!(error <= 1e-6, "{error:.1e}");
    Ok(())
}

#[test]
fn parity_of_every_stage_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        check_forward(&case, &case.params, 1e-5)?;
        let whole = case.velocity(&case.params)?;
        assert!(max_error(&whole, case.get("out.v"))? <= 1e-5);
    }
    Ok(())
}

#[test]
fn parity_in_bf16_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let specs = case.model.specs();
        let weights = weights(name, &specs);
        let narrow = ParamSet::build(&specs, |spec| Ok(weights(spec)?.to_dtype(DType::BF16)?))?;
        check_forward(&case, &narrow, 2e-2)?;
    }
    Ok(())
}

#[test]
fn parity_of_the_losses_with_diffusion_nft() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let v = case.velocity(&case.params)?;
        let mse = (&v - (case.get("in.noise") - case.get("in.x0"))?)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
        let frozen = ["in.v_old", "in.v_ref"];
        let losses = [
            ("mse", f64::from(mse)),
            ("nft_beta1", case.loss(&v, 1.0, 0.0, frozen)?.0),
            ("nft_beta0.1", case.loss(&v, 0.1, 0.0, frozen)?.0),
            ("nft_beta1_kl", case.loss(&v, 1.0, 1e-2, frozen)?.0),
        ];
        for (loss, ours) in losses {
            let recorded = case.meta["loss"][loss].as_f64().expect("a number");
            eprintln!("{name}: {loss} {ours} recorded {recorded}");
            assert!((ours / recorded - 1.0).abs() <= 2e-6, "{name}: {loss} {ours} {recorded}");
        }
    }
    Ok(())
}

#[test]
fn parity_of_every_gradient_with_diffusers() -> Result<()> {
    for name in CASES {
        let case = Case::full(name)?;
        let dv = |v: &Tensor| Ok(case.loss(v, 1.0, 1e-2, ["in.v_old", "in.v_ref"])?.1);
        let flat = case.gradient(1, dv)?;
        assert_eq!(case.gradient(0, dv)?, flat, "checkpointing changes not a bit");
        let (_, count) = case.check_gradients(&flat, 1e-4)?;
        if name == "sd3_micro" {
            assert_eq!(count, case.layout.entries.len(), "of the small model every gradient is recorded");
        }
        let norm = flat.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let recorded = case.meta["grad_norm"].as_f64().expect("a number");
        assert!((norm / recorded - 1.0).abs() <= 1e-5, "{name}: norm {norm} {recorded}");

        // Nothing is cut: the one thing whose gradient is zero is the last block's text queries, whose attention nobody
        // reads.
        let last = format!("transformer_blocks.{}.attn.", case.model.stages.len() - 3);
        for e in &case.layout.entries {
            let unread = e
                .name
                .strip_prefix(&last)
                .is_some_and(|n| n.starts_with("add_q_proj.") || n.starts_with("norm_added_q."));
            let zero = flat[e.offset..][..e.len].iter().all(|&x| x == 0.0);
            assert_eq!(zero, unread, "{name}: gradient of {}", e.name);
        }
    }
    Ok(())
}

/// The model as one graph, which also has the gradients of the inputs.
#[test]
fn parity_of_block_wise_and_monolithic_gradients() -> Result<()> {
    let case = Case::full("sd3_micro")?;
    let dv = |v: &Tensor| Ok(case.loss(v, 1.0, 1e-2, ["in.v_old", "in.v_ref"])?.1);
    let flat = case.gradient(1, dv)?;

    let x_t = Var::from_tensor(case.get("in.xt"))?;
    let text = Var::from_tensor(case.get("in.encoder_hidden_states"))?;
    let mut io = vec![x_t.as_tensor().clone(), case.times()?, text.as_tensor().clone(), case.get("in.pooled").clone()];
    for (index, stage) in case.model.stages.iter().enumerate() {
        io = stage.forward(case.params.stage(index), &io)?;
    }
    let store = (&io[0] * dv(&io[0].detach())?)?.sum_all()?.backward()?;
    for e in &case.layout.entries {
        let (_, tensor) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
        let whole = store.get(tensor).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
        let error = relative_norm(&flat[e.offset..][..e.len], &whole);
        assert!(error <= 1e-6, "{}: {error:.1e}", e.name);
    }
    for (name, input) in [("xt", &x_t), ("encoder_hidden_states", &text)] {
        let flat = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.flatten_all()?.to_vec1()?) };
        let ours = flat(store.get(input).expect("a gradient"))?;
        let error = relative_norm(&ours, &flat(case.get(&format!("gradin.{name}")))?);
        eprintln!("gradient of {name}: {error:.1e}");
        assert!(error <= 1e-4, "{name}: {error:.1e}");
    }
    Ok(())
}

/// The model of sd3_micro with the adapters of sd3_lora's file `adapter`, base weights in `dtype`.
fn lora_case(adapter: &str, dtype: DType) -> Result<Case> {
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: LORA_TARGETS.map(String::from).to_vec() };
    let io = tensors("sd3_lora/io.safetensors");
    let model = build("sd3_micro", &io, Some(&lora))?;
    let specs = model.specs();
    let weights = weights("sd3_micro", &specs);
    let adapters = tensors(&format!("sd3_lora/{adapter}"));
    let mut read = 0;
    let base = ParamSet::build(&specs, |spec| match spec.role {
        Role::Adapter => {
            read += 1;
            let tensor = adapters.get(&format!("base_model.model.{}", spec.name));
            let tensor = tensor.ok_or_else(|| Error::Failed(format!("the file lacks {}", spec.name)))?;
            assert_eq!(tensor.dims(), spec.shape);
            Ok(tensor.clone())
        }
        _ => Ok(weights(spec)?.to_dtype(dtype)?),
    })?;
    assert_eq!(read, adapters.len());
    Case::of("sd3_lora", io, model, base, Trainable::Lora)
}

const DEFAULT: &str = "peft/adapter_model.safetensors";

#[test]
fn parity_of_adapters_with_peft() -> Result<()> {
    let (default, old) =
        (lora_case(DEFAULT, DType::F32)?, lora_case("peft/old/adapter_model.safetensors", DType::F32)?);
    assert_eq!(default.layout.entries.len() as u64, 2 * default.meta["n_modules"].as_u64().expect("a number"));
    let reference = default.params.without_adapters(&default.model.specs());
    for (name, ours) in [
        ("out.v", default.velocity(&default.params)?),
        ("out.v_old", old.velocity(&old.params)?),
        ("out.v_ref", default.velocity(&reference)?),
    ] {
        let error = max_error(&ours, default.get(name))?;
        eprintln!("sd3_lora: {name} {error:.1e}");
        assert!(error <= 1e-5, "{name}: {error:.1e}");
    }
    Ok(())
}

/// Three updates of the adapters: losses, gradients, norms, and the parameters after the first and the third.
#[test]
fn parity_of_adapter_training_with_peft() -> Result<()> {
    let mut case = lora_case(DEFAULT, DType::F32)?;
    let mut state = Sharded::new(&case.params.flatten(&case.layout)?, &case.layout, Sharding::None, &Solo)?;
    let config = OptimConfig::default();
    for update in 1..=3 {
        let dv = |v: &Tensor| case.loss(v, 1.0, 1e-4, ["out.v_old", "out.v_ref"]);
        let loss = dv(&case.velocity(&case.params)?)?.0;
        let flat = case.gradient(1, |v| Ok(dv(v)?.1))?;
        if update == 1 {
            assert_eq!(case.gradient(0, |v| Ok(dv(v)?.1))?, flat, "checkpointing changes not a bit");
            assert_eq!(case.check_gradients(&flat, 1e-4)?.1, case.layout.entries.len());
        }
        let total = flat.len();
        let report = state.step(&Tensor::from_vec(flat, total, &Device::Cpu)?, &config, config.lr, &Solo)?;
        case.params = case.params.with_flat(&case.layout, &state.gather_policy(&Solo)?)?;
        for (what, ours, list) in [("loss", loss, "losses"), ("norm", report.norm, "grad_norms_before_clip")] {
            let recorded = case.meta[list][update - 1].as_f64().expect("a number");
            eprintln!("update {update}: {what} {ours} recorded {recorded}");
            assert!((ours / recorded - 1.0).abs() <= 1e-5, "update {update}: {what} {ours} {recorded}");
        }
        let (mut worst, mut count) = (0.0, 0);
        for e in &case.layout.entries {
            let Some(recorded) = case.io.get(&format!("step{update}.{}", e.name)) else { continue };
            let (_, ours) = case.params.stage(e.stage).iter().find(|(slot, _)| *slot == e.slot).expect("its tensor");
            let error = max_error(ours, recorded)?;
            assert!(error <= 1e-4, "update {update}: {} is off by {error:.1e}", e.name);
            (worst, count) = (f64::max(worst, error), count + 1);
        }
        eprintln!("update {update}: {count} parameters, worst {worst:.1e}");
        assert_eq!(count, if update == 2 { 0 } else { case.layout.entries.len() });
    }
    Ok(())
}

/// Frozen weights in bf16 under adapters in f32: how the full model is trained.
#[test]
fn parity_of_adapters_on_bf16_weights_with_peft() -> Result<()> {
    let case = lora_case(DEFAULT, DType::BF16)?;
    let v = case.velocity(&case.params)?;
    let error = max_error(&v, case.get("out.v"))?;
    eprintln!("sd3_lora on bf16: v {error:.1e}");
    assert!(error <= 2e-2, "{error:.1e}");
    let flat = case.gradient(1, |v| Ok(case.loss(v, 1.0, 1e-4, ["out.v_old", "out.v_ref"])?.1))?;
    case.check_gradients(&flat, 5e-2)?;
    Ok(())
}

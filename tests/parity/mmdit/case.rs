//! A recorded model with its inputs, outputs, losses and gradients, and how it is compared.

use candle_core::{DType, Device, Tensor};
use flowrl_dist::advantage::AdvantageMap;
use flowrl_dist::comm::Solo;
use flowrl_dist::engine::{self, Checkpointing};
use flowrl_dist::model::Model;
use flowrl_dist::model::mmdit::{self, Config};
use flowrl_dist::objective::{DiffusionNftConfig, MethodSpec, Point, Target, TargetVelocities};
use flowrl_dist::params::{Layout, LoraConfig, ParamSet, Role, Spec, Trainable};
use flowrl_dist::shard::{Gradients, Partition, Reduction};
use flowrl_dist::train::step::{self, Velocities};
use flowrl_dist::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;

pub fn fixture(name: &str) -> PathBuf {
    let folder = std::env::var_os("FLOWRL_FIXTURES")
        .map_or(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), PathBuf::from);
    folder.join(name)
}

pub type Tensors = HashMap<String, Tensor>;

pub fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).expect("the fixture")
}

pub fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(name)).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

/// Values in [-1, 1) by the name: splitmix64 seeded with FNV-1a of it, its upper 24 bits.
pub fn uniform(name: &str, len: usize) -> Vec<f32> {
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
pub fn hashed(spec: &Spec) -> Result<Tensor> {
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
pub struct Case {
    pub name: &'static str,
    pub model: Model,
    /// Leaves of the trainable parameters.
    pub params: ParamSet,
    pub layout: Layout,
    pub io: Tensors,
    pub meta: Value,
}

impl Case {
    /// The whole model, trained.
    pub fn full(name: &'static str) -> Result<Self> {
        let io = tensors(&format!("{name}/io.safetensors"));
        let model = build(name, &io, None)?;
        let specs = model.specs();
        let base = ParamSet::build(&specs, weights(name, &specs))?;
        Self::of(name, io, model, base, Trainable::Full)
    }

    pub fn of(name: &'static str, io: Tensors, model: Model, base: ParamSet, trainable: Trainable) -> Result<Self> {
        let layout = Layout::new(&model.specs(), trainable);
        let params = base.with_flat(&layout, &base.flatten(&layout)?)?;
        Ok(Self { name, model, params, layout, io, meta: json(&format!("{name}/meta.json")) })
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.io.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.name))
    }

    /// Times in [0, 1], rounded once: the recorded ones are 1000 times these.
    pub fn times(&self) -> Result<Tensor> {
        Ok((self.get("in.timestep").to_dtype(DType::F64)? / 1000.0)?.to_dtype(DType::F32)?)
    }

    pub fn conditioning(&self) -> Vec<Tensor> {
        vec![self.get("in.encoder_hidden_states").clone(), self.get("in.pooled").clone()]
    }

    pub fn velocity(&self, params: &ParamSet) -> Result<Tensor> {
        engine::velocity(&self.model, params, self.get("in.xt"), &self.times()?, &self.conditioning())
    }

    /// The loss of DiffusionNFT at the velocity `v`, mean over samples, and its gradient.
    pub fn loss(&self, v: &Tensor, mix: f64, kl_coef: f64, frozen: [&str; 2]) -> Result<(f64, Tensor)> {
        let config = DiffusionNftConfig { nft_beta: mix, kl_coef, ..Default::default() };
        let point = Point {
            x_t: self.get("in.xt").clone(),
            t: self.times()?,
            advantage: self.get("in.advantage").clone(),
            target: Target::Forward { x0: self.get("in.x0").clone(), eps: self.get("in.noise").clone() },
        };
        let [old, reference] = frozen.map(|name| Some(self.get(name).clone()));
        let velocities = Velocities { policy: v.clone(), negative: None, targets: TargetVelocities { old, reference } };
        let samples = v.dim(0)?;
        let mean = Tensor::full(1.0 / samples as f32, samples, &Device::Cpu)?;
        let objective = config.objective(&AdvantageMap::DIFFUSION_NFT);
        let (terms, dv) = step::differentiate(&*objective, &point, &velocities, &mean)?;
        Ok((f64::from(terms.loss.mean_all()?.to_scalar::<f32>()?), dv))
    }

    /// Velocity and flat gradient, block by block, given the gradient of the velocity.
    pub fn gradient(&self, checkpointing: usize, dv: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Vec<f32>> {
        let (x_t, t, conditioning) = (self.get("in.xt"), self.times()?, self.conditioning());
        let (v, tape) =
            engine::forward(&self.model, &self.params, x_t, &t, &conditioning, Checkpointing(checkpointing))?;
        let partition = Partition::new(&self.layout, 1);
        let gradients = Gradients::zeros(&self.layout, &partition, &Device::Cpu)?;
        let mut reduction = Reduction::new(gradients, &partition, &Solo);
        step::accumulate(&self.model, &self.params, tape, &dv(&v)?, &mut reduction, true)?;
        Ok(reduction.finish()?.to_vec1()?)
    }

    /// Largest relative error of the recorded gradients, by norm, and how many of them there are.
    pub fn check_gradients(&self, flat: &[f32], tolerance: f64) -> Result<(f64, usize)> {
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

pub fn build(name: &str, io: &Tensors, lora: Option<&LoraConfig>) -> Result<Model> {
    let config = Config::read(&fixture(&format!("{name}/config.json")))?;
    let (_, _, height, width) = io["in.xt"].dims4()?;
    mmdit::model(&config, (height, width), lora)
}

/// The base weights of a fixture: of its file, which then holds the model's parameters and no others, or by hash.
pub fn weights(name: &str, specs: &[&[Spec]]) -> impl Fn(&Spec) -> Result<Tensor> + use<> {
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
pub fn relative_norm(ours: &[f32], recorded: &[f32]) -> f64 {
    assert_eq!(ours.len(), recorded.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let scale = norm(&mut recorded.iter().map(|&x| f64::from(x)));
    let error = norm(&mut ours.iter().zip(recorded).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    if error == 0.0 { 0.0 } else { error / scale }
}

/// Largest difference over the largest recorded value.
pub fn max_error(ours: &Tensor, recorded: &Tensor) -> Result<f64> {
    assert_eq!(ours.dims(), recorded.dims());
    let recorded = recorded.to_dtype(DType::F64)?;
    let largest = |t: &Tensor| -> Result<f64> { Ok(t.abs()?.flatten_all()?.max(0)?.to_scalar()?) };
    Ok(largest(&(ours.to_dtype(DType::F64)? - &recorded)?)? / largest(&recorded)?)
}

/// Compares what every stage hands on with what diffusers recorded there; prints and bounds the errors.
pub fn check_forward(case: &Case, params: &ParamSet, tolerance: f64) -> Result<()> {
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

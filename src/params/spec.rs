//! What a model declares: names, shapes, initial values and roles.

use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

/// How a parameter starts when no file gives its value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Gaussian with this standard deviation.
    Normal(f64),
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
    /// Positions of a square grid, `[1, side^2, D]`, as sines and cosines of the column and the row.
    Grid {
        /// Points on a side of the grid that has positions 0, 1, 2, ...; this one has `base / side` times these.
        base: usize,
    },
}

/// Whether a parameter belongs to the base model or to the low-rank adapter beside it, and whether it can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Of the base model: trained when the whole model is.
    Base,
    /// Of the base model and fixed: its files hold it, nothing trains it.
    Buffer,
    /// Of the LoRA adapter: trained instead of the base model.
    Adapter,
}

impl Role {
    /// The type in which parameters of this role are kept and travel where the model computes in `model`. Adapters are f32
    /// whatever it is: late in a run their updates are smaller than the last bit of bf16, and the difference of policy and
    /// old policy would be that rounding.
    pub fn dtype(self, model: DType) -> DType {
        match self {
            Role::Base | Role::Buffer => model,
            Role::Adapter => DType::F32,
        }
    }
}

/// One parameter as a stage declares it.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// Full name, as in the checkpoint files of the field.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Initial value.
    pub init: Init,
    /// Base model or adapter.
    pub role: Role,
}

impl Spec {
    /// Initial values: a function of `seed` and the parameter's name only.
    pub fn initial(&self, seed: u64, device: &Device) -> Result<Tensor> {
        let len: usize = self.shape.iter().product();
        let values = match self.init {
            Init::Zeros => vec![0f32; len],
            Init::Ones => vec![1f32; len],
            Init::Normal(std) => {
                let hash = blake3::hash(self.name.as_bytes());
                let (words, _) = hash.as_bytes().as_chunks();
                let [first, second] = [words[0], words[1]].map(u64::from_le_bytes);
                let normals = Stream::new(seed, Purpose::Parameters, [first, second, 0, 0]).normals(len);
                normals.into_iter().map(|x| (f64::from(x) * std) as f32).collect()
            }
            Init::Grid { base } => grid(&self.shape, base)?,
        };
        Ok(Tensor::from_vec(values, self.shape.as_slice(), device)?)
    }
}

/// Place of a parameter in its stage's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(pub(super) usize);

/// LoRA: `W x + alpha / rank * B A x` beside the frozen `W` (Hu et al., arXiv 2106.09685).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Rank of the update.
    pub rank: usize,
    /// Scale: the update is multiplied by alpha / rank.
    pub alpha: f64,
    /// The linear layers that get an adapter, by the end of their name (`attn.to_q`).
    pub targets: Vec<String>,
}

/// The linear layers of a transformer block that get an adapter unless the configuration chooses, by the end of the name.
pub const LORA_TARGETS: [&str; 6] =
    ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2"];

impl LoraConfig {
    /// Whether the linear layer `name` gets an adapter.
    pub fn wants(&self, name: &str) -> bool {
        self.targets.iter().any(|target| is_end_of(target, name))
    }
}

/// Whether the last parts of a layer's name are `end`.
pub fn is_end_of(end: &str, name: &str) -> bool {
    name.strip_suffix(end).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 32, alpha: 64.0, targets: LORA_TARGETS.map(String::from).to_vec() }
    }
}

/// The parameters that a stage declares, in order.
#[derive(Debug)]
pub struct SpecList<'a> {
    prefix: String,
    lora: Option<&'a LoraConfig>,
    specs: Vec<Spec>,
}

impl<'a> SpecList<'a> {
    /// An empty list for the stage whose parameters' names start with `prefix` (empty or ending in a dot).
    pub fn new(prefix: impl Into<String>, lora: Option<&'a LoraConfig>) -> Self {
        Self { prefix: prefix.into(), lora, specs: Vec::new() }
    }

    /// Declares a parameter of the base model.
    pub fn base(&mut self, name: &str, shape: &[usize], init: Init) -> Slot {
        self.push(name, shape, init, Role::Base)
    }

    /// Declares a fixed tensor of the base model.
    pub fn buffer(&mut self, name: &str, shape: &[usize], init: Init) -> Slot {
        self.push(name, shape, init, Role::Buffer)
    }

    /// The adapter's two factors for the linear layer `name` `[out, in]`, if the configuration wants one there,
    /// with its scale: A `[rank, in]` Gaussian with deviation 1/rank, B `[out, rank]` zero (PEFT's "gaussian").
    pub fn adapter(&mut self, name: &str, in_dim: usize, out_dim: usize) -> Option<(Slot, Slot, f64)> {
        let lora = self.lora?;
        lora.wants(&format!("{}{name}", self.prefix)).then(|| {
            let a = self.push(
                &format!("{name}.lora_A.weight"),
                &[lora.rank, in_dim],
                Init::Normal(1.0 / lora.rank as f64),
                Role::Adapter,
            );
            let b = self.push(&format!("{name}.lora_B.weight"), &[out_dim, lora.rank], Init::Zeros, Role::Adapter);
            (a, b, lora.alpha / lora.rank as f64)
        })
    }

    /// The declared parameters.
    pub fn finish(self) -> Vec<Spec> {
        self.specs
    }

    fn push(&mut self, name: &str, shape: &[usize], init: Init, role: Role) -> Slot {
        self.specs.push(Spec { name: format!("{}{name}", self.prefix), shape: shape.to_vec(), init, role });
        Slot(self.specs.len() - 1)
    }
}

/// Sines and cosines of the column, then of the row, of each point of a square grid, `[1, side^2, D]`: D/4 frequencies
/// from 1 down to almost 1e-4 (diffusers `get_2d_sincos_pos_embed`, embeddings.py of v0.33.1).
fn grid(shape: &[usize], base: usize) -> Result<Vec<f32>> {
    let (points, width) = (shape.iter().rev().skip(1).product::<usize>(), shape.last().copied().unwrap_or(0));
    let (side, quarter) = (points.isqrt(), width / 4);
    if side * side != points || quarter * 4 != width {
        return Err(Error::Failed(format!("{shape:?} is no square grid with a multiple of four features")));
    }
    let unit = (side as f64 / base as f64) as f32;
    let features = |at: usize| {
        // Positions are f32 there, frequencies f64.
        let angle = move |i: usize| f64::from(at as f32 / unit) / 10_000f64.powf(i as f64 / quarter as f64);
        let (sines, cosines) = ((0..quarter).map(angle).map(libm::sin), (0..quarter).map(angle).map(libm::cos));
        sines.chain(cosines).map(|x| x as f32).collect::<Vec<_>>()
    };
    let lines: Vec<_> = (0..side).map(features).collect();
    let mut values = Vec::with_capacity(points * width);
    for row in &lines {
        for column in &lines {
            values.extend(column.iter().chain(row));
        }
    }
    Ok(values)
}

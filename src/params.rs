//! Named parameters: what a model declares, in which order the trainable ones lie in the flat vector, and the tensors.
//!
//! The order is the order of declaration, stage after stage, on every rank: a hash map's order would differ between
//! processes and reduce different parameters into each other without an error.

use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};
use candle_core::{Device, Tensor, Var};
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
                let name = u64::from_le_bytes(first_eight(blake3::hash(self.name.as_bytes()).as_bytes()));
                let normals = Stream::new(seed, Purpose::Parameters, [name, 0, 0, 0]).normals(len);
                normals.into_iter().map(|x| (f64::from(x) * std) as f32).collect()
            }
            Init::Grid { base } => grid(&self.shape, base)?,
        };
        Ok(Tensor::from_vec(values, self.shape.as_slice(), device)?)
    }
}

/// Place of a parameter in its stage's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(usize);

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
        let full = format!("{}{name}", self.prefix);
        let wanted =
            |t: &String| full.strip_suffix(t.as_str()).is_some_and(|head| head.is_empty() || head.ends_with('.'));
        lora.targets.iter().any(wanted).then(|| {
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

/// The tensors of one stage, in the order of its specs; an adapter that is switched off is absent.
#[derive(Debug, Clone)]
pub struct StageParams(Vec<Option<Tensor>>);

impl StageParams {
    /// The parameter in `slot`.
    pub fn get(&self, slot: Slot) -> Result<&Tensor> {
        self.0[slot.0].as_ref().ok_or_else(|| Error::Failed(format!("parameter {} of a stage is absent", slot.0)))
    }

    /// The parameter in `slot`, or nothing where the adapter is off.
    pub fn adapter(&self, slot: Slot) -> Option<&Tensor> {
        self.0[slot.0].as_ref()
    }

    /// The same values outside any graph: running a stage on them records nothing.
    pub fn detached(&self) -> Self {
        Self(self.0.iter().map(|t| t.as_ref().map(Tensor::detach)).collect())
    }

    /// The tensors with their places.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.0.iter().enumerate().filter_map(|(i, t)| t.as_ref().map(|t| (i, t)))
    }
}

/// Which parameters are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trainable {
    /// Every parameter of the base model.
    Full,
    /// The adapters only.
    Lora,
}

/// Where one trainable parameter lies in the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its stage.
    pub stage: usize,
    /// Its place in the stage's list.
    pub slot: usize,
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its first element in the flat vector.
    pub offset: usize,
    /// Its number of elements.
    pub len: usize,
}

/// The trainable parameters as one flat vector: stage after stage, in the order of declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The parameters in the vector's order.
    pub entries: Vec<Entry>,
    /// Elements in all.
    pub total: usize,
}

impl Layout {
    /// The layout of the parameters of `stages` that `trainable` selects.
    pub fn new(stages: &[&[Spec]], trainable: Trainable) -> Self {
        let role = match trainable {
            Trainable::Full => Role::Base,
            Trainable::Lora => Role::Adapter,
        };
        let mut layout = Self { entries: Vec::new(), total: 0 };
        for (stage, specs) in stages.iter().enumerate() {
            for (slot, spec) in specs.iter().enumerate().filter(|(_, s)| s.role == role) {
                let len = spec.shape.iter().product();
                layout.entries.push(Entry {
                    stage,
                    slot,
                    name: spec.name.clone(),
                    shape: spec.shape.clone(),
                    offset: layout.total,
                    len,
                });
                layout.total += len;
            }
        }
        layout
    }

    /// The entries of one stage.
    pub fn stage(&self, stage: usize) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(move |e| e.stage == stage)
    }

    /// Digest of names, shapes and order: two runs with the same digest can exchange flat vectors.
    pub fn digest(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for e in &self.entries {
            hash.update(format!("{} {:?}\n", e.name, e.shape).as_bytes());
        }
        hash.finalize().to_hex().to_string()
    }
}

/// All tensors of a model. Cloning shares them.
#[derive(Debug, Clone)]
pub struct ParamSet {
    stages: Vec<StageParams>,
}

impl ParamSet {
    /// Initial values of every parameter.
    pub fn init(stages: &[&[Spec]], seed: u64, device: &Device) -> Result<Self> {
        Self::build(stages, |spec| spec.initial(seed, device))
    }

    /// A set whose tensors `tensor` gives.
    pub fn build(stages: &[&[Spec]], mut tensor: impl FnMut(&Spec) -> Result<Tensor>) -> Result<Self> {
        let mut stage =
            |specs: &&[Spec]| specs.iter().map(|s| tensor(s).map(Some)).collect::<Result<_>>().map(StageParams);
        Ok(Self { stages: stages.iter().map(&mut stage).collect::<Result<_>>()? })
    }

    /// The tensors of one stage.
    pub fn stage(&self, stage: usize) -> &StageParams {
        &self.stages[stage]
    }

    /// The same set with the parameters of `layout` taken from `flat` `[>= total]` (f32) as fresh leaves; every other
    /// tensor is shared.
    pub fn with_flat(&self, layout: &Layout, flat: &Tensor) -> Result<Self> {
        let mut set = self.clone();
        for e in &layout.entries {
            // A copy, not a view: the gradient of a view is padded to the whole vector's size.
            let leaf = Var::from_tensor(&flat.narrow(0, e.offset, e.len)?.reshape(e.shape.as_slice())?)?.into_inner();
            set.stages[e.stage].0[e.slot] = Some(leaf);
        }
        Ok(set)
    }

    /// The same set without its adapters: the base model.
    pub fn without_adapters(&self, stages: &[&[Spec]]) -> Self {
        let mut set = self.clone();
        for (params, specs) in set.stages.iter_mut().zip(stages) {
            for (tensor, spec) in params.0.iter_mut().zip(specs.iter()) {
                if spec.role == Role::Adapter {
                    *tensor = None;
                }
            }
        }
        set
    }

    /// The parameters of `layout` as one flat f32 vector `[total]`.
    pub fn flatten(&self, layout: &Layout) -> Result<Tensor> {
        let parts = layout
            .entries
            .iter()
            .map(|e| Ok(self.stages[e.stage].get(Slot(e.slot))?.detach().flatten_all()?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&parts, 0)?)
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

fn first_eight(bytes: &[u8; 32]) -> [u8; 8] {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[..8]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(lora: Option<&LoraConfig>) -> Vec<Spec> {
        let mut list = SpecList::new("block.0.", lora);
        list.base("attn.to_q.weight", &[3, 2], Init::Normal(1.0));
        list.adapter("attn.to_q", 2, 3);
        list.base("attn.to_qq.weight", &[1], Init::Ones);
        list.adapter("attn.to_qq", 1, 1);
        list.finish()
    }

    #[test]
    fn adapters_stand_only_at_their_targets() {
        let lora = LoraConfig { rank: 2, alpha: 4.0, targets: vec!["attn.to_q".into()] };
        let specs = specs(Some(&lora));
        let names: Vec<_> = specs.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "block.0.attn.to_q.weight",
                "block.0.attn.to_q.lora_A.weight",
                "block.0.attn.to_q.lora_B.weight",
                "block.0.attn.to_qq.weight"
            ]
        );
        assert_eq!(Layout::new(&[&specs], Trainable::Lora).total, 2 * 2 + 3 * 2);
        assert_eq!(Layout::new(&[&specs], Trainable::Full).total, 7);
    }

    #[test]
    fn flat_vector_and_tensors_hold_the_same_values() -> Result<()> {
        let specs = specs(None);
        let stages = [specs.as_slice()];
        let layout = Layout::new(&stages, Trainable::Full);
        let set = ParamSet::init(&stages, 3, &Device::Cpu)?;
        let flat = set.flatten(&layout)?;
        let again = set.with_flat(&layout, &(&flat * 2.0)?)?.flatten(&layout)?;
        assert_eq!(again.to_vec1::<f32>()?, (&flat * 2.0)?.to_vec1::<f32>()?);
        assert_eq!(flat.to_vec1::<f32>()?[6], 1.0);
        Ok(())
    }
}

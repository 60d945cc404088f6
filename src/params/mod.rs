//! Named parameters: what a model declares, in which order the trainable ones lie in the flat vector, and the tensors.
//!
//! The order is the order of declaration, stage after stage, on every rank: a hash map's order would differ between
//! processes and reduce different parameters into each other without an error.

mod spec;
mod values;

pub use spec::{Init, LORA_TARGETS, LoraConfig, Role, Slot, Spec, SpecList, is_end_of};
pub use values::Values;

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

/// The tensors of one stage, in the order of its specs; an adapter that is switched off is absent.
#[derive(Debug, Clone)]
pub struct StageParams(Vec<Option<Tensor>>);

impl StageParams {
    /// No parameters yet, in `slots` places.
    pub(crate) fn absent(slots: usize) -> Self {
        Self(vec![None; slots])
    }

    /// Puts a tensor in the place of a layout's entry.
    pub(crate) fn put(&mut self, entry: &Entry, tensor: Tensor) {
        self.0[entry.slot] = Some(tensor);
    }

    /// The tensor of a layout's entry.
    pub(crate) fn of(&self, entry: &Entry) -> Result<&Tensor> {
        self.get(Slot(entry.slot))
    }

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

impl Trainable {
    /// The role of the parameters that are trained.
    pub fn role(self) -> Role {
        match self {
            Trainable::Full => Role::Base,
            Trainable::Lora => Role::Adapter,
        }
    }
}

/// The numbers that a model computes in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits with the exponents of f32.
    Bf16,
}

impl Precision {
    /// The tensors' type.
    pub fn dtype(self) -> DType {
        match self {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        }
    }
}

/// Where one parameter lies in a flat vector.
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

/// Parameters as one flat vector, the trainable ones unless it is said otherwise: stage after stage, in the order of
/// declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The parameters in the vector's order.
    pub entries: Vec<Entry>,
    /// Elements in all.
    pub total: usize,
}

impl Layout {
    /// The layout of the parameters of `stages` that are trained.
    pub fn new(stages: &[&[Spec]], trainable: Trainable) -> Self {
        Self::select(stages, |role| role == trainable.role())
    }

    /// The layout of those that are not.
    pub fn frozen(stages: &[&[Spec]], trainable: Trainable) -> Self {
        Self::select(stages, |role| role != trainable.role())
    }

    /// The layout of all parameters.
    pub fn all(stages: &[&[Spec]]) -> Self {
        Self::select(stages, |_| true)
    }

    /// The layout of parameters by name and shape, whose model is not at hand: all in one stage. None where they have more
    /// elements than can be counted.
    pub fn of_named<'a>(parameters: impl Iterator<Item = (&'a str, &'a [usize])>) -> Option<Self> {
        let mut layout = Self { entries: Vec::new(), total: 0 };
        for (slot, (name, shape)) in parameters.enumerate() {
            shape.iter().try_fold(1_usize, |len, &side| len.checked_mul(side))?.checked_add(layout.total)?;
            layout.push(0, slot, name, shape);
        }
        Some(layout)
    }

    fn push(&mut self, stage: usize, slot: usize, name: &str, shape: &[usize]) {
        let len = shape.iter().product();
        let (name, shape, offset) = (name.to_owned(), shape.to_vec(), self.total);
        self.entries.push(Entry { stage, slot, name, shape, offset, len });
        self.total += len;
    }

    fn select(stages: &[&[Spec]], selects: impl Fn(Role) -> bool) -> Self {
        let mut layout = Self { entries: Vec::new(), total: 0 };
        for (stage, specs) in stages.iter().enumerate() {
            for (slot, spec) in specs.iter().enumerate().filter(|(_, s)| selects(s.role)) {
                layout.push(stage, slot, &spec.name, &spec.shape);
            }
        }
        layout
    }

    /// Stages up to the last one that has an entry.
    pub fn stages(&self) -> usize {
        self.entries.last().map_or(0, |e| e.stage + 1)
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
#[derive(Debug, Clone, Default)]
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

    /// The same set with the parameters of `layout` taken from `flat` `[>= total]` as fresh leaves, in the type of the
    /// tensors whose places they take; every other tensor is shared.
    pub fn with_flat(&self, layout: &Layout, flat: &Tensor) -> Result<Self> {
        let mut set = self.clone();
        for e in &layout.entries {
            let tensor = flat.narrow(0, e.offset, e.len)?.reshape(e.shape.as_slice())?;
            let tensor = tensor.to_dtype(set.stages[e.stage].of(e)?.dtype())?;
            // A copy, not a view: the gradient of a view is padded to the whole vector's size.
            set.stages[e.stage].put(e, Var::from_tensor(&tensor)?.into_inner());
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
        let flat = |e: &Entry| Ok(self.stages[e.stage].of(e)?.detach().flatten_all()?.to_dtype(DType::F32)?);
        Ok(Tensor::cat(&layout.entries.iter().map(flat).collect::<Result<Vec<_>>>()?, 0)?)
    }
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

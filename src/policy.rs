//! The parameter sets of a run: `policy` is trained, `old` samples and anchors, `reference` is the base model. A fourth, the
//! EMA, lives in the optimizer's shard and is gathered only to be evaluated.

use crate::comm::{Communicator, World};
use crate::error::Result;
use crate::optim::Sharded;
use crate::params::{Layout, ParamSet, Spec, Trainable, Values};
use crate::shard::{PartSet, Partition, Parts, Sharding, Weights, gather};
use candle_core::{DType, Tensor};
use std::rc::Rc;

/// Policy, old policy and base model. What is frozen is shared between them, not copied.
pub struct Policies {
    /// The trained parameters.
    pub policy: Rc<dyn Weights>,
    /// The slow copy that samples.
    pub old: Rc<dyn Weights>,
    /// The base model.
    pub reference: Rc<dyn Weights>,
    /// Whether `old` holds the same values as `policy`, so that one velocity serves for both.
    pub old_is_policy: bool,
    base: Base,
}

/// What sets are made of, beside their trained parameters.
struct Base {
    weights: BaseWeights,
    layout: Layout,
    /// Of the trained parameters.
    dtype: DType,
    comm: Rc<dyn Communicator>,
}

enum BaseWeights {
    /// Every rank holds all of them.
    Whole { base: ParamSet, partition: Partition },
    /// Every rank holds its parts of those that are frozen.
    Parts { frozen: Rc<Parts>, slots: Rc<[usize]> },
}

impl Policies {
    /// The sets of the optimizer's state beside the base weights, fresh adapters included if adapters are trained; of these
    /// weights a rank reads what it keeps. `old_is_policy`: the old policy was last set to the policy's values.
    pub fn new(
        base: &dyn Values,
        specs: &[&[Spec]],
        trainable: Trainable,
        state: &Sharded,
        old_is_policy: bool,
        world: &World,
    ) -> Result<Self> {
        let (comm, layout) = (world.device.clone(), Layout::new(specs, trainable));
        let dtype = base.dtype();
        let (weights, reference): (_, Rc<dyn Weights>) = match state.sharding() {
            Sharding::None | Sharding::Optimizer => {
                let base = ParamSet::read(specs, base)?;
                let reference = match trainable {
                    Trainable::Full => base.clone(),
                    Trainable::Lora => base.without_adapters(specs),
                };
                (BaseWeights::Whole { base, partition: state.partition().clone() }, Rc::new(reference))
            }
            Sharding::Full => {
                let slots: Rc<[usize]> = specs.iter().map(|stage| stage.len()).collect();
                let frozen = Rc::new(Parts::cut(base, &Layout::frozen(specs, trainable), dtype, &comm)?);
                let own = match trainable {
                    Trainable::Full => Some(Parts::cut(base, &layout, dtype, &comm)?),
                    Trainable::Lora => None,
                };
                let reference = PartSet::new(&slots, &frozen, own);
                (BaseWeights::Parts { frozen, slots }, Rc::new(reference))
            }
        };
        let base = Base { weights, layout, dtype: trainable.role().dtype(dtype), comm };
        let (policy, old) = (base.with(&state.policy()?)?, base.with(state.old())?);
        Ok(Self { policy, old, reference, old_is_policy, base })
    }

    /// The set whose trained parameters are those of all ranks' shards `[S]`, weights in the model's type and adapters in f32:
    /// gathered now, or part of the shard itself and gathered when they are used.
    pub fn with(&self, shard: &Tensor) -> Result<Rc<dyn Weights>> {
        self.base.with(shard)
    }

    /// Digest of the trained parameters of policy and old policy.
    pub fn digest(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for set in [&self.policy, &self.old] {
            for stage in 0..self.base.layout.stages() {
                let params = set.begin(stage)?.values()?;
                for e in self.base.layout.stage(stage) {
                    let values = params.of(e)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                    hasher.update(bytemuck::cast_slice(&values));
                }
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The policy after an update.
    pub fn refresh_policy(&mut self, state: &Sharded) -> Result<()> {
        self.policy = self.with(&state.policy()?)?;
        self.old_is_policy = false;
        Ok(())
    }

    /// The old policy after it followed the policy with the share `eta` of itself.
    pub fn refresh_old(&mut self, state: &Sharded, eta: f64) -> Result<()> {
        self.old = self.with(state.old())?;
        self.old_is_policy = eta == 0.0;
        Ok(())
    }
}

impl Base {
    fn with(&self, shard: &Tensor) -> Result<Rc<dyn Weights>> {
        let Self { weights, layout, dtype, comm } = self;
        Ok(match weights {
            BaseWeights::Whole { base, partition } => {
                let flat = gather(partition, &shard.to_dtype(*dtype)?, &**comm)?;
                Rc::new(base.with_flat(layout, &flat)?)
            }
            BaseWeights::Parts { frozen, slots } => {
                let trained = Parts::new(layout, shard.clone(), *dtype, comm);
                Rc::new(PartSet::new(slots, frozen, Some(trained)))
            }
        })
    }
}

#[cfg(test)]
mod tests;

//! The three sets of parameters of a run, by their four names: `policy` is trained, `old` samples and anchors,
//! `reference` is the base model; the EMA lives in the optimizer's shard and is gathered when it is evaluated.

use crate::comm::World;
use crate::error::Result;
use crate::optim::Sharded;
use crate::params::{Layout, ParamSet, Trainable};
use crate::pipeline::Pipeline;

/// Policy, old policy and base model. Frozen tensors are shared between them, not copied.
pub struct Policies {
    /// The trained parameters.
    pub policy: ParamSet,
    /// The slow copy that samples.
    pub old: ParamSet,
    /// The base model.
    pub reference: ParamSet,
    /// Whether `old` holds the same values as `policy`.
    pub old_is_policy: bool,
}

impl Policies {
    /// The sets for the optimizer's state.
    pub fn new(
        pipeline: &Pipeline,
        trainable: Trainable,
        layout: &Layout,
        state: &Sharded,
        world: &World,
    ) -> Result<Self> {
        let reference = match trainable {
            Trainable::Full => pipeline.base.clone(),
            Trainable::Lora => pipeline.base.without_adapters(&pipeline.model.specs()),
        };
        let base = &pipeline.base;
        let policy = base.with_flat(layout, &state.gather_policy(&*world.device)?)?;
        let old = base.with_flat(layout, &state.gather_old(&*world.device)?)?;
        Ok(Self { policy, old, reference, old_is_policy: false })
    }
}
